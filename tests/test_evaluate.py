"""Evaluation: pass@k against enumeration, and the command against a hand-counted result."""

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from engine import dist, model
from engine.config import load_config
from engine.data import Item
from engine.dist import World
from engine.errors import UserError
from engine.evaluate import evaluate, pass_at_k
from engine.inputs import check_chats
from engine.rewards import load_rewards
from engine.rollouts.protocol import Completion
from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (5, 4, 2), (6, 6, 4), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_command_writes_json_with_greedy_accuracy_and_pass_at_k(tmp_path):
    rows = [{"prompt": "Mia has 1 pens.", "answer": "7"}, {"prompt": "Tom has 2 pens.", "answer": "8"}]
    data = tmp_path / "two.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model.export_model(model.load_model("tiny", 0, torch.float32), model.load_tokenizer("tiny"), tmp_path / "lm")
    options = [
        "--model",
        str(tmp_path / "lm"),
        "--task",
        "jsonl",
        "--test_data",
        str(data),
        "--max_new_tokens",
        "4",
        "--samples",
        "3",
        "--init_from",
        "/where/the/run/began",
    ]
    words = command("-m", "engine.evaluate", *options, "--json", tmp_path / "out.json")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(done.stdout) == result
    assert "greedy: 100%" in done.stderr and "sampled: 100%" in done.stderr and "6/6" in done.stderr
    assert result["greedy"]["problems"] == 2 and result["greedy"]["accuracy"] in (0.0, 0.5, 1.0)
    assert set(result["sampled"]) >= {"pass@1", "pass@2", "accuracy"} and result["greedy"]["length"] <= 4


WORLD = World(0, 1, 0, torch.device("cpu"), None)


@pytest.fixture
def alone(monkeypatch):
    """One rank, without a process group."""
    monkeypatch.setattr(dist, "all_sum", lambda values: values)


def item(question: str, answer: str = "5", row=0, trace=None) -> Item:
    return Item([{"role": "user", "content": question}], answer, trace, {"row_index": row}, f"my.jsonl, row {row + 1}")


def answering(tokenizer, *texts: str):
    """A rollout that gives the texts in turn, whatever it is asked; what it was asked stands in `.asked`."""

    def rollout(prompts, *, num_samples, requests, on_group, **settings):
        rollout.asked = [tokenizer.decode(ids) for ids in prompts]
        for p, i in enumerate(requests):
            ids = tokenizer.encode(texts[i % len(texts)]) + [tokenizer.eos_token_id]
            on_group(p, [Completion(ids, [0.0] * len(ids), "eos")] * num_samples)

    return rollout


def test_held_out_answers_are_graded_by_the_reward_that_says_what_is_correct_in_the_run(tmp_path, alone):
    (tmp_path / "mine.py").write_text("def long_enough(text, row):\n    return float(len(text) > 3)\n")
    tokenizer, items = model.load_tokenizer("tiny"), [item("1"), item("2")]
    rollout, config = answering(tokenizer, "5", "not it"), load_config(["--model", "none"])
    for specs, accuracy in (
        ([f"{tmp_path}/mine.py:long_enough"], 0.5),
        ([f"{tmp_path}/mine.py:long_enough", "answer"], 0.5),
    ):
        right = evaluate(rollout, tokenizer, items, load_rewards(specs), config, WORLD)
        assert right["accuracy"] == accuracy and right["problems"] == 2 and "dropped" not in right
    both = answering(tokenizer, "5")
    assert (
        evaluate(both, tokenizer, items, load_rewards([f"{tmp_path}/mine.py:long_enough"]), config, WORLD)["accuracy"]
        == 0
    )
    assert evaluate(both, tokenizer, items, load_rewards(["format", "answer"]), config, WORLD)["accuracy"] == 1


def test_held_out_prompts_that_do_not_fit_are_left_out_and_counted(alone):
    tokenizer = model.load_tokenizer("tiny")
    items = [item("7 " * 50), item("1"), item("7 " * 60), item("2"), item("3")]
    config = load_config(["--model", "none", "--max_prompt_tokens", "20"])
    rollout = answering(tokenizer, "5", "5", "5", "4")
    result = evaluate(rollout, tokenizer, items, load_rewards(["answer"]), config, WORLD)
    assert (result["problems"], result["dropped"]) == (3, 2) and result["accuracy"] == pytest.approx(2 / 3)
    assert [prompt.count("7") for prompt in rollout.asked] == [0, 0, 0]
    with pytest.raises(UserError, match="All 2 held-out prompts exceed max_prompt_tokens 20"):
        evaluate(rollout, tokenizer, items[:1] + items[2:3], load_rewards(["answer"]), config, WORLD)


def test_a_row_that_no_template_takes_or_no_embedding_has_is_named_before_it_is_drawn(tmp_path):
    tokenizer = model.load_tokenizer("tiny")
    model.export_model(model.load_model("tiny", 0, torch.float32), tokenizer, tmp_path / "m")
    given = ["--model", str(tmp_path / "m"), "--task", "jsonl", "--algo"]
    rl, sft = load_config([*given, "grpo"]), load_config([*given, "sft"])
    items = [item("1", row=0, trace="2"), item("what is <new>?", row=7), item("1", row=8, trace="<new> 2")]
    check_chats(items, tokenizer, rl)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="my.jsonl, row 8: It has the token '<new>'"):
        check_chats(items, tokenizer, rl)
    check_chats(items[::2], tokenizer, rl)
    with pytest.raises(UserError, match="my.jsonl, row 9: It has the token '<new>'"):
        check_chats(items[::2], tokenizer, sft)
    tokenizer = model.load_tokenizer("tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    check_chats(items[::2], tokenizer, sft)  # a control token: text, where it is spelled
    tokenizer.chat_template = (
        "{{ raise_exception('alternate!') if '1' in messages[0].content }}" + tokenizer.chat_template
    )
    with pytest.raises(UserError, match="row 1: .*alternate!"):
        check_chats(items, tokenizer, rl)
    for how in ("tojson", "upper"):
        tokenizer.chat_template = (
            f"{{% for m in messages if m.role != 'human' %}}{{{{ m.content | {how} }}}} {{% endfor %}}"
        )
        check_chats([*items, item('"5"\n', row=2)], tokenizer, rl)
    human = Item([{"role": "human", "content": "5?"}], "5", None, {}, "my.jsonl, row 4")
    with pytest.raises(UserError, match="row 4: The chat template leaves out what the role 'human' says"):
        check_chats([*items, human], tokenizer, rl)
    tokenizer.chat_template = (
        "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}"
    )
    told = Item([{"role": "system", "content": "x"}, *items[0].prompt], "5", None, {}, "my.jsonl, row 1")
    with pytest.raises(UserError, match="my.jsonl, row 1: .*no system.*--system_prompt ''"):
        check_chats([told], tokenizer, rl)
    tokenizer = model.load_tokenizer("tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["¶¶", "§"]})
    with pytest.raises(UserError, match="row 3: .*control token '§'"):
        check_chats([*items, item("5 § 2", row=2)], tokenizer, rl)
