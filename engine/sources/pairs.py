"""Pairs of answers that are given, one of them chosen: two samples of a group, the chosen one first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.asking import encode
from engine.config import Config
from engine.data import Item
from engine.data.stream import Stream
from engine.dist import World
from engine.metrics import Tally
from engine.samples import Batch, Sample
from engine.sources.prompts import Prompts, encode_answers


@dataclass(frozen=True)
class Pairs:
    rolls_out = False
    pairs = True

    def check(self, items: Sequence[Item], config: Config) -> None:
        """Rows that are no pairs are refused where they are read."""

    def stream(self, size: int, config: Config, world: World) -> Stream:
        return Stream(size, config.seed)

    def tokens(self, config: Config) -> int:
        return 2 * config.pairs_per_step * (config.max_prompt_tokens + config.max_new_tokens)

    def open(self, config: Config, prompts: Prompts, asker: Callable, world: World) -> "PairReader":
        return PairReader(config, prompts, world)


class PairReader:
    """Every rank reads all pairs of a step, and takes its share of them."""

    def __init__(self, config: Config, prompts: Prompts, world: World):
        self.config, self.prompts, self.world = config, prompts, world

    def __call__(self, step: int) -> Batch:
        cursor = self.prompts.stream.cursor
        pairs = [self.draw() for _ in range(self.config.pairs_per_step)]
        tally, dropped = Tally(), self.prompts.count_dropped()
        tally.add(prompts_dropped=dropped if self.world.rank == 0 else 0)
        mine = pairs[self.world.rank :: self.world.world_size]
        return Batch([s for pair in mine for s in pair], tally, cursor)

    def draw(self) -> list[Sample]:
        """The next of which no answer is too long."""
        (number, _, prompt), answers = self.prompts.draw_answered(_texts)
        return _pair(number, prompt, answers)


def read_pairs(items: Sequence[Item], tokenizer, config: Config) -> list[list[Sample]]:
    """All pairs of which no part is too long, in their order."""
    pairs = []
    for number, item in enumerate(items):
        prompt, answers = encode(item, tokenizer, config), encode_answers(_texts(item), item, tokenizer, config)
        if len(prompt) <= config.max_prompt_tokens and max(map(len, answers)) <= config.max_new_tokens:
            pairs.append(_pair(number, prompt, answers))
    return pairs


def share_of(samples: list[Sample], world: World) -> list[Sample]:
    """This rank's pairs of these."""
    pairs = [samples[i : i + 2] for i in range(0, len(samples), 2)]
    return [s for pair in pairs[world.rank :: world.world_size] for s in pair]


def _texts(item: Item) -> tuple[str, ...]:
    return item.trace, item.rejected


def _pair(number: int, prompt: list[int], answers: list[list[int]]) -> list[Sample]:
    return [Sample(prompt, answer, group=number) for answer in answers]
