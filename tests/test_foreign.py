"""What is not ours: a folder of a user's stays as it is, and no code of somebody else's runs unasked."""

import ast
import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from engine import evaluate, folder, model
from engine.chat import render
from engine.config import SETTINGS, TYPES, Config, load_config, save_config
from engine.data import TASKS
from engine.data.sources import open_source
from engine.errors import UserError
from engine.folder import LAUNCH_LOG, claim_folder
from engine.log import trace_file
from engine.record import describe_gains
from engine.rewards import load_rewards
from engine.run import Progress, Run

ROOT = Path(__file__).resolve().parents[1]
EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
class EvilConfig(PretrainedConfig):
    model_type = "evil"
class EvilModel(Qwen2ForCausalLM):
    pass
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    pass
"""
MESSAGES = [{"role": "user", "content": "x"}]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def always_yes(monkeypatch):
    """A user who answers every question of transformers with yes."""
    monkeypatch.setattr("builtins.input", lambda *words: "y")


@pytest.fixture
def house(tmp_path):
    """A model folder of ours beside a mark that any code in it would make."""
    place = tmp_path / "model"
    lm, tokenizer = model.load_model("tiny", 0, torch.float32), model.load_tokenizer("tiny")
    model.export_model(lm, tokenizer, place)
    (place / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "ran")))
    return place


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def own_config(place: Path) -> None:
    autos = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    change(place / "config.json", model_type="evil", auto_map=autos)


def own_model_of_a_known_family(place: Path) -> None:
    change(place / "config.json", auto_map={"AutoModelForCausalLM": "evil.EvilModel"})


def own_tokenizer(place: Path) -> None:
    autos = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    change(place / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=autos)


def own_generate(place: Path) -> None:
    (place / "custom_generate").mkdir()
    (place / "evil.py").rename(place / "custom_generate/generate.py")


def pickled_weights(place: Path) -> None:
    (place / "model.safetensors").unlink()
    with (place / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"lm_head.weight": Evil(place.parent / "ran")}, file)


def pickled_weights_in_an_index(place: Path) -> None:
    (place / "model.safetensors").rename(place / "a.safetensors")
    with (place / "weights").open("wb") as file:
        pickle.dump({"lm_head.weight": Evil(place.parent / "ran")}, file)
    names = {"lm_head.weight": "weights", "model.norm.weight": "a.safetensors"}
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def escaping_template(place: Path) -> None:
    (place / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")


ATTACKS = {  # what the folder holds, and the refusal
    own_config: "is of the family evil; supported",
    own_model_of_a_known_family: "",
    own_tokenizer: "",
    own_generate: "",
    pickled_weights: "are pickled (pytorch_model.bin)",
    pickled_weights_in_an_index: "are pickled (weights)",
    escaping_template: "does what its sandbox forbids",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_no_code_of_a_model_folder_runs(house, attack, capsys):
    attack(house)
    said = ""
    try:
        tokenizer = model.load_tokenizer(str(house))
        model.load_model(str(house), 0, torch.float32)
        model.hollow_model(str(house))
        render(tokenizer, MESSAGES)
    except UserError as error:
        said = str(error)
    assert ATTACKS[attack] in said and bool(said) == bool(ATTACKS[attack]), said
    assert not (house.parent / "ran").exists()
    told = capsys.readouterr().err
    assert ("a model of its own, whose code is not run" in told) == (attack is own_model_of_a_known_family)
    assert ("a tokenizer of its own, whose code is not run" in told) == (attack is own_tokenizer)


def test_that_code_would_run_if_it_were_asked_for(house):
    """Else the test above shows nothing."""
    own_config(house)
    transformers.AutoConfig.from_pretrained(house)
    assert (house.parent / "ran").exists()


def contents(place: Path) -> dict[str, tuple]:
    stat = {path: path.lstat() for path in sorted(place.rglob("*"))}
    return {str(p): (s.st_mtime_ns, s.st_ino, p.read_bytes() if p.is_file() else None) for p, s in stat.items()}


FOREIGN = {
    "export": {"export/model.safetensors": "weeks of work", "export/notes.md": "of mine"},
    "checkpoints": {"checkpoints/step_000007/meta.json": "{}", "checkpoints/.step_000008.partial/x": ""},
    "metrics": {"metrics.jsonl": '{"loss": 1}\n', "config.yaml": "of: another program\n"},
    "a note": {"notes.txt": "mine"},
    "rockets": {"launches.jsonl": '{"rocket": "Ariane"}\n', "config.yaml": "mine: 1\n"},
    "a lock": {".lock": "", "summary.json": "{}"},
    "a file": {"": "not a folder"},
}


def make_foreign(place: Path, kind: str) -> None:
    for name, text in FOREIGN[kind].items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


@pytest.mark.parametrize("resume", ["", "auto", "mine/checkpoints/step_000007", "mine/checkpoints"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_is_no_run_is_left_to_the_byte(tmp_path, monkeypatch, kind, resume):
    monkeypatch.chdir(tmp_path)
    make_foreign(tmp_path / "mine", kind)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="stays as it is|There is no checkpoint|not in the checkpoints folder of a run"):
        claim_folder(Config(out=".", name="mine", resume=resume))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", ["", "auto"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_run_without_a_name_goes_beside_it(tmp_path, monkeypatch, kind, resume):
    monkeypatch.setattr(folder, "LOCKS", [])
    config = Config(out=str(tmp_path), resume=resume)
    make_foreign(config.run_dir, kind)
    before = contents(tmp_path)
    assert claim_folder(config) == (tmp_path / "grpo-tiny-seed0-2", None)
    assert before.items() <= contents(tmp_path).items()


def test_what_a_run_would_write_through_a_link_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LAUNCH_LOG).touch()
    (tmp_path / "run/config.yaml").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(UserError, match="config.yaml is a link"):
        claim_folder(Config(out=str(tmp_path), name="run", resume="auto"))
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", ["", "auto"])
def test_an_export_alone_is_a_run_that_nothing_goes_on_with(tmp_path, resume):
    """Checkpoints and metrics deleted for room."""
    export = tmp_path / "run/export/model.safetensors"
    export.parent.mkdir(parents=True)
    export.write_text("weeks of work")
    (tmp_path / "run" / LAUNCH_LOG).write_text('{"step": 0, "command": "python train.py"}\n')
    before = contents(tmp_path)
    with pytest.raises(UserError, match="no checkpoint to go on from" if resume else "already holds a run"):
        claim_folder(Config(out=str(tmp_path), name="run", resume=resume))
    assert contents(tmp_path) == before


def test_a_link_to_a_checkpoint_leads_to_its_run(tmp_path):
    ours, mine = tmp_path / "run/checkpoints/step_000007", tmp_path / "mine/checkpoints/step_000007"
    for place in (ours, mine.with_name("step_000008")):
        place.mkdir(parents=True)
    (tmp_path / "run" / LAUNCH_LOG).touch()
    mine.symlink_to(ours)
    assert claim_folder(Config(resume=str(mine))) == (tmp_path / "run", ours)


def test_a_home_is_no_folder_named_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(Config(out="~/runs").run_dir) == "/home/me/runs/grpo-tiny-seed0"
    assert str(trace_file("~/trace.json")) == "/home/me/trace.json"


def test_a_config_written_again_is_whole_and_a_hard_linked_copy_keeps_its_own(tmp_path, monkeypatch):
    saved, copy = tmp_path / "config.yaml", tmp_path / "copy.yaml"
    save_config(Config(seed=1), saved)
    copy.hardlink_to(saved)
    save_config(Config(seed=2), saved)
    assert "seed: 1" in copy.read_text() and "seed: 2" in saved.read_text()

    def full(path, text):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save_config(Config(seed=3), saved)
    assert "seed: 2" in saved.read_text()


def test_a_result_does_not_take_the_place_of_a_file(tmp_path, monkeypatch):
    data = tmp_path / "test.jsonl"
    data.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["evaluate", "--test_data", str(data), "--json", str(data)])
    with pytest.raises(UserError, match="is there already, and stays as it is"):
        evaluate.main()
    assert data.read_text() == "mine"


def test_a_card_takes_no_data_from_outside_of_its_folder(tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"prompt": "secret", "answer": "1"}\n')
    (tmp_path / "data").mkdir()
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n---\n"
    for path in ("../secret.jsonl", tmp_path / "secret.jsonl"):
        (tmp_path / "data/README.md").write_text(card.format(path))
        with pytest.raises(UserError, match="secret.jsonl, which is not in the folder"):
            open_source(str(tmp_path / "data"), TASKS["jsonl"], "train")


def test_a_reward_file_that_changes_folder_takes_nobody_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("import os\nos.chdir('/')\ndef f(text, row):\n    return 1.0\n")
    load_rewards(["r.py:f"], str)
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../a", "/tmp/x", "a\\b"])
def test_a_name_is_a_name(name):
    with pytest.raises(UserError, match="where that lies is --out"):
        load_config(["--name", name])


def test_what_a_user_put_beside_an_export_stays_when_it_is_made_again(house):
    (house / "evil.py").unlink()
    (house / "notes.md").write_text("mine")
    (house / "eval").mkdir()
    (house / "eval/result.json").write_text("mine too")
    change(house / "generation_config.json", temperature=0.7)
    lm, tokenizer = model.load_model(str(house), 0, torch.float32), model.load_tokenizer(str(house))
    model.export_model(lm, tokenizer, house)
    assert (house / "notes.md").read_text() == "mine" and (house / "eval/result.json").read_text() == "mine too"
    assert "temperature" not in json.loads((house / "generation_config.json").read_text())
    assert [path.name for path in house.parent.iterdir()] == ["model"]


def test_an_export_cut_short_between_its_two_renames_is_whole_again(house):
    (house / "notes.md").write_text("mine")
    lm, tokenizer = model.load_model(str(house), 0, torch.float32), model.load_tokenizer(str(house))
    house.rename(house.with_name(".model.before"))
    model.export_model(lm, tokenizer, house)
    assert (house / "notes.md").read_text() == "mine" and (house / "model.safetensors").exists()
    assert [path.name for path in house.parent.iterdir()] == ["model"]


def test_nothing_unpickles():
    """By name; `gather` is what ranks exchange."""
    unpickling = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
    calls = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "load_from_disk"}
    calls |= {"recv_object_list", "read_pickle", "eval", "exec"}
    for path in [ROOT / "train.py", *ROOT.glob("engine/**/*.py"), *ROOT.glob("kernels/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name.split(".")[0] for alias in getattr(node, "names", []) if isinstance(node, ast.Import)]
            names += [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not unpickling & set(names), f"{path} imports {names}"
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", ""))
            owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
            assert name not in calls or owner and name in ("eval", "exec"), f"{path}: {ast.unparse(node)}"
            assert (owner, name) != ("torch", "load"), f"{path}: {ast.unparse(node)}"


def test_transformers_is_never_left_to_ask_whether_code_may_run():
    for path in [*ROOT.glob("engine/**/*.py"), *ROOT.glob("bench/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                said = [ast.unparse(keyword) for keyword in node.keywords]
                assert {"**NO_CODE", "trust_remote_code=False"} & set(said), f"{path}: {ast.unparse(node)}"


def test_an_installed_package_kernels_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "kernels-0.12.1.dist-info").mkdir()
    (tmp_path / "kernels-0.12.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.12.1\n"
    )
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode and done.stderr.count("\n") == 1 and "run `pip uninstall kernels`" in done.stderr


def test_accuracies_of_other_problems_are_not_said_to_be_a_gain():
    progress = Progress(before={"greedy": 0.5}, after={"greedy": 0.75}, exam_before={"problems": 512})
    assert describe_gains(replace(progress, exam={"problems": 512})) == "greedy accuracy 50.0% -> 75.0%"
    said = describe_gains(replace(progress, exam={"problems": 64}))
    assert said == "greedy accuracy 75.0% of 64 problems (at the start 50.0% of 512 other problems)"
    assert describe_gains(replace(progress, exam_before={}, exam={"problems": 64})) == "greedy accuracy 50.0% -> 75.0%"
    assert "not taken" in describe_gains(replace(progress, before={}, exam={"problems": 64}))


def test_what_a_config_can_reach_is_told_of_every_setting_that_takes_a_text():
    told = set(re.findall(r"`(\w+)`", (ROOT / "configs/README.md").read_text()))
    free = {
        name for name, field in SETTINGS.items() if not field.metadata["line"].choices and "str" in str(TYPES[name])
    }
    assert free - told == set()


def test_an_export_that_cannot_be_written_leaves_the_one_before(house, monkeypatch):
    (house / "notes.md").write_text("mine")
    lm, tokenizer = model.load_model(str(house), 0, torch.float32), model.load_tokenizer(str(house))
    before = contents(house)

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(UserError, match="could not be written: .*No space left on device"):
        model.export_model(lm, tokenizer, house)
    assert contents(house) == before


@pytest.mark.parametrize(
    "exam, is_best", [({}, False), ({"problems": 64, "data": {}}, False), ({"problems": 512}, True)]
)
def test_the_best_is_of_the_problems_that_are_asked_now(exam, is_best, monkeypatch):
    """{}: of a checkpoint that does not say which they were."""
    run = object.__new__(Run)
    run.progress = Progress(best=0.6, exam=exam)

    def assess(self):
        self.progress.exam = {"problems": 64, "data": {}}
        return {"sampled": 0.3}

    monkeypatch.setattr(Run, "assess", assess)
    assert run.examine(last=False) == is_best and run.progress.best == (0.3 if is_best else 0.6)
