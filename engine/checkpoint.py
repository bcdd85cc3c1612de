"""Checkpoints: saved whole or not at all, refused by name when they do not fit.

    root/step_000020/meta.json                 step, world_size, best, files {name: bytes}, and the caller's own
                     rank_<r>.safetensors      what rank r holds: its shards of weights and optimizer, its RNGs
    root/.step_000030.partial/                 being written, or left by a crash; removed by the next save

A folder gets its name by a rename, after every file in it has reached the disk. Nothing is pickled.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine import dist
from engine.errors import UserError


class CheckpointError(UserError):
    """A checkpoint could not be written; the ones before it are untouched."""


def save(
    root: Path, step: int, tensors: dict[str, Tensor], meta: dict, world: dist.World, *, keep: int, best: bool = False
) -> Path:
    """Write `root/step_<step>` and prune; collective, returns the folder.

    `tensors`: this rank's own, on any device. `meta`: JSON, rank 0's counts; holds `fingerprint`, a dict
    that `load` compares. The last `keep` folders stay, and the newest saved with `best=True`.
    CheckpointError on every rank when writing failed on any; the folder is then gone.
    """
    assert keep >= 1, keep
    root = Path(root)
    final = root / f"step_{step:06d}"
    partial = root / f".{final.name}.partial"
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.nbytes for tensor in tensors.values())
    sizes: dict[str, int] = {}

    def begin() -> int:
        if world.rank == 0:
            _remove_left(root)
            partial.mkdir(parents=True)
        return needed

    def write() -> int:
        return _write_tensors(partial / f"rank_{world.rank}.safetensors", tensors)

    def publish() -> None:
        if world.rank == 0:
            about = {"step": step, "world_size": world.world_size, "best": best or _is_best(final), "files": sizes}
            _write_text(partial / "meta.json", json.dumps({**meta, **about}, indent=1))
            _sync(partial)
            if final.exists():  # saved before, at this very step
                os.rename(final, root / f".{final.name}.old")
            os.rename(partial, final)
            _sync(root)

    try:
        needed = sum(_agree(begin))
        sizes.update((f"rank_{rank}.safetensors", size) for rank, size in enumerate(_agree(write)))
        _agree(publish)
    except OSError as error:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        sentence = dist.gather(_no_room(root, final, str(error), needed))[0]  # the same one, so that it is said once
        raise CheckpointError(sentence) from error
    if world.rank == 0:
        _prune(root, step, keep)
    dist.barrier()
    return final


def find(root_or_path: Path | str) -> Path | None:
    """The checkpoint to resume: the path itself if it is one, else the newest in it.

    None if there is none. A folder that was never completed is not a checkpoint; one damaged later is
    returned, so that `load` refuses it by name. Same answer on every rank that sees the same disk.
    """
    path = Path(root_or_path)
    if (path / "meta.json").is_file() or (_step(path) >= 0 and path.is_dir()):
        return path
    folders = _complete(path)
    return folders[-1] if folders else None


def load(path: Path | str, world: dist.World, fingerprint: dict) -> tuple[dict[str, Tensor], dict]:
    """This rank's tensors, on the CPU, and meta.json; collective.

    Raises UserError on every rank, naming `path`, what is wrong, and the checkpoint before it: a file is
    missing, truncated or unreadable; it was saved by another number of ranks; a key of `fingerprint`
    (a JSON dict: whatever must be equal for a resume to mean something) differs.
    """
    path = Path(path)

    def read() -> tuple[dict[str, Tensor], dict]:
        meta = json.loads((path / "meta.json").read_text())
        _check(path, meta, world.world_size, json.loads(json.dumps(fingerprint)))
        return load_file(path / f"rank_{world.rank}.safetensors"), meta

    result, problem = None, ""
    try:
        result = read()
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = str(error) if isinstance(error, UserError) else f"it cannot be read ({error!r})"
    problem = next(filter(None, dist.gather(problem)), "")
    if problem:
        before = [folder for folder in _complete(path.parent) if _step(folder) < _step(path)]
        offer = f"The one before it is {before[-1]}." if before else "There is none before it."
        raise UserError(f"Checkpoint {path} is refused: {problem}. {offer}")
    return result


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """This rank's shard of what is trained, persistent buffers and optimizer state, by name, not copied.

    Names: `model/<parameter>`, `optim/<parameter>/<state>`, without the marks of torch.compile and of
    activation checkpointing. Learning rates are not state: the scheduler sets them from the step.
    """
    parameters = _parameters(model)
    tensors = {f"model/{name}": _local(tensor) for name, tensor in (parameters | _buffers(model)).items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim/{name}/{key}"] = _local(value)
    return tensors


@torch.no_grad()
def restore_training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back, bit for bit, what `training_tensors` returned; other names in `tensors` are ignored.

    Weights are written in place, optimizer state is made anew, so that it may be empty before and after.
    Raises UserError naming the first tensor that is missing or of another shape or dtype.
    """
    parameters = _parameters(model)
    for name, tensor in (parameters | _buffers(model)).items():
        _local(tensor).copy_(_fitting(tensors, f"model/{name}", _local(tensor)))
    optimizer.state.clear()
    on_device = {id(p): g.get("fused") or g.get("capturable") for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in parameters.items():
        prefix = f"optim/{name}/"
        keys = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
        for key in keys:
            if key == "step":  # a number per parameter; fused kernels read it on the device
                device = parameter.device if on_device.get(id(parameter)) else torch.device("cpu")
                optimizer.state[parameter][key] = tensors[prefix + key].to(device, copy=True)
            else:
                state = torch.zeros_like(parameter)
                _local(state).copy_(_fitting(tensors, prefix + key, _local(state)))
                optimizer.state[parameter][key] = state


def rng_tensors() -> dict[str, Tensor]:
    """State of the global generators of python, numpy, torch on the CPU, and the current CUDA device, as tensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "rng/python": torch.tensor([version, *words], dtype=torch.int64),
        "rng/python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "rng/numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "rng/numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "rng/torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Set the generators back to what `rng_tensors` returned; other names in `tensors` are ignored."""
    version, *words = tensors["rng/python"].tolist()
    gauss = tensors["rng/python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = tensors["rng/numpy"].tolist()
    cached = tensors["rng/numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["rng/torch"].cpu())
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"].cpu())


def _agree(work: Callable[[], object]) -> list:
    """Do `work` on every rank; its results in rank order, or, if it failed anywhere, an OSError everywhere."""
    result, problem = None, ""
    try:
        result = work()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    results, problems = zip(*dist.gather((result, problem)))
    if any(problems):
        raise OSError(next(filter(None, problems)))
    return list(results)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> int:
    save_file(tensors, path)
    _sync(path)
    return path.stat().st_size


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    """fsync a file or a folder: a rename is not yet on the disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_room(root: Path, final: Path, problem: str, needed: int) -> str:
    there = next(parent for parent in (root, *root.absolute().parents) if parent.exists())
    stays = _complete(root)
    return (
        f"Checkpoint {final} could not be written: {problem}. It needs {needed:,} bytes and "
        f"{shutil.disk_usage(there).free:,} are free. "
        + (f"The newest complete one stays: {stays[-1]}." if stays else "There is no earlier one.")
    )


def _step(path: Path) -> int:
    match = re.fullmatch(r"step_(\d+)", path.name)
    return int(match[1]) if match else -1


def _complete(root: Path) -> list[Path]:
    return sorted((path for path in root.glob("step_*") if path.is_dir() and _step(path) >= 0), key=_step)


def _is_best(folder: Path) -> bool:
    try:
        return json.loads((folder / "meta.json").read_text())["best"]
    except (OSError, ValueError, KeyError):
        return False  # damaged: `load` says so, pruning and the search for the best pass over it


def _prune(root: Path, step: int, keep: int) -> None:
    folders = _complete(root)
    stay = {*folders[-keep:], *[folder for folder in folders if _is_best(folder)][-1:]}
    for folder in folders:
        if folder not in stay:
            folder.rename(root / f".{folder.name}.old")  # never half a folder under the good name
    _remove_left(root)


def _remove_left(root: Path) -> None:
    """The folders that a crash or pruning has left under a save's hidden names; of a link the link alone."""
    for path in root.glob(".step_*"):
        if re.fullmatch(r"\.step_\d+\.(partial|old)", path.name):
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def abandon_after(root: Path, step: int, world: dist.World) -> None:
    """Sets aside, as `abandoned_step_...`, numbered where there is one, what a run now going on from `step` saved
    after it; collective."""
    if world.rank == 0:
        for folder in (folder for folder in _complete(root) if _step(folder) > step):
            ends = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
            names = (root / f"abandoned_{folder.name}{end}" for end in ends)
            folder.rename(next(name for name in names if not name.exists()))
    dist.barrier()


def _check(path: Path, meta: dict, world_size: int, fingerprint: dict) -> None:
    for name, size in meta["files"].items():
        if not (path / name).is_file():
            raise UserError(f"{name} is missing")
        if (path / name).stat().st_size != size:
            raise UserError(f"{name} is truncated, {(path / name).stat().st_size:,} of {size:,} bytes")
    if meta["world_size"] != world_size:
        saved = meta["world_size"]
        raise UserError(
            f"it was saved by {saved} ranks, and this run has {world_size}: go on with {saved} (torchrun "
            f"--nproc_per_node={saved} on one machine), or, when it is finished, begin a new run from its export with "
            "--init_from"
        )
    for key in sorted(fingerprint.keys() | meta["fingerprint"].keys()):
        theirs, ours = meta["fingerprint"].get(key), fingerprint.get(key)
        if theirs != ours:
            name, theirs, ours = _first_difference(key, theirs, ours)
            raise UserError(f"it belongs to another run, with {name} {theirs!r} where this one has {ours!r}")


def _first_difference(name: str, theirs, ours) -> tuple:
    """(name, of theirs, of ours) of what differs: in tables the first entry that does."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        key = min(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
        return _first_difference(f"{name} of {key}", theirs.get(key), ours.get(key))
    return name, theirs, ours


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    dist.free_gathered(model)  # else a root shows its full parameters
    return {_plain(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    names = model.state_dict().keys()
    return {_plain(name): buffer for name, buffer in model.named_buffers() if name in names}


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fitting(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        there = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
        raise UserError(f"The checkpoint does not fit: {name} is {there}, not {tuple(like.shape)} {like.dtype}.")
    return tensor
