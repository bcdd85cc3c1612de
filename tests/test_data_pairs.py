"""Data: pairs of a chosen and a rejected answer, in the forms that are about, and what is none."""

import dataclasses
from types import SimpleNamespace

import pytest

from engine import inputs, model
from engine.config import load_config
from engine.data import load_task
from engine.data.arithmetic import list_problems, work_out
from engine.errors import UserError
from engine.inputs import check_chat, load_items
from engine.sources.answers import Answers
from engine.sources.traces import Traces
from tests.tables import REAL, needs_real, one_sentence, write, write_parquet

pytestmark = pytest.mark.usefixtures("private_cache")


def said(*turns):
    """Messages, the user's and the model's in turn."""
    roles = ("user", "assistant") * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns)]


def shared(*turns):
    """The same as ShareGPT has it."""
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in said(*turns)]


def load(path, **arguments):
    return load_task("jsonl", "train", source=str(path), pairs=True, **{"answers": False} | arguments)


BOTH = {"chosen": "4", "rejected": "5"}
HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant: "
SYSTEM = {"role": "system", "content": "Be brief."}
FORMS = {  # row: its prompt; the answers are 4 and 5
    "text": ({"prompt": "2+2?"} | BOTH, said("2+2?")),
    "messages": ({"prompt": [SYSTEM, *said("2+2?")]} | BOTH, [SYSTEM, *said("2+2?")]),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "Be brief."}, *shared("Hi", "Yes?", "2+2?")],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        [SYSTEM, *said("Hi", "Yes?", "2+2?")],
    ),
    "one message": (
        {"prompt": "2+2?"} | {k: {"role": "assistant", "content": v} for k, v in BOTH.items()},
        said("2+2?"),
    ),
    "a list of one": ({"prompt": said("2+2?")} | {k: said("", v)[1:] for k, v in BOTH.items()}, said("2+2?")),
    "a list of one, sharegpt": ({"prompt": "2+2?"} | {k: shared("", v)[1:] for k, v in BOTH.items()}, said("2+2?")),
    "whole chats": ({k: said("Hi", "Yes?", "2+2?", v) for k, v in BOTH.items()}, said("Hi", "Yes?", "2+2?")),
    "whole chats beside their first question": (
        {"prompt": " Hi\n"} | {k: [SYSTEM, *said("Hi", "Yes?", "2+2?", v)] for k, v in BOTH.items()},
        [SYSTEM, *said("Hi", "Yes?", "2+2?")],
    ),
    "whole chats, sharegpt": ({k: shared("2+2?", v) for k, v in BOTH.items()}, said("2+2?")),
    "texts of HH": ({k: HH + v for k, v in BOTH.items()}, said("Hi", "Yes?", "2+2?")),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_pair_is_read_in_each_form(tmp_path, name, suffix):
    row, prompt = FORMS[name]
    path = tmp_path / f"a.{suffix}"
    write(path, row, row) if suffix == "jsonl" else write_parquet(path, **{k: [v, v] for k, v in row.items()})
    item = load(path)[1]
    assert (item.prompt, item.trace, item.rejected, item.answer) == (prompt, "4", "5", "")
    assert item.row == row | {"row_index": 1} and item.where == f"{path}, row 2"


@needs_real
def test_all_of_a_real_set_of_sharegpt_pairs_reads():
    items = load(REAL / "pref" / "dpo_en_demo.json")
    assert len(items) == 300
    for item in items:
        row, prompt = item.row, [m["content"] for m in item.prompt]
        assert prompt == [turn["value"] for turn in row["conversations"]] and item.prompt[-1]["role"] == "user"
        assert {m["role"] for m in item.prompt} <= {"system", "user", "assistant"}
        assert (item.trace, item.rejected) == (row["chosen"]["value"], row["rejected"]["value"])


def test_columns_of_pairs_can_be_named_and_answers_beside_them_read(tmp_path):
    row = {"q": "2+2?", "pair": {"good": "4", "bad": "5"}, "answer": 4, "prompt": "no", "chosen": "no", "rejected": []}
    path = write(tmp_path / "a.jsonl", row)
    columns = {"prompt_column": "q", "chosen_column": "pair.good", "rejected_column": "pair.bad"}
    items = load(path, **columns, answers=True, system_prompt="Be brief.")
    assert items[0].prompt == [SYSTEM, *said("2+2?")]
    assert (items[0].trace, items[0].rejected, items[0].answer) == ("4", "5", "4")
    assert items.origin["columns"] == ["q", "pair.good", "pair.bad", "answer"]
    named = load(path, prompt_column="q", chosen_column="pair.good", rejected_column="pair.bad", trace_column="none")
    assert named.origin["columns"] == ["q", "pair.good", "pair.bad", None]


