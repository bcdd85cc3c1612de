"""Real weights in pieces, and the recipe that trains them: with a small model, in a file of the real ones' format."""

import json
import math
import random
import sys

import pytest
import torch

from bench import gsm8k, weights
from engine import model
from engine.config import check_batch, load_config
from engine.provenance import installed
from tests.warm import command


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file of two and a half MiB."""
    path = tmp_path_factory.mktemp("whole") / "whole.bin"
    path.write_bytes(random.Random(0).randbytes(5 << 19))
    return path


def test_pieces_in_several_folders_are_the_file_again(whole, tmp_path):
    weights.split(whole, tmp_path / "a", 1)
    assert sorted(path.name for path in (tmp_path / "a").glob("*.part")) == ["00.part", "01.part", "02.part"]
    (tmp_path / "b").mkdir()
    (tmp_path / "a/01.part").rename(tmp_path / "b/01.part")
    weights.join([tmp_path / "a", tmp_path / "b"], tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == whole.read_bytes()


def test_a_piece_that_is_missing_or_damaged_is_named(whole, tmp_path):
    weights.split(whole, tmp_path, 1)
    piece = tmp_path / "01.part"
    good = piece.read_bytes()
    for bad, said in ((good[:-1], "has .* bytes, not"), (good[:-1] + bytes([good[-1] ^ 1]), "damaged")):
        piece.write_bytes(bad)
        with pytest.raises(ValueError, match=f"01.part .*{said}"):
            weights.join([tmp_path], tmp_path / "again")
    piece.unlink()
    with pytest.raises(ValueError, match="no 01.part"):
        weights.join([tmp_path], tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("verb", [["convert"], ["split", "--without", "token_embd.weight"]])
def test_a_package_that_is_missing_is_named(whole, tmp_path, monkeypatch, verb):
    monkeypatch.setattr(weights, "installed", lambda package: None)
    with pytest.raises(SystemExit, match="gguf.* missing: pip install --no-deps -r requirements-bench.txt"):
        weights.main([*verb, str(whole), str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def gguf():
    """The package, beside the other with which transformers reads such files."""
    for package in ("gguf", "accelerate"):
        if installed(package) is None:
            pytest.skip(f"transformers reads GGUF files with {package}, which is not installed")
    return pytest.importorskip("gguf")


def arrays_of(gguf, lm):
    """Name in a GGUF file -> values."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, lm.config.num_hidden_layers)
    return {names.get_name(name, (".weight", ".bias")): x.detach().numpy() for name, x in lm.named_parameters()}


def write(gguf, path, lm, tokenizer, tensors, family="qwen2"):
    """What llama.cpp writes of a Qwen2 model, with three unused rows at the end of its vocabulary. `tensors`: fp32, or
    bytes of Q8_0."""
    file, config, kinds = gguf.GGUFWriter(path, family), lm.config, gguf.TokenType
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = {x["content"]: kinds.CONTROL if x["special"] else kinds.USER_DEFINED for x in core["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_tokenizer_model("gpt2")
    file.add_token_list([*tokens, "[1]", "[2]", "[3]"])
    file.add_token_types([*(kind.get(token, kinds.NORMAL) for token in tokens), *3 * [kinds.UNUSED]])
    file.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    file.add_eos_token_id(tokenizer.eos_token_id)
    file.add_pad_token_id(tokenizer.pad_token_id)
    file.add_chat_template(tokenizer.chat_template)
    for name, x in tensors.items():
        file.add_tensor(name, x, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if x.dtype.name == "uint8" else None)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def tiny():
    """(the embedded model, its tokenizer)."""
    lm, tokenizer = model.load_model("tiny", 3, torch.float32), model.load_tokenizer("tiny")
    lm.resize_token_embeddings(len(tokenizer) + 3)
    return lm, tokenizer


def test_pieces_without_the_embedding_give_the_model_again(gguf, tiny, tmp_path):
    """The file holds one matrix twice, as Qwen2.5's do, and the head is the better of the two."""
    lm, tokenizer = tiny
    source, folder, matrix = tmp_path / "tiny.gguf", tmp_path / "model", lm.lm_head.weight.detach()
    packed = gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType.Q8_0)
    rough = (matrix + 0.04 * matrix.std() * torch.randn_like(matrix)).numpy()
    write(gguf, source, lm, tokenizer, arrays_of(gguf, lm) | {"token_embd.weight": rough, "output.weight": packed})
    weights.main(["split", str(source), str(tmp_path / "pieces"), "--mib", "1", "--without", "token_embd.weight"])
    assert sum(x.stat().st_size for x in tmp_path.glob("pieces/*.part")) == source.stat().st_size - rough.nbytes
    weights.main(["join", str(tmp_path / "pieces"), str(tmp_path / "joined/tiny.gguf")])
    for path in (source, tmp_path / "joined/tiny.gguf"):
        weights.main(["convert", str(path), str(folder)])
        got = model.load_model(str(folder), 0, torch.bfloat16)
        truth = {name: x.bfloat16() for name, x in lm.named_parameters()}
        truth["model.embed_tokens.weight"] = torch.tensor(
            gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        ).bfloat16()
        torch.testing.assert_close(dict(got.named_parameters()), truth, rtol=0, atol=0)
        assert got.lm_head.weight is got.model.embed_tokens.weight
    assert json.loads((folder / "origin.json").read_text()) == {"file": "tiny.gguf", "tensors": {"F32": 26, "Q8_0": 1}}
    check_tokenizer(model.load_tokenizer(str(folder)), tokenizer)
    assert model.eos_ids(got, model.load_tokenizer(str(folder))) == model.eos_ids(lm, tokenizer)


def check_tokenizer(got, truth):
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "Mia has 47 pens, that's <think>42"}]
    ids = model.encode_prompt(truth, chat)
    assert model.encode_prompt(got, chat) == ids
    assert got.decode(ids, skip_special_tokens=True) == truth.decode(ids, skip_special_tokens=True)


