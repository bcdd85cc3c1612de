"""Every public function in plain torch with autograd: the oracle when fed fp64, and the baseline of every report.

logp_i = log_softmax(logits_i / temperature_i)[id_i];  the loss is written out in spec.py.
N rows (tokens, flattened), V vocabulary, D hidden, M rows computed. fp64 in gives fp64 out, anything else fp32.
Attention: M rows, S slots, H query heads, K key/value heads, G = H / K, L columns of a slot, D size of a head.
"""

from functools import partial

import torch
import torch.nn.functional as F

from .checks import (
    check_decode_attention,
    check_linear,
    check_logits,
    check_match,
    check_rows,
    check_topk,
    move_rows,
    outside_columns,
    over_weighted_rows,
    safe_ids,
    safe_top_ids,
)
from .objective import match_stats
from .spec import MATCH_STATS, STATS, TAIL, MatchSpec, SurrogateSpec

__all__ = ["STATS", "SurrogateSpec", "logprob", "linear_logprob", "clipped_surrogate", "linear_clipped_surrogate"]
__all__ += ["MATCH_STATS", "MatchSpec", "linear_topk", "linear_match", "decode_attention"]


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def logprob(logits_NV, ids_N, *, temperature=1.0, mask_N=None, entropy=False):
    """Log-probability of each row's id, [N], and its entropy in nats, [N], if asked: `logp_N` or `(logp_N, entropy_N)`.

    logits_NV float; ids_N int64; temperature a number or fp32 [N]; mask_N bool. Rows with mask False give value 0
    and gradient 0 whatever they hold. An id at -inf gives -inf and log_softmax's gradient; a row that is all -inf, or
    holds a NaN, gives NaN. ValueError for a wrong shape, dtype, device,
    or (on a CPU) an id outside the vocabulary; on a GPU such a row's logp is NaN.
    """
    check_logits(logits_NV, ids_N, temperature, mask_N)
    ids_N, bad_N = safe_ids(ids_N, logits_NV.shape[1], mask_N)
    return _logprob(logits_NV, ids_N, bad_N, temperature, mask_N, entropy)


def _cooled(logits_NV, temperature):
    z_NV = _wide(logits_NV)
    if isinstance(temperature, torch.Tensor):
        return z_NV / temperature[:, None]
    return z_NV if temperature == 1.0 else z_NV / temperature


def _logprob(logits_NV, ids_N, bad_N, temperature, mask_N, entropy, entropy_grad=True):
    z_NV = _cooled(logits_NV, temperature)
    if mask_N is not None:
        z_NV = torch.where(mask_N[:, None], z_NV, 0.0)
    logp_NV = F.log_softmax(z_NV, dim=-1)
    logp_N = logp_NV.gather(-1, ids_N[:, None]).squeeze(-1).masked_fill(bad_N, float("nan"))
    if mask_N is not None:
        logp_N = torch.where(mask_N, logp_N, 0.0)
    if not entropy:
        return logp_N
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        finite_NV = logp_NV.masked_fill(logp_NV == -float("inf"), 0.0)  # a banned token adds 0, not 0 * -inf
        entropy_N = -(logp_NV.exp() * finite_NV).sum(-1)
    return logp_N, entropy_N if mask_N is None else torch.where(mask_N, entropy_N, 0.0)


def linear_logprob(
    hidden_ND, weight_VD, ids_M, *, bias_V=None, temperature=1.0, rows_M=None, entropy=False, accurate=False
):
    """`logprob` of `hidden[rows] @ weight.T + bias`, outputs [M].

    hidden_ND, weight_VD, bias_V of one float dtype; rows_M int64 on the host or the device, each row once, in any
    order; None: all N, and M is N. ids_M[m] and a tensor temperature[m] belong to hidden_ND[rows_M[m]]; the other rows
    get no gradient, whatever they hold. accurate=True keeps fp32 logits of bf16 inputs.
    """
    check_linear(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M)
    return _linear_logprob(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M, entropy, accurate)


def _logits(hidden_ND, weight_VD, bias_V, rows_M, accurate):
    hidden_MD = hidden_ND if rows_M is None else hidden_ND[move_rows(rows_M, hidden_ND.device)]
    if bias_V is not None:
        bias_V = bias_V.contiguous()  # one with gaps sends cuBLAS another way, to other bits
    if accurate:
        hidden_MD, weight_VD, bias_V = _wide(hidden_MD), _wide(weight_VD), None if bias_V is None else _wide(bias_V)
    return F.linear(hidden_MD, weight_VD, bias_V)


