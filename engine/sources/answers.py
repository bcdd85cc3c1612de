"""Answers of the policy itself, graded by rewards: question -> rollout -> reward -> advantage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.asking import Asker, Group, sampling_of
from engine.config import Config
from engine.data import Item
from engine.data.stream import Stream
from engine.dist import World
from engine.metrics import Tally
from engine.samples import Batch, Sample
from engine.sources.context import Context, check_examples
from engine.sources.prompts import Prompts


@dataclass(frozen=True)
class Answers:
    """`advantage`: of engine.algos.advantage, [P, G] rewards -> [P, G]."""

    advantage: Callable
    rolls_out = True
    pairs = False

    def check(self, items: Sequence[Item], config: Config) -> None:
        sampling_of(config)
        check_examples(items, config)

    def stream(self, size: int, config: Config, world: World) -> Stream:
        return Stream(size, config.seed, world.rank, world.world_size)

    def tokens(self, config: Config) -> int:
        return config.prompts_per_step * config.group_size * config.max_new_tokens

    def open(self, config: Config, prompts: Prompts, asker: Callable[[], Asker], world: World) -> "Explorer":
        return Explorer(config, self.advantage, prompts, asker(), world)


class Explorer:
    def __init__(self, config: Config, advantage: Callable, prompts: Prompts, asker: Asker, world: World):
        self.config, self.advantage, self.prompts, self.asker = config, advantage, prompts, asker
        self.share = config.prompts_per_step // world.world_size
        self.num_samples = config.num_samples if world.rank == 0 else 0
        self.context = Context(prompts.items, prompts.tokenizer, config)

    def __call__(self, step: int) -> Batch:
        """This rank's samples of the step; none when every group was dropped."""
        config, groups, tally = self.config, [], Tally(self.num_samples)
        cursor = self.prompts.stream.cursor
        for _ in range(1 + (config.max_refills if config.dynamic_sampling else 0)):
            groups += self.explore(self.share - len(groups), step, tally)
            if len(groups) == self.share:
                break
        tally.add(prompts_dropped=self.prompts.count_dropped())
        with tally.span("advantage", step):
            samples = self.samples_of(groups) if groups else []
        return Batch(samples, tally, cursor)

    def explore(self, count: int, step: int, tally: Tally) -> list[Group]:
        """Asks `count` questions; with dynamic sampling, only groups of mixed correctness return."""
        config = self.config
        groups = self.asker.ask(
            [self.prompts.draw() for _ in range(count)],
            num_samples=config.group_size,
            sampling=sampling_of(config),
            seed=config.seed,
            span=lambda verb: tally.span(verb, step),
        )
        for group in groups:
            count_group(group, tally)
        if config.dynamic_sampling:
            groups = [group for group in groups if len(set(group.grades.correct)) > 1]
            tally.add(groups_kept=len(groups), groups_drawn=count)
        return groups

    def samples_of(self, groups: list[Group]) -> list[Sample]:
        """The log-probabilities are those under the whole distribution at the temperature, which is what the trainer
        computes, also where top-p or top-k cut the distribution drawn from."""
        rewards_PG = torch.tensor([group.rewards for group in groups])
        adv_PG = self.advantage(rewards_PG, eps=self.config.adv_eps, unbiased=self.config.adv_unbiased)
        contexts = [self.context.encode(group.item) for group in groups]
        return [
            Sample(group.prompt, c.ids, adv, c.version, 0.0, {"logp_behaviour": torch.tensor(c.logp)}, context=context)
            for group, adv_G, context in zip(groups, adv_PG.tolist(), contexts, strict=True)
            for c, adv in zip(group.completions, adv_G, strict=True)
        ]


def count_group(group: Group, tally: Tally) -> None:
    tokens = sum(len(c.ids) for c in group.completions)
    if group.grades.correct:
        tally.add(reward_sum=sum(group.rewards), correct=sum(group.grades.correct), graded=len(group.completions))
    tally.add(
        {f"rewards/{name}": sum(values) for name, values in group.grades.values.items()},
        sequences=len(group.completions),
        length_sum=tokens,
        generated_tokens=tokens,
        at_limit_count=sum(c.finish == "length" for c in group.completions),
        reward_errors=group.grades.errors,
        reward_timeouts=group.grades.unfinished,
    )
    question, answer = group.item.prompt[-1]["content"], group.item.answer
    for text, reward in zip(group.texts, group.rewards, strict=True):
        tally.sample(prompt=question, text=text, answer=answer, reward=reward)
