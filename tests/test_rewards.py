"""Rewards: the worker for LaTeX, forms, loading, grading a batch; and what happens when a reward fails."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from engine.data.item import Item
from engine.errors import UserError
from engine.rewards import (
    REWARDS,
    RewardError,
    correctness_reward,
    grade,
    grades,
    load_rewards,
    overlong_penalty,
)
from engine.rewards.latex import Worker, count_unfinished, same_latex, stop_worker
from tests.tables import REAL, needs_real

SLOW = ("(1+x)^{100000}", "(1+x)^{99999}(2+x)")


# LaTeX in a process of its own


def test_latex_works_and_stops_in_time_in_a_thread():
    seen = {}

    def ask():
        seen["equal"] = same_latex(r"\sqrt{12}", r"2\sqrt{3}")
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen["slow"] = same_latex(*SLOW, 0.5)
        seen["seconds"] = time.monotonic() - start
        seen["after"] = same_latex(r"\sqrt{20}", r"2\sqrt{5}")

    before = count_unfinished()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert (seen["equal"], seen["slow"], seen["after"]) == (True, False, True)
    assert 0.4 < seen["seconds"] < 8 and count_unfinished() == before + 1


def test_many_threads_get_their_own_replies():
    wrong = []

    def ask(n):
        for k in range(15):
            if same_latex(rf"{n}\sqrt{{{4 * k + 8}}}", rf"{2 * n}\sqrt{{{k + 2 + k % 2}}}") != (k % 2 == 0):
                wrong.append((n, k))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_the_caller_s_own_alarm_is_left_alone():
    def handler(*_):
        pass

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        assert same_latex(r"\sqrt{28}", r"2\sqrt{7}")
        assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL)[0] > 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_time_out_is_warned_of_once_and_counted_each_time():
    worker = Worker()
    with pytest.warns(RuntimeWarning, match="within 0.2 s.*counts as different") as caught:
        assert not worker.ask(*SLOW, 0.2)
        assert not worker.ask(*SLOW, 0.2)
    assert worker.unfinished == 2 and len(caught) == 1
    worker.close()


def test_a_killed_worker_is_replaced_and_the_question_asked_again():
    worker = Worker()
    assert worker.ask("x+1", "1+x", 5.0)
    worker.process.kill()
    worker.process.wait()
    assert worker.ask("x+2", "2+x", 5.0) and worker.unfinished == 0
    worker.close()


def test_an_interrupted_question_leaves_no_reply_behind(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    worker = Worker()
    assert worker.ask("x+1", "1+x", 5.0)
    with monkeypatch.context() as patch:
        patch.setattr(worker.process, "stdout", SimpleNamespace(readline=interrupt, close=worker.process.stdout.close))
        with pytest.raises(KeyboardInterrupt):
            worker.ask("x+1", "1+x", 5.0)
    assert not worker.ask("x+1", "2+x", 5.0)
    worker.close()


@pytest.mark.parametrize("ending", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)", "stop_worker(); stop_worker()"])
def test_no_worker_outlives_its_parent(ending):
    code = (
        "import os; from engine.rewards import stop_worker; from engine.rewards import latex\n"
        "assert latex.same_latex('x+1', '1+x'); print(latex._WORKER.process.pid, flush=True)\n" + ending
    )
    parent = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    pid = int(parent.stdout)
    assert "Error" not in parent.stderr
    for _ in range(100):
        if not is_running(pid):
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker is still there")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_missing_math_verify_is_said(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('No module named math_verify')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="math-verify"):
        Worker().ask("x", "y", 1.0)


# the form


@pytest.mark.parametrize(
    "text, value",
    [
        ("<think>a</think><answer>1</answer>", 1.0),
        ("\n<think>\na\n</think>\n\n<answer>\n1\n</answer>\n", 1.0),
        ("<think></think><answer>1</answer>", 1.0),
        ("x<think>a</think><answer>1</answer>", 0.0),
        ("<think>a</think>x<answer>1</answer>", 0.0),
        ("<think>a</think><answer>1</answer>x", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<think>a</think><answer>1", 0.0),
        ("<answer>1</answer><think>a</think>", 0.0),
        ("<think>a<answer>1</answer></think>", 0.0),
        ("<think>a<think>b</think><answer>1</answer>", 0.0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", 0.0),
        ("<answer>1</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_reward_wants_both_tags_once_and_nothing_else(text, value):
    assert REWARDS["format"](text, {}) == value


@pytest.mark.parametrize(
    "text, value",
    [
        (r"so \boxed{1}.", 1.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{1", 0.0),
        ("1", 0.0),
        (r"\boxed{1} \boxed{2}", 0.0),
        (r"<think>\boxed{1}, no, \boxed{2}</think> \boxed{3}", 1.0),
        (r"<think>\boxed{1}</think> 3", 0.0),
        (r"<think>\boxed{1}", 0.0),
        ("\\boxed{1}\nQuestion: 1+1?\n\\boxed{2}", 0.0),
    ],
)
def test_the_boxed_format_reward_wants_one_box(text, value):
    assert REWARDS["boxed_format"](text, {}) == value


# loading


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy\n"
        "def length(text, row): return len(text) / 10\n"
        "def answer_is(text, row): return numpy.float32(text == row['answer'])\n"
        "def fails(text, row): return 1 / 0 if row['row_index'] == 1 else 1.0\n"
        "def empty(text, row): pass\n"
        "def nan(text, row): return float('nan')\n"
        "def alone(text): return 1.0\n"
        "number = 3\n"
    )
    return path


def test_specs_carry_shares(reward_file):
    loaded = load_rewards(["answer", "format:0.2", f"{reward_file}:length", f"{reward_file}:answer_is:-0.5"])
    shares = {name: share for name, share, _ in loaded}
    assert list(shares.items()) == [("answer", 1.0), ("format", 0.2), ("length", 1.0), ("answer_is", -0.5)]
    (length,) = (reward for name, _, reward in loaded if name == "length")
    assert length("12345", {}) == 0.5


@pytest.mark.parametrize(
    "spec, message",
    [
        ("anwser", "'anwser'.*'answer'"),
        ("answer:much", "share 'much'"),
        ("answer:nan", "share 'nan'"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("FILE", "names no function"),
        ("FILE:none", "no function 'none'; it has length"),
        ("FILE:number", "not a function"),
        ("FILE:alone", r"alone\(text, row\)"),
        ("FILE:length:x", "share 'x'"),
    ],
)
def test_bad_specs_are_refused_in_one_sentence(reward_file, spec, message):
    with pytest.raises(UserError, match=message) as error:
        load_rewards(["format", spec.replace("FILE", str(reward_file))])
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_no_rewards_and_twice_the_same_are_refused():
    with pytest.raises(UserError, match="no reward"):
        load_rewards([])
    with pytest.raises(UserError, match="Two rewards are named 'answer'"):
        load_rewards(["answer", "answer:0.5"])


def test_a_file_that_does_not_run_is_refused(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="fails when it is run.*nothing_of_this_name"):
        load_rewards([f"{path}:f"])


@pytest.fixture
def folders(tmp_path):
    """Two folders, each with a reward `mine.py` that takes its value from its own `helper.py` and package."""
    for value in (1, 2):
        folder = tmp_path / f"folder{value}"
        (folder / "parts").mkdir(parents=True)
        (folder / "helper.py").write_text("from parts.deep import VALUE\n")
        (folder / "parts" / "deep.py").write_text(f"VALUE = {value}.0\n")
        (folder / "json.py").write_text("raise RuntimeError('taken for the standard library')\n")
        (folder / "engine.py").write_text("raise RuntimeError('taken for ours')\n")
        (folder / "mine.py").write_text(
            "import json, engine.rewards\nfrom helper import VALUE\n"
            f"def value{value}(text, row): return VALUE + len(json.dumps(engine.rewards.__name__)) * 0\n"
        )
    return tmp_path


def test_a_file_beside_a_reward_is_its_own(folders):
    path, modules = list(sys.path), set(sys.modules)
    rewards = load_rewards([f"{folders}/folder1/mine.py:value1", f"{folders}/folder2/mine.py:value2"])
    assert [function("", {}) for _, _, function in rewards] == [1.0, 2.0]
    assert sys.path == path and not {"helper", "parts", "parts.deep"} & (set(sys.modules) - modules)


def test_what_a_reward_puts_on_the_path_is_taken_back(folders):
    for value in (1, 2):
        lib = folders / f"lib{value}"
        lib.mkdir()
        (lib / "constants.py").write_text(f"VALUE = {value}.0\n")
        (folders / f"mine{value}.py").write_text(
            f"import sys\nsys.path.insert(0, {str(lib)!r})\nfrom constants import VALUE\n"
            f"def value{value}(text, row): return VALUE\n"
        )
    path = list(sys.path)
    rewards = load_rewards([f"{folders}/mine1.py:value1", f"{folders}/mine2.py:value2"])
    assert [function("", {}) for _, _, function in rewards] == [1.0, 2.0]
    assert sys.path == path and "constants" not in sys.modules


def test_a_reward_that_fails_beside_its_helper_leaves_nothing_behind(folders):
    (folders / "folder1" / "mine.py").write_text("import helper, nothing_of_this_name\n")
    path = list(sys.path)
    with pytest.raises(UserError, match="nothing_of_this_name"):
        load_rewards([f"{folders}/folder1/mine.py:f"])
    assert sys.path == path and "helper" not in sys.modules


# grading


def items(*answers):
    return [
        Item([{"role": "user", "content": "?"}], answer, None, {"row_index": n, "answer": "raw"})
        for n, answer in enumerate(answers)
    ]


def test_totals_are_sums_of_shares_and_rows_carry_the_truth(reward_file):
    rewards = load_rewards(["format:0.2", "answer", f"{reward_file}:length:0.5"])
    got = grade(rewards, ["<think>a</think><answer>1</answer>", "1", "2"], items("1", "1", "1"))
    assert got.values["format"] == [1.0, 0.0, 0.0] and got.values["answer"] == [1.0, 1.0, 0.0]
    assert got.totals == pytest.approx([0.2 + 1.0 + 0.5 * 3.4, 1.0 + 0.5 * 0.1, 0.5 * 0.1])
    assert (got.correct, got.errors, got.unfinished) == ([True, True, False], 0, 0)


def test_the_first_reward_decides_where_there_is_no_answer_reward(reward_file):
    rewards = load_rewards([f"{reward_file}:answer_is", "format"])
    assert grade(rewards, ["1", "2"], items("1", "1")).correct == [True, False]


@pytest.mark.parametrize("specs, name", [(["format", "answer"], "answer"), (["format", "boxed_format"], "format")])
def test_one_reward_decides_what_is_correct(specs, name):
    rewards = load_rewards(specs)
    assert correctness_reward(rewards) == [reward for reward in rewards if reward[0] == name]


def test_grading_leaves_the_row_of_the_item_alone():
    item = items("1")[0]
    grade(load_rewards(["answer"]), ["1"], [item])
    assert item.row == {"row_index": 0, "answer": "raw"}


def test_a_reward_may_change_its_row_and_no_other_reward_or_response_sees_it():
    def spoils(text, row):
        row["answer"], row["seen"] = "2", [*row["seen"], text]
        row["nested"].append(text)
        return float(len(row["nested"]))

    item = SimpleNamespace(row={"row_index": 0, "seen": [], "nested": []}, answer="1")
    got = grade([("mine", 1.0, spoils), *load_rewards(["answer"])], ["1", "1"], [item, item])
    assert got.values == {"mine": [1.0, 1.0], "answer": [1.0, 1.0]} and item.row["nested"] == []


def test_a_failing_reward_stops_the_run_and_names_the_row(reward_file):
    rewards = load_rewards(["answer", f"{reward_file}:fails"])
    with pytest.raises(RewardError, match="'fails', row 1, response 'the text'.*ZeroDivisionError") as error:
        grade(rewards, ["1", "the text"], items("1", "1"))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "value",
    [
        True,
        numpy.True_,
        numpy.float32(1),
        numpy.int64(1),
        numpy.array(1.0),
        numpy.array([1.0]),
        torch.tensor(1.0),
        torch.tensor(True),
        torch.ones(1, dtype=torch.bfloat16, requires_grad=True),
        Fraction(1),
        Decimal(1),
    ],
    ids=repr,
)
def test_a_reward_may_return_any_one_number(value):
    assert grade([("mine", 1.0, lambda text, row: value)], ["1"], items("1")).totals == [1.0]


class Raising:
    def item(self):
        raise KeyError("no item")

    def __repr__(self):  # the same in every process that collects it
        return "Raising"


@pytest.mark.parametrize(
    "value",
    [None, math.nan, math.inf, 10**400, "1", [1.0], 1j, numpy.array(numpy.nan), numpy.array([1.0, 2.0]), torch.ones(2)]
    + [Decimal("sNaN"), Raising()],
    ids=repr,
)
def test_a_reward_that_is_no_number_is_an_error(value):
    with pytest.raises(RewardError, match="returned .*, not a finite number") as error:
        grade([("mine", 1.0, lambda text, row: value)], ["1"], items("1"))
    assert repr(value)[:50] in str(error.value)


def test_on_error_zero_counts_and_warns_once(reward_file, monkeypatch):
    monkeypatch.setattr(grades, "_warned", set())
    rewards = load_rewards(["answer", f"{reward_file}:fails", f"{reward_file}:nan"])
    with pytest.warns(RuntimeWarning) as caught:
        got = grade(rewards, ["1", "1"], items("1", "1"), on_error="zero")
        grade(rewards, ["1", "1"], items("1", "1"), on_error="zero")
    assert (got.totals, got.errors) == ([2.0, 1.0], 3)
    assert sorted("ZeroDivisionError" in str(w.message) for w in caught) == [False, True]


def test_bad_calls_of_grade_are_refused():
    with pytest.raises(UserError, match="on_error is 'skip'"):
        grade(load_rewards(["answer"]), [], [], on_error="skip")
    with pytest.raises(ValueError, match="zip"):
        grade(load_rewards(["answer"]), ["1", "2"], items("1"))


@pytest.mark.parametrize("hit_limit, has_answer, penalty", [(True, False, -0.5), (True, True, 0), (False, False, 0)])
def test_only_overlong_responses_without_an_answer_are_fined(hit_limit, has_answer, penalty):
    assert overlong_penalty(hit_limit, has_answer) == penalty


# real data


@needs_real
def test_every_gsm8k_rationale_scores_one_and_a_neighbour_s_does_not():
    lines = (REAL / "gsm8k" / "test.jsonl").read_text().splitlines()
    rationales = [json.loads(line)["answer"] for line in lines]
    truths = [text.rpartition("####")[2].strip().replace(",", "") for text in rationales]
    rewards = load_rewards(["answer"])
    assert grade(rewards, rationales, items(*truths)).totals == [1.0] * 1319
    shifted = grade(rewards, rationales, items(*truths[1:], truths[0])).totals
    assert sum(shifted) == sum(a == b for a, b in zip(truths, truths[1:] + truths[:1])) < 40


@needs_real
def test_every_math500_answer_equals_itself_for_math_verify_too():
    answers = [row["answer"] for row in json.loads((REAL / "math" / "math500.json").read_text())]
    latex = [answer for answer in answers if "\\" in answer]
    assert len(latex) > 100
    assert [answer for answer in latex if not same_latex(answer, answer)] == []
    stop_worker()
