"""profiling/: interval arithmetic against tick-by-tick counting, readers on captures of known answers, the report."""

import ast
import csv
import gzip
import json
import os
import random
import runpy
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "profiling"))

import ncu  # noqa: E402
import page  # noqa: E402
import report as reporting  # noqa: E402
import sections  # noqa: E402
import timeline  # noqa: E402
from intervals import busy_and_overlap, containing, intersect, length, union  # noqa: E402
from summary import STEP, UNATTRIBUTED, attribute, changes_of, spread_of, summarize  # noqa: E402
from traces import BadInput, Range, Trace, Work, read_kineto, read_nsys, steps_of  # noqa: E402

TICKS = 40
RANGES = """
import collections, json, sys, threading, time

sys.path.insert(0, {root!r})
import train
from engine import dist, log

class Domain:
    def __init__(self):
        self.rows, self.open = [], collections.defaultdict(list)

    def get_event_attributes(self, verb, payload):
        return verb, payload

    def push_range(self, attributes):
        self.open[threading.get_ident()].append((attributes, time.perf_counter_ns()))

    def pop_range(self):
        thread = threading.get_ident()
        (verb, step), start = self.open[thread].pop()
        self.rows.append([verb, start, time.perf_counter_ns(), (1, thread), step])

def main():
    log.DOMAIN = Domain()
    code = train.main()
    json.dump(log.DOMAIN.rows, open({out!r}, "w"))
    return code

dist.run(main)
"""


