"""The pictures of bench/README.md: drawn of what was measured, and of nothing where nothing was.

A picture is two functions: `measured` finds what there is to see, as plain tuples, and `draw` makes a Figure of it.
matplotlib is imported only to draw.
  roofline  kernels and their rivals under the highest roofs measured on the card; below it, each one's share of its own
  decode    tokens a second of a decode step over its rows, that step's roof, and whole rollouts from the same file
  phases    where the seconds of a GRPO step go; at lag 1 the rollout lies beside the update, as it runs
  trl       rollout and update of a step, TRL's and ours
"""

import re
import textwrap
from collections.abc import Callable
from typing import NamedTuple

from . import BENCHES
from .records import timed, title, widest

LOOKS = {"ours fused": "o", "ours": "s", "eager": "x", "GEMMs alone": "^", "others": "D"}
"""A rival by how its name begins."""
BESIDE, UPDATE = ("rollout", "reward"), ("wait", "forward", "backward", "optimizer", "weight_sync")
STEPS = (
    ("lag 0, eager", "eager, lag 0", BESIDE + UPDATE),
    ("lag 0", "fused, lag 0", BESIDE + UPDATE),
    ("lag 1", "fused, lag 1: update", UPDATE),
    ("lag 1", "fused, lag 1: rollout", BESIDE),
)
"""A rival of bench.overlap, its label, and what runs one after the other."""
ROLLOUTS = {"generate": "x", "generate_batch": "+", "ours": "s"}


class Picture(NamedTuple):
    name: str
    kind: str  # of device
    measured: Callable  # (Results, card) -> list, empty where there is nothing to draw
    draw: Callable  # (that list, heading) -> Figure

    def file(self, card):
        words = [self.name, *re.findall(r"[a-z0-9]+", card.lower().removeprefix("nvidia"))]
        return "-".join(words) + ".png"


class Point(NamedTuple):
    """A rival at a case: the least work in flops and bytes, its share of the time that the roofs allow, seconds, and
    the roofs measured beside it in flops or bytes a second."""

    file: str
    bench: str
    size: str
    look: str
    flops: float
    bytes: float
    share: float
    seconds: float
    roofs: dict


class Curve(NamedTuple):
    """A model's decode steps: rows, tokens a second, and what the roof allows; rollouts [(rival, rows, tokens/s)]."""

    file: str
    label: str
    rows: tuple
    tokens: tuple
    roof: tuple
    rollouts: list


class Bar(NamedTuple):
    """A step or a part of it: [(phase, where it begins, how long it takes)] and the step's median, in seconds."""

    file: str
    size: str
    label: str
    phases: list
    whole: float


class Side(NamedTuple):
    """Seconds of a step."""

    file: str
    label: str
    rollout: float
    update: float


def points(results, card):
    """-> [Point] of what the tables show. "GEMMs alone" has the work of eager: its products."""
    cases = [pair for bench in BENCHES for pair in widest(results.cases(bench, "cuda", card))]
    return [point for case, file in cases if "roofs" in case for point in points_of(case, file)]


def points_of(case, file):
    rows = {row["rival"]: row for row in case["rows"]}
    for row in timed(case):
        work = rows.get("eager", row) if row["rival"] == "GEMMs alone" else row
        if work["bytes"]:
            floor = max(work["flops"] / case["roofs"]["matmul"], work["bytes"] / case["roofs"][work["roof"]])
            case_of, done = (file, case["bench"], title(case["size"])), (work["flops"], work["bytes"])
            yield Point(*case_of, look_of(row["rival"]), *done, floor / row["median"], row["median"], case["roofs"])


def look_of(rival):
    return next((start for start in LOOKS if rival.startswith(start)), "others")


def curves(results, card):
    """-> [Curve], for each model and context those of its newest file."""
    models = {}
    for case, file in results.cases("decode_step", "cuda", card):
        size = dict(case["size"])
        rows = size.pop("rows")
        for row in timed(case):
            if row["rival"] == "step" and "floor" in row:
                steps = models.setdefault((size["model"], title(size)), {}).setdefault(file, [])
                steps.append((rows, rows / row["median"], rows / row["floor"]))
    newest = [(*names, max(files, key=results.time), files) for names, files in models.items()]
    return [
        Curve(file, label, *zip(*sorted(files[file])), rollouts(results.files[file], model))
        for model, label, file, files in newest
    ]


