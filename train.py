"""One loop for every algorithm: prompt -> rollout -> reward -> advantage -> loss -> update.

torchrun [--nproc_per_node=N] train.py --algo sft|grpo|dr_grpo|dapo [--config FILE ...] [--key value ...]
"""

import contextlib
import dataclasses
import sys

from engine import dist
from engine.config import Config, check_batch, load_config
from engine.dist import World
from engine.plan import describe
from engine.run import Run, guard_memory, load_inputs


def main() -> int:
    config = load_config(sys.argv[1:])
    rank, world_size = dist.launch()
    check_batch(config, world_size)
    if config.dry_run:
        if rank == 0:
            print(describe(config, world_size))
        return 0
    world = dist.start(config.device, config.grace_seconds)
    dist.take_cores(config.threads, 1 + config.lag)
    if config.model == "tiny" and config.algo != "sft" and not config.init_from:
        load_inputs(config)  # complains before anything is trained
        config = start_from_sft(config, world)
    if config is not None:
        train(config, world)
    return 0


def start_from_sft(config: Config, world: World) -> Config | None:
    """The embedded model starts rl from its SFT export, made first when it is not there. None: stopped by a signal."""
    settings = {
        "algo": "sft",
        "seed": config.seed,
        "out": config.out,
        "device": config.device,
        "kernels": config.kernels,
    }
    first = load_config([f"--{key}={value}" for key, value in settings.items()])
    first = dataclasses.replace(
        first, name=f"sft-tiny-seed{config.seed}", eval_size=0, resume="auto", threads=config.threads
    )
    export = first.run_dir / "export"
    if not (export / "config.json").exists():
        if world.rank == 0:
            print(f"There is no SFT checkpoint in {export}: making it first (--algo sft).", flush=True)
        if train(first, world):
            return None
    return dataclasses.replace(config, init_from=str(export))


def train(config: Config, world: World) -> bool:
    """Runs to the end, or to the step boundary after a signal; True when it was stopped by one."""
    with guard_memory(config, "start"):
        run = Run(config, world)
    with contextlib.closing(run.log):
        return loop(config, run)


def loop(config: Config, run: Run) -> bool:
    """The steps of a run; True when a signal stopped it."""
    progress = run.progress
    if progress.step == 0 and not progress.before:
        progress.before = run.assess()
    with contextlib.closing(run.batches()) as batches:
        for step, batch in batches:
            with guard_memory(config, "update"):
                run.learner.learn(batch, step)
    run.log.profile(sys.maxsize)  # closes a window that reaches past the last step
    finished = progress.step >= config.steps and run.assess_last()
    run.close(finished)
    return not finished


if __name__ == "__main__":
    dist.run(main)
