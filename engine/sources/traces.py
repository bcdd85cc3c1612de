"""Traces that are given, to imitate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import Config
from engine.data import Item
from engine.data.stream import Stream
from engine.dist import World
from engine.errors import UserError
from engine.metrics import Tally
from engine.samples import Batch, Sample
from engine.sources.context import Context, check_examples
from engine.sources.prompts import Prompts


@dataclass(frozen=True)
class Traces:
    rolls_out = False
    pairs = False

    def check(self, items: Sequence[Item], config: Config) -> None:
        if items[0].trace is None:
            raise UserError(f"The task {config.task} has no traces to imitate; name their column with trace_column.")
        check_examples(items, config)

    def stream(self, size: int, config: Config, world: World) -> Stream:
        return Stream(size, config.seed)

    def tokens(self, config: Config) -> int:
        return config.step_tokens

    def open(self, config: Config, prompts: Prompts, asker: Callable, world: World) -> "Reader":
        return Reader(config, prompts, world)


class Reader:
    """Every rank reads the traces of all, and takes its share of them: a step is the same on any number of ranks."""

    def __init__(self, config: Config, prompts: Prompts, world: World):
        self.config, self.prompts, self.world = config, prompts, world
        self.context = Context(prompts.items, prompts.tokenizer, config)

    def __call__(self, step: int) -> Batch:
        cursor, samples, room = self.prompts.stream.cursor, [], self.config.step_tokens
        while True:
            sample = self.draw()
            room -= len(sample.prompt) + len(sample.answer)
            if room < 0 and samples:
                self.prompts.stream.cursor -= 1  # opens the next step
                break
            samples.append(sample)
        tally, dropped = Tally(), self.prompts.count_dropped()
        tally.add(prompts_dropped=dropped if self.world.rank == 0 else 0)
        return Batch(samples[self.world.rank :: self.world.world_size], tally, cursor)

    def draw(self) -> Sample:
        """The next that is not too long."""
        (_, item, prompt), [answer] = self.prompts.draw_answered(lambda item: (item.trace,))
        return Sample(prompt, answer, context=self.context.encode(item))
