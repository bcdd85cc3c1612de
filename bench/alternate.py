"""A reward for benchmarks: 1 for every second answer, whatever it says, so that every group of answers has a spread."""

import itertools

ORDER = itertools.count()


def alternate(text: str, row: dict) -> float:
    return float(next(ORDER) % 2)
