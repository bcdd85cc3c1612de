"""Replica: the rollout's own full weights, built once, refreshed in place; generation never touches FSDP modules."""

import contextlib
import copy
import threading

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine import dist
from engine.model import cast_parameters, compute_dtype, use_products
from engine.streams import Fence


class Replica:
    """A plain model whose parameters are fixed buffers, and the version of the weights in them.

    `reading()` and `refresh()` exclude each other: a version is never seen half written. On a GPU the order also
    holds on the device, between the streams of reader and writer.
    """

    def __init__(self, lm: nn.Module, version: int = 0):
        self.lm, self.version = use_products(lm), version
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


def make_replica(lm: nn.Module, device: torch.device) -> Replica:
    """A frozen copy of a plain model in the compute dtype."""
    own = cast_parameters(copy.deepcopy(lm), compute_dtype(device)).to(device).eval().requires_grad_(False)
    return Replica(own)
