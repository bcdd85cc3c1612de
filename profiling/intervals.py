"""Arithmetic of half-open intervals [start, end) of whole nanoseconds.

A *union* is a sorted list of disjoint, non-touching, non-empty intervals; `union` makes one, the others keep it one.
The oracle is tests/test_profiling_summary.py, which counts tick by tick.
"""

from collections.abc import Iterable, Sequence

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The times at which at least one of the intervals (any order, any overlap) is open."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[0] < i[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals)


def intersect(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The times at which both unions are open."""
    common, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def busy_and_overlap(lanes: Iterable[Iterable[Interval]]) -> tuple[int, int]:
    """(time with at least one lane open, time with two or more). Intervals of one lane may overlap: it counts once."""
    edges = sorted(edge for lane in lanes for start, end in union(lane) for edge in ((start, 1), (end, -1)))
    depth = busy = overlap = before = 0
    for time, change in edges:
        busy += (time - before) * (depth >= 1)
        overlap += (time - before) * (depth >= 2)
        depth, before = depth + change, time
    return busy, overlap


def containing(outer: Sequence[Interval], inner: Sequence[Interval]) -> list[list[int]]:
    """For each inner interval the indices of the outer ones that hold it, outermost first. O(n log n) when nested."""
    found: list[list[int]] = [[] for _ in inner]
    waiting = sorted(range(len(outer)), key=lambda i: (outer[i][0], -outer[i][1], i))
    active, next_outer = [], 0
    for j in sorted(range(len(inner)), key=lambda j: inner[j]):
        start, end = inner[j]
        while next_outer < len(waiting) and outer[waiting[next_outer]][0] <= start:
            active.append(waiting[next_outer])
            next_outer += 1
        active = [i for i in active if outer[i][1] >= start]
        found[j] = [i for i in active if outer[i][1] >= end]
    return found
