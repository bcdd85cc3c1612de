"""Tasks: rows of files."""

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

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not (REAL / "gsm8k").exists(), reason="the real data sets are not on this machine")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


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


WRITTEN = [  # (what stands in the JSON file, the answer)
    ('"2024-01-05"', "2024-01-05"),
    ('"2024-01-05 10:30"', "2024-01-05 10:30"),
    ('"2024-01-05T10:30:00Z"', "2024-01-05T10:30:00Z"),
    ('"10:30"', "10:30"),
    ('"0012"', "0012"),
    ('" 1e5 "', "1e5"),
    ('"NaN"', "NaN"),
    ("72", "72"),
    ("-7", "-7"),
    ("0.5", "0.5"),
    ("0.50", "0.50"),
    ("0.1", "0.1"),
    ("1e-5", "0.00001"),
    ("2.5E-7", "0.00000025"),
    ("1e16", "1" + 16 * "0"),
    ("1.25e+3", "1250"),
    ("1e400", "1" + 400 * "0"),
    ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
    ("9007199254740993", "9007199254740993"),
    ("9007199254740993.0", "9007199254740993.0"),
    (str(10**19), "1" + 19 * "0"),
    (str(-(2**200)), str(-(2**200))),
    ("true", "true"),
    ("false", "false"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_an_answer_is_what_the_file_says(tmp_path, suffix):
    """Whatever the other rows hold: all of these share a column."""
    lines = [f'{{"prompt": "Q", "answer": {cell}, "n": 1}}' for cell, _ in WRITTEN]
    path = tmp_path / f"a.{suffix}"
    path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    items = load_task("jsonl", "train", source=str(path))
    assert [item.answer for item in items] == [answer for _, answer in WRITTEN]
    assert [item.row["answer"] for item in items] == [json.loads(cell) for cell, _ in WRITTEN]


@pytest.mark.parametrize(
    "cell, found",
    [
        ("NaN", "is NaN, which is no number"),
        ("-Infinity", "is -Infinity, which is no number"),
        ("1e5000", r"is 1e\+5000, which is too long"),
        ("1e-1001", "is 1e-1001, which is too long"),
        ("1e99999999999999999999", "too long"),
        ("null", "is empty"),
        ('" "', "is empty"),
        ("[1]", "list"),
        ('{"a": 1}', "dict"),
        ('"\\ud800"', "half a character"),
    ],
)
def test_what_is_no_answer_is_refused_by_row_and_column(tmp_path, cell, found):
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "gold": 1}, f'{{"prompt": "Q", "gold": {cell}}}')
    with pytest.raises(UserError, match=f"row 2: the answer in column 'gold' .*{found}") as error:
        load_task("jsonl", "train", source=path, answer_column="gold")
    one_sentence(error)


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    "kind, cells, answers",
    [
        ("float32", [0.1, 1e-5, 72.0, 3e16], ["0.1", "0.00001", "72", "3" + 16 * "0"]),
        ("float32", [123456792.0, -67108872.0, 2.0**52], ["123456792", "-67108872", str(2**52)]),
        ("float16", [0.1, 0.5, 8208.0, 65504.0, -0.0], ["0.1", "0.5", "8208", "65504", "0"]),
        ("float64", [0.1, 1e-5, 72.0, 1e16, 1 / 3], ["0.1", "0.00001", "72", "1" + 16 * "0", "0.3333333333333333"]),
        ("int64", [72, 2**63 - 1], ["72", str(2**63 - 1)]),
        ("uint64", [2**64 - 1], [str(2**64 - 1)]),
        ("decimal", [Decimal("72.10"), Decimal("0.00")], ["72.10", "0.00"]),
        ("bool_", [True, False], ["true", "false"]),
        ("date32", [datetime.date(2024, 1, 5)], ["2024-01-05"]),
        ("large_string", ["2024-01-05 10:30"], ["2024-01-05 10:30"]),
    ],
)
def test_a_typed_column_is_written_out(tmp_path, kind, cells, answers):
    import pyarrow

    kind = pyarrow.decimal128(10, 2) if kind == "decimal" else getattr(pyarrow, kind)()
    kind = pyarrow.struct([("deep", pyarrow.struct([("gold", kind)]))])
    nested = pyarrow.array([{"deep": {"gold": cell}} for cell in cells], kind)
    path = write_parquet(tmp_path / "a.parquet", prompt=["Q"] * len(cells), meta=nested)
    items = load_task("jsonl", "train", source=path, answer_column="meta.deep.gold")
    assert [item.answer for item in items] == answers


