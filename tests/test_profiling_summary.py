"""profiling/: intervals and rows against tick-by-tick counting, changes against noise, the timeline's lanes."""

import random

import pytest
import sections
import timeline
from intervals import busy_and_overlap, containing, intersect, length, union
from summary import STEP, UNATTRIBUTED, attribute, changes_of, spread_of, summarize
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
    assert "one step shows no spread. What differs may be noise: update (80 ns to 81 ns, 0.99x ?)." in say(
        captured(80), captured(81)
    )
    assert say(captured(80, 90), captured(81, 88)).startswith("No change between (81, 88) and (80, 90)")
    assert "is slower than" in say(captured(80, 81), captured(90, 91)) and "changes in update" in say(
        captured(80, 81), captured(90, 91)
    )


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
