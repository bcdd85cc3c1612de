"""Record: what a run says and writes down of itself: its settings, its data, its result."""

import dataclasses
import datetime
from pathlib import Path

import torch

from engine import dist, provenance
from engine.config import Config, read_yaml
from engine.data import TASKS, count_shared
from engine.inputs import Inputs
from engine.log import trace_file
from engine.rewards import correctness_reward


def pick_date(config: Config, folder: Path, resuming: bool) -> str:
    """The day that the run's prompts speak of: as set, or as it was, or today. Collective."""
    saved = folder / "config.yaml"
    before = read_yaml(saved).get("date") if resuming and saved.exists() else None
    return dist.gather(config.date or str(before or datetime.date.today()))[0]


def describe_data(config: Config, inputs: Inputs) -> list[str]:
    """What a reader of the accuracies should know: which problems they are of, and what is right."""
    lines = []
    for name, split in (("Training", inputs.items), ("Held-out", inputs.held_out)):
        if files := getattr(split, "origin", {}).get("files"):
            lines.append(f"{name} data: {', '.join(files)} in {split.origin['path']}")
    for name in {name for name, _, _ in correctness_reward(inputs.rewards)} - {"answer"}:
        lines.append(f"Right is an answer that the reward {name!r} gives more than 0.5.")
    if config.eval_size and not inputs.held_out:
        lines.append(
            "No accuracy is measured: name held-out problems (or a folder that has a test split) as --test_data."
        )
    elif not TASKS[config.task].generated and (shared := count_shared(inputs.items, inputs.held_out)):
        lines.append(f"{shared} of the {len(inputs.held_out)} held-out problems stand in the training data too.")
    if config.taught:
        examples = f"{config.shots} solved examples" + ", their answers exchanged" * ("shuffled" in config.context)
        seen = "as the student" if config.context == "zeroshot" else f"behind {examples}"
        lines.append(f"Teacher: {config.teacher or 'the student at the start'}, asked {seen}")
    return lines


def describe_changes(config: Config, saved: Path) -> str:
    """The settings that are not what a run's config.yaml says; empty where all are."""
    if not saved.exists():
        return ""
    old, new = read_yaml(saved), dataclasses.asdict(config)
    changed = {k: (v, new[k]) for k, v in old.items() if k in new and v != new[k]}
    return ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items())


def describe_adapters(policy) -> str:
    """How much of a model adapters train."""
    counts = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    trained, whole = sum(n for n, learns in counts if learns), sum(n for n, _ in counts)
    return f"Adapters: {trained:,} parameters are trained, {whole - trained:,} are frozen"


def describe_gains(progress) -> str:
    """The held-out accuracies, beside those at the start, and of which problems where these were others."""
    before, after = progress.before, progress.after
    number, number_before = progress.exam.get("problems"), progress.exam_before.get("problems")
    if progress.exam_before in ({}, progress.exam):  # {}: of a checkpoint that does not say
        shown = {mode: f"{before[mode]:.1%} -> {after[mode]:.1%}" for mode in after if mode in before}
    else:
        others = {mode: f"{share:.1%} of {number_before} other problems" for mode, share in before.items()}
        shown = {m: f"{after[m]:.1%} of {number} problems (at the start {others.get(m, 'not taken')})" for m in after}
    return ", ".join(f"{mode} accuracy {words}" for mode, words in shown.items())


def describe_recording(config: Config, step: int) -> str:
    """What of its window a run that ends before `step` has recorded."""
    (first, end), kept = config.window, "A recording keeps no checkpoint and no export."
    if step <= first:
        return f"Stopped by a signal before the end of step {first}: no step was recorded whole. {kept}"
    steps = f"steps {first} to {step - 1}" if step - 1 > first else f"step {first}"
    where = (
        f"in {trace_file(config.profile_trace)}" if config.profile_trace else "for the profiler that runs this program"
    )
    return f"Recorded {steps} {where}{', then stopped by a signal' if step < end else ''}. {kept}"


def summarize(config: Config, world: dist.World, progress) -> dict:
    """What summary.json holds."""
    before, after, device = progress.before, progress.after, world.device
    return {
        "algo": config.title,
        "accuracy_before": before.get("greedy"),
        "accuracy_after": after.get("greedy"),
        "accuracy_before_sampled": before.get("sampled"),
        "accuracy_after_sampled": after.get("sampled"),
        "accuracy_before_pairs": before.get("pairs"),
        "accuracy_after_pairs": after.get("pairs"),
        "eval_problems": progress.exam.get("problems", 0),
        "eval_problems_before": progress.exam_before.get("problems", 0),
        "steps": progress.step,
        "empty_steps": progress.empty,
        "tokens": progress.tokens,
        "wall_seconds": round(progress.wall_seconds, 1),
        "seed": config.seed,
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        **provenance.describe(),
    }
