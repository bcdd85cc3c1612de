r"""What stands in a cell: an answer, a prompt, a trace or one of a pair.

A reader raises ValueError with what follows "the answer in column 'answer'" in the sentence that the user reads.

Pairs are read in all forms that are about: an answer is text, one message, or the last turn of a whole chat, whose
turns before it are the prompt; messages have role and content or, of ShareGPT, from and value; and a whole chat may be
a text as in Anthropic's HH, "\n\nHuman: ...\n\nAssistant: ...".
"""

import datetime
import re
from decimal import Decimal

_CALCULATOR_MARK = re.compile(r"<<.*?>>")
_INSTRUCTORS = ("system", "developer")
_ASKERS = ("user", "human", "prompter", "tool", "tool_response", "function", "ipython", "interpreter", "observation")
_CHAT = "a list of chat messages, each with role and content (text)"
_CHAT_AS_TEXT = re.compile(
    r"""\s*(\[\s*)?\{(?=.*["'](role|from)["']\s*:)(?=.*["'](content|value)["']\s*:).*\}\s*(\]\s*)?""", re.DOTALL
)
_MAX_DIGITS = 1000
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_HH = {"Human": "user", "Assistant": "assistant"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def write_out(cell: object) -> str:
    """The cell as text: text as it is, a number in plain decimal, a truth value as JSON has it, a day as 2024-01-05."""
    if isinstance(cell, str):
        return _whole(cell)
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int):
        return str(cell)
    if isinstance(cell, float | Decimal):
        return _write_number(Decimal(str(cell)))
    if isinstance(cell, datetime.date) and not isinstance(cell, datetime.datetime):
        return cell.isoformat()
    what = f"neither text nor a plain number but {type(cell).__name__} {cell!s:.100}"
    raise ValueError("is empty" if cell is None else f"is {what}")


def _write_number(number: Decimal) -> str:
    if not number.is_finite():
        raise ValueError(f"is {number}, which is no number")
    if abs(number.adjusted()) >= _MAX_DIGITS:
        raise ValueError(f"is {number:.10g}, which is too long to write out")
    return f"{number:f}"


def read_plain(text: str) -> tuple[str, None]:
    """(answer, None)."""
    if not text.strip():
        raise ValueError("is empty")
    return text.strip(), None


def read_rationale(text: str) -> tuple[str, str]:
    """(answer without commas, GSM8K's rationale as a tagged trace)."""
    rationale, mark, answer = text.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        raise ValueError("does not end in '#### number'")
    rationale = _CALCULATOR_MARK.sub("", rationale).strip()
    return answer, f"<think>\n{rationale}\n</think>\n<answer>{answer}</answer>"


def read_prompt(cell: object) -> str | list[dict]:
    """The cell itself if it is text, or chat messages of which the last, instructions aside, is not the model's."""
    if isinstance(cell, str) and cell.strip():
        return _read_text(cell)
    if not _is_chat(cell):
        raise ValueError(f"is neither text nor {_CHAT}, but {cell!r:.100}")
    turns = [message for message in cell if _role(message) not in _INSTRUCTORS]
    if not turns:
        raise ValueError("is a chat in which nobody asks (it has no turn but the system's)")
    if _is_model(turns[-1]):
        raise ValueError(
            f"ends with the model's own turn, of {turns[-1]['role']!r}, and gives the answer away (end it with a turn "
            "of 'user' or 'tool'; or, to imitate its last turn, name the column with --trace_column too)"
        )
    if not turns[-1]["content"].strip():
        raise ValueError("ends with a turn in which nothing is said")
    for message in cell:
        _whole(message["content"])
    return cell


def read_trace(cell: object) -> str:
    """The cell itself if it is text, or what is said in a chat that is the model's one turn."""
    if _is_chat(cell) and len(cell) == 1 and _is_model(cell[0]):
        cell = cell[0]["content"]
    if not isinstance(cell, str) or not cell.strip():
        raise ValueError(f"is neither text nor a list of one chat message, the model's, but {cell!r:.100}")
    return _read_text(cell)


