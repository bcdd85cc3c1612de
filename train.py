"""One loop for every algorithm: prompt -> rollout -> reward -> advantage -> loss -> update.

torchrun [--nproc_per_node=N] train.py --algo NAME [--config FILE ...] [--key value ...]
"""

import contextlib
import dataclasses
import gc
import sys

from engine import adapters, dist
from engine.config import Config, check_batch, first_run, load_config
from engine.dist import World
from engine.folder import have_run
from engine.inputs import Inputs, load_inputs
from engine.plan import describe, guard_memory
from engine.run import Run


def loop(run: Run) -> None:
    """The steps of a run, to the end or to the step boundary after a signal.

    At lag 1 what `begin` begins, the rollout of the next step, runs beside `learn` until `land`."""
    for step in run.steps_to_go():
        batch = run.ahead.next(step)  # prompt -> rollout -> reward -> advantage
        if run.stops(batch):
            break
        run.ahead.begin(step + 1)
        run.learner.learn(batch.samples, step)  # loss -> update
        run.ahead.land()
        run.publish(step)  # the new weights to the rollout
        run.end_step(step)  # metrics, accuracies, checkpoint


def train(config: Config, world: World, inputs: Inputs) -> bool:
    """One run, from its first step or its last checkpoint; False when a signal has stopped it."""
    dist.take_cores(config.threads, 1 + config.lag)
    with guard_memory(config, "start"):
        run = Run(config, world, inputs)
    with contextlib.closing(run.log), run.ahead:
        run.begin()
        loop(run)
        return run.close()


def make_first(config: Config, world: World) -> None:
    """The run whose export another starts from."""
    if world.rank == 0:
        made = f"--algo {config.title}, {config.steps} steps; --init_from takes other weights"
        print(f"There is no finished run in {config.run_dir}: making it first ({made}).", flush=True)
    train(config, world, load_inputs(config))
    gc.collect()  # the modules of FSDP2 hold each other


def main() -> int:
    config = adapters.follow(load_config(sys.argv[1:], __doc__))
    rank, world_size = dist.launch()
    check_batch(config, world_size)
    if config.dry_run:
        if rank == 0:
            print(describe(config, world_size))
        return 0
    world = dist.start(config.device, config.grace_seconds)
    inputs = load_inputs(config)
    if first := first_run(config):
        if not have_run(first.run_dir, lambda: make_first(adapters.follow(first), world)):
            return 0
        config = adapters.follow(dataclasses.replace(config, init_from=str(first.run_dir / "export")))
    train(config, world, inputs)
    return 0


if __name__ == "__main__":
    dist.run(main)
