"""Losses on hidden states: what happens between the body's last layer and a scalar, for one micro-batch.

    (hidden_ND, weight_VD, bias_V | None, batch, config, ops) -> (loss, stats)

hidden_ND are the flattened [N*T] hidden states, `ops` one of kernels.eager, kernels.chunked, kernels.fused; the loss
is the weighted sum. `stats` is one device tensor of sums named by the function's `stats` attribute; the last is a max.
"""

import torch
from torch import Tensor

from engine.batch import Batch, shift
from kernels.spec import STATS, SurrogateSpec


def policy_loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, batch: Batch, config, ops):
    """Clipped surrogate with KL and entropy terms, head and loss in one pass."""
    spec = SurrogateSpec(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        kl_coef=config.beta,
        entropy_coef=config.entropy_coef,
        importance_cap=config.importance_cap,
    )

    def flat(x_NT):
        return None if x_NT is None else shift(x_NT).flatten()

    logp_behaviour_N = flat(batch.logp_behaviour_NT)
    loss, logp_N, stats = ops.linear_clipped_surrogate(
        hidden_ND,
        weight_VD,
        flat(batch.ids_NT),
        flat(batch.logp_old_NT),
        flat(batch.adv_N[:, None].expand_as(batch.ids_NT) if batch.adv_NT is None else batch.adv_NT),
        flat(batch.weight_NT),
        spec,
        bias_V=bias_V,
        temperature=config.temperature,
        rows_M=batch.rows_M,
        logp_ref_N=flat(batch.logp_ref_NT),
        logp_behaviour_N=None if config.importance_cap is None else logp_behaviour_N,
    )
    sampler = sampler_stats(logp_N, logp_behaviour_N, batch.rows_M, config.importance_cap)
    return loss, torch.cat([stats[:-1], sampler.to(stats.dtype), stats[-1:]])


def sampler_stats(logp_N: Tensor, logp_behaviour_N: Tensor | None, rows_M: Tensor, cap: float | None) -> Tensor:
    """How far the policy is from the one that sampled, as sums over the tokens: |log w|, tokens, w, w^2, w > cap,
    with w = p / p_behaviour. All 0 without `logp_behaviour_N`."""
    if logp_behaviour_N is None:
        return logp_N.new_zeros(5)
    log_w_M = (logp_N - logp_behaviour_N)[rows_M]
    w_M, count = log_w_M.exp(), log_w_M.new_full((), len(log_w_M))  # new_tensor would copy, and wait for the device
    hits = log_w_M.new_zeros(()) if cap is None else (w_M > cap).sum()
    return torch.stack([log_w_M.abs().sum(), count, w_M.sum(), (w_M**2).sum(), hits])


SAMPLER_STATS = ("mismatch", "mismatch_tokens", "importance", "importance_squares", "cap_hits")
policy_loss.stats = (*STATS[:-1], *SAMPLER_STATS, STATS[-1])


def supervised_loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, batch: Batch, config, ops):
    """Weighted negative log-likelihood at temperature 1.

    Its gradient is the surrogate's at ratio 1 and advantage 1, which costs 3 products with the head instead of 4.
    """
    weight_N = shift(batch.weight_NT).flatten()
    surrogate, logp_N, _ = ops.linear_clipped_surrogate(
        hidden_ND,
        weight_VD,
        shift(batch.ids_NT).flatten(),
        None,
        torch.ones_like(weight_N),
        weight_N,
        SurrogateSpec(),
        bias_V=bias_V,
        rows_M=batch.rows_M,
    )
    nll_N = -logp_N.detach()
    loss = surrogate + ((weight_N * nll_N).sum() - surrogate).detach()
    return loss, torch.stack([nll_N.sum(), nll_N.new_full((), len(batch.rows_M)), nll_N.max()])


supervised_loss.stats = ("nll", "tokens", "nll_max")


def score(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, batch: Batch, config, ops):
    """Log-probabilities [N, T] of the trained tokens at the sampling temperature, aligned with `ids_NT`; no loss."""
    logp_N = ops.linear_logprob(
        hidden_ND,
        weight_VD,
        shift(batch.ids_NT).flatten(),
        bias_V=bias_V,
        temperature=config.temperature,
        rows_M=batch.rows_M,
    )
    return logp_N.view_as(batch.ids_NT).roll(1, 1)
