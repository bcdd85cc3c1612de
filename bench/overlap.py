"""Rollout beside update: steps of train.py at lag 0 and at lag 1, in turns, each turn a fresh process.

A learning rate of 0 gives both the same prompts, tokens and lengths, which is checked. Tg is the rollout with its
rewards, Tt the update with the weights' way to the rollout, both medians of the lag-0 steps of the same round.
  hidden  (Tg + Tt - step at lag 1) / min(Tg, Tt): the share of the shorter phase that has gone. Two phases that slow
          each other down overlap wholly and hide nothing
  bound   (Tg + Tt) / max(Tg, Tt, Tg*ug + Tt*ut): the speed-up that sharing the machine allows, u the share of its
          limiting resource a phase uses: of the cores on a CPU, of the measured matmul rate on a GPU
  speed   step at lag 0 over step at lag 1; `lag 0, all cores` is what the threads of lag 1 would do for one phase
"""

import os
import tempfile
from statistics import median
from typing import NamedTuple

import torch

from .clocks import measure_roofs
from .harness import Experiment, Wrong, new_row, outcome, summarize, take_turns
from .stand_in import SHAPES, save
from .table import ratio, remarks, seconds, share, shown, spread
from .trl import OUR_SETTINGS, REWARDS, find_export, train_steps

RIVALS = {"lag 0": "", "lag 1": "", "lag 0, all cores": "twice the threads"}
WARMUP, COUNTED = 2, 6  # steps of a turn
SETTINGS = {**OUR_SETTINGS, "algo": "grpo", "lr": 0, "steps": WARMUP + COUNTED, "rewards": REWARDS["alternate"]}


class Size(NamedTuple):
    """`sft`: the embedded model after its SFT, else a shape of bench.stand_in; prompts, answers each, their limit."""

    model: str
    prompts: int
    answers: int
    limit: int
    micro_batch: int
    checkpointed: bool = False


def find_model(size, threads, device, folder):
    if size.model == "sft":
        return find_export("sft", threads)
    save(size.model, folder, device)
    return folder


def turn(row, size, model, threads, device):
    """Seconds of the counted steps of one turn; the steps go into the row."""
    lag, threads = int(row["rival"].startswith("lag 1")), threads * (2 if "cores" in row["rival"] else 1)
    settings = {
        **SETTINGS, "model": model, "lag": lag, "device": device, "prompts_per_step": size.prompts,
        "group_size": size.answers, "max_new_tokens": size.limit, "micro_batch": size.micro_batch,
        "activation_checkpointing": size.checkpointed,
    }  # fmt: skip
    steps, peak = train_steps(settings, threads)
    row["peak_bytes"] = max(peak, row.get("peak_bytes", 0))
    row["tokens"] = [step["generated_tokens"] for step in steps]
    counted = steps[WARMUP : WARMUP + COUNTED - lag]  # the last step of lag 1 has no rollout beside it
    row.setdefault("turns", []).append(
        {
            "step": median(step["seconds/step"] for step in counted),
            "rollout": median(step["seconds/rollout"] + step["seconds/advantage"] for step in counted),
            "update": median(step["seconds/update"] + step["seconds/weight_sync"] for step in counted),
            "wait": median(step.get("seconds/wait", 0.0) for step in counted),
            "tokens": sum(step["generated_tokens"] for step in counted) / len(counted),
        }
    )
    return [step["seconds/step"] for step in counted]


def describe(row, base, uses):
    """Medians over the turns; hidden and bound of each round, with the two turns of that round."""
    turns = row.pop("turns", [])
    if row["status"] != "ok" or not turns:
        return
    for phase in ("rollout", "update", "wait"):
        row[phase] = median(turn[phase] for turn in turns)
    row["tokens_per_second"] = median(turn["tokens"] / turn["step"] for turn in turns)
    row["speed"] = median(zero["step"] / turn["step"] for zero, turn in zip(base, turns))
    if row["rival"] == "lag 1":
        row["hidden"] = median(
            (zero["rollout"] + zero["update"] - turn["step"]) / min(zero["rollout"], zero["update"])
            for zero, turn in zip(base, turns)
        )
        row["bound"] = median(bound(zero["rollout"], zero["update"], *uses(zero)) for zero in base)


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
    passes = 4 if size.checkpointed else 3
    return lambda turn: tuple(
        min(1.0, turn["tokens"] * flops * n / (rate * turn[phase])) for phase, n in (("rollout", 1), ("update", passes))
    )


def run(device, size, rounds, threads, tick):
    """-> a row per lag."""
    rows = {name: new_row(name, note) for name, note in RIVALS.items()}
    if size in SIZES["small"]:
        for row in rows.values():
            row["status"], row["why"] = "skipped", "starts processes that train"
        return list(rows.values())
    if device != "cpu" or len(os.sched_getaffinity(0)) < 2 * threads:
        rows["lag 0, all cores"]["status"], rows["lag 0, all cores"]["why"] = "skipped", "no cores beside these threads"
    with tempfile.TemporaryDirectory() as folder:
        model = find_model(size, threads, device, folder)
        calls = {name: row for name, row in rows.items() if row["status"] == "ok"}
        take_turns(calls, rows, rounds, lambda row: turn(row, size, model, threads, device), tick)
    drawn = {name: row.pop("tokens", None) for name, row in rows.items()}
    for name, row in rows.items():
        with outcome(row):
            if drawn[name] not in (None, drawn["lag 0"]):
                raise Wrong("other numbers of tokens than at lag 0")
    uses, base = shares(size, threads, device), list(rows["lag 0"].get("turns", []))
    for row in rows.values():
        describe(row, base, uses)
    summarize(rows, {}, base="lag 0")
    return list(rows.values())


SIZES = {
    "small": [Size("sft", 2, 2, 4, 4)],
    "cpu": [Size("sft", 16, 8, 40, 32)],
    "cuda": [Size("qwen2.5-0.5b", 16, 8, 512, 16), Size("qwen2.5-3b", 16, 8, 512, 16, True)],
}
BENCH = Experiment(
    SIZES, run, RIVALS,
    (
        ("rival", shown("rival")), ("step", shown("median", seconds)), ("p20-p80", spread),
        ("rollout", shown("rollout", seconds)), ("update", shown("update", seconds)), ("wait", shown("wait", seconds)),
        ("speed", shown("speed", ratio)), ("bound", shown("bound", ratio)), ("hidden", shown("hidden", share)),
        ("tokens/s", shown("tokens_per_second", "{:,.0f}".format)), ("", remarks),
    ),
)  # fmt: skip