def test_where_prompts_stand_if_no_column_is_named(tmp_path):
    row = {k: said("2+2?", v) for k, v in BOTH.items()}
    other = {"conversations": said("2+2?"), "prompt": said("Hi")}
    path = write(tmp_path / "a.jsonl", row | other)
    with pytest.raises(UserError, match="row 1: the prompt is not that of the chats .* with --prompt_column too"):
        load(path)
    columns = lambda **arguments: load(path, **arguments).origin["columns"][0]
    assert columns(prompt_column="chosen") is None and columns(prompt_column="conversations") == "conversations"
    path = write(tmp_path / "a.jsonl", row | {"conversations": said("2+2?")})
    assert columns() == "conversations"
    path = write(tmp_path / "a.jsonl", row)
    assert columns() is None
    with pytest.raises(UserError, match="no column 'question'; name one of chosen, rejected with --prompt_column"):
        load(path, prompt_column="question")


ASKED = {"prompt": "2+2?"}
REFUSED = [  # (row, what is said of it)
    (ASKED | {"chosen": "", "rejected": "5"}, "the chosen in column 'chosen' is empty"),
    (ASKED | {"chosen": "4", "rejected": " \n"}, "the rejected in column 'rejected' is empty"),
    (ASKED | {"chosen": "4"}, "the rejected in column 'rejected' is empty"),
    (ASKED | {"chosen": "4", "rejected": []}, "the rejected in column 'rejected' is empty"),
    (ASKED | {"chosen": said("", " ")[1:], "rejected": "5"}, "the chosen in column 'chosen' is empty"),
    (ASKED | {"chosen": "4", "rejected": "4"}, "chosen and rejected are the same answer"),
    (ASKED | {"chosen": "4", "rejected": " 4\n"}, "chosen and rejected are the same answer"),
    ({k: said("2+2?", "4") for k in BOTH}, "chosen and rejected are the same answer"),
    ({"chosen": said("2+2?", "4"), "rejected": said("2+3?", "5")}, "the prompts of chosen and rejected differ"),
    ({"chosen": said("2+2?", "4"), "rejected": said("2+2?", "4", "Sure?", "5")}, "the prompts of chosen and rejected"),
    ({"chosen": HH + "4", "rejected": HH.replace("Yes", "No") + "5"}, "the prompts of chosen and rejected differ"),
    (ASKED | {"chosen": said("2+2?", "4"), "rejected": "5"}, "the prompts of chosen and rejected differ"),
    (ASKED | {k: said("2+3?", v) for k, v in BOTH.items()}, "the prompt is not that of the chats in chosen and reject"),
    (BOTH, r"chosen and rejected have no prompt before them .name its column with --prompt_column"),
    (ASKED | {"chosen": 4, "rejected": "5"}, "the chosen in column 'chosen' is neither text nor .* but 4"),
    (ASKED | {"chosen": 0, "rejected": "5"}, "the chosen in column 'chosen' is neither text nor .* but 0"),
    (ASKED | {"chosen": "4", "rejected": {"from": "gpt"}}, "the rejected in column 'rejected' is neither text nor"),
    (ASKED | {"chosen": "4", "rejected": {"from": "gpt", "value": 5}}, "the rejected in column .* is neither text nor"),
    (ASKED | {"chosen": "4", "rejected": ["5"]}, "the rejected in column 'rejected' is neither text nor"),
    (ASKED | {"chosen": str(said("2+2?", "4")), "rejected": "5"}, "the chosen in column .* is a chat written as text"),
    (ASKED | {"chosen": said("4"), "rejected": "5"}, "the chosen in column 'chosen' ends with a turn of 'user', not w"),
    ({k: said("2+2?", v, "So?") for k, v in BOTH.items()}, "the chosen in column 'chosen' ends with a turn of 'user'"),
    ({k: [*said("2+2?", v), said("", "!")[1]] for k, v in BOTH.items()}, "has a prompt that ends with the model's own"),
    ({k: [SYSTEM, said("", v)[1]] for k, v in BOTH.items()}, "has a prompt that is a chat in which nobody asks"),
    ({"prompt": said("2+2?", "4")} | BOTH, "the prompt in column 'prompt' ends with the model's own turn"),
    ({"conversations": shared("2+2?", "4")} | BOTH, "the prompt in column 'conversations' ends with the model's own"),
    ({"prompt": ""} | BOTH, "the prompt in column 'prompt' is neither text nor"),
    ({"prompt": 5} | BOTH, "the prompt in column 'prompt' is neither text nor"),
    ({"prompt": "\ud800"} | BOTH, "the prompt in column 'prompt' holds half a character"),
    (ASKED | BOTH | {"chosen": "\ud800"}, "the chosen in column 'chosen' holds half a character"),
]


@pytest.mark.parametrize("row, message", REFUSED)
def test_what_is_no_pair_is_refused_by_file_and_row(tmp_path, row, message):
    good = row | {k: said("2+2?", v) for k, v in BOTH.items()} | {k: said("2+2?") for k in row if k not in BOTH}
    path = write(tmp_path / "a.jsonl", good, row)
    with pytest.raises(UserError, match=f"a.jsonl, row 2: .*{message}") as error:
        load(path)
    one_sentence(error)


