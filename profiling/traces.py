"""One form for what any tool recorded: ranges (who asked), works (what ran for it), steps. Times are whole ns.

Read from an nsys SQLite export or a torch.profiler (Kineto) JSON; `ncu.py` reads Nsight Compute, which has no timeline.
In a capture without a GPU the outermost and nested CPU operations stand in for kernels.
"""

import contextlib
import gzip
import json
import math
import re
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from intervals import Interval

DOMAIN = "train"  # the NVTX domain of engine/log.py; in a torch trace its ranges are called train/<verb>
Thread = tuple[int | str, int | str]  # (process, thread): numbers, or names in some Chrome traces


class BadInput(Exception):
    """What is wrong with an input and what to do, as one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Range:
    name: str
    start: int
    end: int
    thread: Thread
    step: int | None = None


@dataclass(slots=True)
class Work:
    """A kernel, a copy, a CUDA graph or, without a GPU, a CPU operation."""

    name: str
    start: int
    end: int
    device: str  # "GPU 0" | "CPU"
    lane: str  # stream or thread
    kind: str  # kernel | copy | graph | op
    own: int  # ns not spent in works nested in it: all of it, but for operations
    thread: Thread | None = None  # that launched it; None: not in the capture
    launched: Interval = (0, 0)  # the launching call on that thread
    call: tuple | None = None  # one launching call has one value: a CUDA graph's kernels share it
    outer: bool = True  # not nested in another operation
    registers: int | None = None  # per thread
    spilled: int | None = None  # bytes of local memory per thread
    occupancy: float | None = None  # percent, estimated


@dataclass
class Trace:
    tool: str  # nsys | torch | ncu
    ranges: list[Range] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    steps: dict[int, Interval] = field(default_factory=dict)
    stepper: Thread | None = None  # the thread whose steps they are
    kernels: list = field(default_factory=list)  # ncu.Kernel
    peaks: dict[str, int] = field(default_factory=dict)  # memory in bytes, by what it is the peak of
    device: str = ""
    notes: list[str] = field(default_factory=list)  # what a reader of the numbers should know
    provenance: dict = field(default_factory=dict)
    bytes_model: dict[str, float] = field(default_factory=dict)  # bytes a kernel or range should move, per call
    label: str = ""

    @property
    def on_gpu(self) -> bool:
        return any(work.device != "CPU" for work in self.works) or bool(self.kernels)


def thread_name(thread: Thread) -> str:
    return "main thread" if thread[0] == thread[1] else f"thread {thread[1]}"


# torch.profiler

KINDS = ("user_annotation", "cpu_op", "cuda_runtime", "cuda_driver", "kernel", "gpu_memcpy", "gpu_memset")


def read_kineto(paths: Iterable[Path]) -> Trace:
    """One trace from the files of all ranks; BadInput for what is not a whole Chrome trace, as torch.profiler's is.

    An event without a time or a duration that can be read is left out, and counted in the notes.
    """
    trace, marks = Trace("torch"), []
    for path in paths:
        document = load_json(path)
        left_out = add_kineto(trace, marks, document["traceEvents"])
        if left_out:
            trace.notes.append(f"{left_out} events of {path.name} have no time that can be read and are left out.")
        devices = document.get("deviceProperties")
        for device in devices if isinstance(devices, list) else ():
            trace.device = trace.device or text(fields(device).get("name"))
        if peak := whole(document.get("peak_memory_bytes")):
            trace.peaks["GPU allocated, since the run began"] = peak
    main = min((thread for *_, thread in marks), key=by_kind, default=None)
    trace.steps = {step: (start, end) for step, start, end, thread in sorted(marks, key=by_kind) if thread == main}
    trace.stepper = main
    trace.ranges = [with_step(r, trace.steps) for r in trace.ranges]
    if not trace.ranges and not trace.works:
        raise BadInput(f"{path.name} holds neither ranges nor operations: capture again with profiling/capture.py.")
    return trace


def load_json(path: Path) -> dict:
    """A trace's document: an object with traceEvents, or their list alone, whose closing bracket may be missing."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        listed = content.strip()[:1] == b"[" and not content.strip().endswith(b"]")
        document = json.loads(content.strip().rstrip(b",") + b"]" if listed else content)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise BadInput(f"{path.name} is cut short or not JSON ({error}): capture again.") from None
    document = {"traceEvents": document} if isinstance(document, list) else document
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        raise BadInput(f"{path.name} has no traceEvents, so it is not a torch.profiler trace.")
    return document


