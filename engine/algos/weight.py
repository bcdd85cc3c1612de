"""Weights of tokens in the loss. They carry the whole normalisation of one optimizer step over all ranks.

`mask_NT` is this rank's share of the step (bool, True = trained); `all_sum` adds a list of numbers over ranks.
Removed sequences still count: weights are taken before anything is dropped.
"""

from torch import Tensor


def per_sequence(mask_NT: Tensor, all_sum, max_new_tokens: int) -> Tensor:
    """Mean over a sequence's tokens, then over sequences (GRPO, arXiv 2402.03300 eq. 3)."""
    (sequences,) = all_sum([float(len(mask_NT))])
    return mask_NT / (mask_NT.sum(1, keepdim=True).clamp(min=1) * max(sequences, 1.0))


def per_budget(mask_NT: Tensor, all_sum, max_new_tokens: int) -> Tensor:
    """Sum over tokens by a constant, sequences x max_new_tokens (Dr. GRPO, arXiv 2503.20783)."""
    (sequences,) = all_sum([float(len(mask_NT))])
    return mask_NT / (max(sequences, 1.0) * max_new_tokens)


def per_token(mask_NT: Tensor, all_sum, max_new_tokens: int) -> Tensor:
    """Mean over all tokens of the optimizer step (DAPO, arXiv 2503.14476 eq. 8; also SFT)."""
    (tokens,) = all_sum([float(mask_NT.sum())])
    return mask_NT / max(tokens, 1.0)