def report(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "profiling/report.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


# intervals


def some(generator: random.Random) -> list[tuple[int, int]]:
    """Up to eight intervals on 0..TICKS, empty and touching ones too."""
    return [tuple(sorted(generator.choices(range(TICKS), k=2))) for _ in range(generator.randrange(8))]


def ticks(intervals) -> set[int]:
    intervals = list(intervals)
    return {t for t in range(TICKS) if any(start <= t < end for start, end in intervals)}


@pytest.mark.parametrize("seed", range(200))
def test_arithmetic_agrees_with_counting_ticks(seed):
    generator = random.Random(seed)
    lanes = [some(generator) for _ in range(generator.randrange(5))]
    a, b = some(generator), some(generator)
    assert ticks(union(a)) == ticks(a) and length(union(a)) == len(ticks(a))
    assert all(x[1] < y[0] for x, y in zip(union(a), union(a)[1:])), "disjoint, sorted and not touching"
    assert ticks(intersect(union(a), union(b))) == ticks(a) & ticks(b)
    assert length(intersect(union(a), union(b))) == len(ticks(a) & ticks(b))
    active = [sum(t in ticks(lane) for lane in lanes) for t in range(TICKS)]
    assert busy_and_overlap(lanes) == (sum(n >= 1 for n in active), sum(n >= 2 for n in active))
    for inner, found in zip(b, containing(a, b)):
        assert sorted(found) == [i for i, x in enumerate(a) if x[0] <= inner[0] and inner[1] <= x[1]]
        assert [a[i] for i in found] == sorted((a[i] for i in found), key=lambda x: (x[0], -x[1])), "outermost first"


@pytest.mark.parametrize("seed", range(30))
def test_rows_agree_with_counting_ticks(seed):
    """host, work, projected and gaps of random nested ranges on two threads whose work runs on three streams."""
    generator = random.Random(seed)
    ranges = []
    for thread in ((1, 1), (1, 2)):
        for base in (0, 20):
            outer = sorted(generator.sample(range(base, base + 19), 2))
            inner = sorted(generator.choices(range(outer[0], outer[1] + 1), k=2))
            ranges += [Range("update", *outer, thread), Range("forward", *inner, thread)]
    works = []
    for i in range(12):
        at, start = generator.randrange(TICKS), generator.randrange(TICKS - 5)
        end, thread = start + generator.randrange(1, 5), (1, generator.randrange(1, 4))
        stream = f"stream {generator.randrange(3)}"
        works.append(Work(f"k{i % 3}", start, end, "GPU 0", stream, "kernel", end - start, thread, (at, at), (1, i)))
    rows = summarize(Trace("nsys", ranges, works)).rows
    inside = lambda r, w: r.thread == w.thread and r.start <= w.launched[0] and w.launched[1] <= r.end
    for name in ("update", "forward"):
        same = [r for r in ranges if r.name == name]
        held = [[w for w in works if inside(r, w)] for r in same]
        projected = [max(w.end for w in ws) - min(w.start for w in ws) for ws in held if ws]
        assert rows[name].calls == len(same) and rows[name].host == sum(r.end - r.start for r in same)
        assert rows[name].work == sum(w.end - w.start for ws in held for w in ws)
        assert rows[name].projected == sum(projected)
        assert rows[name].gaps == sum(projected) - sum(len(ticks((w.start, w.end) for w in ws)) for ws in held)
    free = [w for w in works if not any(inside(r, w) for r in ranges)]
    assert rows[UNATTRIBUTED].work == sum(w.end - w.start for w in free)


def test_spread():
    assert spread_of([]) is spread_of([3.0]) is None
    assert spread_of([1, 9, 4]) == 8, "few steps: largest minus smallest"
    assert spread_of([100, 1, 2, 3, 4]) == 4 - 2, "from five on: 80th minus 20th percentile"


# Nsight Systems

PID, MAIN, AUTOGRAD, SIDE = 7 << 24, (7 << 24) | 7, (7 << 24) | 8, (7 << 24) | 9
TABLES = {
    "StringIds": "id value",
    "NVTX_EVENTS": "start end eventType rangeId category color text globalTid endGlobalTid textId domainId uint64Value "
    "int64Value doubleValue uint32Value int32Value floatValue jsonTextId jsonText",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start end eventClass globalTid correlationId nameId returnValue",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start end deviceId contextId streamId correlationId globalPid demangledName "
    "shortName mangledName registersPerThread gridX gridY gridZ blockX blockY blockZ localMemoryPerThread graphNodeId",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "start end deviceId contextId streamId correlationId globalPid bytes copyKind",
    "CUPTI_ACTIVITY_KIND_MEMSET": "start end deviceId contextId streamId correlationId globalPid bytes value",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "start end deviceId contextId streamId correlationId globalPid graphId "
    "graphExecId",
    "TARGET_INFO_GPU": "id name",
}


def nsys(path: Path, rows: dict[str, list[dict]]) -> Path:
    """An export with these rows; as in a real one, a table without rows is absent."""
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        for table, found in rows.items():
            columns = TABLES[table].split()
            database.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
            cells = [[row.get(column) for column in columns] for row in found]
            database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", cells)
    database.close()
    return path


def nvtx(name, start, end, thread=MAIN, step=None, domain=1, kind=59) -> dict:
    """A range; a name that is a number is an id into StringIds."""
    named = {"textId": name} if isinstance(name, int) else {"text": name}
    return dict(start=start, end=end, eventType=kind, globalTid=thread, domainId=domain, int64Value=step, **named)


def launch(call, at, thread=MAIN) -> dict:
    return dict(start=at, end=at + 1, eventClass=0, globalTid=thread, correlationId=call, nameId=1)


def kernel(call, start, end, name=20, device=0, stream=7, **more) -> dict:
    return dict(start=start, end=end, deviceId=device, contextId=1, streamId=stream, correlationId=call, globalPid=PID,
                demangledName=name, shortName=name, mangledName=name, registersPerThread=32, **more)  # fmt: skip


def two_steps(scale: int = 1, late: int = 0) -> dict[str, list[dict]]:
    """Steps 3 and 4, each: rollout [0, 100), update [100, 300) with forward [110, 150) and backward [150, 250).

    Kernels of the update last `scale` times as long; step 4 is `late` ns longer. Backward's come from another thread.
    """
    ranges, calls, kernels = [dict(start=0, eventType=75, text="train", globalTid=MAIN, domainId=1)], [], []
    for step, base in ((3, 1000), (4, 1400)):
        more = late * (step == 4)
        ranges += [
            nvtx("rollout", base, base + 100, step=step), nvtx(10, base + 100, base + 300 + more, step=step),
            nvtx(11, base + 110, base + 150, step=step), nvtx("backward", base + 150, base + 250, step=step),
        ]  # fmt: skip
        for i, (at, start, long, name, thread, stream) in enumerate([
            (10, 20, 30, 20, MAIN, 7), (40, 60, 40, 21, MAIN, 7),  # rollout: [20, 50) and [60, 100)
            (120, 130, 20 * scale, 22, MAIN, 7), (130, 140, 10 * scale, 23, MAIN, 8),  # forward, on two streams
            (160, 200, 40 * scale, 22, AUTOGRAD, 7), (270, 290, 5, 23, AUTOGRAD, 7),  # in backward, and after it
        ]):  # fmt: skip
            calls.append(launch(step * 10 + i, base + at, thread))
            kernels.append(
                kernel(step * 10 + i, base + start, base + start + long + more * (i == 4), name, stream=stream)
            )
    names = {1: "cudaLaunchKernel", 10: "update", 11: "forward", 20: "decode", 21: "sample", 22: "gemm", 23: "norm"}
    return {
        "StringIds": [dict(id=i, value=name) for i, name in names.items()], "NVTX_EVENTS": ranges,
        "CUPTI_ACTIVITY_KIND_RUNTIME": calls, "CUPTI_ACTIVITY_KIND_KERNEL": kernels,
        "TARGET_INFO_GPU": [dict(id=0, name="NVIDIA H100")],
    }  # fmt: skip


def test_nsys_known_answers(tmp_path):
    trace = read_nsys(nsys(tmp_path / "a.sqlite", two_steps()))
    s = summarize(trace)
    assert trace.device == "NVIDIA H100" and trace.on_gpu
    assert trace.steps == {3: (1000, 1400), 4: (1400, 1700)}
    facts = {n: (r.calls, r.host, r.work, r.projected, r.gaps, r.works, r.launches) for n, r in s.rows.items()}
    assert facts == {
        STEP: (2, 700, 2 * 145, 2 * 275, 2 * (275 - 30 - 40 - 20 - 40 - 5), 12, 12),
        "rollout": (2, 200, 140, 160, 20, 4, 4),
        "update": (2, 400, 2 * 70, 2 * 110, 2 * 50, 6, 6),
        "forward": (2, 80, 60, 40, 0, 4, 4),
        "backward": (2, 200, 80, 80, 0, 2, 2),
        UNATTRIBUTED: (0, 0, 10, 405, 395, 2, 2),
    }
    assert [row.depth for row in s.rows.values()] == [0, 0, 0, 1, 1, 0]
    assert s.rows["backward"].by_time == s.rows["update"].by_time == 80, "autograd's thread: placed by time"
    assert s.rows["forward"].top == {"gemm": 40, "norm": 20} and s.rows["forward"].registers == 32
    (use,) = s.uses
    assert (use.device, use.span, use.busy, use.overlap, use.lanes, use.both) == ("GPU 0", 700, 2 * 135, 2 * 10, 2, 0)


@pytest.mark.parametrize("ahead, end", [(1, 1700), (0, 1710)])
def test_new_weights_begin_no_step(tmp_path, ahead, end):
    """They end the step whose number they carry; captures before this gave them the next step's."""
    rows = two_steps()
    for step, at in ((3, 1300), (4, 1700)):
        rows["NVTX_EVENTS"].append(nvtx("weight_sync", at, at + 10, step=step + ahead))
    trace = read_nsys(nsys(tmp_path / "a.sqlite", rows))
    assert trace.steps == {3: (1000, 1400), 4: (1400, end)}
    assert summarize(trace).rows[STEP].by_step["host"] == {3: 400, 4: end - 1400}


def test_weights_for_an_evaluation_begin_no_step(tmp_path):
    """As in SFT: they and the evaluation lie before the step whose number they carry, and after the last one."""
    rows = two_steps()
    for step, at in ((3, 900), (4, 1310), (5, 1710)):
        rows["NVTX_EVENTS"] += [
            nvtx("weight_sync", at, at + 10, step=step), nvtx("evaluate", at + 20, at + 70, step=step)
        ]  # fmt: skip
    assert read_nsys(nsys(tmp_path / "a.sqlite", rows)).steps == {3: (1000, 1400), 4: (1400, 1700)}


@pytest.mark.parametrize(
    "algo, first, synced", [("grpo", "rollout", [0, 1, 2]), ("sft", "update", [0, 1, 2, 2])], ids=["grpo", "sft"]
)
def test_steps_of_a_real_run(tmp_path, algo, first, synced):
    """Ranges as train.py gives them to nvtx, of two steps with an evaluation before, between and after them."""
    import torch

    from engine.model import export_model, load_model, load_tokenizer

    export_model(load_model("tiny", 0, torch.float32), load_tokenizer("tiny"), tmp_path / "model")
    (tmp_path / "run.py").write_text(RANGES.format(root=str(ROOT), out=str(tmp_path / "ranges.json")))
    given = (
        f"--algo {algo} --model {tmp_path}/model --out {tmp_path} --steps 2 --eval_every 1 --eval_size 2 --threads 1"
    )
    small = "--max_new_tokens 8 --tensorboard false --device cpu --kernels eager"
    small += " --prompts_per_step 2 --group_size 2" if algo == "grpo" else ""
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


def test_autograd_work_is_placed_by_time_only_where_that_is_sound(tmp_path):
    rows = two_steps()
    rows["NVTX_EVENTS"].append(nvtx("backward", 1140, 1200, SIDE))
    s = summarize(read_nsys(nsys(tmp_path / "a.sqlite", rows)))
    assert s.rows["backward"].work == 40, "two backwards at once: nobody's"
    rows["NVTX_EVENTS"].append(nvtx("reward", 5000, 5001, AUTOGRAD))
    s = summarize(read_nsys(nsys(tmp_path / "b.sqlite", rows)))
    assert s.rows["backward"].work == 0, "a thread with ranges of its own is not autograd's"


def test_rollout_beside_update_on_two_threads(tmp_path):
    rows = two_steps()
    rows["NVTX_EVENTS"].append(nvtx("rollout", 1100, 1300, SIDE, step=4, kind=60))
    rows["CUPTI_ACTIVITY_KIND_RUNTIME"].append(launch(900, 1120, SIDE))
    rows["CUPTI_ACTIVITY_KIND_KERNEL"].append(kernel(900, 1145, 1210, stream=30))
    s = summarize(read_nsys(nsys(tmp_path / "a.sqlite", rows)))
    assert s.uses[0].both == 5 + 10, "[1145, 1150) of forward and [1200, 1210) of backward"
    assert s.rows["rollout"].calls == 3 and s.trace.steps == {3: (1000, 1400), 4: (1400, 1700)}


def test_two_devices_and_copies(tmp_path):
    rows = two_steps()
    for k in rows["CUPTI_ACTIVITY_KIND_KERNEL"][6:]:
        k["deviceId"] = 1
    copy = dict(start=1005, end=1015, deviceId=0, streamId=9, correlationId=901, globalPid=PID, copyKind=1)
    rows["CUPTI_ACTIVITY_KIND_MEMCPY"] = [copy]
    rows["CUPTI_ACTIVITY_KIND_MEMSET"] = [dict(copy, start=1015, end=1016, correlationId=902)]
    rows["CUPTI_ACTIVITY_KIND_RUNTIME"] += [launch(901, 1002), launch(902, 1003)]
    s = summarize(read_nsys(nsys(tmp_path / "a.sqlite", rows)))
    assert [(use.device, use.busy) for use in s.uses] == [("GPU 0", 135 + 11), ("GPU 1", 135)]
    assert s.rows["rollout"].top["copy to the GPU"] == 10 and s.rows["rollout"].top["memset"] == 1


def test_cuda_graphs(tmp_path):
    """One call launches all kernels of a graph; without node rows the graph itself is the work."""
    strings = [dict(id=20, value="decode")]
    base = {"StringIds": strings, "NVTX_EVENTS": [nvtx("rollout", 0, 100, domain=None)],
            "CUPTI_ACTIVITY_KIND_RUNTIME": [launch(1, 10)]}  # fmt: skip
    nodes = {"CUPTI_ACTIVITY_KIND_KERNEL": [kernel(1, 20 + i, 21 + i, graphNodeId=i) for i in range(5)]}
    row = summarize(read_nsys(nsys(tmp_path / "nodes.sqlite", base | nodes))).rows["rollout"]
    assert (row.works, row.launches, row.work) == (5, 1, 5)
    graph = dict(start=20, end=30, deviceId=0, streamId=7, correlationId=1, globalPid=PID, graphId=4, graphExecId=5)
    trace = read_nsys(nsys(tmp_path / "graph.sqlite", base | {"CUPTI_ACTIVITY_KIND_GRAPH_TRACE": [graph]}))
    row = summarize(trace).rows["rollout"]
    assert (row.works, row.launches, row.work, dict(row.top)) == (1, 1, 10, {"CUDA graph 4": 10})
    assert any("--graph-nodes" in note for note in trace.notes)
    both = read_nsys(nsys(tmp_path / "both.sqlite", base | nodes | {"CUPTI_ACTIVITY_KIND_GRAPH_TRACE": [graph]}))
    assert summarize(both).rows["rollout"].work == 5, "a graph is not counted beside its own kernels"


def test_names_and_domains(tmp_path):
    """Registered or plain text, 59 or 60; other domains' names are other ranges; a domain announced twice is one."""
    domains = [(1, "train"), (2, "nccl"), (3, "train")]
    events = [dict(start=0, eventType=75, text=name, globalTid=MAIN, domainId=i) for i, name in domains]
    events += [dict(events[0]), nvtx("update", 0, 10), nvtx(5, 20, 30, kind=60), nvtx(5, 40, 50, domain=3)]
    events += [nvtx("update", 60, 70, domain=2), nvtx("update", 80, 90, domain=0), nvtx("update", 95, None)]
    events += [dict(start=1, end=None, eventType=34, text="mark", globalTid=MAIN, domainId=1)]
    trace = read_nsys(nsys(tmp_path / "a.sqlite", {"NVTX_EVENTS": events, "StringIds": [dict(id=5, value="update")]}))
    rows = summarize(trace).rows
    assert {name: row.calls for name, row in rows.items()} == {"update": 3, "nccl/update": 1, "default/update": 1}
    assert any("1 ranges were still open" in note for note in trace.notes)
    assert any("No GPU work" in note for note in trace.notes) and not trace.on_gpu


def test_a_capture_without_ranges_says_why(tmp_path):
    """nsys 2022.4 beside nvtx 0.2.17 records the domain and, as a message, why there is no range."""
    domain = dict(start=0, eventType=75, text="train", globalTid=MAIN, domainId=1)
    (silent,) = read_nsys(nsys(tmp_path / "a.sqlite", {"NVTX_EVENTS": [domain]})).notes[:1]
    assert silent.startswith("No NVTX range was recorded") and silent.endswith("use a newer nsys.")
    line = "NVTX binary payload extension is incompatible. Provided compatibility ID 260 != 259."
    rows = {"NVTX_EVENTS": [domain], "StringIds": [dict(id=1), dict(id=2, value=line)]}
    assert read_nsys(nsys(tmp_path / "b.sqlite", rows)).notes[0] == f"{silent} It says: {line}"


def test_a_range_inside_one_of_its_own_name_counts_once(tmp_path):
    rows = {"NVTX_EVENTS": [nvtx("a", 0, 100, domain=0), nvtx("a", 10, 50, domain=0)],
            "CUPTI_ACTIVITY_KIND_RUNTIME": [launch(1, 20)],
            "CUPTI_ACTIVITY_KIND_KERNEL": [kernel(1, 30, 40)]}  # fmt: skip
    row = summarize(read_nsys(nsys(tmp_path / "a.sqlite", rows))).rows["a"]
    assert (row.calls, row.host, row.work, row.projected) == (2, 100, 10, 10)


def test_a_kernel_without_its_launch_is_unattributed(tmp_path):
    rows = two_steps()
    del rows["CUPTI_ACTIVITY_KIND_RUNTIME"]
    s = summarize(read_nsys(nsys(tmp_path / "a.sqlite", rows)))
    assert s.rows[UNATTRIBUTED].works == 12 and s.rows["rollout"].works == 0


def test_unusable_nsys_files(tmp_path):
    whole = nsys(tmp_path / "whole.sqlite", two_steps()).read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("text", b"not a database" * 100), ("empty", b"")):
        (tmp_path / f"{name}.sqlite").write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}.sqlite (cannot be read|holds neither)"):
            read_nsys(tmp_path / f"{name}.sqlite")
    with pytest.raises(BadInput, match="holds neither"):
        read_nsys(nsys(tmp_path / "other.sqlite", {"StringIds": []}))


