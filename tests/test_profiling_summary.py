"""profiling/: intervals and rows against tick-by-tick counting, changes against noise, the timeline's lanes."""

import random

import pytest
import sections
import timeline
from intervals import busy_and_overlap, containing, intersect, length, union
from summary import REST, STEP, UNATTRIBUTED, Change, attribute, changes_of, spread_of, summarize
from traces import Range, Trace, Work, read_kineto, read_nsys

from tests.captures import ID, IN_BACKWARD, call_of, event, kineto, nsys, span, two_steps

TICKS = 40


def some(generator: random.Random) -> list[tuple[int, int]]:
    """Up to eight intervals on 0..TICKS, empty and touching ones too."""
    return [tuple(sorted(generator.choices(range(TICKS), k=2))) for _ in range(generator.randrange(8))]


def ticks(intervals) -> set[int]:
    intervals = list(intervals)
    return {t for t in range(TICKS) if any(start <= t < end for start, end in intervals)}


@pytest.mark.parametrize("seed", range(200))
def test_arithmetic_agrees_with_counting_ticks(seed):
    generator = random.Random(seed)
    lanes = [some(generator) for _ in range(generator.randrange(5))]
    a, b = some(generator), some(generator)
    assert ticks(union(a)) == ticks(a) and length(union(a)) == len(ticks(a))
    assert all(x[1] < y[0] for x, y in zip(union(a), union(a)[1:])), "disjoint, sorted and not touching"
    assert ticks(intersect(union(a), union(b))) == ticks(a) & ticks(b)
    assert length(intersect(union(a), union(b))) == len(ticks(a) & ticks(b))
    active = [sum(t in ticks(lane) for lane in lanes) for t in range(TICKS)]
    assert busy_and_overlap(lanes) == (sum(n >= 1 for n in active), sum(n >= 2 for n in active))
    for inner, found in zip(b, containing(a, b)):
        assert sorted(found) == [i for i, x in enumerate(a) if x[0] <= inner[0] and inner[1] <= x[1]]
        assert [a[i] for i in found] == sorted((a[i] for i in found), key=lambda x: (x[0], -x[1])), "outermost first"


@pytest.mark.parametrize("seed", range(30))
def test_rows_agree_with_counting_ticks(seed):
    """host, work, projected and gaps of random nested ranges on two threads whose work runs on three streams."""
    generator = random.Random(seed)
    ranges = []
    for thread in ((1, 1), (1, 2)):
        for base in (0, 20):
            outer = sorted(generator.sample(range(base, base + 19), 2))
            inner = sorted(generator.choices(range(outer[0], outer[1] + 1), k=2))
            ranges += [Range("update", *outer, thread), Range("forward", *inner, thread)]
    works = []
    for i in range(12):
        at, start = generator.randrange(TICKS), generator.randrange(TICKS - 5)
        end, thread = start + generator.randrange(1, 5), (1, generator.randrange(1, 4))
        stream = f"stream {generator.randrange(3)}"
        works.append(Work(f"k{i % 3}", start, end, "GPU 0", stream, "kernel", end - start, thread, (at, at), (1, i)))
    rows = summarize(Trace("nsys", ranges, works)).rows
    inside = lambda r, w: r.thread == w.thread and r.start <= w.launched[0] and w.launched[1] <= r.end
    for name in ("update", "forward"):
        same = [r for r in ranges if r.name == name]
        held = [[w for w in works if inside(r, w)] for r in same]
        projected = [max(w.end for w in ws) - min(w.start for w in ws) for ws in held if ws]
        assert rows[name].calls == len(same) and rows[name].host == sum(r.end - r.start for r in same)
        assert rows[name].work == sum(w.end - w.start for ws in held for w in ws)
        assert rows[name].projected == sum(projected)
        assert rows[name].gaps == sum(projected) - sum(len(ticks((w.start, w.end) for w in ws)) for ws in held)
    updates = [r for r in ranges if r.name == "update"]
    inner = {
        r: [f for f in ranges if f.name == "forward" and f.thread == r.thread and r.start <= f.start <= r.end]
        for r in updates
    }
    ours = {r: [w for w in works if inside(r, w)] for r in ranges}
    extent = lambda ws: [(min(w.start for w in ws), max(w.end for w in ws))] if ws else []
    left = {r: ticks(extent(ours[r])) - ticks(s for f in inner[r] for s in extent(ours[f])) for r in updates}
    rest = rows[REST + "update"]
    assert rest.host == sum(len(ticks([(r.start, r.end)]) - ticks((f.start, f.end) for f in inner[r])) for r in updates)
    assert rest.work == rows["update"].work - rows["forward"].work and rest.projected == sum(map(len, left.values()))
    assert rest.gaps == sum(len(left[r] - ticks((w.start, w.end) for w in ours[r])) for r in updates)
    free = [w for w in works if not any(inside(r, w) for r in ranges)]
    assert rows[UNATTRIBUTED].work == sum(w.end - w.start for w in free)


