"""Real weights for a machine without a network, where little travels at a time.

    python -m bench.weights split FILE DIR [--mib 56] [--without TENSOR]    DIR/00.part, 01.part, ... and manifest.json
    python -m bench.weights join DIR [DIR ...] FILE       the file again, from pieces that lie in one or more folders
    python -m bench.weights convert FILE.gguf DIR         a Hugging Face folder in bf16 that train.py takes as --model

A tensor that is left out comes back as zeros: `--without token_embd.weight` where the head is the embedding and the
file holds both. `convert` is transformers' reading of GGUF files; it sees that the two are one matrix, or that one is
left out, and gives both the head's values, which are quantised to more bits. Exit code 1 with a sentence when something
is missing, damaged or of another kind. convert needs the packages gguf and accelerate, --without needs gguf.
"""

import argparse
import collections
import hashlib
import json
import sys
from pathlib import Path

import torch

from engine import model
from engine.provenance import installed

from .run import known

ONE_MATRIX = 0.2  # relative difference of two quantisations: a few percent of one matrix, above 1 of two
ORIGIN = "origin.json"  # in a converted folder: the file, and how many of its tensors were of which kind


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def split(path, folder, mib, without=""):
    """Writes the pieces and their manifest."""
    if mib < 1:
        raise ValueError(f"pieces of {mib} MiB hold nothing")
    start = end = 0
    if without:
        tensors = {tensor.name: tensor for tensor in read(path).tensors}
        tensor = tensors[known("tensor", without, list(tensors))]
        start, end = tensor.data_offset, tensor.data_offset + tensor.n_bytes
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


def need(*packages):
    if missing := [package for package in packages if installed(package) is None]:
        raise ValueError(f"{' and '.join(missing)} missing: pip install --no-deps -r requirements-bench.txt")


def read(path):
    """The gguf.GGUFReader of a file."""
    need("gguf")
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path.name} is no GGUF file, or is cut short: {error}") from None


def convert(path, folder):
    """Writes the folder, whole or not at all."""
    need("gguf", "accelerate")
    source = read(path)
    tokenizer, lm = load_tokenizer(path, source), load_model(path, source)
    tied = tie(lm)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.export_model(lm, tokenizer, folder)
    kinds = collections.Counter(tensor.tensor_type.name for tensor in source.tensors)
    (folder / ORIGIN).write_text(json.dumps({"file": path.name, "tensors": kinds}) + "\n")
    print(f"{folder}: {sum(x.numel() for x in lm.parameters()):,} parameters" + ", tied" * tied)


def load_tokenizer(path, source):
    """The tokenizer, with the special tokens and the end that the file names: transformers 5.17 has them by heart, and
    of Qwen2's only three."""
    from gguf import TokenType
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    names = ("tokens", "token_type", "eos_token_id")
    tokens, kinds, eos = (source.fields[f"tokenizer.ggml.{name}"].contents() for name in names)
    special = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    tokenizer.add_tokens(
        [AddedToken(x, normalized=False, special=special[kind]) for x, kind in zip(tokens, kinds) if kind in special]
    )
    tokenizer.eos_token = tokens[eos]
    return tokenizer


def load_model(path, source):
    """The model in bf16; ValueError unless it is made of the file's tensors and no others: transformers draws at random
    what it does not find, and leaves out what it does not know."""
    from transformers import AutoModelForCausalLM, GgufConfig

    options = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    lm, found = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, output_loading_info=True, trust_remote_code=False, **options
    )
    if found["missing_keys"]:
        raise ValueError(f"{path.name} does not hold {', '.join(sorted(found['missing_keys']))}")
    held, taken = sum(int(tensor.n_elements) for tensor in source.tensors), sum(x.numel() for x in lm.parameters())
    if taken != held:
        raise ValueError(f"{path.name} holds {held:,} values, of which {type(lm).__name__} takes {taken:,}")
    return lm


@torch.no_grad()
def tie(lm):
    """Gives the embedding the head's values where they are one matrix; whether they are."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    apart = (embedding.weight.float() - head.weight.float()).norm()
    if tied := not embedding.weight.any() or bool(apart < ONE_MATRIX * head.weight.float().norm()):
        embedding.weight, lm.config.tie_word_embeddings = head.weight, True
    return tied


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
