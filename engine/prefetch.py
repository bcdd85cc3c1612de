"""Prefetch: the rollout of the next step beside the update of this one (lag 1), or strictly before it (lag 0).

    lag 0:  make 0 | update 0, publish | make 1 | update 1, publish | ...
    lag 1:  make 0 | update 0, publish | update 1, publish | ...
                   |   make 1          |   make 2          |

`publish` never runs beside `make`, so batch k comes from weights of version max(k - lag, 0). `make` runs on a thread
and stream of its own and must call no collective: two threads that share a process group deadlock.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch

from engine.streams import on_side_stream

LAST_SECONDS = 5.0
TURN_SECONDS = 1e-3
"""After which one of two threads that launch kernels is asked to let the other; 5e-3 is Python's own."""
Made = TypeVar("Made")


class Prefetch(Generic[Made]):
    """Runs `make(step)` ahead by `lag` steps; `span(verb, step)` times the waits for it.

    `cancelled` is set when `make` should stop at once; `flight` is the rollout beside the update, if there is one.
    """

    def __init__(self, make: Callable[[int], Made], lag: int, device: torch.device, span: Callable):
        self.make, self.lag, self.device, self.span = make, lag, device, span
        self.cancelled = threading.Event()
        self.flight: Future[Made] | None = None

    def batches(
        self,
        steps: range,
        accept: Callable[[Made], bool],
        publish: Callable[[int], bool],
        ready: Made | None = None,
    ) -> Iterator[tuple[int, Made]]:
        """Yields (step, made). `accept(made)` runs before it, `publish(step)` after the caller's turn; no rollout is
        under way in either, the next step's has landed before `publish`, and each ends the iteration with True.
        `ready` is what an earlier process made for the first step.

        What `make` raises is raised here, or by `check`, with its own traceback. Close the iterator, so that a
        failure of the caller ends the thread too: it waits for `make`, which looks at `cancelled`, for a few seconds.
        """
        threads, turn = torch.get_num_threads(), sys.getswitchinterval()
        if self.lag:
            sys.setswitchinterval(TURN_SECONDS)
        worker = ThreadPoolExecutor(1, "rollout", lambda: torch.set_num_threads(threads))
        try:
            for step in steps:
                made = self.flight.result() if self.flight else self.make(step) if ready is None else ready
                ready = self.flight = None
                if accept(made):
                    return
                if self.lag and step + 1 in steps:
                    self.flight = worker.submit(self._make_aside, step + 1)
                yield step, made
                if self.flight:
                    with self.span("wait", step):
                        wait([self.flight])
                    self.check()
                if publish(step):
                    return
        finally:
            if self.lag:
                sys.setswitchinterval(turn)
            worker.shutdown(wait=False)
            if self.flight and not self.flight.done():  # the caller has failed
                self.cancelled.set()
                wait([self.flight], LAST_SECONDS)  # a reward may hang: the process ends without it
            self.flight = None

    def _make_aside(self, step: int) -> Made:
        with on_side_stream(self.device):
            return self.make(step)

    def check(self) -> None:
        """Raises what the rollout beside the caller has failed with, if it has."""
        if self.flight and self.flight.done():
            self.flight.result()
