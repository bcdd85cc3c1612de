"""Pictures of a trace: lanes of bars coloured by the loop's verbs, as SVG, PNG and chrome (Perfetto) JSON.

Time 0 is the start of a capture's first step, so that captures lie under each other at the same scale.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from summary import VERBS, Summary, enclosing, shown_of, window_of
from traces import Thread, Trace, by_kind, thread_name

COLOURS = {
    "rollout": "#8ab8e8",
    "reward": "#e3c567",
    "advantage": "#c9d06b",
    "wait": "#c8ccd2",
    "update": "#bcb6e0",
    "logp_old": "#86c5d8",
    "reference": "#a98fd4",
    "teacher": "#8f9fd4",
    "forward": "#7fcabd",
    "backward": "#f2a878",
    "optimizer": "#e39ac0",
    "weight_sync": "#d0b48a",
    "evaluate": "#a8cf8e",
    "other": "#aab2bb",
}
WIDTH, LABEL, LANE, GAP, TOP = 1100, 150, 20, 4, 26  # of the SVG, in its own units
FINEST = 2000  # bars of a lane: works closer than span / FINEST become one
LEAST = 1000  # lanes of work with less than span / LEAST in them are not drawn


@dataclass
class Lane:
    label: str
    bars: list[tuple[int, int, str]] = field(default_factory=list)  # (start, end, verb), ns since the first step


def lanes_of(summary: Summary) -> list[Lane]:
    """Per thread its ranges, one lane a nesting level; per stream (or thread of a CPU) the work, by innermost verb."""
    trace, (start, end) = summary.trace, window_of(summary.trace)
    shown, outer = shown_of(trace), enclosing(trace)
    threads, lanes = name_threads(trace, shown), {}
    for i, r in sorted(enumerate(trace.ranges), key=lambda pair: pair[1].start):
        if r.name in shown and start <= r.start < end:
            depth = len({trace.ranges[j].name for j in outer[i]} & shown)
            place, name = threads[r.thread]
            lane = lanes.setdefault((0, *place, 0, depth), Lane("ranges in them" if depth else f"{name}: ranges"))
            lane.bars.append((r.start - start, r.end - start, r.name))
    ranges = set(lanes)
    finest = (end - start) // FINEST
    for work, inside in sorted(zip(trace.works, summary.holders), key=lambda pair: pair[0].start):
        if not work.outer or not start <= work.start < end:
            continue
        names = [trace.ranges[i].name for i in inside if trace.ranges[i].name in shown]
        key, label = (1, work.device, work.lane), f"{work.device}, {work.lane}"
        if work.device == "CPU":
            place, name = threads[work.thread]
            key, label = (0, *place, 1), f"{name}: operations"
        lane = lanes.setdefault(key, Lane(label))
        add_bar(lane, work.start - start, work.end - start, names[-1] if names else "other", finest)
    least = (end - start) // LEAST
    busy = lambda lane: sum(stop - begin for begin, stop, _ in lane.bars)
    return [lanes[key] for key in sorted(lanes) if key in ranges or busy(lanes[key]) > least]


def name_threads(trace: Trace, shown: set[str]) -> dict[Thread, tuple[tuple, str]]:
    """Per thread (where its lane goes, its name): the main one, then the others by what they do most.

    Threads of a process that do the same share a lane: a pool of them, or one after the other.
    """
    times = {
        thread: Counter() for thread in [w.thread for w in trace.works if w.thread] + [r.thread for r in trace.ranges]
    }
    for r in trace.ranges:
        if r.name in shown:
            times[r.thread][r.name] += r.end - r.start
    processes = sorted({process for process, _ in times}, key=by_kind)
    named = {}
    for (process, thread), verbs in times.items():
        name = f"{verbs.most_common(1)[0][0]} thread" if verbs else "other threads"
        name = "main thread" if process == thread else name
        rank = f"rank {processes.index(process)}, " if len(processes) > 1 else ""
        order = min((VERBS.index(verb) for verb in verbs if verb in VERBS), default=len(VERBS))
        named[process, thread] = (processes.index(process), name != "main thread", order, name), rank + name
    return named


def add_bar(lane: Lane, start: int, end: int, verb: str, finest: int) -> None:
    if lane.bars and lane.bars[-1][2] == verb and start - lane.bars[-1][1] <= finest:
        lane.bars[-1] = (lane.bars[-1][0], max(end, lane.bars[-1][1]), verb)
    else:
        lane.bars.append((start, end, verb))


def colour(verb: str) -> str:
    return COLOURS.get(verb, COLOURS["other"])


def ticks(span: int) -> list[int]:
    """Round times from 0 to `span` ns, at most nine."""
    step = next(m * 10**e for e in range(20) for m in (1, 2, 5) if m * 10**e * 8 >= span)
    return list(range(0, span + 1, step))


def svg(summary: Summary, span: int, show_time) -> str:
    """The lanes of one capture at a scale where `span` ns fill the width; `show_time(ns)` writes a time."""
    lanes, start = lanes_of(summary), window_of(summary.trace)[0]
    x = lambda ns: round(LABEL + ns * (WIDTH - LABEL - 10) / max(span, 1), 2)
    height = TOP + len(lanes) * (LANE + GAP) + 4
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="timeline of {escape(summary.trace.label)}">']
    for ns in ticks(span):
        out.append(f'<line class="tick" x1="{x(ns)}" x2="{x(ns)}" y1="{TOP - 6}" y2="{height}"/>')
        if x(ns) < WIDTH - 40:
            out.append(f'<text class="small" x="{x(ns) + 3}" y="10">{show_time(ns)}</text>')
    for step, (begin, _) in summary.trace.steps.items():
        at = x(begin - start)
        out.append(f'<line class="step" x1="{at}" x2="{at}" y1="{TOP - 12}" y2="{height}"/>')
        out.append(f'<text class="small" x="{at + 3}" y="{TOP - 4}">step {step}</text>')
    for i, lane in enumerate(lanes):
        y = TOP + i * (LANE + GAP)
        out.append(f'<text class="label" x="0" y="{y + 14}">{escape(lane.label)}</text>')
        out += [bar_svg(bar, x, y, show_time) for bar in lane.bars]
    return "\n".join([*out, "</svg>"])


def bar_svg(bar: tuple[int, int, str], x, y: int, show_time) -> str:
    start, end, verb = bar
    width = max(round(x(end) - x(start), 2), 0.3)
    name = f'<text class="inside" x="{x(start) + 3}" y="{y + 14}">{escape(verb)}</text>'
    title = f"<title>{escape(verb)}, {show_time(end - start)} from {show_time(start)}</title>"
    rect = f'<rect x="{x(start)}" y="{y}" width="{width}" height="{LANE}" fill="{colour(verb)}">{title}</rect>'
    return rect + (name if width > 7 * len(verb) + 6 else "")


def png(summaries: list[Summary], path: Path) -> None:
    """The timelines under each other as a picture for a README."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    all_lanes = [lanes_of(s) for s in summaries]
    span = max(end - start for start, end in (window_of(s.trace) for s in summaries))
    unit, size = ("s", 1e9) if span >= 2e9 else ("ms", 1e6)
    heights = [len(lanes) + 1 for lanes in all_lanes]
    inches, sharing = (11, 0.36 * sum(heights) + 1), {"height_ratios": heights}
    figure, axes = plt.subplots(len(heights), figsize=inches, sharex=True, squeeze=False, gridspec_kw=sharing)
    for axis, s, lanes in zip(axes.flat, summaries, all_lanes):
        for row, lane in enumerate(lanes):
            bars = [(start / size, (end - start) / size) for start, end, _ in lane.bars]
            axis.broken_barh(bars, (row - 0.42, 0.84), facecolors=[colour(verb) for _, _, verb in lane.bars])
        for begin, _ in s.trace.steps.values():
            axis.axvline((begin - window_of(s.trace)[0]) / size, color="#555", lw=0.8, ls=":")
        axis.set_yticks(range(len(lanes)), [lane.label for lane in lanes], fontsize=8, parse_math=False)
        axis.set_ylim(len(lanes) - 0.4, -0.6)
        axis.set_xlim(0, max(span, 1) / size)
        axis.set_title(s.trace.label, loc="left", fontsize=10, parse_math=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].set_xlabel(f"{unit} since the start of the first step of the window (dotted: steps)")
    verbs = [
        verb for verb in COLOURS if any(verb == bar[2] for lanes in all_lanes for lane in lanes for bar in lane.bars)
    ]
    patches = [Patch(color=colour(v), label=v) for v in verbs]
    figure.legend(handles=patches, ncols=len(verbs), loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_chrome(summaries: list[Summary], path: Path) -> None:
    """Every range and outermost work of all captures, one process each, for ui.perfetto.dev. Times in microseconds."""
    events: list[dict] = []
    for pid, s in enumerate(summaries):
        start, lanes = window_of(s.trace)[0], {}
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": s.trace.label}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
        found = [((f"{thread_name(r.thread)}: ranges", r.thread), r, {"step": r.step}) for r in s.trace.ranges]
        for work, inside in zip(s.trace.works, s.holders):
            if work.outer:
                lane = f"{work.lane}: operations" if work.device == "CPU" else f"{work.device}, {work.lane}"
                within = "/".join(s.trace.ranges[i].name for i in inside)
                found.append(((lane, work.thread if work.device == "CPU" else None), work, {"range": within}))
        for key, x, args in found:
            tid = lanes.setdefault(key, len(lanes) + 1)
            event = {"ph": "X", "name": x.name, "pid": pid, "tid": tid, "args": args}
            events.append(event | {"ts": (x.start - start) / 1000, "dur": (x.end - x.start) / 1000})
        for (label, _), tid in lanes.items():
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": label}})
    path.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":")))
