"""Prompts: items as token ids, in the order of the stream."""

from collections.abc import Callable, Iterable, Sequence

from engine.asking import Question, encode
from engine.chat import encode_trace
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
        too_long = set()  # not counted by draws, for a walk may end with a row and begin anew with it
        while len(too_long) < len(self.items):
            number, index = self.stream.draw()
            item = self.items[index]
            ids = encode(item, self.tokenizer, self.config)
            if len(ids) <= self.config.max_prompt_tokens:
                return number, item, ids
            self.dropped += 1
            too_long.add(index)
        raise UserError(
            f"All {len(self.items)} prompts exceed max_prompt_tokens {self.config.max_prompt_tokens}; raise it."
        )

    def draw_answered(self, texts: Callable[[Item], tuple[str, ...]]) -> tuple[Question, list[list[int]]]:
        """As `draw`, of an item whose answers `texts` names, and these as token ids; where one is too long for
        max_new_tokens, the item is dropped and counted too."""
        for _ in range(2 * len(self.items)):  # has every row once, wherever in its walk the stream is
            number, item, prompt = self.draw()
            answers = encode_answers(texts(item), item, self.tokenizer, self.config)
            longest = max(map(len, answers))
            if longest <= self.config.max_new_tokens:
                return (number, item, prompt), answers
            self.dropped += 1
        raise UserError(
            f"No answer of the data fits max_new_tokens {self.config.max_new_tokens} (the last has {longest} tokens); "
            "raise it."
        )

    def count_dropped(self) -> int:
        """How many since the last time."""
        dropped, self.dropped = self.dropped, 0
        return dropped


def encode_answers(texts: Iterable[str], item: Item, tokenizer, config: Config) -> list[list[int]]:
    """Token ids of given answers to an item's prompt, to the end of the turn."""
    return [encode_trace(tokenizer, item.prompt, text, config.enable_thinking) for text in texts]
