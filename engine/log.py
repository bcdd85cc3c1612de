"""Metrics, progress, NVTX spans and the pictures of a run.

Metrics are kept as sums with their counts; only here are they divided, after one all-reduce per step.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from engine import dist
from engine.config import Config, parse_window

# metric: (sum, count); it appears when the sum was added to and the count is above 0
RATIOS = {
    "reward": ("reward_sum", "sequences"),
    "accuracy": ("correct", "sequences"),
    "length": ("length_sum", "sequences"),
    "at_limit": ("at_limit_count", "sequences"),
    "accepted": ("groups_kept", "groups_drawn"),
    "kl": ("kl", "tokens"),
    "approx_kl": ("kl_old", "tokens"),
    "entropy": ("entropy", "tokens"),
    "ratio": ("ratio", "tokens"),
    "clip_low": ("clip_low", "tokens"),
    "clip_high": ("clip_high", "tokens"),
    "mismatch": ("mismatch", "mismatch_tokens"),
    "cap_hits": ("cap_hits", "mismatch_tokens"),
    "staleness": ("staleness_sum", "batch_sequences"),
    "nll": ("nll", "tokens"),
    "loss": ("loss", "updates"),
    "grad_norm": ("grad_norm", "updates"),
    "removed": ("removed_sequences", "batch_sequences"),
}
COUNTS = (
    "generated_tokens",
    "tokens",
    "prompts_dropped",
    "reward_errors",
    "reward_timeouts",
    "empty_updates",
    "skipped_steps",
    "bad_ids",
)
TOPS = ("ratio_max", "nll_max")
BAR = {
    "reward": "reward", "accuracy": "acc", "kl": "kl", "entropy": "H", "clip_low": "clip-", "clip_high": "clip+",
    "length": "len", "nll": "nll", "tokens_per_second": "tok/s", "seconds/rollout": "roll s", "seconds/update": "upd s",
}  # fmt: skip
DOMAIN = importlib.import_module("nvtx").get_domain("train") if importlib.util.find_spec("nvtx") else None
UNTRACED = contextlib.nullcontext()


class Tally:
    """Sums, seconds and samples of one part of a step, kept apart from what runs beside it; `Log.merge` takes it in."""

    def __init__(self, num_samples: int = 0):
        self.sums: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.samples: list[dict] = []
        self.num_samples = num_samples

    def add(self, **values: float) -> None:
        """Adds host numbers to the sums."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)

    def sample(self, **row) -> None:
        """Keeps a completion for samples.jsonl: the first `num_samples`."""
        if len(self.samples) < self.num_samples:
            self.samples.append(row)

    @contextlib.contextmanager
    def span(self, verb: str, step: int):
        """Times a phase and shows it to the profiler as an NVTX range with the step as payload."""
        if DOMAIN:
            DOMAIN.push_range(DOMAIN.get_event_attributes(verb, payload=step))
        start = time.perf_counter()
        try:
            with record_function(f"train/{verb}") if Trace.running else UNTRACED:
                yield
        finally:
            self.seconds[verb] = self.seconds.get(verb, 0.0) + time.perf_counter() - start
            if DOMAIN:
                DOMAIN.pop_range()


