"""The losses of spec.py as plain arithmetic on [N] values, with their slopes: what runs between two passes over logits.

The first pass gives logp and entropy of each row; this gives the loss and its slope in both; the second pass turns
the slopes into the gradient of the logits. A new loss is a new function of this shape and no kernel.
K tokens of a row, J those after the row's own. Oracle: eager.py under autograd.
"""

import torch

from .spec import TAIL


def clipped_surrogate_rows(
    logp_N, logp_old_N, adv_N, weight_N, spec, *, logp_ref_N=None, logp_behaviour_N=None, entropy_N=None,
    counted_N=None, bad_N=None,
):  # fmt: skip
    """-> (loss [], dlogp_N, dentropy_N or None, stats [len(STATS)] fp32); no autograd.

    All fp32 (fp64) [N]; counted_N bool marks the rows of the stats, by default those of nonzero weight; bad_N bool.
    """
    old_N, bound = logp_N if logp_old_N is None else logp_old_N, spec.log_ratio_clamp
    used_N = weight_N != 0
    counted_N = used_N if counted_N is None else counted_N

    log_ratio_N = logp_N - old_N
    ratio_N = (log_ratio_N if bound is None else log_ratio_N.clamp(-bound, bound)).exp()
    falls_N, rises_N = (adv_N != 0, adv_N != 0) if spec.form == "cispo" else (adv_N < 0, adv_N > 0)
    clip_low_N, clip_high_N = falls_N & (ratio_N < 1 - spec.clip_low), rises_N & (ratio_N > 1 + spec.clip_high)
    gain_N, slope_N, flat_N = _gain(logp_N, ratio_N, adv_N, clip_low_N, clip_high_N, spec)
    scale_N, off_N = -adv_N, adv_N == 0
    if logp_behaviour_N is not None:
        importance_N = (old_N - logp_behaviour_N).exp()
        off_N = off_N | (importance_N < spec.mask_low) | (importance_N > spec.mask_high)
        cap = float("inf") if spec.importance_cap is None else spec.importance_cap
        scale_N = scale_N * importance_N.clamp(max=cap)
    loss_N = torch.where(off_N, 0.0, scale_N * gain_N)
    flat_N = off_N if flat_N is None else off_N | flat_N
    if bound is not None and spec.form != "cispo":
        flat_N = flat_N | (log_ratio_N.abs() > bound)
    dlogp_N = torch.where(flat_N, 0.0, scale_N * slope_N)

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


def _gain(logp_N, ratio_N, adv_N, clip_low_N, clip_high_N, spec):
    """-> (what the advantage multiplies, its slope in logp, where that is 0 instead, if anywhere), by the form."""
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    clipped_N = torch.where(clip_low_N, low, torch.where(clip_high_N, high, ratio_N))
    if spec.form == "cispo":
        return clipped_N * logp_N, clipped_N, None
    if spec.form == "sapo":
        tau_N = torch.full_like(adv_N, spec.tau_neg).masked_fill(adv_N > 0, spec.tau_pos)
        x_N = tau_N * (ratio_N - 1)
        gate_N = x_N.sigmoid()
        return 4 / tau_N * gate_N, 4 * gate_N * (-x_N).sigmoid() * ratio_N, ratio_N.isinf()
    flat_N = clip_low_N | clip_high_N
    if spec.dual_clip is None:
        return clipped_N, ratio_N, flat_N
    dual_N = (adv_N < 0) & (ratio_N > spec.dual_clip)
    return torch.where(dual_N, spec.dual_clip, clipped_N), ratio_N, flat_N | dual_N


