"""Advantages from the rewards of a group of answers to one prompt; [P, G] -> [P, G], fp32.

A group whose rewards are all equal has advantage exactly 0: the rewards are compared, since the z-score of eight
rewards of 0.1 is 7e-5 in floating point, not 0.
"""

import torch
from torch import Tensor


def group_center(rewards_PG: Tensor, *, eps: float = 0.0, unbiased: bool = True) -> Tensor:
    """r - mean (Dr. GRPO); `eps` and `unbiased` belong to the z-score and are not used."""
    centred_PG = rewards_PG.double() - rewards_PG.double().mean(1, keepdim=True)
    equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(1, keepdim=True)
    return torch.where(equal_P1, 0.0, centred_PG).float()


def group_zscore(rewards_PG: Tensor, *, eps: float = 1e-4, unbiased: bool = True) -> Tensor:
    """(r - mean) / (std + eps), std with n - 1 when `unbiased` (GRPO, DAPO)."""
    std_P1 = rewards_PG.double().std(1, keepdim=True, correction=int(unbiased))
    return (group_center(rewards_PG).double() / (std_P1 + eps)).float()
