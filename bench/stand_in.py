"""Models of real shapes with random weights, for machines without a network.

    python -m bench.stand_in qwen2.5-0.5b DIR     a folder that train.py takes as --model

Its tokenizer is the embedded one, filled up with words to the size of the vocabulary, so that any sampled id decodes.
"""

import sys
from pathlib import Path

import torch

VOCABULARY = 151936
SHAPES = {
    "qwen2.5-0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "qwen2.5-3b": dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2
    ),
}


def make_model(name, device, **more):
    """A causal language model in fp32 with random weights: the embedded one ("tiny"), or a shape of SHAPES."""
    from engine import model

    if name == "tiny":
        return model.load_model("tiny", 0, torch.float32).to(device)
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=4096, **SHAPES[name], **more
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def save(name, folder, device):
    from engine import model

    tokenizer = model.tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), VOCABULARY)])
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model.export_model(make_model(name, device, **ends).to(torch.bfloat16), tokenizer, Path(folder))


if __name__ == "__main__":
    save(*sys.argv[1:], "cuda" if torch.cuda.is_available() else "cpu")