def read_chat_prompt(cell: object) -> list[dict]:
    """All of a chat but its last turn, which is the model's."""
    if not _is_chat(cell) or not _is_model(cell[-1]):
        raise ValueError(f"is also the trace, but not {_CHAT}, that ends with the model's turn: {cell!r:.100}")
    return read_prompt(cell[:-1])


def read_chat_trace(cell: object) -> str:
    """The last turn of a chat."""
    return read_trace(cell[-1]["content"])


def read_pair_prompt(cell: object) -> str | list[dict]:
    """As `read_prompt`, of ShareGPT's messages too."""
    return read_prompt(_to_chat(cell))


def read_choice(cell: object) -> tuple[list[dict], str]:
    """(the turns before an answer, none where it stands alone; the answer)."""
    chat = _split_text(cell) if isinstance(cell, str) else _to_chat([cell] if isinstance(cell, dict) else cell)
    if chat in (None, []):
        raise ValueError("is empty")
    if not _is_chat(chat):
        raise ValueError(f"is neither text nor a chat message or {_CHAT}, but {cell!r:.100}")
    *turns, last = chat
    if not _is_model(last):
        raise ValueError(f"ends with a turn of {last['role']!r}, not with the model's")
    if not last["content"].strip():
        raise ValueError("is empty")
    return _check_turns(turns), _read_text(last["content"])


def join_pair(
    prompt: str | list[dict] | None, chosen: tuple[list[dict], str], rejected: tuple[list[dict], str]
) -> tuple[str | list[dict], str, str]:
    """(prompt, chosen answer, rejected answer) of what was read; `prompt`: None where it comes with the answers.

    Raises ValueError, with a whole sentence, where they do not fit together."""
    (turns, best), (others, worst) = chosen, rejected
    if list(map(_said, turns)) != list(map(_said, others)):
        raise ValueError("the prompts of chosen and rejected differ (their chats must be equal but for the last turn)")
    if best.strip() == worst.strip():
        raise ValueError("chosen and rejected are the same answer")
    if not turns and prompt is None:
        raise ValueError("chosen and rejected have no prompt before them (name its column with --prompt_column)")
    if turns and prompt is not None and not _contents(prompt) <= _contents(turns):
        raise ValueError(
            "the prompt is not that of the chats in chosen and rejected (to go by theirs, name the column of the "
            "chosen with --prompt_column too)"
        )
    return turns or prompt, best, worst


def _check_turns(turns: list[dict]) -> list[dict]:
    try:
        return read_prompt(turns) if turns else []
    except ValueError as error:
        raise ValueError(f"has a prompt that {error}") from error


def _to_chat(cell: object) -> object:
    """ShareGPT's messages with role and content; anything else as it is."""
    return [_rename(message) for message in cell] if isinstance(cell, list) else cell


def _rename(message: object) -> object:
    if not isinstance(message, dict) or not isinstance(message.get("from"), str) or "value" not in message:
        return message
    return {"role": _SHAREGPT.get(message["from"], message["from"]), "content": message["value"]}


def _split_text(text: str) -> list[dict]:
    """The turns of HH's text, or any other text as the model's one turn."""
    if not text.startswith("\n\nHuman:"):
        return [{"role": "assistant", "content": text}]
    _, *parts = _HH_TURN.split(text)
    return [{"role": _HH[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def _said(message: dict) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def _contents(prompt: str | list[dict]) -> set[str]:
    return {prompt.strip()} if isinstance(prompt, str) else {message["content"].strip() for message in prompt}


def _is_chat(cell: object) -> bool:
    return (
        isinstance(cell, list)
        and len(cell) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in cell
        )
    )


def _is_model(message: dict) -> bool:
    """Whoever neither instructs nor asks nor is a tool is the model: it has many names."""
    return _role(message) not in (*_INSTRUCTORS, *_ASKERS)


def _role(message: dict) -> str:
    return message["role"].strip().lower()


def _read_text(text: str) -> str:
    if _CHAT_AS_TEXT.fullmatch(text):
        raise ValueError(f"is a chat written as text (make it a list in the file, as json.loads does): {text!r:.100}")
    return _whole(text)


def _whole(text: str) -> str:
    """The text itself, if it can be written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character, {text[error.start]!r}") from error
    return text
