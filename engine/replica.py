"""Replica: the rollout's own full weights, built once, refreshed in place; generation never touches FSDP modules."""

import contextlib
import copy
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine import dist
from engine.model import compute_dtype
from engine.streams import Fence


class Replica:
    """A plain model whose parameters are fixed buffers, and the version of the weights in them.

    `reading()` and `refresh()` exclude each other: a version is never seen half written. On a GPU the order also
    holds on the device, between the streams of reader and writer.
    """

    def __init__(self, lm: nn.Module, version: int = 0):
        self.lm, self.version = lm, version
        self.device = next(lm.parameters()).device
        self.written, self.read = Fence(self.device), Fence(self.device)
        self._in_use = threading.Lock()

    @contextlib.contextmanager
    def reading(self):
        """Gives the version, which stays until the end. Raises RuntimeError when someone reads or writes."""
        with self._alone("read"):
            version = self.version
            self.written.wait()
            self.read.wait()  # an interrupted reader's steps may still run on another stream, in the same slots
            try:
                yield version
            finally:
                self.read.mark()
            assert self.version == version, f"weights changed from version {version} to {self.version} during a rollout"

    @torch.no_grad()
    def refresh(self, policy: nn.Module, version: int) -> None:
        """Copies the sharded weights in: the same ordered walk on every rank, one tensor at a time.

        Raises RuntimeError during a rollout. Collective.
        """
        with self._alone("refreshed"):
            dist.free_gathered(policy)  # else what was gathered before an update would be taken for its result
            self.read.wait()
            target = dict(self.lm.named_parameters())
            for name, p in policy.lm.named_parameters():
                if p.requires_grad or self.version < 0:  # what is frozen comes once
                    target[name].copy_(whole(p.detach(), target[name]))
            self.version = version
            self.written.mark()

    @contextlib.contextmanager
    def _alone(self, what: str):
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(f"the rollout's weights cannot be {what} now: they are in use by another thread")
        try:
            yield
        finally:
            self._in_use.release()


def whole(p: Tensor, like: Tensor) -> Tensor:
    """A parameter's full value on the device of `like`.

    Of several ranks each casts its shard to the dtype of `like` before the gather, so that half the bytes travel; what
    is offloaded is cast on the device, since a host would take seconds.
    """
    if not isinstance(p, DTensor):
        return p
    if p.device_mesh.size() == 1:
        return p.to_local().to(like.device, non_blocking=True)
    return p.to(like.device, non_blocking=True).to(like.dtype).full_tensor()


def hollow(lm: nn.Module) -> nn.Module:
    """A copy of a plain model, which `make_replica` makes whole: what is trained is without memory, the rest shared."""
    return share(lm, lambda p: torch.empty_like(p, device="meta"))


def make_replica(lm: nn.Module, device: torch.device) -> Replica:
    """A frozen model in the compute dtype, like `lm`, which may be hollow: its weights come with the first refresh."""
    dtype = compute_dtype(device)
    own = share(lm, lambda p: torch.empty_like(p, device=device, dtype=dtype)).eval().requires_grad_(False)
    for module in own.modules():
        module._buffers.update({name: x.to(device) for name, x in module._buffers.items() if x is not None})
    return Replica(own, version=-1)


def share(lm: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of `lm` with `make(p)` for each parameter p that is trained, and the memory of those that are frozen; what
    is tied stays tied."""
    made = {
        id(p): nn.Parameter(make(p.detach()) if p.requires_grad else p.detach(), p.requires_grad)
        for p in lm.parameters()
    }
    return copy.deepcopy(lm, made)
