"""Tasks: rows of files in every format, bad files, samples, the real data sets."""

import datetime
import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from engine.data import TASKS, count_shared, load_task
from engine.errors import UserError
from engine.rewards import REWARDS, load_rewards
from tests.tables import REAL, ROWS, needs_real, one_sentence, write, write_parquet

pytestmark = pytest.mark.usefixtures("private_cache")


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


def test_limit_takes_the_first_rows_and_looks_at_no_others(tmp_path):
    path = write(tmp_path / "a.jsonl", *ROWS, {"prompt": "", "answer": "9"})
    assert [i.answer for i in load_task("jsonl", "train", source=path, limit=3)] == ["0", "1", "2"]
    assert len(load_task("jsonl", "train", source=path, limit=5)) == 5


def test_gsm8k_rows_lose_their_commas_and_calculator_marks(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "Q", "answer": "2*600=<<2*600=1200>>1,200 in all.\n#### 1,200"})
    item = load_task("gsm8k", "train", source=path)[0]
    assert item.answer == "1200"
    assert item.trace == "<think>\n2*600=1,200 in all.\n</think>\n<answer>1200</answer>"


@pytest.mark.parametrize(
    "name, split, arguments, message",
    [
        ("gsm8", "train", {}, "'gsm8'.*'gsm8k'"),
        ("arithmetic", "valid", {}, "no split 'valid'"),
        ("gsm8k", "train", {"source": "nowhere/rows.jsonl"}, "no file nowhere/rows.jsonl"),
        ("gsm8k", "train", {"source": "./nowhere"}, "no file ./nowhere; check --train_data"),
        ("gsm8k", "test", {"source": "~nobody/rows"}, "no file ~nobody/rows; check --test_data"),
        ("math500", "train", {}, "no split 'train'.*or give --train_data"),
        ("jsonl", "train", {}, "give --train_data: "),
        ("math", "test", {}, "give --test_data: "),
        ("gsm8k", "train", {"limit": 0}, "--train_limit is 0"),
        ("gsm8k", "test", {"limit": -1}, "--eval_size is -1"),
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
        ([ROWS[0], {"prompt": "Q", "answer": ""}], "row 2: the answer in column 'answer' is empty"),
        (
            [ROWS[0], {"prompt": "Q"}, ROWS[1], {"prompt": "Q"}],
            r"row 2 \(1 more: 4\): the answer in column 'answer' is empty",
        ),
        ([ROWS[0], "{oops\n", ROWS[1]], "row 2 is not a JSON object.*oops"),
        ([ROWS[0], "\n", "[1, 2]\n"], "row 3 is not a JSON object"),
        ([ROWS[0], '{"prompt": "Q", "answer": 1, "answer": 2}\n'], "row 2 has the key 'answer' twice"),
        (["[", json.dumps(ROWS[0]), ",\n", json.dumps(ROWS[1])], "row 3 is not a JSON object"),
        (["[", json.dumps(ROWS[0]), ",\n7]"], "row 2 is not a JSON object"),
        ([ROWS[0], '{"prompt": "Q", "answer": 1' + 5000 * "0" + "}\n"], "row 2 has a whole number of more than"),
        (['{"unused": [1' + 5000 * "0" + "]}\n"], "row 1 has a whole number of more than 4300 digits"),
        ([ROWS[0], json.dumps(ROWS[1]) + ",\n", ROWS[2]], "row 2 is followed by a comma"),
        (['{"a":' + 100_000 * "["], "row 1 is not a JSON object"),
        ([{"question": "Q", "solution": "1"}], "no column 'prompt'; name one of question, solution with --prompt_col"),
        ([{"data": ROWS}], "no column 'prompt'; name one of data"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, rows, message, capfd):
    with pytest.raises(UserError, match=message) as error:
        load_task("jsonl", "train", source=write(tmp_path / "a.jsonl", *rows))
    assert "a.jsonl" in one_sentence(error)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("is_list", [False, True])
def test_a_file_in_another_encoding_is_refused_with_its_row(tmp_path, encoding, is_list):
    lines = [json.dumps({"prompt": text, "answer": "1"}, ensure_ascii=False) for text in ("plain", "caf\u00e9")]
    path = tmp_path / "a.jsonl"
    path.write_bytes((f"[{lines[0]},\n{lines[1]}]" if is_list else "\n".join(lines)).encode(encoding))
    row = 2 if encoding == "latin-1" else 1
    with pytest.raises(UserError, match=f"a.jsonl, row {row} is not in UTF-8") as error:
        load_task("jsonl", "train", source=str(path))
    one_sentence(error)


TWO = [{"prompt": "Wie gro\u00df?\u2028", "answer": "1"}, {"prompt": "\U0001f600", "answer": "2", "more": {"x": None}}]


@pytest.mark.parametrize(
    "name, layout",
    [
        ("a.jsonl", "\ufeff{0}\r\n\r\n{1}\r\n"),
        ("a.jsonl", "{0}{1}"),
        ("a.json", "{0}\n{1}"),
        ("a.json", "\ufeff [ {0},\n\n{1}]\n"),
        ("a.jsonl", "[{0}, {1}]"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_objects_are_read_however_they_are_laid_out(tmp_path, name, layout, indent):
    """As pyarrow reads them; a key that a row lacks is None in it."""
    path = tmp_path / name
    path.write_bytes(layout.format(*(json.dumps(r, ensure_ascii=False, indent=indent) for r in TWO)).encode())
    items = load_task("jsonl", "train", source=str(path))
    assert [item.row for item in items] == [{"more": None, **r, "row_index": i} for i, r in enumerate(TWO)]
    assert [items[1].answer, items[0].prompt[0]["content"]] == ["2", TWO[0]["prompt"]]


def test_a_row_that_is_bad_is_named_by_its_file_and_line(tmp_path):
    write(tmp_path / "train-0.jsonl", ROWS[0])
    write(tmp_path / "train-1.jsonl", ROWS[1], "\n", {"prompt": "Q", "answer": []}, {"prompt": 5, "answer": "1"})
    write(tmp_path / "train-2.jsonl", {"prompt": "Q", "answer": None})
    message = r"train-1.jsonl, row 3 \(2 more: 4, 1 of \S*train-2.jsonl\): the answer in column 'answer' is neither"
    with pytest.raises(UserError, match=message) as error:
        load_task("jsonl", "train", source=str(tmp_path))
    one_sentence(error)


@pytest.mark.parametrize(
    "first, second, answers",
    [
        ([1], ["007", "3/4"], ["1", "007", "3/4"]),
        (["007"], [7.0, 0.5], ["007", "7", "0.5"]),
        ([True], ["no"], ["true", "no"]),
        ([Decimal("1.10")], [0.123], ["1.10", "0.123"]),
        ([datetime.date(2024, 1, 5)], [300], ["2024-01-05", "300"]),
    ],
)
def test_each_parquet_file_of_a_folder_keeps_its_own_types(tmp_path, first, second, answers):
    write_parquet(tmp_path / "train-0.parquet", prompt=["Q"] * len(first), answer=first)
    write_parquet(
        tmp_path / "train-1.parquet", answer=second, prompt=["Q"] * len(second), more=[{"x": 1}] * len(second)
    )
    items = load_task("jsonl", "train", source=str(tmp_path))
    assert [item.answer for item in items] == answers
    assert [item.row["more"] for item in items] == [None] * len(first) + [{"x": 1}] * len(second)
    sample = load_task("jsonl", "train", source=str(tmp_path), limit=1, sample=True)[0]
    assert sample.answer == answers[sample.row["row_index"]]


def test_narrow_floats_of_one_file_do_not_narrow_the_next(tmp_path):
    import numpy as np

    write_parquet(tmp_path / "train-0.parquet", prompt=["Q"], answer=np.array([0.1], "float32"))
    write_parquet(tmp_path / "train-1.parquet", prompt=["Q"] * 2, answer=[0.1, 0.123456789012])
    items = load_task("jsonl", "train", source=str(tmp_path))
    assert [item.answer for item in items] == ["0.1", "0.1", "0.123456789012"]


def test_a_bad_row_of_a_parquet_folder_is_named_by_its_file(tmp_path):
    for n, answers in enumerate((["1", "2"], ["3", " ", "5"], [""])):
        write_parquet(tmp_path / f"train-{n}.parquet", prompt=["Q"] * len(answers), answer=answers)
    message = r"train-1.parquet, row 2 \(1 more: 1 of \S*train-2.parquet\): the answer in column 'answer' is empty"
    with pytest.raises(UserError, match=message):
        load_task("jsonl", "train", source=str(tmp_path))


def test_all_rows_of_a_table_come_in_order_and_can_be_asked_for_one_by_one(tmp_path):
    sizes = (1500, 0, 700)
    for n, size in enumerate(sizes):
        write_parquet(tmp_path / f"train-{n}.parquet", prompt=["Q"] * size, answer=[f"{n}.{i}" for i in range(size)])
    answers = [f"{n}.{i}" for n, size in enumerate(sizes) for i in range(size)]
    items = load_task("jsonl", "train", source=str(tmp_path))
    assert [item.answer for item in items] == answers and items[-1].answer == "2.699"
    sample = load_task("jsonl", "train", source=str(tmp_path), limit=50, sample=True)
    assert all(item.answer == answers[item.row["row_index"]] for item in sample)


def test_a_sample_is_spread_and_the_same_every_time(tmp_path):
    rows = [{"prompt": f"Q{n}", "answer": str(n)} for n in range(200)]
    path = write(tmp_path / "a.jsonl", *rows, {"prompt": "", "answer": ""})
    places = [i.row["row_index"] for i in load_task("jsonl", "test", source=path, limit=20, sample=True)]
    items = load_task("jsonl", "test", source=path, limit=20, sample=True, seed=7)
    assert places == sorted(set(places)) and len(places) == 20
    assert places[:10] != list(range(10)) and min(places) < 60 and max(places) > 140
    assert [(i.row["row_index"], i.answer) for i in items] == [(n, str(n)) for n in places]
    code = (
        "from engine.data import load_task; import sys; "
        "print([i.row['row_index'] for i in load_task('jsonl', 'test', source=sys.argv[1], limit=20, sample=True)])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "5"}
    root = Path(__file__).resolve().parents[1]
    again = subprocess.run([sys.executable, "-c", code, path], env=env, cwd=root, capture_output=True, text=True)
    assert json.loads(again.stdout) == places
    with pytest.raises(UserError, match="row 201: the prompt"):
        load_task("jsonl", "test", source=path, limit=201, sample=True)


def test_a_sample_of_the_generated_task_is_its_first(tmp_path):
    first, sample = (load_task("arithmetic", "test", limit=30, sample=sample) for sample in (False, True))
    assert list(first) == list(sample)


def test_problems_in_both_sets_are_counted(tmp_path):
    train = write(tmp_path / "a.jsonl", *({"prompt": p, "answer": "1"} for p in ("What is 1?", "What is 2?", "Both.")))
    asked = ("WHAT  is\n1? ", "What is 12?", "both.", "Both.", "Neither.")
    held_out = write(tmp_path / "b.jsonl", *({"prompt": p, "answer": "2"} for p in asked))
    load = lambda path, system: load_task("jsonl", "train", source=path, system_prompt=system)
    assert count_shared(load(train, "Be brief."), load(held_out, None)) == 3
    assert count_shared(load(held_out, None), load(held_out, None)) == 5
    assert count_shared(load(train, "Be brief."), []) == 0
    assert count_shared(load_task("arithmetic", "train", limit=3000), load_task("arithmetic", "test")) == 0
    for n, text in enumerate(("Caf\u00e9?", "CAFE\u0301?", "x\u00b2?", "x2?")):  # two ways to write one character
        write(tmp_path / f"{n}.jsonl", {"prompt": text, "answer": "1"})
    one, same, square, two = (load(str(tmp_path / f"{n}.jsonl"), None) for n in range(4))
    assert count_shared(one, same) == 1 and count_shared(square, two) == 0


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", "this is prose")
    with pytest.raises(UserError, match="cannot be read|is not a JSON object") as error:
        load_task("jsonl", "train", source=path)
    assert path in one_sentence(error)


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a .jsonl, .json, .parquet"):
        load_task("jsonl", "train", source=write(tmp_path / "a.csv", "prompt,answer\n"))


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