def test_spread():
    assert spread_of([]) is spread_of([3.0]) is None
    assert spread_of([1, 9, 4]) == 8, "few steps: largest minus smallest"
    assert spread_of([100, 1, 2, 3, 4]) == 4 - 2, "from five on: 80th minus 20th percentile"


def summaries(tmp_path, *rows):
    return [summarize(read_nsys(nsys(tmp_path / f"{i}.sqlite", r))) for i, r in enumerate(rows)]


def test_changes_and_noise(tmp_path):
    slow, fast, noisy = summaries(tmp_path, two_steps(3), two_steps(1), two_steps(1, late=120))
    changes = changes_of([slow], [fast])
    assert changes["forward"].by == "projected" and changes["forward"].speedup == 60 / 20
    assert changes["forward"].verdict == "faster" and changes_of([fast], [slow])["forward"].verdict == "slower"
    assert changes["rollout"].verdict == "no change" and changes["rollout"].speedup == 1
    assert changes_of([slow], [noisy])["update"].verdict == "no change", "half of its steps are as slow"
    assert changes[STEP].by == "host" and changes[STEP].verdict == "no change"
    pooled = changes_of([slow, slow], [fast, noisy])["backward"]
    assert pooled.other == 40 and pooled.spread == 120, "repeats of a label count all steps"


def test_one_step_shows_no_spread(tmp_path):
    rows = two_steps()
    rows["NVTX_EVENTS"] = [r for r in rows["NVTX_EVENTS"] if r.get("int64Value") != 4]
    (one,) = summaries(tmp_path, rows)
    assert changes_of([one], [one])["update"].verdict == "no change", "not a nanosecond"
    (update,) = (r for r in rows["NVTX_EVENTS"] if r.get("textId") == ID["update"])
    (last,) = (k for k in rows["CUPTI_ACTIVITY_KIND_KERNEL"] if k["correlationId"] == call_of(3, IN_BACKWARD))
    update["end"] += 1
    last["end"] += 1
    (late,) = summaries(tmp_path, rows)
    assert changes_of([one], [late])["update"].verdict == "unknown"


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_capture_against_itself_does_not_change(tmp_path, steps):
    events = [span("train/update", *times) for times in ((10, 90), (130, 170))]
    events += [event("cpu_op", "aten::mm", 20, 30)]
    events += [span(f"ProfilerStep#{i}", 100 * i, 100 * i + 100) for i in range(steps)]
    s = summarize(read_kineto([kineto(tmp_path / "a.json", events)]))
    (sentence,) = sections.verdict([sections.Variant(label, [s.trace], [s]) for label in "ab"])
    assert "o part of it changed" in sentence and ("No change between b and a" in sentence) == bool(steps)
    assert {c.verdict for c in changes_of([s], [s]).values()} == {"no change"}


def test_what_may_be_noise_is_not_called_a_change(tmp_path):
    """One step shows no spread; two whose steps differ by more than the captures do show one."""

    def captured(*spans):
        events, start = [event("cpu_op", "aten::mm", 20, 30)], 0
        for i, long in enumerate(spans):
            end = start + long
            events += [span(f"ProfilerStep#{i}", start, end + 10), span("train/update", start, end)]
            start = end + 10
        s = summarize(read_kineto([kineto(tmp_path / "a.json", events)]))
        return sections.Variant(str(spans), [s.trace], [s])

    say = lambda *variants: sections.verdict(list(variants))[0]
    assert "one step shows no spread. What differs may be noise: update (80 ns to 81 ns, 1.01x slower ?)." in say(
        captured(80), captured(81)
    )
    assert say(captured(80, 90), captured(81, 88)).startswith("No change between (81, 88) and (80, 90)")
    said = say(captured(80, 81), captured(90, 91))
    assert said.startswith("(90, 91) is 1.11x slower than (80, 81): a step takes") and "changes in update" in said


