"""CUDA streams, events and copies behind calls that do nothing on a CPU: who may read the weights, and when.

Every stream is made once: the allocator keeps a pool of memory for each, for good.
"""

import contextlib
import functools
import itertools

import torch
from torch import Tensor

from kernels.products import round_up

ALIGNED = 16
"""Bytes: what a vectorised load of a kernel wants."""


@functools.cache
def side_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """The rollout's own stream, ahead of others where blocks wait for room; None on a CPU."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


def on_side_stream(device: torch.device):
    """A context in which this thread's work goes to the side stream."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stream = side_stream(device)
    return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, pinned first: a copy from other memory waits for all that the stream has to do."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def upload_all(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Host tensors on `device`, having travelled as one piece."""
    return tensors if device.type == "cpu" else parts(upload(pack(tensors), device), tensors)


def pack(tensors: dict[str, Tensor]) -> Tensor:
    """The bytes of all, uint8, each tensor's from a multiple of ALIGNED on."""
    packed = torch.empty(sum(round_up(x.nbytes, ALIGNED) for x in tensors.values()), dtype=torch.uint8)
    for part, x in zip(parts(packed, tensors).values(), tensors.values(), strict=True):
        part.copy_(x)
    return packed


def parts(packed: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of what `pack` makes of tensors with the names, shapes and dtypes of `like`."""
    starts = itertools.accumulate((round_up(x.nbytes, ALIGNED) for x in like.values()), initial=0)
    spans = {name: packed[start : start + x.nbytes] for start, (name, x) in zip(starts, like.items(), strict=False)}
    return {name: span.view(like[name].dtype).view(like[name].shape) for name, span in spans.items()}


class Fence:
    """A point in one stream that another can wait for; `wait` before the first `mark` waits for nothing."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event() if device.type == "cuda" else None

    def mark(self) -> None:
        if self.event is not None:
            self.event.record()

    def wait(self) -> None:
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
