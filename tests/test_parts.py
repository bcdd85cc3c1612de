"""Parts: what is made when, and gone when; the memory of an update."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.memory import MALLOC
from engine.log import read_rows
from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "--steps 2 --prompts_per_step 2 --group_size 2 --max_new_tokens 30 --eval_size 0 --tensorboard false".split()
TWO_RUNS = """
import gc, sys, weakref
import train
from engine import dist, run
from engine.config import load_config
from engine.inputs import load_inputs
from engine.rollouts.cache import SlotCache
from engine.run import Run

seen, begun, with_cache = [], [], set()

def load(config, world):
    alive = [ref() for ref in seen]
    assert not any(x is not None for x in alive), f"of the run before there are still {alive}"
    begun.append(config.algo)
    return real_load(config, world)

def build(*args):
    made = real_build(*args)
    seen.extend(map(weakref.ref, [made.policy, made.form, made.optimizer, *made.policy.parameters()]))
    return made

def end_step(self, step):
    real_end(self, step)
    rolls_out, made = self.config.algo != "sft", vars(self.parts)
    assert ("replica" in made, "rollout" in made) == (rolls_out, rolls_out)
    if any(isinstance(x, SlotCache) for x in gc.get_objects()):
        with_cache.add(self.config.algo)

def main():
    sft, rl = (load_config(["--algo", algo, "--model", "tiny", *sys.argv[1:]]) for algo in ("sft", "grpo"))
    world = dist.start("cpu")
    train.make_first(sft, world)
    train.train(rl, world, load_inputs(rl))
    assert begun == ["sft", "grpo"] and with_cache == {"grpo"} and len(seen) > 20
    return 0

real_load, run.load = run.load, load
real_build, run.build = run.build, build
real_end, Run.end_step = Run.end_step, end_step
dist.run(main)
"""


def test_a_run_leaves_nothing_behind_and_sft_makes_no_rollout(tmp_path):
    """SFT, then RL, in one process: the first model is gone before the second is loaded."""
    rewards = ["--rewards", "tests/letters.py:letters:0.5", "format"]
    done = subprocess.run(
        command("-c", TWO_RUNS, "--out", tmp_path, *SETTINGS, *rewards), cwd=ROOT, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for row in read_rows(tmp_path / "grpo-tiny-seed0/metrics.jsonl"):
        own = row["rewards/letters"], row["rewards/format"]
        assert row["reward"] == pytest.approx(0.5 * own[0] + own[1]) and own[0] > 0


PEAK = """
import json, random, sys
import torch
from bench.memory import peak_on_cpu
from engine import dist, model, parts
from engine.config import load_config
from engine.log import Log
from engine.samples import Sample
from pathlib import Path

def draw(least, most, tokens):
    dice, samples = random.Random(0), []
    while sum(len(s.prompt) + len(s.answer) for s in samples) < tokens:
        n = dice.randint(least, most)
        samples.append(Sample([5] * (n // 2), [dice.randrange(300) for _ in range(n - n // 2)]))
    return samples

def main():
    world, peaks = dist.start("cpu"), {}
    torch.set_num_threads(1)
    for budget in (2048, 4096):
        argv = ["--algo", "sft", "--micro_tokens", budget, "--max_new_tokens", 512, "--share_prompts", "false"]
        config = load_config(list(map(str, argv)))
        made = parts.build(config, world, model.load_model("tiny", 0, torch.float32))
        learner = made.learner(Log(config, Path(sys.argv[1]), 0, False), Path(sys.argv[1]))
        for name, (least, most) in {"mixed": (16, 512), "short": (60, 68), "long": (500, 508)}.items():
            samples = draw(least, most, 3 * budget)
            learner.learn(samples, 0)
            peaks[f"{name} {budget}"] = peak_on_cpu(lambda: learner.learn(samples, 1))[0]
    print("PEAKS " + json.dumps(peaks))
    return 0

dist.run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_an_update_follows_the_budget_whatever_the_lengths(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path], cwd=ROOT, timeout=240, capture_output=True, text=True,
        env=os.environ | MALLOC | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("PEAKS "))[6:])
    for budget in (2048, 4096):
        of_budget = [peak for name, peak in peaks.items() if name.endswith(str(budget))]
        assert max(of_budget) <= 1.1 * min(of_budget), peaks
    assert peaks["mixed 4096"] == pytest.approx(2 * peaks["mixed 2048"], rel=0.1), peaks
