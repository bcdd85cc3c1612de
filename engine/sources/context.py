"""Context: what a teacher sees before a question, solved examples from the training data as turns of the chat."""

from collections.abc import Sequence
from random import Random

from engine.chat import encode_prompt, opened_thoughts
from engine.config import Config
from engine.data import Item
from engine.errors import UserError


class Context:
    """Examples are drawn by (seed, row): the same ones for a question in every run and at every visit."""

    def __init__(self, items: Sequence[Item], tokenizer, config: Config):
        self.items, self.tokenizer, self.config = items, tokenizer, config

    def encode(self, item: Item) -> list[int]:
        """Token ids of the teacher's prompt, which ends as the student's does; none where it is the same. UserError for
        one that is too long, or ends otherwise."""
        if self.config.context == "zeroshot":
            return []
        thinking, most = self.config.enable_thinking, self.config.max_context_tokens
        messages = self.extend(item.prompt, item.row["row_index"])
        ids = encode_prompt(self.tokenizer, messages, thinking)
        if len(ids) > most:
            raise UserError(
                f"The question has {len(ids)} tokens with its {self.config.shots} examples, and max_context_tokens is "
                f"{most}; raise that, or lower shots."
            )
        if opened_thoughts(self.tokenizer, messages, thinking) != opened_thoughts(
            self.tokenizer, item.prompt, thinking
        ):
            raise UserError(
                "The chat template begins an answer in another way behind examples; pass --context zeroshot."
            )
        return ids

    def extend(self, messages: list[dict], row: int) -> list[dict]:
        """The chat of a question with examples before it, behind the system's message."""
        system = [m for m in messages if m["role"] == "system"]
        examples = self.draw(messages, row)
        answers = [example.trace for example in examples]
        if self.config.context == "shuffled_answers":
            answers = answers[1:] + answers[:1]  # none of them at its own question
        turns = [
            turn
            for example, answer in zip(examples, answers, strict=True)
            for turn in (*_said(example.prompt), {"role": "assistant", "content": answer})
        ]
        return [*system, *turns, *_said(messages)]

    def draw(self, messages: list[dict], row: int) -> list[Item]:
        """Examples that ask something else than these messages."""
        shots, rows = self.config.shots, len(self.items)
        for looked_at in (min(4 * shots + 4, rows), rows):  # all of them only where questions repeat
            order = Random(f"{self.config.seed} context {row}").sample(range(rows), looked_at)
            found, asked = [], [_said(messages)]
            for example in map(self.items.__getitem__, order):
                if _said(example.prompt) not in asked:
                    asked.append(_said(example.prompt))
                    found.append(example)
                if len(found) == shots:
                    return found
        raise UserError(f"shots {shots} needs as many other questions in the training data; lower it.")


def _said(messages: list[dict]) -> list[dict]:
    return [m for m in messages if m["role"] != "system"]


def check_examples(items: Sequence[Item], config: Config) -> None:
    """UserError where the settings ask for examples that the data cannot give."""
    if config.context == "zeroshot":
        return
    if items[0].trace is None:
        raise UserError(
            f"The task {config.task} has no worked solutions to show a teacher; name their column with trace_column, "
            "or pass --context zeroshot."
        )
    if len(items) <= config.shots:
        raise UserError(f"shots {config.shots} asks for more than the {len(items) - 1} other rows; lower it.")
