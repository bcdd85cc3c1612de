"""Rows of JSON files and of tables, each read when it is asked for, with what the file says kept.

Both kinds have `len`, `column_names`, `rows[place]` (a dict of plain Python values, every column in it),
`iterate(places)`, `where(place)` (file, row from 1) and `exact(place, path, cell)` (the number that a float is).
"""

import itertools
import json
import re
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np

from engine.errors import UserError, first_line

_BOM = b"\xef\xbb\xbf"
_LIST = [re.compile(p) for p in (r"\s*\[\s*", r"\s*(?:,\s*)?", r"\]\s*\Z")]  # before, between, after its objects
_SEQUENCE = [re.compile(p) for p in (r"\s*", r"\s*", r"\Z")]
_CHUNK = 1000


def pick(row: dict, path: tuple[str, ...]) -> object:
    """The cell under the names of `path`, the outermost first; None where there is none."""
    for name in path:
        row = row.get(name) if isinstance(row, dict) else None
    return row


class JsonRows:
    """The objects in .jsonl and .json files: one a line, one after another, or a list of them, in UTF-8.

    Each is parsed once, now; what stays in memory is where it stands, 32 bytes. (A file that is anything but one object
    a line is held whole meanwhile.) Raises UserError with the file and the row, which is its line or place in a list.
    """

    def __init__(self, files: Sequence[Path]):
        columns: dict[str, None] = {}
        indices = [np.insert(_index(path, columns), 0, file, axis=1) for file, path in enumerate(files)]
        self.files, self.column_names = files, list(columns)
        self.spans = np.concatenate(indices)  # file, first byte, number of bytes, row in the file

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, place: int) -> dict:
        return next(self.iterate([place]))

    def iterate(self, places: Sequence[int]) -> Iterator[dict]:
        for row in self._parse(places, _PLAIN):
            yield dict.fromkeys(self.column_names) | row

    def where(self, place: int) -> tuple[str, int]:
        file, _, _, row = self.spans[place].tolist()
        return str(self.files[file]), row

    def exact(self, place: int, path: tuple[str, ...], cell: float) -> Decimal:
        number = pick(next(self._parse([place], _WRITTEN)), path)
        try:
            return Decimal(number)
        except ArithmeticError as error:
            raise ValueError(f"is {number:.100}, which is too long to write out") from error

    def _parse(self, places: Sequence[int], decoder: json.JSONDecoder) -> Iterator[dict]:
        chunks = (self.spans[places[start : start + _CHUNK]].tolist() for start in range(0, len(places), _CHUNK))
        for file, spans in itertools.groupby(itertools.chain.from_iterable(chunks), lambda span: span[0]):
            path = self.files[file]
            with open(path, "rb") as lines:
                for _, start, size, row in spans:
                    lines.seek(start)
                    try:
                        yield _decode(decoder, lines.read(size).decode().strip())[0]
                    except ValueError as error:
                        raise UserError(
                            f"{path}, row {row} has changed since it was read first; start again."
                        ) from error


