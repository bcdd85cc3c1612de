"""Replica: the rollout's own full weights, built once, refreshed in place; generation never touches FSDP modules."""

import copy

import torch
from torch import nn

from engine.model import cast_parameters, compute_dtype


def make_replica(lm: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy of a plain model in the compute dtype; its parameters are fixed buffers."""
    return cast_parameters(copy.deepcopy(lm), compute_dtype(device)).to(device).eval().requires_grad_(False)


@torch.no_grad()
def refresh(replica: nn.Module, policy: nn.Module) -> None:
    """Copies the sharded weights into the replica: the same ordered walk on every rank, one tensor at a time.

    Cast before the gather, so that half the bytes travel. Collective.
    """
    target = dict(replica.named_parameters())
    for name, p in policy.lm.named_parameters():
        buffer = target[name]
        buffer.copy_(p.detach().to(device=buffer.device, dtype=buffer.dtype).full_tensor())
