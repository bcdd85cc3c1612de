"""Finding the answer in a response, and telling whether it is the truth.

Numbers are compared as exact fractions, words as text, anything else by `latex.same_latex`. A unit or a percent sign
after a number is not compared: "50%" is "50", and is not "0.5".
"""

import re
from fractions import Fraction

from engine.rewards.latex import same_latex

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?:[A-Za-z]\s*=\s*)?(?P<sign>[+-]?)\s*(?:(?P<whole>{_DIGITS})\s+(?=\d+\s*/))?(?P<top>{_DECIMAL})"
    rf"(?:\s*/\s*(?P<bottom>{_DECIMAL}))?(?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{{?(?P<power>[+-]?\d{{1,2}})\}}?)?",
    re.ASCII,
)
_LAST_NUMBER = re.compile(rf"(?:(?<![\w)])[-+])?\$?(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:/\d+)?", re.ASCII)
_FRACTION = re.compile(
    rf"\\frac\s*(?:\{{\s*([+-]?{_DECIMAL})\s*\}}|(\d))\s*(?:\{{\s*({_DECIMAL})\s*\}}|(\d))", re.ASCII
)
_TEXT = r"\\(?:text|mbox|mathrm|textrm|textbf)\s*"
_SQUARED = r"(?:\s*\^\s*\{?[23]\}?)?"
_WORD = rf"[A-Za-z]{{2,}}\.?{_SQUARED}"
_UNIT = re.compile(
    rf"%|°|\^\s*\{{?\s*\\circ\s*\}}?|{_TEXT}\{{[^{{}}\d]*\}}{_SQUARED}"
    rf"|{_WORD}(?:(?:\s+|\s*/\s*){_WORD}|/[a-z]){{0,3}}"
)
_ATTACHED_UNITS = set(
    [
        "cm",
        "mm",
        "km",
        "kg",
        "mg",
        "ml",
        "lb",
        "lbs",
        "oz",
        "ft",
        "mph",
        "hr",
        "hrs",
        "min",
        "mins",
        "sec",
        "am",
        "pm",
        "st",
        "nd",
        "rd",
        "th",
    ]
)
_NOT_UNITS = set(
    [
        "or",
        "and",
        "to",
        "not",
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "dozen",
        "half",
        "halves",
        "third",
        "thirds",
        "fourths",
        "fifths",
        "tenths",
        "hundredths",
        "pi",
        "squared",
        "cubed",
        "factorial",
        "times",
        "plus",
        "minus",
        "over",
        "sqrt",
        "mod",
        "base",
        "out",
        "of",
    ]
)
_OPERATOR = re.compile(r"[\w)}.]\s*(?:[-+*/^=<>]|\\(?:cdot|times|div|pm|mp)\b)")
_PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z ,.'()]*|\([A-Za-z]\)")
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\uff0d"), "-")
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2009\u202f"), " ")
_MAX_LENGTH = 400


def extract_answer(text: str) -> str | None:
    """The answer marked in the text (`marked_answer`), or else its last number, or None."""
    marked = marked_answer(text)
    if marked is not None:
        return marked or None
    numbers = _LAST_NUMBER.findall(text.translate(_DASHES | _SPACES))
    return numbers[-1] if numbers else None


def marked_answer(text: str) -> str | None:
    r"""What stands in the last `<answer>...</answer>`, else in the last `\boxed{...}`, else behind the last `####`.

    "" if the mark is there and nothing in it; None if there is no mark. A `\boxed{}` inside the tags is opened.
    """
    before, closing, _ = text.rpartition("</answer>")
    _, opening, tagged = before.rpartition("<answer>")
    if closing and opening:
        tagged = tagged.partition("</answer>")[0]
        boxed = last_boxed(tagged)
        return (tagged if boxed is None else boxed).strip()
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    hashed = re.findall(r"####[ \t]*(.*)", text)
    return hashed[-1].strip() if hashed else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance (escaped ones do not count), or None."""
    opened, content = [], {}
    for mark in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if mark[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{":
                content[start.end()] = text[start.end() : mark.start()]
        elif mark[0] == "{" or mark[0].startswith("\\boxed"):
            opened.append(mark)
    return content[max(content)] if content else None


def same_answer(predicted: str | None, truth: str) -> bool:
    """Whether `predicted` is `truth`, spelling aside.

    Spelling is: commas, $, %, units, a full stop, leading zeros, decimals, fractions, mixed numbers, LaTeX layout.
    Where the truth is a number, the prediction must be one too: "40+32" is not "72". Expressions go to math-verify.
    Texts over 400 characters are compared as they stand.
    """
    if predicted is None or not predicted.strip():
        return False
    if max(len(predicted), len(truth)) > _MAX_LENGTH:
        return predicted.strip() == truth.strip()
    left, right = _clean(predicted), _clean(truth)
    left_number, right_number = _read_number(left), _read_number(right)
    if left_number is not None and right_number is not None:
        return left_number == right_number
    left_text, right_text = (re.sub(rf"{_TEXT}\{{([^{{}}]*)\}}", r"\1", side).strip() for side in (left, right))
    if _squeeze(left_text) == _squeeze(right_text):
        return True
    if _PLAIN_WORDS.fullmatch(left_text) or _PLAIN_WORDS.fullmatch(right_text):
        return False
    if right_number is not None and ("\\" not in left or _OPERATOR.search(left)):
        return False
    return same_latex(left, right)


def _clean(text: str) -> str:
    """The text without dollar signs, layout commands and full stop, and with one spelling of what is left."""
    text = text.translate(_DASHES | _SPACES)
    for spelled, plain in {"\\$": "", "$": "", "\\%": "%", "{,}": ","}.items():
        text = text.replace(spelled, plain)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|(?<!\\)\\[!,;:()\[\] ]", "", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text).strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def _squeeze(text: str) -> str:
    """Spaces gone, save between digits; capitals too where there are words only, for in mathematics R is not r."""
    is_words = re.fullmatch(r"[A-Za-z]{2,}[A-Za-z ]*", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.casefold() if is_words else text)


def _read_number(text: str) -> Fraction | None:
    """The value of a text that is one number and perhaps a unit, else None."""
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text).strip()
    match = _NUMBER.match(text)
    if not match or not _is_unit(text[match.end() :]):
        return None
    sign, whole, top, bottom, power = match.group("sign", "whole", "top", "bottom", "power")
    top, bottom = (Fraction((part or "1").replace(",", "").rstrip(".")) for part in (top, bottom))
    if bottom == 0:
        return None
    value = (int(whole.replace(",", "")) if whole else 0) + top / bottom
    return value * Fraction(10) ** int(power or 0) * (-1 if sign == "-" else 1)


def _is_unit(rest: str) -> bool:
    """Whether what follows a number leaves its value alone."""
    unit = rest.strip().lower()
    if not unit:
        return True
    names = set(re.findall(r"[a-z]+", unit))
    is_attached = rest[0].isalpha()
    return bool(_UNIT.fullmatch(unit)) and not names & _NOT_UNITS and (not is_attached or unit in _ATTACHED_UNITS)
