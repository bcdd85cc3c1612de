"""Chats: what a template writes around texts, and texts that stay texts.

A control token is one that the tokenizer calls special, or that the template writes around a plain chat. Where data
spell one it is cut in two before it is encoded, so that only the template opens and closes turns. The tags of thoughts
and answers are no control tokens: whoever writes them means them.
A template may open the thoughts itself: then its opening and the answer are graded, and imitated, as one text.
"""

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jinja2.exceptions import SecurityError

from engine.errors import UserError, first_line

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_ANSWER, _NEXT = "qanswerq", "qnextq"  # to be found again, in whatever case
_SYSTEM = {"role": "system", "content": "x"}
_TURNS = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _NEXT},
]
_DIRECTIVES = [flag + c for flag in ("", "-") for c in "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%"]  # of strftime
_PRIVATE = range(0xE000, 0xF900)  # code points that mean nothing


def render(tokenizer, messages: list[dict], thinking: bool | None = None, *, prompt: bool = True) -> str:
    """The text of a chat, up to where the answer begins if `prompt`; UserError, in one sentence, if the template fails.

    `tokenizer.today`, a date, is what a template takes for today; without it the clock's.
    """
    today = getattr(tokenizer, "today", None) or datetime.date.today()
    template = _date(check_template(tokenizer), today)
    extra = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, tokenize=False, **extra
        )
    except SecurityError as error:
        raise UserError(
            f"The chat template does what its sandbox forbids ({first_line(error)}), so it is not run; take a model "
            "whose template does not."
        ) from None
    except Exception as error:  # a template is a program of somebody else's
        remedy, rest = "", [m for m in messages if m.get("role") != "system"]
        if 0 < len(rest) < len(messages):
            with contextlib.suppress(UserError):
                render(tokenizer, rest, thinking, prompt=prompt)
                remedy = "; it takes no system message: pass --system_prompt ''"
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise UserError(
            f"The chat template refuses a chat of the roles {roles} ({first_line(error)}){remedy}."
        ) from None


def check_template(tokenizer) -> str:
    """The chat template; UserError if there is none."""
    if template := _template(tokenizer):
        return template
    raise UserError(
        f"The tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruct model, or add one to its "
        "folder."
    )


def encode_prompt(tokenizer, messages: list[dict], thinking: bool | None = None) -> list[int]:
    """Token ids of a chat up to where the answer begins; what spells a control token in a message stays text.

    Raises UserError for a control token that cannot be told from text."""
    cut, mark = _scissors(tokenizer, messages)
    return _encode_pieces(tokenizer, render(tokenizer, cut(messages), thinking).split(mark))


def encode_text(tokenizer, text: str, behind: str = "") -> list[int]:
    """Token ids of a text `behind` another, of whose end alone they depend; what spells a control token stays text."""
    cut, mark = _scissors(tokenizer, text)
    return _encode_pieces(tokenizer, cut(text).split(mark), behind)


def encode_trace(tokenizer, messages: list[dict], trace: str, thinking: bool | None = None) -> list[int]:
    """Token ids of an answer to imitate: from where the prompt of `encode_prompt` ends to the end of the turn.

    Raises UserError for a trace with thoughts where the template has written empty ones already.
    """
    prompt = render(tokenizer, messages, thinking)
    rest = continue_thoughts(_find_thoughts(tokenizer, prompt, messages), trace)
    return [*encode_text(tokenizer, rest + _reading(tokenizer).tail, prompt), turn_end(tokenizer)]


def read_answer(tokenizer, ids: list[int], finish: str, opened: str = "") -> str:
    """The text of an answer as the model wrote it, behind the thoughts that its template has `opened`.

    Only the end of the turn (where `finish` is "eos") and padding are cut: special tokens in between are text.
    """
    ids = ids[:-1] if finish == "eos" else ids
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids = ids[:-1]
    return opened + tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def turn_end(tokenizer) -> int:
    """The token that ends an assistant's turn: what imitation learns to end with and a rollout stops at.

    It is the first added token that the template writes behind an answer, if need be at the head of the next turn;
    else EOS. Raises UserError where there is neither.
    """
    end = _reading(tokenizer).end
    if end is None:
        raise UserError(
            "The tokenizer has no EOS token and its chat template ends answers with nothing; set eos_token."
        )
    return end


def may_mistake(tokenizer) -> bool:
    """Whether `encode_prompt` and `encode_text` may find a control token in a text that they cannot part from it."""
    return _reading(tokenizer).loose


def opened_thoughts(tokenizer, messages: list[dict], thinking: bool | None = None) -> str:
    """What the template writes at the head of an answer: "<think>\\n", empty thoughts, or mostly ""."""
    return _find_thoughts(tokenizer, render(tokenizer, messages, thinking), messages)


def _find_thoughts(tokenizer, text: str, messages: list[dict]) -> str:
    """Of the prompt `text` of a chat, the thoughts at its end: behind what was asked and the header of the answer."""
    asked = messages[-1]["content"].strip()
    start = text.rfind(asked) + len(asked) if asked and asked in text else 0
    for token in _reading(tokenizer).control.finditer(text, start):
        start = token.end()
    return text[text.index("<think>", start) :] if "<think>" in text[start:] else ""


