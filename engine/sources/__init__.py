"""Sources: where samples come from. A row of ALGOS names one; `open` makes it one call a step on this rank:
(step) -> Batch, with no collective in it, for at lag 1 it runs beside an update."""

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.config import Config
from engine.data import Item
from engine.data.stream import Stream
from engine.dist import World
from engine.samples import Batch
from engine.sources.prompts import Prompts


class Source(Protocol):
    """What a source says of itself."""

    rolls_out: bool  # whether it asks the policy, and so wants its weights after every step
    pairs: bool  # whether its items are a chosen and a rejected answer

    def check(self, items: Sequence[Item], config: Config) -> None:
        """UserError for training items that it cannot use, before a model is loaded."""

    def stream(self, size: int, config: Config, world: World) -> Stream:
        """The walk over `size` items of which this rank takes its part."""

    def tokens(self, config: Config) -> int:
        """Most tokens of a step, all ranks together."""

    def open(self, config: Config, prompts: Prompts, asker: Callable, world: World) -> Callable[[int], Batch]:
        """`asker()` makes the engine.asking.Asker of this rank, with the rollout's weights and cache. Collective."""