def nsys_says(path: Path, *names: str) -> list[dict]:
    """The first of these reports that this nsys knows; of one that it does not know it prints nothing, and exits 0."""
    heads = ("NVTX Range,", "Name,", "Time (%),", "Start (ns),")
    for name in names:
        command = ["nsys", "stats", "--report", name, "--format", "csv", "--timeunit", "ns", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        start = next((i for i, line in enumerate(lines) if line.startswith(heads)), None)
        if start is not None:
            return list(csv.DictReader(line for line in lines[start:] if line))
    pytest.skip(f"this nsys makes no report {names} of a hand-built export: {(done.stderr or done.stdout)[-200:]}")


@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not installed")
def test_agrees_with_nsys_own_reports(tmp_path):
    """Host, kernel and projected time per range against NVIDIA's reports, as called since 2023 and before."""
    rows = two_steps()
    for row in rows["CUPTI_ACTIVITY_KIND_RUNTIME"]:
        row["globalTid"] = MAIN  # NVIDIA's reports know no attribution by time
    path = nsys(tmp_path / "a.sqlite", rows)
    trace = read_nsys(path)
    ours = summarize(trace).rows
    name_of = lambda row, column: row[column].rpartition(":")[2]
    for row in (hosts := nsys_says(path, "nvtx_pushpop_sum", "nvtxppsum")):
        known = ours[name_of(row, "Range")]
        assert (int(row["Instances"]), float(row["Total Time (ns)"])) == (known.calls, known.host)
    assert len(hosts) == 4
    each = nsys_says(path, "nvtx_pushpop_trace", "nvtxpptrace")
    theirs = {(name_of(row, "Name"), int(row["Start (ns)"]), int(row["End (ns)"])) for row in each}
    assert theirs == {(r.name, r.start, r.end) for r in trace.ranges} and len(each) == len(trace.ranges)
    kernels = nsys_says(path, "nvtx_kern_sum", "nvtxkernsum")
    for name in ("rollout", "update", "forward", "backward"):
        theirs = [row for row in kernels if name_of(row, "NVTX Range") == name]
        assert sum(float(row["Total Time (ns)"]) for row in theirs) == ours[name].work
        assert sum(int(row["Kern Inst"]) for row in theirs) == ours[name].works
    projected = nsys_says(path, "nvtx_gpu_proj_trace", "nvtxgpuproj")
    for name in ("rollout", "update", "forward", "backward"):
        theirs = [row for row in projected if name_of(row, "Name") == name]
        assert sum(float(row["Projected Duration (ns)"]) for row in theirs) == ours[name].projected


# torch.profiler


def kineto(path: Path, events: list[dict], **more) -> Path:
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        json.dump({"schemaVersion": 1, "traceEvents": events, **more}, file)
    return path


def event(kind, name, start, end, tid=7, pid=7, **args) -> dict:
    """Times in ns, written as Kineto does: microseconds with three decimals."""
    ts, dur = (4334700370000_000 + start) / 1000, (end - start) / 1000
    return dict(ph="X", cat=kind, name=name, pid=pid, tid=tid, ts=ts, dur=dur, args=args)


def gpu_events() -> list[dict]:
    """One step on a GPU: rollout with a kernel, backward whose kernel autograd's thread launches."""
    return [
        event("user_annotation", "ProfilerStep#3", 0, 400), event("user_annotation", "train/rollout", 0, 100),
        event("user_annotation", "train/backward", 150, 250), event("user_annotation", "ProfilerStep#4", 400, 700),
        event("gpu_user_annotation", "train/rollout", 30, 60, pid=0), event("cpu_op", "aten::mm", 10, 40),
        event("cuda_runtime", "cudaLaunchKernel", 20, 25, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 160, 165, tid=8, correlation=2),
        event("kernel", "gemm", 30, 60, pid=0, tid="stream 7", device=0, stream=7, correlation=1,
              **{"registers per thread": 96, "est. achieved occupancy %": 40}),
        event("kernel", "gemm_dx", 170, 220, pid=0, device=0, stream=7, correlation=2),
        event("gpu_memcpy", "Memcpy DtoH", 500, 510, pid=0, device=0, stream=9, correlation=99),
        dict(ph="i", cat="cpu_instant_event", name="[memory]", pid=7, tid=7, ts=1.0,
             args={"Device Type": 1, "Device Id": 0, "Total Allocated": 4096}),
        dict(ph="M", name="process_name", pid=7, tid=0, ts=0, args={"name": "python"}),
    ]  # fmt: skip


def test_kineto_with_a_gpu(tmp_path):
    path = kineto(tmp_path / "trace.json.gz", gpu_events(), deviceProperties=[{"id": 0, "name": "NVIDIA H100"}],
                  peak_memory_bytes=10_000)  # fmt: skip
    s = summarize(read_kineto([path]))
    assert s.trace.device == "NVIDIA H100" and s.trace.on_gpu and list(s.trace.steps) == [3, 4]
    rollout, backward = s.rows["rollout"], s.rows["backward"]
    assert (rollout.work, rollout.projected, rollout.registers, rollout.occupancies) == (30, 30, 96, [40])
    assert (backward.work, backward.by_time) == (50, 50) and backward.by_step["work"] == {3: 50}
    assert s.rows[UNATTRIBUTED].top == {"Memcpy DtoH": 10}, "its launch is not in the trace"
    assert set(s.trace.peaks.values()) == {4096, 10_000}


def test_kineto_of_two_ranks(tmp_path):
    other = [e | {"pid": 8, "tid": 8} for e in gpu_events() if e.get("cat") == "user_annotation"]
    paths = [kineto(tmp_path / "a.rank0.json", gpu_events()), kineto(tmp_path / "a.rank1.json", other)]
    s = summarize(read_kineto(paths))
    assert s.rows["rollout"].calls == 2 and s.num_steps == 2


def test_operations_stand_in_for_kernels_without_a_gpu(tmp_path):
    events = [
        event("user_annotation", "train/forward", 0, 100), event("user_annotation", "train/rollout", 50, 100, tid=9),
        event("cpu_op", "aten::linear", 10, 50), event("cpu_op", "aten::mm", 15, 45),
        event("cpu_op", "aten::add", 60, 70), event("cpu_op", "aten::mm", 55, 65, tid=9),
        event("cpu_op", "aten::relu", 200, 210),
    ]  # fmt: skip
    s = summarize(read_kineto([kineto(tmp_path / "a.json", events)]))
    row = s.rows["forward"]
    assert (row.work, row.works, row.projected, row.gaps) == (50, 3, 60, 10)
    assert row.top == {"aten::mm": 30, "aten::linear": 10, "aten::add": 10}, "time of its own"
    assert s.rows["rollout"].work == 10 and s.rows[UNATTRIBUTED].work == 10 and not s.trace.on_gpu
    (use,) = s.uses
    assert (use.device, use.lanes, use.busy, use.overlap) == ("CPU", 2, 65, 5)


def test_unusable_traces(tmp_path):
    whole = kineto(tmp_path / "whole.json.gz", gpu_events()).read_bytes()
    cases = {"cut.json.gz": whole[:200], "flipped.json.gz": whole[:60] + b"x" * 40 + whole[100:],
             "plain.json.gz": b"{}", "cut.json": b'{"traceEvents": [{"ph": "X", "ca', "list.json": b"[1]",
             "other.json": b'{"a": 1}', "nothing.json": b'{"traceEvents": []}'}  # fmt: skip
    cases |= {"empty.json": b"", "null.json": b"null", "text.json": b"traceEvents", "deep.json": b"[" * 100_000,
              "half.json": b'[{"ph": "X", "ca', "bytes.json": b"\xff\xfe\x00",
              "inner.json": b'{"traceEvents": {}}'}  # fmt: skip
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name} (is cut short|has no traceEvents|holds neither)"):
            read_kineto([tmp_path / name])
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(BadInput, match="folder.json is cut short"):
        read_kineto([tmp_path / "folder.json"])


