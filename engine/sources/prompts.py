"""Prompts: items as token ids, in the order of the stream."""

from collections.abc import Sequence

from engine.asking import Question, encode
from engine.config import Config
from engine.data import Item
from engine.data.stream import Stream
from engine.errors import UserError


class Prompts:
    """Draws encodable prompts; the too long ones are dropped and counted."""

    def __init__(self, items: Sequence[Item], tokenizer, config: Config, stream: Stream):
        self.items, self.tokenizer, self.config, self.stream = items, tokenizer, config, stream
        self.dropped = 0

    def draw(self) -> Question:
        """(number of the draw, item, prompt ids)."""
        for _ in range(len(self.items)):
            number, index = self.stream.draw()
            item = self.items[index]
            ids = encode(item, self.tokenizer, self.config)
            if len(ids) <= self.config.max_prompt_tokens:
                return number, item, ids
            self.dropped += 1
        raise UserError(
            f"All {len(self.items)} prompts exceed max_prompt_tokens {self.config.max_prompt_tokens}; raise it."
        )

    def count_dropped(self) -> int:
        """How many since the last time."""
        dropped, self.dropped = self.dropped, 0
        return dropped
