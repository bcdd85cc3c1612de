"""Prefetch: the rollout of the next step beside the update of this one (lag 1), or strictly before it (lag 0).

    lag 0:  make 0 | learn 0, publish | make 1 | learn 1, publish | ...
    lag 1:  make 0 | learn 0, publish | learn 1, publish | ...
                   |  make 1          |  make 2          |

A step says `next`, `begin`, learns, says `land`, and publishes its weights: so nothing is ever published beside `make`,
and batch k comes from weights of version max(k - lag, 0). `make` runs on a thread and stream of its own and must call
no collective: two threads that share a process group deadlock.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch

from engine.streams import on_side_stream

LAST_SECONDS = 5.0
TURN_SECONDS = 1e-3
"""After which one of two threads that launch kernels is asked to let the other; 5e-3 is Python's own."""
Made = TypeVar("Made")


class Prefetch(Generic[Made]):
    """Runs `make(step)` ahead by `lag` steps, up to the step before `end`; `span(verb, step)` times the waits for it.

    `ready` is what is made and not yet taken: by an earlier process, or landed. `cancelled` is set when `make` should
    stop at once. Use it as a context: a failure inside ends the thread too, which looks at `cancelled`, and is waited
    for a few seconds. What `make` raises is raised by `next`, `land` or `check`, with its own traceback.
    """

    def __init__(self, make: Callable[[int], Made], lag: int, end: int, device: torch.device, span: Callable):
        self.make, self.lag, self.end, self.device, self.span = make, lag, end, device, span
        self.cancelled = threading.Event()
        self.ready: Made | None = None
        self._flight: Future[Made] | None = None
        self._beside = 0  # the step that it flies beside

    def __enter__(self) -> "Prefetch[Made]":
        threads, self._turn = torch.get_num_threads(), sys.getswitchinterval()
        if self.lag:
            sys.setswitchinterval(TURN_SECONDS)
        self._worker = ThreadPoolExecutor(1, "rollout", lambda: torch.set_num_threads(threads))
        return self

    def __exit__(self, *failure) -> None:
        if self.lag:
            sys.setswitchinterval(self._turn)
        self._worker.shutdown(wait=False)
        if self.flying():  # the caller has failed
            self.cancelled.set()
            wait([self._flight], LAST_SECONDS)  # a reward may hang: the process ends without it
        self._flight = None

    def next(self, step: int) -> Made:
        """What is made for this step: before, or now."""
        made, self.ready = self.ready, None
        return self.make(step) if made is None else made

    def begin(self, step: int) -> None:
        """At lag 1, lets `make(step)` run beside what follows."""
        if self.lag and step < self.end:
            self._flight, self._beside = self._worker.submit(self._make_aside, step), step - 1

    def land(self) -> None:
        """Waits for what was begun, if anything was: from here on nothing runs beside the caller."""
        if self._flight is not None:
            with self.span("wait", self._beside):
                wait([self._flight])
            self.ready, self._flight = self._flight.result(), None

    def flying(self) -> bool:
        return self._flight is not None and not self._flight.done()

    def check(self) -> None:
        """Raises what the rollout beside the caller has failed with, if it has."""
        if self._flight is not None and self._flight.done():
            self._flight.result()

    def _make_aside(self, step: int) -> Made:
        with on_side_stream(self.device):
            return self.make(step)