def add_kineto(trace: Trace, marks: list, events: list) -> int:
    """Adds one file's ranges and works; `marks` gets (step, start, end, thread). -> how many events have no time."""
    launches, ops, gpu, memory, left_out = {}, defaultdict(list), [], defaultdict(int), 0
    for event in map(fields, events):
        kind, name, args = event.get("cat"), text(event.get("name")), fields(event.get("args"))
        if name == "[memory]":
            place = "CPU" if args.get("Device Type") == 0 else f"GPU {text(args.get('Device Id'))}"
            memory[place] = max(memory[place], whole(args.get("Total Allocated")) or 0)
        if event.get("ph") != "X" or kind not in KINDS:
            continue
        start, long = nanoseconds(event.get("ts")), nanoseconds(event.get("dur") or 0)
        if start is None or long is None or long < 0:
            left_out += 1
            continue
        end, thread = start + long, (identity(event.get("pid")), identity(event.get("tid")))
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            gpu.append((start, end, name, kind, args))
        elif kind == "cpu_op":
            ops[thread].append((start, end, name))
        elif kind != "user_annotation":
            launches[text(args.get("correlation"))] = (thread, (start, end))
        elif match := re.fullmatch(r"ProfilerStep#(\d{1,18})", name):
            marks.append((int(match[1]), start, end, thread))
        else:
            trace.ranges.append(Range(name.removeprefix(DOMAIN + "/"), start, end, thread))
    if gpu:
        trace.works += [gpu_work(*event, launches) for event in gpu]
    else:
        trace.works += [work for thread, found in ops.items() for work in cpu_works(thread, found)]
    trace.peaks |= {f"{place} allocated inside the window": peak for place, peak in memory.items()}
    return left_out


def fields(value) -> dict:
    """An object of a JSON document, or an empty one where something else stands."""
    return value if isinstance(value, dict) else {}


def text(value) -> str:
    """What a report can write; nothing for null. JSON may hold halves of characters, which no file can."""
    return str("" if value is None else value).encode(errors="replace").decode()


def number(value) -> float | None:
    """A finite number, also where it is written as text; None for anything else."""
    try:
        read = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def whole(value) -> int | None:
    return None if (read := number(value)) is None else int(read)


def nanoseconds(value) -> int | None:
    """A time in microseconds as whole ns; None for what is no time, or more than an int64 holds."""
    read = number(value)
    if read is None or abs(read) >= 2**63 / 1000:
        return None
    return value * 1000 if isinstance(value, int) else round(read * 1000)


def identity(value) -> int | str:
    """A process or thread: 0 where an event names none, else its number, or its name as text."""
    try:
        return int(value or 0)
    except (TypeError, ValueError, OverflowError):
        return text(value)


def by_kind(value):
    """A key that sorts numbers before text, in tuples too."""
    return tuple(map(by_kind, value)) if isinstance(value, tuple) else (isinstance(value, str), value)


def gpu_work(start: int, end: int, name: str, kind: str, args: dict, launches: dict) -> Work:
    call = text(args.get("correlation"))
    thread, launched = launches.get(call or None, (None, (0, 0)))
    return Work(
        name,
        start,
        end,
        device=f"GPU {text(args.get('device', 0))}",
        lane=f"stream {text(args.get('stream', 0))}",
        kind="kernel" if kind == "kernel" else "copy",
        own=end - start,
        thread=thread,
        launched=launched,
        call=(thread, call) if thread else None,
        registers=whole(args.get("registers per thread")),
        occupancy=number(args.get("est. achieved occupancy %")),
    )


def cpu_works(thread: Thread, ops: list[tuple[int, int, str]]) -> list[Work]:
    """The operations of one thread, nested by time, each with the time not spent in those inside it."""
    works, stack = [], []
    for start, end, name in sorted(ops, key=lambda op: (op[0], -op[1])):
        while stack and stack[-1].end <= start:
            stack.pop()
        if stack:
            stack[-1].own -= min(end, stack[-1].end) - start
        lane = thread_name(thread)
        work = Work(
            name, start, end, "CPU", lane, "op", end - start, thread, (start, end), (thread, len(works)), not stack
        )
        works.append(work)
        stack.append(work)
    return works


def with_step(found: Range, steps: dict[int, Interval]) -> Range:
    """The range with the step in which it began: torch keeps no payload of a range."""
    step = next((n for n, (start, end) in steps.items() if start <= found.start < end), None)
    return Range(found.name, found.start, found.end, found.thread, step)


# Nsight Systems


