r"""Numbers as people and models write them: reading one exactly, and finding the last one of a text.

A number is a whole, a decimal, a fraction, a mixed number (`2 1/2`, `2\frac{1}{2}`), in e-notation or with a power of
ten (`1.5e3`, `1.5\times 10^3`, `10^3`), with `million` or the like, with a repeating end (`0.\overline{3}`), or a word.
Thousands are set off by commas, single spaces or apostrophes, by threes or the Indian way. Decided, and in the tests:
  5 million is 5000000, never 5           50% is 50, not 0.5          5 k, 5 dozen, 2\pi are no numbers
  1e3 is 1000, e alone is Euler's         7,2 and 7 2 are no numbers  1.234.567 and 1.234,5 are none either
  0.333 is not 1/3, 0.\overline{3} is     four is 4, forty-two is 42  a unit, a currency, a degree sign do not count
  ≈ 72 is 72                              5 m is 5, 5m and 5 x not    2^3 is not 8, but 10^3 is 1000
  5万 is 50000, 5个 is 5, 5半 is none     9 PM is 9, but not 9 AM     5 tenths, 5 grand, 5\pi, 5 below zero are none
"""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2}){1,4},\d{3}|[1-9]\d{0,2}(?:[ ']\d{3})+|\d+)(?!\d)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_TIMES_TEN = r"\s*(?:\\times|\\cdot|[*xX])\s*10\s*\^\s*"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>{_DIGITS})\s+(?=\d+\s*/))?(?P<top>{_DECIMAL})(?:\s*/\s*(?P<bottom>{_DECIMAL}))?"
    rf"(?:(?:{_TIMES_TEN}|[eE](?=[+-]?\d))\{{?\s*(?P<power>[+-]?\d{{1,3}})(?!\d)\s*\}}?)?",
    re.ASCII,
)
_PLAIN_FRACTION = re.compile(
    rf"\\frac\s*(?:\{{\s*([+-]?{_DECIMAL})\s*\}}|(\d))\s*(?:\{{\s*({_DECIMAL})\s*\}}|(\d))", re.ASCII
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?", re.ASCII)
_SCALES = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
_SCALES |= {"百": 2, "千": 3, "万": 4, "亿": 8}
_SCALE_WORD = rf"(?:{'|'.join(_SCALES)})s?(?![A-Za-z克米瓦])"
_SCALE = re.compile(rf"[\s-]*({_SCALE_WORD})", re.IGNORECASE)
_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_SMALL += "seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: n for n, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_WORDS |= {f"{ten} {_SMALL[n]}": _WORDS[ten] + n for ten in _TENS for n in range(1, 10)}

_POWER = r"(?:\s*\^\s*\{?\s*-?[23]\s*\}?)?"
_WORD = rf"[A-Za-z]{{2,}}\.?{_POWER}"
_TEXT_UNIT = rf"\\text\{{[^{{}}\d]*\}}{_POWER}"
_ORDINAL = r"\^\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)\s*\}{0,2}"
_CHINESE_UNIT = r"(?:(?![零一二两三四五六七八九十半])[\u4e00-\u9fff]){1,4}"
_UNIT = re.compile(
    rf"%|{_CHINESE_UNIT}|\^\\circ\s*(?:[CF]|\\text\{{\s*[CF]\s*\}})?|{_ORDINAL}|{_TEXT_UNIT}(?:\s*/\s*{_TEXT_UNIT})?"
    rf"|[mgslhL]{_POWER}(?:/[a-z]{_POWER})?|{_WORD}(?:(?:\s+|\s*/\s*){_WORD}|/[a-z]{_POWER}){{0,3}}"
)
_UNIT_AT_END = re.compile(rf"(?<=[\w}})])(?:\s*{_TEXT_UNIT}|(?:\s+[a-z]{{2,}}{_POWER})+)$")
_ATTACHED_UNITS = set("cm mm km km/h m/s kg mg ml lb lbs oz ft mph hr hrs min mins sec am pm st nd rd th".split())
_SHORT_UNITS = _ATTACHED_UNITS | set("in yd mi dm cl dl nm ha kw mw kb mb gb tb hz rs ms cc sq cu by of".split())
_LETTER_UNITS = set("mgslhLCFNJWVa")
_NOT_UNITS = set(
    "or and to not is than if no dozen half halve quarter third fifth sixth seventh eighth ninth tenth eleventh "
    "twelfth divided choose remainder modulo mod base out below under negative minus plus times over squared cubed "
    "factorial sqrt root sin cos tan cot csc log ln exp binary octal hex hexadecimal mil mio mln grand lac ppm ppb "
    "permille gross score mill mille kilo fourth double twice doubled tripled halved raised fold infinity undefined "
    "sine cosine tangent sinh cosh tanh "
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda rho sigma tau phi chi psi omega".split()
)
_NOT_UNITS |= {*_SCALES, *_SMALL, *_TENS}
_NOT_UNIT = re.compile(r"\w+(?:teenth|tieth|ndredth|sandth)|\w*illi(?:on|ard)\w*|arc\w+")

_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_LATEX_FRACTION = rf"\\[dtc]?frac\s*(?:{_GROUP}|\d)\s*(?:{_GROUP}|\d)"
_SYMBOL = rf"(?:\\sqrt\s*(?:\[\d+\])?(?:{_GROUP}|\d)|\\pi(?![A-Za-z]))"
_GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)(?![A-Za-z])|pi(?![A-Za-z])"
_CHANGES = r"(?:\(?(?:in )?base \d+\)?|(?-i:[kKMB])|bn|mn|mil|mio|grand|dozen|squared|cubed|factorial|‰)"
_LAST = re.compile(
    r"(?<![\w^])(?<![_^]\{)(?<!\^[-+])(?<!\^\{[-+])(?:(?:(?<== )|(?<=is ))[-+] |(?<![\w)])[-+])?"
    r"(?:\\pm ?)?(?:\$|(?:USD?|EUR|GBP|INR|Rs\.?)\s?)?(?:"
    r"\d{4}-\d\d-\d\d(?!\d)|\d{1,2}/\d{1,2}/\d{2,4}(?!\d)|\d+(?::\d+)+|\d+(?:\.\d+){2,}"
    rf"|\d+ \d+/\d+|(?:\d+ ?)?{_LATEX_FRACTION}|{_SYMBOL}|\d*\.\d*\\(?:overline|bar)\s*\{{?\d+\}}?"
    rf"|(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?![.,]?\d)(?:/\d+)?|\d+(?:[.,]\d+)+)"
    rf"(?:e[+-]?\d+(?!\w)|{_TIMES_TEN}\{{?[+-]?\d+\}}?|[_^](?:[+-]?\d+|\{{[+-]?\d+\}})|(?-i:[inxyzkKMB])(?!\w))?"
    rf"(?: ?(?:{_SYMBOL}|{_GREEK}))?(?: ?(?:/|\\div) ?\d+)?"
    rf"(?:[ -]?{_SCALE_WORD})*(?: ?{_CHANGES}(?!\w))?",
    re.ASCII | re.IGNORECASE,
)
_SPELLED = [
    (re.compile(r"(?<=\d)\*\*(?=\d)"), "^"),
    (re.compile(rf"(?<=[\d}}])[\s$*,;~\\]*(?:\\text\s*\{{\s*)?({_SCALE_WORD})\}}?", re.IGNORECASE), r" \1"),
    (re.compile(r"\{?(\d+) ?\\over ?(\d+)\}?"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=\d) and (?=\d+/\d)"), " "),
    (re.compile(r"\bnegative (?=[$\d])|(?<=is )minus (?=[$\d])|(?<== )minus (?=[$\d])", re.IGNORECASE), "-"),
]


def last_number(text: str) -> str | None:
    r"""The last number of the text, or None: no exponent, index or part of a word, and no `3.` of a list cut short.

    It is what stands there, save that `72\text{ million}` is `72 million`, `2**3` is `2^3` and `negative 3` is `-3`.
    """
    body, _, last_line = text.rstrip().rpartition("\n")
    item = re.fullmatch(r"[*# \t]*(\d{1,3})[.)]", last_line)
    if item and re.search(rf"^[*# \t]*(?:Step )?{int(item[1]) - 1}[.)]", body, re.MULTILINE):
        text = body
    for spelled, number in _SPELLED:
        text = spelled.sub(number, text)
    found = [match[0] for match in _LAST.finditer(text)]
    return found[-1] if found else None


def read_number(text: str) -> Fraction | None:
    """The value of a `plain` text that is one number and perhaps a unit, else None."""
    text = re.sub(r"^\\text\{([^{}]*)\}$", r"\1", text).strip()
    if text[:1].isalpha():
        return _read_words(text)
    text = _REPEATING.sub(_unroll, re.sub(r"^\(([^(),]*)\)$", r"\1", text))
    text = re.sub(r"^([+-]?)10\s*\^", r"\1 1*10^", text)
    match = _NUMBER.match(with_slashes(text).strip())
    if not match:
        return None
    scale, unit = _split_scale(match.string[match.end() :])
    sign, whole, top, bottom, power = match.group("sign", "whole", "top", "bottom", "power")
    parts = (whole or "0", top, bottom or "1")
    whole, top, bottom = (Fraction(re.sub("[, ']", "", part).rstrip(".")) for part in parts)
    if bottom == 0 or not _is_unit(unit):
        return None
    return (whole + top / bottom) * Fraction(10) ** (int(power or 0) + scale) * (-1 if sign == "-" else 1)


def with_slashes(text: str) -> str:
    r"""The text with ` 1/2` for `\frac{1}{2}` where both are numbers."""
    return _PLAIN_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)


def without_unit(text: str) -> str:
    """An expression without the unit behind it."""
    match = _UNIT_AT_END.search(text)
    return text[: match.start()] if match and _is_unit(match[0]) else text


def _read_words(text: str) -> Fraction | None:
    value = _WORDS.get(text.lower().replace("-", " "))
    return None if value is None else Fraction(value)


def _unroll(match: re.Match) -> str:
    r"""`1.2\overline{34}` as a mixed number, `1 (234 - 2)/990`."""
    whole, fixed, again = match.groups()
    top = int(fixed + again) - int(fixed or 0)
    return f"{whole or 0} {top}/{'9' * len(again)}{'0' * len(fixed)}"


def _split_scale(rest: str) -> tuple[int, str]:
    """(the power of ten in words like `million`, what follows them)."""
    power, plain_rest = 0, re.sub(r"^\s*\\text\{([^{}]*)\}", r"\1", rest)
    while match := _SCALE.match(plain_rest):
        power += _SCALES[match[1].lower().removesuffix("s")]
        rest = plain_rest = plain_rest[match.end() :]
    return power, rest


def _is_unit(rest: str) -> bool:
    """Whether what follows a number leaves its value alone."""
    unit = rest.strip()
    if not unit:
        return True
    return bool(_UNIT.fullmatch(unit)) and all(map(_is_unit_word, re.findall("[A-Za-z]+", unit))) and _may_stand(rest)


def _is_unit_word(word: str) -> bool:
    name = word.lower()
    if len(name) < 3:
        return name in _SHORT_UNITS if len(name) == 2 else word in _LETTER_UNITS
    return not any(each in _NOT_UNITS or _NOT_UNIT.fullmatch(each) for each in (name, name.removesuffix("s")))


def _may_stand(rest: str) -> bool:
    """Whether what follows a number may follow it as it does: without a space only `cm` and the like."""
    return not (rest[0].isascii() and rest[0].isalpha()) or rest.strip().lower() in _ATTACHED_UNITS
