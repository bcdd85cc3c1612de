"""DPO: of two answers to one prompt the chosen one is to gain on the rejected one, against a frozen reference.

    margin = beta ((logp - logp_ref of the chosen) - (logp - logp_ref of the rejected)),  log-probabilities of answers
    sigmoid: -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)    (arXiv 2305.18290; e: label_smoothing)
    ipo:     (margin / beta - 1 / (2 beta))^2                         (arXiv 2310.12036)

The tokens' log-probabilities come streamed from the head, [M]; what follows is plain arithmetic on them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.algos.loss import LogProbs, over_samples
from engine.config import Config
from engine.layout import Rows
from engine.samples import Sample

STATS = (
    *("pairs", "margin", "preferred", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp"),
    *("chosen_length", "rejected_length", "tokens"),
)


class Preference:
    """A pair is two neighbours of a micro-batch, the chosen one first; its weight is that of each of their tokens."""

    stats = STATS

    def __init__(self, config: Config, ops):
        self.config, self.logprobs = config, LogProbs(config, ops)

    def can_learn(self, sample: Sample) -> bool:
        return bool(sample.answer)

    def __call__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: Rows):
        config = self.config
        logp_M = self.logprobs(hidden_TD, weight_VD, bias_V, rows)
        length_N, logp_N = over_samples(torch.ones_like(logp_M), rows), over_samples(logp_M, rows)
        ratio_N = logp_N - over_samples(rows.values["logp_ref"], rows) if rows.values else logp_N
        by_N = ratio_N / length_N if config.length_normalised else ratio_N
        margin_P = config.beta * (by_N[::2] - by_N[1::2])
        loss_P = self.of_margins(margin_P)
        if config.nll_coef:
            loss_P = loss_P - config.nll_coef * (logp_N / length_N)[::2]
        weight_P = rows.weight_M[rows.first_N[::2]]
        stats = self.count(config.beta * by_N.detach(), logp_N.detach(), length_N)
        return (weight_P * loss_P).sum(), stats

    def of_margins(self, margin_P: Tensor) -> Tensor:
        config = self.config
        if config.preference == "ipo":
            return (margin_P / config.beta - 1 / (2 * config.beta)) ** 2
        smoothing = config.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)

    def count(self, reward_N: Tensor, logp_N: Tensor, length_N: Tensor) -> Tensor:
        """The sums of `stats`."""
        margin_P = reward_N[::2] - reward_N[1::2]
        both = [values_N[i::2].sum() for values_N in (reward_N, logp_N, length_N) for i in (0, 1)]
        pairs = margin_P.new_full((), len(margin_P))
        won = (margin_P.sign() + 1).sum() / 2
        return torch.stack([pairs, margin_P.sum(), won, *both, length_N.sum()])
