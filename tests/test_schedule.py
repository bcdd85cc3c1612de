"""The schedule of a rollout, moved by hands that count: no tensor, no model."""

import heapq
import random
from pathlib import Path

import pytest

from engine.rollouts import schedule
from engine.rollouts.schedule import Row, Schedule
from tests.test_layers import imports

BUCKETS = {"whole": lambda rows: rows, "powers of two": lambda rows: 1 << (rows - 1).bit_length()}


class Hands:
    """A mover whose rows end after as many tokens as `lengths[p, g]` says; it refuses what would spoil a tensor."""

    def __init__(self, num_slots, lengths, bucket=BUCKETS["whole"]):
        self.num_slots, self.lengths = num_slots, lengths
        self.bucket = lambda rows: min(bucket(rows), num_slots)
        self.slots: list[Row | None] = [None] * num_slots
        self.taken: dict[tuple[int, int], int] = {}
        self.waiting, self.prefills, self.widths, self.looks, self.moved = [], [], [], 0, 0

    def width(self, prompt):
        return len(prompt)

    def prefill(self, prompts, rows):
        assert not self.waiting, "rows whose keys are gone"
        assert all(prompts[row.source] is row.prompt for row in rows)
        self.prefills.append(prompts)
        self.waiting = list(rows)

    def place(self, slots, rows):
        assert rows and rows == self.waiting[: len(rows)]
        self.waiting = self.waiting[len(rows) :]
        for m, row in zip(slots, rows, strict=True):
            assert self.slots[m] is None, "a row on top of another"
            self.slots[m], self.taken[row.p, row.g] = row, 1

    def decode(self, slots):
        assert not any(self.slots[slots:]), "a row was left behind"
        self.widths.append(slots)
        for row in filter(None, self.slots):
            self.taken[row.p, row.g] += 1

    def look(self, held):
        self.looks += 1
        assert held == {m: row for m, row in enumerate(self.slots) if row is not None}
        for m, row in held.items():
            length = self.lengths[row.p, row.g]
            if self.taken[row.p, row.g] >= length:
                self.slots[m] = None
                yield m, (row.p, row.g, length)

    def move(self, sources, targets, columns):
        self.moved += len(sources)
        rows = [self.slots[m] for m in sources]
        assert columns >= max(len(row.prompt) + self.taken[row.p, row.g] for row in rows)
        assert len(set(targets)) == len(set(sources)) == len(rows)
        for m in sources:
            self.slots[m] = None
        for m, row in zip(targets, rows, strict=True):
            assert self.slots[m] is None, "a row on top of another"
            self.slots[m] = row


def rows_of(prompts, num_samples, limit):
    return [
        Row(prompt, p, g, p * num_samples + g, limit) for p, prompt in enumerate(prompts) for g in range(num_samples)
    ]


def draw_call(seed):
    """Prompts of 1 to 30 tokens, each with 1 to 6 answers of 1 to 20."""
    dice = random.Random(seed)
    prompts, samples = [[0] * dice.choice([1, 2, 9, 30]) for _ in range(dice.randint(1, 9))], dice.randint(1, 6)
    return prompts, samples, {(p, g): dice.randint(1, 20) for p in range(len(prompts)) for g in range(samples)}


@pytest.mark.parametrize("block", [0, 2, 16])
@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("num_slots", [1, 3, 7, 64])
def test_every_row_is_decoded_to_its_end_and_its_group_is_handed_over_once(num_slots, bucket, block, monkeypatch):
    monkeypatch.setattr(schedule, "PREFILL_TOKENS", 40)
    for seed in range(20):
        prompts, samples, lengths = draw_call(seed)
        hands = Hands(num_slots, lengths, BUCKETS[bucket])
        groups = dict(Schedule(rows_of(prompts, samples, 20), hands, poll=1 + seed % 8, block=block).groups())
        assert groups == {p: [(p, g, lengths[p, g]) for g in range(samples)] for p in range(len(prompts))}
        assert [prompt for some in hands.prefills for prompt in some] == prompts, "a prompt prefilled twice, or not"
        assert all(len(some) == 1 or len(some) * max(map(len, some)) <= 40 for some in hands.prefills)


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_steps_are_those_of_the_list_schedule(num_slots):
    """A row of n tokens takes a slot for n - 1 steps, whatever moves rows meanwhile."""
    for seed in range(20):
        prompts, samples, lengths = draw_call(seed)
        free_at = [0] * num_slots
        for length in lengths.values():
            heapq.heapreplace(free_at, free_at[0] + length - 1)
        run = Schedule(rows_of(prompts, samples, 20), Hands(num_slots, lengths), poll=1, block=2)
        assert len(dict(run.groups())) == len(prompts) and run.steps == max(free_at)


def test_a_look_comes_every_so_many_steps_and_no_row_is_waited_for_longer_than_it_may_take():
    lengths = {(p, 0): length for p, length in enumerate([2, 3, 11, 20])}
    hands = Hands(4, lengths)
    run = Schedule(rows_of([[0]] * 4, 1, 20), hands, poll=8, block=0)
    assert [p for p, _ in run.groups()] == [0, 1, 2, 3]
    assert run.steps == 19 and hands.looks == 4  # behind the first tokens, then at 8, 16, 19


def test_a_batch_narrows_only_by_whole_buckets_and_never_below_what_it_holds():
    lengths = {(0, g): length for g, length in enumerate([9, 2, 3, 4, 5, 6, 7, 8])}
    hands = Hands(8, lengths, BUCKETS["powers of two"])
    dict(Schedule(rows_of([[0]], 8, 20), hands, poll=1, block=0).groups())
    assert hands.widths == [8, 8, 8, 8, 4, 4, 2, 1] and hands.moved > 0


def test_long_rows_are_promoted_so_that_new_ones_share_no_block_with_them():
    """Blocks of two: when slots 0 and 2 are free, the old row of 3 takes hole 0 rather than a new row beside 1."""
    lengths = {(0, 0): 3, (0, 1): 20, (0, 2): 3, (0, 3): 20, (1, 0): 5, (1, 1): 5}
    hands = Hands(4, lengths)
    rows = [Row([0], p, g, 0, 20) for p, g in lengths]
    run, seen = Schedule(rows, hands, poll=1, block=2), []
    for row, _ in run.run():
        seen.append([(held.p, held.g) if held else None for held in run.held])
        if row.p:
            break
    assert seen[-1][:2] == [(0, 3), (0, 1)]


def test_it_ends_within_a_step_of_being_asked_to():
    steps = iter([False, False, True])
    hands = Hands(2, {(0, 0): 20, (0, 1): 20})
    with pytest.raises(InterruptedError):
        dict(Schedule(rows_of([[0]], 2, 20), hands, poll=8, block=0, should_stop=lambda: next(steps)).groups())
    assert len(hands.widths) == 3


def test_no_rows_ask_for_nothing():
    hands = Hands(4, {})
    assert dict(Schedule([], hands, poll=1, block=2).groups()) == {} and not hands.prefills and not hands.widths


def test_the_schedule_knows_no_tensors():
    assert not {module.split(".")[0] for module in imports(Path(schedule.__file__))} & {"torch", "kernels"}