def written(s) -> str:
    """All that a report says of two captures, but for the picture."""
    variants = [sections.Variant(label, [s.trace], [s]) for label in "ab"]
    page.html("t", variants, [])
    json.dumps(reporting.verdict_of(variants, []))
    return page.markdown("t", variants, [])


@pytest.mark.parametrize(
    "change, left_out",
    [
        ({"tid": "python main"}, 0),
        ({"pid": "Spans", "tid": "a"}, 0),
        ({"pid": None, "tid": [1]}, 0),
        ({"pid": "7", "tid": "7"}, 0),
        ({"args": None}, 0),
        ({"args": [1, "x"]}, 0),
        ({"args": {"correlation": [5], "device": None, "stream": {}, "registers per thread": "many"}}, 0),
        ({"name": None}, 0),
        ({"name": "\ud800 half"}, 0),
        ({"cat": ["kernel"]}, 0),
        ({"ts": "30.5", "dur": "20"}, 0),
        ({"dur": None}, 0),
        ({"dur": "long"}, 1),
        ({"dur": -1}, 1),
        ({"dur": float("nan")}, 1),
        ({"ts": None}, 1),
        ({"ts": float("inf")}, 1),
        ({"ts": 10**400}, 1),
        ({"ts": 1e17}, 1),
        ({"ts": 9e15}, 0),
        ({"ts": {}}, 1),
    ],
)
@pytest.mark.parametrize("kind", ["cpu_op", "kernel", "user_annotation", "cuda_runtime"])
def test_an_event_of_another_form_is_read_or_left_out_and_counted(tmp_path, change, left_out, kind):
    right = [event("user_annotation", "ProfilerStep#0", 0, 100), event("user_annotation", "train/update", 5, 90),
             event("cuda_runtime", "cudaLaunchKernel", 20, 21, correlation=5)]  # fmt: skip
    odd = event(kind, "odd", 30, 50, correlation=5, device=0, stream=7) | change
    document = {"traceEvents": [*right, odd, None, "x", {}], "deviceProperties": None}
    (tmp_path / "a.json").write_text(json.dumps(document))
    trace = read_kineto([tmp_path / "a.json"])
    assert [note for note in trace.notes if note.startswith(f"{left_out} events of a.json")] == trace.notes[:left_out]
    assert list(trace.steps) == [0] and any(r.name == "update" for r in trace.ranges)
    assert "No change between b and a" in written(summarize(trace))


