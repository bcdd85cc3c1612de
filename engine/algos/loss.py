"""Losses on hidden states: what happens between the body's last layer and a scalar, for one micro-batch.

A loss is built once, from the settings and the kernels, and called as

    loss(hidden_TD, weight_VD, bias_V | None, rows) -> (loss, stats)

hidden_TD are the hidden states of rows (engine.layout.Rows), weight_VD and bias_V the head's; the loss is the weighted
sum. `stats` is one device tensor whose entries `loss.stats` names (None: of no use). `can_learn(sample)` says whether
a sample's gradient can differ from 0: one that cannot never enters the body.
"""

import torch
from torch import Tensor

from engine.config import Config, surrogate_of
from engine.layout import Rows
from engine.samples import Sample
from kernels.spec import MATCH_STATS, STATS, MatchSpec, SurrogateSpec

SAMPLER_STATS = ("mismatch", "mismatch_tokens", "importance", "importance_squares", "cap_hits")
UNREAD = {"logp", "rows_skipped"}


class Surrogate:
    """Clipped surrogate with KL and entropy terms, head and loss in one pass (kernels.spec)."""

    def __init__(self, config: Config, ops):
        self.ops, self.temperature, self.cap = ops, config.temperature, config.importance_cap
        self.spec = surrogate_of(config)
        unread = UNREAD | (set() if config.beta else {"kl"})  # 0 without a reference
        self.stats = tuple(None if name in unread else name for name in STATS) + SAMPLER_STATS
        self.whatever_adv = bool(config.beta or config.entropy_coef)

    def can_learn(self, sample: Sample) -> bool:
        return bool(sample.answer) and (self.whatever_adv or sample.adv != 0)

    def __call__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: Rows):
        logp_behaviour_M = rows.values.get("logp_behaviour")
        loss, logp_M, stats = self.ops.linear_clipped_surrogate(
            hidden_TD,
            weight_VD,
            rows.ids_M,
            rows.values.get("logp_old"),
            rows.adv_M,
            rows.weight_M,
            self.spec,
            bias_V=bias_V,
            temperature=self.temperature,
            rows_M=rows.source_M,
            logp_ref_M=rows.values.get("logp_ref"),
            logp_behaviour_M=None if self.cap is None else logp_behaviour_M,
        )
        return loss, torch.cat([stats, self.compare(logp_M, logp_behaviour_M).to(stats.dtype)])

    def compare(self, logp_M: Tensor, logp_behaviour_M: Tensor | None) -> Tensor:
        """How far the policy is from the one that sampled, as sums over the tokens: |log w|, tokens, w, w^2, w > cap,
        with w = p / p_behaviour. All 0 without `logp_behaviour_M`."""
        if logp_behaviour_M is None:
            return logp_M.new_zeros(len(SAMPLER_STATS))
        log_w_M = logp_M - logp_behaviour_M
        w_M, count = log_w_M.exp(), log_w_M.new_full((), len(log_w_M))  # new_tensor would copy, and wait for the device
        hits = log_w_M.new_zeros(()) if self.cap is None else (w_M > self.cap).sum()
        return torch.stack([log_w_M.abs().sum(), count, w_M.sum(), (w_M**2).sum(), hits])


class Taught(Surrogate):
    """With advantages from a teacher, per token; those of the rewards, if any, are added to them."""

    def __init__(self, config: Config, ops):
        super().__init__(config, ops)
        self.stats, self.whatever_adv = tuple(None if name in UNREAD else name for name in STATS) + SAMPLER_STATS, True


class NLL:
    """Weighted negative log-likelihood at temperature 1; advantages are not looked at.

    Its gradient is the surrogate's at ratio 1 and advantage 1, which costs 3 products with the head instead of 4.
    """

    stats = ("nll", "tokens", "nll_max")

    def __init__(self, config: Config, ops):
        self.ops = ops

    def can_learn(self, sample: Sample) -> bool:
        return bool(sample.answer)

    def __call__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: Rows):
        weight_M = rows.weight_M
        surrogate, logp_M, _ = self.ops.linear_clipped_surrogate(
            hidden_TD,
            weight_VD,
            rows.ids_M,
            None,
            torch.ones_like(weight_M),
            weight_M,
            SurrogateSpec(),
            bias_V=bias_V,
            rows_M=rows.source_M,
        )
        nll_M = -logp_M.detach()
        loss = surrogate + ((weight_M * nll_M).sum() - surrogate).detach()
        top = torch.cat([nll_M.new_zeros(1), nll_M]).max()
        return loss, torch.stack([nll_M.sum(), nll_M.new_full((), len(nll_M)), top])


def over_samples(x_M: Tensor, rows: Rows) -> Tensor:
    """-> [N], the sum of `x_M` over each sample's tokens, in a fixed order."""
    m_M, first_N1 = torch.arange(len(x_M), device=x_M.device), rows.first_N[:, None]
    end_N1 = torch.cat([first_N1[1:], first_N1.new_full((1, 1), len(x_M))])[: len(first_N1)]
    return torch.where((first_N1 <= m_M) & (m_M < end_N1), x_M, 0.0).sum(1)


class LogProbs:
    """Log-probabilities [M] of the trained tokens, where a loss would be; of drawn ones at their temperature."""

    def __init__(self, config: Config, ops):
        self.ops, self.temperature = ops, config.temperature if config.rolls_out else 1.0

    def __call__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: Rows) -> Tensor:
        return self.ops.linear_logprob(
            hidden_TD, weight_VD, rows.ids_M, bias_V=bias_V, temperature=self.temperature, rows_M=rows.source_M
        )


class TopLogProbs:
    """The likeliest tokens [M, K] and their log-probabilities [M, K], where a loss would be; no gradient.

    `vocabulary`: of the student. A teacher's embedding may be filled up with more rows, which mean nothing."""

    def __init__(self, config: Config, ops, vocabulary: int):
        self.ops, self.k, self.vocabulary = ops, config.match_top_k, vocabulary

    def __call__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: Rows):
        bias_V = None if bias_V is None else bias_V[: self.vocabulary]
        logp_MK, ids_MK = self.ops.linear_topk(
            hidden_TD, weight_VD[: self.vocabulary], self.k, bias_V=bias_V, rows_M=rows.source_M
        )
        return ids_MK, logp_MK


class Match:
    """Likelihood of the trace, and lambda times how far the student's logits are from a teacher's (kernels.spec)."""

    stats = tuple(None if name in UNREAD else name for name in MATCH_STATS)

    def __init__(self, config: Config, ops):
        self.ops, self.spec = ops, MatchSpec(match=config.match, match_coef=config.match_coef)

    def can_learn(self, sample: Sample) -> bool:
        return bool(sample.answer)

    def __call__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: Rows):
        loss, _, stats = self.ops.linear_match(
            hidden_TD,
            weight_VD,
            rows.ids_M,
            rows.values["top_ids"],
            rows.values["top_logp"],
            rows.weight_M,
            self.spec,
            bias_V=bias_V,
            rows_M=rows.source_M,
        )
        return loss, stats