class Log(Tally):
    """One run's folder: metrics.jsonl, samples.jsonl, TensorBoard, the progress bar. The main thread's tally."""

    def __init__(self, config: Config, folder: Path, first_step: int, is_writer: bool):
        super().__init__()
        self.tops: dict[str, float] = {}
        self.device_sums: dict[tuple[str, ...], torch.Tensor] = {}
        self.folder, self.is_writer, self.sinks = folder, is_writer, []
        first, end = parse_window(config.profile_steps) if config.profile_steps else (0, 0)
        self.window = first, min(end, config.steps)
        self.profiling, self.trace_path, self.trace = False, config.profile_trace, None
        self.started = self.step_started = time.perf_counter()
        self.bar = None
        self.absent = () if config.beta else ("kl",)  # the kernels report 0 without a reference
        if is_writer:
            if not DOMAIN:
                self.say("The package nvtx is not installed: nsys and ncu will not see the phases of a step.")
            folder.mkdir(parents=True, exist_ok=True)
            keep_rows(folder / "metrics.jsonl", first_step)
            keep_rows(folder / "samples.jsonl", first_step)
            self.sinks = make_sinks(config, folder, first_step)
            self.bar = tqdm(
                total=config.steps,
                initial=first_step,
                desc=config.algo,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 10,
            )

    def add_stats(self, names: tuple[str, ...], stats: torch.Tensor) -> None:
        """Adds a device tensor of sums, the last entry a max; does not wait for the device."""
        held = self.device_sums.get(names)
        if held is not None:
            stats = torch.cat([held[:-1] + stats[:-1], torch.maximum(held[-1:], stats[-1:])])
        self.device_sums[names] = stats

    def profile(self, step: int) -> None:
        """Opens and closes the window `profile_steps` at its boundaries: the CUDA profiler's, or `profile_trace`."""
        first, end = self.window
        inside = first <= step < end
        if self.profiling != inside and self.trace_path:
            self.trace = Trace(self.trace_path) if inside else self.trace.close()
        elif self.profiling != inside and torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.profiler.start() if inside else torch.cuda.profiler.stop()
        self.profiling = inside
        if self.trace:
            self.trace.mark(step)

    def merge(self, step: int, tally: Tally) -> None:
        """Takes in what was counted elsewhere for this step."""
        self.add(**tally.sums)
        for verb, seconds in tally.seconds.items():
            self.seconds[verb] = self.seconds.get(verb, 0.0) + seconds
        for row in tally.samples if self.is_writer else ():
            append_line(self.folder / "samples.jsonl", {"step": step, **row})

    def begin_step(self, step: int) -> None:
        """Starts the step's clock, which evaluations and checkpoints between steps do not count in."""
        self.profile(step)
        self.step_started = time.perf_counter()

    def forget(self) -> None:
        """Drops what was gathered since the last step."""
        self.sums, self.tops, self.device_sums, self.seconds = {}, {}, {}, {}

    def end_step(self, step: int, **extra: float) -> dict[str, float]:
        """Reduces the step over ranks, writes it everywhere and returns it. Collective."""
        for names, stats in self.device_sums.items():
            *sums, top = stats.tolist()
            self.add(**dict(zip(names, sums, strict=False)))
            self.tops[names[-1]] = top
        keys = sorted({k for pair in RATIOS.values() for k in pair} | {*COUNTS, "importance", "importance_squares"})
        values = dist.all_sum([self.sums.get(k, 0.0) for k in keys] + [float(k in self.sums) for k in keys])
        totals, seen = (dict(zip(keys, part, strict=True)) for part in (values[: len(keys)], values[len(keys) :]))
        tops = dict(zip(TOPS, dist.all_max([self.tops.get(k, -math.inf) for k in TOPS]), strict=True))
        if totals["bad_ids"]:
            raise RuntimeError(
                f"{totals['bad_ids']:.0f} token ids lie outside the vocabulary: model and tokenizer differ."
            )
        row = {"step": step, **extra}
        row |= {
            m: totals[s] / totals[n] for m, (s, n) in RATIOS.items() if totals[n] and seen[s] and m not in self.absent
        }
        row |= {k: totals[k] for k in COUNTS if totals[k]}
        row |= {k: top for k, top in tops.items() if top > -math.inf}
        if totals["importance_squares"]:  # (sum w)^2 / (n sum w^2): 1 when the sampler is the policy
            squared = totals["importance"] ** 2 / totals["importance_squares"]
            row["effective_samples"] = squared / totals["mismatch_tokens"]
        seconds = time.perf_counter() - self.step_started
        row |= {f"seconds/{verb}": s for verb, s in self.seconds.items()}
        row |= {"seconds/step": seconds, "wall_seconds": self.elapsed()}
        row["tokens_per_second"] = (totals["generated_tokens"] or totals["tokens"]) / seconds
        self.write(row)
        self.forget()
        return row

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def write(self, row: dict) -> None:
        if not self.is_writer:
            return
        append_line(self.folder / "metrics.jsonl", row)
        for sink in self.sinks:
            sink(row)
        if "eval" not in row:
            self.bar.set_postfix({name: f"{row[k]:.3g}" for k, name in BAR.items() if k in row}, refresh=False)
            self.bar.update(1)

    def say(self, text: str) -> None:
        """One line on rank 0's terminal, above the bar."""
        if self.is_writer:
            tqdm.write(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for sink in self.sinks:
            sink(None)


class Trace:
    """A torch.profiler recording of every thread, begun at once and written to `path` (one file per rank)."""

    running = False

    def __init__(self, path: str):
        rank = f".rank{torch.distributed.get_rank()}" if dist.world_size() > 1 else ""
        stem, dot, suffix = path.rpartition(".json")
        self.path, self.step = Path(stem + rank + dot + suffix), None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.recorder = profile(activities=kinds, experimental_config=_ExperimentalConfig(profile_all_threads=True))
        self.recorder.start()
        Trace.running = True

    def mark(self, step: int | None) -> None:
        """Begins the range of a step, for torch keeps no payload of the others; None: ends the last one."""
        if self.step:
            self.step.__exit__(None, None, None)
        self.step = None if step is None else record_function(f"ProfilerStep#{step}")
        if self.step:
            self.step.__enter__()

    def close(self) -> None:
        self.mark(None)
        Trace.running = False
        if torch.cuda.is_available():
            self.recorder.add_metadata_json("peak_memory_bytes", str(torch.cuda.max_memory_allocated()))
        self.recorder.stop()
        self.recorder.export_chrome_trace(str(self.path))


def append_line(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def keep_rows(path: Path, first_step: int) -> None:
    """Drops the rows that a run resumed at `first_step` is going to write again; evaluations precede a save."""
    rows = [r for r in read_rows(path) if r["step"] < first_step or r["step"] == first_step > 0 and "eval" in r]
    aside = path.with_suffix(".aside")
    aside.write_text("".join(json.dumps(r) + "\n" for r in rows))
    os.replace(aside, path)


def make_sinks(config: Config, folder: Path, first_step: int) -> list:
    """TensorBoard and wandb writers, as functions of a row; None closes them."""
    sinks = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step, flush_secs=10)
        sinks.append(
            lambda row: (
                [writer.add_scalar(k, v, row["step"]) for k, v in numbers(row).items()] if row else writer.close()
            )
        )
    if config.wandb != "off":
        import wandb

        run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]

        run = wandb.init(project="rl", name=folder.name, dir=str(folder), mode=config.wandb, id=run_id, resume="allow")
        sinks.append(lambda row: run.log(numbers(row), step=row["step"]) if row else run.finish())
    return sinks


