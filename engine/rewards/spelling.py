r"""One spelling for an answer: what people, models and LaTeX write in many ways without meaning anything else.

Unicode becomes LaTeX (`x²` is `x^{2}`, `√2` is `\sqrt{2}`, `½` is `\frac{1}{2}`, full-width digits are digits);
Markdown, colours, fonts, boxes, currency signs and invisible characters go; every space is one, and `\text` is the only
text command.
"""

import re
import unicodedata

_INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
_LATEX = {
    **dict.fromkeys(_INVISIBLE, ""),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u2018\u2019\u2032", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    **dict.fromkeys("\u00b7\u2219\u22c5", r"\cdot "),
    **dict.fromkeys("\u00ba\u02da", "°"),
    **dict.fromkeys("\u3002\uff61", "."),
    **{"×": r"\times ", "÷": r"\div ", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx "},
    **{"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∠": r"\angle ", "π": r"\pi ", "θ": r"\theta "},
    **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "ω": r"\omega "},
}
_CHARACTERS = str.maketrans(_LATEX)
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
_LEVEL = str.maketrans(_RAISED + _LOWERED, "0123456789+-n" * 2)
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_ROOT = re.compile(r"√\s*(\d+|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")
_BOLD = re.compile(r"(?<![\w)}\]])\*\*|\*\*(?![\w(\\])|`")
_CURRENCY = re.compile(r"\\?[$¢£¤¥฿\u20a0-\u20c0]")
_CODES = re.compile(r"\b(?:US|USD|EUR|GBP|INR|CAD|AUD|JPY|CNY|CHF|Rs\.?)\s*(?=[-+]?[\d.])")
_FONT = re.compile(
    r"(?<!\\)\\(?:(?:text)?color\s*\{\w+\}|(?:math(?:bf|it|sf|tt)|boldsymbol|bm|underline|boxed|fbox|emph|displaystyle"
    r"|textstyle|left|right|[bB]igg?[lr]?|bf|it|rm)(?![A-Za-z])|[()\[\]])"
)
_TEXT = re.compile(r"\\(?:mbox|hbox|mathrm|operatorname|text(?:rm|bf|it|sf|tt|normal))(?![A-Za-z])\s*")
_TINY = re.compile(r"\\!\s*|(?<=\d)\{,\}(?=\d{3})")
_SPACE = re.compile(r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+")
_AROUND = re.compile(r"^(?:\s*(?:=|:|\\approx(?![A-Za-z])))+|(?<!\.)[.,;:]\s*$")
_NOT = re.compile(r"\\not\s*(=|\\in(?![A-Za-z]))")
_HALF_DAY = re.compile(r" ?(?<![A-Za-z])([ap])\. ?m\b\.?", re.IGNORECASE)
_DEGREE = re.compile(r"\\degree(?![A-Za-z])|°|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])")


def latex_of_unicode(text: str) -> str:
    """The text in ASCII where ASCII or LaTeX has a spelling for it, every Unicode space as a plain one."""
    if text.isascii():
        return text
    for marks, mark in ((_RAISED, "^"), (_LOWERED, "_")):
        text = re.sub(f"[{marks}]+", lambda found: f"{mark}{{{found[0].translate(_LEVEL)}}}", text)
    text = _VULGAR.sub(_spell_fraction, text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1].strip('(){}')}}}", text)
    return unicodedata.normalize("NFKC", text.translate(_CHARACTERS))


def plain(text: str) -> str:
    """The text in the one spelling, without what stands around the answer: `**= $72.**` is `72`."""
    text = _BOLD.sub("", latex_of_unicode(text)).replace("**", "^").replace(r"\%", "%")
    text = _CODES.sub("", _CURRENCY.sub("", text))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = _TEXT.sub(r"\\text", _FONT.sub("", text))
    text = _DEGREE.sub(r"^\\circ ", _SPACE.sub(" ", _TINY.sub("", text)))
    text = _HALF_DAY.sub(r" \1m", _NOT.sub(lambda match: rf"\n{'e' if match[1] == '=' else 'otin'} ", text))
    return _bare(text)


def without_text(text: str) -> str:
    r"""`\text{ cm}` as ` cm`."""
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).split())


def _spell_fraction(match: re.Match) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _bare(text: str) -> str:
    """The text without full stop, equals sign, emphasis, quotes and braces around it, however often."""
    before = None
    while before != text:
        before, text = text, _AROUND.sub("", text).strip()
        emphasized = re.fullmatch(r"([*_]{1,2}|[\"'])([^*_\"']+)\1", text)
        text = emphasized[2] if emphasized else text[1:-1] if _is_group(text) else text
    return text


def _is_group(text: str) -> bool:
    """Whether the text is one `{...}`."""
    depth = 0
    for n, mark in enumerate(re.sub(r"\\.", "  ", text)):
        depth += (mark == "{") - (mark == "}")
        if depth == 0:
            return 0 < n == len(text) - 1
    return False
