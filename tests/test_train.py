"""train.py as a user runs it: a run's folder, exact resume, signals, and bad input in one sentence."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config import TYPES
from engine.folder import LAUNCH_LOG, have_run
from engine.log import read_rows
from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--eval_size 16 --prompts_per_step 4 --group_size 4 --max_new_tokens 24 --tensorboard false --threads 1".split()
MEASURED = ("wall_seconds", "tokens_per_second", "seconds/", "peak_")
CUT_SHORT = """
import itertools, os, signal, time
import train
from engine import dist
from engine.run import Run

def should_stop(self):
    if self.progress.step and next(polls) == 9:  # amid the first batch of the last evaluation
        os.kill(os.getpid(), signal.SIGTERM)
        while not dist.stop_requested():
            time.sleep(0.001)
    return ask(self)

polls = itertools.count()
ask, Run.should_stop = Run.should_stop, should_stop
dist.run(train.main)
"""


STOPPED_LAST = """
import os, signal
import train
from engine import dist
from engine.run import Run

def count(self, row):
    count_on(self, row)
    if self.progress.step == self.config.steps:
        os.kill(os.getpid(), signal.SIGTERM)

count_on, Run.count = Run.count, count
dist.run(train.main)
"""


def start(*argv, script=("train.py",), ranks=0, cold=False) -> subprocess.Popen:
    env, words = os.environ | {"OMP_NUM_THREADS": "1"}, command(*script, *argv, ranks=ranks, cold=cold)
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*argv, code=0, **kwargs) -> str:
    process = start(*argv, **kwargs)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, (out + err)[-3000:]
    return out + err


def rows(folder: Path) -> list[dict]:
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in kept]


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> Path:
    """A short SFT run of the embedded model: its folder."""
    out = tmp_path_factory.mktemp("sft")
    run("--algo", "sft", "--steps", 30, "--out", out, "--name", "sft", *SMALL, cold=True)
    return out / "sft"


def test_a_run_leaves_its_folder(sft):
    names = {p.name for p in sft.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "summary.json", "checkpoints", "export"} <= names
    summary = json.loads((sft / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "accuracy_before_sampled", "accuracy_after_sampled", "steps", "tokens",
            "wall_seconds", "seed", "versions"} <= set(summary)  # fmt: skip
    assert summary["steps"] == 30 and summary["tokens"] > 1000 and summary["versions"]["torch"]
    losses = [r["nll"] for r in rows(sft) if "nll" in r]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1


def test_transformers_loads_the_export_and_agrees(sft):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sft / "export")
    lm = AutoModelForCausalLM.from_pretrained(sft / "export")
    messages = [{"role": "user", "content": "Mia has 47 pens and buys 35 more. How many pens does Mia have now?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    theirs = lm.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    args = ["--model", sft / "export", "--max_new_tokens", "24", "--prompt", messages[0]["content"]]
    done = subprocess.run(
        command("-m", "engine.generate", *args), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == tokenizer.decode(theirs, skip_special_tokens=True).strip() != ""
    assert lm.generation_config.eos_token_id == tokenizer.eos_token_id
    assert torch.isfinite(lm.lm_head.weight).all()


def test_a_fresh_clone_on_two_ranks_makes_its_sft_start_and_then_learns(tmp_path):
    """The default command, in a copy of the tree whose two embedded runs are cut short."""
    for name in ("engine", "kernels", "configs", "train.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for name, steps in (("sft", 6), ("rl", 2)):
        path = tmp_path / f"configs/models/tiny/{name}.yaml"
        path.write_text(re.sub(r"^steps: .*$", f"steps: {steps}", path.read_text(), flags=re.M))
    done = subprocess.run(
        command("train.py", "--algo", "grpo", "--eval_size", 8, ranks=2, cold=True), cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "making it first (--algo sft, " in done.stdout
    assert json.loads((tmp_path / "runs/grpo-tiny-seed0/summary.json").read_text())["steps"] == 2
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"sft-tiny-seed0", "grpo-tiny-seed0"}


@pytest.mark.parametrize(
    ("algo", "lag", "lora"), [("grpo", 0, ()), ("grpo", 1, ()), ("dapo", 1, ()), ("grpo", 1, ("--lora_rank", 4))]
)
def test_a_killed_run_resumes_bit_for_bit(sft, tmp_path, algo, lag, lora):
    args = [
        *lora,
        "--algo",
        algo,
        "--model",
        sft / "export",
        "--steps",
        8,
        "--save_every",
        1,
        "--out",
        tmp_path,
        "--lr",
        "1e-3",
        "--lag",
        lag,
    ]
    run(*args, "--name", "whole", *SMALL)
    process = start(*args, "--name", "cut", *SMALL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut/checkpoints/step_000003/meta.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    cold = algo == "dapo"  # then hashes have another seed too
    assert "Resuming" in run(*args, "--name", "cut", "--resume", "auto", *SMALL, cold=cold)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    seconds = [row["wall_seconds"] for row in read_rows(tmp_path / "cut/metrics.jsonl") if "wall_seconds" in row]
    assert seconds == sorted(seconds), "of the run, not of its last launch"
    name = "adapter_model" if lora else "model"
    one, other = (load_file(tmp_path / run / f"export/{name}.safetensors") for run in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


VARIANTS = {
    "rloo": "--lag 1 --overlong_buffer 12",
    "reinforce": "--group_size 1 --prompts_per_step 8",
    "cispo": "--lag 1 --importance_mask 0.5 5 --updates_per_rollout 2",
    "gspo": "--updates_per_rollout 2 --epochs 2 --sequence_mask 0.5 2 --beta 0.1",
    "sapo": "--lag 1 --importance_cap 2 --lora_rank 4",
}


@pytest.mark.parametrize("algo", VARIANTS)
def test_every_algorithm_of_one_row_trains(sft, tmp_path, algo):
    args = ["--algo", algo, "--model", sft / "export", "--steps", 2, "--lr", "1e-3", "--out", tmp_path, "--name", "t"]
    run(*args, *SMALL, *VARIANTS[algo].split(), "--eval_size", 0)
    first, second = rows(tmp_path / "t")
    assert first["grad_norm"] > 0 and second["grad_norm"] > 0 and second["entropy"] != first["entropy"]
    if "updates" not in VARIANTS[algo]:
        assert first["off_ratio"] == 0 and first["ratio"] == pytest.approx(1, abs=1e-3)


def test_an_adapter_is_trained_evaluated_asked_and_trained_on(sft, tmp_path):
    args = ["--steps", 2, "--out", tmp_path, *SMALL]
    run(
        "--algo", "grpo", "--model", sft / "export", "--lora_rank", 4, "--lr", "1e-3", "--name", "first", *args, ranks=2
    )
    first = tmp_path / "first/export"
    steps = [row for row in rows(tmp_path / "first") if "eval" not in row]
    assert steps[0]["kl"] == 0 and steps[1]["kl"] > 0 and all(row["mismatch"] <= 1e-5 for row in steps)
    told = run("--model", first, "--task", "arithmetic", *SMALL, script=("-m", "engine.evaluate"))
    greedy = [row["accuracy"] for row in rows(tmp_path / "first") if row.get("eval") == "greedy"][-1]
    assert json.loads(told[told.index("{") : told.rindex("}") + 1])["greedy"]["accuracy"] == greedy
    assert run("--model", first, "--prompt", "2+2?", script=("-m", "engine.generate"))
    more = ["--lora_dropout", 0.1, "--activation_checkpointing", "true", "--export", "merged"]
    for name in ("second", "again"):
        run("--algo", "sft", "--init_from", first, "--name", name, *more, *args)
    weights = [(tmp_path / name / "export/model.safetensors").read_bytes() for name in ("second", "again")]
    assert weights[0] == weights[1], "the seed is that of dropout too"
    launched = ["--algo", "grpo", "--lora_rank", 4, "--name", "first", "--resume", "auto", *args, "--steps", 3]
    text = run("--model", tmp_path / "second/export", *launched, code=1, ranks=2)
    assert "belongs to another run, with base" in text and text.count("error:") == 1


def test_rollout_and_trainer_agree_and_two_ranks_learn_what_one_does(sft, tmp_path):
    args = ["--algo", "grpo", "--model", sft / "export", "--steps", 2, "--out", tmp_path, *SMALL]
    run(*args, "--name", "one")
    run(*args, "--name", "two", ranks=2)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    steps = [(a, b) for a, b in zip(one, two, strict=True) if "eval" not in a]
    assert len(steps) == 2
    for a, b in steps:
        assert a["mismatch"] <= 1e-5 and b["mismatch"] <= 1e-5
        assert a["generated_tokens"] == b["generated_tokens"]  # the same requests were sampled, on whatever rank
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_with_lr_0_both_lags_draw_the_same_samples(sft, tmp_path):
    args = [
        "--algo",
        "grpo",
        "--model",
        sft / "export",
        "--steps",
        4,
        "--lr",
        0,
        "--out",
        tmp_path,
        "--num_samples",
        99,
    ]
    run(*args, "--name", "lag0", *SMALL)
    run(*args, "--name", "lag1", *SMALL, "--lag", 1)
    drawn = [read_rows(tmp_path / name / "samples.jsonl") for name in ("lag0", "lag1")]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4 * 16
    zero, one = ([r for r in rows(tmp_path / name) if "eval" not in r] for name in ("lag0", "lag1"))
    assert [r["staleness"] for r in zero] == [0] * 4 and [r["staleness"] for r in one] == [0, 1, 1, 1]
    assert all(r["mismatch"] < 1e-5 and r["effective_samples"] == pytest.approx(1, abs=1e-5) for r in zero + one)


def test_two_ranks_at_lag_1_learn_what_one_does(sft, tmp_path):
    """The rollouts of unequal lengths run beside the gathers and reductions of the updates."""
    args = ["--algo", "grpo", "--model", sft / "export", "--steps", 4, "--lag", 1, "--lr", "1e-3", "--out", tmp_path]
    run(*args, *SMALL, "--name", "one")
    run(*args, *SMALL, "--name", "two", ranks=2)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        if "eval" not in a:
            assert a["generated_tokens"] == b["generated_tokens"] and a["staleness"] == b["staleness"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)


def test_sigterm_at_lag_1_keeps_the_rollout_beside_the_update(sft, tmp_path):
    args = ["--algo", "grpo", "--model", sft / "export", "--lr", "1e-3", "--schedule", "constant", "--lag", 1, *SMALL]
    args += ["--out", tmp_path]
    process = start(*args, "--steps", 500, "--name", "cut")
    while not (tmp_path / "cut/metrics.jsonl").exists() or len(rows(tmp_path / "cut")) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped by a signal" in out, out + err
    steps = max(r["step"] for r in rows(tmp_path / "cut")) + 4
    run(*args, "--steps", steps, "--name", "cut", "--resume", "auto", "--eval_size", 0)
    run(*args, "--steps", steps, "--name", "whole", "--eval_size", 0)
    cut = [r for r in rows(tmp_path / "cut") if "eval" not in r]
    assert cut == rows(tmp_path / "whole") and [r["staleness"] for r in cut[1:]] == [1] * (steps - 1)


def test_a_checkpoint_of_lag_1_goes_on_at_lag_0(sft, tmp_path):
    args = ["--algo", "grpo", "--model", sft / "export", "--out", tmp_path, "--name", "t", *SMALL, "--eval_size", 0]
    run(*args, "--steps", 3, "--lag", 1, "--save_every", 2)
    run(*args, "--steps", 4, "--lag", 0, "--resume", tmp_path / "t/checkpoints/step_000002")
    assert [r["staleness"] for r in rows(tmp_path / "t")] == [0, 1, 0, 0]


def test_a_truncated_importance_weight_takes_the_place_of_the_clip(sft, tmp_path):
    args = ["--algo", "grpo", "--model", sft / "export", "--lag", 1, "--lr", "1e-2", "--steps", 4, "--out", tmp_path]
    run(*args, "--importance_cap", 1.01, "--name", "t", *SMALL, "--eval_size", 0)
    last = rows(tmp_path / "t")[-1]
    assert last["ratio"] == 1.0 and last["cap_hits"] > 0 and last["mismatch"] > 1e-3
    assert 0 < last["effective_samples"] < 1


def test_sigterm_saves_at_a_step_boundary(sft, tmp_path):
    args = ["--algo", "dr_grpo", "--model", sft / "export", "--steps", 500, "--out", tmp_path, "--name", "t", *SMALL]
    process = start(*args, cold=True)
    while not (tmp_path / "t/metrics.jsonl").exists() or len(rows(tmp_path / "t")) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    done = max(r["step"] for r in rows(tmp_path / "t")) + 1
    assert f"after step {done}" in out + err and "--resume auto" in out + err
    assert (tmp_path / f"t/checkpoints/step_{done:06d}/meta.json").exists()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_reward_that_raises_stops_the_run_and_names_the_row(sft, tmp_path, lag):
    """At lag 1 in the thread of a rollout beside an update."""
    left = f"import itertools\nleft = itertools.count({16 * lag}, -1)\n"
    (tmp_path / "mine.py").write_text(left + "def broken(text, row):\n    return 1 / max(next(left), 0)\n")
    spec = f"{tmp_path}/mine.py:broken"
    args = ["--algo", "grpo", "--model", sft / "export", "--steps", 1 + lag, "--out", tmp_path, *SMALL, "--lag", lag]
    args += ["--eval_size", 0]
    text = run(*args, "--rewards", "answer", spec, code=1)
    assert "ZeroDivisionError" in text and "'broken'" in text and "row" in text
    run(*args, "--rewards", "answer", spec, "--reward_on_error", "zero")
    assert rows(tmp_path / "grpo-export-seed0")[lag]["reward_errors"] == 16


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning_rate", "1"], "no setting 'lerning_rate'"),
        (["--task", "gsm9k"], "'gsm8k'"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--model", "configs/models/tiny"], "random weights"),
        (["--task", "jsonl", "--train_data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--rewards", "anser"], "'answer'"),
        (["--rollout", "vlm"], "native"),
        (["--kernels", "fused"], "chunked on a CPU"),
        (["--lr", "inf"], "finite"),
        (["--wandb", "offline"], "requirements-wandb.txt"),
        (["--resume", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_ends_in_one_plain_sentence(sft, tmp_path, argv, words):
    text = run("--model", sft / "export", "--out", tmp_path, *SMALL, *argv, code=2)
    assert words in text and "Traceback" not in text and text.count("error:") == 1


def test_a_run_is_made_unless_it_is_finished(tmp_path):
    made = []
    (tmp_path / LAUNCH_LOG).touch()
    assert not have_run(tmp_path, lambda: made.append("stopped")) and made == ["stopped"]
    assert have_run(tmp_path, (tmp_path / "summary.json").touch) and have_run(tmp_path, made.clear) and made
    (tmp_path / LAUNCH_LOG).unlink()
    assert have_run(tmp_path, made.clear) and not made, "what is no run's is not taken for one"


def test_two_launches_at_once_do_not_share_a_folder(sft, tmp_path):
    args = ["--algo", "grpo", "--model", sft / "export", "--steps", 2, "--out", tmp_path, *SMALL, "--eval_size", 0]
    processes = [start(*args), start(*args)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0], [p.communicate() for p in processes]
    assert {p.name for p in tmp_path.iterdir()} == {"grpo-export-seed0", "grpo-export-seed0-2"}
    assert all([r["step"] for r in rows(folder)] == [0, 1] for folder in tmp_path.iterdir())


def test_going_on_from_an_earlier_step_sets_the_later_ones_aside(sft, tmp_path):
    args = ["--algo", "grpo", "--model", sft / "export", "--out", tmp_path, "--name", "b", *SMALL, "--eval_size", 0]
    run(*args, "--steps", 3, "--save_every", 1, "--keep", 5)
    text = run(*args, "--steps", 2, "--resume", tmp_path / "b/checkpoints/step_000001", "--lr", "1e-4", "--keep", 5)
    assert "Changed: " in text and "lr 1e-06 -> 0.0001" in text
    names = {p.name for p in (tmp_path / "b/checkpoints").iterdir()}
    assert names == {"step_000001", "step_000002", "abandoned_step_000002", "abandoned_step_000003"}
    assert [r["step"] for r in rows(tmp_path / "b")] == [0, 1]
    assert "Done: 2 steps" in run(*args, "--steps", 1, "--resume", "auto")  # it has more steps than asked for


def test_an_evaluation_cut_short_at_the_end_is_made_up_for_on_resume(sft, tmp_path):
    args = ["--algo", "dr_grpo", "--model", sft / "export", "--steps", 1, "--out", tmp_path, "--name", "e", *SMALL]
    out = run(*args, script=["-c", CUT_SHORT])
    assert "Stopped by a signal after step 1" in out, out
    evals = [r["eval"] for r in rows(tmp_path / "e") if "eval" in r]
    assert evals == ["greedy", "sampled"] and not (tmp_path / "e/summary.json").exists()
    run(*args, "--resume", "auto")
    assert json.loads((tmp_path / "e/summary.json").read_text())["accuracy_after"] is not None


def test_a_signal_during_the_last_step_leaves_a_finished_run(tmp_path):
    args = ["--algo", "sft", "--steps", 2, "--eval_size", 0, "--out", tmp_path, "--name", "last", "--threads", 1]
    assert "Done: 2 steps" in run(*args, script=["-c", STOPPED_LAST])
    assert (tmp_path / "last/summary.json").exists() and (tmp_path / "last/export/config.json").exists()


def test_every_setting_passes_through_torchruns_own_parser():
    from torch.distributed.run import get_args_parser

    for key in TYPES:
        parsed = get_args_parser().parse_args(["train.py", f"--{key}", "1"])
        assert parsed.training_script_args == [f"--{key}", "1"], key


def test_dry_run_tells_the_plan_and_writes_nothing(tmp_path):
    text = run("--algo", "grpo", "--out", tmp_path, "--dry-run")
    for words in ("parameters", "tokens per step", "memory per rank", "clip_high: 0.2", "rollout replica"):
        assert words in text
    assert "\nFits: " in text
    small = run("--algo", "grpo", "--out", tmp_path, "--dry-run", "--memory_gib", 0.01)  # a plan made is no failure
    assert "\nDoes not fit: " in small and "a GPU of 0.01 GiB" in small
    assert not any(tmp_path.iterdir())


def test_when_every_completion_hits_the_limit_the_run_goes_on(sft, tmp_path):
    args = [
        "--model",
        sft / "export",
        "--out",
        tmp_path,
        "--name",
        "short",
        "--steps",
        2,
        *SMALL,
        "--max_new_tokens",
        2,
    ]
    run("--algo", "dapo", *args)
    last = rows(tmp_path / "short")[-3]
    assert last["at_limit"] > 0.9 and last["accuracy"] == 0.0 and last["accepted"] == 0.0


REWARD = "def any_answer(text, row):\n    return 1.0\n"


def foreign_model(folder: Path) -> Path:
    """A Llama with dropout and a dated template, its weights named as DDP names them."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from engine import model

    torch.manual_seed(0)
    tokenizer = model.load_tokenizer("tiny")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    noisy = {"attention_dropout": 0.3, "initializer_range": 0.3, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer) + 8, num_key_value_heads=2, **sizes, **noisy)
    model.export_model(transformers.LlamaForCausalLM(config), tokenizer, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({f"module.{k}": w for k, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_foreign_model_learns_from_own_data_and_goes_on_with_no_other(tmp_path):
    folder, data = foreign_model(tmp_path / "m"), tmp_path / "train.jsonl"
    questions = [f"Mia has {i} pens." for i in range(6)]
    data.write_text("".join(json.dumps({"prompt": q, "answer": "see the reward"}) + "\n" for q in questions))
    held_out = [questions[2].upper(), "Tom has 1 pen.", "pens " * 200]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"prompt": q, "answer": "5"}) + "\n" for q in held_out))
    (tmp_path / "mine.py").write_text(REWARD)
    args = ["--algo", "grpo", "--model", folder, "--task", "jsonl", "--train_data", data, "--test_data",
            tmp_path / "test.jsonl", "--rewards", f"{tmp_path}/mine.py:any_answer", "--out", tmp_path, "--name", "own",
            "--max_prompt_tokens", 64, "--lr", 0, *SMALL]  # fmt: skip
    said = run(*args, "--steps", 2)
    for line in ("Took the names of wrappers", "1 of the 3 held-out problems stand in"):
        assert line in said
    assert said.count("1 of 3 held-out prompts were too long") == 1
    steps, held = ([r for r in rows(tmp_path / "own") if ("eval" in r) == flag] for flag in (False, True))
    assert len(steps) == 2 and all(r["mismatch"] < 1e-4 and r["kl"] < 1e-6 for r in steps), "dropout"
    assert {(r["accuracy"], r["problems"], r["dropped"]) for r in held} == {(1.0, 2, 1)}
    config = tmp_path / "own/config.yaml"
    config.write_text(re.sub(r"^date: .*$", "date: '2024-02-29'", config.read_text(), flags=re.M))
    data.write_text(data.read_text().replace("pens", "eggs", 1))
    assert "learned from other training data (digest" in run(*args, "--steps", 3, "--resume", "auto", code=2)
    said = run(*args, "--steps", 3, "--resume", "auto", "--new_data", "true")
    assert "Resuming" in said and "Going on with other training data: " in said
    assert "date: '2024-02-29'" in config.read_text()
