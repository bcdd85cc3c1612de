"""Equality of two LaTeX expressions by math-verify, in a process of its own that dies when it takes too long.

math-verify's own time limit is a signal in the main thread, and sympy cannot be interrupted from another thread; so
`latex_worker.py` runs beside us and lets its own alarm kill it. It is started on the first question, used again for
every further one, replaced after a death, and ends when its input is closed, whichever way we end.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from functools import lru_cache

from engine.errors import UserError

LIMIT_S = 5.0
_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "latex_worker.py")


class Worker:
    """The parent's end. Any thread may ask; one question is under way at a time."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        self.unfinished = 0

    def ask(self, predicted: str, truth: str, limit_s: float) -> bool:
        """Whether the two are equal; False, counted in `unfinished`, if the worker ran out of time or died over them.

        A death that was not its alarm's is given a second try: it may have been a signal meant for the whole run.
        Raises UserError if math-verify cannot be imported.
        """
        with self.lock:
            for _ in range(2):
                reply = self._ask_once({"predicted": predicted, "truth": truth, "limit_s": limit_s})
                if reply is not None:
                    return reply["equal"]
                code = self._bury()
                if code == -signal.SIGALRM:
                    break
            self._count(f"comparing {predicted!r} with {truth!r} within {limit_s:g} s ended with code {code}")
            return False

    def close(self) -> None:
        """Ends the worker and waits for it. The next question starts another."""
        with self.lock:
            self._end()

    def _ask_once(self, question: dict) -> dict | None:
        try:
            if self.process is None:
                self._start()
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline() or "null")
        except BrokenPipeError:
            return None
        except BaseException:  # a Ctrl-C in between must not leave a reply for the next question to read
            self._end()
            raise

    def _start(self) -> None:
        # -P: this folder must not come first on the worker's path
        self.process = subprocess.Popen(
            [sys.executable, "-P", _SCRIPT], text=True, encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        ready = json.loads(self.process.stdout.readline() or '{"error": "the worker did not start"}')
        if ready["error"]:
            raise UserError(f"LaTeX answers need math-verify ({ready['error']}); install it: pip install math-verify.")

    def _bury(self) -> int:
        process, self.process = self.process, None
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        return process.wait()

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self._bury()

    def _count(self, event: str) -> None:
        self.unfinished += 1
        if self.unfinished == 1:
            warnings.warn(
                f"{event} and counts as different; further ones are only counted", RuntimeWarning, stacklevel=4
            )


_WORKER = Worker()
atexit.register(_WORKER.close)
stop_worker = _WORKER.close


@lru_cache(maxsize=4096)
def same_latex(predicted: str, truth: str, limit_s: float = LIMIT_S) -> bool:
    """Whether math-verify finds the two expressions equal within `limit_s`; any thread may call it.

    Running out of time is a mismatch, counted (`count_unfinished`) and warned of once per process. Raises UserError
    if math-verify is not installed.
    """
    return _WORKER.ask(predicted, truth, limit_s)


def count_unfinished() -> int:
    """How many comparisons of this process ran out of time or killed the worker."""
    return _WORKER.unfinished
