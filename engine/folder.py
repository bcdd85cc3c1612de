"""Which folder a run lives in: never one that holds another run, never one that another process writes to."""

import fcntl
import itertools
from collections.abc import Callable
from pathlib import Path

from engine import checkpoint, dist
from engine.config import Config
from engine.errors import UserError


def have_run(folder: Path, make: Callable[[], object]) -> bool:
    """Whether the run in `folder` is finished; where it is not, `make` begins it or goes on with it first."""
    summary = folder / "summary.json"  # written behind the export
    if not summary.exists():
        make()
    return summary.exists()


def choose_folder(config: Config, world: dist.World) -> tuple[Path, Path | None]:
    """(folder of this run, checkpoint to resume from or None), chosen and locked by rank 0. Collective.

    An earlier run is never written over: a default name gets a number, and `--resume auto` goes on with the highest.
    """
    answer = None
    if world.rank == 0:
        try:
            answer = claim_folder(config)
        except UserError as error:
            answer = error
        except OSError as error:
            answer = UserError(f"The run's folder {config.run_dir} cannot be used: {error}.")
    answer = dist.gather(answer)[0]
    if isinstance(answer, UserError):
        raise answer
    return answer


def claim_folder(config: Config) -> tuple[Path, Path | None]:
    base = config.run_dir
    named = config.name and not config.profile_steps
    names = [base] if named else [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 1000))]
    if config.resume:
        taken = list(itertools.takewhile(holds_run, names))
        folder, found = taken[-1] if taken else base, None
        if config.resume != "auto":
            found = checkpoint.find(config.resume)
            if found is None:
                raise UserError(f"There is no checkpoint in {config.resume}: pass a step_... folder, or --resume auto.")
            if found.parent.name != "checkpoints":
                raise UserError(f"{found} is not in the checkpoints folder of a run; copy it back there.")
            folder = found.resolve().parents[1]
        if not lock(folder):
            raise UserError(f"Another process is training in {folder}; wait for it, or choose another --name.")
        return folder, found or checkpoint.find(folder / "checkpoints")
    for folder in names:
        if not holds_run(folder) and lock(folder):
            return folder, None
    raise UserError(f"{base} already holds a run: choose another --name, or go on with --resume auto.")


def holds_run(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0 or any(folder.glob("checkpoints/step_*"))


LOCKS: list = []  # open for as long as the process lives


def lock(folder: Path) -> bool:
    """Claims a folder for this process; False when another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    LOCKS.append(file)
    return True
