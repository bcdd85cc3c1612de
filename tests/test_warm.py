"""warm.py: a command reads, says and ends what it does with a Python of its own."""

import os
import signal
import subprocess
import sys

import pytest

from tests.warm import python

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "/somewhere", "OF_THIS_TEST": "yes"}
SAYS = """
import atexit, os, sys
print(__name__, sys.argv, sys.path[0] or os.getcwd(), "/somewhere" in sys.path[:2], os.getcwd(), sys.stdin.read())
print(os.environ["OF_THIS_TEST"], sys.stdout.line_buffering, sys.stdout.write_through)
atexit.register(print, "the end")
"""


ENDINGS = [
    "",
    "sys.exit(3)",
    "sys.exit('no')",
    "1 / 0",
    "os._exit(4)",
    *(f"os.kill(os.getpid(), {n})" for n in (9, 15)),
]
CASES = [("program.py", ending) for ending in ENDINGS] + [(how, "sys.exit(3)") for how in ("-c", "-m", "-u")]


@pytest.mark.parametrize("how, ending", CASES)
def test_a_command_ends_as_with_a_python_of_its_own(tmp_path, how, ending):
    (tmp_path / "program.py").write_text(SAYS + ending)
    words = {"-c": ["-c", SAYS + ending], "-m": ["-m", "program"], "-u": ["-u", "program.py"]}.get(how, [how])
    cold, warm = (
        subprocess.run([*start, *words, "a b", "-c"], cwd=tmp_path, env=ENV, input="in", capture_output=True, text=True)
        for start in ([sys.executable], python())
    )
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_reaches_the_command(number):
    # Naps, for a sleep does not hear a signal that came just before it.
    naps = "import time; print('up', flush=True)\nfor _ in range(600): time.sleep(0.1)"
    words = [*python(), "-c", naps]
    process = subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    process.communicate(timeout=20)  # ends when nobody holds the pipe, the command's process neither
    assert process.returncode == -number


def test_what_imports_have_read_cannot_be_set_any_more():
    if python() == [sys.executable]:
        pytest.skip("commands start cold here")
    done = subprocess.run([*python(), "-c", ""], env=ENV | {"OMP_NUM_THREADS": "7"}, capture_output=True, text=True)
    assert done.returncode == 1 and "OMP_NUM_THREADS" in done.stderr and "sys.executable" in done.stderr
