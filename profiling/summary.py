"""What a trace says: who launched what, a row per range, how busy a device was, and what changed between captures.

Work belongs to every range open on the launching thread at the launch, so `update` holds what `forward` holds.
Per row, summed over its ranges:
  host       the ranges themselves
  work       kernels (or CPU operations), each counted in full even where they ran side by side
  projected  first start to last end of a range's work: what the range takes on the device
  gaps       projected time in which none of that work ran
A range that holds others has a rest, of each of these what lies in none of them, so that all adds up. So have the
steps: the host's time outside of every range.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import median

from intervals import Interval, busy_and_overlap, containing, intersect, length, union
from traces import Range, Trace, Work

VERBS = "wait rollout reward advantage update logp_old reference teacher forward backward optimizer".split()
VERBS += ["weight_sync", "evaluate"]
STEP, UNATTRIBUTED = "step", "unattributed"
REST = "rest of "  # and the name of a range: its time in none of the ranges in it
OTHER = len(VERBS)  # the rank of a range that is no verb
FEW = 5  # steps: below it the spread is largest minus smallest, else the 80th minus the 20th percentile


@dataclass
class Row:
    name: str
    rank: float = OTHER  # in the order of the loop
    within: str = ""  # what it is a part of: a range, or the step
    aside: bool = False  # on a thread beside the one that steps
    depth: int = 0  # how many other ranges it lies in
    calls: int = 0
    host: int = 0
    work: int = 0
    works: int = 0
    launches: int = 0  # launching calls
    projected: int = 0
    gaps: int = 0
    by_time: int = 0  # ns of work attributed by time, not by thread
    registers: int | None = None  # largest
    spilled: int | None = None
    occupancies: list[float] = field(default_factory=list)
    by_step: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))  # host | work | projected | gaps
    top: Counter = field(default_factory=Counter)  # ns per kernel or operation
    counts: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Use:
    """One device over the window of the capture's steps (or of its works). Times in ns."""

    device: str
    span: int
    busy: int
    overlap: int  # two or more lanes active
    lanes: int
    both: int  # rollout's and update's work at the same time


@dataclass(frozen=True)
class Change:
    name: str
    first: float | None  # median ns per step, or per capture where there are no steps
    other: float | None
    spread: float | None  # the larger of the two; None: fewer than two steps
    by: str  # host | projected

    @property
    def speedup(self) -> float | None:
        return self.first / self.other if self.first and self.other else None

    @property
    def difference(self) -> float:
        """ns that it became shorter by; one that is new or gone counts in full."""
        return (self.first or 0.0) - (self.other or 0.0)

    @property
    def moved(self) -> bool:
        return self.verdict in ("faster", "slower", "new", "gone")

    @property
    def verdict(self) -> str:
        """faster | slower | no change | unknown (different, and one step shows no spread) | new | gone | n/a."""
        if not self.speedup:
            return "new" if self.other else "gone" if self.first else "n/a"
        if self.first == self.other:
            return "no change"
        if self.spread is None:
            return "unknown"
        if abs(self.first - self.other) <= self.spread:
            return "no change"
        return "faster" if self.other < self.first else "slower"


def attribute(trace: Trace) -> tuple[list[list[int]], list[bool]]:
    """Per work the indices of the ranges it was launched in, outermost first, and whether that is by time alone.

    CUDA's backward is launched by autograd's own thread. A thread that never opens a range works for the one
    `backward` range open in its process at that time; with none, or several at once, its work stays unattributed.
    """
    spans = [(r.start, r.end) for r in trace.ranges]
    by_thread, launched = defaultdict(list), defaultdict(list)
    for i, r in enumerate(trace.ranges):
        by_thread[r.thread].append(i)
    for i, work in enumerate(trace.works):
        if work.thread:
            launched[work.thread].append(i)
    holders: list[list[int]] = [[] for _ in trace.works]
    by_time = [False] * len(trace.works)
    for thread, mine in launched.items():
        silent = thread not in by_thread
        near = [i for i, r in enumerate(trace.ranges) if r.name == "backward" and r.thread[0] == thread[0]]
        outer = near if silent else by_thread[thread]
        found = containing([spans[i] for i in outer], [trace.works[j].launched for j in mine])
        for j, inside in zip(mine, found):
            inside = [outer[i] for i in inside]
            if silent and len(inside) == 1:
                around = by_thread[trace.ranges[inside[0]].thread]
                inside = [around[i] for i in containing([spans[i] for i in around], [spans[inside[0]]])[0]]
                by_time[j] = True
            holders[j] = inside if not silent or by_time[j] else []
    return holders, by_time


@dataclass
class Summary:
    """A trace with what was computed from it."""

    trace: Trace
    holders: list[list[int]]  # per work, indices of ranges
    rows: dict[str, Row]
    uses: list[Use]

    @property
    def num_steps(self) -> int:
        return len(self.trace.steps)


