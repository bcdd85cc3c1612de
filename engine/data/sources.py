"""Where rows come from: a .jsonl, .json or .parquet file, a folder of such files, or a data set of the hub."""

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from engine.data.item import Task
from engine.data.rows import JsonRows, TableRows
from engine.errors import UserError, first_line

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
STRAYS = ("README.json", "state.json")  # beside those that datasets knows
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_MIB = 2**20


def open_source(source: str | None, task: Task, split: str) -> tuple[JsonRows | TableRows, dict]:
    """(rows, where they come from: path, digest and, of files, size in bytes). Raises UserError for what is not there.

    The digest is of the first and last MiB of every file, or of the first and last row of a hub data set.
    """
    if source is None:
        raise UserError(
            f"This task has no data set of its own for split {split!r}; "
            f"give {_option(split)}: a .jsonl, .json or .parquet file, a folder, or a hub id."
        )
    path = Path(os.path.expanduser(source))
    if path.exists():
        rows, origin = _open_files(_choose_files(path, split, task.config), path)
    elif path.suffix in FORMATS or not _HUB_ID.fullmatch(source):
        raise UserError(f"There is no file {source}; check {_option(split)}.")
    else:
        rows, origin = _open_hub(source, task, split)
    if len(rows) == 0:
        raise UserError(f"{source} has no rows; give a data set with at least one.")
    return rows, origin


def _open_files(files: list[Path], source: Path) -> tuple[JsonRows | TableRows, dict]:
    """All files are of one format, and are the file `source` or in that folder."""
    is_json = FORMATS[files[0].suffix] == "json"
    origin = {"path": os.path.abspath(source)}
    if source.is_dir():
        origin["files"] = _shorten([os.path.relpath(file, source) for file in files])
    try:
        origin |= {"size": sum(path.stat().st_size for path in files), "digest": _digest(map(_ends, files))}
        rows = JsonRows(files) if is_json else TableRows([*map(_read_parquet, files)], [*map(str, files)])
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); check what it is.") from error
    return rows, origin


def _option(split: str) -> str:
    return "--test_data" if split == "test" else "--train_data"


def _ends(path: Path) -> bytes:
    """The file's size, first and last MiB."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_MIB)
        file.seek(max(size - _MIB, 0))
        return b"%d " % size + head + file.read()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _choose_files(path: Path, split: str, config: str | None) -> list[Path]:
    """`path` itself, whatever the split, or the split's files in the folder `path`: one at least, of one format."""
    splits = _list_splits(path, split, config) if path.is_dir() else {split: [path] if path.suffix in FORMATS else []}
    if not any(splits.values()):
        raise UserError(f"{path} is not a {', '.join(FORMATS)} file or a folder of them; convert it first.")
    files = splits.get(split, [])
    if not files:
        others = _join(f"{file.name} ({name})" for name, files in splits.items() for file in files)
        raise UserError(
            f"{path} has no file for split {split!r}, only {others}; "
            f"name one file with {_option(split)}, or have the split in the names of its files ({split}-1.jsonl)."
        )
    for name, others in splits.items():
        twice = [file for file in files if name != split and file in others]
        if twice:
            raise UserError(
                f"By {'README.md' if _has_card(path) else 'its name'} {twice[0]} is of split {split!r} "
                f"and of split {name!r}; correct that, or name one file with {_option(split)}."
            )
    if len({FORMATS[file.suffix] for file in files}) > 1:
        names = _join(file.name for file in files)
        raise UserError(f"{path} mixes formats ({names}); name one file with {_option(split)}.")
    return files


def _join(names: Iterable[str]) -> str:
    return ", ".join(_shorten(list(names)))


def _shorten(names: list[str]) -> list[str]:
    return names if len(names) <= 10 else [*names[:9], f"{len(names) - 9} more"]


def _list_splits(folder: Path, split: str, config: str | None) -> dict[str, list[Path]]:
    """The folder's files by split, as `datasets.load_dataset(folder)` tells them apart, but in our formats alone."""
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")) and any(folder.rglob("*.arrow")):
        raise UserError(f"{folder} was written by Dataset.save_to_disk; write it with to_parquet or to_json instead.")
    try:
        return _read_card(folder, config) if _has_card(folder) else _find_splits(folder)
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise UserError(
            f"The splits of {folder} cannot be told apart ({first_line(error)}); "
            f"name one file, or one folder of it, with {_option(split)}."
        ) from error


def _has_card(folder: Path) -> bool:
    """Whether it is like a clone of a hub data set, whose README.md begins with what is what."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    return text.lstrip().startswith("---") and "\nconfigs:" in text


def _read_card(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """The splits of the data set `config`, or else of the only or default one, that README.md tells of."""
    import datasets

    path = str(folder.absolute())
    configs = datasets.get_dataset_config_names(path)
    config = config if config in configs else datasets.get_dataset_default_config_name(path)
    if config is None:
        raise ValueError(f"README.md tells of {len(configs)} data sets: {_join(configs)}")
    splits = _keep_data(datasets.load_dataset_builder(path, config).config.data_files)
    for file in itertools.chain.from_iterable(splits.values()):
        if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(path)):
            raise ValueError(f"README.md names {file}, which is not in the folder")
    return splits


def _find_splits(folder: Path) -> dict[str, list[Path]]:
    """Raises FileNotFoundError if nothing is found."""
    from datasets import data_files

    def find(pattern: str) -> list[str]:
        try:
            found = data_files.resolve_pattern(pattern, glob.escape(str(folder.absolute())))
        except FileNotFoundError:
            return []
        return [file for file in found if _is_data(file)]

    patterns = data_files._get_data_files_patterns(find)
    return _keep_data({split: [file for pattern in patterns[split] for file in find(pattern)] for split in patterns})


def _keep_data(splits: dict[str, list[str]]) -> dict[str, list[Path]]:
    return {str(split): [Path(f) for f in dict.fromkeys(files) if _is_data(f)] for split, files in splits.items()}


def _is_data(file: str) -> bool:
    return Path(file).suffix in FORMATS and Path(file).name not in STRAYS


def _read_parquet(path: Path):
    """The file as a `pyarrow.Table`, in memory: no cache of an older file stands in between."""
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except Exception as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); check that it is what its name says.") from error
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has the column {twice!r} twice; rename one.")
    return table


def _open_hub(source: str, task: Task, split: str) -> tuple[TableRows, dict]:
    import datasets

    if source == task.source and split not in task.splits:
        raise UserError(
            f"{source} has no split {split!r}; choose from {', '.join(task.splits)}, or give {_option(split)}."
        )
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(source, task.config if source == task.source else None, split=split)
    except Exception as error:
        raise UserError(
            f"{source} (split {split!r}) could not be had from the hub ({first_line(error)}); "
            f"check the name and the network, or give {_option(split)} a local file."
        ) from error
    ends = table.with_format("arrow")
    parts = (repr(rows.to_pylist()).encode() for rows in (ends[:1], ends[-1:]))
    return TableRows([table.data.table], [source]), {"path": source, "digest": _digest(parts)}
