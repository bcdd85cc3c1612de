"""What a task is made of: one example, a lazy sequence of them, and the row that describes the task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One example.

    `prompt`: chat messages, `[{"role": "user", "content": ...}]`, a system message first if there is one.
    `answer`: the truth, as text. `trace`: the whole response to imitate, or None.
    `row`: the row it was made from, untouched, plus its 0-based place in the source as "row_index".
    """

    prompt: list[dict]
    answer: str
    trace: str | None
    row: dict


class Items(Sequence):
    """`size` items, each made by `make(index)` when it is asked for; a slice gives a list."""

    def __init__(self, size: int, make: Callable[[int], Item]):
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"item {index} of {self.size}")
        return self.make(index % self.size)


@dataclass(frozen=True)
class Task:
    """A row of `TASKS`: how it is loaded, and what holds where the user says nothing else.

    `load(task, split, source=, system_prompt=, limit=, seed=)` gives the items; `task` has the columns to use.
    `source`, `config`, `splits`: the hub data set. `read(cell)` turns a cell of the answer column into
    (answer, trace or None), or raises ValueError. `rewards`: specs for `engine.rewards.load_rewards`.
    """

    load: Callable[..., Sequence]
    source: str | None = None
    config: str | None = None
    splits: tuple[str, ...] = ("train", "test")
    prompt_column: str | None = None
    answer_column: str | None = None
    trace_column: str | None = None
    read: Callable[[object], tuple[str, str | None]] | None = None
    rewards: tuple[str, ...] = ("answer", "format:0.2")
    system_prompt: str | None = None


def build_prompt(content: str | list[dict], system_prompt: str | None) -> list[dict]:
    """Chat messages: the system prompt, if any, before the user's text or before ready-made messages."""
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages
