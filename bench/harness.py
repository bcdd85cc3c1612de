"""What a benchmark is, and how its rivals are checked and timed against each other.

A rival is built from the inputs, run once against the truth (eager fed fp64), and only then timed. In each round every
rival has its turn, each round starting one rival further. A rival that is missing, runs out of memory, fails or is
wrong becomes a row that says so.
  share of the roof = max(flops / matmul rate, bytes / copy or read-only rate) / median time; rates of the same run
"""

import functools
import math
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Relative error beyond which a rival computes another function: far above rounding, far below a missing term."""

MIN_EXTRA_BYTES = 4 << 20
"""Below this, eager's memory is too close to the meter's resolution for a ratio."""


class Size(NamedTuple):
    """Rows, hidden size, vocabulary; a benchmark uses those it has."""

    N: int
    D: int
    V: int


class Work(NamedTuple):
    """The least that any implementation of the function must do."""

    flops: int
    bytes: int
    roof: str = "copy"  # or "sum", for what only reads


@dataclass(frozen=True)
class Rival:
    """build(inputs) -> run; run() -> outputs by name, gradients named d*. build imports what it measures."""

    build: Callable
    task: str = "full"  # which truth its outputs answer to; "" for none
    note: str = ""
    device: str = ""  # runs only there
    compiles: bool = False  # spends tens of seconds on that: left out at `small` and `first`


@dataclass(frozen=True)
class Benchmark:
    sizes: dict  # "small", "cpu", "cuda", perhaps "first" -> list of Size, or of the benchmark's own NamedTuple of ints
    dtypes: tuple  # of DTYPES
    inputs: Callable  # (size, dtype, device) -> tensors by name; those to differentiate require grad
    truth: Callable  # (inputs, task) -> fp64 outputs by name
    work: Callable  # (size, bytes of an element, task) -> Work
    rivals: dict  # name -> Rival, "eager" first


@dataclass(frozen=True)
class Experiment:
    """What is no function with a truth: run(rows, device, size, rounds, threads, tick) fills in the rows, of each rival
    a `new_row`: `columns` says how to show it. It checks before it times, and its rivals take turns; tick(what) as it
    goes, for what is in the rows by then is kept."""

    sizes: dict  # "small", "cpu", "cuda", perhaps "first" -> list of NamedTuples; an empty list where it does not run
    run: Callable
    rivals: dict  # name -> note
    columns: tuple  # (heading, row -> text) for the terminal and bench/README.md
    dtype: str = ""  # what it computes in, where that is not the engine's own: fp32 on a CPU, bf16 on a GPU


class Wrong(Exception):
    """A rival's output is not the function's."""


def compiled(fn):
    """torch.compile(fn), made at the first call: torch's compiler alone takes seconds to import."""
    made = functools.cache(lambda: torch.compile(fn))
    return lambda *arguments, **options: made()(*arguments, **options)


def gradients(value, inputs, names, upstream=None):
    """{"d" + name: gradient of `value`} for those of inputs[name] that require grad; names end in their axes."""
    names = [name for name in names if inputs[name].requires_grad]
    if not names:
        return {}
    grads = torch.autograd.grad(value, [inputs[name] for name in names], upstream)
    return dict(zip([f"d{name}" for name in names], grads))


def output_errors(outputs, truth):
    """{name: {"max_abs", "relative"}}, relative in the Frobenius norm, for a scalar against max(1, |truth|)."""
    errors = {}
    for name, out in outputs.items():
        want = truth[name]
        if out.shape != want.shape:
            raise Wrong(f"{name} has shape {list(out.shape)}, not {list(want.shape)}")
        diff = (out.detach() - want).abs_()  # one fp64 tensor: of 16384 rows of logits it takes 18.5 GiB
        largest = diff.max().item()
        if not math.isfinite(largest):
            raise Wrong(f"{name} is not finite")
        scale = want.norm() if want.dim() else want.abs().clamp(min=1)
        errors[name] = {"max_abs": largest, "relative": (diff.norm() / scale).item()}
    return errors


def refuse_wrong(errors, limit):
    for name, error in errors.items():
        if not error["relative"] <= limit:
            raise Wrong(f"{name} is off by {error['relative']:.1e} of its size, limit {limit:.0e}")


def status_of(error):
    """The word for an exception in the table."""
    text = str(error).lower()
    full = ("allocate memory", "enough memory", "out of memory")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in text for words in full):
        return "out of memory"
    return "absent" if isinstance(error, ImportError) else "wrong" if isinstance(error, Wrong) else "error"


@contextmanager
def outcome(row):
    """What goes wrong inside becomes row["status"] and row["why"]."""
    try:
        yield
    except Exception as error:  # a rival may fail in any way; each is a result
        row["status"] = status_of(error)
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        row["why"] = re.sub(r"(?<![^\s(])/\S+", "<path>", text)[:160]  # results are published, this machine is not


def new_row(name, note="", work=None):
    return dict(rival=name, note=note, status="ok", why="", seconds=[], **(work or Work(None, None))._asdict())


