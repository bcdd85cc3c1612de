"""ALGOS: an algorithm is a row. GRPO, Dr. GRPO and DAPO share one loss and differ in advantage, weight and settings."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.algos.advantage import group_center, group_zscore
from engine.algos.loss import policy_loss, supervised_loss
from engine.algos.weight import per_budget, per_sequence, per_token


@dataclass(frozen=True)
class Algo:
    loss: Callable
    weight: Callable
    advantage: Callable | None  # None: learns from given data, without a rollout


ALGOS = {
    "sft": Algo(supervised_loss, per_token, None),
    "grpo": Algo(policy_loss, per_sequence, group_zscore),
    "dr_grpo": Algo(policy_loss, per_budget, group_center),
    "dapo": Algo(policy_loss, per_token, group_zscore),
}
