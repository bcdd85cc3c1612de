"""What a report says: its sentences and its tables, as text; page.py writes them as Markdown and HTML."""

import re
from collections import defaultdict
from dataclasses import dataclass

from ncu import METRICS, Kernel
from summary import STEP, UNATTRIBUTED, VERBS, Change, Row, Summary, changes_of, typical
from traces import Trace

NONE = "n/a"
TOP_KERNELS, TOP_RANGES = 5, 12
WORST = 3  # rows a verdict names


@dataclass
class Variant:
    """What one label stands for: captures with a timeline (repeats of each other), and ncu's, which have none."""

    label: str
    traces: list[Trace]
    summaries: list[Summary]  # of the traces with a timeline

    @property
    def kernels(self) -> list[Kernel]:
        return [kernel for trace in self.traces for kernel in trace.kernels]

    @property
    def bytes_model(self) -> dict[str, float]:
        return {name: count for trace in self.traces for name, count in trace.bytes_model.items()}


@dataclass
class Table:
    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    folded: bool = False
    words: bool = False  # all columns read from the left


def show_time(ns: float | None) -> str:
    """A time of `ns` nanoseconds in the unit that suits it, three digits."""
    if not ns:
        return NONE if ns is None else "0"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if size <= abs(ns) < 1000 * size:
            return f"{ns / size:.{3 - len(str(int(abs(ns) / size)))}f} {unit}"
    return f"{ns:.0f} ns" if abs(ns) < 1e3 else f"{ns / 1e9:,.0f} s"


def show_bytes(count: float | None) -> str:
    if count is None:
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def show_count(count: float) -> str:
    return f"{count:,.0f}" if count == int(count) else f"{count:,.1f}"


def show_share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else NONE


def scrub(text: str) -> str:
    """The text with absolute paths cut to their last part: a report is published, a machine's folders are not."""
    return re.sub(r"(?<![\w./:>-])~?/(?:[^\s/'\"=:,]+/)*([^\s/'\"=:,]*)", r".../\1", text)


def show_change(change: Change) -> str:
    """`1.21x` with its verdict: faster or slower beyond the spread, no change, or ? where nothing shows the spread."""
    if not change.speedup:
        return NONE
    marks = {"faster": "faster", "slower": "slower", "no change": "no change", "unknown": "?"}
    return f"{change.speedup:.2f}x {marks[change.verdict]}"


# what is said


def device_line(variants: list[Variant]) -> str:
    traces = [trace for v in variants for trace in v.traces]
    on_gpu = any(trace.on_gpu for trace in traces)
    devices = {t.device or str(t.provenance.get("device", "")) for t in traces}
    names = ", ".join(sorted(devices - {""})) or "a device the captures do not name"
    if on_gpu:
        return f"Device: {names}."
    if not any(trace.works for trace in traces):
        return f"Device: {names}. No work of a GPU was recorded: there are host times only."
    return f"Device: {names}. No GPU took part: times are of CPU operations on their threads, not of GPU kernels."


def verdict(variants: list[Variant]) -> list[str]:
    """A sentence per later variant: which is faster, by how much, whether beyond the spread, and where."""
    first = variants[0]
    return [sentence(first.label, v.label, changes_of(first.summaries, v.summaries), v) for v in variants[1:]]


def sentence(first: str, other: str, changes: dict[str, Change], variant: Variant) -> str:
    if not any(change.speedup for change in changes.values()):
        return f"{other} and {first} have no timed range in common, so their times cannot be compared."
    whole = changes.get(STEP)
    where = places(changes, variant)
    if not whole or not whole.speedup:
        return (
            f"The captures hold no steps, so there is no time of a step to compare; {other} against {first}: {where}."
        )
    times = f"a step takes {show_time(whole.other)} instead of {show_time(whole.first)} ({whole.speedup:.2f}x)"
    if whole.first == whole.other:
        return f"No change between {other} and {first}: a step takes {show_time(whole.first)} in both. {cap(where)}."
    if whole.verdict == "unknown":
        return f"{other} against {first}: {times}; one step shows no spread. {cap(where)}."
    within = f"the spread of {show_time(whole.spread)} over the steps"
    if whole.verdict == "no change":
        return f"No change between {other} and {first}: {times}, within {within}. {cap(where)}."
    return f"{other} is {whole.verdict} than {first}: {times}, beyond {within}. {cap(where)}."