def test_two_matrices_stay_two(gguf, tiny, tmp_path):
    lm, tokenizer = tiny
    head = 0.04 * torch.randn_like(lm.lm_head.weight)
    write(gguf, tmp_path / "two.gguf", lm, tokenizer, arrays_of(gguf, lm) | {"output.weight": head.numpy()})
    weights.convert(tmp_path / "two.gguf", tmp_path / "model")
    got = model.load_model(str(tmp_path / "model"), 0, torch.bfloat16)
    assert torch.equal(got.lm_head.weight, head.bfloat16())
    assert torch.equal(got.model.embed_tokens.weight, lm.model.embed_tokens.weight.bfloat16())


@pytest.mark.parametrize(
    ("family", "name", "change", "said"),
    [
        ("nonesuch", "output_norm.weight", lambda x: x, "nonesuch"),
        ("qwen2", "rope_freqs.weight", lambda x: x, "holds .* values, of which Qwen2ForCausalLM takes"),
        ("qwen2", "output_norm.weight", lambda x: None, "does not hold model.norm.weight$"),
    ],
)
def test_what_is_no_such_model_is_refused(gguf, tiny, tmp_path, family, name, change, said):
    arrays = arrays_of(gguf, tiny[0])
    arrays[name] = change(arrays["output_norm.weight"])
    write(gguf, tmp_path / "bad.gguf", *tiny, {key: x for key, x in arrays.items() if x is not None}, family)
    with pytest.raises(SystemExit, match=said):
        weights.main(["convert", str(tmp_path / "bad.gguf"), str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_cut_short_or_none_is_refused(gguf, tiny, tmp_path):
    write(gguf, tmp_path / "x.gguf", *tiny, arrays_of(gguf, tiny[0]))
    data = (tmp_path / "x.gguf").read_bytes()
    for cut in (-32, 5000, 3, 0):
        (tmp_path / "x.gguf").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="x.gguf is no GGUF file, or is cut short"):
            weights.convert(tmp_path / "x.gguf", tmp_path / "model")


TRAINER = """
import json, os, pathlib, signal, sys, time
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
    if step == int(os.environ.get("FAILS_AT", -1)): sys.exit(3)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Runs the recipe with a trainer that only says what it was told -> (exit code, case, the words of each start)."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "config.json").touch()
    (tmp_path / "origin.json").write_text('{"file": "small-q8_0.gguf", "tensors": {"F32": 26, "Q8_0": 1}}')
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
    assert case["size"]["model"] == "small-q8_0" and "26 F32, 1 Q8_0" in before["note"]
    assert after["gain"] == pytest.approx(0.4)
    assert after["gain_error"] == pytest.approx(math.sqrt((0.2 * 0.8 + 0.6 * 0.4) / 400))
    with pytest.raises(SystemExit, match="holds a run already"):
        recipe("--minutes", "0.025")


def test_a_training_that_dies_loses_nothing_that_was_done(recipe, monkeypatch):
    monkeypatch.setenv("FAILS_AT", "4")
    code, case, _ = recipe("--minutes", "1")
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


def test_the_recipe_runs_to_its_last_command(tmp_path, monkeypatch):
    """SIGTERM after a step, resumed, evaluated again, exported, with curves."""
    monkeypatch.setattr(gsm8k, "TRAIN", tuple(command("train.py")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = gsm8k.main(["--toy", "-o", str(tmp_path)])
    (case,) = json.loads((tmp_path / "gsm8k.json").read_text())["cases"]
    before, after = case["rows"]
    assert code == 0 and before["status"] == after["status"] == "ok"
    assert after["steps"] == len(case["curve"]) >= 1 and case["curve"][0]["grad_norm"] > 0
    assert (tmp_path / "toy/curves.png").exists() and (tmp_path / "toy/export/config.json").exists()
