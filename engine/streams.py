"""CUDA streams and events behind calls that do nothing on a CPU: who may read the weights, and when.

Every stream is made once: the allocator keeps a pool of memory for each, for good.
"""

import contextlib
import functools

import torch


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
