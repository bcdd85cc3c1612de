"""One GRPO step of the embedded model from train.py's own path: kernels=fused in the interpreter is kernels=eager.

Adam's eps is large, so that the step is nearly linear in the gradient and the weights after it can be compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SLAB_ROWS = 16
QUIET = ["--device", "cpu", "--eval_size", "0", "--tensorboard", "false", "--num_samples", "0", "--save_every", "0"]
SFT = [
    "--algo",
    "sft",
    "--name",
    "sft",
    "--steps",
    "1",
    "--rows_per_step",
    "1",
    "--micro_batch",
    "1",
    "--pack_length",
    "64",
]
STEP = [
    "--algo",
    "grpo",
    "--steps",
    "1",
    "--prompts_per_step",
    "2",
    "--group_size",
    "4",
    "--max_new_tokens",
    "10",
    "--micro_batch",
    "8",
    "--beta",
    "0.1",
    "--entropy_coef",
    "0.01",
    "--logp_old",
    "recompute",
    "--lr",
    "0.1",
    "--eps",
    "1.0",
    "--max_grad_norm",
    "1e9",
]
RUN = f"""
import sys, torch, train
from engine import dist
from kernels import head

def main():
    tokens = []
    build = head.Head.__init__
    def watched(self, hidden_ND, weight_VD, bias_V, rows_M, *rest):
        head.SLAB_BYTES["cpu"] = {SLAB_ROWS} * 4 * len(weight_VD)
        build(self, hidden_ND, weight_VD, bias_V, rows_M, *rest)
        tokens.append((len(rows_M), *weight_VD.shape))
    head.Head.__init__ = watched
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        code = train.main()
    shapes = [shape for event in profile.events() for shape in event.input_shapes if len(shape) == 2]
    for N, V, D in tokens:
        heights = {{shape[0] for shape in shapes if shape[1] == V}} - {{D}}  # [D, V] is the head's weight, transposed
        assert N > {SLAB_ROWS} and N != D and max(heights) <= {SLAB_ROWS}, (N, V, D, heights)
    print("logits at once:", {SLAB_ROWS}, "of", tokens)
    return code

dist.run(main)
"""


def lengths(text: str, row: dict) -> float:
    return float(len(text) % 3)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp("step")
    run([sys.executable, "train.py", *SFT, "--out", out, *QUIET])
    return out


def run(command):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def step(out, kernels, command):
    reward = f"{Path(__file__)}:lengths"
    where = ["--out", out, "--name", kernels, "--model", out / "sft" / "export", "--rewards", reward]
    said = run([sys.executable, *command, *STEP, *where, "--kernels", kernels, *QUIET])
    metrics = [json.loads(line) for line in (out / kernels / "metrics.jsonl").read_text().splitlines()]
    return metrics[0], load_file(out / kernels / "export" / "model.safetensors"), said


def test_fused_takes_the_step_of_eager(start):
    before = load_file(start / "sft" / "export" / "model.safetensors")
    eager, eager_weights, _ = step(start, "eager", ["train.py"])
    fused, fused_weights, said = step(start, "fused", ["-c", RUN])
    assert f"logits at once: {SLAB_ROWS}" in said
    for name in ("loss", "grad_norm", "kl", "entropy", "tokens", "reward"):
        assert fused[name] == pytest.approx(eager[name], rel=1e-4, abs=1e-6), name
    assert eager["grad_norm"] > 1e-3
    moved = max((eager_weights[name] - before[name]).abs().max() for name in before)
    for name, weight in eager_weights.items():
        assert (fused_weights[name] - weight).abs().max() <= 1e-4 * moved, name
