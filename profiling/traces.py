"""One form for what any tool recorded: ranges (who asked), works (what ran for it), steps. Times are whole ns.

Read from an nsys SQLite export or a torch.profiler (Kineto) JSON; `ncu.py` reads Nsight Compute, which has no timeline.
In a capture without a GPU the outermost and nested CPU operations stand in for kernels.
"""

import contextlib
import gzip
import json
import re
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from intervals import Interval

DOMAIN = "train"  # the NVTX domain of engine/log.py; in a torch trace its ranges are called train/<verb>
Thread = tuple[int, int]  # (process, thread)


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


def read_kineto(paths: Iterable[Path]) -> Trace:
    """One trace from the files of all ranks; BadInput for what is not a whole torch.profiler JSON."""
    trace, marks = Trace("torch"), []
    for path in paths:
        document = load_json(path)
        add_kineto(trace, marks, document)
        for device in document.get("deviceProperties", []):
            trace.device = trace.device or device.get("name", "")
        if document.get("peak_memory_bytes"):
            trace.peaks["GPU allocated, since the run began"] = int(document["peak_memory_bytes"])
    main = min((thread for _, _, _, thread in marks), default=None)
    trace.steps = {step: (start, end) for step, start, end, thread in sorted(marks) if thread == main}
    trace.ranges = [with_step(r, trace.steps) for r in trace.ranges]
    if not trace.ranges and not trace.works:
        raise BadInput(f"{path.name} holds neither ranges nor operations: capture again with profiling/capture.py.")
    return trace


def load_json(path: Path) -> dict:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            document = json.load(file)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise BadInput(f"{path.name} is cut short or not JSON ({error}): capture again.") from None
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        raise BadInput(f"{path.name} has no traceEvents, so it is not a torch.profiler trace.")
    return document


def add_kineto(trace: Trace, marks: list, document: dict) -> None:
    """Adds one file's ranges and works; `marks` gets (step, start, end, thread)."""
    launches, ops, gpu, memory = {}, defaultdict(list), [], defaultdict(int)
    for event in document["traceEvents"]:
        kind, name, args = event.get("cat"), str(event.get("name", "")), event.get("args", {})
        if name == "[memory]":
            kind = "CPU" if args.get("Device Type") == 0 else f"GPU {args.get('Device Id')}"
            memory[kind] = max(memory[kind], int(args.get("Total Allocated", 0)))
        if event.get("ph") != "X" or kind is None:
            continue
        start = round(float(event["ts"]) * 1000)
        end = start + round(float(event.get("dur", 0)) * 1000)
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            gpu.append((start, end, name, kind, args))
            continue
        if kind not in ("user_annotation", "cpu_op", "cuda_runtime", "cuda_driver"):
            continue
        thread = (int(event["pid"]), int(event["tid"]))
        if kind == "cpu_op":
            ops[thread].append((start, end, name))
        elif kind != "user_annotation":
            launches[args.get("correlation")] = (thread, (start, end))
        elif match := re.fullmatch(r"ProfilerStep#(\d+)", name):
            marks.append((int(match[1]), start, end, thread))
        else:
            trace.ranges.append(Range(name.removeprefix(DOMAIN + "/"), start, end, thread))
    if gpu:
        trace.works += [gpu_work(*event, launches) for event in gpu]
    else:
        trace.works += [work for thread, found in ops.items() for work in cpu_works(thread, found)]
    trace.peaks |= {f"{kind} allocated inside the window": peak for kind, peak in memory.items()}


def gpu_work(start: int, end: int, name: str, kind: str, args: dict, launches: dict) -> Work:
    thread, launched = launches.get(args.get("correlation"), (None, (0, 0)))
    return Work(
        name, start, end, f"GPU {args.get('device', 0)}", f"stream {args.get('stream', 0)}",
        "kernel" if kind == "kernel" else "copy", end - start, thread, launched,
        (thread, args.get("correlation")) if thread else None,
        registers=args.get("registers per thread"), occupancy=args.get("est. achieved occupancy %"),
    )  # fmt: skip


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
    except (sqlite3.Error, KeyError) as error:
        raise BadInput(
            f"{path.name} cannot be read as an nsys SQLite export ({error}): it may be cut short; export it again."
        ) from None
    trace.steps = steps_of(trace.ranges)
    return trace


