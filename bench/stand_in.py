"""Models of real shapes with random weights, for machines without a network.

    python -m bench.stand_in qwen2.5-0.5b DIR     a folder that train.py takes as --model

Its tokenizer is the embedded one, filled up with words to the size of the vocabulary, so that any sampled id decodes.
The words stand in the vocabulary of its BPE, where no merge makes them: added tokens would each be searched for, and
take 15 s to load.
"""

import json
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
    "smollm2-135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    ),
}


def shape_of(name):
    return {"vocab_size": VOCABULARY} | SHAPES[name]


def make_model(name, device, **more):
    """A causal language model in fp32: a shape of SHAPES with random weights, else what train.py has as --model."""
    from engine import model

    if name not in SHAPES:
        return model.load_model(name, 0, torch.float32).to(device)
    import transformers

    config = transformers.Qwen2Config(tie_word_embeddings=True, max_position_embeddings=4096, **shape_of(name), **more)
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def filled_tokenizer(size=VOCABULARY):
    """The embedded tokenizer with `size` ids in all."""
    from engine import model

    tokenizer = model.load_tokenizer("tiny")
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"] = tokenizer.get_vocab() | {f"<{i}>": i for i in range(len(tokenizer), size)}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(core))
    return tokenizer


def save(name, folder, device):
    from engine import model

    tokenizer = filled_tokenizer(shape_of(name)["vocab_size"])
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    lm = model.cast_parameters(make_model(name, device, **ends), torch.bfloat16)
    model.export_model(lm, tokenizer, Path(folder))


if __name__ == "__main__":
    save(*sys.argv[1:], "cuda" if torch.cuda.is_available() else "cpu")