def test_threads_go_by_number_or_name_and_values_may_be_text(tmp_path):
    kernel_ = {"correlation": "5", "device": "1", "registers per thread": "96", "est. achieved occupancy %": "40"}
    events = [
        event("user_annotation", "train/update", 0, 100) | {"tid": "7", "pid": 7.0},
        event("cuda_runtime", "cudaLaunchKernel", 20, 21, correlation="5"),
        event("kernel", "gemm", 30, 50, **kernel_) | {"ts": "4334700370000.03"},
        event("user_annotation", "train/rollout", 0, 100, tid="side"),
        {key: value for key, value in event("user_annotation", "x", 0, 9).items() if key != "tid"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(events)[:-1] + ",")  # the closing bracket is optional
    (tmp_path / "packed.json").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    for name in ("list.json", "packed.json"):
        s = summarize(read_kineto([tmp_path / name]))
        assert [r.thread for r in s.trace.ranges] == [(7, 7), (7, "side"), (7, 0)]
        row = s.rows["update"]
        assert (row.work, row.registers, row.occupancies, s.uses[0].device) == (20, 96, [40.0], "GPU 1")
        assert {lane.label for lane in timeline.lanes_of(s)} >= {"main thread: ranges", "rollout thread: ranges"}


def test_a_kernel_without_a_correlation_is_nobodys(tmp_path):
    events = [event("user_annotation", "train/update", 0, 100), event("cuda_runtime", "cudaFree", 20, 21),
              event("kernel", "gemm", 30, 50)]  # fmt: skip
    assert summarize(read_kineto([kineto(tmp_path / "a.json", events)])).rows[UNATTRIBUTED].works == 1


ODD = (None, True, "", "x", "7", -1, 0, 1.5, 1e300, 10**30, float("nan"), [], [[1]], {}, {"a": None}, "$a_{$",
       "\ud800|<\n")  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_whatever_stands_in_a_trace_it_is_read_or_refused(tmp_path, seed):
    pick = random.Random(seed)
    events = gpu_events() + [event("cpu_op", "[memory]", 0, 0, **{"Total Allocated": 5, "Device Type": 0})]
    for _ in range(8):
        target = pick.choice(events)
        target = target["args"] if pick.random() < 0.4 and isinstance(target.get("args"), dict) else target
        target[pick.choice([*target, "tid", "dur"])] = pick.choice(ODD)
    events.insert(pick.randrange(len(events)), pick.choice(ODD))
    device = pick.choice([[{"name": pick.choice(ODD)}], *ODD])
    document = {"traceEvents": events, "deviceProperties": device, "peak_memory_bytes": pick.choice(ODD)}
    (tmp_path / "a.json").write_text(json.dumps(document))
    try:
        s = summarize(read_kineto([tmp_path / "a.json"]))
    except BadInput:
        return
    (tmp_path / "report.md").write_text(written(s))
    timeline.write_chrome([s], tmp_path / "trace.json")


def test_a_real_trace_of_two_threads(tmp_path):
    """Log.span and Log.profile as train.py uses them, a second thread beside; and what torch wrote, read back."""
    import torch

    from engine.config import Config
    from engine.log import Log

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
    assert calls == {STEP: 2, "rollout": 1, "update": 2, "forward": 2, "backward": 2}
    assert dict(s.rows["update"].by_step["host"]).keys() == {1, 2} and s.rows["rollout"].by_step["host"].keys() == {2}
    assert s.rows["forward"].counts["aten::mm"] == 2 and s.rows["rollout"].counts["aten::mm"] == 1
    assert s.rows["backward"].counts["aten::mm"] == 4 and len({r.thread for r in s.trace.ranges}) == 2
    assert s.rows["update"].work >= s.rows["forward"].work + s.rows["backward"].work > 0


@pytest.mark.alone
def test_a_span_costs_little_without_a_profiler(tmp_path):
    """In units of an empty context manager in Python, which is most of it; record_function alone would be ten."""
    import contextlib
    import time

    from engine.config import Config
    from engine.log import Log

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


# Nsight Compute

NVTX_COLUMN = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"


def ncu_csv(path: Path) -> Path:
    metrics = "gpu__time_duration.sum dram__bytes_read.sum dram__bytes_write.sum launch__registers_per_thread"
    peak = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
    header = ["ID", "Process ID", "Kernel Name", NVTX_COLUMN, *metrics.split(), peak]
    units = ["", "", "", "", "usecond", "Mbyte", "Kbyte", "register/thread", "%"]
    where = (
        '7  "train:update:INT64:3:none:none:REGISTERED:update"  "train:forward:INT64:3:none:none:REGISTERED:forward" '
    )
    rows = [["0", "7", "gemm", where, "1,234.50", "1,500.25", "2,000", "96", "81.5"],
            ["1", "7", "norm", '7  "nccl:update:none" ', "1.5", "n/a", "0", "40", "n/a"]]  # fmt: skip
    with path.open("w", newline="") as file:
        file.write("==PROF== Connected to process 7\n")
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([header, units, *rows])
    return path


def test_ncu_csv(tmp_path):
    trace = ncu.read_csv(ncu_csv(tmp_path / "a.csv"))
    gemm, norm = trace.kernels
    assert gemm.ranges == ("update", "forward") and norm.ranges == ()
    assert gemm.metrics["gpu__time_duration.sum"] == 1_234_500 and gemm.metrics["dram__bytes_read.sum"] == 1_500_250_000
    assert gemm.metrics["dram__bytes_write.sum"] == 2_000_000 and gemm.metrics["launch__registers_per_thread"] == 96
    assert "dram__bytes_read.sum" not in norm.metrics
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "cut.csv").write_text(text[: text.index('"norm"') + 10])
    trace = ncu.read_csv(tmp_path / "cut.csv")
    assert len(trace.kernels) == 1 and "cut short" in trace.notes[0]
    header, _, *rows = text.splitlines()[1:]
    (tmp_path / "units.csv").write_text("\n".join([header, '"",""', *rows]))
    assert ncu.read_csv(tmp_path / "units.csv").kernels[0].metrics["launch__registers_per_thread"] == 96
    for content in ("", "a,b\n1,2\n", text.splitlines()[1]):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(BadInput, match="no raw page of ncu"):
            ncu.read_csv(tmp_path / "bad.csv")


