"""Rewards: functions of (text, row) that give a float; row["answer"] is the truth. A new one is a row of `REWARDS`."""

import difflib
import math
from collections.abc import Callable, Sequence

from engine.errors import UserError
from engine.rewards.answers import extract_answer, marked_answer
from engine.rewards.custom import load_function
from engine.rewards.equality import same_answer
from engine.rewards.forms import is_boxed, is_tagged
from engine.rewards.grades import (
    Grades,
    Reward,
    RewardError,
    correctness_reward,
    grade,
    overlong_penalty,
    soft_overlong_penalty,
)
from engine.rewards.latex import stop_worker


def is_correct(text: str, row: dict) -> float:
    """1.0 if the answer extracted from the text is row["answer"], else 0.0."""
    return float(same_answer(extract_answer(text), row["answer"]))


REWARDS = {
    "answer": is_correct,
    "format": is_tagged,
    "boxed_format": is_boxed,
}


def load_rewards(specs: Sequence[str], say: Callable[[str], object] = print) -> list[Reward]:
    """(name, share, function) for each spec: `answer`, `format:0.2`, `path/to/file.py:function[:share]`.

    A file is run, which `say` hears first. Raises UserError for an unknown name, a file or function that is not there
    or not usable, a share that is not a finite number, a name that comes twice, and an empty list.
    """
    if not specs:
        raise UserError(f"There is no reward; give at least one of {', '.join(REWARDS)} or path/to/file.py:function.")
    rewards = [_load_reward(spec, say) for spec in specs]
    names = [name for name, _, _ in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two rewards are named {name!r}; rename one function, or list it once.")
    return rewards


def _load_reward(spec: str, say: Callable[[str], object]) -> Reward:
    path, is_file, rest = spec.rpartition(".py:")
    name, _, share = (rest if is_file else spec).partition(":")
    if is_file:
        return name, _read_share(share, spec), load_function(f"{path}.py", name, say)
    if name.endswith(".py"):
        raise UserError(f"The reward {spec!r} names no function; write {name}:function.")
    if name not in REWARDS:
        nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"There is no reward {name!r}; the nearest is {nearest!r}, all are {', '.join(REWARDS)} "
            "and path/to/file.py:function."
        )
    return name, _read_share(share, spec), REWARDS[name]


def _read_share(share: str, spec: str) -> float:
    try:
        value = float(share or 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"The reward {spec!r} has the share {share!r}; write a number, as in 0.5.")
    return value