def places(changes: dict[str, Change], variant: Variant) -> str:
    """The innermost verbs that changed most, by time; where no spread is known, those that differ most."""
    rows = {name: row for s in variant.summaries for name, row in s.rows.items() if name != STEP}
    verbs = [name for name in rows if name in VERBS and name in changes] or [n for n in rows if n in changes]
    inner = [name for name in verbs if name != "update" or not {"forward", "backward", "optimizer"} & set(verbs)]
    known = [changes[n] for n in inner if changes[n].speedup]
    known.sort(key=lambda c: -abs(c.first - c.other))
    for verdicts, said in ((("faster", "slower"), "it changes in "), (("unknown",), "what differs may be noise: ")):
        if moved := [c for c in known if c.verdict in verdicts]:
            return said + ", ".join(
                f"{c.name} ({show_time(c.first)} to {show_time(c.other)}, {show_change(c)})" for c in moved[:WORST]
            )
    return "no part of it changed beyond its own spread"


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def notes(variants: list[Variant]) -> list[str]:
    found = [f"{v.label}: {scrub(note)}" for v in variants for trace in v.traces for note in trace.notes]
    for v in variants:
        if len(v.summaries) > 1:
            found.append(
                f"{v.label}: {len(v.summaries)} captures; the times of ranges are of all of their steps, the other "
                "tables and the timeline of the first."
            )
        ranks = {r.thread[0] for s in v.summaries[:1] for r in s.trace.ranges}
        if len(ranks) > 1:
            found.append(f"{v.label}: {len(ranks)} processes; calls, times and counts of ranges are sums over them.")
        for s in v.summaries[:1]:
            by_time = sum(r.by_time for n, r in s.rows.items() if n == "backward")
            if by_time:
                found.append(
                    f"{v.label}: {show_time(by_time)} of work in backward was launched by autograd's own thread and "
                    "placed by time."
                )
    return list(dict.fromkeys(found))


# tables


def range_table(variants: list[Variant], verbs: bool) -> Table | None:
    """The loop's verbs, `step` and `unattributed`; or every other range."""
    first, gpu = variants[0], any(s.trace.on_gpu for v in variants for s in v.summaries)
    stepped = all(s.trace.steps for v in variants for s in v.summaries)
    names = [n for v in variants for s in v.summaries for n in s.rows]
    loop = (STEP, *VERBS, UNATTRIBUTED)
    only_others = not set(names) & set(VERBS)
    mine = [n for n in dict.fromkeys(names) if (n in loop or only_others) == verbs]
    mine = [n for n in loop if n in mine] + [n for n in mine if n not in loop]
    mine = mine if verbs and not only_others else mine[: TOP_RANGES + 2]
    what = "kernel" if gpu else "operation"
    header = ["range", "capture", "calls", "host time", f"{what} time", "first to last", "gaps", f"{what}s"]
    header += ["launches"] * gpu + [f"against {first.label}"] * (len(variants) > 1)
    changes = {v.label: changes_of(first.summaries, v.summaries) for v in variants}
    rows = []
    for name in mine:
        for v in variants:
            if any(name in s.rows for s in v.summaries):
                change = changes[v.label].get(name)
                rows.append([indent(name, v), v.label, *range_cells(name, v, stepped, gpu)])
                rows[-1] += ["" if v is first or not change else show_change(change)] * (len(variants) > 1)
    if not rows:
        return None
    times = (
        "Times are of the median step of the window, with the spread over its steps; counts are per step on average."
    )
    note = times if stepped else "Sums over the whole capture: it holds no steps."
    title = "Where the time goes" if verbs else "Other ranges"
    return Table(title, note, header, rows, folded=not verbs)


def indent(name: str, variant: Variant) -> str:
    depth = next(s.rows[name].depth for s in variant.summaries if name in s.rows)
    return "- " * depth + name