def test_ncu_report_needs_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(ncu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="needs the program ncu"):
        ncu.read_report(tmp_path / "a.ncu-rep", None, tmp_path)


# comparison and report


def summaries(tmp_path, *rows):
    return [summarize(read_nsys(nsys(tmp_path / f"{i}.sqlite", r))) for i, r in enumerate(rows)]


def test_changes_and_noise(tmp_path):
    slow, fast, noisy = summaries(tmp_path, two_steps(3), two_steps(1), two_steps(1, late=120))
    changes = changes_of([slow], [fast])
    assert changes["forward"].by == "projected" and changes["forward"].speedup == 60 / 20
    assert changes["forward"].verdict == "faster" and changes_of([fast], [slow])["forward"].verdict == "slower"
    assert changes["rollout"].verdict == "no change" and changes["rollout"].speedup == 1
    assert changes_of([slow], [noisy])["update"].verdict == "no change", "half of its steps are as slow"
    assert changes[STEP].by == "host" and changes[STEP].verdict == "no change"
    pooled = changes_of([slow, slow], [fast, noisy])["backward"]
    assert pooled.other == 40 and pooled.spread == 120, "repeats of a label count all steps"


def test_one_step_shows_no_spread(tmp_path):
    rows = two_steps()
    rows["NVTX_EVENTS"] = [r for r in rows["NVTX_EVENTS"] if r.get("int64Value") != 4]
    (one,) = summaries(tmp_path, rows)
    assert changes_of([one], [one])["update"].verdict == "no change", "not a nanosecond"
    rows["NVTX_EVENTS"][2]["end"] += 1
    rows["CUPTI_ACTIVITY_KIND_KERNEL"][4]["end"] += 1
    (late,) = summaries(tmp_path, rows)
    assert changes_of([one], [late])["update"].verdict == "unknown"


