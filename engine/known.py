"""Known: what a reference says of given answers, asked once before the first step and kept beside the run.

    <run>/reference-<hash>.safetensors    keys uint8 [S, 32] (engine.samples.key_of), lengths int64 [S], logp fp32

The name has the hash of the weights that the run starts from, a key is the hash of a sample's token ids, and so of
tokenizer, template and row. No random number is drawn for it.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import dist
from engine.config import Config
from engine.errors import UserError, first_line
from engine.samples import Sample, key_of
from engine.sources import Prompts, Source

AT_ONCE = 1024
"""Samples that are asked for before the file is written and a signal is heard."""


@dataclass(frozen=True)
class Known:
    """Log-probabilities fp32 [A] of samples' tokens by the samples' keys, and samples of which nothing is known yet."""

    path: Path
    found: dict[bytes, Tensor]
    missing: dict[bytes, Sample]

    def ask(self, learner) -> None:
        """Asks the policy for what is missing, all of it unless a signal comes; then the run ends before it learns, and
        asks on another time. Collective."""
        todo = list(self.missing.items())
        for start in range(0, len(todo), AT_ONCE):
            if dist.all_max([float(dist.stop_requested())])[0]:
                break
            self.found.update(_ask(learner, dict(todo[start : start + AT_ONCE])))
            if learner.world.rank == 0:
                _write(self.path, self.found)


def look_up(samples: Iterable[Sample], weights: str, folder: Path, step: int) -> Known:
    """What the run's folder has of the samples. `weights`: a fingerprint of those that the run starts from. UserError
    for a run that has gone on, whose policy is not its own reference any more, and lacks some. Collective."""
    path = folder / f"reference-{weights[:16]}.safetensors"
    known = Known(path, _read(path), {})
    known.missing.update({key: s for s in samples if (key := key_of(s)) not in known.found})
    if step and dist.all_max([float(len(known.missing))])[0]:
        lacks = f"lacks {len(known.missing)} answers that this resume needs" if known.found else "is not there"
        raise UserError(
            f"{path} {lacks}, and the start cannot be asked again, for the policy has moved on; go on with the data "
            "and steps that it was made for, or with --reference live (with adapters adapters_off, the same start)."
        )
    return known


def _read(path: Path) -> dict[bytes, Tensor]:
    if not path.exists():
        return {}
    try:
        kept = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); take it away, or put a whole one there."
        ) from None
    keys = [bytes(key) for key in kept["keys"].tolist()]
    return dict(zip(keys, kept["logp"].split(kept["lengths"].tolist()), strict=True))


def _ask(learner, unique: dict[bytes, Sample]) -> dict[bytes, Tensor]:
    """Each rank asks for its share. Collective."""
    rank, world_size = learner.world.rank, learner.world.world_size
    logp = {key: torch.zeros(len(s.answer), dtype=torch.float64) for key, s in unique.items()}
    mine = list(unique.items())[rank::world_size]
    for (key, _), s in zip(mine, learner.with_logprobs(learner.policy, "logp_ref", [s for _, s in mine]), strict=True):
        logp[key] += s.values["logp_ref"]
    whole = dist.all_sum(torch.cat([*logp.values()])).float()
    return dict(zip(logp, whole.split([len(x) for x in logp.values()]), strict=True))


def _write(path: Path, known: dict[bytes, Tensor]) -> None:
    tensors = {
        "keys": torch.tensor([list(key) for key in known], dtype=torch.uint8),
        "lengths": torch.tensor([len(x) for x in known.values()]),
        "logp": torch.cat([*known.values()]),
    }
    aside = path.with_suffix(".aside")
    save_file(tensors, aside)
    aside.rename(path)


def samples_of(source: Source, config: Config, prompts: Prompts, world: dist.World) -> Iterator[Sample]:
    """What a run will learn from, of all ranks: that of its steps, or of one walk through the data. `prompts` at their
    beginning."""
    read = source.open(config, prompts, None, dataclasses.replace(world, rank=0, world_size=1))
    for step in range(config.steps):
        if prompts.stream.cursor >= len(prompts.items):
            break
        yield from read(step).samples
