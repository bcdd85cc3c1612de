"""Items from the rows of a table: a local .jsonl, .json or .parquet, a folder of such files, or a hub data set."""

import json
import re
from pathlib import Path

from engine.data.item import Item, Items, Task, build_prompt
from engine.errors import UserError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SPLIT_NAME = re.compile(r"(train|test|val|dev)")
_CHUNK = 1000


def load_table(
    task: Task, split: str, *, source: str | None, system_prompt: str | None, limit: int | None, seed: int
) -> Items:
    """The first `limit` rows as items, each made when asked for; every row is checked once, now.

    The order is the file's (`seed` has no say). Raises UserError for a source that cannot be read, a column that is
    not there and a row that cannot be used (rows counted from 1).
    """
    source = source or task.source
    rows = _load_rows(source, task, split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    for column in filter(None, (task.prompt_column, task.answer_column, task.trace_column)):
        if column not in rows.column_names:
            raise UserError(f"{source} has no column {column!r}; name one of {', '.join(rows.column_names)}.")

    def make(index: int, row: dict | None = None) -> Item:
        row = rows[index] if row is None else row
        answer, trace = task.read(row[task.answer_column])
        if task.trace_column:
            trace = _checked_trace(row[task.trace_column])
        prompt = build_prompt(_checked_prompt(row[task.prompt_column]), system_prompt)
        return Item(prompt, answer, trace, {**row, "row_index": index})

    _check_rows(rows, make, source)
    return Items(len(rows), make)


def _check_rows(rows, make, source: str) -> None:
    """Makes every item once. Raises UserError that names the rows that cannot be used, from 1, and why the first."""
    bad: dict[int, str] = {}
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        for index, cells in enumerate(zip(*chunk.values()), start):
            try:
                make(index, dict(zip(chunk, cells)))
            except ValueError as error:
                bad[index + 1] = str(error)
    if bad:
        first, *others = bad
        numbers = ", ".join(map(str, others[:9])) + ", ..." * (len(others) > 9)
        also = f" ({len(others)} more: {numbers})" if others else ""
        raise UserError(f"{source}, row {first}{also}: {bad[first]}; correct or remove what is wrong.")


def _checked_prompt(cell: object) -> str | list[dict]:
    """The cell itself if it is text or chat messages. Raises ValueError if not."""
    is_text = isinstance(cell, str) and cell.strip()
    is_chat = (
        isinstance(cell, list)
        and cell
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in cell
        )
    )
    if not is_text and not is_chat:
        raise ValueError(f"the prompt is neither text nor a list of chat messages but {cell!r}")
    return cell


def _checked_trace(cell: object) -> str:
    """The cell itself if it is text. Raises ValueError if not."""
    if not isinstance(cell, str) or not cell.strip():
        raise ValueError(f"the trace is not text but {cell!r}")
    return cell


def _load_rows(source: str | None, task: Task, split: str):
    if source is None:
        raise UserError(
            f"This task has no data set of its own for split {split!r}; "
            "give a source: a .jsonl, .json or .parquet file, a folder, or a hub id."
        )
    path = Path(source).expanduser()
    if path.exists():
        rows = _load_files(_split_files(path, split))
    elif path.suffix in FORMATS or not _HUB_ID.fullmatch(source):
        raise UserError(f"There is no file {source}; check the path.")
    else:
        rows = _load_hub(source, task, split)
    if len(rows) == 0:
        raise UserError(f"{source} has no rows; give a data set with at least one.")
    return rows


def _split_files(path: Path, split: str) -> list[Path]:
    """`path` itself, or the files below it that bear the split's name, or all if none bears any split's name."""
    files = sorted(p for p in path.rglob("*") if p.suffix in FORMATS) if path.is_dir() else [path]
    named = [p for p in files if p.name.startswith(split)]
    if not files or files[0].suffix not in FORMATS:
        raise UserError(f"{path} is not a {', '.join(FORMATS)} file or a folder of them; convert it first.")
    if path.is_dir() and not named and any(_SPLIT_NAME.match(p.name) for p in files):
        raise UserError(
            f"{path} has no file for split {split!r}, only {', '.join(p.name for p in files)}; "
            "name one of these files as the source."
        )
    files = named if path.is_dir() and named else files
    if len({FORMATS[p.suffix] for p in files}) > 1:
        raise UserError(f"{path} mixes formats ({', '.join(p.name for p in files)}); name one file as the source.")
    return files


def _load_files(files: list[Path]):
    import datasets

    datasets.disable_progress_bars()
    if not any(p.stat().st_size for p in files):
        return []
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its error log would come on top of our sentence
    try:
        return datasets.load_dataset(FORMATS[files[0].suffix], data_files=[str(p) for p in files], split="train")
    except Exception as error:
        _name_bad_line(files)
        reason = str(error.__cause__ or error).splitlines()
        raise UserError(
            f"{files[0]} cannot be read ({reason[0] if reason else type(error).__name__}); "
            "check that it is what its name says."
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _name_bad_line(files: list[Path]) -> None:
    """Raises UserError for the first line of a .jsonl that is not a JSON object; returns if there is none."""
    for path in (p for p in files if p.suffix == ".jsonl"):
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and not _is_object(line):
                    raise UserError(
                        f"{path}, row {number} is not a JSON object ({line.strip()[:60]!r}); "
                        "correct the row or remove it."
                    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _load_hub(source: str, task: Task, split: str):
    import datasets

    if source == task.source and split not in task.splits:
        raise UserError(f"{source} has no split {split!r}; choose from {', '.join(task.splits)}, or give a source.")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, task.config if source == task.source else None, split=split)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source} (split {split!r}) could not be had from the hub ({reason}); "
            "check the name and the network, or give a local file as the source."
        ) from error
