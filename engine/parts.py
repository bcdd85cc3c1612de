"""Parts: what training is made of, built alike for a run, a benchmark and a test, and apart from all of them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine import adapters, dist, linears, model
from engine.algos import Algo, algo_of
from engine.asking import Asker, check_room, make_rollout, sampling_of
from engine.config import Config
from engine.inputs import Inputs
from engine.learner import Learner
from engine.log import Log
from engine.plan import device_memory, guard_memory, settle
from engine.policy import Base, Policy, load_kernels, make_optimizer, remove_dropout, shard, store
from engine.replica import Replica, hollow, make_replica, share


@dataclass
class Parts:
    """The trained module and what belongs to it; the rollout's side, its weights and its cache, is made when a source
    or an exam first asks. `stop()` tells a rollout to end, `show(phase, done, of)` hears how far it is."""

    config: Config  # with nothing left open
    world: dist.World
    algo: Algo
    policy: Policy
    frozen: nn.Module | None  # the reference, or the teacher
    optimizer: torch.optim.Optimizer
    ops: object
    form: nn.Module  # the model without weights
    inputs: Inputs | None
    stop: Callable[[], bool] = dist.stop_requested
    show: Callable[[str, int, int], None] = lambda phase, done, of: None

    @functools.cached_property
    def replica(self) -> Replica:
        return make_replica(self.form, self.world.device)

    @functools.cached_property
    def rollout(self):
        return make_rollout(self.replica, self.inputs.tokenizer, self.config, lambda: self.stop())

    def asker(self, version: int) -> Asker:
        """Asks the policy, whose weights are now of this version. Collective."""
        self.publish(version)
        self.rollout.prepare(sampling_of(self.config))
        progress = lambda done, of: self.show("rollout", done, of)  # noqa: E731
        return Asker(self.rollout, self.inputs.tokenizer, self.inputs.rewards, self.config, progress)

    def publish(self, version: int) -> None:
        """The policy's weights to the rollout, as this version. Collective."""
        with guard_memory(self.config, "start"):
            self.replica.refresh(self.policy, version)

    def learner(self, log: Log, folder: Path) -> Learner:
        return Learner(
            self.config, self.algo, self.policy, self.frozen, self.optimizer, self.ops, log, self.world, folder
        )


def load(config: Config, world: dist.World) -> nn.Module:
    """The plain model that a run starts from, on the CPU in the compute dtype."""
    lm = adapters.load(config.start, config.seed, model.compute_dtype(world.device))
    check_room(lm, config, config.own_context)
    return lm


def build(config: Config, world: dist.World, lm: nn.Module, inputs: Inputs | None = None) -> Parts:
    """Takes `lm`, which becomes the policy, with adapters beside it where the settings ask for them. Without inputs
    nothing can be asked. Collective."""
    assert config.lora_rank is not None or not linears.adapted(lm), f"{config.start} has an adapter: adapters.follow"
    algo, lm = algo_of(config), linears.convert(lm, config)
    settled = settle(config, world.world_size, -dist.all_max([-float(device_memory(world.device))])[0])
    if algo.source.rolls_out or algo.needs:
        remove_dropout(lm)
    if config.shares_base:
        store(linears.freeze(lm), model.compute_dtype(world.device)).to(world.device)
    beside = algo.beside(config)
    frozen = make_frozen(beside, lm, config, world) if beside else None
    adapters.begin(lm, config)
    form = hollow(lm)
    if config.lora_rank is not None:
        linears.freeze(lm)
    policy = shard(Policy(lm, world.device), settled, world.mesh)
    if beside and frozen is None:
        frozen = Base(policy)
    ops = load_kernels(config, world.device)
    return Parts(settled, world, algo, policy, frozen, make_optimizer(policy, config), ops, form, inputs)


def make_frozen(start: str, lm: nn.Module, config: Config, world: dist.World) -> Policy | None:
    """The model of `start` as one that only scores; of the run's own `lm` a copy, which shares a frozen base with it,
    or None where the policy is to be asked without its adapters. Collective."""
    if start != config.start:
        other = adapters.load(start, config.seed, model.compute_dtype(world.device))
        check_room(other, config, config.context != "zeroshot")
        copy = remove_dropout(linears.convert(other, config))
    elif config.reference == "adapters_off":
        return None
    else:
        copy = share(lm, torch.clone)
    return shard(Policy(copy, world.device), config, world.mesh, frozen=True)
