"""Word problems with two operands, made on the spot, and a teacher that errs.

A problem is (a, op, b): op + or -, operands 10..99, result >= 0. The answer to a + b is worked out digit by digit:
"Mia has 47 pens and buys 35 more. ..." -> "<think>7+5=12, 4+3+1=8</think><answer>82</answer>".
In `wrong_fraction` of the train traces one step goes wrong the way a person goes wrong, and the rest follows from it.
The slip is drawn apart from the problem, and no slip is likely: at each step the right token stays the most likely one,
so a greedy student of this teacher is right, and one that samples errs as often as the teacher.
"""

import hashlib
from functools import cache
from random import Random

from engine.data.item import Item, Items, Task, build_prompt
from engine.errors import UserError

NAMES = ("Mia", "Tom", "Ana", "Ben", "Zoe", "Sam", "Eva", "Leo", "Ida", "Max")
THINGS = ("pens", "apples", "cards", "coins", "books", "shells", "stamps", "eggs", "beads", "nuts")
STORIES = {
    "+": (
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        "{name} finds {a} {things} and then {b} more. How many {things} is that in all?",
        "{name} has {a} {things} and {other} has {b}. How many {things} do they have in all?",
        "There are {a} {things} in a box. {name} adds {b} more. How many {things} are there now?",
    ),
    "-": (
        "{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} have now?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?",
        "{name} needs {a} {things} and has {b}. How many more {things} does {name} need?",
        "There are {a} {things} in a box. {name} takes {b}. How many {things} are there now?",
    ),
}
SPLITS = ("train", "test")
TRAIN_SIZE = 20_000
_TEST_SHARE = 0.15


def load_arithmetic(
    task: Task,
    split: str,
    *,
    source: str | None,
    system_prompt: str | None,
    limit: int | None,
    seed: int,
    wrong_fraction: float = 0.4,
    answers: bool = True,
    traces: bool = True,
    pairs: bool = False,
    sample: bool = False,
) -> Items:
    """`limit` problems of a split in an order drawn from `seed`: train 20,000 by default, going round if need be;
    test each of its about 1,800 problems once at most, with faultless traces. Every item has its answer, and the first
    so many are a sample. Of `pairs`, of the same problems, the chosen trace is faultless and the rejected one is not.
    Raises UserError for a bad argument."""
    columns = ("prompt", "answer", "trace", "chosen", "rejected")
    if source or any(getattr(task, f"{what}_column") for what in columns):
        raise UserError(
            "The task arithmetic is generated and takes no --train_data, --test_data or columns; "
            "remove them, or choose the task jsonl."
        )
    if split not in SPLITS:
        raise UserError(f"The task arithmetic has no split {split!r}; choose from {', '.join(SPLITS)}.")
    problems = list(list_problems(split))
    Random(f"{seed} order").shuffle(problems)
    size = min(limit or len(problems), len(problems)) if split == "test" else limit or TRAIN_SIZE
    wrong = 1.0 if pairs else wrong_fraction if split == "train" else 0.0

    def make(index: int) -> Item:
        rng = Random(f"{seed} {split} {index}")
        a, op, b = problems[index % len(problems)]
        question = tell(a, op, b, rng)
        slip = rng.choice(list_slips(a, op, b)) if rng.random() < wrong else None
        told, faultless = (work_out(a, op, b, which)[0] for which in (slip, None))
        trace, rejected = (faultless, told) if pairs else (told, None)
        row = {"question": question, "a": a, "op": op, "b": b, "slip": slip, "row_index": index}
        return Item(build_prompt(question, system_prompt), str(solve(a, op, b)), trace, row, rejected=rejected)

    return Items(size, make, {"path": "arithmetic", "seed": seed, "rows": size, "system_prompt": system_prompt or None})


@cache
def list_problems(split: str) -> tuple[tuple[int, str, int], ...]:
    """All problems of a split. a + b and b + a fall on the same side, and the two splits share nothing."""
    sides: dict[str, list] = {name: [] for name in SPLITS}
    for a in range(10, 100):
        for b in range(10, 100):
            sides[_side(min(a, b), "+", max(a, b))].append((a, "+", b))
            if a >= b:
                sides[_side(a, "-", b)].append((a, "-", b))
    assert not set(sides["train"]) & set(sides["test"])
    return tuple(sides[split])


def _side(a: int, op: str, b: int) -> str:
    digest = hashlib.sha256(f"{a}{op}{b}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < _TEST_SHARE * 2**32 else "train"


def tell(a: int, op: str, b: int, rng: Random) -> str:
    """The problem as a story."""
    name, other = rng.sample(NAMES, 2)
    return rng.choice(STORIES[op]).format(name=name, other=other, things=rng.choice(THINGS), a=a, b=b)


def solve(a: int, op: str, b: int) -> int:
    """The truth."""
    return a + b if op == "+" else a - b


def work_out(a: int, op: str, b: int, slip: str | None = None) -> tuple[str, int]:
    """(trace, the answer it ends in), digit by digit, with one of `list_slips` or none."""
    high_a, low_a, high_b, low_b = *divmod(a, 10), *divmod(b, 10)
    if op == "+":
        ones, first = low_a + low_b, f"{low_a}+{low_b}"
        ones += _shift(slip, "ones")
        carry = (ones >= 10) != (slip == "carry")
        tens = high_a + high_b + carry
    else:
        if slip == "swap":
            low_a, low_b = low_b, low_a
        borrow = low_a < low_b
        low_a += 10 * borrow
        ones, first = low_a - low_b + _shift(slip, "ones"), f"{low_a}-{low_b}"
        carry = borrow != (slip == "carry")
        tens = high_a - high_b - carry
    tens += _shift(slip, "tens")
    second = f"{high_a}{op}{high_b}" + f"{op}1" * carry
    answer = 10 * tens + ones % 10
    return f"<think>{first}={ones}, {second}={tens}</think><answer>{answer}</answer>", answer


def _shift(slip: str | None, place: str) -> int:
    return {f"{place} low": -1, f"{place} high": 1}.get(slip, 0)


@cache
def list_slips(a: int, op: str, b: int) -> tuple[str, ...]:
    """The slips that fit a problem: a digit one too low or too high, a carry or borrow forgotten or made up,
    and in a subtraction the smaller digit taken from the larger."""
    low_a, low_b, tens = a % 10, b % 10, solve(a, op, b) // 10
    ones = low_a + low_b if op == "+" else (low_a - low_b) % 10
    fits = {
        "ones low": ones > 0,
        "ones high": op == "+" or ones < 9,
        "carry": op == "+" or low_a < low_b or tens > 0,
        "tens low": tens > 0,
        "tens high": True,
        "swap": op == "-" and low_a < low_b,
    }
    return tuple(slip for slip, fit in fits.items() if fit)
