"""A setting: a line of a dataclass that holds its type, default, meaning and range.

    steps: int = setting(100, "rollouts (rl) or optimizer steps (sft)", above=0)

The line says how its text is read (`convert`), which values it refuses (`check`) and what `--help` tells (`explain`).
A `ClassVar` with a text between the lines heads those below it (`groups_of`).
"""

import dataclasses
import math
import operator
import textwrap
import types
import typing
from dataclasses import Field, dataclass

from engine.errors import UserError

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
SHORT = {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT"}
BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
BOUNDS = {
    "above": ("above", operator.gt),
    "least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}
WIDTH = 120


@dataclass(frozen=True)
class Line:
    """What a setting's line says beside its type and default."""

    meaning: str
    bounds: dict[str, float]  # by the keys of BOUNDS
    choices: tuple
    also: float | None  # allowed beside what is within the bounds
    infinite: bool

    def demand(self, value) -> str:
        """What a value, or one of a list, must be and is not; '' for one in the range."""
        if isinstance(value, float) and not math.isfinite(value) and not self.infinite:
            return "a finite number"
        within = all(BOUNDS[name][1](value, bound) for name, bound in self.bounds.items())
        return "" if (value in self.choices if self.choices else within or value == self.also) else self.range

    @property
    def range(self) -> str:
        """'above 0 and at most 1', 'one of a, b'; '' where every value is allowed."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        words = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in self.bounds.items())
        return words if self.also is None else f"{self.also}, or {words}"


def setting(default, meaning: str, *, choices=(), also: float | None = None, infinite=False, **bounds: float) -> Field:
    """A dataclass's field. `bounds`: above, least, below, most; `infinite`: a number that may be inf."""
    assert bounds.keys() <= BOUNDS.keys(), bounds
    return dataclasses.field(default=default, metadata={"line": Line(meaning, bounds, choices, also, infinite)})


def check(field: Field, value) -> None:
    """UserError for a value out of the range that the setting's line gives; None, where its type has it, is in, and so
    is an empty list where that is the default."""
    if value == () != field.default:
        raise UserError(f"{field.name} needs a value.")
    for part in value if isinstance(value, tuple) else (value,):
        if part is not None and (demand := field.metadata["line"].demand(part)):
            raise UserError(f"{field.name} must be {demand}, not {value!r}.")


def convert(key: str, value, kind):
    """`value`, a text, a list of them or None, as `kind`, the type of a setting; UserError when it is not one."""
    if typing.get_origin(kind) is types.UnionType:
        if value is None or str(value).lower() in ("none", "null"):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return convert_list(key, value, *typing.get_args(kind))
    if isinstance(value, list):
        raise UserError(f"{key} takes one value, not {' '.join(map(str, value))!r}.")
    if value is None and kind is not str:
        raise UserError(f"{key} needs a value.")
    try:
        if kind is bool:
            return BOOLS[str(value).lower()]
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        if kind is float:
            return float(str(value).lower().replace(".inf", "inf"))  # as YAML writes it
        return int(float(value)) if kind is int else "" if value is None else kind(value)
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"{key} must be {KINDS[kind]}, not {value!r}.") from None


def convert_list(key: str, value, kind, *more) -> tuple:
    """As `convert` for a tuple; `more` holds an ellipsis where any number of parts will do."""
    if value in (None, "", []):  # as --stop= takes back what a file says
        return ()
    parts = value if isinstance(value, list | tuple) else [value] if kind is str else str(value).split(",")
    if ... not in more and len(parts) != 1 + len(more):
        raise UserError(f"{key} takes {1 + len(more)} values, not {' '.join(map(str, parts))!r}.")
    return tuple(convert(key, part, kind) for part in parts)


def groups_of(kind: type) -> dict[str, list[Field]]:
    """The settings of a dataclass by their headings, '' before the first, in the order of its lines."""
    fields, groups, heading = {field.name: field for field in dataclasses.fields(kind)}, {}, ""
    for name in kind.__annotations__:
        if name in fields:
            groups.setdefault(heading, []).append(fields[name])
        else:
            heading = getattr(kind, name)
    return groups


def explain(field: Field) -> str:
    """Name, type, default, meaning and range of a setting, in lines of at most `WIDTH` columns."""
    line = field.metadata["line"]
    head = f"  --{field.name:<26}{short_type(field.type):<7}{show(field.default):<11} "
    ends = f" ({line.range.removeprefix('one of ')})" if line.range else ""
    return textwrap.fill(line.meaning + ends, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def short_type(kind) -> str:
    parts = [part for part in typing.get_args(kind) if part not in (..., types.NoneType)]
    return SHORT[parts[0] if parts else kind] + "S" * (typing.get_origin(kind) is tuple)


def show(value) -> str:
    """A default as it would be typed; - for an empty list."""
    if isinstance(value, tuple):
        return ",".join(map(show, value)) or "-"
    return '""' if value == "" else str(value).lower() if value is None or isinstance(value, bool) else str(value)
