"""Real weights in pieces, and the recipe that trains them: with a small model, in a file of the real ones' format."""

import json
import math
import struct
import sys

import numpy as np
import pytest
import torch

from bench import gguf, gsm8k, weights
from engine import model
from engine.config import check_batch, load_config

F32, Q8_0 = 0, 8


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed(value):
    """A field's type and value: a text, an int, a float, or a list of texts or ints."""
    if isinstance(value, list):
        head = struct.pack("<IIQ", 9, 8 if isinstance(value[0], str) else 5, len(value))
        return head + b"".join(text(x) if isinstance(x, str) else struct.pack("<i", x) for x in value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    return struct.pack("<Ii", 5, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def write_gguf(path, fields, tensors):
    """`tensors`: name -> (kind, shape, bytes)."""
    infos, data = b"", b""
    for name, (kind, shape, raw) in tensors.items():
        infos += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(text(name) + packed(value) for name, value in fields.items()) + infos
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def exactly(values):
    return F32, tuple(values.shape), values.float().numpy().tobytes()


def in_bytes(values):
    """Q8_0: blocks of 32, each with the scale that takes its largest value to 127."""
    blocks = values.float().numpy().reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).clip(min=1e-6).astype(np.float16)
    steps = np.rint(blocks / scale.astype(np.float32)).astype(np.int8)
    return Q8_0, tuple(values.shape), b"".join(d.tobytes() + q.tobytes() for d, q in zip(scale, steps))


LLAMA = {  # the last module of a parameter in transformers -> its name in a file
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def llama_name(name):
    *path, module, kind = name.split(".")
    return ".".join([*(("blk", path[2]) if "layers" in path else ()), LLAMA[module], kind])


def fields_of(lm, tokenizer):
    """What llama.cpp writes of a Qwen2 model, with three unused rows at the end of its vocabulary."""
    config, core = lm.config, json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = {token["content"]: 3 if token["special"] else 4 for token in core["added_tokens"]}
    return {
        "general.architecture": "qwen2", "qwen2.embedding_length": config.hidden_size,
        "qwen2.feed_forward_length": config.intermediate_size, "qwen2.block_count": config.num_hidden_layers,
        "qwen2.attention.head_count": config.num_attention_heads, "qwen2.context_length": 1024,
        "qwen2.attention.head_count_kv": config.num_key_value_heads, "qwen2.rope.freq_base": 10000.0,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6, "tokenizer.ggml.tokens": [*tokens, "[1]", "[2]", "[3]"],
        "tokenizer.ggml.token_type": [*(special.get(token, 1) for token in tokens), 5, 5, 5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in core["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": tokenizer.chat_template,
    }  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(the embedded model, its tokenizer, the two as a GGUF file that holds the embedding twice, as Qwen2.5's do)."""
    lm, tokenizer = model.load_model("tiny", 3, torch.float32), model.load_tokenizer("tiny")
    lm.resize_token_embeddings(len(tokenizer) + 3)
    tensors = {llama_name(name): exactly(x.detach()) for name, x in lm.named_parameters()}
    matrix = lm.lm_head.weight.detach()
    tensors["output.weight"] = in_bytes(matrix)
    tensors["token_embd.weight"] = exactly(matrix + 0.04 * matrix.std() * torch.randn_like(matrix))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, fields_of(lm, tokenizer), tensors)
    return lm, tokenizer, path


def by_formula(kind, block):
    """The values of one block, one by one, as the format's description has them."""
    half = lambda at: float(np.frombuffer(block[at : at + 2], np.float16)[0])
    signed = lambda byte: byte - 256 if byte > 127 else byte
    if kind == "F32":
        return [struct.unpack("<f", block)[0]]
    if kind == "Q8_0":
        return [half(0) * signed(q) for q in block[2:]]
    if kind == "Q5_0":
        fifth, low = int.from_bytes(block[2:6], "little"), block[6:]
        digits = [(low[i] & 15 if i < 16 else low[i - 16] >> 4) for i in range(32)]
        return [half(0) * (digit + 16 * (fifth >> i & 1) - 16) for i, digit in enumerate(digits)]
    if kind == "Q4_K":
        s, q = block[4:16], block[16:]
        steps = [s[j] & 63 if j < 4 else (s[j + 4] & 15) + (s[j - 4] >> 6 << 4) for j in range(8)]
        least = [s[j + 4] & 63 if j < 4 else (s[j + 4] >> 4) + (s[j] >> 6 << 4) for j in range(8)]
        nibble = lambda i: q[i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
        return [half(0) * steps[i // 32] * nibble(i) - half(2) * least[i // 32] for i in range(256)]
    low, high, steps = block[:128], block[128:192], block[192:208]
    digit = lambda i: low[i // 128 * 64 + i % 64] >> 4 * (i % 128 // 64) & 15
    pair = lambda i: high[i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
    return [half(208) * signed(steps[i // 16]) * (digit(i) + 16 * pair(i) - 32) for i in range(256)]


@pytest.mark.parametrize("number", gguf.KINDS)
def test_a_block_is_unpacked_as_its_kind_says(number):
    kind = gguf.KINDS[number]
    blocks = np.random.default_rng(number).integers(0, 256, (7, kind.bytes), np.uint8)
    for scale in {"F32": [0], "Q4_K": [0, 2], "Q6_K": [208]}.get(kind.name, [0]):
        blocks[:, scale : scale + 2] = np.float16([[0.37]]).view(np.uint8)  # random bits may be no number
    want = [by_formula(kind.name, block.tobytes()) for block in blocks]
    np.testing.assert_allclose(kind.unpack(blocks), want, rtol=1e-5, atol=1e-6)


def test_pieces_in_several_folders_are_the_file_again(source, tmp_path):
    weights.split(source[2], tmp_path / "a", 1)
    pieces = sorted(path.name for path in (tmp_path / "a").glob("*.part"))
    assert len(pieces) == math.ceil(source[2].stat().st_size / 2**20) > 2
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / pieces[1]).rename(tmp_path / "b" / pieces[1])
    weights.join([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == source[2].read_bytes()


def test_a_piece_that_is_missing_or_damaged_is_named(source, tmp_path):
    weights.split(source[2], tmp_path, 1)
    piece = tmp_path / "01.part"
    good = piece.read_bytes()
    for bad, said in ((good[:-1], "has .* bytes, not"), (good[:-1] + bytes([good[-1] ^ 1]), "damaged")):
        piece.write_bytes(bad)
        with pytest.raises(ValueError, match=f"01.part .*{said}"):
            weights.join([tmp_path], tmp_path / "whole")
    piece.unlink()
    with pytest.raises(ValueError, match="no 01.part"):
        weights.join([tmp_path], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The folder of the file that came in pieces, without the embedding it holds twice."""
    folder = tmp_path_factory.mktemp("converted")
    weights.main(["split", str(source[2]), str(folder / "pieces"), "--mib", "1", "--without", "token_embd.weight"])
    weights.main(["join", str(folder / "pieces"), str(folder / "tiny.gguf")])
    weights.main(["convert", str(folder / "tiny.gguf"), str(folder / "model")])
    return folder


def test_a_converted_folder_is_the_model(source, converted):
    lm, tokenizer, _ = source
    got = model.load_model(str(converted / "model"), 0, torch.bfloat16)
    truth, matrix = dict(lm.named_parameters()), "model.embed_tokens.weight"
    assert {name: list(x.shape) for name, x in got.named_parameters()} == {n: list(x.shape) for n, x in truth.items()}
    for name, x in got.named_parameters():
        assert name == matrix or torch.equal(x, truth[name].bfloat16()), name
    assert got.lm_head.weight is got.model.embed_tokens.weight
    apart = got.lm_head.weight.float() - truth[matrix]
    assert apart.abs().max() < truth[matrix].abs().max() / 100
    got_tokenizer = model.load_tokenizer(str(converted / "model"))
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "Mia has 47 pens, that's <think>42"}]
    ids = model.encode_prompt(tokenizer, chat)
    assert model.encode_prompt(got_tokenizer, chat) == ids
    assert got_tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    assert model.eos_ids(got, got_tokenizer) == model.eos_ids(lm, tokenizer)


def test_two_matrices_stay_two(source, tmp_path):
    lm, tokenizer, _ = source
    tensors = {llama_name(name): exactly(x.detach()) for name, x in lm.named_parameters()}
    head = torch.randn_like(lm.lm_head.weight) * 0.04
    write_gguf(tmp_path / "two.gguf", fields_of(lm, tokenizer), tensors | {"output.weight": exactly(head)})
    weights.convert(tmp_path / "two.gguf", tmp_path / "model")
    got = model.load_model(str(tmp_path / "model"), 0, torch.bfloat16)
    assert torch.equal(got.lm_head.weight, head.bfloat16())
    assert torch.equal(got.model.embed_tokens.weight, lm.model.embed_tokens.weight.bfloat16())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fields, tensors: fields.update({"general.architecture": "llama"}), "is a llama model"),
        (lambda fields, tensors: tensors.update({"blk.0.attn_sinks.weight": exactly(torch.ones(8))}), "attn_sinks"),
        (lambda fields, tensors: tensors.pop("blk.1.ffn_up.weight"), "layers.1.mlp.up_proj"),
        (lambda fields, tensors: tensors.update({"blk.0.ffn_up.weight": (2, (768, 128), bytes(55296))}), "kind 2"),
        (lambda fields, tensors: tensors.update({"output_norm.weight": (Q8_0, (48,), bytes(51))}), "whole blocks"),
    ],
)
def test_what_is_no_such_model_is_refused(source, tmp_path, capsys, change, said):
    lm, tokenizer, _ = source
    fields = fields_of(lm, tokenizer)
    tensors = {llama_name(name): exactly(x.detach()) for name, x in lm.named_parameters()}
    change(fields, tensors)
    write_gguf(tmp_path / "bad.gguf", fields, tensors)
    with pytest.raises(SystemExit, match=said):
        weights.main(["convert", str(tmp_path / "bad.gguf"), str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_cut_short_or_none_is_refused(source, tmp_path):
    whole = source[2].read_bytes()
    for cut, said in ((-32, "cut short"), (5000, "cannot be read"), (0, "not a GGUF file")):
        (tmp_path / "x.gguf").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=said):
            gguf.read(tmp_path / "x.gguf")


TRAINER = """
import json, pathlib, signal, sys, time
words = {key[2:]: value for key, value in zip(sys.argv[1::2], sys.argv[2::2])}
folder = pathlib.Path(words["out"], words["name"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "words.jsonl").open("a").write(json.dumps(words) + chr(10))
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
def write(**row):
    with (folder / "metrics.jsonl").open("a") as file: file.write(json.dumps(row) + chr(10))
def assess(step, accuracy):
    for mode in ("greedy", "sampled"):
        write(step=step, eval=mode, accuracy=accuracy, problems=400, length=90.5, at_limit=0.1)
if "resume" in words:
    assess(int(words["steps"]), 0.6)
    (folder / "summary.json").write_text("{}")
    sys.exit()
assess(0, 0.2)
step = 0
while not stop:
    time.sleep(0.05)
    write(**{"step": step, "accuracy": 0.3, "seconds/step": 2.0})
    step += 1
    if step == int(words.get("fails_at", -1)): sys.exit(3)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Runs the recipe with a trainer that only says what it was told -> (exit code, case, the words of each start)."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "config.json").touch()
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").touch()
    monkeypatch.setattr(gsm8k, "TRAIN", (sys.executable, str(tmp_path / "trainer.py")))
    monkeypatch.setattr(gsm8k, "SPARE_SECONDS", 0.2)
    monkeypatch.setattr(gsm8k, "SAVE_SECONDS", 0.0)

    def run(*argv):
        code = gsm8k.main(["--model", str(tmp_path), "--data", str(tmp_path), "-o", str(tmp_path), *argv])
        (case,) = json.loads((tmp_path / "gsm8k.json").read_text())["cases"]
        lines = (tmp_path / "grpo/words.jsonl").read_text().splitlines()
        return code, case, [json.loads(line) for line in lines]

    return run


def test_training_ends_in_time_and_is_evaluated_again(recipe):
    code, case, (first, second) = recipe("--minutes", "0.025", "--", "--lr=1e-5", "--eval_size", "400")
    before, after = case["rows"]
    assert code == 0 and (before["greedy"], after["greedy"], after["problems"]) == (0.2, 0.6, 400)
    steps = len(case["curve"])
    assert 2 < steps < 60 and after["steps"] == steps and after["seconds"] == 2.0 * steps
    assert second["resume"] == "auto" and int(second["steps"]) == steps and "resume" not in first
    assert first["lr"] == second["lr"] == case["settings"]["lr"] == "1e-5" and case["size"]["problems"] == 400
    assert after["gain"] == pytest.approx(0.4)
    assert after["gain_error"] == pytest.approx(math.sqrt((0.2 * 0.8 + 0.6 * 0.4) / 400))
    with pytest.raises(SystemExit, match="holds a run already"):
        recipe("--minutes", "0.025")


def test_a_training_that_dies_loses_nothing_that_was_done(recipe):
    code, case, _ = recipe("--minutes", "1", "--", "--fails_at=4")
    before, after = case["rows"]
    assert code == 1 and before["greedy"] == 0.2 and len(case["curve"]) == 4
    assert after["status"] == "error" and "code 3" in after["why"] and "4 steps" in after["why"]


def test_without_weights_or_data_nothing_starts(tmp_path, capsys):
    assert gsm8k.main(["--model", str(tmp_path), "-o", str(tmp_path)]) == 2
    assert "there is no" in capsys.readouterr().err


def test_every_setting_is_one_of_train_py():
    for settings in (gsm8k.SETTINGS, gsm8k.SETTINGS | gsm8k.TOY):
        config = load_config([f"--{key}={value}" for key, value in settings.items()])
        check_batch(config, 1)
        assert config.eval_size == settings["eval_size"]


def test_the_recipe_runs_to_its_last_command(converted, tmp_path):
    """Converted weights, SIGTERM after a step, resumed, evaluated again, exported, with curves."""
    code = gsm8k.main(["--toy", "--model", str(converted / "model"), "-o", str(tmp_path)])
    (case,) = json.loads((tmp_path / "gsm8k.json").read_text())["cases"]
    before, after = case["rows"]
    assert code == 0 and before["status"] == after["status"] == "ok"
    assert after["steps"] == len(case["curve"]) >= 1 and case["curve"][0]["grad_norm"] > 0
    assert case["size"]["model"] == "tiny" and "1 Q8_0" in before["note"]
    assert (tmp_path / "toy/curves.png").exists() and (tmp_path / "toy/export/config.json").exists()