def summarize(trace: Trace) -> Summary:
    holders, by_time = attribute(trace)
    rows = {STEP: step_row(trace)} if trace.steps else {}  # in the order of the table
    rows |= rows_of(trace, holders, by_time)
    if trace.steps and trace.stepper:
        rows[REST + STEP] = rest_of_steps(trace)
    if trace.works:
        rows[UNATTRIBUTED] = Row(UNATTRIBUTED, OTHER + 1)
        add_range(rows[UNATTRIBUTED], 0, [work for work, inside in zip(trace.works, holders) if not inside])
    return Summary(trace, holders, rows, uses_of(trace, holders))


def rows_of(trace: Trace, holders: list[list[int]], by_time: list[bool]) -> dict[str, Row]:
    """A row per range name, the loop's verbs first, the others by their host time."""
    names = Counter()
    for r in trace.ranges:
        names[r.name] += r.end - r.start
    rows = {name: Row(name, rank(name)) for name in sorted(names, key=lambda n: (rank(n), -names[n]))}
    held, places, around, shown = defaultdict(list), defaultdict(Counter), enclosing(trace), shown_of(trace)
    for work, inside, guessed in zip(trace.works, holders, by_time):
        for name, i in {trace.ranges[i].name: i for i in reversed(inside)}.items():  # of equal names the outermost
            held[i].append(work)
            rows[name].by_time += work.own * guessed
    for i, r in enumerate(trace.ranges):
        row, outer = rows[r.name], {trace.ranges[j].name for j in around[i]}
        row.calls += 1
        row.aside |= bool(trace.stepper) and r.thread[0] == trace.stepper[0] and r.thread != trace.stepper
        if r.name in outer:
            continue
        near = [STEP, *(trace.ranges[j].name for j in around[i] if trace.ranges[j].name in shown)][-1]
        places[r.name][len(outer), near if r.name in shown else ""] += 1
        add_range(row, r.end - r.start, held[i], r.step)
    for name, seen in places.items():
        rows[name].depth, rows[name].within = seen.most_common(1)[0][0]
    return add_rests(rows, trace, held, around)


def add_rests(rows: dict[str, Row], trace: Trace, held: dict, around: list[list[int]]) -> dict[str, Row]:
    """The rows with the rest behind each that has parts; `held`: the work of each range."""
    shown, inside = shown_of(trace), defaultdict(list)
    name = lambda i: trace.ranges[i].name
    for j, outer in enumerate(around):
        for i in outer:
            if {name(i), name(j)} <= shown and name(i) != name(j):
                inside[i].append(j)
    whole = dict.fromkeys(name(i) for i in inside)
    for i, r in enumerate(trace.ranges):
        if r.name in whole and r.name not in map(name, around[i]):
            row = rows.setdefault(REST + r.name, Row(REST + r.name, within=r.name, depth=rows[r.name].depth + 1))
            add_rest(row, r, held[i], [(trace.ranges[j], held[j]) for j in inside[i]])
    for outer in whole:
        parts = [row.rank for row in rows.values() if row.within == outer and row.name != REST + outer]
        rows[REST + outer].rank = min(max([rows[outer].rank, *parts]) + 0.5, OTHER)
    return rows


def add_rest(row: Row, whole: Range, works: list[Work], parts: list[tuple[Range, list[Work]]]) -> None:
    """Adds what of one range and its work lies in none of its parts."""
    taken = {id(work) for _, held in parts for work in held}
    own = [work for work in works if id(work) not in taken]
    inside, spans = union((r.start, r.end) for r, _ in parts), union(span_of(held) for _, held in parts if held)
    span, busy = [span_of(works)] if works else [], union((work.start, work.end) for work in works)
    outside = lambda found, inner: length(found) - length(intersect(found, inner))
    times = {"host": outside([(whole.start, whole.end)], inside), "work": sum(work.own for work in own)}
    times["projected"] = outside(span, spans)
    times["gaps"] = times["projected"] - outside(busy, spans)
    row.calls += 1
    add_times(row, times, whole.step)
    add_works(row, own)


def rest_of_steps(trace: Trace) -> Row:
    """The host's time of the steps in none of the ranges of their thread."""
    row, shown = Row(REST + STEP, OTHER - 0.5, STEP, calls=len(trace.steps)), shown_of(trace)
    inside = union((r.start, r.end) for r in trace.ranges if r.thread == trace.stepper and r.name in shown)
    for step, (start, end) in trace.steps.items():
        add_times(row, {"host": end - start - length(intersect([(start, end)], inside))}, step)
    return row


def rank(name: str) -> int:
    return VERBS.index(name) if name in VERBS else OTHER


def shown_of(trace: Trace) -> set[str]:
    """The names that stand for the whole loop: the verbs, or, in a trace that has none, all."""
    names = {r.name for r in trace.ranges}
    return names & set(VERBS) or names


def enclosing(trace: Trace) -> list[list[int]]:
    """Per range the indices of the other ranges of its thread that hold it, outermost first."""
    by_thread, outer = defaultdict(list), [[] for _ in trace.ranges]
    for i, r in enumerate(trace.ranges):
        by_thread[r.thread].append(i)
    for mine in by_thread.values():
        spans = [(trace.ranges[i].start, trace.ranges[i].end) for i in mine]
        for j, inside in zip(mine, containing(spans, spans)):
            before = [mine[i] for i in inside]
            outer[j] = before[: before.index(j)]
    return outer


