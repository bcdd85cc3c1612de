"""Weights of tokens in the loss. They carry the whole normalisation of one optimizer step over all ranks.

(lengths_N, all_sum, max_new_tokens) -> weight_N: of each token of a sample. `lengths_N` are the trained tokens of this
rank's samples of the step; `all_sum` adds a list of numbers over ranks. Samples that are left out still count: weights
are taken before anything is dropped.
"""

from collections.abc import Callable, Sequence


def per_sequence(lengths_N: Sequence[int], all_sum: Callable, max_new_tokens: int) -> list[float]:
    """Mean over a sequence's tokens, then over sequences (GRPO, arXiv 2402.03300 eq. 3)."""
    (sequences,) = all_sum([float(len(lengths_N))])
    return [1 / (max(length, 1) * max(sequences, 1.0)) for length in lengths_N]


def per_budget(lengths_N: Sequence[int], all_sum: Callable, max_new_tokens: int) -> list[float]:
    """Sum over tokens by a constant, sequences x max_new_tokens (Dr. GRPO, arXiv 2503.20783)."""
    (sequences,) = all_sum([float(len(lengths_N))])
    return [1 / (max(sequences, 1.0) * max_new_tokens)] * len(lengths_N)


def per_pair(lengths_N: Sequence[int], all_sum: Callable, max_new_tokens: int) -> list[float]:
    """Mean over pairs, two samples each; of a pair as a whole (DPO, arXiv 2305.18290 eq. 7)."""
    (sequences,) = all_sum([float(len(lengths_N))])
    return [2 / max(sequences, 2.0)] * len(lengths_N)


def per_token(lengths_N: Sequence[int], all_sum: Callable, max_new_tokens: int) -> list[float]:
    """Mean over all tokens of the optimizer step (DAPO, arXiv 2503.14476 eq. 8; also SFT)."""
    (tokens,) = all_sum([float(sum(lengths_N))])
    return [1 / max(tokens, 1.0)] * len(lengths_N)


def per_answer(lengths_N: Sequence[int], all_sum: Callable, max_new_tokens: int) -> list[float]:
    """Sum over an answer's tokens, then mean over answers (RLOO, arXiv 2402.14740; REINFORCE)."""
    (sequences,) = all_sum([float(len(lengths_N))])
    return [1 / max(sequences, 1.0)] * len(lengths_N)
