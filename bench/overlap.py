"""Rollout beside update: steps of train.py at lag 0 and at lag 1, in turns, each turn a fresh process.

A learning rate of 0 gives both the same prompts, tokens and lengths, which is checked. Tg is the rollout with its
rewards, Tt the update with the weights' way to the rollout, both medians of the lag-0 steps of the same round.
  hidden  (Tg + Tt - step at lag 1) / min(Tg, Tt): the share of the shorter phase that has gone. Two phases that slow
          each other down overlap wholly and hide nothing
  bound   (Tg + Tt) / max(Tg, Tt, Tg*ug + Tt*ut): the speed-up that sharing the machine allows, u the share of its
          limiting resource a phase uses: of the cores on a CPU, of the measured matmul rate on a GPU
  speed   step at lag 0 over step at lag 1; `lag 0, all cores` is what the threads of lag 1 would do for one phase
Rows have the medians of every phase of a step too. On a GPU those inside the update are the host's, which queues
forward and backward ahead of the device; the optimizer holds the wait. Rewards run beside the rollout.
  memory  the most bytes on the GPU, beside what `train.py --dry-run` says of the same settings
"""

import os
import tempfile
from statistics import median
from typing import NamedTuple

import torch

from .clocks import measure_roofs
from .harness import Experiment, Wrong, outcome, summarize, take_turns
from .stand_in import SHAPES, save
from .table import cell, megabytes, ratio, remarks, seconds, share, shown, spread
from .trl import OUR_SETTINGS, REWARDS, find_export, options, train_steps

RIVALS = {"lag 0": "", "lag 1": "", "lag 0, eager": "kernels eager", "lag 0, all cores": "twice the threads"}
PHASES = ("rollout", "reward", "advantage", "update", "forward", "backward", "optimizer", "weight_sync", "wait")
WARMUP, COUNTED = 2, 6  # steps of a turn
SETTINGS = {**OUR_SETTINGS, "algo": "grpo", "lr": 0, "steps": WARMUP + COUNTED, "rewards": REWARDS["alternate"]}


class Size(NamedTuple):
    """`sft`: the embedded model after its SFT, else a shape of bench.stand_in; prompts, answers each, their limit."""

    model: str
    prompts: int
    answers: int
    limit: int
    micro_tokens: int
    checkpointed: bool = False


def find_model(size, threads, device, folder):
    if size.model == "sft":
        return find_export("sft", threads)
    save(size.model, folder, device)
    if device == "cuda":
        torch.cuda.empty_cache()  # the runs get all of the GPU
    return folder


def turn(row, size, model, threads, device):
    """Seconds of the counted steps of one turn; the steps go into the row."""
    lag, threads = int(row["rival"].startswith("lag 1")), threads * (2 if "cores" in row["rival"] else 1)
    settings = {
        **SETTINGS, "model": model, "lag": lag, "device": device, "prompts_per_step": size.prompts,
        "group_size": size.answers, "max_new_tokens": size.limit, "micro_tokens": size.micro_tokens,
        "activation_checkpointing": size.checkpointed, "kernels": "eager" if "eager" in row["rival"] else "auto",
    }  # fmt: skip
    steps, peak = train_steps(settings, threads)
    row["peak_bytes"] = max(peak, row.get("peak_bytes", 0))
    if device == "cuda":
        row["estimated_bytes"] = estimated_memory(settings)
    row["tokens"] = [step["generated_tokens"] for step in steps]
    counted = steps[WARMUP : WARMUP + COUNTED - lag]  # the last step of lag 1 has no rollout beside it
    row.setdefault("turns", []).append(
        {
            "step": median(step["seconds/step"] for step in counted),
            **{phase: median(step.get(f"seconds/{phase}", 0.0) for step in counted) for phase in PHASES},
            "tokens": sum(step["generated_tokens"] for step in counted) / len(counted),
        }
    )
    return [step["seconds/step"] for step in counted]


def estimated_memory(settings):
    """Bytes that `train.py --dry-run` says."""
    from engine.config import load_config
    from engine.plan import estimate_memory

    return sum(estimate_memory(load_config(options(settings)), 1).values())


