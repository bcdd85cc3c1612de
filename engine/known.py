"""Known: what a reference says of given answers, asked once before the first step and kept beside the run.

    <run>/reference-<hash>.safetensors    keys uint8 [S, 32] (engine.samples.key_of), lengths int64 [S], logp fp32

The hash is of the weights that the run starts from and of the samples' token ids, and so of model, tokenizer, template
and rows. No random number is drawn for it.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import dist
from engine.config import Config
from engine.errors import UserError
from engine.samples import Sample, key_of
from engine.sources import Prompts, Source


def ask_once(learner, samples: Iterable[Sample], weights: str, folder: Path, step: int) -> dict[bytes, Tensor]:
    """Log-probabilities [A] of every sample's tokens by its key, from the file or, before the first step, from the
    policy, which is its own reference there. `weights`: a fingerprint. UserError for a run that has gone on without
    its file. Collective."""
    unique = {key_of(s): s for s in samples}
    digest = hashlib.sha256(weights.encode() + b"".join(unique))
    path = folder / f"reference-{digest.hexdigest()[:16]}.safetensors"
    if not dist.gather(path.exists())[0]:
        if step:
            raise UserError(
                f"{path} is not there, and what the reference says of these rows cannot be asked again, the policy "
                "having moved on; go on with the same data, steps and settings, or with --reference live."
            )
        _write(path, unique, _ask(learner, list(unique.values())), learner.world.rank)
    dist.barrier()
    kept = load_file(path)
    keys = [bytes(key) for key in kept["keys"].tolist()]
    return dict(zip(keys, kept["logp"].split(kept["lengths"].tolist()), strict=True))


def _ask(learner, samples: list[Sample]) -> Tensor:
    """Of all samples end to end, whichever rank asks for which. Collective."""
    world = learner.world
    parts = [torch.zeros(len(s.answer), dtype=torch.float64) for s in samples]
    for part, s in zip(
        parts[world.rank :: world.world_size],
        learner.with_logprobs(learner.policy, "logp_ref", samples[world.rank :: world.world_size]),
        strict=True,
    ):
        part += s.values["logp_ref"]
    return dist.all_sum(torch.cat(parts)).float()


def _write(path: Path, unique: dict[bytes, Sample], logp: Tensor, rank: int) -> None:
    if rank:
        return
    keys = torch.tensor([list(key) for key in unique], dtype=torch.uint8)
    lengths = torch.tensor([len(s.answer) for s in unique.values()])
    aside = path.with_suffix(".aside")
    save_file({"keys": keys, "lengths": lengths, "logp": logp}, aside)
    aside.rename(path)


def samples_of(source: Source, config: Config, prompts: Prompts, world: dist.World) -> Iterator[Sample]:
    """What a run will learn from, of all ranks: that of its steps, or of one walk through the data. `prompts` at their
    beginning."""
    read = source.open(config, prompts, None, dataclasses.replace(world, rank=0, world_size=1))
    for step in range(config.steps):
        if prompts.stream.cursor >= len(prompts.items):
            break
        yield from read(step).samples
