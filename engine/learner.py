"""Learner: what turns samples into optimizer steps, the same on one rank or many.

Every rank takes part in every forward, so the number of micro-batches is the maximum over ranks, filled up with rows
of untrained tokens; whether a step is skipped is decided on global numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from engine import dist
from engine.algos import Algo
from engine.algos.loss import LogProbs
from engine.config import Config
from engine.errors import UserError
from engine.layout import Unit, lay_out, make_rows, members
from engine.log import Log
from engine.metrics import DeviceStats, Tally, reduce
from engine.plan import guard_memory
from engine.policy import Policy, learning_rate
from engine.samples import Sample, pack

SKIPS_ALLOWED = 2  # non-finite updates in a row; one more stops the run


@dataclass
class Learner:
    config: Config
    algo: Algo
    policy: Policy  # sharded
    frozen: nn.Module | None  # the reference, or the teacher
    optimizer: torch.optim.Optimizer
    ops: object  # kernels.eager, kernels.chunked or kernels.fused
    log: Log
    world: dist.World
    folder: Path
    check: Callable[[], None] = lambda: None  # raises when what runs beside the update has failed
    known: dict[bytes, Tensor] | None = None  # instead of a reference, what it says of samples (engine.samples.key_of)
    updates: int = 0  # optimizer steps taken or skipped
    skipped: int = 0  # non-finite ones in a row

    def __post_init__(self):
        self.loss, self.logprobs = self.algo.loss(self.config, self.ops), LogProbs(self.config, self.ops)

    def learn(self, samples: Sequence[Sample], step: int) -> None:
        """All epochs and updates on the samples of a step. Collective."""
        config = self.config
        with guard_memory(self.config, "update"), self.log.span("update", step):
            samples = self.algo.baseline(samples, dist.all_sum)
            able = [self.loss.can_learn(s) for s in samples]
            samples = self.with_needs(samples, able, step)
            removed = sum(not self.loss.can_learn(s) for s in samples)
            self.log.add(removed_sequences=removed, batch_sequences=len(samples))
            for epoch in range(config.epochs):
                generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1_009 + epoch)
                once = config.updates_per_rollout == 1
                order = torch.arange(len(able)) if once else torch.randperm(len(able), generator=generator)
                for part in order.tensor_split(config.updates_per_rollout):
                    self.update(self.weighted([samples[i] for i in sorted(part.tolist())]), step)

    def with_needs(self, samples: Sequence[Sample], able: Sequence[bool], step: int) -> list[Sample]:
        """With what the loss compares with; samples that cannot learn go without."""
        learning = [s for s, can in zip(samples, able, strict=True) if can]
        for need in self.algo.needs:
            learning = need(self, learning, step)
        rest = iter(learning)
        return [next(rest) if can else s for s, can in zip(samples, able, strict=True)]

    def weighted(self, samples: list[Sample]) -> list[Sample]:
        """The samples of one optimizer step, their weights set; those that cannot learn counted, and left out."""
        lengths = [len(s.answer) for s in samples]
        weights = self.algo.weight(lengths, dist.all_sum, self.config.max_new_tokens)
        weighted = [dataclasses.replace(s, weight=w) for s, w in zip(samples, weights, strict=True)]
        return [s for s in weighted if self.loss.can_learn(s)]

    def learning_rate(self, update: int) -> float:
        """The scheduled rate of an update, counted from 0."""
        config = self.config
        return learning_rate(config, update, config.steps * config.updates_per_rollout * config.epochs)

    def with_logprobs(self, model: nn.Module, name: str, samples: list[Sample]) -> list[Sample]:
        """The samples with the log-probabilities of `model` under this name. Collective."""
        return self.with_values(model, self.logprobs, (name,), samples)

    def with_values(
        self, model: nn.Module, score: Callable, names: Sequence[str], samples: list[Sample], taught: bool = False
    ) -> list[Sample]:
        """The samples with what `score` (as engine.algos.loss.LogProbs) says of each token, a name for each of its
        results, by `model`; if `taught` behind the teacher's prompt. Collective."""
        seen = [dataclasses.replace(s, prompt=taught and s.context or s.prompt, values={}) for s in samples]
        micros = self.micros(seen)
        scored = self.forward_all(model, score, micros, names[0])
        found = {}
        for micro, results in zip(micros, scored, strict=True):
            some = members(micro)
            lengths = [len(s.answer) for s in some]
            results = [x.cpu() for x in results]  # the first waits: all is to be done
            if model is self.frozen and any(x.isnan().any() for x in results):
                raise UserError(f"The frozen model {self.algo.beside(self.config)} computes no numbers: is it whole?")
            parts = zip(*[x.split(lengths) for x in results], strict=True)
            found |= {id(s): dict(zip(names, part, strict=True)) for s, part in zip(some, parts, strict=True)}
        return [s.having(**found[id(also)]) for s, also in zip(samples, seen, strict=True)]

    @torch.no_grad()
    def forward_all(
        self, model: nn.Module, score: Callable, micros: list[list[Unit]], title: str
    ) -> list[list[Tensor]]:
        """What `score` gives for each micro-batch, on the device. Collective."""
        scored = []
        for micro in micros:
            rows = make_rows(micro, self.policy.plan).to(self.world.device)
            scored.append(tree_leaves(model(rows, score)))
            self.log.show(title, len(scored), len(micros))
        dist.free_gathered(model)  # a backward would
        return scored

    def measure(self, samples: list[Sample], step: int) -> dict[str, float]:
        """The loss's statistics on samples that are not learned from, as metrics of all ranks together. Collective."""
        tally, stats = Tally(), DeviceStats()
        samples = self.with_needs(samples, [True] * len(samples), step)
        for _, sums in self.forward_all(self.policy, self.loss, self.micros(samples), "evaluate"):
            stats.add(self.loss.stats, sums)
        stats.read(tally)
        return reduce(tally.sums, tally.tops)

    def micros(self, samples: Sequence[Sample]) -> list[list[Unit]]:
        """Micro-batches, as many as the rank with the most has; surplus ones are empty. Collective."""
        micros = lay_out(samples, self.config.micro_tokens, self.config.share_prompts)
        count = int(dist.all_max([float(len(micros))])[0])
        return micros + [[]] * (count - len(micros))

    def update(self, samples: Sequence[Sample], step: int) -> None:
        """One optimizer step on weighted samples; nothing happens when no rank has any."""
        micros = self.micros(samples)
        if not micros:
            self.updates += 1
            self.log.add(empty_updates=float(self.world.rank == 0))
            return
        total = torch.zeros((), device=self.world.device)
        for i, micro in enumerate(micros):
            self.check()
            last = i == len(micros) - 1
            self.policy.set_requires_gradient_sync(self.config.grad_sync != "last" or last)
            self.policy.set_reshard_after_backward(self.config.reshard_after_forward is not False or last)
            with self.log.span("forward", step):
                rows = make_rows(micro, self.policy.plan).to(self.world.device)
                loss, stats = self.policy(rows, self.loss)
            with self.log.span("backward", step):
                loss.backward()
            self.log.device_stats.add(self.loss.stats, stats)
            total += loss.detach()
            self.log.show("update", i + 1, len(micros))
        with self.log.span("optimizer", step):
            self.step_optimizer(samples, total, step)

    def step_optimizer(self, samples: Sequence[Sample], total: Tensor, step: int) -> None:
        """Clips by the global norm and steps, or skips on all ranks when loss or gradient is not finite."""
        config = self.config
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm).full_tensor().item()
        (loss,) = dist.all_sum([total.item()])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.updates)
        self.updates += 1
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.optimizer.step()
            self.skipped = 0
        self.optimizer.zero_grad()
        if self.world.rank == 0:
            self.log.add(**({"loss": loss, "grad_norm": norm, "updates": 1} if finite else {"skipped_steps": 1}))
        if not finite:
            self.skipped += 1
            self.log.say(f"Step {step}: loss {loss}, gradient norm {norm}; this update is skipped.")
            if self.skipped > SKIPS_ALLOWED:
                self.stop_with(samples, step)

    def stop_with(self, samples: Sequence[Sample], step: int) -> None:
        path = self.folder / f"bad_batch_rank{self.world.rank}.safetensors"
        save_file({"samples": pack(samples)}, path)
        raise FloatingPointError(
            f"{self.skipped} updates in a row had a loss or gradient that is not finite (the last in step {step}); "
            f"the samples are in {path} (engine.samples.unpack). Lower lr or max_grad_norm, or look at the data."
        )
