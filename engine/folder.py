"""Which folder a run lives in: never one that holds anything but this run, nor one that another process writes to.

What makes a folder a run's is `launches.jsonl`: made before all else, locked while a process trains, a line a launch.
"""

import fcntl
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from engine import checkpoint, dist
from engine.config import Config
from engine.errors import UserError

LAUNCH_LOG = "launches.jsonl"
FIRST = b'{"step": '


def have_run(folder: Path, make: Callable[[], object]) -> bool:
    """Whether the run in `folder` is finished; where it is not, `make` begins it or goes on with it first."""
    summary = folder / "summary.json"  # written behind the export
    if is_foreign(folder) or not summary.exists():
        make()
    return summary.exists()


def choose_folder(config: Config, world: dist.World) -> tuple[Path, Path | None]:
    """(folder of this run, checkpoint to resume from or None), chosen and locked by rank 0. Collective.

    What is there is never written over: a default name gets a number, and `--resume auto` goes on with the highest.
    """
    folder, found, problem = None, None, ""
    if world.rank == 0:
        try:
            folder, found = claim_folder(config)
        except UserError as error:
            problem = str(error)
        except (OSError, ValueError) as error:  # of a path that cannot be
            problem = f"The run's folder {config.run_dir} cannot be used: {error}."
    folder, found, problem = dist.gather([folder and str(folder), found and str(found), problem])[0]
    if problem:
        raise UserError(problem)
    return Path(folder), Path(found) if found else None


def claim_folder(config: Config) -> tuple[Path, Path | None]:
    base = config.run_dir
    alone = config.name and not config.profile_steps
    numbered = () if alone else (base.with_name(f"{base.name}-{n}") for n in range(2, 1000))
    names = (folder for folder in itertools.chain([base], numbered) if not is_foreign(folder))
    if config.resume:
        folder, found = (find_newest(names), None) if config.resume == "auto" else find_named(config.resume)
        if folder is None:
            raise UserError(say_foreign(base))
        found, export = found or checkpoint.find(folder / "checkpoints"), folder / "export"
        if export.exists() and not found:
            raise UserError(
                f"{folder} holds an export and no checkpoint to go on from, so it stays as it is: choose another "
                f"--name, and begin with --init_from {export}."
            )
        if not lock(folder):
            raise UserError(f"Another process is training in {folder}; wait for it, or choose another --name.")
        return folder, found
    for folder in names:
        if not holds_run(folder) and lock(folder):
            return folder, None
    if is_foreign(base):
        raise UserError(say_foreign(base))
    raise UserError(f"{base} already holds a run: choose another --name, or go on with --resume auto.")


def find_newest(names: Iterable[Path]) -> Path | None:
    """The last of the first names that hold a run, else the first name, if there is any."""
    first = next(iter(names), None)
    return [first, *itertools.takewhile(holds_run, names)][-1] if first and holds_run(first) else first


def find_named(checkpoint_path: str) -> tuple[Path, Path]:
    """(run's folder, checkpoint) for what --resume names."""
    found = checkpoint.find(checkpoint_path)
    if found is None:
        raise UserError(f"There is no checkpoint in {checkpoint_path}: pass a step_... folder, or --resume auto.")
    found = found.resolve()  # beside a link may lie what is not the run's
    folder = found.parents[1]
    if found.parent.name != "checkpoints" or is_foreign(folder):
        raise UserError(f"{found} is not in the checkpoints folder of a run; copy it back there.")
    return folder, found


def holds_run(folder: Path) -> bool:
    metrics, export = folder / "metrics.jsonl", folder / "export"
    has_rows = metrics.exists() and metrics.stat().st_size > 0
    return has_rows or export.exists() or any(folder.glob("checkpoints/step_*"))


def is_foreign(folder: Path) -> bool:
    """Whether something is there that no run has made."""
    return folder.exists() and not is_run(folder) and (not folder.is_dir() or any(folder.iterdir()))


def is_run(folder: Path) -> bool:
    """Whether its launches.jsonl is a run's, and no table of rockets: not written to yet, or begun as we begin it."""
    file = folder / LAUNCH_LOG
    if not file.is_file():
        return False
    with file.open("rb") as lines:
        return lines.read(len(FIRST)) in (b"", FIRST)


def say_foreign(folder: Path) -> str:
    return (
        f"{folder} is not a run's folder and not empty, so it stays as it is: choose another --out or --name (for the "
        "run that makes the first weights, --out or --init_from)."
    )


LOCKS: list = []  # open for as long as the process lives


def lock(folder: Path) -> bool:
    """Claims a folder for this process; False when another has it. UserError where it leads elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    if link := next((path for path in folder.iterdir() if path.is_symlink()), None):
        raise UserError(
            f"{link} is a link, and what it points to would be written over: put the file or folder itself there, or "
            "have the whole run where there is room (--out)."
        )
    file = (folder / LAUNCH_LOG).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    LOCKS.append(file)
    return True
