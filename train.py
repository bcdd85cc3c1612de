"""One loop for every algorithm: prompt -> rollout -> reward -> advantage -> loss -> update.

    torchrun [--nproc_per_node=N] train.py --algo sft|grpo|dr_grpo|dapo [--config FILE ...] [--key value ...]
"""

import contextlib
import copy
import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine import checkpoint, dist, model
from engine.algos import ALGOS
from engine.batch import empty_batch
from engine.config import Config, check_batch, load_config, save_config
from engine.data import TASKS
from engine.data.stream import Stream
from engine.dist import World
from engine.errors import UserError
from engine.evaluate import evaluate, make_rollout
from engine.experience import Explorer, Prompts, Traces, load_items
from engine.learner import Learner
from engine.log import Log, plot_curves
from engine.plan import describe, out_of_memory_advice
from engine.replica import make_replica, refresh
from engine.rewards import load_rewards


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""

    step: int = 0
    updates: int = 0
    skipped: int = 0
    tokens: int = 0
    wall_seconds: float = 0.0
    best: float = -1.0
    before: dict = field(default_factory=dict)  # held-out accuracies at step 0


def main() -> int:
    config = load_config(sys.argv[1:])
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_batch(config, world_size)
    if config.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            print(describe(config, world_size))
        return 0
    world = dist.start(config.device, config.grace_seconds)
    torch.set_num_threads(config.threads or max((os.cpu_count() or 1) // world.world_size, 1))
    start = starting_weights(config, world)
    return train(config, world, start) if start else 0


def starting_weights(config: Config, world: World) -> str | None:
    """The model to start from; the embedded one has its SFT checkpoint made first. None: stopped by a signal."""
    if config.model != "tiny" or config.algo == "sft":
        return config.model
    settings = {"algo": "sft", "seed": config.seed, "out": config.out, "device": config.device, "kernels": config.kernels}
    first = load_config([f"--{key}={value}" for key, value in settings.items()])
    first = dataclasses.replace(first, name=f"sft-tiny-seed{config.seed}", eval_size=0, resume="auto", threads=config.threads)
    export = first.run_dir / "export"
    if not (export / "config.json").exists():
        if world.rank == 0:
            print(f"There is no SFT checkpoint in {export}: making it first (--algo sft).", flush=True)
        train(first, world, "tiny")
    return str(export) if (export / "config.json").exists() else None


def train(config: Config, world: World, start: str) -> int:
    """Trains from the weights `start`; 0 when done, or when stopped at a step boundary by a signal."""
    algo = ALGOS[config.algo]
    items = load_items(config, "train")
    rewards = load_rewards(config.rewards or TASKS[config.task].rewards)
    held_out = load_items(config, "test") if config.eval_size else []
    tokenizer = model.load_tokenizer(start)
    folder, found = run_folder(config, world)

    lm = model.load_model(start, config.seed, model.compute_dtype(world.device))
    room, longest = lm.config.max_position_embeddings, config.max_prompt_tokens + config.max_new_tokens
    if longest > room:
        raise UserError(f"max_prompt_tokens + max_new_tokens is {longest}, but the model has {room} positions; lower them.")
    replica = make_replica(lm, world.device)
    reference = None
    if algo.advantage and config.beta > 0:
        reference = model.shard(model.Policy(copy.deepcopy(lm)), config, world.mesh, frozen=True)
    policy = model.shard(model.Policy(lm), config, world.mesh)
    optimizer = model.make_optimizer(policy, config)
    stream = Stream(len(items), config.seed, *((world.rank, world.world_size) if algo.advantage else (0, 1)))
    fingerprint = {"algo": config.algo, "task": config.task, "seed": config.seed, "shapes": model.shapes(policy)}
    progress = Progress()
    if found:
        tensors, meta = checkpoint.load(found, world, fingerprint)
        checkpoint.restore_training_tensors(policy, optimizer, tensors)
        checkpoint.restore_rng(tensors)
        stream.cursor = int(tensors["cursor"])
        progress = Progress(**meta["progress"])
        refresh(replica, policy)

    log = Log(config, folder, progress.step, world.rank == 0)
    kernels = config.kernels if config.kernels != "auto" else "fused" if world.device.type == "cuda" else "chunked"
    log.say(f"{'Resuming' if found else 'Running'} {folder}: {world.world_size} x {world.device.type}, {kernels} kernels")
    if world.rank == 0:
        save_config(config, folder / "config.yaml")
    rollout = make_rollout(replica, tokenizer, config)
    prompts = Prompts(items, tokenizer, config, stream)
    make = Traces(config, prompts, log, world)
    if algo.advantage:
        make = Explorer(config, algo, prompts, rollout, rewards, log, world)
    learner = Learner(
        config, algo, policy, reference, optimizer, importlib.import_module(f"kernels.{kernels}"), log, world, folder,
        progress.updates, progress.skipped,
    )  # fmt: skip

    def assess() -> dict[str, float]:
        """Held-out accuracies, greedy and sampled."""
        accuracy = {}
        for mode, samples in (("greedy", 0), ("sampled", 1)) if held_out else ():
            with log.span("evaluate", progress.step), guard_memory(config, "rollout"):
                row = evaluate(rollout, tokenizer, held_out, load_rewards(["answer"]), config, world, samples=samples)
            log.write({"step": progress.step, "eval": mode, **row})
            accuracy[mode] = row["accuracy"]
        return accuracy

    def save(best: bool) -> None:
        tensors = checkpoint.training_tensors(policy, optimizer) | checkpoint.rng_tensors()
        tensors["cursor"] = torch.tensor([stream.cursor])
        meta = {"fingerprint": fingerprint, "progress": dataclasses.asdict(progress)}
        checkpoint.save(folder / "checkpoints", progress.step, tensors, meta, world, keep=config.keep, best=best)

    accuracy = progress.before = progress.before or assess()
    wall_before, stopped = progress.wall_seconds, False
    while progress.step < config.steps and not stopped:
        step = progress.step
        log.profile(step)
        with guard_memory(config, "rollout"):
            batch = make(step)
        with guard_memory(config, "update"):
            learner.learn(batch if batch is not None else empty_batch(0), step)
            with log.span("weight_sync", step):
                refresh(replica, policy)
        row = log.end_step(step, lr=optimizer.param_groups[0]["lr"])
        progress.step, progress.updates, progress.skipped = step + 1, learner.updates, learner.skipped
        progress.tokens += int(row.get("generated_tokens", row.get("tokens", 0)))
        progress.wall_seconds = wall_before + log.elapsed()
        best = False
        if config.eval_every and progress.step % config.eval_every == 0 and progress.step < config.steps:
            accuracy = assess()
            best = accuracy["sampled"] > progress.best
            progress.best = max(progress.best, accuracy["sampled"])
        stopped = dist.all_sum([float(dist.stop_requested())])[0] > 0
        due = config.save_every and progress.step % config.save_every == 0
        if best or due or stopped or progress.step == config.steps:
            save(best)
    log.profile(progress.step)
    if not stopped:
        accuracy = assess()
        model.export_model(policy, replica, tokenizer, folder / "export", world.rank == 0)
        if world.rank == 0:
            summary = summarize(config, progress, accuracy, world)
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            plot_curves(folder)
    log.say(closing_line(folder, progress, accuracy, stopped))
    log.close()
    return 0


def run_folder(config: Config, world: World) -> tuple[Path, Path | None]:
    """(folder of this run, checkpoint to resume from or None). An earlier run is never written over: a default name
    gets a number, and `--resume auto` goes on with the highest."""
    base = config.run_dir
    names = [base] if config.name else [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 1000))]
    taken = list(itertools.takewhile(lambda folder: (folder / "metrics.jsonl").exists(), names))
    dist.barrier()  # every rank has looked before one of them writes
    if not config.resume:
        if len(taken) == len(names):
            raise UserError(f"{base} already holds a run: choose another --name, or go on with --resume auto.")
        return names[len(taken)], None
    folder = taken[-1] if taken else base
    found = checkpoint.find(folder / "checkpoints" if config.resume == "auto" else config.resume)
    if found is None and config.resume != "auto":
        raise UserError(f"There is no checkpoint in {config.resume}: pass a step_... folder, or --resume auto.")
    return folder, found


