"""Rewards for the form of a response, whatever its answer is worth."""

from engine.rewards.answers import behind_thoughts, last_boxed

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def is_tagged(text: str, row: dict) -> float:
    """1.0 if the text is one `<think>...</think>` and one `<answer>...</answer>` that is not empty, else 0.0."""
    if any(text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    think, _, rest = text.strip().partition("</think>")
    answer = rest.strip().removeprefix("<answer>").removesuffix("</answer>")
    framed = think.startswith("<think>") and rest.strip() == f"<answer>{answer}</answer>"
    return float(framed and bool(answer.strip()))


def is_boxed(text: str, row: dict) -> float:
    r"""1.0 if behind the thoughts is exactly one `\boxed{...}`, closed and not empty, else 0.0.

    A box inside the thoughts neither counts nor spoils it; one in an invented turn does, for the response went on.
    """
    answer = behind_thoughts(text)
    return float(answer.count("\\boxed") == 1 and bool((last_boxed(answer) or "").strip()))
