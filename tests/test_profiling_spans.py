"""The spans of a real run and of a real Log, as profiling/ reads them back, and what one costs."""

import contextlib
import json
import os
import subprocess
import threading
import time

import pytest
import torch
from summary import STEP, UNATTRIBUTED, summarize
from traces import Range, Trace, read_kineto, steps_of

from engine.config import Config
from engine.log import Log
from engine.model import export_model, load_model, load_tokenizer
from tests.captures import ROOT
from tests.warm import command

RANGES = """
import collections, json, sys, threading, time

sys.path.insert(0, {root!r})
import train
from engine import dist, metrics

class Nvtx:
    def __init__(self):
        self.rows, self.open = [], collections.defaultdict(list)

    def push_range(self, verb, domain, payload):
        self.open[threading.get_ident()].append(((verb, payload), time.perf_counter_ns()))

    def pop_range(self, domain):
        thread = threading.get_ident()
        (verb, step), start = self.open[thread].pop()
        self.rows.append([verb, start, time.perf_counter_ns(), (1, thread), step])

def main():
    metrics.NVTX = recorder = Nvtx()
    code = train.main()
    json.dump(recorder.rows, open({out!r}, "w"))
    return code

dist.run(main)
"""


@pytest.mark.parametrize(
    "algo, first, synced",
    [("grpo", "rollout", [0, 1]), ("sft", "update", [0, 1, 2])],
    ids=["grpo", "sft"],
)
def test_steps_of_a_real_run(tmp_path, algo, first, synced):
    """Ranges as train.py gives them to nvtx, of two steps with an evaluation before, between and after them."""
    export_model(load_model("tiny", 0, torch.float32), load_tokenizer("tiny"), tmp_path / "model")
    (tmp_path / "run.py").write_text(RANGES.format(root=str(ROOT), out=str(tmp_path / "ranges.json")))
    given = f"--algo {algo} --model {tmp_path}/model --out {tmp_path} --steps 2 --eval_every 1 --eval_size 2"
    small = "--max_new_tokens 32 --tensorboard false --device cpu --threads 1 --kernels eager"
    small += " --prompts_per_step 2 --group_size 2 --updates_per_rollout 2" if algo == "grpo" else ""
    words = command(tmp_path / "run.py", *given.split(), *small.split())
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    ranges = [Range(*row[:3], tuple(row[3]), row[4]) for row in json.loads((tmp_path / "ranges.json").read_text())]
    assert [r.step for r in ranges if r.name == "weight_sync"] == synced
    steps = steps_of(ranges)
    begin = {r.step: r.start for r in ranges if r.name == first}
    last = max(r.end for r in ranges if r.step == 1 and r.name != "evaluate")
    assert steps == {0: (begin[0], begin[1]), 1: (begin[1], last)}
    rows = summarize(Trace("nsys", ranges, steps=steps, stepper=ranges[0].thread)).rows
    scored = {"logp_old": 2, "reference": 2} if algo == "grpo" else {}
    assert {name: rows[name].calls for name in ("logp_old", "reference") if name in rows} == scored
    assert {rows[name].within for name in (*scored, "forward", "backward", "optimizer")} == {"update"}


def test_a_real_trace_of_two_threads(tmp_path):
    """Log.span and Log.profile as train.py uses them, a second thread beside; and what torch wrote, read back."""
    path = tmp_path / "trace.json.gz"
    log = Log(Config(profile_steps="1:3", profile_trace=str(path), tensorboard=False), tmp_path, 0, False)
    x, begun, proceed = torch.randn(64, 64, requires_grad=True), threading.Event(), threading.Event()

    def side():
        begun.set()
        proceed.wait()  # a thread that was there before the profiler
        with log.span("rollout", 2):
            x.detach() @ x.detach()

    thread = threading.Thread(target=side)
    thread.start()
    begun.wait()
    for step in range(4):
        log.profile(step)
        if step == 2:
            proceed.set()
            thread.join()
        with log.span("update", step):
            with log.span("forward", step):
                loss = (x @ x).sum()
            with log.span("backward", step):
                loss.backward()
    assert path.exists() and not log.trace
    s = summarize(read_kineto([path]))
    assert list(s.trace.steps) == [1, 2]
    calls = {name: row.calls for name, row in s.rows.items() if name != UNATTRIBUTED}
    rests = {"rest of update": 2, "rest of step": 2}
    assert calls == {STEP: 2, "rollout": 1, "update": 2, "forward": 2, "backward": 2} | rests
    for step in (1, 2):
        host = {name: row.by_step["host"][step] for name, row in s.rows.items()}
        assert host["update"] == host["forward"] + host["backward"] + host["rest of update"]
        assert host[STEP] == host["update"] + host["rest of step"] > host["update"]
    assert dict(s.rows["update"].by_step["host"]).keys() == {1, 2} and s.rows["rollout"].by_step["host"].keys() == {2}
    assert s.rows["forward"].counts["aten::mm"] == 2 and s.rows["rollout"].counts["aten::mm"] == 1
    assert s.rows["backward"].counts["aten::mm"] == 4 and len({r.thread for r in s.trace.ranges}) == 2
    assert s.rows["update"].work >= s.rows["forward"].work + s.rows["backward"].work > 0


@pytest.mark.alone
def test_a_span_costs_little_without_a_profiler(tmp_path):
    """In units of an empty context manager in Python, which is most of it; record_function alone would be ten."""
    log = Log(Config(tensorboard=False), tmp_path, 0, False)

    @contextlib.contextmanager
    def empty():
        yield

    def cost(enter) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            for _ in range(2000):
                with enter():
                    pass
            times.append(time.perf_counter() - start)
        return min(times)

    assert cost(lambda: log.span("forward", 3)) < 6 * cost(empty)
