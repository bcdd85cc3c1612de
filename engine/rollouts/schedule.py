"""Which row decodes in which slot, and when: continuous batching, without a tensor in it.

On a GPU a step of decoding costs nearly the same for one row as for sixty-four, for it reads all the weights either
way. So the rows of a call decode together; but their answers end after 20 tokens or after 2000, and a batch that waits
for its longest row is empty most of the time. Here a batch is a fixed number of slots, each with room for the longest
row, and a slot whose row has ended takes the next row at once:

    slot 0   [row 0 .......][row 4 ..................]
    slot 1   [row 1 ....][row 3 .........][row 6 ....]
    slot 2   [row 2 ..............][row 5 .........]          steps ->

That is list scheduling: no slot is free while a row waits, so a call takes at most its longest row's steps more than if
all slots were full to the end. A row takes a slot for one step less than it has tokens, because the first one is drawn
from its prompt.

A row is one of the G answers to a prompt, and lives four lives:

    queue -> staged -> held in a slot -> ended

`_stage` prefills the prompts of the next rows in one forward, about a slotful of them: a prompt is prefilled once, and
its rows, which stand next to each other in the queue, each copy its keys and values when they are placed. `_place` puts
staged rows into free slots in the order of the queue. `_end` asks which of the held rows have drawn an EOS, reached
their limit or spelled a stop string; their answers leave, and their slots are free.

Whether a row has ended is known to the device first. Where asking costs, because it waits for a GPU or turns tokens
into text, the schedule looks only every `poll` steps; rows that have ended decode on until then, and nobody sees what.
It never takes more steps than the row with the most left needs, for then all would be over.

A step decodes slots [0, n), so rows have to stay in front. As long as rows wait, every slot is taken and n is all of
them. When the queue is empty holes appear, and `_compact` moves the last rows into them, but only if that brings a step
into a smaller bucket: a width that a GPU has a graph for, or a CPU whole tiles. Where attention reads a block of slots
up to the longest row in it (`block`, on a CPU), a short row beside a long one pays for the long one: `_promote` lets
the longest rows fill the holes of each block before new rows, which are short, come in behind them.

None of this can change a token. The noise of a row is a function of its request number, padding is never attended to,
and a slot holds nothing but its row: `tests/test_rollouts.py` compares all schedules with every prompt alone.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from engine.rollouts.protocol import Completion

PREFILL_TOKENS = 8192
"""Of prompts prefilled together, padding included."""


@dataclass
class Row:
    """A request on its way through a slot: sample `g` of prompt `p`."""

    prompt: list[int]
    p: int
    g: int
    request: int  # number of its noise
    limit: int  # most tokens
    source: int = 0  # its prompt's place in the prefill
    begun: int = 0  # decode steps before its own first
    searched: int = 0  # tokens known to hold no stop string


class Mover(Protocol):
    """What moves the tensors that a schedule speaks of; `num_slots` slots are numbered from 0."""

    num_slots: int

    def bucket(self, rows: int) -> int:
        """Slots that a step has to decode for `rows` of them."""

    def width(self, prompt: list[int]) -> int:
        """Columns that a prompt takes in a prefill."""

    def prefill(self, prompts: list[list[int]], rows: list[Row]) -> None:
        """One forward over `prompts`; `rows` are placed behind them, in this order. All of before have been placed."""

    def place(self, slots: list[int], rows: list[Row]) -> None:
        """Starts the next prefilled rows in empty slots, and draws their first tokens."""

    def decode(self, slots: int) -> None:
        """One more token for the rows in slots [0, slots)."""

    def look(self, held: dict[int, Row]) -> Iterable[tuple[int, Completion]]:
        """(slot, answer) of those among the held rows that have ended."""

    def move(self, sources: list[int], targets: list[int], columns: int) -> None:
        """Moves rows of at most `columns` tokens, prompt and answer together, all at once: a target is empty, or one
        of the sources."""


class Schedule:
    """One call's rows on their way through the slots of a mover.

    poll: steps between two looks at what has ended. block: slots that attention reads together up to the longest row
    among them; 0: each row by itself. should_stop: asked after each step. `steps`: decoded so far.
    """

    def __init__(
        self, rows: Iterable[Row], mover: Mover, *, poll: int, block: int, should_stop: Callable[[], bool] | None = None
    ):
        self.mover, self.poll, self.block, self.should_stop = mover, poll, block, should_stop
        self.queue = collections.deque(rows)
        self.staged: collections.deque[Row] = collections.deque()
        self.held: list[Row | None] = [None] * mover.num_slots
        self.steps = 0

    def groups(self, on_answer: Callable[[], None] | None = None) -> Iterator[tuple[int, list[Completion]]]:
        """(p, its answers) of each prompt as soon as the last of them has ended; `on_answer()` hears of every one."""
        sizes, answers = collections.Counter(row.p for row in self.queue), collections.defaultdict(dict)
        for row, answer in self.run():
            group = answers[row.p]
            group[row.g] = answer
            if on_answer is not None:
                on_answer()
            if len(group) == sizes[row.p]:
                yield row.p, [group[g] for g in sorted(group)]
                del answers[row.p]

    def run(self) -> Iterator[tuple[Row, Completion]]:
        """Every row with its answer, as they end; raises InterruptedError when it should stop."""
        while True:
            yield from self._end()
            if self._place():
                continue  # a first token may be the last
            if not any(self.held):
                return
            slots = self.mover.bucket(self._compact())
            for _ in range(self._steps_to_look()):
                self.mover.decode(slots)
                self.steps += 1
                if self.should_stop is not None and self.should_stop():
                    raise InterruptedError("a signal asked for the end of the rollout")

    def _occupied(self) -> list[int]:
        return [m for m, row in enumerate(self.held) if row is not None]

    def _free(self) -> list[int]:
        return [m for m, row in enumerate(self.held) if row is None]

    def _end(self) -> Iterator[tuple[Row, Completion]]:
        """Frees the slots of rows that have ended."""
        if held := {m: row for m, row in enumerate(self.held) if row is not None}:
            for m, answer in self.mover.look(held):
                self.held[m] = None
                yield held[m], answer

    def _place(self) -> int:
        """Puts waiting rows into free slots, as many as come from one prefill; how many."""
        if not (self.staged or self.queue) or all(self.held):
            return 0
        if not self.staged:
            self._stage()
        if self.block:
            self._promote()
        slots = self._free()[: len(self.staged)]
        rows = [self.staged.popleft() for _ in slots]
        for m, row in zip(slots, rows, strict=True):
            self.held[m], row.begun = row, self.steps
        self.mover.place(slots, rows)
        return len(rows)

    def _stage(self) -> None:
        """Prefills the prompts of the next rows, about a slotful."""
        prompts, longest = [], 0
        while self.queue:
            row = self.queue[0]
            if not prompts or row.prompt is not prompts[-1]:
                longest = max(longest, self.mover.width(row.prompt))
                too_wide = longest * (len(prompts) + 1) > PREFILL_TOKENS
                if prompts and (len(self.staged) >= len(self.held) or too_wide):
                    break
                prompts.append(row.prompt)
            row.source = len(prompts) - 1
            self.staged.append(self.queue.popleft())
        self.mover.prefill(prompts, list(self.staged))

    def _promote(self) -> None:
        """Fills the holes of each block of slots with the longest rows behind it, so that rows of like length stay
        together and the new ones, which are short, come last."""
        moves = {}  # hole -> slot that its row comes from
        for first in range(0, len(self.held), self.block):
            end = first + self.block
            behind = sorted((m for m in self._occupied() if m >= end), key=self._length, reverse=True)
            holes = (m for m in range(first, min(end, len(self.held))) if self.held[m] is None)
            for hole, m in zip(holes, behind, strict=False):
                self.held[hole], self.held[m], moves[hole] = self.held[m], None, m
        self._move(moves)

    def _compact(self) -> int:
        """Slots to decode: up to the last that is held, after moving the last rows into holes if that saves a step's
        width. Holes are only left when nothing waits for them."""
        held = self._occupied()
        width = held[-1] + 1
        if self.mover.bucket(len(held)) < self.mover.bucket(width):
            holes = [m for m in range(len(held)) if self.held[m] is None]
            moves = dict(zip(holes, held[-len(holes) :], strict=True))
            for hole, m in moves.items():
                self.held[hole], self.held[m] = self.held[m], None
            self._move(moves)
            width = len(held)
        return width

    def _move(self, moves: dict[int, int]) -> None:
        if moves:
            self.mover.move(list(moves.values()), list(moves), max(map(self._length, moves)) + 1)

    def _length(self, m: int) -> int:
        row = self.held[m]
        return len(row.prompt) + self.steps - row.begun

    def _steps_to_look(self) -> int:
        """Steps until the next look; no more than the row with the most left can take."""
        left = max(row.limit - 1 - (self.steps - row.begun) for row in self.held if row is not None)
        return max(1, min(self.poll, left))
