"""What a task is made of: one example, a lazy sequence of them, and the row that describes the task."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from unicodedata import normalize


@dataclass(frozen=True)
class Item:
    """One example.

    `prompt`: chat messages, `[{"role": "user", "content": ...}]`, a system message first if there is one.
    `answer`: the truth, as text as the file has it, or "" where none was asked for. `trace`: the whole response to
    imitate, or None; of a pair the chosen one, and `rejected` the other.
    `row`: the row it was made from, untouched, plus its 0-based place in the source as "row_index" (a column of that
    name is in it as "own_row_index"). `where`: the file and row (from 1) that a person finds it at, "" if it has none.
    """

    prompt: list[dict]
    answer: str
    trace: str | None
    row: dict
    where: str = ""
    rejected: str | None = None


class Items(Sequence):
    """`size` items, each made by `make(index)` when it is asked for; a slice gives a list.

    `origin`: what they are made from, for JSON, equal from run to run until that changes: "path" (absolute, or a hub
    id, or the task's name), "rows" (the number of items), "system_prompt", of a table the "columns" that prompt, trace
    and answer, or prompt, chosen, rejected and answer are read from (None for none) and a "digest" of its ends, of
    files also their "size" in bytes, and of a folder "files", the names of the split's files, at most ten.
    """

    def __init__(self, size: int, make: Callable[[int], Item], origin: dict):
        self.size, self.make, self.origin = size, make, origin

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

    `load(task, split, source=, system_prompt=, limit=, seed=, answers=, traces=, pairs=, sample=)` gives the
    items; `task` has the columns to use. `source`, `config`, `splits`: the hub data set. `read(text)` turns the text of
    a cell of the answer column into (answer, trace or None), or raises ValueError. `rewards`: specs for
    `engine.rewards.load_rewards`.
    """

    load: Callable[..., Items]
    source: str | None = None
    config: str | None = None
    splits: tuple[str, ...] = ("train", "test")
    prompt_column: str | None = None
    answer_column: str | None = None
    trace_column: str | None = None
    chosen_column: str | None = None
    rejected_column: str | None = None
    read: Callable[[str], tuple[str, str | None]] | None = None
    rewards: tuple[str, ...] = ("answer", "format:0.2")
    system_prompt: str | None = None

    @property
    def generated(self) -> bool:
        """Whether its rows are made on the spot, all of a kind, rather than read."""
        return self.read is None


def build_prompt(content: str | list[dict], system_prompt: str | None) -> list[dict]:
    """Chat messages: the system prompt, if any, before the user's text or before ready-made messages."""
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def count_shared(train: Iterable[Item], held_out: Iterable[Item]) -> int:
    """How many held-out items ask what a train item asks, whitespace, case and Unicode form aside. Keeps hashes."""
    wanted = Counter(map(_problem, held_out))
    return sum(wanted.pop(problem, 0) for problem in map(_problem, train))


def _problem(item: Item) -> bytes:
    """A hash of what is asked, the system prompt aside."""
    said = " ".join(message["content"] for message in item.prompt if message["role"] != "system")
    return blake2b(normalize("NFC", " ".join(said.split())).casefold().encode(), digest_size=16).digest()
