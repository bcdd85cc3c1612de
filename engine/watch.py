"""How a rank ends: a signal, a failure of its own or of another rank; none is left waiting for a dead one.

From `start` on a thread looks twice a second at
  - the signals of this rank: SIGTERM and SIGINT only set `stop`; a loop that has not ended `grace_seconds`
    later is ended with the stacks of all its threads;
  - the board, a few keys in the launcher's store: `failure` (who failed first, and how), `alive/<rank>`;
  - the next rank: its process where both share a machine, else its pulse. Who finds it gone writes `failure`.
Whatever the reason, a process ends in `leave`: the interpreter's own shutdown aborts about one run in ten,
because C++ worker threads still drop tensors that Python owns (pytorch#190489). Only a crash passes it by, and
leaves what `trace_crashes` has prepared.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as c10d

LOOK_SECONDS = 0.5
GONE_LOOKS = 2  # a process that no longer exists: twice, because its last word may be under way
SILENT_LOOKS = 16  # a pulse that does not change, counted in our own looks: a suspended machine skips both alike
LAST_WORDS_SECONDS = 2.0  # for main to print its own traceback once another rank has failed

stop = threading.Event()  # a signal reached this rank
stopped_at = 0.0  # when, on the monotonic clock
started = threading.Event()  # all ranks have joined
ending = threading.Event()  # main has returned: the store may go away at any time
_leaving = threading.Lock()  # taken once, never released


class Watch(threading.Thread):
    """The thread that looks at signals, board and neighbour, and ends the process when it has to.

    Python runs signal handlers in the main thread only, between two bytecodes, thus not inside a
    collective; the wake-up descriptor, here a pipe, is written by the C handler at once.
    """

    def __init__(self, board: c10d.Store, rank: int, world_size: int, grace_seconds: float) -> None:
        super().__init__(name="watch", daemon=True)
        self.board, self.rank, self.neighbour = board, rank, (rank + 1) % world_size
        self.grace_seconds, self.deadline = grace_seconds, float("inf")
        self.pulse, self.silent = "", 0
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
                if time.monotonic() > self.deadline:
                    leave(1, f"still running {self.grace_seconds:g} s after the signal. {_stacks()}")
                if not select.select([self.signals], [], [], LOOK_SECONDS)[0]:
                    self._look()
                elif 0 in (numbers := os.read(self.signals, 64)):
                    return
                else:
                    self._request_stop(numbers)
        except Exception as error:  # noqa: BLE001 - a watch that ends unseen leaves the hang it is there for
            if not ending.is_set():
                leave(1, f"leaving because the launcher's store is out of reach ({type(error).__name__}: {error})")

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
                post("failure", f"rank {self.neighbour} was killed or crashed ({how})")
        if self.board.check(["failure"]):
            time.sleep(LAST_WORDS_SECONDS)
            stacks = f". {_stacks()}" if stop.is_set() else ""  # both hung, and the other was ended first
            leave(1, f"leaving because {self.board.get('failure').decode()}{stacks}")

    def _beat(self) -> None:
        self.board.set(f"alive/{self.rank}", f"{_machine()} {os.getpid()} {time.monotonic_ns()}")

    def _request_stop(self, numbers: bytes) -> None:
        names = [signal.Signals(n).name for n in numbers if n in (signal.SIGTERM, signal.SIGINT)]
        if names and not started.is_set():
            leave(1, f"{names[0]} before all ranks had started")
        if names and not stop.is_set():
            global stopped_at
            stopped_at = time.monotonic()
            self.deadline = stopped_at + self.grace_seconds
            # Something may hold the GIL for good: this timer is a C thread. It writes piece by piece, and two
            # ranks' pieces mix, so it comes second.
            faulthandler.dump_traceback_later(self.grace_seconds + 3, exit=True)
            stop.set()
            say(f"{names[0]}: ending at the next step boundary, within {self.grace_seconds:g} s")

    def _forget(self) -> None:
        """In a forked worker: it shares the pipe, and must die of the SIGTERM meant for it."""
        atexit.unregister(self.end)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return "All threads:\n" + file.read().decode().rstrip()


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


def trace_crashes() -> None:
    """From here on a fatal signal leaves the Python stacks of all threads on stderr.

    Under torchrun each line begins with the rank, by a process that stands by: it outlives the crash.
    """
    file = sys.stderr
    if "RANK" in os.environ and shutil.which("sed"):
        hint = "For C++ stacks too: run `ulimit -c unlimited`, then this again, then `gdb python CORE_FILE`."
        script = f"s/^/{_prefix()}/; $a {_prefix()}{hint}"
        file = subprocess.Popen(["sed", "-u", script], stdin=subprocess.PIPE, stdout=2, start_new_session=True).stdin
    faulthandler.enable(file)


def rank() -> int:
    """Known before `start`; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


@functools.cache
def stores() -> tuple[c10d.Store, c10d.Store]:
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


def post(key: str, text: str) -> str:
    """Write on the board unless another rank did; returns what stands there."""
    try:
        return stores()[1].compare_set(key, "", text).decode()
    except (c10d.DistError, ValueError):  # no launcher any more, or none yet: nobody reads the board
        return text


def wait_for(key: str, seconds: float) -> str | None:
    """What stands on the board under `key`, waiting for it at most so long; None if nothing."""
    end = time.monotonic() + seconds
    with contextlib.suppress(c10d.DistError, ValueError):
        while not stores()[1].check([key]):
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        return stores()[1].get(key).decode()
    return None


def say(text: str) -> None:
    """Print on stderr; under torchrun every line begins with the rank."""
    put(textwrap.indent(text, _prefix(), lambda line: True))


def _prefix() -> str:
    return f"[rank {rank()}] " if "RANK" in os.environ else ""


def announce(text: str) -> None:
    """Print on stderr, of all ranks the first alone."""
    if rank() == 0:
        put(text)


def put(text: str) -> None:
    """Print on stderr in one write, so that the lines of two ranks do not mix: print writes the newline apart."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def leave(code: int, line: str = "") -> NoReturn:
    """The one way out; the first thread to come here ends the process."""
    _leaving.acquire()
    try:
        faulthandler.dump_traceback_later(5, exit=True)  # printing into a full pipe may block
        if line:
            say(line)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
