r"""Finding the answer in a response.

Thoughts: where a text has a thinking part, `<think>...</think>`, the answer is what stands behind it: behind the last
`</think>`, whether its `<think>` is in the text or a template wrote it; a thought that was opened and never closed has
no answer. That goes for marks and for last numbers. A second `</think>` at the very end is passed over. `<thinking>`,
`<Think>` and `<think >` are the same tag; thoughts between other marks are text.

Invented turns: a base model answers, then writes the next question and answers that too. The text ends where such a
turn begins behind an answer: at a control token (`<|im_start|>`, `</s>`...), at a line `Question:`, `## Problem 2`,
`User:`..., and behind a mark also at a `Question:` or the like that follows the end of a sentence; "the question:" is
none. Without a mark the line before must give an answer (`8`, `... = 8`, `The answer is 8`, `So 8`), or else a problem
is merely restated; before a speaker or a control token a number will do.
"""

import re

from engine.rewards.numerals import last_number
from engine.rewards.spelling import latex_of_unicode

_THOUGHT = re.compile("<(/?) ?think(?:ing)? ?>", re.IGNORECASE)
_BAR = "[|\uff5c]"
_CONTROL = (
    rf"<{_BAR}(?:im_start|im_end|start_header_id|user|assistant|system|eot_id|eom_id|end|end.of.text|endoftext"
    rf"|(?:begin|end).of.sentence){_BAR}>|<(?:start_of_turn|end_of_turn|eos|/s)>|\[INST\]"
)
_SPEAKER = r"(?:human|user|student|assistant)(?:\W{0,3}[:\uff1a]|[ \t*]*$)"
_TOPIC = r"(?:(?:next|new|another|follow-up|practice|similar)[ \t]+)?"
_TOPIC += "(?:question|problem|exercise|example|instruction|input|task|quiz|prompt|问题|题目)"
_HEADING = rf"(?:{_TOPIC}|q)[ \t]*(?:\d+\W{{0,3}}(?:[.:)]|$)|\W{{0,3}}[:\uff1a])|{_TOPIC}[ \t*]*$"
_LINE_TURN = re.compile(rf"{_CONTROL}|^[#>*_ \t-]*(?:{_SPEAKER}|(?P<heading>{_HEADING}))", re.MULTILINE | re.IGNORECASE)
_MIDLINE_TURN = re.compile(
    r"(?<=[.!?)}\]>$*\d])[ \t]+(?:Question|QUESTION|Problem|Q|Human|User)[ \t]*(?:\d+[.:)]|\d*\W{0,3}:)"
)
_GIVEN = re.compile(
    r"=|\banswer|\b(?:is|equals|makes|so|thus|hence|therefore|total|altogether)\b|^\W*(?:A:.*|[\d.,]+\W*)$",
    re.IGNORECASE,
)
_LABEL = re.compile(r"^\**(?:\\text\{)?(?:the )?(?:final )?answer(?: is\b|[:*])[:*\s]*\}?\s*", re.IGNORECASE)
_HASHED = re.compile(
    rf"#{{4,}}+[ \t]*+(?:(?:final )?answer[:*]*\s*\n\s*)?+(?!Step\b|(?:{_HEADING}))(.*)", re.IGNORECASE | re.MULTILINE
)
_LINE_LENGTH = 200


def extract_answer(text: str) -> str | None:
    """The answer marked in the text (`marked_answer`), or else its last number, or None."""
    answer = _answer_part(text)
    marked = _marked(answer)
    return last_number(latex_of_unicode(answer)) if marked is None else marked or None


def marked_answer(text: str) -> str | None:
    r"""What stands in the last `<answer>...</answer>`, else in the last `\boxed{...}`, else behind the last `####`.

    "" if the mark is there and nothing in it; None if there is no mark. A `\boxed{}` inside the tags is opened.
    """
    return _marked(_answer_part(text))


def behind_thoughts(text: str) -> str:
    """The text behind its last thought, "" if that was not closed."""
    rest = _with_plain_tags(text).rpartition("</think>")[2]
    return "" if "<think>" in rest else rest


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance (escaped ones do not count), or None."""
    boxes = _boxes(text)
    start = max(boxes, default=None)
    return None if start is None else text[start : boxes[start]]


def _answer_part(text: str) -> str:
    """The text behind its thoughts and before an invented turn; thoughts that follow such a turn are part of it."""
    parts = _with_plain_tags(text).split("</think>")
    depth = int(len(parts) > 1 and "<think>" not in parts[0])
    for part in parts:
        said = part.partition("<think>")[0]
        end = _end_of_turn(said) if depth == 0 else None
        if end is not None:
            return said[:end]
        depth = max(depth + part.count("<think>") - 1, 0)
    return behind_thoughts(text)


def _with_plain_tags(text: str) -> str:
    """The text with `<think>` and `</think>` spelled so, without a `</think>` at its end that closes nothing."""
    text = _THOUGHT.sub(r"<\1think>", text).rstrip()
    body = text.removesuffix("</think>")
    is_stray = body.count("</think>") > max(body.count("<think>") - 1, 0)
    return body if is_stray else text


def _end_of_turn(text: str) -> int | None:
    """Where the first invented turn behind an answer begins, or None."""
    marks = [mark.end() for mark in [re.search("</answer>", text)] if mark]
    marks += [mark.start(1) for mark in _HASHED.finditer(text) if mark[1]][:1] + list(_boxes(text).values())
    if marks:
        turns = [pattern.search(text, min(marks)) for pattern in (_LINE_TURN, _MIDLINE_TURN)]
        return min((turn.start() for turn in turns if turn), default=None)
    return next((turn.start() for turn in _LINE_TURN.finditer(text) if _follows_answer(turn)), None)


def _follows_answer(turn: re.Match) -> bool:
    """Whether the last line before the turn gives an answer; of a long one its end is read."""
    before = turn.string[max(turn.start() - _LINE_LENGTH, 0) : turn.start()]
    line = before.rstrip("-=*_#> \t\n").rpartition("\n")[2]
    if not re.search(r"\d", line) or _LINE_TURN.match(line):
        return False
    return not turn["heading"] or bool(_GIVEN.search(line))


def _marked(text: str) -> str | None:
    marked = _last_mark(text)
    return None if marked is None else _LABEL.sub("", marked.strip())


def _last_mark(text: str) -> str | None:
    before, closing, _ = text.rpartition("</answer>")
    _, opening, tagged = before.rpartition("<answer>")
    if closing and opening:
        tagged = tagged.partition("</answer>")[0]
        boxed = last_boxed(tagged)
        return tagged if boxed is None else boxed
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    hashed = _HASHED.findall(text)
    return hashed[-1] if hashed else None


def _boxes(text: str) -> dict[int, int]:
    r"""Where the content of each closed `\boxed{...}` starts and ends."""
    opened, boxes = [], {}
    for mark in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if mark[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{":
                boxes[start.end()] = mark.start()
        elif mark[0] == "{" or mark[0].startswith("\\boxed"):
            opened.append(mark)
    return boxes