def range_cells(name: str, variant: Variant, stepped: bool, gpu: bool) -> list[str]:
    found = [s for s in variant.summaries if name in s.rows]
    rows, steps = [s.rows[name] for s in found], sum(s.num_steps for s in found) if stepped else len(found)
    (host, spread), *others = (typical(found, name, key) for key in ("host", "work", "projected", "gaps"))
    work, projected, gaps = (show_time(middle) if any(row.works for row in rows) else NONE for middle, _ in others)
    count = lambda key: show_count(sum(getattr(row, key) for row in rows) / steps)
    if name == UNATTRIBUTED:  # nobody's work has no host time, no first and no last
        total = show_time(sum(row.work for row in rows) / steps)
        return [NONE, NONE, total, NONE, NONE, count("works")] + [count("launches")] * gpu
    within = f" ± {show_time(spread)}" if spread is not None else ""
    return [count("calls"), show_time(host) + within, work, projected, gaps, count("works")] + [count("launches")] * gpu


def use_table(variants: list[Variant]) -> Table | None:
    rows = []
    for v in variants:
        for s in v.summaries[:1]:
            for use in s.uses:
                both = show_time(use.both / max(s.num_steps, 1))
                has_both = {"rollout", "update"} <= set(s.rows)
                shares = [show_share(part, use.span) for part in (use.busy, use.span - use.busy, use.overlap)]
                rows.append([use.device, v.label, *shares, str(use.lanes), both if has_both else NONE])
    if not rows:
        return None
    header = ["device", "capture", "busy", "idle (bubble)", "two or more at once", "streams or threads"]
    return Table(
        "How busy the device is",
        "Shares of the window. The last column is the time, per step, in which work of rollout and of update ran "
        "side by side: 0 when they take turns.",
        [*header, "rollout beside update"],
        rows,
    )


def kernel_table(variants: list[Variant]) -> Table | None:
    """The largest kernels (or operations) under each verb, by time not spent in others inside them."""
    rows = []
    names = [n for v in variants for s in v.summaries[:1] for n in s.rows]
    verbs = [n for n in dict.fromkeys(names) if n in (*VERBS, UNATTRIBUTED)] or list(dict.fromkeys(names))[:TOP_RANGES]
    for name in verbs:
        found = [s.rows.get(name, Row(name)) for v in variants for s in v.summaries[:1]]
        top = dict.fromkeys(k for row in found for k, _ in row.top.most_common(TOP_KERNELS))
        for kernel in sorted(top, key=lambda k: -max(row.top[k] for row in found)):
            cells = [f"{show_time(r.top[kernel])}, {r.counts[kernel]:,}" if r.counts[kernel] else "none" for r in found]
            rows.append([name, kernel if len(kernel) < 80 else kernel[:77] + "...", *cells])
    if not rows:
        return None
    labels = [v.label for v in variants for _ in v.summaries[:1]]
    note = "Time of its own and count, over the whole window."
    return Table("Largest kernels or operations of each range", note, ["range", "name", *labels], rows, folded=True)


def hardware_table(variants: list[Variant]) -> Table | None:
    """Registers, local memory and occupancy where nsys or Kineto recorded them."""
    rows = []
    for v in variants:
        for s in v.summaries[:1]:
            for row in s.rows.values():
                if row.registers is not None or row.occupancies:
                    occupancy = sum(row.occupancies) / len(row.occupancies) if row.occupancies else None
                    registers = NONE if row.registers is None else str(row.registers)
                    percent = NONE if occupancy is None else f"{occupancy:.0f}%"
                    rows.append([row.name, v.label, registers, show_bytes(row.spilled), percent])
    if not rows:
        return None
    rows.sort(key=lambda row: [*VERBS, row[0]].index(row[0]))
    header = ["range", "capture", "registers a thread (largest)", "local memory a thread (largest)", "occupancy (mean)"]
    return Table("What the kernels use", "Local memory is where spilled registers go.", header, rows, folded=True)


