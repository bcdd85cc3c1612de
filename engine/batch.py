"""Batch: what flows through one step, as rows of tokens.

N sequences (or packed rows), T tokens. Every `*_NT` tensor is aligned with `ids_NT`: entry t belongs to token t,
which is predicted from position t - 1.
"""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.streams import upload_all
from kernels.products import TILE

MASKED = {"cpu": 1.0, "cuda": 4.0}
"""Time of an operation of attention under a mask, which rules out flash, in that of one of a linear layer. On CUDA an
estimate from published rates (170 TFLOP/s against 650 on an H100)."""


@dataclass(frozen=True)
class Batch:
    ids_NT: Tensor  # int64, right-padded with 0
    mask_NT: Tensor  # bool, True = trained
    weight_NT: Tensor  # fp32, 0 outside the mask
    adv_N: Tensor  # fp32
    adv_NT: Tensor | None = None  # fp32, in place of adv_N where a row holds several sequences
    segment_NT: Tensor | None = None  # int64, where a row holds several: their numbers, 0 what all see, -1 padding
    position_NT: Tensor | None = None  # int64, with segment_NT: the position of a token in its own sequence
    group_N: Tensor | None = None  # int64, rising: sequences of one number have one prompt
    prompt_N: Tensor | None = None  # int64, with group_N: tokens of the prompt
    logp_behaviour_NT: Tensor | None = None  # fp32, what the sampling policy said
    logp_old_NT: Tensor | None = None  # fp32, what the ratio is taken against; None: on-policy
    logp_ref_NT: Tensor | None = None  # fp32
    version_N: Tensor | None = None  # int64, of the weights that sampled
    rows_M: Tensor | None = None  # int64 rows of the flattened [N*T] hidden states that the head needs

    def __len__(self) -> int:
        return len(self.ids_NT)

    def select(self, rows: Tensor | slice) -> "Batch":
        """The given sequences (int64 or bool index, or a slice), trimmed after their last trained token."""
        picked = self.map(lambda x: x[rows])
        trained = picked.mask_NT.any(0).nonzero()
        length = int(trained.max()) + 1 if len(trained) else 1
        return picked.map(lambda x: x[:, :length] if x.dim() == 2 else x)

    def split(self, size: int, count: int) -> list["Batch"]:
        """`count` micro-batches of at most `size` sequences, the surplus ones of weight 0."""
        micros = [self.select(slice(i, i + size)) for i in range(0, len(self), size)]
        return micros + [empty_batch()] * (count - len(micros))

    def extents(self) -> Tensor:
        """Tokens up to the last trained one, int64 [N]."""
        return (self.mask_NT * torch.arange(1, self.mask_NT.shape[1] + 1)).amax(1)

    def by_length(self) -> "Batch":
        """Longest first, so that a micro-batch carries little padding."""
        return self.select(self.extents().argsort(descending=True, stable=True)) if len(self) else self

    def by_group(self) -> "Batch":
        """Groups whole, that with the longest sequence first."""
        if not len(self):
            return self
        grouped = self.select(self.group_N.argsort(stable=True))
        top_N = torch.zeros(int(grouped.group_N.max()) + 1, dtype=torch.int64)
        top_N.scatter_reduce_(0, grouped.group_N, grouped.extents(), "amax")
        return grouped.select(top_N[grouped.group_N].argsort(descending=True, stable=True))

    def filled_up(self) -> "Batch":
        """With padding up to whole tiles of columns, so that products meet few shapes."""
        extra = -self.ids_NT.shape[1] % TILE
        fill = lambda name, x: F.pad(x, (0, extra), value=-1 if name == "segment_NT" else 0)  # noqa: E731
        return Batch(**{name: fill(name, x) if x.dim() == 2 else x for name, x in self.tensors().items()})

    def needed_rows(self) -> "Batch":
        """Names the rows the head must compute: token t is predicted from position t - 1."""
        return dataclasses.replace(self, rows_M=shift(self.mask_NT).flatten().nonzero().squeeze(1))

    def to(self, device: torch.device) -> "Batch":
        return Batch(**upload_all(self.tensors(), device))

    def map(self, fn) -> "Batch":
        return Batch(**{name: fn(tensor) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def shift(x_NT: Tensor) -> Tensor:
    """Moves token-aligned values to the position that predicts them; the last position gets 0."""
    out_NT = torch.zeros_like(x_NT)
    out_NT[:, :-1] = x_NT[:, 1:]
    return out_NT


def empty_batch(size: int = 1) -> Batch:
    """`size` sequences of one untrained token: one keeps a rank's collectives in step with the others'."""
    zero_NT = torch.zeros(size, 1)
    return Batch(zero_NT.long(), zero_NT.bool(), zero_NT, torch.zeros(size))


def pad(rows: Sequence[Sequence], dtype: torch.dtype) -> Tensor:
    """[N, T] from ragged rows, right-padded with 0."""
    rows = [torch.as_tensor(r, dtype=dtype) for r in rows]
    return pad_sequence(rows, batch_first=True)


def completions_batch(prompts: list[list[int]], completions: list, adv: Sequence[float]) -> Batch:
    """RL rows: prompt then completion (`engine.rollouts.native.Completion`), the completion trained.

    The behaviour's log-probabilities are those under the whole distribution at the temperature, which is what the
    trainer computes, also where top-p or top-k cut the distribution drawn from.
    """
    pairs = list(zip(prompts, completions, strict=True))
    ids_NT = pad([p + c.ids for p, c in pairs], torch.long)
    mask_NT = pad([[0] * len(p) + [1] * len(c.ids) for p, c in pairs], torch.bool)
    logp_NT = pad([[0.0] * len(p) + list(c.logp) for p, c in pairs], torch.float32)
    adv_N = torch.as_tensor(adv, dtype=torch.float32)
    return Batch(
        ids_NT,
        mask_NT,
        torch.zeros_like(logp_NT),
        adv_N,
        group_N=torch.tensor(list(itertools.accumulate(map(operator.ne, prompts[1:], prompts), initial=0))),
        prompt_N=torch.tensor([len(p) for p in prompts]),
        logp_behaviour_NT=logp_NT,
        version_N=torch.tensor([c.version for c in completions]),
    )


def packed_batch(rows: list[list[tuple[list[int], list[int]]]]) -> Batch:
    """SFT rows of (prompt, response) documents side by side, the responses trained."""
    ids_NT = pad([[t for p, r in row for t in p + r] for row in rows], torch.long)
    mask_NT = pad([[m for p, r in row for m in [0] * len(p) + [1] * len(r)] for row in rows], torch.bool)
    segment_NT = pad([[i for i, (p, r) in enumerate(row, 1) for _ in p + r] for row in rows], torch.long)
    position_NT = pad([[t for p, r in row for t in range(len(p + r))] for row in rows], torch.long)
    segment_NT[segment_NT == 0] = -1
    adv_N = torch.ones(len(rows))
    return Batch(ids_NT, mask_NT, torch.zeros(ids_NT.shape), adv_N, segment_NT=segment_NT, position_NT=position_NT)


def sharing_saves(batch: Batch, linear: float, attention: float, masked: float) -> bool:
    """Whether `share_prompts` leaves clearly less to compute: `linear` operations a token and layer, and `attention` a
    token and key. Plain causal rows skip half of those, shared ones none, and theirs take `masked` times as long."""
    if batch.group_N is None or not len(batch):
        return False
    length_N, answer_N = batch.extents().double(), (batch.extents() - batch.prompt_N + 1).double()
    groups, group_N = batch.group_N.unique(return_inverse=True)
    length_G = torch.zeros(len(groups), dtype=torch.double)
    length_G.scatter_reduce_(0, group_N, (batch.prompt_N - 1).double(), "amax").scatter_add_(0, group_N, answer_N)
    plain = length_N * (linear + attention * length_N / 2)
    shared = length_G * (linear + masked * attention * length_G)
    return bool(shared.sum() < 0.9 * plain.sum())


def share_prompts(batch: Batch) -> tuple[Batch, Tensor]:
    """One row per run of sequences with one prompt: the prompt but its last token once, which all see, then for each
    sequence that last token and the answer, which see the prompt and themselves. Exact, since attention is causal.

    Returns the rows, and where in them, flattened, each trained token [N, T] stands (int64, 0 for the others).
    """
    (_, T), extent_N, prompt_N = batch.ids_NT.shape, batch.extents().tolist(), batch.prompt_N.tolist()
    rows = []
    for _, members in itertools.groupby(range(len(batch)), batch.group_N.tolist().__getitem__):
        first, *others = members
        start = prompt_N[first] - 1
        row = [(first * T + t, 0, t) for t in range(start)]
        for segment, n in enumerate([first, *others], 1):
            row += [(n * T + t, segment, t) for t in range(start, extent_N[n])]
        rows.append(torch.tensor(row))
    padded_RT3 = pad_sequence(rows, batch_first=True, padding_value=-1)
    source_RT, segment_RT, position_RT = F.pad(padded_RT3, (0, 0, 0, -padded_RT3.shape[1] % TILE), value=-1).unbind(2)
    inside_RT = source_RT >= 0
    gather = lambda x_NT: torch.where(inside_RT, x_NT.flatten()[source_RT], 0).to(x_NT.dtype)  # noqa: E731
    wide = {name: gather(x) for name, x in batch.tensors().items() if x.dim() == 2}
    place_NT = torch.zeros_like(batch.ids_NT)
    place_NT.view(-1)[source_RT[wide["mask_NT"]]] = wide["mask_NT"].flatten().nonzero()[:, 0]
    adv_NT = gather(batch.adv_N[:, None].expand_as(batch.ids_NT))
    own = {"adv_N": torch.zeros(len(rows)), "adv_NT": adv_NT, "segment_NT": segment_RT}
    return Batch(**wide, **own, position_NT=position_RT.clamp(min=0)), place_NT
