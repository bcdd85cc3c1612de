"""Ranks, and how they end: one process or many, the same calls; a rank that dies takes the others with it.

`run(main)` wraps a program, `start()` makes its `World`. From then on a thread looks twice a second at
  - the signals of this rank: SIGTERM and SIGINT only set `stop_requested()`; a loop that has not ended
    `grace_seconds` later is ended with the stacks of all its threads;
  - the board, a few keys in the launcher's store: `failure` (who failed first, and how), `alive/<rank>`;
  - the next rank: its process where both share a machine, else its pulse. Who finds it gone writes `failure`.
Whatever the reason, a process ends in `_leave`: the interpreter's own shutdown aborts about one run in ten,
because C++ worker threads still drop tensors that Python owns (pytorch#190489).
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import os
import select
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engine.errors import UserError

LOOK_SECONDS = 0.5
GONE_LOOKS = 2  # a process that no longer exists: twice, because its last word may be under way
SILENT_LOOKS = 16  # a pulse that does not change, counted in our own looks: a suspended machine skips both alike
LAST_WORDS_SECONDS = 2.0  # for main to print its own traceback once another rank has failed
ECHO_SECONDS = 4.0  # for the watch to find the dead rank behind a broken connection

Values = TypeVar("Values", list[float], Tensor)


@dataclass(frozen=True)
class World:
    """This process among the others; `mesh` is 1-D over all ranks, on the type of `device`."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh


_world: World | None = None
_watch: _Watch | None = None
_stop = threading.Event()  # a signal reached this rank
_ending = threading.Event()  # main has returned: the store may go away at any time
_leaving = threading.Lock()  # taken once, never released


def start(device: str = "auto", grace_seconds: float = 25.0) -> World:
    """Join the other ranks and begin to watch over them; a second call returns the same `World`.

    Reads torchrun's environment; without it the group has one process. Call it from the main thread.
    `device`: auto (cuda if there is one) | cpu | cuda. `grace_seconds` stays under the 30 s after which
    torchrun kills. Raises UserError: unknown or absent device, more local ranks than GPUs.
    """
    global _world, _watch
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is unknown: use auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but no CUDA device is visible here: use device cpu or auto.")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if _world is not None:
        assert _world.device.type == kind, f"started on {_world.device}, asked for {kind}"
        return _world
    rank, world_size = _rank(), int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind == "cuda" and local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes were started on a machine with {torch.cuda.device_count()} GPUs: "
            f"use --nproc_per_node={torch.cuda.device_count()}, or device cpu."
        )
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    if not faulthandler.is_enabled():
        faulthandler.enable()
    group_store, board = _stores()
    _watch = _Watch(board, rank, world_size, grace_seconds)
    _watch.start()
    c10d.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=group_store, rank=rank, world_size=world_size
    )
    where = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    _world = World(rank, world_size, local_rank, where, init_device_mesh(kind, (world_size,)))
    return _world


def world_size() -> int:
    """Number of ranks; 1 before `start`."""
    return _world.world_size if _world is not None else 1


def stop_requested() -> bool:
    """Whether SIGTERM or SIGINT reached this rank; the ranks agree on it by summing, at a step boundary."""
    return _stop.is_set()


def all_sum(values: Values) -> Values:
    """Sum over all ranks of a list of floats, or of a float64 CPU tensor; bitwise the same on every rank."""
    return _all_reduce(values, c10d.ReduceOp.SUM)


def all_max(values: Values) -> Values:
    """Maximum over all ranks of a list of floats, or of a float64 CPU tensor."""
    return _all_reduce(values, c10d.ReduceOp.MAX)


def gather(value: object) -> list:
    """`value` of every rank, in rank order, on every rank; travels over gloo."""
    values = [None] * c10d.get_world_size()
    c10d.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here; over gloo, so that no GPU is touched."""
    all_sum([0.0])


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process; never returns, and works when `start` was never reached.

    Exit code: what `main` returns (None is 0); 2 after a UserError, printed as one sentence, once, not by
    every rank; 130 after ^C before `start`; 1 after anything else, with the traceback and the rank on
    stderr and the other ranks told. `atexit` handlers do not run.
    """
    try:
        _stores()
        _finish(main() or 0)
    except UserError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except SystemExit as request:
        if _world is not None:
            _fail(request)
        _leave(*((1, request.code) if isinstance(request.code, str) else (request.code or 0,)))
    except BaseException as error:  # noqa: BLE001 - everything ends here, and says why
        _fail(error)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _all_reduce(values: Values, op: c10d.ReduceOp) -> Values:
    is_list = isinstance(values, list)
    assert is_list or (values.dtype == torch.float64 and values.device.type == "cpu"), (values.dtype, values.device)
    total = torch.tensor(values, dtype=torch.float64) if is_list else values.clone()
    c10d.all_reduce(total, op)
    return total.tolist() if is_list else total


@functools.cache
def _stores() -> tuple[c10d.Store, c10d.Store]:
    """(for the process group, the board). Two connections: a client is locked while it waits for a key."""
    if "RANK" not in os.environ:
        store = board = c10d.HashStore()
    else:
        store, _, _ = next(c10d.rendezvous("env://"))
        board = c10d.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
        )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return c10d.PrefixStore(f"group/{attempt}", store), c10d.PrefixStore(f"board/{attempt}", board)


