"""Rows: what one forward takes. `lay_out` packs samples and shares prompts, `make_rows` fills a row up to whole tiles,
and nothing else of an update does; what a CPU's attention pads inside is gone behind it.

A micro-batch is one flat row of at most a budget of tokens: its samples end to end, each attending to itself alone
(engine.attention). The last token of an answer is predicted and predicts nothing, so it does not enter: a sample has
P - 1 + A tokens there. Where the answers to one prompt share it, its P - 1 first tokens stand there once, then for each
answer the prompt's last token and the answer; exact, since attention is causal.

T tokens of the row, M trained ones. `source_M` is where the hidden state stands that predicts trained token m.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from engine.attention import Padded, Span, Varlen
from engine.samples import Sample
from engine.streams import upload_all
from kernels.products import round_up

WORTH_SHARING = 0.1  # of the tokens of neighbours, at least, would be repeated prompt

Unit = list[Sample]
"""Answers to one prompt that share it in the row, or one sample."""


@dataclass(frozen=True)
class Rows:
    ids_T: Tensor  # int64
    position_T: Tensor  # int64, of a token in its own sequence
    spans: Varlen | Padded  # who sees whom
    source_M: Tensor  # int64
    ids_M: Tensor  # int64, the trained tokens
    weight_M: Tensor  # fp32
    adv_M: Tensor  # fp32
    first_N: Tensor  # int64, where the tokens of each sample begin among the M
    values: dict[str, Tensor] = field(default_factory=dict)  # [M, ...], those of the samples

    def to(self, device: torch.device) -> "Rows":
        """There, having travelled as one piece."""
        leaves, tree = pytree.tree_flatten(vars(self))
        there = upload_all({i: x for i, x in enumerate(leaves) if isinstance(x, Tensor)}, device)
        return Rows(**pytree.tree_unflatten([there.get(i, x) for i, x in enumerate(leaves)], tree))


def lay_out(samples: Sequence[Sample], tokens: int, share: bool | None = None) -> list[list[Unit]]:
    """Micro-batches of at most `tokens` tokens, longest samples first; one that is longer goes alone, and so does a
    group, which is never cut.

    No answer is empty. `share`: whether neighbours with one prompt share it, in as few pieces as the budget allows, for
    the others weigh nothing in a sample's gradient; None: where it saves a tenth of their tokens.
    """
    assert all(s.answer for s in samples), "an empty answer has nothing to learn from"
    micros: list[list[Unit]] = []
    room: list[int] = []
    longest = lambda piece: -max(len(s.prompt) + len(s.answer) for unit in piece for s in unit)  # noqa: E731
    for piece in sorted(_pieces(samples, tokens, share), key=longest):
        size = sum(map(tokens_of, piece))
        i = next((i for i, free in enumerate(room) if free >= size), len(micros))
        if i == len(micros):
            micros.append([])
            room.append(tokens)
        micros[i] += piece
        room[i] -= size
    return micros


def _pieces(samples: Sequence[Sample], tokens: int, share: bool | None) -> Iterator[list[Unit]]:
    """What enters a micro-batch together: a group, or one unit."""
    for (group, _), run in itertools.groupby(samples, lambda s: (s.group, s.prompt)):
        whole = group is not None
        units = _units([*run], sys.maxsize if whole else tokens, share)
        yield from [units] if whole else ([unit] for unit in units)


def tokens_of(unit: Unit) -> int:
    """That a unit puts into the row."""
    return len(unit[0].prompt) - 1 + sum(len(s.answer) for s in unit)


def _units(group: list[Sample], tokens: int, share: bool | None) -> list[Unit]:
    """The answers to one prompt in as few units as the budget allows, or each alone."""
    repeated = (len(group[0].prompt) - 1) * (len(group) - 1)
    if not (repeated > WORTH_SHARING * (repeated + tokens_of(group)) if share is None else share):
        return [[s] for s in group]
    units: list[Unit] = [[]]
    for s in group:
        if units[-1] and tokens_of([*units[-1], s]) > tokens:
            units.append([])
        units[-1].append(s)
    return units


def make_rows(micro: Sequence[Unit], plan: Callable[[list[Span]], Varlen | Padded]) -> Rows:
    """The row of a micro-batch, on the host, filled up to whole tiles; `plan` says how its spans attend. Of
    nothing: a row of untrained tokens, which keeps a rank's collectives in step with the others'."""
    ids, position, source, spans = [], [], [], []

    def put(tokens: list[int], first: int, *head: int) -> int:
        """Adds a span, its first token at position `first`; where it begins."""
        start = len(ids)
        ids.extend(tokens)
        position.extend(range(first, first + len(tokens)))
        spans.append(Span(start, len(tokens), *head))
        return start

    for unit in micro:
        prompt, head = unit[0].prompt, ()
        if len(unit) > 1 and len(prompt) > 1:
            head = put(prompt[:-1], 0), len(prompt) - 1
        for s in unit:
            seen = prompt[-1:] if head else prompt
            start = put(seen + s.answer[:-1], len(prompt) - len(seen), *head) + len(seen) - 1
            source.extend(range(start, start + len(s.answer)))
    if fill := round_up(max(len(ids), 1)) - len(ids):
        put([0] * fill, 0)
    samples = members(micro)
    lengths = torch.tensor([len(s.answer) for s in samples], dtype=torch.int64)
    spread = lambda values: torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)  # noqa: E731
    integers = lambda values: torch.tensor(values, dtype=torch.int64)  # noqa: E731
    values = {name: torch.cat([s.values[name] for s in samples]) for name in (samples[0].values if samples else ())}
    adv_M = spread([s.adv for s in samples])
    return Rows(
        integers(ids),
        integers(position),
        plan(spans),
        integers(source),
        integers([i for s in samples for i in s.answer]),
        spread([s.weight for s in samples]),
        adv_M + values.pop("adv") if "adv" in values else adv_M,
        lengths.cumsum(0) - lengths,
        values,
    )


def members(micro: Sequence[Unit]) -> list[Sample]:
    """The samples of a micro-batch in the order of their trained tokens."""
    return [s for unit in micro for s in unit]
