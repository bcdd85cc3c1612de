"""What a report says: its sentences and its tables, as text; page.py writes them as Markdown and HTML."""

import re
from collections import defaultdict
from dataclasses import dataclass

from ncu import METRICS, Kernel
from summary import OTHER, REST, STEP, UNATTRIBUTED, Change, Row, Summary, changes_of, typical
from traces import Trace

NONE = "n/a"
TOP_KERNELS, TOP_RANGES = 5, 12
WORST, LEAST = 3, 0.01  # changes a verdict names: so many, each of at least this part of a step


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
    """`1.21x faster` beyond the spread, within it `no change (1.03x slower)`, with ? where nothing shows the spread."""
    if change.verdict in ("new", "gone", "n/a"):
        return {"new": "only here"}.get(change.verdict, NONE)
    said = show_ratio(change.speedup)
    if change.verdict == "no change":
        return "no change" if said.startswith("1.00") else f"no change ({said})"
    return said + " ?" * (change.verdict == "unknown")


def show_ratio(speedup: float) -> str:
    """As one says it: by how much the one is faster or slower, never below 1."""
    ratio = max(speedup, 1 / speedup)
    return f"{ratio:.{2 if ratio >= 1.005 else 4}f}x {'faster' if speedup > 1 else 'slower'}"


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
    return [sentence(variants[0], v) for v in variants[1:]]


def sentence(first: Variant, other: Variant) -> str:
    changes, a, b = changes_of(first.summaries, other.summaries), first.label, other.label
    if not any(change.speedup for change in changes.values()):
        return f"{b} and {a} have no timed range in common, so their times cannot be compared."
    whole, where = changes.get(STEP), places(first, other, changes)
    if not whole or not whole.speedup:
        return f"The captures hold no steps, so there is no time of a step to compare; {b} against {a}: {where}."
    ratio, where = show_ratio(whole.speedup), f"{beside(first, other)}{cap(where)}."
    times = f"a step takes {show_time(whole.other)} instead of {show_time(whole.first)}"
    within = f"the spread of {show_time(whole.spread)} over the steps"
    if whole.first == whole.other:
        return f"No change between {b} and {a}: a step takes {show_time(whole.first)} in both. {where}"
    if whole.verdict == "unknown":
        return f"{b} against {a}: {times} ({ratio}); one step shows no spread. {where}"
    if whole.verdict == "no change":
        return f"No change between {b} and {a}: {times} ({ratio}), within {within}. {where}"
    return f"{b} is {ratio} than {a}: {times}, beyond {within}. {where}"


def beside(first: Variant, other: Variant) -> str:
    """A sentence where rollout and update run side by side in one of the two alone."""
    both = lambda v: sum(use.both / max(s.num_steps, 1) for s in v.summaries[:1] for use in s.uses)
    does, does_not = sorted((first, other), key=both, reverse=True)
    if not both(does) or both(does_not) or not does_not.summaries[0].uses:
        return ""
    time = show_time(both(does))
    return f"In {does.label} rollout and update run side by side for {time} of it, in {does_not.label} never. "


def places(first: Variant, other: Variant, changes: dict[str, Change]) -> str:
    """Where it changed: the innermost ranges, the largest change first; else what differs, though it may be noise."""
    rows = {row.name: row for v in (other, first) for s in v.summaries for row in s.rows.values()}
    parts, whole = parts_of(rows), changes.get(STEP)
    least = LEAST * max(whole.first, whole.other) if whole and whole.speedup else 0
    moved = [c for part in parts[STEP] for c in moved_in(part, parts, changes) if abs(c.difference) >= least]
    differ = [c for name, c in changes.items() if rows[name].within and name not in parts and c.difference]
    name = lambda found: name_changes(found, first.label, other.label)
    if moved:
        in_turn = [c for c in moved if not any(s.rows[c.name].aside for s in holding(c.name, first, other))]
        most = not whole or not whole.moved or explain(in_turn, whole) or beside(first, other)
        verb = "what changes inside it is" if whole and whole.verdict == "no change" else "it changes in"
        return f"{verb} {name(moved)}" + ("" if most else ", which is not most of it")
    none = "no part of it changed by more than its own spread" + (f" and {LEAST:.0%} of a step" if least else "")
    if whole and whole.moved and differ and not beside(first, other):
        return f"{none}; those that differ most: {name(differ)}"
    unsure = [c for c in differ if c.verdict == "unknown"]
    return f"what differs may be noise: {name(unsure)}" if unsure else none


def holding(name: str, *variants: Variant) -> list[Summary]:
    return [s for v in variants for s in v.summaries if name in s.rows]


def parts_of(rows: dict[str, Row]) -> dict[str, list[str]]:
    """Of the step, and of each range that has some, its parts."""
    parts = defaultdict(list)
    for name, row in rows.items():
        if row.within:
            parts[row.within].append(name)
    return parts


def moved_in(name: str, parts: dict[str, list[str]], changes: dict[str, Change]) -> list[Change]:
    """The innermost changes in a range; its own alone where they are not half of it."""
    found = [change for part in parts.get(name, ()) for change in moved_in(part, parts, changes)]
    return found if not changes[name].moved or explain(found, changes[name]) else [changes[name]]


