"""Lag 1 in whole runs: what fails, ends or is cut short while a rollout is under way beside the update."""

import contextlib
import os
import subprocess
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine import dist
from engine.algos import algo_of
from engine.config import load_config
from engine.dist import World
from engine.inputs import load_items
from engine.model import export_model, load_model, load_tokenizer
from engine.prefetch import Prefetch
from engine.run import Run
from engine.sources import Prompts
from tests.test_train import rows
from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--eval_size 0 --prompts_per_step 4 --group_size 4 --max_new_tokens 8 --tensorboard false --threads 1".split()
REWARDS = """
def even(text, row):
    return float(len(text) % 2)

def never(text, row):
    return 0.0
"""
ENDLESS = """
import os, signal, sys, threading, time

sys.path.insert(0, {root!r})
import train
from engine import dist
from engine.learner import Learner
from engine.rollouts.native import NativeRollout

def endless(self, *args, **kwargs):
    if threading.current_thread() is threading.main_thread():
        return call(self, *args, **kwargs)
    beside.set()
    while not self.should_stop():
        time.sleep(0.001)
    raise InterruptedError

def update(self, samples, step):
    assert beside.wait(60)
    {plant}
    return learn(self, samples, step)

beside = threading.Event()
call, NativeRollout.__call__ = NativeRollout.__call__, endless
learn, Learner.update = Learner.update, update
dist.run(train.main)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The embedded model with its random weights in `model`, and two rewards in `mine.py`."""
    folder = tmp_path_factory.mktemp("start")
    export_model(load_model("tiny", 0, torch.float32), load_tokenizer("tiny"), folder / "model")
    (folder / "mine.py").write_text(REWARDS)
    return folder


def run(*argv, script=ROOT / "train.py", ranks=0) -> tuple[int, str]:
    done = subprocess.run(
        command(script, *argv, *SMALL, ranks=ranks), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


def rl(start, out, *argv, reward="even") -> list:
    rewards = ["--rewards", f"{start}/mine.py:{reward}"]
    fixed = ["--algo", "grpo", "--lag", 1, "--lr", "1e-3", "--name", "run"]
    return [*fixed, "--model", start / "model", "--out", out, *rewards, *argv]


@pytest.mark.parametrize(
    ("ranks", "plant", "words"),
    [
        (0, "1 / 0", "ZeroDivisionError"),
        (2, "os.kill(os.getpid(), signal.SIGKILL * self.world.rank)", "rank 1 was killed or crashed"),
    ],
)
def test_a_failure_ends_the_run_though_the_rollout_never_would(start, tmp_path, ranks, plant, words):
    script = tmp_path / "planted.py"
    script.write_text(ENDLESS.format(root=str(ROOT), plant=plant))
    code, text = run(*rl(start, tmp_path, "--steps", 3), script=script, ranks=ranks)
    assert code == 1 and words in text and "still running" not in text, text[-3000:]


def test_a_signal_gives_up_a_rollout_that_never_lands(start, tmp_path):
    """After a step whose groups were all dropped: no rank has a sequence, and none waits for the other."""
    script = tmp_path / "planted.py"
    script.write_text(ENDLESS.format(root=str(ROOT), plant="os.kill(os.getpid(), signal.SIGTERM)"))
    more = ["--steps", 3, "--grace_seconds", 6, "--dynamic_sampling", "true", "--max_refills", 1]
    code, text = run(*rl(start, tmp_path, *more, reward="never"), script=script, ranks=2)
    assert code == 0 and "Stopped by a signal after step 1" in text and "nothing to learn from" in text, text[-3000:]
    assert [(r["accepted"], r["empty_updates"]) for r in rows(tmp_path / "run")] == [(0.0, 1.0)]
    for rank in range(2):
        kept = load_file(tmp_path / f"run/checkpoints/step_000001/rank_{rank}.safetensors")
        assert not any(name.startswith("landed") for name in kept)
        assert kept["cursor"] == 4  # as before the rollout: its prompts are drawn again


def test_two_ranks_go_on_with_the_rollouts_that_had_landed(start, tmp_path):
    """Several updates a rollout, over groups drawn until they are mixed."""
    more = ["--dynamic_sampling", "true", "--max_refills", 1, "--updates_per_rollout", 2, "--epochs", 2, "--steps", 4]
    args = rl(start, tmp_path, *more, "--save_every", 2)
    code, text = run(*args, ranks=2)
    assert code == 0, text[-3000:]
    whole = rows(tmp_path / "run")
    code, text = run(*args, "--resume", tmp_path / "run/checkpoints/step_000002", ranks=2)
    assert code == 0 and (tmp_path / "run/checkpoints/abandoned_step_000004").exists(), text[-3000:]
    assert rows(tmp_path / "run") == whole and [r["staleness"] for r in whole] == [0, 1, 1, 1]


def test_traces_read_ahead_are_those_read_in_time():
    config = load_config(["--algo", "sft", "--step_tokens", "384"])
    items, source = load_items(config, "train"), algo_of(config).source
    world = World(0, 1, 0, torch.device("cpu"), None)

    def batches(lag):
        prompts = Prompts(items, load_tokenizer("tiny"), config, source.stream(len(items), config, world))
        make = source.open(config, prompts, None, world)
        with Prefetch(make, lag, 4, world.device, lambda verb, step: contextlib.nullcontext()) as ahead:
            for step in range(4):
                yield ahead.next(step)
                ahead.begin(step + 1)
                ahead.land()

    for ours, theirs in zip(batches(1), batches(0), strict=True):
        assert ours.samples == theirs.samples and len(ours.samples) > 5
        assert ours.cursor == theirs.cursor and ours.tally.sums == theirs.tally.sums


def test_only_a_rollout_beside_an_update_outlives_a_signal_for_a_while(monkeypatch):
    monkeypatch.setattr(dist, "stop_requested", lambda seconds=0.0: seconds < 5)  # the signal came 5 s ago
    flight, ahead = Future(), Prefetch(lambda step: None, 1, 2, torch.device("cpu"), contextlib.nullcontext)
    run = SimpleNamespace(config=SimpleNamespace(grace_seconds=20.0), ahead=ahead)
    assert Run.should_stop(run)
    ahead._flight = flight
    assert not Run.should_stop(run)
    flight.set_result(None)
    assert Run.should_stop(run), "an evaluation, with the next batch at hand"
    flight = ahead._flight = Future()
    ahead.cancelled.set()
    assert Run.should_stop(run), "the update has failed"
