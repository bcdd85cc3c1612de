"""Data: which columns are read, by name or from chats, and which parts of a chat are prompt and trace."""

import pytest

from engine.data import load_task
from engine.errors import UserError
from tests.tables import one_sentence, write, write_parquet

pytestmark = pytest.mark.usefixtures("private_cache")


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "Hi?", "gold": 7})
    assert load_task("jsonl", "train", source=path, prompt_column="q", answer_column="gold")[0].answer == "7"


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


def test_a_parquet_column_that_comes_twice_is_refused(tmp_path):
    import pyarrow.parquet

    table = pyarrow.table([["Q"], ["1"], ["2"]], names=["prompt", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has the column 'answer' twice") as error:
        load_task("jsonl", "train", source=str(tmp_path / "a.parquet"))
    one_sentence(error)


def test_a_column_that_is_called_row_index_is_kept_under_another_name(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": "Q", "answer": "1", "row_index": n} for n in (70, 80)))
    row = load_task("jsonl", "train", source=path)[1].row
    assert (row["row_index"], row["own_row_index"]) == (1, 80)


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


def test_chat_messages_are_taken_as_they_are(tmp_path):
    chat = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    path = write(tmp_path / "a.jsonl", {"prompt": chat, "answer": "2"})
    assert load_task("jsonl", "train", source=path)[0].prompt == chat


def test_an_empty_system_prompt_means_none(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "Q", "answer": "Because. #### 1"})
    assert [m["role"] for m in load_task("gsm8k", "train", source=path)[0].prompt] == ["system", "user"]
    assert [m["role"] for m in load_task("gsm8k", "train", source=path, system_prompt="")[0].prompt] == ["user"]


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