def test_report_end_to_end(tmp_path):
    for name, scale in (("eager", 3), ("fused", 1)):
        (tmp_path / name).mkdir()
        nsys(tmp_path / name / "capture.sqlite", two_steps(scale))
        command = "python train.py --out=/home/someone/runs --init_from /home/someone/models/x"
        provenance = {"tool_version": "nsys 9", "commit": "abc", "dirty": True, "command": command}
        (tmp_path / name / "provenance.json").write_text(json.dumps(provenance))
    (tmp_path / "counters").mkdir()
    ncu_csv(tmp_path / "counters" / "capture.csv")
    (tmp_path / "counters" / "bytes.json").write_text(json.dumps({"gemm": 1_000_000_000}))
    inputs = [tmp_path / name for name in ("eager", "fused", "counters")]
    done = report(*inputs, "--labels", "eager,fused,fused", "-o", tmp_path / "out", "--min-speedup", "forward=2")
    assert done.returncode == 0, done.stderr
    files = {p.name: p for p in (tmp_path / "out").iterdir()}
    assert set(files) == {"report.md", "report.html", "verdict.json", "trace.json", "timeline.png", "provenance.json"}
    text = files["report.md"].read_text()
    assert text.startswith("Device: NVIDIA H100.\n")
    assert "| - forward | fused | 1 | 40 ns ± 0 | 30 ns | 20 ns | 0 | 2 | 2 | 3.00x faster |" in text
    assert "1.50x of 1 GB" in text and "No change between fused and eager" in text
    page_ = files["report.html"].read_text()
    assert page_.count("<svg") == 2 and "3.00x faster" in page_ and "http" not in page_ and "src=" not in page_
    for path in files.values():
        assert b"/home/" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes(), path
    verdict = json.loads(files["verdict.json"].read_text())
    assert verdict["gates"][0]["passed"] and verdict["gates"][0]["got"] == 3
    trace = json.loads(files["trace.json"].read_text())["traceEvents"]
    named = {e["args"]["name"] for e in trace if e["name"] == "process_name"}
    first = {e["pid"]: min(x["ts"] for x in trace if x["pid"] == e["pid"] and x["ph"] == "X") for e in trace}
    assert named == {"eager", "fused"} and first == {0: 0.0, 1: 0.0}, "aligned at the first step"


