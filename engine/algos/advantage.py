"""Advantages from rewards: of a group of answers to one prompt, [P, G] -> [P, G], fp32; and what follows for a batch,
(samples, all_sum) -> samples, `all_sum` adding a list of numbers over ranks.

A group whose rewards are all equal has advantage exactly 0: the rewards are compared, since the z-score of eight
rewards of 0.1 is 7e-5 in floating point, not 0.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.samples import Sample


def group_center(rewards_PG: Tensor, *, eps: float = 0.0, unbiased: bool = True) -> Tensor:
    """r - mean (Dr. GRPO); `eps` and `unbiased` belong to the z-score and are not used."""
    centred_PG = rewards_PG.double() - rewards_PG.double().mean(1, keepdim=True)
    equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(1, keepdim=True)
    return torch.where(equal_P1, 0.0, centred_PG).float()


def group_zscore(rewards_PG: Tensor, *, eps: float = 1e-4, unbiased: bool = True) -> Tensor:
    """(r - mean) / (std + eps), std with n - 1 when `unbiased` (GRPO, DAPO)."""
    std_P1 = rewards_PG.double().std(1, keepdim=True, correction=int(unbiased))
    return (group_center(rewards_PG).double() / (std_P1 + eps)).float()


def group_leave_one_out(rewards_PG: Tensor, *, eps: float = 0.0, unbiased: bool = True) -> Tensor:
    """r - mean of the group's other rewards (RLOO, arXiv 2402.14740 eq. 8)."""
    G = rewards_PG.shape[1]
    return (group_center(rewards_PG).double() * G / (G - 1)).float()


def reward(rewards_PG: Tensor, *, eps: float = 0.0, unbiased: bool = True) -> Tensor:
    """r itself, for `batch_center`."""
    return rewards_PG.float()


def as_they_are(samples: Sequence[Sample], all_sum: Callable) -> Sequence[Sample]:
    return samples


def batch_center(samples: Sequence[Sample], all_sum: Callable) -> list[Sample]:
    """adv - its mean over the samples of all ranks. Collective.

    Equal ones become exactly 0: the sum of fewer than 2**29 equal fp32 numbers, and so their mean, is exact in fp64.
    """
    total, count = all_sum([sum(s.adv for s in samples), float(len(samples))])
    return [dataclasses.replace(s, adv=s.adv - total / count) for s in samples]
