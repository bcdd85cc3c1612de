"""What is seen of a run: its metrics in every place they go to, the bar, recordings and pictures."""

import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from engine import dist
from engine.config import Config, write_whole
from engine.metrics import NVTX, DeviceStats, Tally, metric_of, reduce

BAR = {
    "reward": "reward", "accuracy": "acc", "kl": "kl", "entropy": "H", "clipped_low": "clip-", "clipped_high": "clip+",
    "length": "len", "margin": "margin", "preferred": "pref", "nll": "nll", "teacher_gap": "gap",
    "tokens_per_second": "tok/s", "seconds/rollout": "roll s", "seconds/update": "upd s",
}  # fmt: skip


class Log(Tally):
    """One run's folder: metrics.jsonl, samples.jsonl, TensorBoard, the progress bar. The main thread's tally.

    `seconds` are those of the launches before this."""

    def __init__(self, config: Config, folder: Path, first_step: int, is_writer: bool, seconds: float = 0.0):
        super().__init__()
        self.device_stats = DeviceStats()
        self.folder, self.is_writer, self.sinks = folder, is_writer, []
        self.window, self.profiling, self.trace_path, self.trace = config.window, False, config.profile_trace, None
        self.step_started = time.perf_counter()
        self.started = self.step_started - seconds
        self.bar, self.phases, self.shown = None, {}, 0.0
        self.latest: list[dict] = []  # samples
        if is_writer:
            if not NVTX:
                self.say("The package nvtx is not installed: nsys and ncu will not see the phases of a step.")
            folder.mkdir(parents=True, exist_ok=True)
            keep_rows(folder / "metrics.jsonl", first_step)
            keep_rows(folder / "samples.jsonl", first_step)
            self.sinks = make_sinks(config, folder, first_step)
            self.bar = tqdm(
                total=config.steps,
                initial=first_step,
                desc=folder.name,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 10,
            )

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
        self.add(tally.sums)
        self.top(**tally.tops)
        for verb, seconds in tally.seconds.items():
            self.seconds[verb] = self.seconds.get(verb, 0.0) + seconds
        if self.is_writer and tally.samples:
            self.latest = tally.samples
            for row in tally.samples:
                append_line(self.folder / "samples.jsonl", {"step": step, **row})
            for sink in self.sinks:
                sink.show(step, tally.samples)

    def begin_step(self, step: int) -> None:
        """Starts the step's clock, which evaluations and checkpoints between steps do not count in."""
        self.profile(step)
        self.phases.clear()
        self.step_started = time.perf_counter()

    def forget(self) -> None:
        """Drops what was gathered since the last step."""
        self.sums, self.tops, self.seconds, self.device_stats = {}, {}, {}, DeviceStats()

    def end_step(self, step: int, **extra: float) -> dict[str, float]:
        """Reduces the step over ranks, writes it everywhere and returns it. Collective."""
        self.device_stats.read(self)
        self.top(**peak_memory())
        row = {"step": step, **extra, **reduce(self.sums, self.tops)}
        seconds = time.perf_counter() - self.step_started
        row |= {f"seconds/{verb}": s for verb, s in self.seconds.items()}
        row |= {"seconds/step": seconds, "wall_seconds": self.elapsed()}
        row["tokens_per_second"] = (row.get("generated_tokens") or row.get("tokens", 0.0)) / seconds
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
            sink.write(row)
        if "eval" not in row:
            self.bar.set_description(self.folder.name, refresh=False)
            self.bar.set_postfix({name: f"{row[k]:.3g}" for k, name in BAR.items() if k in row}, refresh=False)
            self.bar.update(1)

    def show(self, phase: str, done: int, of: int) -> None:
        """In the bar: what of the step is under way, and how far. From any thread."""
        if self.bar is None:
            return
        if done < of:
            self.phases[phase] = f"{phase} {done}/{of}"
        else:
            self.phases.pop(phase, None)
        due = time.perf_counter() - self.shown >= self.bar.mininterval
        self.shown = time.perf_counter() if due else self.shown
        self.bar.set_description(" | ".join([self.folder.name, *self.phases.copy().values()]), refresh=due)

    def say(self, text: str) -> None:
        """One line on rank 0's terminal, above the bar."""
        if self.is_writer:
            tqdm.write(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for sink in self.sinks:
            sink.close()


def trace_file(path: str) -> Path:
    """The file of `profile_trace` for this rank: of several with its number before .json."""
    rank = f".rank{torch.distributed.get_rank()}" if dist.world_size() > 1 else ""
    stem, dot, suffix = os.path.expanduser(path).rpartition(".json")
    return Path(stem + rank + dot + suffix)


class Trace:
    """A torch.profiler recording of every thread, begun at once and written to `path` (one file per rank)."""

    def __init__(self, path: str):
        self.path, self.step = trace_file(path), None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.recorder = profile(activities=kinds, experimental_config=_ExperimentalConfig(profile_all_threads=True))
        self.recorder.start()
        Tally.tracing = True

    def mark(self, step: int | None) -> None:
        """Begins the range of a step, for torch keeps no payload of the others; None: ends the last one."""
        if self.step:
            self.step.__exit__(None, None, None)
        self.step = None if step is None else record_function(f"ProfilerStep#{step}")
        if self.step:
            self.step.__enter__()

    def close(self) -> None:
        self.mark(None)
        Tally.tracing = False
        if torch.cuda.is_available():
            self.recorder.add_metadata_json("peak_memory_bytes", str(torch.cuda.max_memory_allocated()))
        self.recorder.stop()
        self.recorder.export_chrome_trace(str(self.path))


def peak_memory() -> dict[str, float]:
    """GiB at their highest so far: of this process, and of its device."""
    peaks = {"peak_host_gib": peak_resident() / 2**30}
    return peaks | (
        {"peak_device_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_initialized() else {}
    )


def peak_resident() -> int:
    """Bytes that this process had in memory at most; getrusage would tell those of who started it."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


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
    write_whole(path, "".join(json.dumps(r) + "\n" for r in rows))


class TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step, flush_secs=10)
        self.close = self.writer.close

    def write(self, row: dict) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def show(self, step: int, samples: list[dict]) -> None:
        self.writer.add_text("samples", table_of(samples), step)


class WeightsAndBiases:
    def __init__(self, config: Config, folder: Path):
        import wandb

        run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.table = wandb.Table
        self.run = wandb.init(
            project="rl", name=folder.name, dir=str(folder), mode=config.wandb, id=run_id, resume="allow"
        )
        self.close = self.run.finish

    def write(self, row: dict) -> None:
        self.run.log(numbers(row), step=row["step"])

    def show(self, step: int, samples: list[dict]) -> None:
        cells = [[str(value) for value in sample.values()] for sample in samples]
        self.run.log({"samples": self.table(columns=[*samples[0]], data=cells)}, step=step)


def make_sinks(config: Config, folder: Path, first_step: int) -> list:
    sinks = [TensorBoard(folder, first_step)] if config.tensorboard else []
    return sinks + ([WeightsAndBiases(config, folder)] if config.wandb != "off" else [])


def table_of(samples: list[dict], width: int = 0) -> str:
    """Markdown; cells cut to `width` letters, if it is not 0."""
    cell = lambda x: f"{x:.3g}" if isinstance(x, float) else " ".join(str(x).replace("|", "\\|").split())  # noqa: E731
    cut = lambda text: text if not width or len(text) <= width else text[: width - 3] + "..."  # noqa: E731
    rows = [[*samples[0]], ["---"] * len(samples[0]), *([cut(cell(x)) for x in s.values()] for s in samples)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def numbers(row: dict) -> dict[str, float]:
    """Its numbers as TensorBoard groups them."""
    if "eval" in row:
        return {f"eval_{row['eval']}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
    return {_tag(k): v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def _tag(name: str) -> str:
    return name if "/" in name else f"{metric_of(name).group}/{name}"


def plot_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: what was learned, what it cost."""
    from matplotlib.figure import Figure  # without pyplot, which takes as long to import as all else here

    rows = read_rows(folder / "metrics.jsonl")
    train, evals = [r for r in rows if "eval" not in r], [r for r in rows if "eval" in r]
    panels = [
        ("accuracy", "reward"),
        ("kl", "approx_kl"),
        ("entropy", "nll", "teacher_gap"),
        ("preferred", "margin"),
        ("length",),
        ("grad_norm",),
        ("clipped_low", "clipped_high"),
    ]
    panels = [[k for k in keys if any(r.get(k) for r in train)] for keys in panels]
    panels = [keys for i, keys in enumerate(panels) if keys or evals and i == 0]
    figure = Figure(figsize=(4.2 * ((len(panels) + 1) // 2), 6))
    axes = figure.subplots(2, (len(panels) + 1) // 2, squeeze=False)
    for axis, keys in zip(axes.flat, panels, strict=False):
        for key in keys:
            points = [(r["step"], r[key]) for r in train if key in r]
            axis.plot(*zip(*points, strict=True), lw=1, alpha=0.7, label=key)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    for mode, mark in (("sampled", "o-"), ("greedy", "s--"), ("pairs", "^:")):
        points = [(r["step"], r["accuracy"]) for r in evals if r["eval"] == mode]
        if points:
            axes.flat[0].plot(*zip(*points, strict=True), mark, label=f"held-out, {mode}")
    for axis in axes.flat:
        axis.legend(fontsize=8) if axis.has_data() else axis.set_axis_off()
    figure.suptitle(folder.name)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