def test_a_capture_that_knows_no_peak_memory_says_so(tmp_path):
    events = [event("user_annotation", "train/rollout", 0, 100), event("cpu_op", "aten::mm", 10, 40)]
    for name, known in (("nsys", "{}"), ("torch", '{"peak_resident_bytes": 35000000}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "provenance.json").write_text(known)
    nsys(tmp_path / "nsys" / "capture.sqlite", two_steps())
    kineto(tmp_path / "torch" / "trace.json", events)
    done = report(tmp_path / "nsys", tmp_path / "torch", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "\n| nsys | n/a | n/a |\n" in text
    assert "| torch | process, resident, whole run with the profiler | 35 MB |" in text


def test_three_captures_from_a_cpu(tmp_path):
    inputs = []
    for name in ("grpo", "dr_grpo", "dapo"):
        events = [event("user_annotation", "train/rollout", 0, 100), event("cpu_op", "aten::mm", 10, 40)]
        inputs.append(kineto(tmp_path / f"{name}.json", events))
    done = report(*inputs, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No GPU took part" in text.splitlines()[0]
    assert "hold no steps" in text and text.count("| rollout |") >= 3 and "1.00x no change" in text


def test_gates(tmp_path):
    a, b = nsys(tmp_path / "a.sqlite", two_steps(3)), nsys(tmp_path / "b.sqlite", two_steps(1))
    noisy = nsys(tmp_path / "noisy.sqlite", two_steps(1, late=300))
    run = lambda *args: report(*args, "-o", tmp_path / "out")
    assert run(a, b, "--min-speedup", "forward=2.9", "--min-speedup", "rollout=1").returncode == 0
    done = run(a, b, "--min-speedup", "forward=3.1")
    assert done.returncode == 1 and "FAILED: b at forward is 3.00x faster, asked 3.1x." in done.stdout
    assert run(a, noisy, "--min-speedup", "update=1.01").returncode == 1, "within the spread: not shown to be faster"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--min-speedup", "forwards=2"], "share no range 'forwards'; they share step, rollout"),
        (["--min-speedup", "forward"], "must read RANGE=NUMBER"),
        (["--min-speedup", "forward=nan"], "must read RANGE=NUMBER"),
        (["--labels", "a"], "1 labels for 2 captures"),
        (["--labels", "a,a"], "two captures with different labels"),
        (["missing.sqlite"], "There is no capture missing.sqlite."),
        (["README.md"], "is of no known kind"),
        (["configs"], "holds no capture"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, change, sentence):
    a, b = nsys(tmp_path / "a.sqlite", two_steps(3)), nsys(tmp_path / "b.sqlite", two_steps(1))
    done = report(a, b, *change, "-o", tmp_path / "out")
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_units_and_scrubbing():
    shown = [sections.show_time(ns) for ns in (0, 7, 999, 1_500, 12_340_000, 999_999, 2.5e9, None)]
    assert shown == ["0", "7 ns", "999 ns", "1.50 us", "12.3 ms", "1000 us", "2.50 s", "n/a"]
    assert sections.show_bytes(1_500_000) == "1.5 MB" and sections.show_bytes(None) == "n/a"
    text = "python train.py --init_from /tmp/L/sft/export --out=/tmp/x -c 'a/b' https://x.org/y/z ~/m/n 3/4"
    assert (
        sections.scrub(text)
        == "python train.py --init_from .../export --out=.../x -c 'a/b' https://x.org/y/z .../n 3/4"
    )


def test_profiling_watches_from_outside():
    """It imports nothing of ours, and none of its modules hides one of the standard library."""
    files = sorted((ROOT / "profiling").glob("*.py"))
    assert files and not (ROOT / "profiling" / "__init__.py").exists()
    for path in files:
        assert path.stem not in sys.stdlib_module_names
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"kernels", "engine", "bench", "tests", "torch"}, path


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_capture_against_itself_does_not_change(tmp_path, steps):
    events = [event("user_annotation", "train/update", 10, 90), event("cpu_op", "aten::mm", 20, 30),
              event("user_annotation", "train/update", 130, 170)]  # fmt: skip
    events += [event("user_annotation", f"ProfilerStep#{i}", 100 * i, 100 * i + 100) for i in range(steps)]
    s = summarize(read_kineto([kineto(tmp_path / "a.json", events)]))
    (sentence,) = sections.verdict([sections.Variant(label, [s.trace], [s]) for label in "ab"])
    assert "o part of it changed" in sentence and ("No change between b and a" in sentence) == bool(steps)
    assert {c.verdict for c in changes_of([s], [s]).values()} == {"no change"}


def test_what_may_be_noise_is_not_called_a_change(tmp_path):
    """One step shows no spread; two whose steps differ by more than the captures do show one."""

    def captured(*spans):
        events, start = [event("cpu_op", "aten::mm", 20, 30)], 0
        for i, span in enumerate(spans):
            events += [event("user_annotation", f"ProfilerStep#{i}", start, start + span + 10),
                       event("user_annotation", "train/update", start, start + span)]  # fmt: skip
            start += span + 10
        s = summarize(read_kineto([kineto(tmp_path / "a.json", events)]))
        return sections.Variant(str(spans), [s.trace], [s])

    say = lambda *variants: sections.verdict(list(variants))[0]
    assert "one step shows no spread. What differs may be noise: update (80 ns to 81 ns, 0.99x ?)." in say(
        captured(80), captured(81)
    )
    assert say(captured(80, 90), captured(81, 88)).startswith("No change between (81, 88) and (80, 90)")
    assert "is slower than" in say(captured(80, 81), captured(90, 91)) and "changes in update" in say(
        captured(80, 81), captured(90, 91)
    )


@pytest.fixture
def run_report(monkeypatch, tmp_path, capsys):
    """-> run(*args): (exit code, stdout, stderr) of the program, in this process and without the picture."""

    def run(*args, main=reporting.main):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args), "-o", str(tmp_path / "out")])
        monkeypatch.setattr(timeline, "png", lambda *_: None)
        code = main()
        return code, *capsys.readouterr()

    return run


def test_only_a_missed_gate_ends_with_1(tmp_path, run_report, monkeypatch):
    good = nsys(tmp_path / "good.sqlite", two_steps())
    cases = {"cut.sqlite": good.read_bytes()[:1000], "text.sqlite": b"no database", "empty.sqlite": b"",
             "cut.json": b"[{", "empty.json": b"", "empty.csv": b"", "bytes.csv": bytes(range(256)),
             "empty.json.gz": b""}  # fmt: skip
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        code, out, err = run_report(good, tmp_path / name)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and name in err, err
    for name, content in {"provenance.json": "[1]", "bytes.json": "{"}.items():
        (tmp_path / "beside").mkdir(exist_ok=True)
        shutil.copy(good, tmp_path / "beside/capture.sqlite")
        (tmp_path / "beside" / name).write_text(content)
        code, out, err = run_report(good, tmp_path / "beside")
        assert (code, len(err.splitlines())) == (2, 1) and name in err
        (tmp_path / "beside" / name).unlink()
    odd = '{"peak_resident_bytes": "much", "device": [1], "versions": [], "command": null}'
    (tmp_path / "beside/provenance.json").write_text(odd)
    (tmp_path / "beside/bytes.json").write_text('{"gemm": null}')
    assert run_report(good, tmp_path / "beside")[0] == 0
    assert run_report(good, tmp_path / "beside", "--min-speedup", "update=2")[0] == 1
    monkeypatch.setattr(page, "markdown", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        run_report(
            good, tmp_path / "beside", main=lambda: runpy.run_path(ROOT / "profiling/report.py", run_name="__main__")
        )
    assert ended.value.code == 3


@pytest.mark.parametrize("table", ["NVTX_EVENTS", "RUNTIME", "KERNEL", "StringIds"])
@pytest.mark.parametrize("value", [None, "x", b"\xff", 2.5])
def test_an_export_with_odd_cells_is_read_or_refused(tmp_path, table, value):
    table = table if table in TABLES else f"CUPTI_ACTIVITY_KIND_{table}"
    for column in {column for row in two_steps()[table] for column in row}:
        rows = two_steps()
        rows[table][-1][column] = value
        try:
            written(summarize(read_nsys(nsys(tmp_path / "a.sqlite", rows))))
        except BadInput as error:
            assert "a.sqlite" in str(error)


def test_timeline_joins_what_cannot_be_seen_apart(tmp_path):
    works = [
        Work("k", i * 10, i * 10 + 9, "GPU 0", "stream 7", "kernel", 9, (1, 1), (i, i), (1, i)) for i in range(5000)
    ]
    s = summarize(Trace("nsys", [Range("rollout", 0, 50_000, (1, 1), 0)], works, {0: (0, 50_000)}))
    lanes = timeline.lanes_of(s)
    assert [len(lane.bars) for lane in lanes] == [1, 1] and lanes[1].bars[0] == (0, 49_999, "rollout")
    assert attribute(s.trace)[0][0] == [0]