def _linear_logprob(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M, entropy, accurate, entropy_grad=True):
    ids_M, bad_M = safe_ids(ids_M, weight_VD.shape[0])
    logits_MV = _logits(hidden_ND, weight_VD, bias_V, rows_M, accurate)
    return _logprob(logits_MV, ids_M, bad_M, temperature, None, entropy, entropy_grad)


def linear_topk(hidden_ND, weight_VD, k, *, bias_V=None, temperature=1.0, rows_M=None, accurate=False):
    """The k likeliest tokens of each row -> (logp_MK, ids_MK int64), the likeliest first.

    logp_MK are log-probabilities in the whole vocabulary; arguments as in `linear_logprob`. Which of equally likely
    tokens come is open; no id comes twice. A banned token (-inf) has -inf; a row that is all -inf, or holds a NaN, has
    NaN and any ids. Inference only. ValueError as there, for k outside [1, V], and for a gradient asked for.
    """
    check_topk(hidden_ND, weight_VD, k, bias_V, temperature, rows_M)
    logits_MV = _logits(hidden_ND, weight_VD, bias_V, rows_M, accurate)
    logp_MK, ids_MK = F.log_softmax(_cooled(logits_MV, temperature), -1).topk(k)
    return logp_MK, ids_MK


def clipped_surrogate(
    logp_N, logp_old_N, adv_N, weight_N, spec, *, logp_ref_N=None, logp_behaviour_N=None, entropy_N=None
):
    """The weighted sum of spec.py over rows of nonzero weight -> (loss [], stats [len(STATS)] fp32).

    All vectors fp32 [N]. Gradients flow to logp_N and entropy_N. logp_old_N=None is on-policy: the ratio is 1 and its
    gradient that of logp. A row of weight 0 may hold anything; a row with adv 0 has no policy term even if its ratio
    overflows; where PPO's clip binds the gradient is exactly 0. Dual clip: arXiv 1912.09729.
    """
    others = dict(logp_ref_N=logp_ref_N, logp_behaviour_N=logp_behaviour_N, entropy_N=entropy_N)
    vectors = dict(logp_N=logp_N, logp_old_N=logp_old_N, adv_N=adv_N, weight_N=weight_N, **others)
    check_rows(logp_N.shape[0], logp_N.device, **vectors)
    return _surrogate(
        logp_N, logp_old_N, adv_N, weight_N, spec, logp_ref_N, logp_behaviour_N, entropy_N, counted_N=weight_N != 0
    )


def _surrogate(
    logp_N, logp_old_N, adv_N, weight_N, spec, logp_ref_N, logp_behaviour_N, entropy_N, counted_N, bad_N=None
):
    old_N = logp_N.detach() if logp_old_N is None else logp_old_N
    bound = spec.log_ratio_clamp

    log_ratio_N = logp_N - old_N if bound is None else (logp_N - old_N).clamp(-bound, bound)
    ratio_N = log_ratio_N.detach().exp()
    falls_N, rises_N = (adv_N != 0, adv_N != 0) if spec.form == "cispo" else (adv_N < 0, adv_N > 0)
    clip_low_N, clip_high_N = falls_N & (ratio_N < 1 - spec.clip_low), rises_N & (ratio_N > 1 + spec.clip_high)
    off_N, scale_N = adv_N == 0, -adv_N
    if logp_behaviour_N is not None:
        importance_N = (old_N - logp_behaviour_N).exp()
        off_N = off_N | (importance_N < spec.mask_low) | (importance_N > spec.mask_high)
        cap = float("inf") if spec.importance_cap is None else spec.importance_cap
        scale_N = scale_N * importance_N.clamp(max=cap)
    gain_N = _gain(logp_N, log_ratio_N, adv_N, off_N | (weight_N == 0), (clip_low_N, clip_high_N), spec)
    loss_N = torch.where(off_N, 0.0, scale_N * gain_N)

    kl_N = torch.zeros_like(logp_N)
    if logp_ref_N is not None:
        d_N = logp_ref_N - logp_N if bound is None else (logp_ref_N - logp_N).clamp(-bound, bound)
        kl_N = (d_N.expm1() - d_N).detach()
        d_N = torch.where(weight_N == 0, 0.0, d_N)
        loss_N = loss_N + spec.kl_coef * (d_N.expm1() - d_N) if spec.kl_coef else loss_N
    if spec.entropy_coef and entropy_N is not None:
        loss_N = loss_N - spec.entropy_coef * entropy_N
    loss = torch.where(weight_N == 0, 0.0, weight_N * loss_N).sum()

    with torch.no_grad():
        count = lambda x: (x & counted_N).sum()
        total = lambda x: torch.where(counted_N, x, 0.0).sum()
        tokens = counted_N.sum()
        stats = [
            tokens,
            count(clip_low_N),
            count(clip_high_N),
            total(ratio_N),
            total(kl_N),
            total(old_N - logp_N),
            total(torch.zeros_like(logp_N) if entropy_N is None else entropy_N),
            total(logp_N),
            counted_N.numel() - tokens,
            tokens.new_zeros(()) if bad_N is None else count(bad_N),
            torch.cat((ratio_N.new_zeros(1), torch.where(counted_N, ratio_N, 0.0))).max(),
        ]
        stats = torch.stack([x.float() for x in stats])
    return loss, stats


