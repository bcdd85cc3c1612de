"""Inputs: what a run is given, checked before any model is loaded: items, held-out items, rewards, chats."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine import adapters, model
from engine.algos import algo_of
from engine.chat import (
    check_template,
    continue_thoughts,
    encode_prompt,
    encode_text,
    may_mistake,
    opened_thoughts,
    render,
)
from engine.config import Config, first_run
from engine.data import TASKS, Item, load_task
from engine.errors import UserError
from engine.log import trace_file
from engine.rewards import load_rewards
from engine.rollouts import ROLLOUTS
from engine.sources.context import Context
from engine.watch import announce


@dataclass(frozen=True)
class Inputs:
    items: Sequence[Item]
    held_out: Sequence[Item]
    rewards: list
    tokenizer: object


def load_inputs(config: Config) -> Inputs:
    """UserError for what can be wrong with them, and for what is not installed or not there."""
    items, task = load_items(config, "train"), TASKS[config.task]
    has_test = config.test_data or task.source or task.generated
    held_out = load_items(config, "test") if config.eval_size and has_test else []
    algo = algo_of(config)
    algo.loss(config, None)  # refuses settings that it has no use for
    source = algo.source
    source.check(items, config)
    if source.rolls_out and not first_run(config):
        model.check_given(config.start)
    if config.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed; run `pip install -r requirements-wandb.txt`, or leave --wandb off.")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.kernels == "fused" and on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("kernels fused needs a GPU (or TRITON_INTERPRET=1, slowly); use chunked on a CPU.")
    if config.memory_gib and on_cpu:
        raise UserError("memory_gib is of a GPU, and there is none here: it goes with --dry-run, which plans for one.")
    if config.profile_steps and on_cpu and not config.profile_trace:
        raise UserError("Without a GPU profile_steps needs --profile_trace FILE.json.gz, to record with torch.")
    if config.profile_trace and (file := trace_file(config.profile_trace)).exists():
        raise UserError(f"{file} is there already, and stays as it is: give --profile_trace another file.")
    if config.rollout not in ROLLOUTS:
        raise UserError(f"There is no rollout back-end {config.rollout!r}; known: {', '.join(ROLLOUTS)}.")
    if config.lora_rank is not None:
        adapters.targets(model.hollow_model(config.start), config)
    rewards = load_rewards(config.rewards or task.rewards, announce) if config.grades else []
    tokenizer = model.load_tokenizer(config.start, config.today)
    for split in (items, held_out):
        check_chats(split, tokenizer, config)
    check_teacher(items, tokenizer, config)
    return Inputs(items, held_out, rewards, tokenizer)


def load_items(config: Config, split: str) -> Sequence[Item]:
    """The task's rows for "train" or "test"; UserError for a missing file, an empty set or a wrong column.

    Of the test split a fixed sample of `eval_size`, whose answers are needed whatever the algorithm, and whose traces
    are not; of pairs a table's answers are read where `answer_column` names them.
    """
    is_test, kind = split == "test", algo_of(config).source
    to_grade = is_test and config.grades and (bool(config.answer_column) or not kind.pairs)
    return load_task(
        config.task,
        split,
        source=(config.test_data if is_test else config.train_data) or None,
        prompt_column=config.prompt_column or None,
        answer_column=config.answer_column or None,
        trace_column=config.trace_column or None,
        chosen_column=config.chosen_column or None,
        rejected_column=config.rejected_column or None,
        system_prompt=config.system_prompt,
        limit=(config.eval_size if is_test else config.train_limit) or None,
        seed=config.seed,
        sample=is_test,
        traces=not is_test,
        pairs=kind.pairs,
        answers=to_grade or kind.rolls_out and config.grades,
    )


def check_chats(items: Sequence[Item], tokenizer, config: Config) -> None:
    """UserError where tokenizer and model do not belong together, and, naming the row, for one that `check_chat`
    refuses: now, for it may be drawn late."""
    check_template(tokenizer)
    beyond = list_beyond(tokenizer, config)
    check_each(items, lambda item: check_chat(item, tokenizer, beyond, config), config)


def check_each(items: Sequence[Item], check: Callable[[Item], object], config: Config) -> None:
    """UserError of `check` with the row named; of items that are made, all of a kind, the first is looked at."""
    for item in items[:1] if TASKS[config.task].generated else items:
        try:
            check(item)
        except UserError as error:
            raise UserError(f"{item.where}: {error}" if item.where else str(error)) from None


def check_teacher(items: Sequence[Item], tokenizer, config: Config) -> None:
    """UserError for a teacher that speaks of other tokens and, naming the row, for a question that cannot be put to it
    behind examples."""
    if not config.taught:
        return
    if not first_run(config):
        model.check_given(config.teacher or config.start)
    if config.teacher and model.load_tokenizer(config.teacher).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"The teacher {config.teacher} has another vocabulary than {config.start}, so its probabilities are of "
            "other tokens; take one of the same family."
        )
    vocabulary = min(model.model_config(name).vocab_size for name in (config.start, config.teacher or config.start))
    if config.match_top_k > vocabulary:
        raise UserError(f"match_top_k {config.match_top_k} is above the vocabulary of {vocabulary}; 32 is usual.")
    if config.context != "zeroshot":
        check_each(items, Context(items, tokenizer, config).encode, config)


def list_beyond(tokenizer, config: Config) -> list[str]:
    """The tokens that the model, or its teacher, has no embedding for; UserError if every chat needs one."""
    rows = {name: model.model_config(name).vocab_size for name in (config.start, config.teacher) if name}
    for name in rows:
        model.check_vocabulary(tokenizer, rows[name], name)
    return [token for token, i in tokenizer.get_vocab().items() if i >= min(rows.values())]


def check_chat(item: Item, tokenizer, beyond: list[str], config: Config) -> None:
    """UserError for a chat, trace or pair that the template refuses or leaves out, or that has a token of `beyond`."""
    thinking, texts = config.enable_thinking, () if algo_of(config).source.rolls_out else (item.trace, item.rejected)
    traces = [text for text in texts if text]
    text = render(tokenizer, item.prompt, thinking)
    written = _letters(text)
    for i, message in enumerate(item.prompt):
        role, content = message["role"], message["content"]
        if role != "assistant" and _letters(content) not in written:  # left out, or written in another way
            other = [*item.prompt[:i], message | {"content": content + "x"}, *item.prompt[i + 1 :]]
            if render(tokenizer, other, thinking) == text:
                raise UserError(
                    f"The chat template leaves out what the role {role!r} says; most know system, user and assistant "
                    "only."
                )
    for trace in traces:
        text += continue_thoughts(opened_thoughts(tokenizer, item.prompt, thinking), trace)
    if may_mistake(tokenizer) or any(token in text for token in beyond):  # spelled in data some are text
        ids = {*encode_prompt(tokenizer, item.prompt, thinking)}.union(*(encode_text(tokenizer, t) for t in traces))
        if found := ids.intersection(tokenizer.convert_tokens_to_ids(beyond)):
            raise UserError(
                f"It has the token {tokenizer.convert_ids_to_tokens(min(found))!r}, for which the model, or its "
                "teacher, has no embedding; resize it (resize_token_embeddings), or take it out."
            )


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()
