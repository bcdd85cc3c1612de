"""Asking and grading: what is graded, when, in which order, and what ends it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from engine import model
from engine.asking import Asker
from engine.config import load_config
from engine.data import Item
from engine.rewards import RewardError, load_rewards
from engine.rollouts.protocol import Completion
from engine.rollouts.sampling import Sampling

TOKENIZER = model.load_tokenizer("tiny")
QUESTIONS = [
    (p, Item([{"role": "user", "content": f"{p}+1?"}], str(p + 1), None, {"row_index": p}), [5 + p]) for p in range(3)
]
SECONDS = 60


def said(text: str, finish="eos") -> Completion:
    ids = TOKENIZER.encode(text) + [TOKENIZER.eos_token_id] * (finish == "eos")
    return Completion(ids, [0.0] * len(ids), finish)


def ask(rollout, rewards, questions=QUESTIONS, num_samples=1, progress=None, **more):
    asker = Asker(rollout, TOKENIZER, rewards, load_config(["--algo", "grpo"]), progress)
    return asker.ask(questions, num_samples=num_samples, sampling=Sampling(8), seed=0, **more)


def test_groups_come_in_the_order_of_the_questions_whichever_is_complete_first():
    def rollout(prompts, *, requests, num_samples, on_group, on_answer, **settings):
        assert (prompts, requests) == ([[5], [6], [7]], [0, 2, 4])
        for p in (2, 0, 1):
            on_answer(), on_answer()
            on_group(p, [said(str(p + 1)), said("0")])

    heard = []
    groups = ask(rollout, load_rewards(["answer"]), num_samples=2, progress=lambda *counts: heard.append(counts))
    assert [(group.item.answer, group.prompt, group.texts) for group in groups] == [
        (str(p + 1), [5 + p], [str(p + 1), "0"]) for p in range(3)
    ]
    assert all(group.grades.correct == [True, False] and group.rewards == [1.0, 0.0] for group in groups)
    assert heard == [(done, 6) for done in range(1, 7)]


def test_a_group_is_graded_beside_the_decoding_of_the_others():
    graded = threading.Event()

    def rollout(prompts, *, on_group, **settings):
        on_group(0, [said("1")])
        assert graded.wait(SECONDS)
        on_group(1, [said("2")])
        on_group(2, [said("3")])

    spans = []

    def span(verb):
        spans.append((verb, threading.current_thread() is threading.main_thread()))
        return nullcontext()

    groups = ask(rollout, [("mine", 1.0, lambda text, row: graded.set() or 1.0)], span=span)
    assert [group.rewards for group in groups] == [[1.0]] * 3
    assert spans == [("rollout", True)] + [("reward", False)] * 3


def test_a_reward_that_fails_ends_the_rollout():
    failed, reached = threading.Event(), []

    def fails(text, row):
        failed.set()
        return 1 / 0

    def rollout(prompts, *, on_group, **settings):
        on_group(0, [said("1")])
        assert failed.wait(SECONDS)
        for _ in range(1000):  # its result stands a moment later
            time.sleep(0.01)
            on_group(1, [said("2")])
        reached.append("the end")

    with pytest.raises(RewardError, match="'mine', row 0.*ZeroDivisionError"):
        ask(rollout, [("mine", 1.0, fails)])
    assert not reached


def test_a_rollout_cut_short_leaves_the_waiting_groups_ungraded(monkeypatch):
    """Slow rewards would outlast the grace after a signal."""
    begun, released, graded = threading.Event(), threading.Event(), []

    def slow(text, row):
        graded.append(text)
        begun.set()
        assert released.wait(SECONDS)
        return 1.0

    def rollout(prompts, *, on_group, **settings):
        for p in range(3):
            on_group(p, [said("1")])
        assert begun.wait(SECONDS)
        raise InterruptedError

    def shutdown(pool, wait=True, *, cancel_futures=False):
        close(pool, False, cancel_futures=cancel_futures)
        released.set()
        close(pool, wait)

    close = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    with pytest.raises(InterruptedError):
        ask(rollout, [("slow", 1.0, slow)])
    assert len(graded) == 1


def test_without_rewards_answers_are_read_and_not_graded():
    def rollout(prompts, *, on_group, **settings):
        on_group(0, [said("<think>1</think>"), said("cut", "length")])

    [group] = ask(rollout, [], QUESTIONS[:1], num_samples=2)
    assert group.texts == ["<think>1</think>", "cut"] and group.grades.correct == [] and group.rewards == [0.0, 0.0]


def test_an_answer_cut_off_before_it_answers_is_fined_where_that_is_asked_for():
    asker = Asker(None, TOKENIZER, load_rewards(["answer"]), load_config(["--overlong_penalty", "true"]))
    answers = [said("<answer>1</answer>"), said("<answer>1</answer>", "length"), said("so 1", "length")]
    group = asker.grade(QUESTIONS[0][1], [5], answers)
    assert [g - t for g, t in zip(group.rewards, group.grades.totals, strict=True)] == [0.0, 0.0, -0.5]


def test_a_long_answer_is_fined_by_how_much_of_the_buffer_it_takes():
    config = load_config(["--overlong_buffer", "4", "--max_new_tokens", "10"])
    asker = Asker(None, TOKENIZER, load_rewards(["answer"]), config)
    answers = [Completion([5] * n, [0.0] * n, "length" if n == 10 else "eos") for n in (1, 6, 7, 9, 10)]
    group = asker.grade(QUESTIONS[0][1], [5], answers)
    assert [g - t for g, t in zip(group.rewards, group.grades.totals, strict=True)] == [0.0, 0.0, -0.25, -0.75, -1.0]


@pytest.mark.parametrize("opening", ("", "<think>"))
def test_rewards_read_the_thoughts_that_the_template_opened_and_special_tags(opening):
    tokenizer = model.load_tokenizer("tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{% endif", f"<|assistant|>{opening}{{% endif"
    )
    asker = Asker(None, tokenizer, load_rewards(["answer", "format:0.2"]), load_config(["--algo", "grpo"]))
    text = "<think>2+3=5</think><answer>5</answer>"
    ids = tokenizer.encode(text.removeprefix(opening)) + [tokenizer.eos_token_id]
    cut = tokenizer.encode("2+3=5 <answer>5" if opening else "<think>2+3=5 <answer>5")
    answers = [Completion(ids, [], "eos"), Completion(cut, [], "length")]
    group = asker.grade(Item([{"role": "user", "content": "2+3?"}], "5", None, {"row_index": 0}), [1], answers)
    assert group.texts == [text, "<think>2+3=5 <answer>5"] and group.rewards == [1.2, 0.0]
