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

SAMPLER_STATS = (
    "mismatch", "mismatch_tokens", "importance", "importance_squares", "off_ratio", "cap_hits", "masked"
)  # fmt: skip
NEAR = (0.9, 1.1)
"""Where policy over sampler is nearly 1, for the statistics."""
UNREAD = {"logp", "rows_skipped"}


class Surrogate:
    """Clipped surrogate, or another `form` of it, with KL and entropy terms, head and loss in one pass (kernels.spec).

    UserError for settings that the form has no use for."""

    def __init__(self, config: Config, ops, form: str = "clip"):
        self.ops, self.temperature = ops, config.temperature
        self.spec = surrogate_of(config, form)
        self.weighs = config.importance_cap is not None or bool(config.importance_mask)
        self.trusted = config.sequence_mask
        unread = UNREAD | (set() if config.beta or config.taught else {"kl"})  # 0 without a frozen model
        unread |= set() if config.importance_mask else {"masked"}
        self.stats = tuple(None if name in unread else name for name in STATS + SAMPLER_STATS)
        self.whatever_adv = bool(config.beta or config.entropy_coef or config.taught)

    def can_learn(self, sample: Sample) -> bool:
        return bool(sample.answer) and (self.whatever_adv or sample.adv != 0) and self.trusts(sample)

    def trusts(self, sample: Sample) -> bool:
        """Whether policy over sampler, the geometric mean over its tokens, is within sequence_mask; True before
        `logp_old` is known."""
        if not self.trusted or "logp_old" not in sample.values:
            return True
        low, high = self.trusted
        return low <= (sample.values["logp_old"] - sample.values["logp_behaviour"]).double().mean().exp().item() <= high

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
            logp_behaviour_M=logp_behaviour_M if self.weighs else None,
        )
        return loss, torch.cat([stats, self.compare(logp_M, logp_behaviour_M).to(stats.dtype)])

    def compare(self, logp_M: Tensor, logp_behaviour_M: Tensor | None) -> Tensor:
        """How far the policy is from the one that sampled, as sums over the tokens: |log w|, tokens, w, w^2, w not near
        1, beyond the cap, outside the mask, with w = p / p_behaviour. All 0 without `logp_behaviour_M`."""
        if logp_behaviour_M is None:
            return logp_M.new_zeros(len(SAMPLER_STATS))
        log_w_M = logp_M - logp_behaviour_M
        w_M, none_M, cap = log_w_M.exp(), torch.zeros_like(log_w_M), self.spec.importance_cap
        outside = lambda low, high: w_M.clamp(low, high) != w_M  # noqa: E731
        masked_M = outside(self.spec.mask_low, self.spec.mask_high) if "masked" in self.stats else none_M
        hits = [outside(*NEAR), none_M if cap is None else w_M > cap, masked_M]
        return torch.stack([log_w_M.abs(), torch.ones_like(w_M), w_M, w_M**2, *hits]).sum(1)


class SequenceSurrogate(Surrogate):
    """GSPO (arXiv 2507.18071 eq. 5-7): the ratio is one of an answer, exp of the mean of its tokens' log-ratios, and it
    is clipped as one; 4 products with the head. KL, entropy and corrections of the sampler stay those of a token.

    Each token has the answer's ratio, and the gradient of its own log-probability (eq. 14): by weights that are one
    over a sample's tokens, and one advantage, that is GSPO's gradient. It needs no gradient through the mean.
    """

    def __call__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: Rows):
        logp_M, entropy_M = self.ops.linear_logprob(
            hidden_TD, weight_VD, rows.ids_M, bias_V=bias_V, temperature=self.temperature, rows_M=rows.source_M,
            entropy=True,
        )  # fmt: skip
        now_M, ref_M, behaviour_M = logp_M.detach(), rows.values.get("logp_ref"), rows.values.get("logp_behaviour")
        old_M = rows.values.get("logp_old", now_M)
        ratio_M = mean_over_samples(now_M - old_M, rows)  # its log; all else is told against old_M, for the digits
        loss, stats = self.ops.clipped_surrogate(
            ratio_M + (logp_M - now_M),
            torch.zeros_like(ratio_M),
            rows.adv_M,
            rows.weight_M,
            self.spec,
            logp_ref_N=None if ref_M is None else ref_M - now_M + ratio_M,
            logp_behaviour_N=behaviour_M - old_M if self.weighs else None,
            entropy_N=entropy_M,
        )
        return loss, torch.cat([stats, self.compare(now_M, behaviour_M).to(stats.dtype)])


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


def mean_over_samples(x_M: Tensor, rows: Rows) -> Tensor:
    """-> [M], for each token the mean of `x_M` over the tokens of its sample."""
    m_M, mean_N = torch.arange(len(x_M), device=x_M.device), over_samples(x_M, rows)
    mean_N = mean_N / over_samples(torch.ones_like(x_M), rows)
    return mean_N[torch.searchsorted(rows.first_N, m_M, right=True) - 1]


def over_samples(x_M: Tensor, rows: Rows) -> Tensor:
    """-> [N], the sum of `x_M` over each sample's tokens, in a fixed order."""
    m_M, first_N1 = torch.arange(len(x_M), device=x_M.device), rows.first_N[:, None]
    end_N1 = torch.cat([first_N1[1:], first_N1.new_full((1, 1), len(x_M))])[: len(first_N1)]
    return torch.where((first_N1 <= m_M) & (m_M < end_N1), x_M, 0.0).sum(1)


class LogProbs:
    """Log-probabilities [M] of the trained tokens, where a loss would be; of drawn ones at their temperature.

    `vocabulary`: of the student. A teacher's embedding may be filled up with more rows, which mean nothing."""

    def __init__(self, config: Config, ops, vocabulary: int | None = None):
        self.ops, self.vocabulary = ops, vocabulary
        self.temperature = config.temperature if config.rolls_out else 1.0

    def __call__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: Rows) -> Tensor:
        weight_VD, bias_V = weight_VD[: self.vocabulary], None if bias_V is None else bias_V[: self.vocabulary]
        return self.ops.linear_logprob(
            hidden_TD, weight_VD, rows.ids_M, bias_V=bias_V, temperature=self.temperature, rows_M=rows.source_M
        )


class TopLogProbs:
    """A teacher's likeliest tokens [M, K] and their log-probabilities [M, K], where a loss would be; no gradient.
    `vocabulary`: as of LogProbs."""

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
            rows.values.get("top_ids", rows.ids_M[:, None]),  # a row of nothing has no values either
            rows.values.get("top_logp", rows.weight_M[:, None]),
            rows.weight_M,
            self.spec,
            bias_V=bias_V,
            rows_M=rows.source_M,
        )
        return loss, stats
