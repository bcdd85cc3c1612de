"""The loss of spec.py as plain arithmetic on [N] values, with its slopes: what runs between two passes over logits.

The first pass gives logp and entropy of each row; this gives the loss and its slope in both; the second pass turns
the slopes into the gradient of the logits. A new loss is a new function of this shape and no kernel.
Oracle: eager.clipped_surrogate under autograd.
"""

import torch


def clipped_surrogate_rows(
    logp_N, logp_old_N, adv_N, weight_N, spec, *, logp_ref_N=None, logp_behaviour_N=None, entropy_N=None,
    counted_N=None, bad_N=None,
):  # fmt: skip
    """-> (loss [], dlogp_N, dentropy_N or None, stats [len(STATS)] fp32); no autograd.

    All fp32 (fp64) [N]; counted_N bool marks the rows of the stats, by default those of nonzero weight; bad_N bool.
    """
    old_N = logp_N if logp_old_N is None else logp_old_N
    low, high, bound = 1 - spec.clip_low, 1 + spec.clip_high, spec.log_ratio_clamp
    used_N = weight_N != 0
    counted_N = used_N if counted_N is None else counted_N

    log_ratio_N = logp_N - old_N
    ratio_N = (log_ratio_N if bound is None else log_ratio_N.clamp(-bound, bound)).exp()
    clip_low_N, clip_high_N = (adv_N < 0) & (ratio_N < low), (adv_N > 0) & (ratio_N > high)
    value_N = torch.where(clip_low_N, low, torch.where(clip_high_N, high, ratio_N))
    flat_N = clip_low_N | clip_high_N | (adv_N == 0)
    if bound is not None:
        flat_N |= log_ratio_N.abs() > bound
    if spec.dual_clip is not None:
        dual_N = (adv_N < 0) & (ratio_N > spec.dual_clip)
        value_N, flat_N = torch.where(dual_N, spec.dual_clip, value_N), flat_N | dual_N
    scale_N = -adv_N
    if logp_behaviour_N is not None:
        cap = float("inf") if spec.importance_cap is None else spec.importance_cap
        scale_N = scale_N * (old_N - logp_behaviour_N).exp().clamp(max=cap)
    loss_N = torch.where(adv_N == 0, 0.0, scale_N * value_N)
    dlogp_N = torch.where(flat_N, 0.0, scale_N * ratio_N)

    kl_N = None
    if logp_ref_N is not None:
        d_N = logp_ref_N - logp_N
        near_N = None if bound is None else d_N.abs() <= bound
        d_N = d_N if bound is None else d_N.clamp(-bound, bound)
        slope_N = d_N.expm1()
        kl_N = slope_N - d_N
        if spec.kl_coef:
            loss_N = loss_N + spec.kl_coef * kl_N
            dlogp_N = dlogp_N - spec.kl_coef * (slope_N if bound is None else torch.where(near_N, slope_N, 0.0))

    dentropy_N = None
    if spec.entropy_coef and entropy_N is not None:
        loss_N = loss_N - spec.entropy_coef * entropy_N
        dentropy_N = -spec.entropy_coef * weight_N

    loss = torch.where(used_N, weight_N * loss_N, 0.0).sum()
    dlogp_N = torch.where(used_N, weight_N * dlogp_N, 0.0)
    none_N = torch.zeros_like(logp_N)
    kl_N, entropy_N, bad_N = (none_N if x is None else x for x in (kl_N, entropy_N, bad_N))
    counts = [torch.ones_like(logp_N), clip_low_N, clip_high_N]
    values = [ratio_N, kl_N, -log_ratio_N, entropy_N, logp_N, none_N, bad_N]
    sums = torch.where(counted_N, torch.stack(counts + values), 0.0).sum(1)
    sums[-2] = counted_N.numel() - sums[0]  # rows_skipped
    top = torch.cat((none_N.new_zeros(1), torch.where(counted_N, ratio_N, 0.0))).max()
    return loss, dlogp_N, dentropy_N, torch.cat((sums, top[None])).float()


def add_stats(stats, more):
    """Two `stats` of disjoint rows -> the stats of both: sums add, the last entry is a max."""
    return torch.cat((stats[:-1] + more[:-1], torch.maximum(stats[-1:], more[-1:])))
