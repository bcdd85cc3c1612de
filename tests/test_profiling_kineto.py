"""profiling/: captures of torch.profiler with known answers, and files of another form."""

import gzip
import json
import random

import pytest
import timeline
from summary import UNATTRIBUTED, summarize
from traces import BadInput, read_kineto

from tests.captures import event, gpu_events, kineto, span, written


def test_kineto_with_a_gpu(tmp_path):
    known = {"deviceProperties": [{"id": 0, "name": "NVIDIA H100"}], "peak_memory_bytes": 10_000}
    s = summarize(read_kineto([kineto(tmp_path / "trace.json.gz", gpu_events(), **known)]))
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
        span("train/forward", 0, 100),
        span("train/rollout", 50, 100, tid=9),
        event("cpu_op", "aten::linear", 10, 50),
        event("cpu_op", "aten::mm", 15, 45),
        event("cpu_op", "aten::add", 60, 70),
        event("cpu_op", "aten::mm", 55, 65, tid=9),
        event("cpu_op", "aten::relu", 200, 210),
    ]
    s = summarize(read_kineto([kineto(tmp_path / "a.json", events)]))
    row = s.rows["forward"]
    assert (row.work, row.works, row.projected, row.gaps) == (50, 3, 60, 10)
    assert row.top == {"aten::mm": 30, "aten::linear": 10, "aten::add": 10}, "time of its own"
    assert s.rows["rollout"].work == 10 and s.rows[UNATTRIBUTED].work == 10 and not s.trace.on_gpu
    (use,) = s.uses
    assert (use.device, use.lanes, use.busy, use.overlap) == ("CPU", 2, 65, 5)


def test_unusable_traces(tmp_path):
    whole = kineto(tmp_path / "whole.json.gz", gpu_events()).read_bytes()
    cases = {
        "cut.json.gz": whole[:200],
        "flipped.json.gz": whole[:60] + b"x" * 40 + whole[100:],
        "plain.json.gz": b"{}",
        "cut.json": b'{"traceEvents": [{"ph": "X", "ca',
        "list.json": b"[1]",
        "other.json": b'{"a": 1}',
        "nothing.json": b'{"traceEvents": []}',
        "empty.json": b"",
        "null.json": b"null",
        "text.json": b"traceEvents",
        "deep.json": b"[" * 100_000,
        "half.json": b'[{"ph": "X", "ca',
        "bytes.json": b"\xff\xfe\x00",
        "inner.json": b'{"traceEvents": {}}',
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name} (is cut short|has no traceEvents|holds neither)"):
            read_kineto([tmp_path / name])
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(BadInput, match="folder.json is cut short"):
        read_kineto([tmp_path / "folder.json"])


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
    right = [span("ProfilerStep#0", 0, 100), span("train/update", 5, 90)]
    right += [event("cuda_runtime", "cudaLaunchKernel", 20, 21, correlation=5)]
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
        span("train/update", 0, 100) | {"tid": "7", "pid": 7.0},
        event("cuda_runtime", "cudaLaunchKernel", 20, 21, correlation="5"),
        event("kernel", "gemm", 30, 50, **kernel_) | {"ts": "4334700370000.03"},
        span("train/rollout", 0, 100, tid="side"),
        {key: value for key, value in span("x", 0, 9).items() if key != "tid"},
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
    events = [span("train/update", 0, 100)]
    events += [event("cuda_runtime", "cudaFree", 20, 21), event("kernel", "gemm", 30, 50)]
    assert summarize(read_kineto([kineto(tmp_path / "a.json", events)])).rows[UNATTRIBUTED].works == 1


ODD_TEXTS = ("", "x", "7", "$a_{$", "\ud800|<\n")
ODD = (None, True, *ODD_TEXTS, -1, 0, 1.5, 1e300, 10**30, float("nan"), [], [[1]], {}, {"a": None})


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
