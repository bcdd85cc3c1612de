"""The generated task: problems that two splits do not share, and a teacher that errs as it should."""

import re
from collections import Counter
from random import Random

import pytest

from engine.data import TASKS, load_task
from engine.data.arithmetic import list_problems, list_slips, load_arithmetic, solve, tell, work_out
from engine.errors import UserError
from engine.rewards import REWARDS, extract_answer, same_answer

PATTERN = r"</?(?:think|answer)>| ?[A-Za-z]+|[0-9]|, | |[^ A-Za-z0-9]"
"""What splits every prompt and trace into words, of which each but ", " is one token of the embedded model."""


def key(a, op, b):
    return (min(a, b), op, max(a, b)) if op == "+" else (a, op, b)


def test_train_and_test_problems_share_no_numbers():
    train, test = (
        {key(i.row["a"], i.row["op"], i.row["b"]) for i in load_task("arithmetic", split, limit=12_000)}
        for split in ("train", "test")
    )
    assert train and test and not train & test
    share = len(list_problems("test")) / (len(list_problems("train")) + len(list_problems("test")))
    assert 0.13 < share < 0.17


def test_every_problem_is_on_one_side():
    problems = list_problems("train") + list_problems("test")
    assert len(problems) == len(set(problems)) == 90 * 90 + 90 * 91 // 2
    assert all(10 <= a <= 99 and 10 <= b <= 99 and solve(a, op, b) >= 0 for a, op, b in problems)


def test_test_split_asks_each_problem_once_and_its_traces_are_right():
    items = load_task("arithmetic", "test")
    assert len({(i.row["a"], i.row["op"], i.row["b"]) for i in items}) == len(items) == len(list_problems("test"))
    assert all(extract_answer(item.trace) == item.answer for item in items)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_planted_share_of_train_traces_is_wrong(fraction):
    items = load_arithmetic(
        TASKS["arithmetic"], "train", source=None, system_prompt=None, limit=4000, seed=3, wrong_fraction=fraction
    )
    wrong = sum(not same_answer(extract_answer(item.trace), item.answer) for item in items)
    assert abs(wrong / 4000 - fraction) < 0.025
    assert wrong == sum(item.row["slip"] is not None for item in items)


def test_default_share_is_two_in_five():
    items = load_task("arithmetic", "train", limit=4000)
    assert abs(sum(extract_answer(i.trace) != i.answer for i in items) / 4000 - 0.4) < 0.025


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_slip_ends_in_a_wrong_but_possible_answer(split):
    for a, op, b in list_problems(split):
        assert work_out(a, op, b)[1] == solve(a, op, b)
        slips = list_slips(a, op, b)
        assert len(slips) >= 2
        for slip in slips:
            trace, answer = work_out(a, op, b, slip)
            assert 0 <= answer != solve(a, op, b)
            assert trace.endswith(f"<answer>{answer}</answer>")


def test_what_follows_a_slip_is_consistent_with_it():
    """Answer = the two digits the trace has arrived at, and at most one of its sums is false."""
    for a, op, b in list_problems("test"):
        for slip in (None, *list_slips(a, op, b)):
            trace, answer = work_out(a, op, b, slip)
            ones, tens = re.fullmatch(r"<think>(.*), (.*)</think>.*", trace).groups()
            (left, ones_value), (right, tens_value) = ones.split("="), tens.split("=")
            assert op == "+" or 0 <= int(ones_value) <= 9
            assert answer == 10 * int(tens_value) + int(ones_value) % 10
            false_sums = (eval(left) != int(ones_value)) + (eval(right) != int(tens_value))
            assert false_sums == (slip in ("ones low", "ones high", "tens low", "tens high"))


def test_the_right_token_is_the_likeliest_at_every_step_by_a_clear_margin():
    """Over the teacher's distribution, given the right trace so far."""
    for a, op, b in list_problems("test")[::7]:
        slips = list_slips(a, op, b)
        right = re.findall(PATTERN, work_out(a, op, b)[0])
        weighted = [(right, 0.6)] + [(re.findall(PATTERN, work_out(a, op, b, s)[0]), 0.4 / len(slips)) for s in slips]
        for place, token in enumerate(right):
            follow = Counter()
            for trace, weight in weighted:
                if trace[:place] == right[:place]:
                    follow[trace[place]] += weight
            rivals = [weight for other, weight in follow.items() if other != token]
            assert follow[token] >= 2 * max(rivals, default=0), (a, op, b, place, follow)


def test_the_slip_is_not_a_matter_of_the_problem():
    """The same problem, met again in a later round, comes with another outcome."""
    size = len(list_problems("train"))
    items = load_task("arithmetic", "train", limit=12 * size)
    for index in range(0, 500, 50):
        rounds = [items[index + k * size] for k in range(12)]
        assert len({(i.row["a"], i.row["op"], i.row["b"]) for i in rounds}) == 1
        assert len({i.row["slip"] for i in rounds}) >= 3


def test_items_depend_on_seed_and_index_alone():
    first, again, other = (load_task("arithmetic", "train", limit=300, seed=seed) for seed in (1, 1, 2))
    backwards = [again[i] for i in reversed(range(300))][::-1]
    assert list(first) == backwards
    assert sum(a == b for a, b in zip(first, other)) < 10
    assert first[-1] == first[299] and first[1:3] == [first[1], first[2]]
    with pytest.raises(IndexError):
        first[300]


def test_items_leave_the_global_generator_alone():
    import random

    random.seed(0)
    state = random.getstate()
    load_task("arithmetic", "train", limit=5)[3]
    assert random.getstate() == state


def test_the_vocabulary_is_closed_and_splitting_loses_nothing():
    used = {split: set() for split in ("train", "test")}
    for split in used:
        for item in load_task("arithmetic", split, limit=4000):
            for text in (item.prompt[0]["content"], item.trace):
                tokens = re.findall(PATTERN, text)
                assert "".join(tokens) == text
                used[split].update(tokens)
    assert used["train"] == used["test"] and 70 < len(used["train"]) < 120


def test_texts_are_short():
    items = load_task("arithmetic", "train", limit=2000)
    prompts = [len(re.findall(PATTERN, item.prompt[0]["content"])) for item in items]
    traces = [len(re.findall(PATTERN, item.trace)) for item in items]
    assert max(prompts) <= 28 and max(traces) <= 24


def test_stories_name_two_people_and_both_numbers():
    for op in "+-":
        for seed in range(50):
            story = tell(47, op, 35, Random(seed))
            assert story.endswith("?") and story.index("47") < story.index("35") and "{" not in story


@pytest.mark.parametrize("trace_of", ["right", "wrong"])
def test_traces_have_the_form_the_format_reward_wants(trace_of):
    traces = [
        i.trace
        for i in load_task("arithmetic", "train", limit=500)
        if (extract_answer(i.trace) == i.answer) == (trace_of == "right")
    ]
    assert traces and all(REWARDS["format"](trace, {}) == 1.0 for trace in traces)


@pytest.mark.parametrize("arguments", [{"source": "a.jsonl"}, {"answer_column": "b"}])
def test_arithmetic_refuses_what_it_would_not_use(arguments):
    with pytest.raises(UserError, match="generated"):
        load_task("arithmetic", "train", **arguments)
