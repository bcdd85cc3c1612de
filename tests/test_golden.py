"""Step by step the figures of the engine that was here before: its rewards, losses and the rest, from one seed.

golden.json was recorded at commit 3b2d298, with `pack_length 1024` for sft's `step_tokens`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from engine import model
from engine.log import read_rows
from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests/golden.json").read_text())
RL = """--steps 4 --warmup_steps 0 --prompts_per_step 6 --group_size 4 --max_new_tokens 16 --lr 1e-3 --schedule constant
    --rewards tests/letters.py:letters --init_from {start}"""
RUNS = {
    "sft": "--algo sft --steps 5 --warmup_steps 0 --seed 3 --step_tokens 1024",
    "grpo": f"--algo grpo {RL}",
    "grpo_lag1": f"--algo grpo --lag 1 {RL}",
    "capped": f"--algo grpo --lag 1 --importance_cap 2.0 {RL}",
    "dr_grpo": f"--algo dr_grpo --entropy_coef 0.01 {RL}",
    "dapo": f"--algo dapo --updates_per_rollout 2 --epochs 2 --dynamic_sampling false {RL}",
    "shared": f"--algo dr_grpo --share_prompts true {RL}",
}
RENAMED = {"lr": "learning_rate", "clip_low": "clipped_low", "clip_high": "clipped_high"}
LOOSE = {"mismatch": 1e-5, "kl": 1e-6, "approx_kl": 1e-6}
"""Differences of numbers that are nearly equal: what fp32 leaves of them is absolute."""


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The embedded model with its random weights."""
    folder = tmp_path_factory.mktemp("random")
    model.export_model(model.load_model("tiny", 0, torch.float32), model.load_tokenizer("tiny"), folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_every_step_is_that_of_the_engine_before(name, start, tmp_path):
    settings = RUNS[name].format(start=start).split()
    same = ["--out", tmp_path, "--name", name, "--tensorboard", "false", "--eval_size", 0, "--threads", 1]
    words, env = command("train.py", *same, *settings), os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for step, (old, new) in enumerate(zip(GOLDEN[name], read_rows(tmp_path / name / "metrics.jsonl"), strict=True)):
        for key, value in old.items():
            found = new[RENAMED.get(key, key)]
            assert found == pytest.approx(value, rel=1e-4, abs=LOOSE.get(key, 1e-6)), f"step {step}: {key}"