def continue_thoughts(opened: str, trace: str) -> str:
    """What of `trace` follows where the thoughts are open already: it opens none, and has empty ones if it had none."""
    if not opened:
        return trace
    if "</think>" in opened:
        if "<think>" in trace:
            raise UserError(
                "The trace has thoughts, but the chat template has written empty ones before it; "
                "leave enable_thinking out, or take the thoughts out of the traces."
            )
        return trace
    _, opens, thoughts = trace.partition("<think>")
    if opens and trace.lstrip().startswith("<think>"):
        space = opened.removeprefix("<think>")
        return thoughts.removeprefix(space) if thoughts.startswith(space) else thoughts.lstrip()
    if "</think>" in trace:
        return trace
    return "\n" * (2 - opened.count("\n")) + "</think>\n\n" + trace


@dataclass(frozen=True)
class _Reading:
    """What a chat template says of its control tokens (a pattern, and ids), and what it writes behind an answer."""

    control: re.Pattern
    ids: frozenset[int]
    loose: bool  # one of them may be seen in other letters, or cannot be cut
    tail: str  # text between an answer and the token that ends it
    end: int | None


@functools.lru_cache(maxsize=16)
def _date(template: str, today: datetime.date) -> str:
    """The template with the day's date for the clock's, which would make another prompt of the same row tomorrow.

    In the template's own language, for transformers hands a template no functions."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('%{c}', {today.strftime('%' + c)!r})" for c in _DIRECTIVES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


def _template(tokenizer) -> str:
    """The chat template; "" if there is none, or several of which none is the default."""
    with contextlib.suppress(ValueError):
        return tokenizer.get_chat_template() or ""
    return ""


def _reading(tokenizer) -> _Reading:
    return _read_template(tokenizer, _template(tokenizer), len(tokenizer))


@functools.lru_cache(maxsize=16)
def _read_template(tokenizer, template: str, size: int) -> _Reading:
    added = {t.content: t.special for t in tokenizer.added_tokens_decoder.values()}
    added |= dict.fromkeys(tokenizer.all_special_tokens, True)
    added = {text: special for text, special in added.items() if text.strip()}
    ends = {text for text in added if text != tokenizer.bos_token or text == tokenizer.eos_token}
    tail, end = _find_end(tokenizer, _any_of(ends))
    plain = _render_first(tokenizer, _TURNS)
    control = {text for text, special in added.items() if special or text in plain} - set(TAGS)
    loose = {t.content for t in tokenizer.added_tokens_decoder.values() if t.normalized or len(t.content) == 1}
    ids = frozenset(tokenizer.convert_tokens_to_ids(list(control)))
    return _Reading(_any_of(control), ids, bool(loose & control), tail, end)


def _find_end(tokenizer, added: re.Pattern) -> tuple[str, int | None]:
    """(text behind an answer, token that ends it): what stands there alone if that is EOS or stands there too when a
    turn follows, whose header else may be all that ends it."""
    found = []
    for chat in (_TURNS[:2], _TURNS):
        text = _render_first(tokenizer, chat, prompt=False)
        behind = text[text.lower().rfind(_ANSWER) + len(_ANSWER) :] if _ANSWER in text.lower() else ""
        token = added.search(re.split(_NEXT, behind, flags=re.IGNORECASE)[0])
        found.append((behind[: token.start()], token[0]) if token else None)
    alone, followed = found
    if alone and alone[1] == tokenizer.eos_token or not followed or followed[0].strip():
        followed = alone
    return (followed[0], tokenizer.convert_tokens_to_ids(followed[1])) if followed else ("", tokenizer.eos_token_id)


def _render_first(tokenizer, turns: list[dict], prompt: bool = True) -> str:
    """The turns behind a system message if the template takes one, without if not, "" if it takes neither."""
    for messages in ([_SYSTEM, *turns], turns):
        with contextlib.suppress(UserError):
            return render(tokenizer, messages, prompt=prompt)
    return ""


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Matches the longest of `texts`, or nothing if there is none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _scissors(tokenizer, value) -> tuple[Callable, str]:
    """(a function that puts a mark behind the first character of each control token in a value of JSON, the mark)."""
    texts = json.dumps(value, ensure_ascii=False, default=str) + _template(tokenizer)
    mark = next(chr(code) for code in _PRIVATE if chr(code) not in texts)
    control = _reading(tokenizer).control

    def cut(value):
        if isinstance(value, dict):
            return {key: cut(part) for key, part in value.items()}
        if isinstance(value, list):
            return [cut(part) for part in value]
        while isinstance(value, str) and control.search(value):  # cutting one may leave another that overlapped it
            value = control.sub(lambda found: split(found[0]), value)
        return value

    def split(token: str) -> str:
        if len(token) == 1:
            raise UserError(f"A text has the control token {token!r}, which cannot be told from it; take it out.")
        return token[0] + mark + token[1:]

    return cut, mark


def _encode_pieces(tokenizer, pieces: list[str], behind: str = "") -> list[int]:
    """Token ids of a text in pieces, none of them across two; the first is encoded `behind` a text, the others behind a
    line break, for at the start of a text some tokenizers put a space."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    reading, ids = _reading(tokenizer), []
    header = re.search(rf"(?:{reading.control.pattern})\Z", behind)
    anchor = header[0] if header else behind[-1:]
    for piece in pieces:
        head, whole = encode(anchor) if anchor else [], encode(anchor + piece)
        ids += whole[len(head) :] if whole[: len(head)] == head else encode(piece)
        anchor = "\n"
    written = sum(len(reading.control.findall(piece)) for piece in pieces)
    if sum(i in reading.ids for i in ids) > written:
        raise UserError("A text spells a control token in letters that the tokenizer takes for its own; take it out.")
    return ids
