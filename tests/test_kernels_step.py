"""One GRPO step of a small model from train.py's own path: kernels=fused in the interpreter is kernels=eager.

Adam's eps is large, so that the step is nearly linear in the gradient and the weights after it can be compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from engine import model
from tests.kernel_cases import NEEDS_INTERPRETER
from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
SLAB_ROWS = 16
QUIET = "--device cpu --eval_size 0 --tensorboard false --num_samples 0 --save_every 0"
STEP = (
    "--algo grpo --steps 1 --prompts_per_step 2 --group_size 8 --max_new_tokens 6 --micro_tokens 512 --beta 0.1 "
    "--entropy_coef 0.01 --logp_old recompute --lr 0.1 --eps 1.0 --max_grad_norm 1e9"
)
NARROW = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
RUN = f"""
import math, sys, torch, train
from engine import dist
from kernels import fused, head

def numels(shapes):
    for shape in shapes:
        if any(isinstance(x, (list, tuple)) for x in shape):
            yield from numels(shape)
        else:
            yield math.prod(shape)

def watched(fn, calls):
    def run(hidden_ND, weight_VD, *rest, rows_M, **kwargs):
        (V, D), N = weight_VD.shape, len(rows_M)
        assert N > max(D, {SLAB_ROWS}), (N, D)  # then the head's weight and its gradient are smaller than N x V
        head.SLAB_BYTES["cpu"] = {SLAB_ROWS} * 4 * V
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True) as profile:
            outs = fn(hidden_ND, weight_VD, *rest, rows_M=rows_M, **kwargs)
        read = {{size for event in profile.events() for size in numels(event.input_shapes)}}
        made = {{event.self_cpu_memory_usage // 4 for event in profile.events()}}
        assert {SLAB_ROWS} * V in read & made and V * D in read
        most = max((read | made) - {{hidden_ND.numel()}})
        assert most < N * V, (N, V, D, most)
        calls.append(fn.__name__)
        return outs
    return run

def main():
    calls = []
    for name in ("linear_logprob", "linear_clipped_surrogate"):
        setattr(fused, name, watched(getattr(fused, name), calls))
    code = train.main()
    assert set(calls) == {{"linear_logprob", "linear_clipped_surrogate"}}
    print("logits at once:", {SLAB_ROWS}, "in", len(calls), "calls")
    return code

dist.run(main)
"""


def lengths(text: str, row: dict) -> float:
    return float(len(text) % 3)


def gemma(sizes):
    """With windows that are shorter than any prompt."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    ids = {name: sizes[name] for name in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")}
    return transformers.Gemma3TextConfig(**NARROW, **ids, **kinds, num_hidden_layers=2, head_dim=16)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a model narrower than the embedded one, untrained, as `start`; one of two layers has a window."""
    out, tokenizer = tmp_path_factory.mktemp("step"), model.load_tokenizer("tiny")
    config = gemma(model.model_config("tiny").to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = transformers.AutoModelForCausalLM.from_config(config)
    model.export_model(lm, tokenizer, out / "start")
    return out


def run(words, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(list(map(str, words)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def step(out, kernels, start, **environment):
    reward = f"{Path(__file__)}:lengths"
    where = ["--out", out, "--name", kernels, "--model", out / "start", "--rewards", reward]
    said = run([*start, *STEP.split(), *where, "--kernels", kernels, *QUIET.split()], **environment)
    metrics = [json.loads(line) for line in (out / kernels / "metrics.jsonl").read_text().splitlines()]
    return metrics[0], load_file(out / kernels / "export" / "model.safetensors"), said


@NEEDS_INTERPRETER
def test_fused_takes_the_step_of_eager(start):
    before = load_file(start / "start" / "model.safetensors")
    eager, eager_weights, _ = step(start, "eager", command("train.py"))
    fused, fused_weights, said = step(start, "fused", [sys.executable, "-c", RUN], TRITON_INTERPRET="1")
    assert f"logits at once: {SLAB_ROWS}" in said
    for name in ("loss", "grad_norm", "kl", "entropy", "tokens", "reward"):
        assert fused[name] == pytest.approx(eager[name], rel=1e-4, abs=1e-6), name
    assert eager["grad_norm"] > 1e-3
    moved = max((eager_weights[name] - before[name]).abs().max() for name in before)
    for name, weight in eager_weights.items():
        assert (fused_weights[name] - weight).abs().max() <= 1e-4 * moved, name
