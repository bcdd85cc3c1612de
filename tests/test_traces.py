"""Traces to imitate: what a step reads, the same on any number of ranks."""

import dataclasses
import json
import shutil

import pytest
import torch

from engine.algos import algo_of
from engine.config import CONFIGS, load_config
from engine.data.stream import Stream
from engine.dist import World
from engine.errors import UserError
from engine.inputs import check_chats, load_items
from engine.model import load_tokenizer
from engine.sources import Prompts

ITEMS = load_items(load_config(["--algo", "sft"]), "train")[:200]


def reader(*argv, rank=0, world_size=1):
    """(source, stream of its items)."""
    config, world = load_config(["--algo", "sft", *argv]), World(rank, world_size, rank, torch.device("cpu"), None)
    source = algo_of(config).source
    stream = source.stream(len(ITEMS), config, world)
    return source.open(config, Prompts(ITEMS, load_tokenizer("tiny"), config, stream), None, world), stream


def size(samples) -> int:
    return sum(len(s.prompt) + len(s.answer) for s in samples)


def test_a_step_is_the_same_on_any_number_of_ranks():
    whole, _ = reader("--step_tokens", "400")
    ranks = [reader("--step_tokens", "400", rank=rank, world_size=3)[0] for rank in range(3)]
    for step in range(5):
        one, parts = whole(step), [read(step) for read in ranks]
        assert [p.samples for p in parts] == [one.samples[rank::3] for rank in range(3)]
        counts = [len(p.samples) for p in parts]
        assert max(counts) - min(counts) <= 1 and {p.cursor for p in parts} == {one.cursor}


def test_a_step_has_as_many_tokens_as_fit_and_no_trace_is_lost():
    read, _ = reader("--step_tokens", "400")
    batches = [read(step) for step in range(6)]
    for batch, later in zip(batches, batches[1:]):
        assert size(batch.samples) <= 400 < size(batch.samples + later.samples[:1])
        assert later.cursor - batch.cursor == len(batch.samples)
    alone, stream = reader("--step_tokens", "1")
    assert [len(alone(step).samples) for step in range(3)] == [1, 1, 1] and stream.cursor == 3


def test_traces_and_prompts_that_are_too_long_are_dropped_and_counted():
    read, stream = reader("--step_tokens", "400", "--max_new_tokens", "20")
    batch = read(0)
    assert all(len(s.answer) <= 20 for s in batch.samples)
    dropped = batch.tally.sums["prompts_dropped"]
    assert stream.cursor - batch.cursor == len(batch.samples) + dropped and dropped > 0
    other, _ = reader("--step_tokens", "400", "--max_new_tokens", "20", rank=1, world_size=2)
    assert other(0).tally.sums["prompts_dropped"] == 0, "the first rank counts for all"
    with pytest.raises(
        UserError, match=r"No answer of the data fits max_new_tokens 3 \(the last has \d+ tokens\); raise it"
    ):
        reader("--max_new_tokens", "3")[0](0)
    with pytest.raises(UserError, match="All 200 prompts exceed max_prompt_tokens 3; raise it"):
        reader("--max_prompt_tokens", "3")[0](0)


def test_a_row_that_ends_a_walk_and_begins_the_next_is_no_proof_that_all_are_too_long():
    config = load_config(["--algo", "sft", "--max_prompt_tokens", "60"])
    long = dataclasses.replace(ITEMS[0], prompt=[{"role": "user", "content": "pens " * 100}])
    for answered in (False, True):
        prompts = Prompts([ITEMS[0], long], load_tokenizer("tiny"), config, Stream(2, 0))
        for _ in range(20):
            question = prompts.draw_answered(lambda item: (item.trace,))[0] if answered else prompts.draw()
            assert question[1] is ITEMS[0]


def test_an_answer_too_long_at_the_end_of_a_walk_and_the_head_of_the_next_is_passed_over():
    config = load_config(["--algo", "sft", "--max_new_tokens", "100"])
    long = dataclasses.replace(ITEMS[0], trace="pens " * 100)
    prompts = Prompts([ITEMS[0], long], load_tokenizer("tiny"), config, Stream(2, 0))
    assert all(prompts.draw_answered(lambda item: (item.trace,))[0][1] is ITEMS[0] for _ in range(20))


def test_a_teacher_without_embeddings_of_what_is_said_is_refused(tmp_path):
    folder = CONFIGS / "models" / "tiny"
    teacher = shutil.copytree(folder, tmp_path / "teacher")
    values = json.loads((folder / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(values | {"vocab_size": values["vocab_size"] - 4}))
    config = load_config(["--algo", "distill", "--teacher", str(teacher)])
    with pytest.raises(UserError, match="the token '.*', for which the model, or its teacher, has no embedding"):
        check_chats(ITEMS[:1], load_tokenizer("tiny"), config)
    check_chats(ITEMS[:1], load_tokenizer("tiny"), load_config(["--algo", "distill", "--teacher", str(folder)]))
