"""Rewards: finding answers, comparing them, scoring a batch; and what happens when a reward fails."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.data.item import Item
from engine.errors import UserError
from engine.rewards import (
    REWARDS,
    RewardError,
    extract_answer,
    load_rewards,
    marked_answer,
    overlong_penalty,
    same_answer,
    score,
    scores,
)
from engine.rewards.latex import Worker, count_unfinished, same_latex, stop_worker

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not (REAL / "gsm8k").exists(), reason="the real data sets are not on this machine")
SLOW = ("(1+x)^{100000}", "(1+x)^{99999}(2+x)")


# finding the answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>5</think><answer> 72 </answer>", "72"),
        ("<answer>71</answer> no, <answer>72</answer>", "72"),
        ("<answer><answer>72</answer></answer>", "72"),
        (r"<answer>\boxed{72}</answer>", "72"),
        (r"\boxed{1} <answer>72</answer> \boxed{2} #### 3", "72"),
        (r"<answer>9 \boxed{72} #### 3", "72"),
        (r"first \boxed{71}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{72} and \boxed{7", "72"),
        (r"\boxed{x = \boxed{72}}", "72"),
        ("It is 5.\n#### 1,072\nDone with 3.", "1,072"),
        ("#### 71\n#### 72", "72"),
        ("3 apples and 4 make 7.", "7"),
        ("It costs $1,072.50.", "$1,072.50"),
        ("from 10 to -3", "-3"),
        ("from 10 to \u22123", "-3"),
        ("12-5", "5"),
        ("half is 1/2", "1/2"),
        ("<answer></answer> 72", None),
        ("<answer>  </answer>", None),
        (r"72 \boxed{}", None),
        ("</answer>72<answer>", "72"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_answer_is_found_where_it_is_marked(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text, is_marked",
    [("#### 7", True), (r"\boxed{7}", True), ("<answer>7</answer>", True), ("so it is 7", False), ("<answer>7", False)],
)
def test_a_last_number_is_not_a_mark(text, is_marked):
    assert (marked_answer(text) is not None) == is_marked


@pytest.mark.parametrize("piece", ["\\boxed{", "<answer>", "####", "{", "1,1", "</answer> ", " ", "\\text{", "7 /"])
def test_long_degenerate_responses_take_no_time(piece):
    text = piece * 5000
    start = time.perf_counter()
    same_answer(extract_answer(text), "72")
    same_answer(text, "72")
    for name in ("format", "boxed_format"):
        REWARDS[name]("<think></think><answer>" + text + "</answer> no", {})
    assert time.perf_counter() - start < 1.0


# comparing


@pytest.mark.parametrize(
    "predicted, truth",
    [
        ("72", "72"),
        (" 72.", "72"),
        ("72.0", "72"),
        ("+72", "72"),
        ("072", "72"),
        ("$72", "72"),
        (r"\$72", "72"),
        ("72%", "72"),
        (r"72\%", "72"),
        ("72 percent", "72"),
        ("1,072", "1072"),
        ("1{,}072", "1072"),
        (r"10,\!080", "10080"),
        ("-5", "\u22125"),
        ("- 5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        (".5", "0.5"),
        ("0.50", "1/2"),
        ("1/2", r"\frac{1}{2}"),
        (r"\dfrac12", "0.5"),
        (r"\frac{270}7\text{ degrees}", "270/7"),
        ("1 1/2", "1.5"),
        (r"1\frac{4}{5}", "9/5"),
        (r"-1\frac12", "-3/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        ("6/4", "3/2"),
        ("72 clips", "72"),
        ("72 clips altogether", "72"),
        ("60 miles per hour", "60"),
        ("60 km/h", "60"),
        ("5cm", "5"),
        (r"15\mbox{ cm}^2", "15"),
        (r"5 \text{ m}", "5"),
        (r"90^\circ", "90"),
        ("90°", "90"),
        ("5 cm^2", "5"),
        ("x = 5", "5"),
        (r"3 \times 10^{5}", "300000"),
        (r"2.5 \cdot 10^{-3}", "0.0025"),
        (r"$72$", "72"),
        (r"\(72\)", "72"),
        (r"\text{Evelyn}", "evelyn"),
        ("Even.", r"\text{even}"),
        (r"\text{(C)}", "(C)"),
        ("( 3, 4 ]", "(3,4]"),
        ("0", "-0"),
        ("123456789012345678901234567890", "123,456,789,012,345,678,901,234,567,890"),
    ],
)
def test_spelling_does_not_matter(predicted, truth):
    assert same_answer(predicted, truth) and same_answer(truth, predicted)


@pytest.mark.parametrize(
    "predicted, truth",
    [
        (None, "72"),
        ("", "72"),
        (" ", "72"),
        ("", ""),
        ("172", "72"),
        ("727", "72"),
        ("72.5", "72"),
        ("7 2", "72"),
        ("-72", "72"),
        ("--72", "72"),
        ("7,2", "72"),
        ("72,0", "720"),
        ("72 71", "72"),
        ("72, 71", "72"),
        ("72 or 71", "72"),
        (r"72 \text{ or } 71", "72"),
        ("71 = 72", "72"),
        (r"71 \ne 72", "72"),
        ("the answer is 72", "72"),
        ("40+32", "72"),
        (r"36 \cdot 2", "72"),
        (r"36 \times 2", "72"),
        (r"\frac{144+0}{2}", "72"),
        ("2^3", "8"),
        ("72 thousand", "72"),
        ("72 dozen", "72"),
        ("2k", "2"),
        ("2 k", "2"),
        ("2xy", "2"),
        (r"2\pi", "2"),
        ("2 pi", "2"),
        (r"2\sqrt{2}", "2"),
        ("5r^5", "5"),
        ("0.5", "50%"),
        ("1/0", "1"),
        (r"\frac{1}{0}", "0"),
        ("11/2", "1.5"),
        ("(3,4)", "(3,4]"),
        ("1,2", "(1,-2)"),
        ("Evelyn", "Navin"),
        ("3R^2", "3r^3"),
        ("72" * 100, "72"),
        ("9" * 5000, "9"),
        ("<answer>72", "73"),
        ("nan", "72"),
        ("inf", "72"),
        ("\u0667\u0662", "72"),
        ("1e400000000", "72"),
        ("5!", "5"),
        (r"72 \times 10^{99999999}", "72"),
        ("<answer>72</answer>", "7"),
        ("1_000", "1000"),
        ("x=5+1", "5"),
    ],
)
def test_what_is_not_the_answer_is_not_taken_for_it(predicted, truth):
    assert not same_answer(predicted, truth)


@pytest.mark.parametrize(
    "predicted, truth",
    [
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("-q+p", "p - q"),
        (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
        ("2(k+1)", "2k+2"),
        (r"\sqrt{4}", "2"),
        ("[-2, 7]", r"x \in [-2,7]"),
        ("-2, 1", "1,-2"),
        (r"$\frac{\pi}{2}$", r"\pi/2"),
        (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
        (r"\left(\tfrac{6}{4}, -13\right)", r"\left( \frac{3}{2}, -13 \right)"),
    ],
)
def test_expressions_are_compared_by_meaning(predicted, truth):
    assert same_answer(predicted, truth)


def spellings(rng, value: Fraction):
    """Ways to write a number with two decimals at most."""
    sign, size = "-" * (value < 0), abs(value)
    whole, cents = divmod(int(size * 100), 100)
    digits = rng.choice([f"{whole}", f"{whole:,}", f"00{whole}"])
    decimal = digits + (f".{cents:02d}" if cents else rng.choice(["", ".", ".0", ".00"]))
    scale = rng.randint(1, 9)
    top, bottom = size.numerator * scale, size.denominator * scale
    fraction = rng.choice([f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac {{{top}}} {{{bottom}}}"])
    mixed = f"{whole} {cents * scale}/{100 * scale}"
    dash = rng.choice(["-", "\u2212", "\u2013"]) if sign else rng.choice(["", "+"])
    body = rng.choice([decimal, fraction, mixed])
    before = rng.choice(["", "$", r"\$", " "])
    after = rng.choice(["", "%", r"\%", " pens", r"\text{ cm}", r"^\circ", "$", " ", " miles per hour", r"\right"])
    return dash + before + body + after


def test_numbers_are_equal_exactly_when_their_values_are():
    rng = random.Random(0)
    for _ in range(4000):
        left = Fraction(rng.randint(-300_000, 300_000), rng.choice([1, 2, 4, 5, 10, 100]))
        left = Fraction(round(left * 100), 100)
        right = left if rng.random() < 0.5 else left + rng.choice([-1, 1]) * rng.choice([Fraction(1, 100), 1, 10, 1000])
        a, b = spellings(rng, left), spellings(rng, right)
        assert same_answer(a, b) == (left == right), (a, b)


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
    [(r"so \boxed{1}.", 1.0), (r"\boxed{ }", 0.0), (r"\boxed{1", 0.0), ("1", 0.0), (r"\boxed{1} \boxed{2}", 0.0)],
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


def test_specs_carry_weights(reward_file):
    loaded = load_rewards(["answer", "format:0.2", f"{reward_file}:length", f"{reward_file}:answer_is:-0.5"])
    assert [(name, weight) for name, weight, _ in loaded] == [
        ("answer", 1.0),
        ("format", 0.2),
        ("length", 1.0),
        ("answer_is", -0.5),
    ]
    assert loaded[2][2]("12345", {}) == 0.5


@pytest.mark.parametrize(
    "spec, message",
    [
        ("anwser", "'anwser'.*'answer'"),
        ("answer:much", "weight 'much'"),
        ("answer:nan", "weight 'nan'"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("FILE", "names no function"),
        ("FILE:none", "no function 'none'; it has length"),
        ("FILE:number", "not a function"),
        ("FILE:alone", r"alone\(text, row\)"),
        ("FILE:length:x", "weight 'x'"),
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


# scoring


def items(*answers):
    return [
        Item([{"role": "user", "content": "?"}], answer, None, {"row_index": n, "answer": "raw"})
        for n, answer in enumerate(answers)
    ]


def test_totals_are_weighted_sums_and_rows_carry_the_truth(reward_file):
    rewards = load_rewards(["format:0.2", "answer", f"{reward_file}:length:0.5"])
    got = score(rewards, ["<think>a</think><answer>1</answer>", "1", "2"], items("1", "1", "1"))
    assert got.values["format"] == [1.0, 0.0, 0.0] and got.values["answer"] == [1.0, 1.0, 0.0]
    assert got.totals == pytest.approx([0.2 + 1.0 + 0.5 * 3.4, 1.0 + 0.5 * 0.1, 0.5 * 0.1])
    assert (got.correct, got.errors, got.unfinished) == ([True, True, False], 0, 0)


def test_the_first_reward_judges_where_there_is_no_answer_reward(reward_file):
    rewards = load_rewards([f"{reward_file}:answer_is", "format"])
    assert score(rewards, ["1", "2"], items("1", "1")).correct == [True, False]


def test_scoring_leaves_the_row_of_the_item_alone():
    item = items("1")[0]
    score(load_rewards(["answer"]), ["1"], [item])
    assert item.row == {"row_index": 0, "answer": "raw"}


def test_a_failing_reward_stops_the_run_and_names_the_row(reward_file):
    rewards = load_rewards(["answer", f"{reward_file}:fails"])
    with pytest.raises(RewardError, match="'fails', row 1, response 'the text'.*ZeroDivisionError") as error:
        score(rewards, ["1", "the text"], items("1", "1"))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("name, value", [("empty", "None"), ("nan", "nan")])
def test_a_reward_that_is_no_number_is_an_error(reward_file, name, value):
    with pytest.raises(RewardError, match=f"returned {value}"):
        score(load_rewards([f"{reward_file}:{name}"]), ["1"], items("1"))


def test_on_error_zero_counts_and_warns_once(reward_file, monkeypatch):
    monkeypatch.setattr(scores, "_warned", set())
    rewards = load_rewards(["answer", f"{reward_file}:fails", f"{reward_file}:nan"])
    with pytest.warns(RuntimeWarning) as caught:
        got = score(rewards, ["1", "1"], items("1", "1"), on_error="zero")
        score(rewards, ["1", "1"], items("1", "1"), on_error="zero")
    assert (got.totals, got.errors) == ([2.0, 1.0], 3)
    assert sorted("ZeroDivisionError" in str(w.message) for w in caught) == [False, True]


def test_bad_calls_of_score_are_refused():
    with pytest.raises(UserError, match="on_error is 'skip'"):
        score(load_rewards(["answer"]), [], [], on_error="skip")
    with pytest.raises(ValueError, match="zip"):
        score(load_rewards(["answer"]), ["1", "2"], items("1"))


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
    assert score(rewards, rationales, items(*truths)).totals == [1.0] * 1319
    shifted = score(rewards, rationales, items(*truths[1:], truths[0])).totals
    assert sum(shifted) == sum(a == b for a, b in zip(truths, truths[1:] + truths[:1])) < 40


@needs_real
def test_every_math500_answer_equals_itself_and_its_solution_s():
    rows = json.loads((REAL / "math" / "math500.json").read_text())
    start = time.monotonic()
    for row in rows:
        assert same_answer(extract_answer(rf"Thus $\boxed{{{row['answer']}}}$."), row["answer"])
        assert same_answer(extract_answer(row["solution"]), row["answer"])
    assert time.monotonic() - start < 5


@needs_real
def test_every_math500_answer_equals_itself_for_math_verify_too():
    answers = [row["answer"] for row in json.loads((REAL / "math" / "math500.json").read_text())]
    latex = [answer for answer in answers if "\\" in answer]
    assert len(latex) > 100
    assert [answer for answer in latex if not same_latex(answer, answer)] == []
    stop_worker()
