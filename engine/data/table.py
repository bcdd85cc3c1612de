"""Items from the rows of a file, a folder or a hub data set."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256

from engine.data import cells
from engine.data.item import Item, Items, Task, build_prompt
from engine.data.rows import JsonRows, TableRows, pick
from engine.data.sources import open_source
from engine.errors import UserError

Rows = JsonRows | TableRows
PARTS = ("prompt", "trace", "answer")
PARTS_OF_PAIRS = ("prompt", "chosen", "rejected", "answer")


def load_table(
    task: Task,
    split: str,
    *,
    source: str | None,
    system_prompt: str | None,
    limit: int | None,
    seed: int,
    answers: bool,
    traces: bool,
    pairs: bool,
    sample: bool,
) -> Items:
    """The items of `limit` rows in the file's order, each made when asked for; every one is checked once, now.

    Raises UserError for a source that cannot be read, a column that is not there and a row that cannot be used (rows
    counted from 1). `seed` has no say.
    """
    source = source or task.source
    rows, origin = open_source(source, task, split)
    places = _choose_places(len(rows), limit, sample)
    columns = _list_pair_columns(task, rows, answers) if pairs else _list_columns(task, answers, traces)
    paths = {what: _find_column(rows, places, column, what, source) for what, column in columns.items() if column}
    readers = _choose_readers(task, paths)

    def read(place: int, row: dict) -> Item:
        found = {"answer": ("", None)}
        for what, path in paths.items():
            cell = pick(row, path)
            try:
                found[what] = readers[what](rows.exact(place, path, cell) if isinstance(cell, float) else cell)
            except ValueError as error:
                raise ValueError(f"the {what} in column {'.'.join(path)!r} {error}") from error
        prompt, trace, rejected = _join(found)
        prompt = build_prompt(prompt, system_prompt)
        own = {"own_row_index": row["row_index"]} if "row_index" in row else {}
        row, where = {**row, **own, "row_index": place}, "{}, row {}".format(*rows.where(place))
        return Item(prompt, found["answer"][0], trace, row, where, rejected)

    _check_rows(rows, places, read)
    make = lambda index: read(places[index], rows[places[index]])
    used = [columns.get(what) for what in (PARTS_OF_PAIRS if pairs else PARTS)]
    origin |= {"rows": len(places), "columns": used, "system_prompt": system_prompt or None}
    return Items(len(places), make, origin)


def _choose_places(size: int, limit: int | None, sample: bool) -> Sequence[int]:
    """The first `limit` of `size` rows, or as many spread over all of them: the same ones whenever it is asked."""
    if limit is None or limit >= size:
        return range(size)
    if not sample:
        return range(limit)
    return sorted(heapq.nsmallest(limit, range(size), key=lambda place: sha256(b"%d" % place).digest()))


def _list_columns(task: Task, answers: bool, traces: bool) -> dict[str, str | None]:
    """The columns to read, by what is in them; None for none."""
    columns = {"prompt": task.prompt_column}
    if traces or task.trace_column == task.prompt_column:
        columns["trace"] = task.trace_column
    if answers or (task.read is not cells.read_plain and not task.trace_column):
        columns["answer"] = task.answer_column
    return columns


def _list_pair_columns(task: Task, rows: Rows, answers: bool) -> dict[str, str | None]:
    """The same of pairs; none of prompts where the chosen answers come with them."""
    columns = {"chosen": task.chosen_column, "rejected": task.rejected_column}
    names = ("prompt", "conversations", task.chosen_column) if task.prompt_column == "prompt" else (task.prompt_column,)
    prompt = next((name for name in names if name in rows.column_names), names[-1])
    if prompt != task.chosen_column:
        columns["prompt"] = prompt
    if answers:
        columns["answer"] = task.answer_column
    return columns


def _join(found: dict[str, object]) -> tuple[str | list[dict], str | None, str | None]:
    """(prompt, trace, rejected answer) of what is in the cells of a row."""
    if "chosen" in found:
        return cells.join_pair(found.get("prompt"), found["chosen"], found["rejected"])
    return found["prompt"], found.get("trace", found["answer"][1]), None


def _find_column(rows: Rows, places: Sequence[int], name: str, what: str, source: str) -> tuple[str, ...]:
    """The path to the column of `what`, or with dots to a field of a nested one. Raises UserError if no row has it."""
    known = {column: (column,) for column in rows.column_names}
    for row in rows.iterate(places if "." in name else places[:1]):
        if name in known:
            break
        known = {".".join(path): path for path in _list_fields(row)} | known
    if name not in known:
        raise UserError(f"{source} has no column {name!r}; name one of {', '.join(known)} with --{what}_column.")
    return known[name]


def _list_fields(row: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths to the fields of nested columns, and to theirs."""
    for name, cell in row.items():
        if path:
            yield (*path, name)
        if isinstance(cell, dict):
            yield from _list_fields(cell, (*path, name))


def _choose_readers(task: Task, paths: dict[str, tuple[str, ...]]) -> dict[str, Callable[[object], object]]:
    """What makes the prompt, the trace, (answer, trace or None) and a choice of a cell, or raises ValueError."""
    readers = {
        "answer": lambda cell: task.read(cells.write_out(cell)),
        "chosen": cells.read_choice,
        "rejected": cells.read_choice,
    }
    if "chosen" in paths:
        return readers | {"prompt": cells.read_pair_prompt}
    if paths["prompt"] == paths.get("trace"):
        return readers | {"prompt": cells.read_chat_prompt, "trace": cells.read_chat_trace}
    return readers | {"prompt": cells.read_prompt, "trace": cells.read_trace}


def _check_rows(rows: Rows, places: Sequence[int], read: Callable[[int, dict], Item]) -> None:
    """Makes every item once. Raises UserError that names the rows that cannot be used, and why the first."""
    bad, reason = [], ""
    for place, row in zip(places, rows.iterate(places)):
        try:
            read(place, row)
        except ValueError as error:
            bad.append(place)
            reason = reason or str(error)
    if bad:
        (file, row), *others = map(rows.where, bad[:10])
        numbers = [f"{n}" if path == file else f"{n} of {path}" for path, n in others]
        also = f" ({len(bad) - 1} more: {', '.join(numbers)}{', ...' * (len(bad) > 10)})" if others else ""
        raise UserError(f"{file}, row {row}{also}: {reason}; correct or remove what is wrong.")
