"""Real processes: every way a run can end, with one rank and with two. Times are from the failure to the last exit."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine import dist
from engine.errors import UserError
from tests.warm import command

ROOT = Path(__file__).parent.parent
SCRIPT = """
import ctypes, os, signal, sys, threading, time
import torch
from engine import dist, watch
from engine.errors import UserError

kind, rank = sys.argv[1], int(os.environ.get("RANK", 0))

def fail(action):
    if rank == world.world_size - 1:
        print(f"failing at {time.time()}", flush=True)
        action()

def crash():
    threading.Thread(target=wait_on_the_side, daemon=True).start()
    ctypes.string_at(0)

def wait_on_the_side():
    time.sleep(60)

def main():
    global world
    if kind == "early":
        raise UserError("3 prompts do not divide by 2.")
    if kind == "crash_early" and rank == 1:
        crash()
    world = dist.start("cpu", grace_seconds=2 if kind.startswith("hang") else 20)
    last, n = world.world_size - 1, world.world_size
    os.write(1, f"pid {os.getpid()}\\n".encode())  # in one piece
    assert dist.all_sum([0.1, rank]) == [sum([0.1] * n), sum(range(n))]
    assert dist.all_max(torch.tensor([rank], dtype=torch.float64)).tolist() == [last]
    if kind.startswith("slow") and rank == last:
        ctypes.PyDLL(None).usleep(1_600_000)  # a PyDLL call holds the GIL
    if kind == "normal":
        assert dist.start("cpu") is world and dist.gather(rank) == list(range(n))
        child = os.fork()
        if not child:
            time.sleep(60)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)  # a forked worker: its own death, not our stop
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        time.sleep(0.1)
        assert not dist.stop_requested()
    if kind == "raise":
        fail(lambda: {}["lost key"])
    if kind.startswith("kill"):
        fail(lambda: os.kill(os.getpid(), signal.SIGKILL))
    if kind == "crash_all":
        crash()
    if kind == "crash":
        fail(crash)
    if kind == "kill_remote":
        time.sleep(60)
    if kind == "refuse_last":
        fail(lambda: (_ for _ in ()).throw(UserError("row 7 has no answer.")))
    if kind == "loop":
        while not dist.all_sum([dist.stop_requested()])[0]:
            time.sleep(0.02)
        print("saved", flush=True)
        return 0
    if kind == "hang":
        time.sleep(60)
    if kind == "hang_hard":
        time.sleep(1)  # the signal comes, then the GIL goes
        ctypes.PyDLL(None).usleep(60_000_000)
    dist.barrier()
    if kind.startswith("slow") and rank == last:
        barrier, watch.LAST_WORDS_SECONDS = dist.barrier, 0
        dist.barrier = lambda: (barrier(), time.sleep(1.6))  # the last one: the others are gone by then
    print(f"ended {rank}", flush=True)

if kind.endswith("remote"):  # as if every rank had a machine of its own: only pulses tell
    watch._machine = lambda: f"machine-{rank}"
    watch.SILENT_LOOKS = 6
