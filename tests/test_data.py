"""Tasks: the generated one, and rows of files."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from engine.data import TASKS, load_task
from engine.data.arithmetic import PATTERN, list_problems, list_slips, load_arithmetic, solve, tell, words, work_out
from engine.errors import UserError
from engine.rewards import REWARDS, extract_answer, load_rewards, same_answer

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not (REAL / "gsm8k").exists(), reason="the real data sets are not on this machine")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


# arithmetic


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
    vocabulary = words()
    assert len(vocabulary) == len(set(vocabulary)) < 120
    used = set()
    for split in ("train", "test"):
        for item in load_task("arithmetic", split, limit=4000):
            for text in (item.prompt[0]["content"], item.trace):
                tokens = re.findall(PATTERN, text)
                assert "".join(tokens) == text
                used.update(tokens)
    assert used == set(vocabulary)


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


# tables


ROWS = [{"prompt": f"What is {n}?", "answer": str(n), "why": f"It is {n}.", "extra": n} for n in range(5)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_file_of_each_format_gives_the_same_items(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        import datasets

        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text(json.dumps(ROWS, indent=1) if suffix == "json" else "\n".join(map(json.dumps, ROWS)))
    items = load_task("jsonl", "train", source=str(path), trace_column="why", system_prompt="Be brief.")
    assert len(items) == 5
    assert items[2].prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2?"}]
    assert (items[2].answer, items[2].trace, items[2].row) == ("2", "It is 2.", {**ROWS[2], "row_index": 2})


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    write(tmp_path / "train-0.jsonl", *ROWS[:2])
    write(tmp_path / "train-1.jsonl", *ROWS[2:4])
    write(tmp_path / "test.jsonl", ROWS[4])
    assert [i.answer for i in load_task("jsonl", "train", source=str(tmp_path))] == ["0", "1", "2", "3"]
    assert [i.answer for i in load_task("jsonl", "test", source=str(tmp_path))] == ["4"]
    with pytest.raises(UserError, match="no file for split 'validation'.*test.jsonl"):
        load_task("jsonl", "validation", source=str(tmp_path))


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "Hi?", "gold": 7})
    assert load_task("jsonl", "train", source=path, prompt_column="q", answer_column="gold")[0].answer == "7"


def test_chat_messages_are_taken_as_they_are(tmp_path):
    chat = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    path = write(tmp_path / "a.jsonl", {"prompt": chat, "answer": "2"})
    assert load_task("jsonl", "train", source=path)[0].prompt == chat


def test_an_empty_system_prompt_means_none(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "Q", "answer": "Because. #### 1"})
    assert [m["role"] for m in load_task("gsm8k", "train", source=path)[0].prompt] == ["system", "user"]
    assert [m["role"] for m in load_task("gsm8k", "train", source=path, system_prompt="")[0].prompt] == ["user"]


def test_limit_takes_the_first_rows_and_looks_at_no_others(tmp_path):
    path = write(tmp_path / "a.jsonl", *ROWS, {"prompt": "", "answer": "9"})
    assert [i.answer for i in load_task("jsonl", "train", source=path, limit=3)] == ["0", "1", "2"]
    assert len(load_task("jsonl", "train", source=path, limit=5)) == 5


def test_gsm8k_rows_lose_their_commas_and_calculator_marks(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "Q", "answer": "2*600=<<2*600=1200>>1,200 in all.\n#### 1,200"})
    item = load_task("gsm8k", "train", source=path)[0]
    assert item.answer == "1200"
    assert item.trace == "<think>\n2*600=1,200 in all.\n</think>\n<answer>1200</answer>"


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    return text


@pytest.mark.parametrize(
    "name, split, arguments, message",
    [
        ("gsm8", "train", {}, "'gsm8'.*'gsm8k'"),
        ("arithmetic", "valid", {}, "no split 'valid'"),
        ("gsm8k", "train", {"source": "nowhere/rows.jsonl"}, "no file nowhere/rows.jsonl"),
        ("gsm8k", "train", {"source": "./nowhere"}, "no file ./nowhere"),
        ("math500", "train", {}, "no split 'train'"),
        ("jsonl", "train", {}, "give a source"),
        ("math", "train", {}, "give a source"),
        ("gsm8k", "train", {"limit": 0}, "limit is 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(name, split, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        load_task(name, split, **arguments)
    one_sentence(error)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "has no rows"),
        (["\n"], "has no rows|cannot be read"),
        ([ROWS[0], {"prompt": None, "answer": "1"}], "row 2: the prompt"),
        ([ROWS[0], {"prompt": "Q", "answer": ""}], "row 2: the answer is empty"),
        ([ROWS[0], {"prompt": "Q"}, ROWS[1], {"prompt": "Q"}], r"row 2 \(1 more: 4\): the answer is empty"),
        ([ROWS[0], "{oops\n", ROWS[1]], "row 2 is not a JSON object.*oops"),
        ([ROWS[0], "\n", "[1, 2]\n"], "row 3 is not a JSON object"),
        ([{"question": "Q", "solution": "1"}], "no column 'prompt'; name one of question, solution"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, rows, message, capfd):
    with pytest.raises(UserError, match=message) as error:
        load_task("jsonl", "train", source=write(tmp_path / "a.jsonl", *rows))
    assert "a.jsonl" in one_sentence(error)
    assert capfd.readouterr().err == ""


def test_a_rationale_without_its_mark_names_the_row(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"question": "Q", "answer": answer} for answer in ("#### 1", "It is 2.")))
    with pytest.raises(UserError, match="row 2: the answer does not end in '####"):
        load_task("gsm8k", "train", source=path)


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", "this is prose")
    with pytest.raises(UserError, match="cannot be read") as error:
        load_task("jsonl", "train", source=path)
    one_sentence(error)


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a .jsonl, .json, .parquet"):
        load_task("jsonl", "train", source=write(tmp_path / "a.csv", "prompt,answer\n"))


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="openai/gsm8k.*could not be had from the hub") as error:
        load_task("gsm8k", "train")
    one_sentence(error)


def test_the_hub_is_asked_for_the_task_s_own_configuration(monkeypatch):
    import datasets

    asked = []
    rows = datasets.Dataset.from_list([{"question": "Q", "answer": "#### 1"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    load_task("gsm8k", "test")
    load_task("gsm8k", "test", source="someone/else")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}), (("someone/else", None), {"split": "test"})]


@pytest.mark.parametrize("name", TASKS)
def test_the_default_rewards_of_every_task_load(name):
    assert load_rewards(TASKS[name].rewards)[0][0] == "answer"


@needs_real
@pytest.mark.parametrize("split, size", [("train", 7473), ("test", 1319)])
def test_all_of_gsm8k_reads(split, size):
    items = load_task("gsm8k", split, source=str(REAL / "gsm8k"))
    assert len(items) == size
    for item in items:
        assert re.fullmatch(r"-?\d+(\.\d+)?", item.answer) and "<<" not in item.trace
        assert REWARDS["answer"](item.trace, {"answer": item.answer}) == REWARDS["format"](item.trace, {}) == 1.0


@needs_real
def test_all_of_math500_reads():
    items = load_task("math500", "test", source=str(REAL / "math" / "math500.json"), trace_column="solution")
    assert len(items) == 500 and items[0].row["row_index"] == 0
    assert all("boxed" in item.trace and item.answer for item in items)