def fail_with(rows, base):
    """Gives every row the failure of the base, without which none can run."""
    for row in rows.values():
        row["status"], row["why"] = base["status"], base["why"]


def reached(rows):
    """The rows as they may be kept before the end: with what was timed so far, or saying that nothing was."""
    unfinished = {"status": "unfinished", "why": "the run ended before its turn"}
    return [
        row if row["status"] != "ok" else row | (quantiles(row["seconds"]) if row["seconds"] else unfinished)
        for row in rows.values()
    ]


def take_turns(calls, rows, rounds, clock, tick=lambda what: None):
    """Append to rows[name]["seconds"] what clock(calls[name]) returns; who fails is out of the later rounds."""
    for turn in range(rounds):
        names = [name for name in calls if rows[name]["status"] == "ok"]
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            tick(f"round {turn + 1} {name}")
            with outcome(rows[name]):
                rows[name]["seconds"] += clock(calls[name])


def quantiles(seconds):
    return dict(zip(("p20", "median", "p80"), np.quantile(seconds, (0.2, 0.5, 0.8)).tolist()))


def summarize(rows, roofs, base="eager"):
    """Fill in median, p20, p80, ratios to `base`, share of the roof, and whether a difference is above the spread."""
    timed = [row for row in rows.values() if row["status"] == "ok" and row["seconds"]]
    for row in timed:
        row.update(quantiles(row["seconds"]))
        if row["flops"] is not None:
            row["floor"] = max(row["flops"] / roofs["matmul"], row["bytes"] / roofs[row["roof"]])
            row["roof_share"] = row["floor"] / row["median"]
    eager, gemms = rows[base], rows.get("GEMMs alone", {})
    for row in timed:
        if "median" in gemms and row["flops"]:
            row["gemm_share"] = gemms["median"] * row["flops"] / eager["flops"] / row["median"]
        if row is not eager and "median" in eager:
            row["time_ratio"] = row["median"] / eager["median"]
            spread = max(row["p80"] - row["p20"], eager["p80"] - eager["p20"])
            row["within_spread"] = abs(row["median"] - eager["median"]) < spread
        if row is not eager and "extra_bytes" in row and eager.get("extra_bytes", 0) >= MIN_EXTRA_BYTES:
            row["extra_ratio"] = row["extra_bytes"] / eager["extra_bytes"]
            row["peak_ratio"] = row["peak_bytes"] / eager["peak_bytes"]


def why_left_out(rival, device, brief):
    if rival.device and rival.device != device:
        return "absent", f"needs a {rival.device} device"
    if rival.compiles and brief:
        return "skipped", "compiles for longer than the others run"
    return None


def cold_copies(inputs, device):
    """The inputs as often as it takes to push each other out of a GPU's cache; on a CPU once."""
    if device == "cpu":
        return [inputs]
    cache_bytes = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    num_copies = min(256, -(-cache_bytes // sum(x.nbytes for x in inputs.values())))
    clone = lambda x: x.detach().clone().requires_grad_(x.requires_grad)
    return [inputs] + [{name: clone(x) for name, x in inputs.items()} for _ in range(num_copies - 1)]


def chosen(bench, only):
    """The rivals whose name begins with one of `only`, and eager; all when it is empty."""
    return {name: r for name, r in bench.rivals.items() if not only or name.startswith(("eager", *only))}


def run_case(
    rows, bench, size, dtype, device, *, rounds, clock, roofs, peak=None, brief=False, only=(), tick=lambda what: None
):
    """Puts a row (dict) for each rival into `rows`. dtype a key of DTYPES; clock(calls) -> seconds of each; roofs in
    flops and bytes a second; peak(rival name, inputs, run) -> peak_bytes and extra_bytes, or None not to measure;
    brief: without what compiles; only: see chosen. Memory comes before the check: on a CPU it is measured in another
    process, which may run out of it without harm."""
    inputs = bench.inputs(size, DTYPES[dtype], device)
    copies = cold_copies(inputs, device)
    calls, truths = {}, {}
    for name, rival in chosen(bench, only).items():
        work = bench.work(size, DTYPES[dtype].itemsize, rival.task) if rival.task else Work(None, None)
        row = rows[name] = new_row(name, rival.note, work)
        if left_out := why_left_out(rival, device, brief):
            row["status"], row["why"] = left_out
            continue
        with outcome(row):
            calls[name] = [rival.build(copy) for copy in copies]
            if peak and rival.task:
                tick(f"memory {name}")
                row.update(peak(name, inputs, calls[name][0]))
            tick(f"check {name}")
            outputs = calls[name][0]()
            if rival.task:
                if rival.task not in truths:
                    truths[rival.task] = bench.truth(inputs, rival.task)
                row["errors"] = output_errors(outputs, truths[rival.task])
                refuse_wrong(row["errors"], LIMITS[DTYPES[dtype]])
            del outputs
    truths.clear()
    take_turns(calls, rows, rounds, clock, tick)
    summarize(rows, roofs)


def num_ticks(bench, rounds, only):
    """An upper bound on how often run_case ticks."""
    return len(chosen(bench, only)) * (rounds + 2)
