"""Captures of known answers, as nsys, torch.profiler and ncu would leave them, for the tests of profiling/."""

import csv
import gzip
import json
import sqlite3
from pathlib import Path

import page
import report as reporting
import sections

ROOT = Path(__file__).resolve().parents[1]
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
ID = {"cudaLaunchKernel": 1, "update": 10, "forward": 11, "decode": 20, "sample": 21, "gemm": 22, "norm": 23}
"""Into StringIds; rollout and backward have their names as plain text."""
STEP_RANGES = """
    rollout    0 100
    update   100 300
    forward  110 150
    backward 150 250
"""
STEP_KERNELS = """
    name   call launched start time stream scales
    decode    0       10    20   30      7      0
    sample    1       40    60   40      7      0
    gemm      2      120   130   20      7      1
    norm      3      130   140   10      8      1
    gemm      4      160   200   40      7      1
    norm      5      270   290    5      7      0
"""
IN_BACKWARD, AFTER_BACKWARD = 4, 5  # calls of autograd's thread
NVTX_COLUMN = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"


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


def kernel(call, start, end, name="decode", device=0, stream=7, **more) -> dict:
    where = dict(deviceId=device, contextId=1, streamId=stream, correlationId=call, globalPid=PID)
    named = dict.fromkeys(("demangledName", "shortName", "mangledName"), ID[name])
    return dict(start=start, end=end, registersPerThread=32, **where, **named, **more)


def call_of(step: int, call: int) -> int:
    """The correlation id of a call of STEP_KERNELS."""
    return step * 10 + call


def two_steps(scale: int = 1, late: int = 0) -> dict[str, list[dict]]:
    """Steps 3 and 4, each: rollout [0, 100), update [100, 300) with forward [110, 150) and backward [150, 250).

    Kernels of the update last `scale` times as long; step 4 is `late` ns longer. Backward's come from another thread.
    """
    ranges, calls, kernels = [dict(start=0, eventType=75, text="train", globalTid=MAIN, domainId=1)], [], []
    for step, base in ((3, 1000), (4, 1400)):
        more = late * (step == 4)
        for name, *times in map(str.split, STEP_RANGES.strip().splitlines()):
            start, end = (base + int(time) for time in times)
            ranges.append(nvtx(ID.get(name, name), start, end + more * (name == "update"), step=step))
        for name, *cells in map(str.split, STEP_KERNELS.strip().splitlines()[1:]):
            call, launched, start, time, stream, scales = map(int, cells)
            time = time * (scale if scales else 1) + more * (call == IN_BACKWARD)
            thread = AUTOGRAD if call in (IN_BACKWARD, AFTER_BACKWARD) else MAIN
            calls.append(launch(call_of(step, call), base + launched, thread))
            kernels.append(kernel(call_of(step, call), base + start, base + start + time, name, stream=stream))
    return {
        "StringIds": [dict(id=i, value=name) for name, i in ID.items()],
        "NVTX_EVENTS": ranges,
        "CUPTI_ACTIVITY_KIND_RUNTIME": calls,
        "CUPTI_ACTIVITY_KIND_KERNEL": kernels,
        "TARGET_INFO_GPU": [dict(id=0, name="NVIDIA H100")],
    }


def kineto(path: Path, events: list[dict], **more) -> Path:
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        json.dump({"schemaVersion": 1, "traceEvents": events, **more}, file)
    return path


def event(kind, name, start, end, tid=7, pid=7, **args) -> dict:
    """Times in ns, written as Kineto does: microseconds with three decimals."""
    ts, dur = (4334700370000_000 + start) / 1000, (end - start) / 1000
    return dict(ph="X", cat=kind, name=name, pid=pid, tid=tid, ts=ts, dur=dur, args=args)


def span(name, start, end, tid=7) -> dict:
    """What record_function leaves: a step's of the profiler, or a verb's of the loop."""
    return event("user_annotation", name, start, end, tid)


def gpu_events() -> list[dict]:
    """One step on a GPU: rollout with a kernel, backward whose kernel autograd's thread launches."""
    on_gpu = dict(pid=0, device=0, stream=7)
    limits = {"registers per thread": 96, "est. achieved occupancy %": 40}
    allocated = {"Device Type": 1, "Device Id": 0, "Total Allocated": 4096}
    return [
        span("ProfilerStep#3", 0, 400),
        span("train/rollout", 0, 100),
        span("train/backward", 150, 250),
        span("ProfilerStep#4", 400, 700),
        event("gpu_user_annotation", "train/rollout", 30, 60, pid=0),
        event("cpu_op", "aten::mm", 10, 40),
        event("cuda_runtime", "cudaLaunchKernel", 20, 25, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 160, 165, tid=8, correlation=2),
        event("kernel", "gemm", 30, 60, tid="stream 7", correlation=1, **on_gpu, **limits),
        event("kernel", "gemm_dx", 170, 220, correlation=2, **on_gpu),
        event("gpu_memcpy", "Memcpy DtoH", 500, 510, pid=0, device=0, stream=9, correlation=99),
        dict(ph="i", cat="cpu_instant_event", name="[memory]", pid=7, tid=7, ts=1.0, args=allocated),
        dict(ph="M", name="process_name", pid=7, tid=0, ts=0, args={"name": "python"}),
    ]


def ncu_csv(path: Path) -> Path:
    """ncu's raw page of two kernels, a column a line: gemm in two of our ranges, norm in another domain's."""
    ranges = "".join(f'  "train:{verb}:INT64:3:none:none:REGISTERED:{verb}"' for verb in ("update", "forward"))
    columns = [
        ("ID", "", "0", "1"),
        ("Process ID", "", "7", "7"),
        ("Kernel Name", "", "gemm", "norm"),
        (NVTX_COLUMN, "", f"7{ranges} ", '7  "nccl:update:none" '),
        ("gpu__time_duration.sum", "usecond", "1,234.50", "1.5"),
        ("dram__bytes_read.sum", "Mbyte", "1,500.25", "n/a"),
        ("dram__bytes_write.sum", "Kbyte", "2,000", "0"),
        ("launch__registers_per_thread", "register/thread", "96", "40"),
        ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "81.5", "n/a"),
    ]
    with path.open("w", newline="") as file:
        file.write("==PROF== Connected to process 7\n")
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(zip(*columns))
    return path


def written(s) -> str:
    """All that a report says of two captures, but for the picture."""
    variants = [sections.Variant(label, [s.trace], [s]) for label in "ab"]
    page.html("t", variants, [])
    json.dumps(reporting.verdict_of(variants, []))
    return page.markdown("t", variants, [])