def rollouts(file, model):
    """-> [(rival, rows, tokens a second)] of the decoding cases of a model."""
    cases = [case for case in file["cases"] if case["bench"] == "decoding" and case["size"]["model"] == model]
    return [
        (row["rival"], case["size"]["slots"], row["tokens_per_second"])
        for case in cases
        for row in timed(case)
        if "tokens_per_second" in row
    ]


def laid(row, phases):
    """[(phase, begin, seconds)], one after the other."""
    lengths = [row.get(phase) or 0.0 for phase in phases]
    return [(phase, sum(lengths[:i]), length) for i, (phase, length) in enumerate(zip(phases, lengths))]


def bars(results, card):
    """-> [Bar]"""
    found = []
    for case, file in results.cases("overlap", "cuda", card):
        rows = {row["rival"]: row for row in timed(case) if "forward" in row}
        found += [
            Bar(file, title(case["size"]), label, laid(rows[rival], phases), rows[rival]["median"])
            for rival, label, phases in STEPS
            if rival in rows
        ]
    return found


def sides(results, card):
    """-> [Side]"""
    label = "{rival}: {loss}, {reward}, from {start}".format
    return [
        Side(file, label(rival=row["rival"], **case["size"]), row["rollout"], row["update"])
        for case, file in results.cases("trl", "cpu", card)
        for row in timed(case)
        if "update" in row
    ]