@contextlib.contextmanager
def guard_memory(config: Config, phase: str):
    """Turns running out of memory into the setting to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(out_of_memory_advice(config, phase)) from error


def summarize(config: Config, progress: Progress, accuracy: dict[str, float], world: World) -> dict:
    """What summary.json holds."""
    packages = ("torch", "triton", "transformers", "datasets")
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "algo": config.algo,
        "accuracy_before": progress.before.get("greedy"),
        "accuracy_after": accuracy.get("greedy"),
        "accuracy_before_sampled": progress.before.get("sampled"),
        "accuracy_after_sampled": accuracy.get("sampled"),
        "eval_problems": config.eval_size,
        "steps": progress.step,
        "tokens": progress.tokens,
        "wall_seconds": round(progress.wall_seconds, 1),
        "seed": config.seed,
        "world_size": world.world_size,
        "device": device,
        "versions": versions,
    }


def closing_line(folder: Path, progress: Progress, accuracy: dict[str, float], stopped: bool) -> str:
    if stopped:
        return f"Stopped by a signal after step {progress.step} and saved; go on with --resume auto."
    gains = [f"{mode} accuracy {progress.before[mode]:.1%} -> {accuracy[mode]:.1%}" for mode in accuracy]
    return f"Done: {', '.join(gains) or f'{progress.step} steps'} in {progress.wall_seconds:.0f} s; see {folder}/curves.png"


if __name__ == "__main__":
    dist.run(main)
