r"""Telling whether an answer is the truth.

Numbers are compared as exact fractions (`numerals.read_number`), words, dates, times and numbers in a base as text,
anything else by `latex.same_latex`, exactly too. Decided, and in the tests: `x = 5` is 5, and is neither `y = 5` nor
what `xy = 5` says; `C` is `(C)`; `3:4` is `3/4`, but neither `6:8` nor 0.75, as `10:30` is not `1:3`; `1011_2` is
neither 1011 nor 11; `2024-01-05` is not 2018; `(x,y) = (1,2)` and `y = 2, x = 1` are (1,2); `48+24 = 72` is 72, though
`71 = 72` is not; `(B) 30` is B.
"""

import re
from fractions import Fraction

from engine.rewards.latex import same_latex
from engine.rewards.numerals import read_number, with_slashes, without_unit
from engine.rewards.spelling import plain, without_text

_SIMPLE = re.compile(r"\s*-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?\s*", re.ASCII)
_NAME = re.compile(
    r"(\([A-Za-z](?: ?, ?[A-Za-z])+\)|[A-Za-z](?:_\{?\w+\}?)?'?|\\[a-z]+|[A-Za-z](?:\^\{-1\}|')?\s*\([^()=]*\)"
    r"|\{[A-Za-z]\}|\{?[A-Z]\}?\^\{-1\}|(?:m?\\(?:angle|triangle|overline) ?)?\{?[A-Z]{1,3}\}?"
    r"|\\text\{[^{}]*\}|[A-Z][a-z]{2,})\s*(?:=|\\in(?![A-Za-z]))\s*(?=[^=]+$)"
)
_BASE = re.compile(r"(-?[0-9A-Z]+)(?: ?_ ?\{?(\w+)\}?| ?\(?(?:in )?base (\w+)\)?)", re.IGNORECASE | re.ASCII)
_STAMP = re.compile(r"\d+(?:[-/.]\d+){2,}(?:[T ].*)?|\d+(?: ?: ?\d+)+(?: ?[ap]\.? ?m\.?)?", re.IGNORECASE | re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d(\[{,])\d{1,3}(?:,\d{3})+(?=\s*(?:\\pi|\\sqrt|[A-Za-z]))", re.ASCII)
_OPPOSITES = re.compile(r"(?<![A-Za-z])(?:[ap]m|noon|midnight|north|south|east|west|profit|loss)\b", re.IGNORECASE)
_AND = re.compile(r",?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*\}|\s(?:and|or)\s)\s*")
_WORKING = re.compile(r"[^=A-Za-z]*\d\)?\s*(?:[-+*/^]|\\(?:times|cdot|div) )[^=A-Za-z]*= ?([^=]+)")
_LETTER = re.compile(r"\(?[A-Z]\)?")
_CHOICE = re.compile(r"\(?([A-Z])[).:] (?![-+*/^=])(?:[^\\A-Za-z]|\\[a-z]+)+")
_AND_WORD = re.compile(r"\b(?:and|or)\b")
_INEQUALITY = re.compile(r"[<>]|\\[lg]e")
_OPERATOR = re.compile(r"[\w)}.]\s*(?:[-+*/^=<>]|\\(?:cdot|times|div|pm|mp|approx|ne|neq|sim|to)\b)")
_PLAIN_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z ,.'()]*")
_DOTS = re.compile(r"\d ?_|\.\.|\\[cl]?dots")
_PROPER_NAME = re.compile(r"(?<![\\A-Za-z])[A-Z][a-z]{2,}")
_LIST_OF_NAMES = re.compile(r"[A-Za-z] ?= ?[^=,<>]+(?:, ?[A-Za-z] ?= ?[^=,<>]+)+")
_SPACED_DIGITS = re.compile(r"(?<!frac )\d +\d(?!\d*\s*/)")
_CAPITALS = "Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega"
_OVERLOOKED = re.compile(rf"'|\\(?:{_CAPITALS}|not|[pb]?mod)(?![A-Za-z])")
_SHARE = r"[+-]?\s*(?:\d+(?:\s*/\s*\d+)?|\\frac\s*(?:\{-?\d+\}|\d)\s*(?:\{\d+\}|\d))?\s*"
_MATRIX = rf"{_SHARE}\\begin\{{[\w*]+\}}(?:(?!\\begin).)*?\\end\{{[\w*]+\}}(?:\s*\^\s*\{{?\s*(?:T|\\top)\s*\}}?)?\s*"
_MATRICES = re.compile(rf"(?:\\det)?\s*\(?(?:(?:,|\\cdot|\\times)?\s*{_MATRIX})+\)?", re.DOTALL)
_HUGE_POWER = re.compile(r"\^\s*\{?\s*[+-]?\d{7}|\^\s*\{?\s*\d+\s*\^")
_MAX_LENGTH = 400


def same_answer(predicted: str | None, truth: str) -> bool:
    """Whether `predicted` is `truth`, spelling aside.

    Spelling is what `spelling.plain` and `numerals` say, and a unit or a percent sign behind a number. Where the truth
    is a number, the prediction must be one too: "40+32" is not "72". Expressions go to math-verify. Texts over 400
    characters are compared as they stand.
    """
    if predicted is None or not predicted.strip():
        return False
    if max(len(predicted), len(truth)) > _MAX_LENGTH:
        return predicted.strip() == truth.strip()
    if _SIMPLE.fullmatch(predicted) and _SIMPLE.fullmatch(truth):
        return Fraction(re.sub("[$,]", "", predicted)) == Fraction(re.sub("[$,]", "", truth))
    left, right = _without_names(plain(predicted), plain(truth))
    right_number = read_number(right)
    left = _without_working(left, right, right_number is not None)
    left_number = read_number(left)
    if left_number is not None and right_number is not None:
        return left_number == right_number and _agree(_OPPOSITES, left, right)
    left_text, right_text = _squeeze(left), _squeeze(right)
    if left_text == right_text:
        return left_text != ""
    if _is_text(left) or _is_text(right):
        return left_text.replace(":", "/") == right_text.replace(":", "/")
    is_unworked = right_number is not None and ("\\" not in left or _OPERATOR.search(left))
    if is_unworked or sorted(_OVERLOOKED.findall(left)) != sorted(_OVERLOOKED.findall(right)):
        return False
    if _INEQUALITY.search(left) and not _agree(_AND_WORD, left, right):
        return False
    return same_latex(_expression(left), _expression(right))


def _agree(pattern: re.Pattern, left: str, right: str) -> bool:
    """Whether the two sides hold the same of what the pattern finds, or one of them nothing."""
    found = [{word.lower() for word in pattern.findall(side)} for side in (left, right)]
    return found[0] == found[1] or not all(found)


def _expression(side: str) -> str:
    r"""The side without a unit, the comma of `12,348\pi` and the word of `2\text{, and }3`; `y=1, x=2` as `(2, 1)`."""
    side = _AND.sub(", ", _THOUSANDS.sub(lambda match: match[0].replace(",", ""), without_unit(side)))
    if not _LIST_OF_NAMES.fullmatch(side):
        return side
    values = [[part.strip() for part in equation.split("=")] for equation in side.split(",")]
    is_point = len({name for name, _ in values}) == len(values)
    return f"({', '.join(value for _, value in sorted(values))})" if is_point else side


def _without_names(left: str, right: str) -> tuple[str, str]:
    """Both without the `x =` before them, where both have the same, or one has one and the other is no equation."""
    matches = _match_name(left), _match_name(right)
    names = {_squeeze(match[1]).strip("{}") for match in matches if match}
    bare = [side[match.end() :] if match else side for side, match in zip((left, right), matches)]
    return tuple(bare) if len(names) == 1 and not any("=" in side for side in bare) else (left, right)


def _without_working(left: str, right: str, is_number: bool) -> str:
    """The left side without its `48+24 =` where the right one is a number, or its `30` of `(B) 30` where it is `B`."""
    if not is_number and not _LETTER.fullmatch(without_text(right)):
        return left
    match = (_WORKING if is_number else _CHOICE).fullmatch(without_text(left))
    return match[1] if match else left


def _match_name(side: str) -> re.Match | None:
    """The `x =` or `(x, y) =` a side begins with; none where the names are not in their order."""
    match = _NAME.match(side)
    letters = re.findall("[A-Za-z]", match[1]) if match and match[1].startswith("(") else []
    return match if letters == sorted(letters) else None


def _squeeze(text: str) -> str:
    """The text to compare as it stands: no spaces save between digits, no capitals where it is words, `C` for `(C)`."""
    text = re.sub(r"^\(?([A-Za-z])\)$", r"\1", with_slashes(without_text(text)).strip())
    if match := _BASE.fullmatch(text):
        base = read_number(match[2] or match[3]) or match[2] or match[3]
        return match[1] if base == 10 else f"{match[1].upper()}_{base}"
    if _STAMP.fullmatch(text):
        return re.sub(r"\b0+(?=\d)|[ .](?!\d)|(?<=:) ", "", text.casefold())
    is_words = re.fullmatch(r"[A-Za-z]{2,}[A-Za-z ]*", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.casefold() if is_words else text)


def _is_text(side: str) -> bool:
    """Whether an answer has no value but its letters: words, a date or a time, a number in a base, `1, 2, ...`, or
    what math-verify would misread or not get done with: `2 3`, what stands around a matrix, towers of exponents."""
    text = without_text(side)
    if any(pattern.fullmatch(text) for pattern in (_PLAIN_WORDS, _STAMP, _BASE)):
        return True
    if r"\begin" in side and not _MATRICES.fullmatch(side):
        return True
    return any(pattern.search(text) for pattern in (_PROPER_NAME, _DOTS, _SPACED_DIGITS, _HUGE_POWER))