def explain(found: list[Change], whole: Change) -> bool:
    return 2 * sum(change.difference for change in found) / whole.difference >= 1


def name_changes(found: list[Change], first: str, other: str) -> str:
    """The largest of them, with their times."""
    found = sorted(found, key=lambda c: -abs(c.difference))[:WORST]
    return ", ".join(f"{c.name} ({show_times(c, first, other)})" for c in found)


def show_times(change: Change, first: str, other: str) -> str:
    if change.verdict in ("new", "gone"):
        return f"{show_time(change.first or change.other)}, none in {other if change.first else first}"
    return f"{show_time(change.first)} to {show_time(change.other)}, {show_change(change)}"


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
            if aside := [name for name, row in s.rows.items() if row.aside and row.within == STEP]:
                found.append(f"{v.label}: on threads of their own, beside the rest of a step: {', '.join(aside)}.")
            by_time = sum(r.by_time for n, r in s.rows.items() if n == "backward")
            if by_time:
                found.append(
                    f"{v.label}: {show_time(by_time)} of work in backward was launched by autograd's own thread and "
                    "placed by time."
                )
    return list(dict.fromkeys(found))


# tables


def range_table(variants: list[Variant], verbs: bool) -> Table | None:
    """The rows of the loop; or of every other range."""
    first, gpu = variants[0], any(s.trace.on_gpu for v in variants for s in v.summaries)
    stepped = all(s.trace.steps for v in variants for s in v.summaries)
    names, loop = names_of(variants), loop_of(variants)
    mine = loop if verbs else [name for name in names if name not in loop][:TOP_RANGES]
    what = "kernel" if gpu else "operation"
    header = ["range", "capture", "calls", "host time", f"{what} time", "first to last", "gaps", f"{what}s"]
    header += ["launches"] * gpu + [f"against {first.label}"] * (len(variants) > 1)
    changes = {v.label: changes_of(first.summaries, v.summaries) for v in variants}
    rows = []
    for name in mine:
        for v in variants:
            if holding(name, v):
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


def names_of(variants: list[Variant]) -> dict[str, float]:
    """The rows of all captures in the order of the loop, with their ranks in it."""
    ranks = {name: row.rank for v in variants for s in v.summaries for name, row in s.rows.items()}
    return dict(sorted(ranks.items(), key=lambda pair: pair[1]))


def loop_of(variants: list[Variant]) -> list[str]:
    """The rows of the loop's verbs, or, of a program without them, of its longest ranges."""
    ranks = names_of(variants)
    others = [name for name in ranks if ranks[name] == OTHER]
    left_out = others if set(ranks.values()) & set(range(OTHER)) else others[TOP_RANGES:]
    return [name for name in ranks if name not in left_out]


def indent(name: str, variant: Variant) -> str:
    return "- " * holding(name, variant)[0].rows[name].depth + name


def range_cells(name: str, variant: Variant, stepped: bool, gpu: bool) -> list[str]:
    found = holding(name, variant)
    rows, steps = [s.rows[name] for s in found], sum(s.num_steps for s in found) if stepped else len(found)
    (host, spread), *others = (typical(found, name, key) for key in ("host", "work", "projected", "gaps"))
    worked = any(row.works or row.projected for row in rows)
    work, projected, gaps = (show_time(middle) if worked else NONE for middle, _ in others)
    count = lambda key: show_count(sum(getattr(row, key) for row in rows) / steps)
    if name == UNATTRIBUTED:  # nobody's work has no host time, no first and no last
        total = show_time(sum(row.work for row in rows) / steps)
        return [NONE, NONE, total, NONE, NONE, count("works")] + [count("launches")] * gpu
    within = f" ± {show_time(spread)}" if spread is not None else ""
    if name == REST + STEP:  # its work is unattributed
        return [count("calls"), show_time(host) + within, *[NONE] * (4 + gpu)]
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
    for name in [name for name in loop_of(variants) if name != STEP]:
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
    rows.sort(key=lambda row: [*names_of(variants)].index(row[0]))
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
    "from (update: forward, backward, optimizer; before them the log-probabilities of the policy as it was, logp_old, "
    "and of the frozen one, reference or teacher), and the new weights go to the sampler (weight_sync)",
    "rest of update": "what of it lies in none of its parts, so that with them it adds up",
    "rest of step": "the host's time outside of every range of the thread that steps",
    "host time": "how long the program was inside the range; after the ± comes the spread over the steps",
    "kernel time": "time of the GPU's work that the range asked for, each piece counted in full (without a GPU: of the "
    "CPU operations, called operation time)",
    "first to last": "from the start of the range's first piece of such work to the end of its last",
    "gaps": "the part of 'first to last' in which none of that work ran",
    "launches": "calls that started GPU work; a CUDA graph starts many kernels with one",
    "unattributed": "work that no range asked for, as far as the capture tells; it should be small",
    "1.21x faster, 2.70x slower": "the first capture's time over this one's, this one's over the first's, by the "
    "median step: of 'first to last' where a GPU worked in both, else of the host time",
    "only here": "the first capture has no such range",
    "no change": "the difference is within the spread: largest minus smallest step, or, from five steps on, the 80th "
    "minus the 20th percentile. What differs from one run of a program to the next is in it only where a label was "
    "captured more than once; ? stands where there is too little to see a spread",
}