class _Watch(threading.Thread):
    """The thread that looks at signals, board and neighbour, and ends the process when it has to.

    Python runs signal handlers in the main thread only, between two bytecodes, thus not inside a
    collective; the wake-up descriptor, here a pipe, is written by the C handler at once.
    """

    def __init__(self, board: c10d.Store, rank: int, world_size: int, grace_seconds: float) -> None:
        super().__init__(name="watch", daemon=True)
        self.board, self.rank, self.neighbour = board, rank, (rank + 1) % world_size
        self.grace_seconds, self.pulse, self.silent = grace_seconds, "", 0
        self._beat()  # before anything can kill this rank unseen
        self.signals, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.end)  # a thread inside a store's C++ call aborts the interpreter's shutdown

    def run(self) -> None:
        try:
            while True:
                if not select.select([self.signals], [], [], LOOK_SECONDS)[0]:
                    self._look()
                elif 0 in (numbers := os.read(self.signals, 64)):
                    return
                else:
                    self._request_stop(numbers)
        except Exception as error:  # noqa: BLE001 - a watch that ends unseen leaves the hang it is there for
            if not _ending.is_set():
                _leave(1, f"leaving because the launcher's store is out of reach ({type(error).__name__}: {error})")

    def end(self) -> None:
        """Look no more; returns when the thread has ended."""
        os.write(self.wakeup, b"\0")
        self.join(1)

    def _look(self) -> None:
        self._beat()
        if self.neighbour != self.rank and self.board.check([f"alive/{self.neighbour}"]):
            last, self.pulse = self.pulse, self.board.get(f"alive/{self.neighbour}").decode()
            local = _is_local(self.pulse)
            self.silent = 0 if _is_alive(self.pulse, last) else self.silent + 1
            if self.silent >= (GONE_LOOKS if local else SILENT_LOOKS):
                how = "its process is gone" if local else f"silent for {self.silent * LOOK_SECONDS:.0f} s"
                _post("failure", f"rank {self.neighbour} died without a word ({how})")
        if self.board.check(["failure"]):
            time.sleep(LAST_WORDS_SECONDS)
            _leave(1, f"leaving because {self.board.get('failure').decode()}")

    def _beat(self) -> None:
        self.board.set(f"alive/{self.rank}", f"{_machine()} {os.getpid()} {time.monotonic_ns()}")

    def _request_stop(self, numbers: bytes) -> None:
        names = [signal.Signals(n).name for n in numbers if n in (signal.SIGTERM, signal.SIGINT)]
        if names and _world is None:
            _leave(1, f"{names[0]} before all ranks had started")
        if names and not _stop.is_set():
            # The timer is a C thread: it fires even if something holds the GIL for good.
            faulthandler.dump_traceback_later(self.grace_seconds, exit=True)
            _stop.set()
            _say(f"{names[0]}: ending at the next step boundary, within {self.grace_seconds:g} s")

    def _forget(self) -> None:
        """In a forked worker: it shares the pipe, and must die of the SIGTERM meant for it."""
        atexit.unregister(self.end)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@functools.cache
def _machine() -> str:
    """Equal for two processes that see each other's /proc: this boot, this pid namespace."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/" + os.readlink("/proc/self/ns/pid")


def _is_local(pulse: str) -> bool:
    return pulse.split()[0] == _machine()


def _is_alive(pulse: str, last: str) -> bool:
    """A rank on this machine may be stopped or starved as long as it exists; a remote one must beat."""
    if pulse == "done" or not _is_local(pulse):
        return pulse == "done" or pulse != last
    try:
        stat = Path(f"/proc/{pulse.split()[1]}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _say(text: str) -> None:
    prefix = f"[rank {_rank()}] " if "RANK" in os.environ else ""
    print(textwrap.indent(text, prefix, lambda line: True), file=sys.stderr, flush=True)


def _finish(code: int) -> NoReturn:
    gc.collect()
    if _world is not None:
        _ending.set()
        barrier()
        faulthandler.dump_traceback_later(20, exit=True)  # destroying an NCCL group can hang
        _watch.end()  # it would beat over the last word
        with contextlib.suppress(c10d.DistError):
            _watch.board.set(f"alive/{_rank()}", "done")
        c10d.destroy_process_group()
    _leave(code)


def _refuse(sentence: str) -> NoReturn:
    """End on a UserError: rank 0 speaks for all ranks that have the same sentence, others for themselves."""
    if _rank() == 0:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        _post("said", sentence)
    elif _await("said", LAST_WORDS_SECONDS) != sentence:
        _say(f"error: {sentence}")
    _post("failure", f"rank {_rank()} refused: {sentence}")
    _leave(2)


def _fail(error: BaseException) -> NoReturn:
    """End on any other exception. A RuntimeError may be the echo of a lost peer: the watch names it first."""
    _say("".join(traceback.format_exception(error)).rstrip())
    if _world is not None and _world.world_size > 1 and isinstance(error, RuntimeError):
        _await("failure", ECHO_SECONDS)
    mine = f"rank {_rank()} failed: {traceback.format_exception_only(error)[-1].strip()}"
    first = _post("failure", mine)
    _leave(1, "" if first == mine else f"leaving because {first}")


def _post(key: str, text: str) -> str:
    """Write on the board unless another rank did; returns what stands there."""
    try:
        return _stores()[1].compare_set(key, "", text).decode()
    except (c10d.DistError, ValueError):  # no launcher any more, or none yet: nobody reads the board
        return text


def _await(key: str, seconds: float) -> str | None:
    """What stands on the board under `key`, waiting for it at most so long; None if nothing."""
    end = time.monotonic() + seconds
    with contextlib.suppress(c10d.DistError, ValueError):
        while not _stores()[1].check([key]):
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        return _stores()[1].get(key).decode()
    return None


def _leave(code: int, line: str = "") -> NoReturn:
    """The one way out; the first thread to come here ends the process."""
    _leaving.acquire()
    try:
        faulthandler.dump_traceback_later(5, exit=True)  # printing into a full pipe may block
        if line:
            _say(line)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
