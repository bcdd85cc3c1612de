"""Grades of a batch of responses: sums of the rewards' shares, each reward by itself, which responses are correct."""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real

from engine.errors import UserError
from engine.rewards.latex import count_unfinished

Reward = tuple[str, float, Callable[[str, dict], float]]
ON_ERROR = ("raise", "zero")


class RewardError(RuntimeError):
    """A reward raised, or did not return a finite number: names the reward, the row and the response."""


@dataclass(frozen=True)
class Grades:
    """`totals[n]`: sum over rewards of share * value. `values[name][n]`: the value of one reward.

    `correct[n]`: the correctness reward is above 0.5; empty without rewards. `errors`: values counted as 0 because
    their reward failed. `unfinished`: LaTeX comparisons that ran out of time, counted as different.
    """

    totals: list[float]
    values: dict[str, list[float]]
    correct: list[bool]
    errors: int
    unfinished: int


def grade(rewards: Sequence[Reward], texts: Sequence[str], items: Sequence, *, on_error: str = "raise") -> Grades:
    """Grades text n as a response to item n; a reward is called with (text, row), row["answer"] being the truth.

    With `on_error` "raise" a failing reward raises RewardError; with "zero" its value is 0, counted, and the first of
    each reward is warned of.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"on_error is {on_error!r}; choose from {', '.join(ON_ERROR)}.")
    errors, unfinished = 0, count_unfinished()
    values: dict[str, list[float]] = {name: [] for name, _, _ in rewards}
    for text, item in zip(texts, items, strict=True):
        for name, _, function in rewards:
            row = copy.deepcopy(item.row) | {"answer": item.answer}  # its own: it may be changed
            try:
                value = _call(name, function, text, row)
            except RewardError as error:
                if on_error == "raise":
                    raise
                value, errors = 0.0, errors + 1
                _warn(name, f"{error} ({error.__cause__!r})" if error.__cause__ else str(error))
            values[name].append(value)
    return Grades(
        [sum(share * values[name][n] for name, share, _ in rewards) for n in range(len(texts))],
        values,
        [value > 0.5 for name, _, _ in correctness_reward(rewards) for value in values[name]],
        errors,
        count_unfinished() - unfinished,
    )


def correctness_reward(rewards: Sequence[Reward]) -> list[Reward]:
    """The one that decides which responses are correct, in a list: that named "answer", or else the first."""
    return ([reward for reward in rewards if reward[0] == "answer"] or [*rewards])[:1]


def overlong_penalty(hit_limit: bool, has_answer: bool) -> float:
    """-0.5 for a response that reached the length limit without a valid answer (DAPO, arXiv 2503.14476, hard form)."""
    return -0.5 if hit_limit and not has_answer else 0.0


def soft_overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """From 0 down to -1 over the last `buffer` tokens before the limit (DAPO, arXiv 2503.14476 eq. 13)."""
    return max(-1.0, min(0.0, (limit - buffer - length) / buffer))


def _call(name: str, function: Callable, text: str, row: dict) -> float:
    where = f"reward {name!r}, row {row.get('row_index')}, response {text[:100]!r}"
    try:
        value = function(text, row)
    except UserError:
        raise
    except Exception as error:
        raise RewardError(f"{where}: {type(error).__name__}: {error}") from error
    number = _read_number(value)
    if not math.isfinite(number):
        raise RewardError(f"{where}: returned {repr(value)[:100]}, not a finite number")
    return number


def _read_number(value) -> float:
    """A number, or what a scalar, array or tensor of one element holds; nan for anything else."""
    with contextlib.suppress(Exception):  # whoever wrote the class may raise what they like
        value = value.item()
    try:
        return float(value) if isinstance(value, (Real, Decimal)) else math.nan
    except (OverflowError, ValueError):
        return math.inf


_warned: set[str] = set()


def _warn(name: str, reason: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"{reason}; counted as 0, as will be further failures of {name!r}", RuntimeWarning, stacklevel=3)