def fill_nsys(trace: Trace, rows) -> None:
    strings = {row["id"]: row["value"] for row in rows("StringIds")}
    trace.ranges, unfinished = nvtx_ranges(list(rows("NVTX_EVENTS")), strings)
    launches = {
        (row["globalTid"] & ~0xFFFFFF, row["correlationId"]): (row["globalTid"], (row["start"], row["end"]))
        for row in rows("CUPTI_ACTIVITY_KIND_RUNTIME")
    }
    for table, kind in (("KERNEL", "kernel"), ("MEMCPY", "copy"), ("MEMSET", "copy"), ("GRAPH_TRACE", "graph")):
        seen = {work.call for work in trace.works if work.call}
        for row in rows(f"CUPTI_ACTIVITY_KIND_{table}"):
            work = nsys_work(row, table, kind, strings, launches)
            if kind != "graph" or work.call not in seen:
                trace.works.append(work)
    trace.device = ", ".join(sorted({str(row["name"]) for row in rows("TARGET_INFO_GPU")}))
    if not trace.ranges:
        said = next((f" It says: {text}" for text in strings.values() if "extension is incompatible" in str(text)), "")
        trace.notes.append(
            "No NVTX range was recorded: an nsys older than the nvtx package makes it fall silent; use a newer nsys."
            + said
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
    text = lambda row: strings.get(row.get("textId"), row["text"]) or ""
    domains = {(process(row), row["domainId"]): text(row) for row in events if row["eventType"] == 75}
    known, ranges, unfinished = DOMAIN in domains.values(), [], 0
    for row in events:
        if row["eventType"] not in (59, 60):
            continue
        unfinished += row["end"] is None
        domain = domains.get((process(row), row["domainId"]), f"domain {row['domainId']}" if row["domainId"] else "")
        name = text(row) if domain == DOMAIN or not (domain or known) else f"{domain or 'default'}/{text(row)}"
        if row["end"] is not None:
            steps = (row.get(key) for key in ("int64Value", "uint64Value", "int32Value", "uint32Value"))
            step = next((step for step in steps if step is not None), None)
            ranges.append(Range(name, row["start"], row["end"], nsys_thread(row["globalTid"]), step))
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
        name = strings.get(row["shortName"]) or strings.get(row["demangledName"], "kernel")
    if table == "MEMCPY":
        name = {1: "copy to the GPU", 2: "copy to the host", 8: "copy on the GPU"}.get(row["copyKind"], "copy")
    return Work(
        name, row["start"], row["end"], f"GPU {row['deviceId']}", f"stream {row['streamId']}", kind,
        row["end"] - row["start"], None if global_tid is None else nsys_thread(global_tid), launched,
        None if global_tid is None else call,
        registers=row.get("registersPerThread"), spilled=row.get("localMemoryPerThread"),
    )  # fmt: skip


def steps_of(ranges: list[Range]) -> dict[int, Interval]:
    """When each step ran, from the payloads of the thread that updates: a step lasts until the next one begins.

    Evaluation and what comes before the first step carry the number of the step that follows, so they begin none. Nor
    does weight_sync, which carries that number where it is for an evaluation.
    """
    updater = next((r.thread for r in ranges if r.name == "update"), None)
    mine = [r for r in ranges if r.thread == updater and r.step is not None and r.name != "evaluate"]
    starts, ends = {}, {}
    for r in mine:
        if r.name != "weight_sync":
            starts[r.step] = min(r.start, starts.get(r.step, r.start))
        ends[r.step] = max(r.end, ends.get(r.step, r.end))
    order = sorted(starts, key=starts.get)
    following = [starts[step] for step in order[1:]]
    return {n: (starts[n], end) for n, end in zip(order, [*following, *([ends[order[-1]]] if order else [])])}