REFERENCE = {"rollout": 20, "update": {"reference": 30, "forward": 20, "": 5}}
PARTS = {"rollout": 20, "update": {"forward": 20, "": 5}}


def variant(label: str, *steps: dict, gap: int = 10) -> sections.Variant:
    """One thread's steps, each of its ranges behind the other, as long as said; "": time in none."""
    ranges, bounds, now = [], {}, 0

    def add(parts, step):
        nonlocal now
        for name, long in parts.items():
            start = now
            now += 0 if isinstance(long, dict) else long
            add(long if isinstance(long, dict) else {}, step)
            ranges.extend([Range(name, start, now, (1, 1), step)] if name else [])

    for step, parts in enumerate(steps):
        start = now
        add(parts | {"": gap}, step)
        bounds[step] = (start, now)
    trace = Trace("torch", ranges, steps=bounds, stepper=(1, 1))
    return sections.Variant(label, [trace], [summarize(trace)])


@pytest.mark.parametrize(
    "first, other, said",
    [
        ([REFERENCE] * 2, [PARTS] * 2, "It changes in reference (30 ns, none in b)."),
        ([PARTS] * 2, [REFERENCE] * 2, "It changes in reference (30 ns, none in a)."),
        (
            [PARTS] * 2,
            [PARTS | {"update": {"forward": 20, "": 25}}] * 2,
            "It changes in rest of update (5 ns to 25 ns, 5.00x slower).",
        ),
        (
            [{"update": {"forward": f, "backward": 100 - f}} for f in (40, 60)],
            [{"update": {"forward": f, "backward": 80 - f}} for f in (30, 50)],
            "It changes in update (100 ns to 80 ns, 1.25x faster).",
        ),
        (
            [{"update": {"forward": f, "backward": 100 - f}, "reward": 4} for f in (40, 60)],
            [{"update": {"forward": f, "backward": 80 - f}, "reward": 1} for f in (30, 50)],
            "It changes in update (100 ns to 80 ns, 1.25x faster), reward (4 ns to 1 ns, 4.00x faster).",
        ),
        (
            [{"rollout": x, "update": 100 - x, "reward": 4} for x in (40, 60)],
            [{"rollout": x, "update": 80 - x, "reward": 1} for x in (30, 50)],
            "It changes in reward (4 ns to 1 ns, 4.00x faster), which is not most of it.",
        ),
        (
            [{"rollout": x, "update": 100 - x} for x in (40, 60)],
            [{"rollout": x, "update": 82 - x} for x in (30, 50)],
            "No part of it changed by more than its own spread and 1% of a step; those that differ most: rollout "
            "(50 ns to 40 ns, no change (1.25x faster)), update (50 ns to 42 ns, no change (1.19x faster)).",
        ),
        (
            [PARTS | {"rollout": 500}] * 2,
            [PARTS | {"rollout": 500, "wait": 5}] * 2,
            "No part of it changed by more than its own spread and 1% of a step; those that differ most: wait (5 ns, "
            "none in a).",
        ),
        (
            [{"rollout": x, "reward": 10} for x in (100, 140)],
            [{"rollout": x, "reward": 5} for x in (100, 140)],
            "What changes inside it is reward (10 ns to 5 ns, 2.00x faster).",
        ),
        ([PARTS] * 2, [PARTS] * 2, "No part of it changed by more than its own spread and 1% of a step."),
    ],
)
def test_what_changed_is_named(first, other, said):
    (sentence,) = sections.verdict([variant("a", *first), variant("b", *other)])
    assert sentence.endswith(f". {said}"), sentence
    assert sentence.startswith("No change between") == (first == other or "inside" in said)


def test_time_outside_of_every_range_is_named():
    slow, fast = variant("a", PARTS, PARTS, gap=40), variant("b", PARTS, PARTS)
    (sentence,) = sections.verdict([slow, fast])
    assert sentence.endswith("It changes in rest of step (40 ns to 10 ns, 4.00x faster)."), sentence
    assert [row[0] for row in sections.range_table([slow], True).rows] == [
        "step", "rollout", "update", "- forward", "- rest of update", "rest of step"
    ]  # fmt: skip