dist.run(main)
"""
STACKS = ("wait_on_the_side", "string_at", "crash", "main")


def spawn(tmp_path: Path, script: str, *args: str, ranks: int, cold: bool = False) -> subprocess.Popen:
    """Start `script` under torchrun, or in plain python for `ranks=0`; stdout and stderr in one pipe."""
    path = tmp_path / "script.py"
    path.write_text(script)
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        command(path, *args, ranks=ranks, cold=cold, meet=()),
        env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(tmp_path: Path, script: str, *args: str, ranks: int) -> tuple[int, str, float]:
    """(exit code, output, seconds since the script printed "failing at")."""
    process = spawn(tmp_path, script, *args, ranks=ranks)
    output, _ = process.communicate(timeout=60)
    failed = re.search(r"failing at ([\d.]+)", output)
    return process.returncode, output, time.time() - float(failed[1]) if failed else 0.0


def signalled(tmp_path: Path, kind: str, *, ranks: int, launcher: bool = False) -> tuple[int, str, float]:
    """As `launch`, with SIGTERM to one rank, or to the launcher, once all have started; seconds since then."""
    process = spawn(tmp_path, SCRIPT, kind, ranks=ranks, cold=launcher)
    first = [process.stdout.readline() for _ in range(max(ranks, 1))]
    sent = time.time()
    os.kill(process.pid if launcher else int(first[0].removeprefix("pid ")), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output, time.time() - sent


@pytest.mark.parametrize("kind, ranks", [("normal", 0), ("normal", 2), ("slow", 2), ("slow_remote", 2)])
def test_a_normal_end_exits_0_though_a_rank_is_slow(tmp_path, kind, ranks):
    code, output, _ = launch(tmp_path, SCRIPT, kind, ranks=ranks)
    assert code == 0, output
    assert all(f"ended {rank}" in output for rank in range(ranks)) and "Traceback" not in output


@pytest.mark.parametrize("ranks", [0, 2])
def test_an_exception_ends_all_ranks_with_its_traceback(tmp_path, ranks):
    code, output, seconds = launch(tmp_path, SCRIPT, "raise", ranks=ranks)
    assert code != 0 and seconds < 15
    prefix = r"\[rank 1\] " if ranks else ""
    for line in ("Traceback", "KeyError: 'lost key'"):
        assert re.search(f"^{prefix}{line}", output, re.M), output
    assert not ranks or "[rank 0] leaving because rank 1 failed: KeyError: 'lost key'" in output


@pytest.mark.parametrize("kind, how", [("kill", "its process is gone"), ("kill_remote", "silent for 3 s")])
def test_a_killed_rank_is_named_by_the_others(tmp_path, kind, how):
    code, output, seconds = launch(tmp_path, SCRIPT, kind, ranks=2)
    assert code != 0 and seconds < 15
    assert f"[rank 0] leaving because rank 1 was killed or crashed ({how})" in output, output


@pytest.mark.parametrize(
    "kind, ranks, crashed", [("crash", 2, [1]), ("crash_all", 2, [0, 1]), ("crash_early", 2, [1]), ("crash", 0, [""])]
)
def test_a_crashed_rank_leaves_the_stacks_of_all_its_threads(tmp_path, kind, ranks, crashed):
    """Each line with its rank, whole, whatever else is left to speak."""
    code, output, _ = launch(tmp_path, SCRIPT, kind, ranks=ranks)
    assert code == (1 if ranks else -signal.SIGSEGV), output
    for rank in crashed:
        prefix = rf"\[rank {rank}\] " if ranks else ""
        for line in ("Fatal Python error: Segmentation fault", *(rf'  File ".*", line \d+ in {f}' for f in STACKS)):
            assert re.search(f"^{prefix}{line}$", output, re.M), (line, output)
        assert not ranks or f"[rank {rank}] For C++ stacks too: run `ulimit" in output, output


def test_a_crash_while_modules_are_imported_leaves_its_stack(tmp_path):
    script = "import ctypes, engine\nctypes.string_at(0)"
    (tmp_path / "script.py").write_text(script)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONFAULTHANDLER"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "script.py"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGSEGV and 'script.py", line 2 in <module>' in done.stderr, done.stderr


@pytest.mark.parametrize("kind, ranks", [("early", 2), ("early", 0)])
def test_a_user_error_is_one_sentence_said_once(tmp_path, kind, ranks):
    code, output, _ = launch(tmp_path, SCRIPT, kind, ranks=ranks)
    assert code == (1 if ranks else 2)  # torchrun turns every failure into 1
    assert re.findall(r".*error: 3 prompts.*", output) == ["error: 3 prompts do not divide by 2."]
    assert "script.py" not in re.sub(r"script.py FAILED", "", output)


def test_a_user_error_of_one_rank_is_said_with_its_rank(tmp_path):
    code, output, seconds = launch(tmp_path, SCRIPT, "refuse_last", ranks=2)
    assert code != 0 and seconds < 15
    assert re.findall(r".*error: row 7.*", output) == ["[rank 1] error: row 7 has no answer."]
    assert "[rank 0] leaving because rank 1 refused: row 7 has no answer." in output


@pytest.mark.parametrize("ranks", [0, 2])
def test_sigterm_to_one_rank_ends_the_loop_cleanly(tmp_path, ranks):
    code, output, seconds = signalled(tmp_path, "loop", ranks=ranks)
    assert code == 0 and output.count("saved") == max(ranks, 1) and seconds < 15, output


def test_a_loop_that_ignores_sigterm_is_ended_with_its_stacks(tmp_path):
    code, output, seconds = signalled(tmp_path, "hang", ranks=2, launcher=True)
    assert code != 0 and 2 <= seconds < 15
    for rank in (0, 1):
        assert re.search(rf'^\[rank {rank}\]   File ".*script.py", line \d+ in main', output, re.M), output


def test_a_loop_that_holds_the_gil_is_ended_too(tmp_path):
    code, output, seconds = signalled(tmp_path, "hang_hard", ranks=0)
    assert code != 0 and 5 <= seconds < 15
    assert re.search(r'script.py", line \d+ in main', output), output


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}])
def test_on_a_gpu_memory_comes_in_segments_that_grow_unless_the_user_says_otherwise(monkeypatch, own):
    """Set before CUDA is touched."""

    class Touched(Exception):
        pass

    def touch(rank):
        raise Touched

    environment = dict(own)
    monkeypatch.setattr(dist.os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", touch)
    with pytest.raises(Touched):
        dist.start("cuda")
    assert environment == (own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


ENVIRONMENT = "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500"
LAUNCHED = dict(setting.split("=") for setting in ENVIRONMENT.split())


@pytest.mark.parametrize(
    "environment, known",
    [
        ({}, (0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),
        (LAUNCHED, (1, 2)),
        (LAUNCHED | {"SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        ({k: v for k, v in LAUNCHED.items() if k != "LOCAL_WORLD_SIZE"}, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, (0, 1)),
    ],
)
def test_the_rank_is_read_from_the_environment(monkeypatch, environment, known):
    monkeypatch.setattr(dist.os, "environ", environment)
    assert dist.launch() == known


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE must be a whole number, not 'many'"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS is 4, but RANK is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (LAUNCHED | {"MASTER_ADDR": ""}, "RANK is set, but not MASTER_ADDR"),
        ({k: v for k, v in LAUNCHED.items() if k != "LOCAL_RANK"}, "RANK is set, but not LOCAL_RANK"),
        (LAUNCHED | {"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
        (LAUNCHED | {"RANK": "-1"}, "RANK must be a whole number, not '-1'"),
        (LAUNCHED | {"RANK": ""}, "RANK must be a whole number, not ''"),
        (LAUNCHED | {"LOCAL_RANK": "2"}, "LOCAL_RANK 2 is not below LOCAL_WORLD_SIZE 2"),
        (LAUNCHED | {"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number, not 'http'"),
        (LAUNCHED | {"MASTER_PORT": "70000"}, "MASTER_PORT must be in 1 to 65535, not 70000"),
    ],
)
def test_half_an_environment_is_refused_with_what_to_do(monkeypatch, environment, words):
    monkeypatch.setattr(dist.os, "environ", environment)
    with pytest.raises(UserError) as caught:
        dist.launch()
    assert str(caught.value).startswith(words) and re.search("torchrun.*[.]$", str(caught.value))


def test_a_local_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    environment = {k: v for k, v in LAUNCHED.items() if k != "LOCAL_WORLD_SIZE"}
    monkeypatch.setattr(dist.os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes were started on a machine with 1 GPUs"):
        dist.start("cuda")


def test_half_an_environment_ends_a_program_before_it_waits_for_anyone(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHED} | {"RANK": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", "normal"], env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with")