@pytest.mark.parametrize("gone", ["chosen", "rejected"])
def test_a_missing_column_of_pairs_is_named(tmp_path, gone):
    path = write(tmp_path / "a.jsonl", {k: v for k, v in (ASKED | BOTH).items() if k != gone})
    with pytest.raises(UserError, match=f"no column '{gone}'; name one of .* with --{gone}_column") as error:
        load(path)
    one_sentence(error)


@pytest.mark.parametrize("task", ["gsm8k", "math", "math500"])
def test_a_task_without_pairs_says_where_to_name_some(task):
    with pytest.raises(UserError, match=f"The task {task} has no pairs; name a file .* --task jsonl") as error:
        load_task(task, "test", pairs=True)
    one_sentence(error)


def test_a_row_of_pairs_read_for_another_purpose_has_no_rejected_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", ASKED | BOTH)
    item = load_task("jsonl", "train", source=path, trace_column="chosen", answers=False)[0]
    assert (item.trace, item.rejected) == ("4", None)


@pytest.mark.parametrize("split", ["train", "test"])
def test_embedded_pairs_set_a_faultless_trace_against_a_slip_in_the_same_problems(split):
    size = len(list_problems("test"))
    items, pairs = (load_task("arithmetic", split, limit=size, seed=3, pairs=pairs) for pairs in (False, True))
    for plain, pair in zip(items, pairs, strict=True):
        a, op, b, slip = (pair.row[key] for key in ("a", "op", "b", "slip"))
        assert (pair.prompt, pair.answer, plain.rejected) == (plain.prompt, plain.answer, None)
        assert (pair.trace, pair.rejected) == (work_out(a, op, b)[0], work_out(a, op, b, slip)[0])
        assert slip is not None and pair.trace != pair.rejected
    assert len({pair.row["slip"] for pair in pairs}) == 6
    assert list(pairs) == list(load_task("arithmetic", split, limit=size, seed=3, pairs=True))


def test_columns_of_pairs_are_not_for_generated_problems():
    for column in ("chosen_column", "rejected_column"):
        with pytest.raises(UserError, match="generated"):
            load_task("arithmetic", "train", pairs=True, **{column: "a"})


@pytest.fixture
def dpo(monkeypatch):
    """Any config is of an algorithm that learns from pairs."""
    source = SimpleNamespace(pairs=True, rolls_out=False)
    monkeypatch.setattr(inputs, "algo_of", lambda config: SimpleNamespace(source=source))


def test_sources_that_are_here_ask_for_no_pairs(tmp_path):
    assert not Answers(None).pairs and not Traces().pairs
    path = write(tmp_path / "a.jsonl", ASKED | {"why": "Because."})
    words = ["--algo", "sft", "--task", "jsonl", "--train_data", path, "--trace_column", "why"]
    assert load_items(load_config(words), "train")[0].rejected is None


def test_held_out_pairs_need_no_answers_but_where_their_column_is_named(tmp_path, dpo):
    path = write(tmp_path / "a.jsonl", {"q": "2+2?", "good": "4", "bad": "5", "answer": "", "gold": 4})
    words = ["--task", "jsonl", "--train_data", path, "--test_data", path, "--prompt_column", "q"]
    words += ["--chosen_column", "good", "--rejected_column", "bad"]
    for split, named, answer in (("train", "gold", ""), ("test", "", ""), ("test", "gold", "4")):
        item = load_items(load_config([*words, f"--answer_column={named}"]), split)[0]
        assert (item.trace, item.rejected, item.answer) == ("4", "5", answer)
    with pytest.raises(UserError, match="the answer in column 'answer' is empty"):
        load_items(load_config([*words, "--answer_column=answer"]), "test")
    assert all(load_items(load_config([]), split)[0].rejected for split in ("train", "test"))


@pytest.mark.parametrize("part", ["trace", "rejected"])
def test_both_answers_of_a_pair_are_held_to_the_vocabulary_and_the_template(dpo, part):
    config, tokenizer = load_config([]), model.load_tokenizer("tiny")
    item = load_task("arithmetic", "train", limit=1, pairs=True)[0]
    tokenizer.add_tokens(["<new>"])
    check_chat(item, tokenizer, ["<new>"], config)
    with pytest.raises(UserError, match="It has the token '<new>'"):
        check_chat(dataclasses.replace(item, **{part: "<new> 4"}), tokenizer, ["<new>"], config)
    tokenizer.chat_template += "<think></think>"
    plain = dataclasses.replace(item, trace="4", rejected="5")
    check_chat(plain, tokenizer, [], config)
    with pytest.raises(UserError, match="The trace has thoughts"):
        check_chat(dataclasses.replace(plain, **{part: "<think>2+2</think>4"}), tokenizer, [], config)
