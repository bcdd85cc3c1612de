"""Real weights for a machine without a network, where little travels at a time.

    python -m bench.weights split FILE DIR [--mib 56] [--without TENSOR]    DIR/00.part, 01.part, ... and manifest.json
    python -m bench.weights join DIR [DIR ...] FILE       the file again, from pieces that lie in one or more folders
    python -m bench.weights convert FILE.gguf DIR         a Hugging Face folder in bf16 that train.py takes as --model

A tensor that is left out comes back as zeros: `--without token_embd.weight` where the head is the embedding and the
file holds both. `convert` sees that the two are one matrix, or that one is left out, and gives both the head's values,
which are quantised to more bits. Exit code 1 with a sentence when something is missing, damaged or of another kind.
"""

import argparse
import collections
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from . import gguf
from .run import known

LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
REST = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ONE_MATRIX = 0.2  # relative difference of two quantisations: a few percent of one matrix, above 1 of two
SHAPE = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
CONTROL, OWN, UNUSED = 3, 4, 5  # types of tokens: special, the user's own, padding of the vocabulary
ORIGIN = "origin.json"  # in a converted folder: the file, and how many of its tensors were of which kind


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def split(path, folder, mib, without=""):
    """Writes the pieces and their manifest."""
    if mib < 1:
        raise ValueError(f"pieces of {mib} MiB hold nothing")
    start = end = 0
    if without:
        places = gguf.read(path).places
        start, end = places[known("tensor", without, list(places))].span
    data = path.read_bytes()
    kept, step, pieces = data[:start] + data[end:], mib << 20, []
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, len(kept), step)):
        piece, name = kept[first : first + step], f"{number:02d}.part"
        (folder / name).write_bytes(piece)
        pieces.append({"name": name, "size": len(piece), "sha256": sha256(piece)})
    manifest = {"file": path.name, "size": len(data), "left_out": [start, end], "pieces": pieces}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{folder}: {len(pieces)} pieces, {len(kept):,} of {len(data):,} bytes")


def find(folders, name):
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"there is no {name} in {', '.join(map(str, folders))}")
    return path


def take(folders, piece):
    """The bytes of a piece; ValueError when they are not those of the manifest."""
    data = find(folders, piece["name"]).read_bytes()
    if len(data) != piece["size"]:
        raise ValueError(f"piece {piece['name']} has {len(data):,} bytes, not {piece['size']:,}: carry it again")
    if sha256(data) != piece["sha256"]:
        raise ValueError(f"piece {piece['name']} is damaged, its sha256 is another: carry it again")
    return data


def join(folders, path):
    """Writes the file, whole or not at all."""
    manifest = json.loads(find(folders, "manifest.json").read_text())
    kept, (start, end) = b"".join(take(folders, piece) for piece in manifest["pieces"]), manifest["left_out"]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        file.write(kept[:start])
        file.seek(end)
        file.write(kept[start:])
        file.truncate(manifest["size"])
    aside.rename(path)
    print(f"{path}: {manifest['size']:,} bytes")


def convert(path, folder):
    """Writes the folder, whole or not at all."""
    from engine import model

    source = gguf.read(path)
    if (family := source.fields.get("general.architecture")) != "qwen2":
        raise ValueError(f"{path.name} is a {family} model; only qwen2 is converted")
    weights = {name: source.tensor(name) for name in source.places}
    tied = tie(weights)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.export_model(assemble(config_of(source, tied), weights), tokenizer_of(source.fields), folder)
    kinds = collections.Counter(gguf.KINDS[place.kind].name for place in source.places.values())
    (folder / ORIGIN).write_text(json.dumps({"file": path.name, "tensors": kinds}) + "\n")
    print(f"{folder}: {model.count_parameters(str(folder)):,} parameters" + ", tied" * tied)


def tie(weights):
    """Gives the embedding the head's values where they are one matrix, and the head the embedding's where it has none
    of its own; whether they are tied."""
    embedding = weights[EMBEDDING]
    head = weights.setdefault(HEAD, embedding)
    apart = np.linalg.norm(embedding - head) / np.linalg.norm(head)
    if tied := not embedding.any() or bool(apart < ONE_MATRIX):
        weights[EMBEDDING] = head
    return tied


def config_of(source, tied):
    """The transformers config that the fields describe."""
    import transformers

    fields = {name.removeprefix("qwen2."): value for name, value in source.fields.items()}
    tokens = {key: fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in TOKEN_IDS.items()}
    return transformers.Qwen2Config(
        vocab_size=source.places[EMBEDDING].shape[0],
        rope_parameters={"rope_type": "default", "rope_theta": fields["rope.freq_base"]},
        tie_word_embeddings=tied,
        dtype="bfloat16",
        **{key: fields[name] for key, name in SHAPE.items()},
        **tokens,
    )


def assemble(config, weights):
    """The model in bf16; ValueError unless the file has just its tensors, in their shapes."""
    import transformers

    with torch.device("meta"):
        lm = transformers.Qwen2ForCausalLM(config)
    tensors = {renamed(name): torch.from_numpy(values).to(torch.bfloat16) for name, values in weights.items()}
    try:
        lm.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the tensors are not those of the model: {error}") from None
    lm.tie_weights()
    return lm


def renamed(name):
    """What transformers calls a tensor: blk.0.attn_q.weight is model.layers.0.self_attn.q_proj.weight."""
    *block, part, kind = name.split(".")
    table = LAYER if block else REST
    if part not in table:
        raise ValueError(f"{name} is no tensor of a qwen2 model")
    return f"model.layers.{block[1]}.{table[part]}.{kind}" if block else f"{table[part]}.{kind}"


def tokenizer_of(fields):
    """The tokenizer in the file, with its chat template."""
    import transformers

    get = lambda name: fields.get(f"tokenizer.ggml.{name}")
    tokens, types = get("tokens"), get("token_type")
    named = lambda key: None if get(f"{key}_token_id") is None else tokens[get(f"{key}_token_id")]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED},
        merges=[tuple(merge.split(" ")) for merge in get("merges")],
        eos_token=named("eos"),
        pad_token=named("padding"),
        unk_token=None,
        extra_special_tokens=[token for token, kind in zip(tokens, types) if kind == CONTROL],
    )
    whole = [transformers.AddedToken(token, normalized=False) for token, kind in zip(tokens, types) if kind == OWN]
    tokenizer.add_tokens(whole)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m bench.weights", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    words = {verb: verbs.add_parser(verb) for verb in ("split", "join", "convert")}
    words["join"].add_argument("folders", type=Path, nargs="+")
    words["join"].add_argument("file", type=Path)
    for verb in ("split", "convert"):
        words[verb].add_argument("file", type=Path)
        words[verb].add_argument("folder", type=Path)
    words["split"].add_argument("--mib", type=int, default=56)
    words["split"].add_argument("--without", metavar="TENSOR", default="")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    try:
        if args.verb == "split":
            split(args.file, args.folder, args.mib, args.without)
        elif args.verb == "join":
            join(args.folders, args.file)
        else:
            convert(args.file, args.folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