def numbers(row: dict) -> dict[str, float]:
    prefix = f"eval_{row['eval']}/" if "eval" in row else ""
    return {prefix + k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def plot_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: what was learned, what it cost."""
    from matplotlib.figure import Figure  # without pyplot, which takes as long to import as all else here

    rows = read_rows(folder / "metrics.jsonl")
    train, evals = [r for r in rows if "eval" not in r], [r for r in rows if "eval" in r]
    panels = [
        ("accuracy", "reward"),
        ("kl", "approx_kl"),
        ("entropy", "nll"),
        ("length",),
        ("grad_norm",),
        ("clip_low", "clip_high"),
    ]
    panels = [[k for k in keys if any(r.get(k) for r in train)] for keys in panels]
    panels = [keys for keys in panels if keys or evals and not panels.index(keys)]
    figure = Figure(figsize=(4.2 * ((len(panels) + 1) // 2), 6))
    axes = figure.subplots(2, (len(panels) + 1) // 2, squeeze=False)
    for axis, keys in zip(axes.flat, panels, strict=False):
        for key in keys:
            points = [(r["step"], r[key]) for r in train if key in r]
            axis.plot(*zip(*points, strict=True), lw=1, alpha=0.7, label=key)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    for mode, mark in (("sampled", "o-"), ("greedy", "s--")):
        points = [(r["step"], r["accuracy"]) for r in evals if r["eval"] == mode]
        if points:
            axes.flat[0].plot(*zip(*points, strict=True), mark, label=f"held-out, {mode}")
    for axis in axes.flat:
        axis.legend(fontsize=8) if axis.has_data() else axis.set_axis_off()
    figure.suptitle(folder.name)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
