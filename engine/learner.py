"""Learner: what turns a batch into optimizer steps, the same on one rank or many.

Every rank takes part in every forward, so the number of micro-batches is the maximum over ranks, filled up with
batches of weight 0; whether a step is skipped is decided on global numbers.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine import dist
from engine.algos import Algo
from engine.algos.loss import score
from engine.batch import MASKED, Batch, share_prompts, sharing_saves
from engine.config import Config
from engine.log import Log
from engine.model import learning_rate

SKIPS_ALLOWED = 2  # non-finite updates in a row; one more stops the run


@dataclass
class Learner:
    config: Config
    algo: Algo
    policy: nn.Module  # engine.model.Policy, sharded
    reference: nn.Module | None
    optimizer: torch.optim.Optimizer
    ops: object  # kernels.eager, kernels.chunked or kernels.fused
    log: Log
    world: dist.World
    folder: Path
    check: Callable[[], None] = lambda: None  # raises when what runs beside the update has failed
    updates: int = 0  # optimizer steps taken or skipped
    skipped: int = 0  # non-finite ones in a row

    def learn(self, batch: Batch, step: int) -> None:
        """All epochs and updates on one rollout (or one packed batch)."""
        config = self.config
        with self.log.span("update", step):
            needed_N = self.can_learn(batch)
            self.log.add(removed_sequences=float((~needed_N).sum()), batch_sequences=len(batch))
            batch = self.with_logps(batch, needed_N)
            for epoch in range(config.epochs):
                generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1_009 + epoch)
                once = config.updates_per_rollout == 1
                order = torch.arange(len(batch)) if once else torch.randperm(len(batch), generator=generator)
                for rows in order.tensor_split(config.updates_per_rollout):
                    part = batch.select(rows)
                    weight_NT = self.algo.weight(part.mask_NT, dist.all_sum, config.max_new_tokens)
                    part = dataclasses.replace(part, weight_NT=weight_NT.float())
                    self.update(part.select(needed_N[rows]), step)

    def learning_rate(self, update: int) -> float:
        """The scheduled rate of an update, counted from 0."""
        config = self.config
        return learning_rate(config, update, config.steps * config.updates_per_rollout * config.epochs)

    def can_learn(self, batch: Batch) -> Tensor:
        """Bool [N]: sequences whose gradient can differ from 0. The others never enter the body; exact."""
        if self.config.beta or self.config.entropy_coef:
            return torch.ones(len(batch), dtype=torch.bool)
        return (batch.adv_N != 0) & batch.mask_NT.any(1)

    def with_logps(self, batch: Batch, needed_N: Tensor) -> Batch:
        """Adds the log-probabilities the loss compares with: the old policy's and the reference's."""
        if not self.algo.advantage:
            return batch
        config, old = self.config, self.config.logp_old
        if old == "auto":
            old = "on_policy" if config.updates_per_rollout * config.epochs == 1 else "recompute"
            old = "sampler" if config.lag and config.importance_cap is None else old
        if old == "sampler":
            batch = dataclasses.replace(batch, logp_old_NT=batch.logp_behaviour_NT)
        if old == "recompute":
            batch = dataclasses.replace(batch, logp_old_NT=self.score(self.policy, batch, needed_N))
        if self.reference is not None:
            batch = dataclasses.replace(batch, logp_ref_NT=self.score(self.reference, batch, needed_N))
        return batch

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch, needed_N: Tensor) -> Tensor:
        """Log-probabilities [N, T] (fp32, host) of the needed sequences, 0 for the others. Collective."""
        out_NT = torch.zeros(batch.ids_NT.shape)
        rows, size = needed_N.nonzero().squeeze(1), self.config.micro_batch
        batch = batch.select(rows)
        shares, scored = self.shares_prompts(batch), []
        for micro in batch.split(size, self.num_micros(len(rows))):
            laid_out, place_NT = self.lay_out(micro, shares)
            scored.append((micro, place_NT, model(laid_out, score, self.config, self.ops).float()))
        dist.free_gathered(model)  # a backward would
        for some, (micro, place_NT, logp_NT) in zip(rows.split(size), scored, strict=False):
            T, logp_NT = micro.ids_NT.shape[1], logp_NT.cpu()  # the first wait: the device has all of them to do
            out_NT[some, :T] = logp_NT[:, :T] if place_NT is None else logp_NT.flatten()[place_NT] * micro.mask_NT
        return out_NT

    def shares_prompts(self, batch: Batch) -> bool:
        """Whether the answers to one prompt go through the model as one row, so that the prompt goes through once."""
        wanted = self.config.share_prompts
        if wanted is None:
            return sharing_saves(batch, *self.policy.costs, MASKED[self.world.device.type])
        return wanted and batch.group_N is not None

    def lay_out(self, micro: Batch, shares: bool) -> tuple[Batch, Tensor | None]:
        """(the rows of a micro-batch on the device, where its tokens stand in them or None where nothing moved)."""
        rows, place_NT = share_prompts(micro) if shares and micro.group_N is not None else (micro.filled_up(), None)
        return rows.needed_rows().to(self.world.device), place_NT

    def num_micros(self, sequences: int) -> int:
        """Micro-batches every rank runs for its `sequences`: the largest need of any rank. Collective."""
        return int(dist.all_max([float(math.ceil(sequences / self.config.micro_batch))])[0])

    def update(self, batch: Batch, step: int) -> None:
        """One optimizer step on weighted sequences; nothing happens when no rank has any."""
        count = self.num_micros(len(batch))
        if not count:
            self.updates += 1
            self.log.add(empty_updates=float(self.world.rank == 0))
            return
        total = torch.zeros((), device=self.world.device)
        shares = self.shares_prompts(batch)
        batch = batch.by_group() if shares else batch.by_length()
        for i, micro in enumerate(batch.split(self.config.micro_batch, count)):
            self.check()
            last = i == count - 1
            self.policy.set_requires_gradient_sync(self.config.grad_sync != "last" or last)
            self.policy.set_reshard_after_backward(self.config.reshard_after_forward is not False or last)
            with self.log.span("forward", step):
                laid_out, _ = self.lay_out(micro, shares)
                loss, stats = self.policy(laid_out, self.algo.loss, self.config, self.ops)
            with self.log.span("backward", step):
                loss.backward()
            self.log.add_stats(self.algo.loss.stats, stats)
            total += loss.detach()
        with self.log.span("optimizer", step):
            self.step_optimizer(batch, total, step)

    def step_optimizer(self, batch: Batch, total: Tensor, step: int) -> None:
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
                self.stop_with_batch(batch, step)

    def stop_with_batch(self, batch: Batch, step: int) -> None:
        path = self.folder / f"bad_batch_rank{self.world.rank}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in batch.tensors().items()}, path)
        raise FloatingPointError(
            f"{self.skipped} updates in a row had a loss or gradient that is not finite (the last in step {step}); "
            f"the batch is in {path}. Lower lr or max_grad_norm, or look at the data."
        )