class TableRows:
    """The rows of one `pyarrow.Table` after another, each with types of its own; `names` is what messages call them."""

    def __init__(self, tables: Sequence, names: Sequence[str]):
        self.tables, self.names = tables, names
        self.starts = list(itertools.accumulate(map(len, tables), initial=0))
        self.column_names = list(dict.fromkeys(name for table in tables for name in table.column_names))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, place: int) -> dict:
        return next(self.iterate([place]))

    def iterate(self, places: Sequence[int]) -> Iterator[dict]:
        """`places` ascend."""
        for (table, _), near in itertools.groupby(places, lambda place: (self._table(place), place // _CHUNK)):
            near = list(near)
            rows = self._read(table, near[0], near[-1])
            for place in near:
                yield dict.fromkeys(self.column_names) | rows[place - near[0]]

    def where(self, place: int) -> tuple[str, int]:
        table = self._table(place)
        return self.names[table], place - self.starts[table] + 1

    def exact(self, place: int, path: tuple[str, ...], cell: float) -> Decimal | int:
        """A whole number below 2**53 itself, else the shortest decimal that the column's own type reads as `cell`."""
        if cell.is_integer() and abs(cell) < 2**53:
            return int(cell)
        kind = self.tables[self._table(place)].schema
        for name in path:
            kind = kind.field(name).type
        number = Decimal(str(kind.to_pandas_dtype()(cell)))
        return int(number) if cell.is_integer() else number

    def _table(self, place: int) -> int:
        return bisect_right(self.starts, place) - 1

    def _read(self, table: int, first: int, last: int) -> list[dict]:
        try:
            return self.tables[table].slice(first - self.starts[table], last - first + 1).to_pylist()
        except (ValueError, ArithmeticError) as error:  # no UTF-8, or a day that Python's calendar lacks
            (name, row), (_, end), reason = self.where(first), self.where(last), first_line(error)
            raise UserError(f"{name}, row {row} or one up to {end} cannot be read ({reason}); correct it.") from error


def _index(path: Path, columns: dict[str, None]) -> np.ndarray:
    """Where each object of a file stands: first byte, number of bytes, row, [rows, 3]; its keys go to `columns`."""
    found = _index_lines(path, columns)
    found = _index_documents(path, columns) if found is None else found
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def _index_lines(path: Path, columns: dict[str, None]) -> array | None:
    """The spans of one object a line; None if a line is something else. Blank lines are passed over."""
    spans, start = array("q"), 0
    with open(path, "rb") as lines:
        for row, line in enumerate(lines, 1):
            text = _to_text(line, path, row).strip()
            if text:
                try:
                    found, end = _decode(_PLAIN, text)
                except ValueError:
                    return None
                if end < len(text):
                    return None
                columns |= dict.fromkeys(found)
                spans.extend((start, len(line), row))
            start += len(line)
    return spans


def _index_documents(path: Path, columns: dict[str, None]) -> array:
    """The spans of objects that fill several lines or share one, stand in a list or follow a byte order mark."""
    content = path.read_bytes()
    byte = len(_BOM) if content.startswith(_BOM) else 0
    text = _to_text(content[byte:], path, 1)
    is_list = _LIST[0].match(text) is not None
    before, between, after = _LIST if is_list else _SEQUENCE
    spans, begin, end, row = array("q"), 0, 0, 0 if is_list else 1
    start = before.match(text).end()
    while not after.match(text, start):
        row += 1 if is_list else text.count("\n", begin, start)
        byte += len(text[end:start].encode())
        try:
            found, end = _decode(_PLAIN, text, start)
        except ValueError as error:
            comma = text.startswith(",", start) and not is_list
            reason = "is followed by a comma (take the commas away, or put all rows into one list)" if comma else error
            raise UserError(f"{path}, row {row} {reason}; correct the row or remove it.") from error
        columns |= dict.fromkeys(found)
        size = len(text[start:end].encode())
        spans.extend((byte, size, row))
        byte += size
        begin, start = start, between.match(text, end).end()
    return spans


class _RepeatedKey(ValueError):
    pass


def _decode(decoder: json.JSONDecoder, text: str, start: int = 0) -> tuple[dict, int]:
    """(the object that begins at `start`, where it ends). Raises ValueError with what the text there is instead."""
    try:
        found, end = decoder.raw_decode(text, start)
    except _RepeatedKey:
        raise
    except (json.JSONDecodeError, RecursionError):
        found = None
    except ValueError as error:  # Python's bound on the digits of an int
        raise ValueError(
            f"has a whole number of more than {sys.get_int_max_str_digits()} digits (make it text)"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"is not a JSON object ({text[start : start + 60].partition(chr(10))[0]!r})")
    return found, end


def _to_dict(pairs: list[tuple[str, object]]) -> dict:
    """Raises _RepeatedKey for a key that comes twice: which value is meant, the file does not say."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return found


def _to_text(content: bytes, path: Path, row: int) -> str:
    """The text of `content`, which begins in line `row`. Raises UserError if it is not in UTF-8."""
    bad = content.find(b"\0")  # of UTF-16: half of its ASCII is UTF-8 too
    try:
        if bad < 0:
            return content.decode()
    except UnicodeDecodeError as error:
        bad = error.start
    row += content.count(b"\n", 0, bad)
    raise UserError(f"{path}, row {row} is not in UTF-8; save the file in that encoding.")


_PLAIN = json.JSONDecoder(object_pairs_hook=_to_dict)
_WRITTEN = json.JSONDecoder(object_pairs_hook=_to_dict, parse_float=str)