def add_range(row: Row, host: int, works: list[Work], step: int | None = None) -> None:
    """Adds one range of `host` ns and what it launched."""
    times = {"host": host, "work": sum(work.own for work in works), "projected": 0, "gaps": 0}
    if works:
        times["projected"] = length([span_of(works)])
        times["gaps"] = times["projected"] - length(union((work.start, work.end) for work in works))
    add_times(row, times, step)
    add_works(row, works)


def span_of(works: list[Work]) -> Interval:
    return min(work.start for work in works), max(work.end for work in works)


def add_times(row: Row, times: dict[str, int], step: int | None) -> None:
    for key, ns in times.items():
        setattr(row, key, getattr(row, key) + ns)
        if step is not None:
            row.by_step[key][step] += ns


def add_works(row: Row, works: list[Work]) -> None:
    row.works += len(works)
    row.launches += len({work.call for work in works if work.call})
    for work in works:
        row.top[work.name] += work.own
        row.counts[work.name] += 1
    row.registers = max((w.registers for w in works if w.registers is not None), default=row.registers)
    row.spilled = max((w.spilled for w in works if w.spilled is not None), default=row.spilled)
    row.occupancies += [w.occupancy for w in works if w.occupancy is not None]


def step_row(trace: Trace) -> Row:
    """Whole steps on the host's clock, with the work that began in them."""
    row = Row(STEP, -1, calls=len(trace.steps))
    windows = sorted((start, end, step) for step, (start, end) in trace.steps.items())
    begun = containing([(start, end) for start, end, _ in windows], [(work.start, work.start) for work in trace.works])
    held = defaultdict(list)
    for work, inside in zip(trace.works, begun):
        if inside:
            held[inside[-1]].append(work)
    for i, (start, end, step) in enumerate(windows):
        add_range(row, end - start, held[i], step)
    return row


def window_of(trace: Trace) -> Interval:
    """From the start of the first step to the end of the last; without steps, over all that was recorded."""
    found = list(trace.steps.values()) or [(x.start, x.end) for x in (*trace.ranges, *trace.works)]
    return (min(s for s, _ in found), max(e for _, e in found)) if found else (0, 0)


def uses_of(trace: Trace, holders: list[list[int]]) -> list[Use]:
    """How busy each device was, clipped to the window."""
    first, last = window_of(trace)
    lanes, verbs = defaultdict(lambda: defaultdict(list)), defaultdict(lambda: defaultdict(list))
    for work, inside in zip(trace.works, holders):
        if work.outer and (clipped := (max(work.start, first), min(work.end, last)))[0] < clipped[1]:
            lanes[work.device][work.thread[0] if work.device == "CPU" else 0, work.lane].append(clipped)
            for name in {trace.ranges[i].name for i in inside} & {"rollout", "update"}:
                verbs[work.device][name].append(clipped)
    uses = []
    for device in sorted(lanes):
        busy, overlap = busy_and_overlap(lanes[device].values())
        both = length(intersect(union(verbs[device]["rollout"]), union(verbs[device]["update"])))
        uses.append(Use(device, last - first, busy, overlap, len(lanes[device]), both))
    return uses


def spread_of(values: list[float]) -> float | None:
    """How far apart the steps lie; None when there are fewer than two."""
    if len(values) < 2:
        return None
    if len(values) < FEW:
        return max(values) - min(values)
    ordered = sorted(values)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]
    return at(0.8) - at(0.2)


def changes_of(first: list[Summary], other: list[Summary]) -> dict[str, Change]:
    """Per row of either variant, how it changed: projected time where both have GPU work in it, else host time."""
    names = [name for s in (*first, *other) for name in s.rows if name != UNATTRIBUTED]
    if not (first and other):  # of ncu there is no timeline
        return {}
    return {name: change_of(name, first, other) for name in dict.fromkeys(names)}


def change_of(name: str, first: list[Summary], other: list[Summary]) -> Change:
    sides, both = (first, other), [s for s in (*first, *other) if name in s.rows]
    on_gpu = all(s.trace.on_gpu and s.rows[name].projected for s in both)
    by = "projected" if on_gpu and name != STEP else "host"
    middles, spreads = zip(*(typical(side, name, by) for side in sides))
    known = [spread for middle, spread in zip(middles, spreads) if middle is not None]
    return Change(name, *middles, None if None in known else max(known), by)


def typical(side: list[Summary], name: str, key: str) -> tuple[float | None, float | None]:
    """(median, spread) of a row's time over the steps of all captures; a capture without steps is one value."""
    rows = [s.rows[name] for s in side if name in s.rows]
    values = [ns for row in rows for ns in row.by_step[key].values()] if all(row.by_step for row in rows) else []
    values = values or [float(getattr(row, key)) for row in rows]
    return median(values) if values else None, spread_of(values)