@pytest.mark.parametrize(
    "cell",
    [datetime.datetime(2024, 1, 5), datetime.time(10, 30), b"7", [7], {"a": 7}, float("nan"), float("inf"), None],
)
def test_a_typed_cell_that_has_no_text_is_refused(tmp_path, cell):
    path = write_parquet(tmp_path / "a.parquet", prompt=["Q"], answer=[cell])
    with pytest.raises(
        UserError, match="a.parquet, row 1: the answer in column 'answer' is (neither|empty|NaN|Inf)"
    ) as error:
        load_task("jsonl", "train", source=path)
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


def test_a_changed_parquet_file_is_read_anew_whatever_its_date(tmp_path):
    for answer in ("1", "2"):
        path = write_parquet(tmp_path / "a.parquet", prompt=["Q"], answer=[answer])
        os.utime(path, (1e9, 1e9))
        assert load_task("jsonl", "train", source=path)[0].answer == answer


def test_a_parquet_column_that_comes_twice_is_refused(tmp_path):
    import pyarrow.parquet

    table = pyarrow.table([["Q"], ["1"], ["2"]], names=["prompt", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has the column 'answer' twice") as error:
        load_task("jsonl", "train", source=str(tmp_path / "a.parquet"))
    one_sentence(error)


@pytest.mark.parametrize("kind, cell", [("string", b"caf\xe9"), ("date32", 10**8), ("timestamp", 10**12)])
def test_a_parquet_cell_that_python_cannot_hold_is_refused(tmp_path, kind, cell):
    import pyarrow

    plain = pyarrow.array([cell], {"date32": pyarrow.int32()}.get(kind))
    kind = pyarrow.timestamp("s") if kind == "timestamp" else getattr(pyarrow, kind)()
    path = write_parquet(tmp_path / "a.parquet", prompt=["Q"], answer=["1"], unused=plain.view(kind))
    with pytest.raises(UserError, match="a.parquet, row 1 or one up to 1 cannot be read") as error:
        load_task("jsonl", "train", source=path)
    one_sentence(error)


def test_a_column_that_is_called_row_index_is_kept_under_another_name(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": "Q", "answer": "1", "row_index": n} for n in (70, 80)))
    row = load_task("jsonl", "train", source=path)[1].row
    assert (row["row_index"], row["own_row_index"]) == (1, 80)


@pytest.mark.parametrize("cell", [5, 0.5, True, None, " ", [], {"role": "user"}, [{"role": "user"}], "\ud800"])
@pytest.mark.parametrize("what", ["prompt", "trace"])
def test_a_prompt_or_trace_that_is_not_text_is_refused(tmp_path, what, cell):
    row = {"prompt": "Q", "answer": "1", "trace": "T"}
    path = write(tmp_path / "a.jsonl", row, row | {what: cell})
    with pytest.raises(UserError, match=f"row 2: the {what} in column '{what}'") as error:
        load_task("jsonl", "train", source=path, trace_column="trace")
    one_sentence(error)


WRITTEN_CHATS = [
    json.dumps([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]),
    json.dumps([{"content": "1+1?\n", "role": "user"}], indent=2) + "\n",
    str([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]),
    "[{'content': '1+1?', 'role': 'user'}\n {'content': '2', 'role': 'assistant'}]",  # as pandas writes an array
    json.dumps({"role": "user", "content": "1+1?"}),
    json.dumps([{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]),
    json.dumps({"messages": [{"role": "user", "content": "1+1?"}]}),
]


@pytest.mark.parametrize("text", WRITTEN_CHATS)
@pytest.mark.parametrize("what", ["prompt", "trace"])
def test_a_chat_that_was_written_as_text_is_refused(tmp_path, what, text):
    row = {"prompt": "Q", "answer": "1", "trace": "T"}
    path = write(tmp_path / "a.jsonl", row, row | {what: text})
    with pytest.raises(UserError, match=f"row 2: the {what} in column '{what}' is a chat written as text") as error:
        load_task("jsonl", "train", source=path, trace_column="trace")
    one_sentence(error)


@pytest.mark.parametrize(
    "prompt",
    [
        "2024-01-05",
        '[{"role": "user", "content": "x"}] is what in JSON?',
        '{"name": "Bob", "role": "clerk"}',
        "[1, 2, 3]",
        "What is the content of 'role': 'x'?",
        "{",
        "Q: 1+1?\nA: 2",
    ],
)
def test_a_prompt_or_trace_that_looks_like_something_else_stays_text(tmp_path, prompt):
    row = {"prompt": prompt, "answer": "1", "trace": "2024-01-05T10:30:00Z"}
    item = load_task("jsonl", "train", source=write(tmp_path / "a.jsonl", row, row), trace_column="trace")[1]
    assert (item.prompt[0]["content"], item.trace, item.row) == (row["prompt"], row["trace"], {**row, "row_index": 1})


VERL = [
    {
        "prompt": [{"role": "user", "content": f"What is {n}?"}],
        "reward_model": {"ground_truth": str(n), "style": "rule"},
        "extra_info": {"split": "train", "more": {"solution": f"It is {n}."}},
    }
    for n in range(3)
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_nested_column_is_named_with_dots(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write(path, *VERL)
    else:
        write_parquet(path, **{name: [row[name] for row in VERL] for name in VERL[0]})
    columns = {"answer_column": "reward_model.ground_truth", "trace_column": "extra_info.more.solution"}
    items = load_task("jsonl", "train", source=str(path), **columns)
    assert [(i.prompt, i.answer, i.trace) for i in items] == [
        (row["prompt"], str(n), f"It is {n}.") for n, row in enumerate(VERL)
    ]
    assert items[1].row == {**VERL[1], "row_index": 1}
    text = load_task("jsonl", "train", source=str(path), prompt_column="reward_model.style", **columns)[0]
    assert text.prompt == [{"role": "user", "content": "rule"}]
    for name in ("reward_model.truth", "prompt.content", "nowhere.at.all", "reward_model."):
        with pytest.raises(UserError, match=f"no column '{name}'; name one of .*reward_model.ground_truth") as error:
            load_task("jsonl", "train", source=str(path), answer_column=name)
        one_sentence(error)


def test_a_dot_in_the_name_of_a_column_wins(tmp_path):
    row = {"prompt": "Q", "a": {"b": "nested", "c.d": "dotted"}, "a.b": "whole"}
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "a": None, "a.b": "none"}, row)
    assert [i.answer for i in load_task("jsonl", "train", source=path, answer_column="a.b")] == ["none", "whole"]
    with pytest.raises(UserError, match="row 1: the answer in column 'a.c.d' is empty"):
        load_task("jsonl", "train", source=path, answer_column="a.c.d")


def test_where_no_answers_are_needed_their_column_is_not_read(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "why": "Because."}, {"prompt": "Q", "why": "So.", "answer": []})
    items = load_task("jsonl", "train", source=path, trace_column="why", answers=False)
    assert [(item.answer, item.trace) for item in items] == [("", "Because."), ("", "So.")]
    assert load_task("jsonl", "train", source=path, answers=False)[0].trace is None
    with pytest.raises(UserError, match="row 1 .1 more: 2.: the answer in column 'answer' is empty"):
        load_task("jsonl", "train", source=path, trace_column="why")
    with pytest.raises(UserError, match="no column 'gold'; name one of prompt, why, answer"):
        load_task("jsonl", "train", source=path, trace_column="why", answer_column="gold")


def test_where_no_traces_are_needed_their_column_is_not_read_but_for_what_is_no_part_of_the_prompt(tmp_path):
    plain = write(tmp_path / "plain.jsonl", {"prompt": "2+3?", "answer": "5"})
    assert load_task("jsonl", "test", source=plain, trace_column="why", traces=False)[0].trace is None
    with pytest.raises(UserError, match="no column 'why'"):
        load_task("jsonl", "test", source=plain, trace_column="why")
    said = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    source = write(tmp_path / "chat.jsonl", {"prompt": said, "answer": "5"})
    (item,) = load_task("jsonl", "test", source=source, trace_column="prompt", traces=False)
    assert item.prompt == said[:1]


def test_traces_that_stand_in_the_answers_are_read_all_the_same(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "Q", "answer": "So.\n#### 7", "why": "W"})
    item = load_task("gsm8k", "train", source=path, answers=False)[0]
    assert item.answer == "7" and "So." in item.trace
    assert load_task("gsm8k", "train", source=path, answers=False, trace_column="why")[0].answer == ""
    with pytest.raises(UserError, match="no column 'gold'"):
        load_task("gsm8k", "train", source=path, answers=False, answer_column="gold")


def chat(*roles):
    return [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]


@pytest.mark.parametrize("roles", [("user", "assistant"), ("system", "user", "assistant", "user", "assistant")])
def test_a_chat_that_ends_with_the_answer_is_a_trace_and_no_prompt(tmp_path, roles):
    row = {"messages": chat(*roles), "answer": "1"}
    path = write(tmp_path / "a.jsonl", row, row)
    with pytest.raises(
        UserError, match=r"row 1 \(1 more: 2\): the prompt in column 'messages' ends with the model's own"
    ):
        load_task("jsonl", "train", source=path, prompt_column="messages")
    columns = {"prompt_column": "messages", "trace_column": "messages"}
    item = load_task("jsonl", "train", source=path, **columns, answers=False)[1]
    assert (item.prompt, item.trace) == (row["messages"][:-1], row["messages"][-1]["content"])


@pytest.mark.parametrize(
    "roles",
    [
        *(("user", role) for role in ("ai", "chatgpt", "assistant ", "Assistant", "GPT", "claude", "critic")),
        ("user", "assistant", "system"),
        ("user", "assistant", "developer", "System"),
        ("assistant",),
    ],
)
def test_a_model_s_turn_with_nothing_asked_behind_it_gives_the_answer_away(tmp_path, roles):
    path = write(tmp_path / "a.jsonl", {"prompt": chat(*roles), "answer": "1"})
    with pytest.raises(UserError, match="row 1: the prompt .* ends with the model's own turn") as error:
        load_task("jsonl", "train", source=path)
    one_sentence(error)


@pytest.mark.parametrize(
    "roles", [("user", "assistant", "tool"), ("developer", "Human"), ("user", "system"), ("assistant", "user ")]
)
def test_a_chat_in_which_somebody_asks_is_a_prompt(tmp_path, roles):
    path = write(tmp_path / "a.jsonl", {"prompt": chat(*roles), "answer": "1"})
    assert load_task("jsonl", "train", source=path)[0].prompt == chat(*roles)


WANTED = r"role and content \(text\)"


@pytest.mark.parametrize(
    "cell, message",
    [
        (chat("system"), "nobody asks"),
        (chat("system", "developer"), "nobody asks"),
        ([*chat("user", "assistant"), {"role": "user", "content": ""}], "nothing is said"),
        ([{"role": "user", "content": " \n"}], "nothing is said"),
        ([{"from": "human", "value": "Q"}], WANTED),
        ([{"role": "user", "content": [{"type": "text", "text": "Q"}]}], WANTED),
        ([*chat("user"), {"role": "assistant", "content": None, "tool_calls": []}, *chat("tool")], WANTED),
        ([{"role": 1, "content": "Q"}], WANTED),
        ({"messages": chat("user")}, WANTED),
    ],
)
def test_a_chat_that_asks_nothing_is_refused(tmp_path, cell, message):
    path = write(tmp_path / "a.jsonl", {"prompt": cell, "answer": "1"})
    with pytest.raises(UserError, match=f"row 1: the prompt in column 'prompt' .*{message}") as error:
        load_task("jsonl", "train", source=path)
    one_sentence(error)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_trace_may_be_a_chat_of_the_model_s_one_turn(tmp_path, suffix):
    row = {"prompt": chat("user"), "completion": chat("assistant")}
    path = tmp_path / f"a.{suffix}"
    write(path, row) if suffix == "jsonl" else write_parquet(path, **{name: [cell] for name, cell in row.items()})
    item = load_task("jsonl", "train", source=str(path), trace_column="completion", answers=False)[0]
    assert (item.prompt, item.trace) == (chat("user"), "assistant 0")


@pytest.mark.parametrize("roles", [("user",), ("user", "assistant"), ("assistant", "assistant"), ("system",)])
def test_another_chat_is_no_trace(tmp_path, roles):
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "completion": chat(*roles)})
    with pytest.raises(UserError, match="row 1: the trace .* is neither text nor a list of one") as error:
        load_task("jsonl", "train", source=path, trace_column="completion", answers=False)
    one_sentence(error)