def read_nsys(path: Path) -> Trace:
    """The trace in an `nsys export --type sqlite`; a table is absent when it would be empty."""
    trace = Trace("nsys")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            database.row_factory = lambda cursor, row: {
                column[0]: cell for column, cell in zip(cursor.description, row)
            }
            tables = {row["name"] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not any(name == "NVTX_EVENTS" or name.startswith("CUPTI_ACTIVITY_KIND") for name in tables):
                raise BadInput(
                    f"{path.name} holds neither NVTX ranges nor GPU work. "
                    "Export an nsys capture with `nsys export --type sqlite`."
                )
            fill_nsys(trace, lambda table: database.execute(f"SELECT * FROM {table}") if table in tables else ())
    except (sqlite3.Error, KeyError, TypeError, ValueError) as error:  # no such column, or nothing of its type in it
        raise BadInput(
            f"{path.name} cannot be read as an nsys SQLite export ({error}): it may be cut short; export it again."
        ) from None
    trace.steps, trace.stepper = steps_of(trace.ranges), updater_of(trace.ranges)
    return trace


def fill_nsys(trace: Trace, rows) -> None:
    strings = {row["id"]: text(row["value"]) for row in rows("StringIds")}
    trace.ranges, unfinished = nvtx_ranges(list(rows("NVTX_EVENTS")), strings)
    launches = {
        (process(row), row["correlationId"]): (row["globalTid"], (int(row["start"]), int(row["end"])))
        for row in rows("CUPTI_ACTIVITY_KIND_RUNTIME")
    }
    for table, kind in (("KERNEL", "kernel"), ("MEMCPY", "copy"), ("MEMSET", "copy"), ("GRAPH_TRACE", "graph")):
        seen = {work.call for work in trace.works if work.call}
        for row in rows(f"CUPTI_ACTIVITY_KIND_{table}"):
            work = nsys_work(row, table, kind, strings, launches)
            if work.start <= work.end and (kind != "graph" or work.call not in seen):
                trace.works.append(work)
    trace.device = ", ".join(sorted({str(row["name"]) for row in rows("TARGET_INFO_GPU")}))
    if not trace.ranges:
        said = next((f" It says: {line}" for line in strings.values() if "extension is incompatible" in line), "")
        trace.notes.append(
            "No NVTX range was recorded: an nsys older than the nvtx package makes it fall silent; use a newer nsys, "
            "or nvtx 0.2.11." + said
        )
    if unfinished:
        trace.notes.append(f"{unfinished} ranges were still open at the end of the capture and are left out.")
    if not trace.works:
        trace.notes.append("No GPU work was recorded: only host times mean something.")
    if any(work.kind == "graph" for work in trace.works):
        trace.notes.append("CUDA graphs appear as one row per replay; capture with --graph-nodes to see their kernels.")


def nvtx_ranges(events: list[dict], strings: dict[int, str]) -> tuple[list[Range], int]:
    """(push/pop and start/end ranges, how many were never closed).

    A range of the domain `train` goes by its own name, one of another domain as domain/name.
    """
    said = lambda row: text(strings.get(row.get("textId"), row["text"]))
    domains = {(process(row), row["domainId"]): said(row) for row in events if row["eventType"] == 75}
    known, ranges, unfinished = DOMAIN in domains.values(), [], 0
    for row in events:
        if row["eventType"] not in (59, 60):
            continue
        finished = row["end"] is not None and int(row["start"]) <= int(row["end"])
        unfinished += not finished
        domain = domains.get((process(row), row["domainId"]), f"domain {row['domainId']}" if row["domainId"] else "")
        name = said(row) if domain == DOMAIN or not (domain or known) else f"{domain or 'default'}/{said(row)}"
        if finished:
            steps = (whole(row.get(key)) for key in ("int64Value", "uint64Value", "int32Value", "uint32Value"))
            step = next((step for step in steps if step is not None), None)
            ranges.append(Range(name, int(row["start"]), int(row["end"]), nsys_thread(row["globalTid"]), step))
    return ranges, unfinished


def process(row: dict) -> int:
    return (row["globalTid"] or 0) & ~0xFFFFFF


def nsys_thread(global_tid: int) -> Thread:
    return (global_tid >> 24) & 0xFFFFFF, global_tid & 0xFFFFFF


def nsys_work(row: dict, table: str, kind: str, strings: dict, launches: dict) -> Work:
    call = (row["globalPid"], row["correlationId"])
    global_tid, launched = launches.get(call, (None, (0, 0)))
    name = f"CUDA graph {row.get('graphId')}" if kind == "graph" else table.lower()
    if table == "KERNEL":
        name = strings.get(row["shortName"]) or strings.get(row["demangledName"]) or "kernel"
    if table == "MEMCPY":
        name = {1: "copy to the GPU", 2: "copy to the host", 8: "copy on the GPU"}.get(row["copyKind"], "copy")
    start, end = int(row["start"]), int(row["end"])
    return Work(
        name,
        start,
        end,
        device=f"GPU {row['deviceId']}",
        lane=f"stream {row['streamId']}",
        kind=kind,
        own=end - start,
        thread=None if global_tid is None else nsys_thread(global_tid),
        launched=launched,
        call=None if global_tid is None else call,
        registers=whole(row.get("registersPerThread")),
        spilled=whole(row.get("localMemoryPerThread")),
    )


def updater_of(ranges: list[Range]) -> Thread | None:
    return next((r.thread for r in ranges if r.name == "update"), None)


def steps_of(ranges: list[Range]) -> dict[int, Interval]:
    """When each step ran, from the payloads of the thread that updates: a step lasts until the next one begins.

    Evaluation and what comes before the first step carry the number of the step that follows, so they begin none. Nor
    does weight_sync, which carries that number where it is for an evaluation.
    """
    updater = updater_of(ranges)
    mine = [r for r in ranges if r.thread == updater and r.step is not None and r.name != "evaluate"]
    starts, ends = {}, {}
    for r in mine:
        if r.name != "weight_sync":
            starts[r.step] = min(r.start, starts.get(r.step, r.start))
        ends[r.step] = max(r.end, ends.get(r.step, r.end))
    order = sorted(starts, key=starts.get)
    following = [starts[step] for step in order[1:]]
    return {n: (starts[n], end) for n, end in zip(order, [*following, *([ends[order[-1]]] if order else [])])}
