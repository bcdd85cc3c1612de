"""A reward that a model with random weights can earn: how varied an answer's letters are."""


def letters(text: str, row: dict) -> float:
    return len(set(text)) / 64