def describe(row, base, uses):
    """Medians over the turns; hidden and bound of each round, with the two turns of that round."""
    turns = row.pop("turns", [])
    if row["status"] != "ok" or not turns:
        return
    for phase in PHASES:
        row[phase] = median(turn[phase] for turn in turns)
    row["tokens_per_second"] = median(turn["tokens"] / turn["step"] for turn in turns)
    row["speed"] = median(zero["step"] / turn["step"] for zero, turn in zip(base, turns))
    if row["rival"] == "lag 1":
        row["hidden"] = median(
            (sum(halves(zero)) - turn["step"]) / min(halves(zero)) for zero, turn in zip(base, turns)
        )
        row["bound"] = median(bound(*halves(zero), *uses(zero)) for zero in base)


def halves(turn):
    """Tg and Tt of a turn at lag 0: what can be beside each other."""
    return turn["rollout"] + turn["advantage"], turn["update"] + turn["weight_sync"]


def bound(rollout, update, rollout_use, update_use):
    return (rollout + update) / max(rollout, update, rollout * rollout_use + update * update_use)


def shares(size, threads, device):
    """-> uses(turn at lag 0): the shares of the limiting resource that rollout and update use."""
    if device == "cpu":
        part = min(1.0, threads / len(os.sched_getaffinity(0)))
        return lambda turn: (part, part)
    shape, rate = SHAPES[size.model], measure_roofs(device, torch.bfloat16, False)["matmul"]
    wide, kv = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = wide * wide * (2 + 2 * kv) + 3 * wide * shape["intermediate_size"]
    flops = 2 * (shape["num_hidden_layers"] * layer + wide * 151936)  # of one token's forward, attention left out
    passes = 1, 4 if size.checkpointed else 3
    return lambda turn: tuple(
        min(1.0, turn["tokens"] * flops * n / (rate * time)) for n, time in zip(passes, halves(turn))
    )


def leave_out(rows, device, size, threads):
    why = {}
    if size in SIZES["small"]:
        why = dict.fromkeys(rows, "starts processes that train")
    elif device == "cpu":
        why["lag 0, eager"] = "for a GPU"
    if device != "cpu" or len(os.sched_getaffinity(0)) < 2 * threads:
        why.setdefault("lag 0, all cores", "no cores beside these threads")
    for name, reason in why.items():
        rows[name]["status"], rows[name]["why"] = "skipped", reason


def run(rows, device, size, rounds, threads, tick):
    leave_out(rows, device, size, threads)
    if size in SIZES["small"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        model = find_model(size, threads, device, folder)
        calls = {name: row for name, row in rows.items() if row["status"] == "ok"}
        take_turns(calls, rows, rounds, lambda row: turn(row, size, model, threads, device), tick)
    drawn = {name: row.pop("tokens", None) for name, row in rows.items()}
    for name, row in rows.items():
        with outcome(row):
            if name != "lag 0, eager" and drawn[name] not in (None, drawn["lag 0"]):  # other kernels round otherwise
                raise Wrong("other numbers of tokens than at lag 0")
    uses, base = shares(size, threads, device), list(rows["lag 0"].get("turns", []))
    for row in rows.values():
        describe(row, base, uses)
    summarize(rows, {}, base="lag 0")


def memory(row):
    return " / ".join(cell(row, key, megabytes) for key in ("peak_bytes", "estimated_bytes") if key in row) or "-"


SIZES = {
    "small": [Size("sft", 2, 2, 4, 256)],
    "first": [Size("qwen2.5-0.5b", 16, 8, 512, 8192)],
    "cpu": [Size("sft", 16, 8, 40, 2048)],
    "cuda": [Size("qwen2.5-0.5b", 16, 8, 512, 8192), Size("qwen2.5-3b", 16, 8, 512, 8192, True)],
}
BENCH = Experiment(
    SIZES, run, RIVALS,
    (
        ("rival", shown("rival")), ("step", shown("median", seconds)), ("p20-p80", spread),
        ("rollout", shown("rollout", seconds)), ("update", shown("update", seconds)), ("wait", shown("wait", seconds)),
        ("speed", shown("speed", ratio)), ("bound", shown("bound", ratio)), ("hidden", shown("hidden", share)),
        ("tokens/s", shown("tokens_per_second", "{:,.0f}".format)), ("memory / dry-run", memory), ("", remarks),
    ),
)  # fmt: skip