def _gain(logp_N, log_ratio_N, adv_N, off_N, clips, spec):
    """What the advantage multiplies, by the form of the loss; rows of off_N give no gradient and any value."""
    (clip_low_N, clip_high_N), ratio_N = clips, log_ratio_N.detach().exp()
    clip = lambda x_N: torch.where(clip_low_N, 1 - spec.clip_low, torch.where(clip_high_N, 1 + spec.clip_high, x_N))
    if spec.form == "cispo":
        return clip(ratio_N) * torch.where(off_N, 0.0, logp_N)
    # Rows with no gradient leave before exp: an infinite ratio times a zero gradient would be NaN.
    moving = lambda flat_N: torch.where(off_N | flat_N, 0.0, log_ratio_N).exp()
    if spec.form == "sapo":
        tau_N, far_N = torch.full_like(adv_N, spec.tau_neg).masked_fill(adv_N > 0, spec.tau_pos), ratio_N.isinf()
        return 4 / tau_N * torch.where(far_N, 1.0, (tau_N * (moving(far_N) - 1)).sigmoid())
    if spec.dual_clip is None:
        return clip(moving(clip_low_N | clip_high_N))
    dual_N = (adv_N < 0) & (ratio_N > spec.dual_clip)
    return torch.where(dual_N, spec.dual_clip, clip(moving(clip_low_N | clip_high_N | dual_N)))


def linear_clipped_surrogate(
    hidden_ND, weight_VD, ids_M, logp_old_M, adv_M, weight_M, spec, *, bias_V=None, temperature=1.0, rows_M=None,
    logp_ref_M=None, logp_behaviour_M=None, accurate=False,
):  # fmt: skip
    """`linear_logprob` then `clipped_surrogate` -> (loss [], logp_M fp32 [M] detached, stats [len(STATS)] fp32).

    Arguments as in those two. Only rows_M is computed; without it, all rows of nonzero weight. The others count as
    skipped, get logp 0 (where M is N) and no gradient, and may hold anything. The entropy is computed for the stats,
    without a graph where entropy_coef is 0. Without rows_M, on a GPU, the host waits for the device to count them.
    """
    vectors = dict(
        logp_old_M=logp_old_M, adv_M=adv_M, weight_M=weight_M, logp_ref_M=logp_ref_M, logp_behaviour_M=logp_behaviour_M
    )
    check_linear(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M, **vectors)
    if rows_M is None:
        surrogate = partial(linear_clipped_surrogate, hidden_ND, weight_VD, spec=spec, bias_V=bias_V, accurate=accurate)
        return over_weighted_rows(surrogate, ids_M=ids_M, temperature=temperature, **vectors)
    logp_M, entropy_M = _linear_logprob(
        hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M, True, accurate, entropy_grad=bool(spec.entropy_coef)
    )
    counted_M = torch.ones_like(ids_M, dtype=torch.bool)
    bad_M = (ids_M < 0) | (ids_M >= weight_VD.shape[0])
    loss, stats = _surrogate(
        logp_M, logp_old_M, adv_M, weight_M, spec, logp_ref_M, logp_behaviour_M, entropy_M, counted_M, bad_M
    )
    stats[STATS.index("rows_skipped")] += len(hidden_ND) - len(ids_M)
    return loss, logp_M.detach(), stats


