"""Data: what a cell says as an answer, a prompt or a trace, by its text or its type, and what is none."""

import datetime
import json
from decimal import Decimal

import pytest

from engine.data import load_task
from engine.errors import UserError
from tests.tables import one_sentence, write, write_parquet

pytestmark = pytest.mark.usefixtures("private_cache")

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


@pytest.mark.parametrize("kind, cell", [("string", b"caf\xe9"), ("date32", 10**8), ("timestamp", 10**12)])
def test_a_parquet_cell_that_python_cannot_hold_is_refused(tmp_path, kind, cell):
    import pyarrow

    plain = pyarrow.array([cell], {"date32": pyarrow.int32()}.get(kind))
    kind = pyarrow.timestamp("s") if kind == "timestamp" else getattr(pyarrow, kind)()
    path = write_parquet(tmp_path / "a.parquet", prompt=["Q"], answer=["1"], unused=plain.view(kind))
    with pytest.raises(UserError, match="a.parquet, row 1 or one up to 1 cannot be read") as error:
        load_task("jsonl", "train", source=path)
    one_sentence(error)


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


def test_a_rationale_without_its_mark_names_the_row(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"question": "Q", "answer": answer} for answer in ("#### 1", "It is 2.")))
    with pytest.raises(UserError, match="row 2: the answer in column 'answer' does not end in '####"):
        load_task("gsm8k", "train", source=path)