def match_rows(logp_N, student_NK, teacher_NK, own_NK, weight_N, spec, *, counted_N, bad_N):
    """-> (loss [], slope_N, exact_NJ, stats [len(MATCH_STATS)] fp32); no autograd.

    With p_j the row's probabilities, the gradient of its logits (over the temperature) is -slope p_j, but exact_NJ at
    its own id and at the K: there the slopes of single tokens come in. own_NK bool: which of the K is the row's own id.
    counted_N bool: the rows of the stats; bad_N bool.
    """
    student_NK = torch.where(own_NK, logp_N[:, None], student_NK)  # one token, one value, to the bit
    match_N, dmatch_NK, total_N = _SLOPES[spec.match](student_NK, teacher_NK)
    loss_N = spec.match_coef * match_N - spec.nll_coef * logp_N
    dmatch_NK, total_N = spec.match_coef * dmatch_NK, spec.match_coef * total_N
    nll_N = spec.nll_coef * logp_N.expm1()  # nll_coef (p - 1) with no cancellation
    among_N = torch.where(own_NK, dmatch_NK, 0.0).sum(1)
    own_N = nll_N + torch.where(own_NK.any(1), among_N, -total_N * logp_N.exp())
    exact_NK = dmatch_NK + torch.where(own_NK, nll_N[:, None], spec.nll_coef * student_NK.exp())

    used_N = weight_N != 0
    loss = torch.where(used_N, weight_N * loss_N, 0.0).sum()
    slope_N = torch.where(used_N, weight_N * (total_N - spec.nll_coef), 0.0)
    exact_NJ = torch.cat((own_N[:, None], exact_NK), 1)
    exact_NJ = torch.where(used_N[:, None], weight_N[:, None] * exact_NJ, 0.0)
    stats = match_stats(logp_N, match_N, student_NK, teacher_NK, counted_N, bad_N)
    return loss, slope_N, exact_NJ, stats


def _mse_slopes(student_NK, teacher_NK):
    """-> match_N, its gradient in the logits of the K, and total_N: -total p_j is that of every other logit."""
    gap_NK = student_NK - student_NK.mean(1, keepdim=True) - (teacher_NK - teacher_NK.mean(1, keepdim=True))
    return gap_NK.square().mean(1), 2 / gap_NK.shape[1] * gap_NK, torch.zeros_like(gap_NK[:, 0])


def _kl_slopes(student_NK, teacher_NK):
    """As _mse_slopes. Of a logit of the K it is q - p, less q times a tail that no gradient flows through."""
    p_NK, q_NK = teacher_NK.exp(), student_NK.exp()
    head_p_N, head_q_N = p_NK.sum(1), q_NK.sum(1)
    tail_p_N, tail_q_N = ((1 - head_N).clamp(min=TAIL) for head_N in (head_p_N, head_q_N))
    moving_p_N = torch.where(1 - head_q_N >= TAIL, tail_p_N, 0.0)
    match_N = torch.where(p_NK == 0, 0.0, p_NK * (teacher_NK - student_NK)).sum(1)
    match_N = match_N + tail_p_N * (tail_p_N / tail_q_N).log()
    slope_NK = q_NK * (head_p_N + moving_p_N)[:, None] - p_NK
    return match_N, slope_NK, moving_p_N * head_q_N / tail_q_N - head_p_N


_SLOPES = {"mse": _mse_slopes, "kl": _kl_slopes}


def match_stats(logp_N, match_N, student_NK, teacher_NK, counted_N, bad_N):
    """MATCH_STATS of the counted rows. Equally likely tokens are all the likeliest."""
    likeliest_NK = [x_NK == x_NK.amax(1, keepdim=True) for x_NK in (student_NK, teacher_NK)]
    masses = [x_NK.exp().sum(1) for x_NK in (teacher_NK, student_NK)]
    none_N = torch.zeros_like(logp_N)
    agree_N = (likeliest_NK[0] & likeliest_NK[1]).any(1)
    values = [none_N + 1, -logp_N, match_N, *masses, agree_N, none_N, bad_N]
    sums = torch.where(counted_N, torch.stack(values), 0.0).sum(1)
    sums[-2] = counted_N.numel() - sums[0]  # rows_skipped
    top = torch.cat((none_N.new_zeros(1), torch.where(counted_N, -logp_N, 0.0))).max()
    return torch.cat((sums, top[None])).float()


def add_stats(stats, more):
    """Two `stats` of disjoint rows -> the stats of both: sums add, the last entry is a max."""
    return torch.cat((stats[:-1] + more[:-1], torch.maximum(stats[-1:], more[-1:])))