def ncu_table(variants: list[Variant]) -> Table | None:
    """Per kernel of an ncu capture its counters, and its DRAM bytes against the model of the capture."""
    measured = [m for m in METRICS if any(m in k.metrics for v in variants for k in v.kernels)]
    rows = []
    for v in variants:
        groups = defaultdict(list)
        for kernel in v.kernels:
            groups[kernel.ranges[-1] if kernel.ranges else NONE, kernel.name].append(kernel)
        for (within, name), same in sorted(groups.items(), key=lambda g: -total(g[1], "gpu__time_duration.sum")):
            moved = total(same, "dram__bytes_read.sum") + total(same, "dram__bytes_write.sum")
            model = v.bytes_model.get(name, v.bytes_model.get(within))
            against = f"{moved / len(same) / model:.2f}x of {show_bytes(model)}" if model and moved else NONE
            cells = [show_metric(m, [k.metrics[m] for k in same if m in k.metrics]) for m in measured]
            rows.append([within, name[:77], v.label, str(len(same)), *cells, against])
    if not rows:
        return None
    header = ["range", "kernel", "capture", "count", *(METRICS[m][0] for m in measured), "DRAM against the model"]
    note = "Means per launch. ncu runs each kernel alone with cold caches: this says why, not how long a step is."
    return Table("Kernels by Nsight Compute", note, header, rows)


def total(kernels: list[Kernel], metric: str) -> float:
    return sum(k.metrics.get(metric, 0.0) for k in kernels)


def show_metric(metric: str, values: list[float]) -> str:
    if not values:
        return NONE
    mean, unit = sum(values) / len(values), METRICS[metric][1]
    shown = {"ns": show_time, "bytes": show_bytes, "%": lambda x: f"{x:.0f}%"}.get(unit, lambda x: f"{x:,.3g}")
    return shown(mean)


def memory_table(variants: list[Variant]) -> Table:
    rows = []
    for v in variants:
        peaks = v.summaries[0].trace.peaks if v.summaries else {}
        rows += [[v.label, what, show_bytes(peak)] for what, peak in peaks.items()] or [[v.label, NONE, NONE]]
    return Table("Peak memory", "", ["capture", "what", "peak"], rows)


def provenance_table(variants: list[Variant]) -> Table:
    """A row per thing and value, naming the captures that share it."""
    traces = [(v.label, trace) for v in variants for trace in v.traces]
    keys = ["tool", "tool_version", "device", "driver", "versions", "commit", "dirty", "command", "time", "exit_code"]
    found = [(key, label, show_value(t.provenance.get(key, NONE))) for key in keys for label, t in traces]
    found += [("steps of the window", label, ", ".join(map(str, t.steps)) or "none") for label, t in traces]
    labels = defaultdict(dict)
    for key, label, value in found:
        labels[key, scrub(value)][label] = None
    rows = [[key.replace("_", " "), ", ".join(shared), value] for (key, value), shared in labels.items()]
    return Table("Where this comes from", "", ["", "captures", ""], rows, words=True)


def show_value(value) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value) or NONE


def tables(variants: list[Variant]) -> list[Table]:
    found = [
        range_table(variants, True),
        use_table(variants),
        kernel_table(variants),
        range_table(variants, False),
        hardware_table(variants),
        ncu_table(variants),
        memory_table(variants),
        provenance_table(variants),
    ]
    return [table for table in found if table]


LEGEND = {
    "step": "one turn of the training loop, from its start to the next one's start, on the host's clock",
    "rollout ... weight_sync": "the parts of a step: answers are sampled (rollout), scored (reward, advantage), learnt "
    "from (update: forward, backward, optimizer), and the new weights go to the sampler (weight_sync)",
    "host time": "how long the program was inside the range; after the ± comes the spread over the steps",
    "kernel time": "time of the GPU's work that the range asked for, each piece counted in full (without a GPU: of the "
    "CPU operations, called operation time)",
    "first to last": "from the start of the range's first piece of such work to the end of its last",
    "gaps": "the part of 'first to last' in which none of that work ran",
    "launches": "calls that started GPU work; a CUDA graph starts many kernels with one",
    "unattributed": "work that no range asked for, as far as the capture tells; it should be small",
    "1.21x faster": "the first capture's time over this one's, by the median step: of 'first to last' where a GPU "
    "worked in both, else of the host time",
    "no change": "the difference is within the spread: largest minus smallest step, or, from five steps on, the 80th "
    "minus the 20th percentile. What differs from one run of a program to the next is in it only where a label was "
    "captured more than once; ? stands where there is too little to see a spread",
}
