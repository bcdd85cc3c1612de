"""The worker behind `latex.py`, run as a script: JSON questions on stdin, JSON replies on stdout, one per line.

Its alarm is left at the default action, so that the kernel ends it even in the midst of a long multiplication.
"""

import json
import logging
import os
import resource
import signal
import sys

START_LIMIT_S = 120.0
MEMORY_LIMIT = 4 << 30


def guard() -> None:
    """Makes sure that this process ends: by its alarm, by its memory limit, but not by a Ctrl-C meant for the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT_S)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def serve() -> None:
    """Answers questions until stdin is closed."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, sys.stdout.fileno())
    os.dup2(silence, sys.stderr.fileno())
    logging.disable(logging.CRITICAL)
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        replies.write(json.dumps({"error": str(error)}) + "\n")
        return

    def read(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)

    replies.write(json.dumps({"error": None}) + "\n")
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question["limit_s"])
        equal = verify(read(question["truth"]), read(question["predicted"]), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps({"equal": bool(equal)}) + "\n")


if __name__ == "__main__":
    guard()
    serve()