@pytest.mark.parametrize(
    "cell, what", [(chat("user"), "prompt"), ("Q", "prompt"), (chat("assistant"), "prompt"), (None, "prompt")]
)
def test_a_chat_without_an_answer_is_no_trace(tmp_path, cell, what):
    path = write(tmp_path / "a.jsonl", {"m": chat("user", "assistant")}, {"m": cell})
    with pytest.raises(UserError, match=f"row 2: the {what} in column 'm'") as error:
        load_task("jsonl", "train", source=path, prompt_column="m", trace_column="m", answers=False)
    one_sentence(error)


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


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_items_say_what_they_come_from(tmp_path, suffix, monkeypatch):
    def put(path, rows):
        path.parent.mkdir(exist_ok=True)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return write(path, *rows) if suffix == "jsonl" else write_parquet(path, **columns)

    rows = [{**row, "why": 300_000 * "w"} for row in ROWS] if suffix == "jsonl" else ROWS
    path = put(tmp_path / f"a.{suffix}", rows)
    origin = load_task("jsonl", "train", source=path).origin
    assert origin == json.loads(json.dumps(origin)) == load_task("jsonl", "train", source=path).origin
    assert origin == {
        "path": path,
        "size": os.path.getsize(path),
        "digest": origin["digest"],
        "rows": 5,
        "columns": ["prompt", None, "answer"],
        "system_prompt": None,
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments, other in [
        ({"limit": 2}, {"rows": 2}),
        ({"trace_column": "why"}, {"columns": ["prompt", "why", "answer"]}),
        ({"answer_column": "extra"}, {"columns": ["prompt", None, "extra"]}),
        ({"prompt_column": "why", "answers": False}, {"columns": ["why", None, None]}),
        ({"system_prompt": "Be brief."}, {"system_prompt": "Be brief."}),
        ({"system_prompt": ""}, {}),
        ({"source": f".//./a.{suffix}"}, {}),
        ({"source": f"~/a.{suffix}"}, {}),
        ({"source": f"../{tmp_path.name}/a.{suffix}"}, {}),
    ]:
        assert load_task("jsonl", "train", **{"source": path, **arguments}).origin == origin | other
    digests = {origin["digest"]}
    for n, place in enumerate((0, 4), 2):  # at either end
        put(
            tmp_path / f"a.{suffix}",
            [{**row, "answer": "9" if i == place else row["answer"]} for i, row in enumerate(rows)],
        )
        digests.add(load_task("jsonl", "train", source=path).origin["digest"])
        assert len(digests) == n


def test_items_of_a_folder_come_from_all_its_files(tmp_path):
    write(tmp_path / "train-0.jsonl", *ROWS[:2])
    write(tmp_path / "train-1.jsonl", *ROWS[2:4])
    origin = load_task("jsonl", "train", source=str(tmp_path)).origin
    assert origin["size"] == sum(path.stat().st_size for path in tmp_path.iterdir()) and origin["rows"] == 4
    assert origin["files"] == ["train-0.jsonl", "train-1.jsonl"]
    write(tmp_path / "train-1.jsonl", ROWS[3], ROWS[2])
    other = load_task("jsonl", "train", source=str(tmp_path)).origin
    assert other == origin | {"digest": other["digest"]} != origin
    (tmp_path / "test").mkdir()
    for n in range(12):
        write(tmp_path / "test" / f"{n:02}.jsonl", ROWS[n % 5])
    files = [os.path.join("test", f"{n:02}.jsonl") for n in range(9)]
    assert load_task("jsonl", "test", source=f"{tmp_path}/").origin["files"] == [*files, "3 more"]


def test_items_of_the_hub_and_generated_ones_say_what_they_come_from(monkeypatch):
    import datasets

    def origin(*answers):
        rows = datasets.Dataset.from_list([{"question": "Q", "answer": f"#### {answer}"} for answer in answers])
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
        return load_task("gsm8k", "train").origin

    first = origin(1, 2, 3)
    assert (
        first
        == origin(1, 2, 3)
        == {
            "path": "openai/gsm8k",
            "digest": first["digest"],
            "rows": 3,
            "columns": ["question", None, "answer"],
            "system_prompt": TASKS["gsm8k"].system_prompt,
        }
    )
    assert len({origin(*answers)["digest"] for answers in ((1, 2, 3), (0, 2, 3), (1, 2, 0))}) == 3
    one, two = (load_task("arithmetic", "train", limit=5, seed=seed).origin for seed in (1, 2))
    assert (one["path"], one["rows"]) == ("arithmetic", 5) and one != two
    told = load_task("arithmetic", "train", limit=5, seed=1, system_prompt="Be brief.").origin
    assert told == one | {"system_prompt": "Be brief."} != one


def test_a_file_that_changes_under_the_run_is_not_read_as_something_else(tmp_path):
    path = write(tmp_path / "a.jsonl", *ROWS)
    items = load_task("jsonl", "train", source=path)
    write(tmp_path / "a.jsonl", "x" * 2000)
    with pytest.raises(UserError, match="a.jsonl, row 3 has changed") as error:
        items[2]
    one_sentence(error)


def test_a_rationale_without_its_mark_names_the_row(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"question": "Q", "answer": answer} for answer in ("#### 1", "It is 2.")))
    with pytest.raises(UserError, match="row 2: the answer in column 'answer' does not end in '####"):
        load_task("gsm8k", "train", source=path)


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", "this is prose")
    with pytest.raises(UserError, match="cannot be read|is not a JSON object") as error:
        load_task("jsonl", "train", source=path)
    assert path in one_sentence(error)


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