def linear_match(
    hidden_ND, weight_VD, ids_M, top_ids_MK, top_logp_MK, weight_M, spec, *, bias_V=None, temperature=1.0, rows_M=None,
    accurate=False,
):  # fmt: skip
    """Distillation's weighted sum of spec.py -> (loss [], logp_M fp32 [M] detached, stats [len(MATCH_STATS)] fp32).

    top_ids_MK int64, distinct within a row, and top_logp_MK fp32 are a teacher's, as `linear_topk` gives them; ids_M
    the rows' own, among the K or not; spec a MatchSpec. The rest, and what is left out, as in
    `linear_clipped_surrogate`. A token that the teacher bans (-inf) is one of p = 0 to "kl" and makes "mse" NaN.
    Distillation: arXiv 1503.02531.
    """
    check_match(hidden_ND, weight_VD, ids_M, top_ids_MK, top_logp_MK, weight_M, bias_V, temperature, rows_M)
    if rows_M is None:
        match = partial(linear_match, hidden_ND, weight_VD, spec=spec, bias_V=bias_V, accurate=accurate)
        vectors = dict(top_ids_MK=top_ids_MK, top_logp_MK=top_logp_MK, weight_M=weight_M)
        return over_weighted_rows(match, ids_M=ids_M, temperature=temperature, **vectors)
    ids_M, top_ids_MK, bad_M = safe_top_ids(ids_M, top_ids_MK, weight_VD.shape[0])
    logits_MV = _logits(hidden_ND, weight_VD, bias_V, rows_M, accurate)
    logp_MV = F.log_softmax(_cooled(logits_MV, temperature), -1)
    logp_M = logp_MV.gather(1, ids_M[:, None])[:, 0].masked_fill(bad_M, float("nan"))
    loss, stats = _match(logp_M, logp_MV.gather(1, top_ids_MK), top_logp_MK, weight_M, spec, bad_M)
    stats[MATCH_STATS.index("rows_skipped")] += len(hidden_ND) - len(ids_M)
    return loss, logp_M.detach(), stats


def _match(logp_M, student_MK, teacher_MK, weight_M, spec, bad_M):
    if spec.match == "mse":
        student_centred_MK, teacher_centred_MK = (x - x.mean(1, keepdim=True) for x in (student_MK, teacher_MK))
        match_M = (student_centred_MK - teacher_centred_MK).square().mean(1)
    else:
        p_MK, q_MK = teacher_MK.exp(), student_MK.exp()
        tail_p_M, tail_q_M = ((1 - x.sum(1)).clamp(min=TAIL) for x in (p_MK, q_MK))
        match_M = torch.where(p_MK == 0, 0.0, p_MK * (teacher_MK - student_MK)).sum(1)
        match_M = match_M + tail_p_M * (tail_p_M / tail_q_M).log()
    loss_M = spec.match_coef * match_M - spec.nll_coef * logp_M
    loss = torch.where(weight_M == 0, 0.0, weight_M * loss_M).sum()
    with torch.no_grad():
        stats = match_stats(logp_M, match_M, student_MK, teacher_MK, torch.ones_like(bad_M), bad_M)
    return loss, stats


def decode_attention(q_MHD, keys_SKLD, values_SKLD, length_M, *, scale=None, window=None):
    """Attention of one query token a row over the first length_M columns of slot m -> [M, H, D] of q's dtype.

    One float dtype; S >= M, H a multiple of K: head h reads key/value head h // G. length_M int32 or int64 in [0, L];
    a row of length 0 gives 0. window: only the last so many of those columns count, all if None. The others may hold
    anything, NaN included. scale: D**-0.5 unless given.
    Inference only. ValueError for a wrong shape, dtype, device, window, a gradient asked for, or (on a CPU) a wrong
    length; on a GPU a length is clamped. Grouped heads: arXiv 2305.13245; windows: arXiv 2004.05150.
    """
    check_decode_attention(q_MHD, keys_SKLD, values_SKLD, length_M, scale, window)
    (M, H, D), (_, K, L, _) = q_MHD.shape, keys_SKLD.shape
    outside_M11L = outside_columns(L, length_M, window)[:, None, None]
    score_MKGL = _wide(q_MHD.unflatten(1, (K, H // K)) @ keys_SKLD[:M].mT) * (D**-0.5 if scale is None else scale)
    p_MKGL = score_MKGL.masked_fill(outside_M11L, -float("inf")).softmax(-1)
    p_MKGL = p_MKGL.masked_fill(outside_M11L, 0.0)  # the softmax of no columns is nan
    values_MKLD = values_SKLD[:M].masked_fill(outside_M11L.mT, 0.0)  # 0 * nan is nan
    return (p_MKGL.to(q_MHD.dtype) @ values_MKLD).flatten(1, 2)
