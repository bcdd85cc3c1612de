"""Batch: what flows through one step, as rows of tokens.

N sequences (or packed rows), T tokens. Every `*_NT` tensor is aligned with `ids_NT`: entry t belongs to token t,
which is predicted from position t - 1.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    ids_NT: Tensor  # int64, right-padded with 0
    mask_NT: Tensor  # bool, True = trained
    weight_NT: Tensor  # fp32, 0 outside the mask
    adv_N: Tensor  # fp32
    document_NT: Tensor | None = None  # int64, packed rows: number of the document, -1 on padding
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
        filler = empty_batch()
        return [m.needed_rows() for m in micros + [filler] * (count - len(micros))]

    def by_length(self) -> "Batch":
        """Longest trained extent first, so that a micro-batch carries little padding."""
        extent_N = (self.mask_NT * torch.arange(1, self.mask_NT.shape[1] + 1)).amax(1)
        return self.select(extent_N.argsort(descending=True, stable=True)) if len(self) else self

    def needed_rows(self) -> "Batch":
        """Names the rows the head must compute: token t is predicted from position t - 1."""
        return dataclasses.replace(self, rows_M=shift(self.mask_NT).flatten().nonzero().squeeze(1))

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda x: x.to(device, non_blocking=True))

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
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


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
    version_N = torch.tensor([c.version for c in completions])
    return Batch(ids_NT, mask_NT, torch.zeros_like(logp_NT), adv_N, logp_behaviour_NT=logp_NT, version_N=version_N)


def packed_batch(rows: list[list[tuple[list[int], list[int]]]]) -> Batch:
    """SFT rows of (prompt, response) documents side by side, the responses trained."""
    ids_NT = pad([[t for p, r in row for t in p + r] for row in rows], torch.long)
    mask_NT = pad([[m for p, r in row for m in [0] * len(p) + [1] * len(r)] for row in rows], torch.bool)
    document_NT = pad([[i for i, (p, r) in enumerate(row, 1) for _ in p + r] for row in rows], torch.long) - 1
    return Batch(ids_NT, mask_NT, torch.zeros(ids_NT.shape), torch.ones(len(rows)), document_NT=document_NT)