def new_figure(heading, height, panels=1, **arguments):
    """-> Figure and its axes as a list, below each other unless arguments say otherwise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    axes = figure.subplots(**{"nrows": panels, "squeeze": False, **arguments})
    return figure, axes.flatten().tolist()


def place_legend(figure, axes, columns):
    """One below all axes, each label once."""
    found = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(found.values(), found, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def scatter(axis, points, x, y):
    """Colours are benchmarks, markers are looks; ours are filled and lie on top."""
    for i, (look, marker) in enumerate(LOOKS.items()):
        for j, bench in enumerate(BENCHES):
            some = [point for point in points if (point.look, point.bench) == (look, bench)]
            face = f"C{j}" if look.startswith("ours") else "none"
            if some:
                style = dict(color=f"C{j}", mfc=face, zorder=9 - i, label=f"_{bench}, {look}")
                axis.plot([*map(x, some)], [*map(y, some)], marker, **style)
    axis.grid(alpha=0.25)


def name_marks(axis, points):
    """What the colours and markers mean, for the legend."""
    for look, marker in LOOKS.items():
        if any(point.look == look for point in points):
            axis.plot([], [], marker, color="black", mfc="black" if look.startswith("ours") else "none", label=look)
    for j, bench in enumerate(BENCHES):
        if any(point.bench == bench for point in points):
            axis.plot([], [], color=f"C{j}", lw=5, label=bench)


def name_of(point):
    return textwrap.fill(f"{point.bench} {point.size}", 40)


def roofline(points, heading):
    """Flops a second over flops a byte of what has flops; below it the share of the roof of all."""
    computing, names = [p for p in points if p.flops], list(dict.fromkeys(name_of(p) for p in points))
    heights = [4.2] * bool(computing) + [0.4 + 0.36 * len(names)]
    figure, axes = new_figure(heading, sum(heights) + 1.4, len(heights), height_ratios=heights)
    if computing:
        draw_roofs(axes[0], computing)
        scatter(axes[0], computing, lambda p: p.flops / p.bytes, lambda p: p.flops / p.seconds / 1e12)
        axes[0].set(xscale="log", yscale="log", xlabel="flops / byte that must be moved", ylabel="Tflop/s")
    scatter(axes[-1], points, lambda p: 100 * p.share, lambda p: names.index(name_of(p)))
    name_marks(axes[-1], points)
    axes[-1].axvline(100, color="gray")
    axes[-1].set_yticks(range(len(names)), names, fontsize=7)
    axes[-1].set(xlim=(0, None), ylim=(len(names) - 0.5, -0.5), xlabel="% of the roof measured beside it")
    place_legend(figure, axes, 4)
    return figure


def draw_roofs(axis, points):
    """min(matmul, bytes a second * flops a byte), for copies and for what only reads."""
    top = {roof: max(point.roofs[roof] for point in points) for roof in ("matmul", "copy", "sum")}
    xs = [point.flops / point.bytes for point in points] + [top["matmul"] / top[roof] for roof in ("copy", "sum")]
    for roof, style in (("copy", "-"), ("sum", "--")):
        line = [min(xs) / 3, top["matmul"] / top[roof], max(xs) * 3]
        label = f"{top['matmul'] / 1e12:.0f} Tflop/s, {top[roof] / 1e12:.2f} TB/s ({roof})"
        axis.plot(line, [min(top["matmul"], top[roof] * x) / 1e12 for x in line], style, color="gray", label=label)


def decode(curves, heading):
    """A panel a model, on one scale."""
    figure, axes = new_figure(heading, 4.5, nrows=1, ncols=len(curves), sharey=True)
    for axis, curve in zip(axes, curves):
        axis.plot(curve.rows, curve.roof, "--", color="gray", label="roof of the step")
        axis.plot(curve.rows, curve.tokens, "o-", color="C0", label="decode step")
        for i, (rival, marker) in enumerate(ROLLOUTS.items()):
            some = [(rows, tokens) for name, rows, tokens in curve.rollouts if name == rival]
            if some:
                axis.plot(*zip(*some), marker, color=f"C{i + 1}", ms=8, label=f"whole rollout, {rival}")
        axis.set_title(curve.label, fontsize=9)
        axis.set(xlabel="rows at once", xscale="log", yscale="log")
        axis.set_xticks(ticks := sorted({*curve.rows, *(rows for _, rows, _ in curve.rollouts)}), ticks, minor=False)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("tokens/s")
    place_legend(figure, axes, 3)
    return figure


def phases(bars, heading):
    """A panel a size, a stack a step."""
    sizes = list(dict.fromkeys(bar.size for bar in bars))
    figure, axes = new_figure(heading, 0.45 * len(bars) + 0.7 * len(sizes) + 1, len(sizes))
    for axis, size in zip(axes, sizes):
        some = [bar for bar in bars if bar.size == size]
        for i, phase in enumerate(BESIDE + UPDATE):
            parts = [(y, *part) for y, bar in enumerate(some) for name, *part in bar.phases if name == phase]
            ys, begins, lengths = zip(*parts)
            axis.barh(ys, lengths, left=begins, color=f"C{i}", label=phase)
        axis.plot([bar.whole for bar in some], range(len(some)), "|", color="black", ms=14, mew=2, label="whole step")
        axis.set_yticks(range(len(some)), [bar.label for bar in some])
        axis.set_title(size, fontsize=9)
        axis.set(xlabel="seconds (medians)", xlim=(0, None))
        axis.invert_yaxis()
    place_legend(figure, axes, 4)
    return figure


def trl(sides, heading):
    """Where a step goes, on both sides."""
    figure, (axis,) = new_figure(heading, 0.4 * len(sides) + 1.3)
    labels, rollouts = [side.label for side in sides], [side.rollout for side in sides]
    axis.barh(labels, rollouts, label="rollout")
    axis.barh(labels, [side.update for side in sides], left=rollouts, label="update")
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a step (medians)")
    place_legend(figure, [axis], 2)
    return figure


PICTURES = {
    "kernels-cuda": Picture("roofline", "cuda", points, roofline),
    "decode_step-cuda": Picture("decode", "cuda", curves, decode),
    "overlap-cuda": Picture("phases", "cuda", bars, phases),
    "trl-cpu": Picture("trl", "cpu", sides, trl),
}
"""By the region they stand above."""
