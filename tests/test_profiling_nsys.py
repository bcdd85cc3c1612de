"""profiling/: captures of Nsight Systems with known answers, files it cannot use, and NVIDIA's own reports."""

import csv
import shutil
import subprocess
from pathlib import Path

import pytest
from summary import STEP, UNATTRIBUTED, summarize
from traces import BadInput, read_nsys

from tests.captures import (
    AUTOGRAD,
    ID,
    MAIN,
    PID,
    SIDE,
    TABLES,
    call_of,
    kernel,
    launch,
    nsys,
    nvtx,
    two_steps,
    written,
)


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
        "rest of update": (2, 2 * (200 - 40 - 100), 0, 2 * (110 - 20 - 40), 2 * 50, 0, 0),
        "rest of step": (2, 100 + 0, 0, 0, 0, 0, 0),
        UNATTRIBUTED: (0, 0, 10, 405, 395, 2, 2),
    }
    assert [row.depth for row in s.rows.values()] == [0, 0, 0, 1, 1, 1, 0, 0]
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
        rows["NVTX_EVENTS"].append(nvtx("weight_sync", at, at + 10, step=step))
        rows["NVTX_EVENTS"].append(nvtx("evaluate", at + 20, at + 70, step=step))
    assert read_nsys(nsys(tmp_path / "a.sqlite", rows)).steps == {3: (1000, 1400), 4: (1400, 1700)}


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
    for k in rows["CUPTI_ACTIVITY_KIND_KERNEL"]:
        k["deviceId"] = int(k["correlationId"] >= call_of(4, 0))
    copy = dict(start=1005, end=1015, deviceId=0, streamId=9, correlationId=901, globalPid=PID, copyKind=1)
    rows["CUPTI_ACTIVITY_KIND_MEMCPY"] = [copy]
    rows["CUPTI_ACTIVITY_KIND_MEMSET"] = [dict(copy, start=1015, end=1016, correlationId=902)]
    rows["CUPTI_ACTIVITY_KIND_RUNTIME"] += [launch(901, 1002), launch(902, 1003)]
    s = summarize(read_nsys(nsys(tmp_path / "a.sqlite", rows)))
    assert [(use.device, use.busy) for use in s.uses] == [("GPU 0", 135 + 11), ("GPU 1", 135)]
    assert s.rows["rollout"].top["copy to the GPU"] == 10 and s.rows["rollout"].top["memset"] == 1


def test_cuda_graphs(tmp_path):
    """One call launches all kernels of a graph; without node rows the graph itself is the work."""
    base = {
        "StringIds": [dict(id=ID["decode"], value="decode")],
        "NVTX_EVENTS": [nvtx("rollout", 0, 100, domain=None)],
        "CUPTI_ACTIVITY_KIND_RUNTIME": [launch(1, 10)],
    }
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
    assert silent.startswith("No NVTX range was recorded") and silent.endswith("use a newer nsys, or nvtx 0.2.11.")
    line = "NVTX binary payload extension is incompatible. Provided compatibility ID 260 != 259."
    rows = {"NVTX_EVENTS": [domain], "StringIds": [dict(id=1), dict(id=2, value=line)]}
    assert read_nsys(nsys(tmp_path / "b.sqlite", rows)).notes[0] == f"{silent} It says: {line}"


def test_a_range_inside_one_of_its_own_name_counts_once(tmp_path):
    rows = {
        "NVTX_EVENTS": [nvtx("a", 0, 100, domain=0), nvtx("a", 10, 50, domain=0)],
        "CUPTI_ACTIVITY_KIND_RUNTIME": [launch(1, 20)],
        "CUPTI_ACTIVITY_KIND_KERNEL": [kernel(1, 30, 40)],
    }
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
