"""Where batches come from: rollouts scored by rewards (rl), or traces packed into rows (sft)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.algos import Algo
from engine.batch import Batch, completions_batch, empty_batch, packed_batch
from engine.config import Config
from engine.data import Item, load_task
from engine.data.stream import Stream
from engine.dist import World
from engine.errors import UserError
from engine.log import Log
from engine.model import encode_prompt, turn_end
from engine.rewards import marked_answer, overlong_penalty, score
from engine.rollouts.native import Completion
from engine.rollouts.sampling import Sampling


def load_items(config: Config, split: str) -> Sequence[Item]:
    """The task's rows for "train" or "test"; UserError for a missing file, an empty set or a wrong column."""
    return load_task(
        config.task,
        split,
        source=(config.train_data if split == "train" else config.test_data) or None,
        prompt_column=config.prompt_column or None,
        answer_column=config.answer_column or None,
        trace_column=config.trace_column or None,
        system_prompt=config.system_prompt,
        limit=(config.train_limit if split == "train" else config.eval_size) or None,
        seed=config.seed,
    )


class Prompts:
    """Draws encodable prompts; the too long ones are dropped and counted."""

    def __init__(self, items: Sequence[Item], tokenizer, config: Config, stream: Stream):
        self.items, self.tokenizer, self.config, self.stream = items, tokenizer, config, stream
        self.dropped = 0

    def draw(self) -> tuple[int, Item, list[int]]:
        """(number of the draw, item, prompt ids)."""
        for _ in range(len(self.items)):
            number, index = self.stream.draw()
            ids = encode_prompt(self.tokenizer, self.items[index].prompt, self.config.enable_thinking)
            if len(ids) <= self.config.max_prompt_tokens:
                return number, self.items[index], ids
            self.dropped += 1
        raise UserError(
            f"All {len(self.items)} prompts exceed max_prompt_tokens {self.config.max_prompt_tokens}; raise it."
        )


def sampling_of(config: Config) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.stop)


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, scored."""

    prompt: list[int]
    completions: list[Completion]
    rewards: list[float]
    correct: list[bool]


class Explorer:
    """One call: prompts -> rollout -> reward -> advantage, on this rank alone (no collective in it)."""

    def __init__(self, config: Config, algo: Algo, prompts: Prompts, rollout, rewards: list, log: Log, world: World):
        self.config, self.algo, self.prompts, self.rollout = config, algo, prompts, rollout
        self.rewards, self.log, self.share = rewards, log, config.prompts_per_step // world.world_size

    def __call__(self, step: int) -> Batch:
        """This rank's trajectories of the step; none when every group was dropped."""
        config, groups = self.config, []
        for _ in range(1 + (config.max_refills if config.dynamic_sampling else 0)):
            groups += self.explore(self.share - len(groups), step)
            if len(groups) == self.share:
                break
        self.log.add(prompts_dropped=self.prompts.dropped)
        self.prompts.dropped = 0
        if not groups:
            return empty_batch(0)
        with self.log.span("advantage", step):
            rewards_PG = torch.tensor([group.rewards for group in groups])
            adv_PG = self.algo.advantage(rewards_PG, eps=config.adv_eps, unbiased=config.adv_unbiased)
            pairs = [(group.prompt, c) for group in groups for c in group.completions]
            return completions_batch(*zip(*pairs, strict=True), adv_PG.flatten().tolist())

    def explore(self, count: int, step: int) -> list[Group]:
        """Rolls out `count` prompts and scores them; with dynamic sampling, only groups of mixed correctness return."""
        config = self.config
        with self.log.span("rollout", step):
            numbers, items, prompts = zip(*(self.prompts.draw() for _ in range(count)), strict=True)
            answers = self.rollout(
                list(prompts),
                num_samples=config.group_size,
                sampling=sampling_of(config),
                seed=config.seed,
                requests=[number * config.group_size for number in numbers],
            )
        with self.log.span("reward", step):
            groups = [self.judge(*group, step) for group in zip(prompts, answers, items, strict=True)]
        if config.dynamic_sampling:
            groups = [group for group in groups if len(set(group.correct)) > 1]
            self.log.add(groups_kept=len(groups), groups_drawn=count)
        return groups

    def judge(self, prompt: list[int], completions: list[Completion], item: Item, step: int) -> Group:
        """Scores one group and counts it."""
        texts = [self.prompts.tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]
        scores = score(self.rewards, texts, [item] * len(texts), on_error=self.config.reward_on_error)
        cut = [c.finish == "length" for c in completions]
        rewards = scores.totals
        if self.config.overlong_penalty:
            answered = [bool(marked_answer(text)) for text in texts]
            rewards = [r + overlong_penalty(*pair) for r, *pair in zip(rewards, cut, answered, strict=True)]
        tokens = sum(len(c.ids) for c in completions)
        self.log.add(
            reward_sum=sum(rewards),
            correct=sum(scores.correct),
            sequences=len(texts),
            length_sum=tokens,
            generated_tokens=tokens,
            at_limit_count=sum(cut),
            reward_errors=scores.errors,
            reward_timeouts=scores.unfinished,
        )
        for text, reward in zip(texts, rewards, strict=True):
            self.log.sample(step, prompt=item.prompt[-1]["content"], text=text, answer=item.answer, reward=reward)
        return Group(prompt, completions, rewards, scores.correct)


class Traces:
    """One call: packed rows of (prompt, response) documents; every rank packs all rows and takes its share."""

    def __init__(self, config: Config, prompts: Prompts, log: Log, world: World):
        self.config, self.prompts, self.log, self.world = config, prompts, log, world
        self.end = turn_end(prompts.tokenizer)

    def __call__(self, step: int) -> Batch:
        length, count = self.config.pack_length, self.config.rows_per_step
        rows: list[list] = [[] for _ in range(count)]
        room = [length] * count
        while True:
            prompt, response = self.document()
            size = len(prompt) + len(response)
            if size > length:
                self.skip(size)
                continue
            fit = next((r for r, free in enumerate(room) if free >= size), None)
            if fit is None:
                self.prompts.stream.cursor -= 1  # opens the next step
                break
            rows[fit].append((prompt, response))
            room[fit] -= size
        self.log.add(prompts_dropped=self.prompts.dropped if self.world.rank == 0 else 0)
        self.prompts.dropped = 0
        return packed_batch(rows[self.world.rank :: self.world.world_size])

    def document(self) -> tuple[list[int], list[int]]:
        _, item, prompt = self.prompts.draw()
        return prompt, self.prompts.tokenizer.encode(item.trace, add_special_tokens=False) + [self.end]

    def skip(self, size: int) -> None:
        self.prompts.dropped += 1
        if self.prompts.dropped > len(self.prompts.items):
            raise UserError(
                f"No trace fits pack_length {self.config.pack_length} (the last has {size} tokens); raise it."
            )
