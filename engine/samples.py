"""Sample: what a source makes, a learner learns from and a checkpoint keeps; ragged, on the host.

P tokens of a prompt, which are seen, and A of an answer, which are trained. Values of a token exist for those A only.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.metrics import Tally


@dataclass(frozen=True)
class Sample:
    prompt: list[int]  # [P], at least one token
    answer: list[int]  # [A]
    adv: float = 1.0
    version: int = -1  # of the weights that sampled it; -1: none did
    weight: float = 0.0  # of each of its tokens in the loss, set once per optimizer step
    values: dict[str, Tensor] = field(default_factory=dict)
    """By name, [A] or [A, K]: logp_behaviour, logp_old, logp_ref, adv (added to the one above), a teacher's top K."""
    group: int | None = None  # neighbours of one group enter a micro-batch together
    context: list[int] = field(default_factory=list)  # prompt that a teacher sees instead, if any

    def having(self, **values: Tensor) -> "Sample":
        return replace(self, values=self.values | values)


@dataclass(frozen=True)
class Batch:
    """A step's samples on this rank, with what was counted on the way."""

    samples: list[Sample]
    tally: Tally
    cursor: int  # of the stream of items, before it

    def staleness(self, step: int) -> int:
        """Versions that the weights of `step` are ahead of the oldest sample's."""
        return max((step - s.version for s in self.samples if s.version >= 0), default=0)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        rest = {"sums": self.tally.sums, "tops": self.tally.tops, "samples": self.tally.samples, "cursor": self.cursor}
        return {"landed/samples": pack(self.samples), "landed/rest": _coded(rest)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Batch | None":
        """What `tensors` returned, or None where it is not among them."""
        if "landed/samples" not in tensors:
            return None
        rest, tally = _decoded(tensors["landed/rest"]), Tally()
        tally.sums, tally.tops, tally.samples = rest["sums"], rest["tops"], rest["samples"]
        return cls(unpack(tensors["landed/samples"]), tally, rest["cursor"])


def key_of(sample: Sample) -> bytes:
    """A hash of its tokens."""
    return hashlib.sha256(json.dumps([sample.prompt, sample.answer]).encode()).digest()


def pack(samples: Sequence[Sample]) -> Tensor:
    """All of them in one tensor, exactly: every fp32 has a decimal of its own."""
    return _coded([vars(s) | {"values": {name: x.tolist() for name, x in s.values.items()}} for s in samples])


def unpack(packed: Tensor) -> list[Sample]:
    """What `pack` was given."""
    rows = _decoded(packed)
    return [Sample(**row | {"values": {k: torch.tensor(x) for k, x in row["values"].items()}}) for row in rows]


def _coded(rest) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)


def _decoded(coded: Tensor):
    return json.loads(coded.numpy().tobytes())