def test_a_rollout_beside_the_update_is_what_changed():
    """The step is shorter, though no part of it is: two of them run at once."""
    made = []
    for label, thread, start in (("lag 0", 1, 100), ("lag 1", 2, 0)):
        ranges, works, steps = [], [], {}
        for step in (0, 1):
            base, end = step * (100 + start), (step + 1) * (100 + start)
            spans = (("update", 1, base, base + 100), ("rollout", thread, base + start, base + start + 100))
            ranges += [Range(name, *times, (1, t), step) for name, t, *times in spans]
            works += [
                Work(name, *times, "CPU", f"thread {t}", "op", 100, (1, t), times, (name, step))
                for name, t, *times in spans
            ]
            steps[step] = (base, end)
        trace = Trace("torch", ranges, works, steps, stepper=(1, 1))
        made.append(sections.Variant(label, [trace], [summarize(trace)]))
    assert sections.verdict(made) == [
        "lag 1 is 2.00x faster than lag 0: a step takes 100 ns instead of 200 ns, beyond the spread of 0 over the "
        "steps. In lag 1 rollout and update run side by side for 100 ns of it, in lag 0 never. No part of it changed "
        "by more than its own spread and 1% of a step."
    ]


@pytest.mark.parametrize("seed", range(60))
def test_a_changed_step_is_never_without_a_changed_part(seed):
    generator = random.Random(seed)

    def steps():
        usual = {name: generator.randrange(1, 60) for name in ("rollout", "forward", "reference", "")}
        for _ in range(generator.randrange(2, 7)):
            long = {name: max(1, ns + generator.randrange(-5, 6)) for name, ns in usual.items()}
            update = {name: long[name] for name in ("reference", "forward", "") if name or generator.random() < 0.5}
            yield {"rollout": long["rollout"], "update": update}

    a, b = variant("a", *steps()), variant("b", *steps(), gap=generator.randrange(60))
    (sentence,) = sections.verdict([a, b])
    changed = changes_of(a.summaries, b.summaries)[STEP].verdict in ("faster", "slower")
    assert changed == (" than a: " in sentence)
    assert not changed or "It changes in" in sentence or "those that differ most: " in sentence
    for v in (a, b):
        rows = v.summaries[0].rows
        for whole, parts in ((STEP, ("rollout", "update")), ("update", ("reference", "forward"))):
            assert rows[whole].host == sum(rows[part].host for part in (*parts, REST + whole) if part in rows)


@pytest.mark.parametrize(
    "first, other, spread, said",
    [
        (121, 100, 5, "1.21x faster"),
        (100, 270, 5, "2.70x slower"),
        (1000, 1003, 1, "1.0030x slower"),
        (1000, 1003, 5, "no change"),
        (100, 103, 5, "no change (1.03x slower)"),
        (100, 100, 5, "no change"),
        (100, 80, None, "1.25x faster ?"),
        (None, 80, 5, "only here"),
        (0, 0, 5, "n/a"),
    ],
)
def test_a_change_is_said_as_a_person_would(first, other, spread, said):
    assert sections.show_change(Change("update", first, other, spread, "host")) == said


def test_units_and_scrubbing():
    shown = [sections.show_time(ns) for ns in (0, 7, 999, 1_500, 12_340_000, 999_999, 2.5e9, None)]
    assert shown == ["0", "7 ns", "999 ns", "1.50 us", "12.3 ms", "1000 us", "2.50 s", "n/a"]
    assert sections.show_bytes(1_500_000) == "1.5 MB" and sections.show_bytes(None) == "n/a"
    text = "python train.py --init_from /tmp/L/sft/export --out=/tmp/x -c 'a/b' https://x.org/y/z ~/m/n 3/4"
    assert (
        sections.scrub(text)
        == "python train.py --init_from .../export --out=.../x -c 'a/b' https://x.org/y/z .../n 3/4"
    )


def test_timeline_joins_what_cannot_be_seen_apart(tmp_path):
    works = [
        Work("k", i * 10, i * 10 + 9, "GPU 0", "stream 7", "kernel", 9, (1, 1), (i, i), (1, i)) for i in range(5000)
    ]
    s = summarize(Trace("nsys", [Range("rollout", 0, 50_000, (1, 1), 0)], works, {0: (0, 50_000)}))
    lanes = timeline.lanes_of(s)
    assert [len(lane.bars) for lane in lanes] == [1, 1] and lanes[1].bars[0] == (0, 49_999, "rollout")
    assert attribute(s.trace)[0][0] == [0]
