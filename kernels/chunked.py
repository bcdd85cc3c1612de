"""Every public function in plain torch, memory-lean: gradients written by hand, [N, V] never whole. The CPU's default.

head.py makes the logits of a chunk of rows; inside it, fp32 arithmetic goes through two scratches of SCRATCH_BYTES
that stay in cache. Two passes over a chunk: `_reduce` (top, logz, logp, entropy of each row) and `_differentiate`
(logits become their gradient, in place).
  dL/dlogits_j = (g (onehot_j - p_j) - e p_j (log p_j + H)) / temperature,  g = dL/dlogp, e = dL/dH
top and logz = log sum exp(z - top) stay apart: their fp32 sum would round away |top| * 2**-24.
N rows, V vocabulary, D hidden, M rows computed. Attention: axes of eager.py, R rows of a block.
Signatures, errors and oracle: eager.py.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .checks import (
    check_decode_attention,
    check_linear,
    check_logits,
    check_match,
    check_rows,
    check_topk,
    outside_columns,
    over_weighted_rows,
    safe_ids,
    safe_top_ids,
)
from .head import spans, wide
from .linear import (
    Passes,
    Rows,
    cut,
    grads_wanted,
    logprob_backward,
    logprob_forward,
    match_forward,
    scale_rows,
    surrogate_forward,
    take_rows,
    topk_forward,
)
from .objective import add_stats, clipped_surrogate_rows
from .spec import MATCH_STATS, STATS, MatchSpec, SurrogateSpec

__all__ = ["STATS", "SurrogateSpec", "logprob", "linear_logprob", "clipped_surrogate", "linear_clipped_surrogate"]
__all__ += ["MATCH_STATS", "MatchSpec", "linear_topk", "linear_match", "decode_attention"]

SCRATCH_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}
SMALL_V = 2048
"""Vocabularies up to this get fp32 logits at once: cheaper than finding the tokens that need them."""
NUM_EXACT = 8
"""How many of a row's likeliest tokens get an exact logit where the chunk rounds them."""
ROW_BYTES = 64
"""A row of the clipped surrogate, out of SCRATCH_BYTES: on a CPU 65536 rows share its 45 calls and stay in cache."""
NUM_GROUPS = 4096
"""Of a row's logits: about as many as k of them hold, for k = 128 and a vocabulary of 152k."""
ROWS_OF_A_BLOCK = 16
"""Rows that share a call of attention, and so the columns of the longest of them."""

SPARE_BYTES = 96 << 10
"""Bytes of a row's unused columns from which attention runs row by row: what is read while a call is dispatched."""


def _blocks(z_NV, temperature_N, refined):
    """-> (slice, its logits over the temperature in fp32, two scratches), a cacheful of rows at a time.

    The logits are z_NV itself, or the first scratch. refined: None, or (which_NK, exact_NK), logits known better than
    z_NV holds them.
    """
    (N, V), dtype = z_NV.shape, wide(z_NV.dtype)
    blocks = spans(N, V * 4, SCRATCH_BYTES[z_NV.device.type])
    scratch = z_NV.new_empty(2, blocks[0].stop if blocks else 0, V, dtype=dtype)
    for rows in blocks:
        z, first, second = z_NV[rows], *scratch[:, : rows.stop - rows.start]
        if z.dtype != dtype or refined is not None:
            z = first.copy_(z)
        if refined is not None:
            z.scatter_(1, refined[0][rows], refined[1][rows])
        if temperature_N is not None:
            z = torch.div(z, temperature_N[rows, None], out=first)
        yield rows, z, first, second


def _reduce(z_NV, ids_N, temperature_N, want_entropy, refined=None):
    """-> top_N, logz_N, logp_N, entropy_N (zeros unless wanted)."""
    top_N, logz_N, logp_N, entropy_N = z_NV.new_zeros(4, z_NV.shape[0], dtype=wide(z_NV.dtype))
    for rows, z, first, second in _blocks(z_NV, temperature_N, refined):
        ids = ids_N[rows, None]
        top = z.amax(1, keepdim=True)
        target = z.gather(1, ids) - top
        p = torch.softmax(z, 1, out=second)  # its sum rounds, by 5e-6 at V = 151936: a factor, which leaves below
        most, own = p.amax(1, keepdim=True), p.gather(1, ids)
        rest = p.scatter_(1, ids, 0.0).sum(1, keepdim=True)
        logz = ((rest + own) / most).log()
        # A peaked row: log(own) - log(own + rest) rounds 1 - p to multiples of 2**-24, log1p does not.
        logp = torch.where(rest < own, -(rest / own).log1p(), target - logz)
        top_N[rows], logz_N[rows], logp_N[rows] = top[:, 0], logz[:, 0], logp[:, 0]
        if want_entropy:
            z = torch.sub(z, top, out=first).clamp_(min=-1e30)  # a banned token adds 0, not 0 * -inf
            mean = p.mul_(z).sum(1) + (own * target.clamp(min=-1e30))[:, 0]
            entropy_N[rows] = logz[:, 0] - mean / (rest + own)[:, 0]
    return top_N, logz_N, logp_N, entropy_N


def _differentiate(
    z_NV, out_NV, ids_N, temperature_N, top_N, logz_N, logp_N, entropy_N, dlogp_N, dentropy_N, refined=None, mask_N=None
):
    """out_NV (which may be z_NV) <- the gradient of the logits; exactly 0 where mask_N is False."""
    scale_N = dlogp_N if temperature_N is None else dlogp_N / temperature_N
    own_N = -scale_N * logp_N.expm1()  # g (1 - p) with no cancellation
    for rows, z, first, second in _blocks(z_NV, temperature_N, refined):
        p = torch.softmax(z, 1, out=second)
        factor = -1 / p.sum(1)  # that factor leaves here
        if dentropy_N is None:
            grad, own = p.mul_((scale_N[rows] * factor)[:, None]), own_N[rows]
        else:
            slope = dentropy_N[rows] if temperature_N is None else dentropy_N[rows] / temperature_N[rows]
            z = torch.sub(z, top_N[rows, None], out=first).sub_(logz_N[rows, None])
            z.clamp_(min=-1e30).add_(entropy_N[rows, None]).mul_((slope * factor)[:, None])
            own = own_N[rows] - logp_N[rows].exp() * (logp_N[rows].clamp(min=-1e30) + entropy_N[rows]) * slope
            grad = z.add_((scale_N[rows] * factor)[:, None]).mul_(p)
        grad.scatter_(1, ids_N[rows, None], own[:, None])
        if mask_N is not None:
            grad.masked_fill_(~mask_N[rows, None], 0.0)
        out_NV[rows] = grad
    return out_NV


def _temperature(temperature, like_N):
    """Number or tensor -> fp32 [N] (fp64 beside fp64), None for 1."""
    if isinstance(temperature, torch.Tensor):
        return temperature.detach().to(like_N.dtype)
    return None if temperature == 1.0 else torch.full_like(like_N, temperature)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, ids_N, bad_N, temperature_N, mask_N, want_entropy):
        ctx.set_materialize_grads(False)
        top_N, logz_N, logp_N, entropy_N = _reduce(logits_NV, ids_N, temperature_N, want_entropy)
        ctx.save_for_backward(logits_NV, ids_N, temperature_N, mask_N, top_N, logz_N, logp_N, entropy_N)
        shown_N, entropy_N = logp_N.masked_fill(bad_N, float("nan")), entropy_N.clone()  # the saved stay as they are
        if mask_N is not None:
            shown_N, entropy_N = torch.where(mask_N, shown_N, 0.0), torch.where(mask_N, entropy_N, 0.0)
        return (shown_N, entropy_N) if want_entropy else shown_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_N, dentropy_N=None):
        logits_NV, ids_N, temperature_N, mask_N, top_N, logz_N, logp_N, entropy_N = ctx.saved_tensors
        dlogp_N = torch.zeros_like(logp_N) if dlogp_N is None else dlogp_N
        rows, out_NV = (top_N, logz_N, logp_N, entropy_N, dlogp_N, dentropy_N), torch.empty_like(logits_NV)
        dlogits_NV = _differentiate(logits_NV, out_NV, ids_N, temperature_N, *rows, mask_N=mask_N)
        return dlogits_NV, None, None, None, None, None


def logprob(logits_NV, ids_N, *, temperature=1.0, mask_N=None, entropy=False):
    """As eager.logprob. Keeps the logits and four numbers a row; the backward allocates the gradient and no more."""
    check_logits(logits_NV, ids_N, temperature, mask_N)
    ids_N, bad_N = safe_ids(ids_N, logits_NV.shape[1], mask_N)
    like_N = logits_NV.new_empty(ids_N.shape, dtype=wide(logits_NV.dtype))
    return _LogProb.apply(logits_NV, ids_N, bad_N, _temperature(temperature, like_N), mask_N, entropy)


def _refine(head, h_CD, z_CV, ids_C):
    """-> (which_CK, exact_CK) where z_CV is rounded, else None: the id and likeliest tokens, and their fp32 logits.

    They carry most of the probability, so their rounding is most of the error: bf16 rounds a logit of 30 by 0.06, and
    the log-probability after this is off by 0.004.
    """
    if not head.rounds:
        return None
    top_CK = z_CV.topk(min(NUM_EXACT, z_CV.shape[1]), sorted=False).indices
    which_CK = torch.cat((ids_C[:, None], top_CK), 1)
    return which_CK, _exact_logits(head, h_CD, which_CK)


def _exact_logits(head, h_CD, which_CK):
    h_CD = h_CD.float()
    columns = [torch.linalg.vecdot(h_CD, head.weight_VD[which_C].float()) for which_C in which_CK.unbind(1)]
    exact_CK = torch.stack(columns, 1)
    return exact_CK if head.bias_V is None else exact_CK + head.bias_V[which_CK]


def _look_up(head, h_CD, z_CV, temperature_C, top_C, logz_C, which_CK):
    z_CK = _exact_logits(head, h_CD, which_CK) if head.rounds else z_CV.gather(1, which_CK)
    z_CK = z_CK if temperature_C is None else z_CK / temperature_C[:, None]
    return z_CK - top_C[:, None] - logz_C[:, None]


def _passes(want_entropy):
    def reduce(head, h_CD, z_CV, ids_C, temperature_C):
        refined = _refine(head, h_CD, z_CV, ids_C)
        return *_reduce(z_CV, ids_C, temperature_C, want_entropy, refined), refined

    def differentiate(z_CV, *rest):
        return _differentiate(z_CV, z_CV, *rest)

    return Passes(reduce, differentiate, _look_up)


class _LinearLogProb(torch.autograd.Function):
    """1 GEMM without gradients; 2 with a frozen head, whose part of dhidden does not wait for dlogp; else 4."""

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, bias_V, ids_M, bad_M, temperature_M, want_entropy, accurate, needs):
        ctx.set_materialize_grads(False)
        inputs = (hidden_MD, weight_VD, bias_V, ids_M, temperature_M)
        early = needs[0] and not any(needs[1:]) and not want_entropy
        rows, dhidden_MD = logprob_forward(_passes(want_entropy), *inputs, accurate, early)
        ctx.accurate, ctx.needs = accurate, needs
        ctx.save_for_backward(dhidden_MD, *inputs, *rows)
        logp_M = rows.logp_M.masked_fill(bad_M, float("nan"))
        return (logp_M, rows.entropy_M.clone()) if want_entropy else logp_M

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_M, dentropy_M=None):
        dhidden_MD, *inputs = ctx.saved_tensors
        inputs, rows = inputs[:5], Rows(*inputs[5:])
        if dlogp_M is None and dentropy_M is None:
            return (None,) * 9
        if dlogp_M is None:
            dlogp_M = torch.zeros_like(rows.logp_M)
        if dhidden_MD is not None:
            return scale_rows(dhidden_MD, dlogp_M).to(inputs[0].dtype), *[None] * 8
        grads = logprob_backward(_passes(True), *inputs, ctx.accurate, rows, dlogp_M, dentropy_M, ctx.needs)
        return *grads, *[None] * 6


def linear_logprob(
    hidden_ND, weight_VD, ids_M, *, bias_V=None, temperature=1.0, rows_M=None, entropy=False, accurate=False
):
    """As eager.linear_logprob. The backward makes the logits again, unless the head is frozen and no entropy asked."""
    check_linear(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M)
    hidden_MD = take_rows(hidden_ND, rows_M)
    ids_M, bad_M = safe_ids(ids_M, weight_VD.shape[0])
    temperature_M = _temperature(temperature, hidden_MD.new_empty(ids_M.shape, dtype=wide(hidden_MD.dtype)))
    accurate, needs = accurate or weight_VD.shape[0] <= SMALL_V, grads_wanted(hidden_MD, weight_VD, bias_V)
    return _LinearLogProb.apply(hidden_MD, weight_VD, bias_V, ids_M, bad_M, temperature_M, entropy, accurate, needs)


def _scaled(grad, by):
    """grad * by, out of place for a second backward; on a CPU, where looking is free, by = 1 copies nothing."""
    return grad if grad is None or by.device.type == "cpu" and by == 1 else (grad * by).to(grad.dtype)


class _ClippedSurrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp_N, entropy_N, logp_old_N, adv_N, weight_N, spec, logp_ref_N, logp_behaviour_N):
        loss, stats = logp_N.new_zeros(()), logp_N.new_zeros(len(STATS), dtype=torch.float32)
        dlogp_N = torch.empty_like(logp_N)
        dentropy_N = torch.empty_like(entropy_N) if spec.entropy_coef and entropy_N is not None else None
        for rows in spans(logp_N.shape[0], ROW_BYTES, SCRATCH_BYTES[logp_N.device.type]):
            logp_C, old_C, adv_C, weight_C, ref_C, behaviour_C, entropy_C = cut(
                rows, logp_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N, entropy_N
            )
            others = dict(logp_ref_N=ref_C, logp_behaviour_N=behaviour_C, entropy_N=entropy_C)
            found = clipped_surrogate_rows(logp_C, old_C, adv_C, weight_C, spec, **others)
            part, dlogp_N[rows], dentropy_C, more = found
            if dentropy_N is not None:
                dentropy_N[rows] = dentropy_C
            loss, stats = loss + part, add_stats(stats, more)
        ctx.save_for_backward(dlogp_N, dentropy_N)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        return *[_scaled(grad, dloss) for grad in ctx.saved_tensors], *[None] * 6


def clipped_surrogate(
    logp_N, logp_old_N, adv_N, weight_N, spec, *, logp_ref_N=None, logp_behaviour_N=None, entropy_N=None
):
    """As eager.clipped_surrogate; the gradient is formed in the forward."""
    others = dict(logp_ref_N=logp_ref_N, logp_behaviour_N=logp_behaviour_N, entropy_N=entropy_N)
    vectors = dict(logp_N=logp_N, logp_old_N=logp_old_N, adv_N=adv_N, weight_N=weight_N, **others)
    check_rows(logp_N.shape[0], logp_N.device, **vectors)
    return _ClippedSurrogate.apply(logp_N, entropy_N, logp_old_N, adv_N, weight_N, spec, logp_ref_N, logp_behaviour_N)


class _LinearLoss(torch.autograd.Function):
    """1 GEMM without gradients, 2 with a frozen head, else 3: the loss gives its slope before the logits leave."""

    @staticmethod
    def forward(ctx, *args):
        *args, loss_forward = args
        loss, logp_M, stats, *grads = loss_forward(*args)
        ctx.num_args = len(args)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(logp_M, stats)
        return loss, logp_M, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        return *[_scaled(grad, dloss) for grad in ctx.saved_tensors], *[None] * (ctx.num_args - 2)


def linear_clipped_surrogate(
    hidden_ND, weight_VD, ids_M, logp_old_M, adv_M, weight_M, spec, *, bias_V=None, temperature=1.0, rows_M=None,
    logp_ref_M=None, logp_behaviour_M=None, accurate=False,
):  # fmt: skip
    """As eager.linear_clipped_surrogate, in one pass: the gradient is formed in the forward, 3 GEMMs in all."""
    vectors = dict(
        logp_old_M=logp_old_M, adv_M=adv_M, weight_M=weight_M, logp_ref_M=logp_ref_M, logp_behaviour_M=logp_behaviour_M
    )
    check_linear(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M, **vectors)
    if rows_M is None and hidden_ND.device.type == "cpu":
        surrogate = partial(linear_clipped_surrogate, hidden_ND, weight_VD, spec=spec, bias_V=bias_V, accurate=accurate)
        return over_weighted_rows(surrogate, ids_M=ids_M, temperature=temperature, **vectors)
    live_M = weight_M != 0 if rows_M is None else None  # how many, the host cannot know: all enter, these as zeros
    hidden_MD = take_rows(hidden_ND, rows_M)
    ids_M, bad_M = safe_ids(ids_M, weight_VD.shape[0], live_M)
    temperature_M = _temperature(temperature, hidden_MD.new_empty(ids_M.shape, dtype=wide(hidden_MD.dtype)))
    accurate, needs = accurate or weight_VD.shape[0] <= SMALL_V, grads_wanted(hidden_MD, weight_VD, bias_V)
    rows = live_M, ids_M, bad_M, temperature_M, [*vectors.values()]
    surrogate = partial(surrogate_forward, _passes(True))
    loss, logp_M, stats = _LinearLoss.apply(hidden_MD, weight_VD, bias_V, *rows, spec, accurate, needs, surrogate)
    stats[STATS.index("rows_skipped")] += len(hidden_ND) - len(ids_M)
    return loss, logp_M, stats


def linear_match(
    hidden_ND, weight_VD, ids_M, top_ids_MK, top_logp_MK, weight_M, spec, *, bias_V=None, temperature=1.0, rows_M=None,
    accurate=False,
):  # fmt: skip
    """As eager.linear_match, in one pass: the gradient is formed in the forward, 3 GEMMs in all."""
    check_match(hidden_ND, weight_VD, ids_M, top_ids_MK, top_logp_MK, weight_M, bias_V, temperature, rows_M)
    if rows_M is None and hidden_ND.device.type == "cpu":
        match = partial(linear_match, hidden_ND, weight_VD, spec=spec, bias_V=bias_V, accurate=accurate)
        vectors = dict(top_ids_MK=top_ids_MK, top_logp_MK=top_logp_MK, weight_M=weight_M)
        return over_weighted_rows(match, ids_M=ids_M, temperature=temperature, **vectors)
    live_M = weight_M != 0 if rows_M is None else None
    hidden_MD = take_rows(hidden_ND, rows_M)
    ids_M, top_ids_MK, bad_M = safe_top_ids(ids_M, top_ids_MK, weight_VD.shape[0], live_M)
    temperature_M = _temperature(temperature, hidden_MD.new_empty(ids_M.shape, dtype=wide(hidden_MD.dtype)))
    accurate, needs = accurate or weight_VD.shape[0] <= SMALL_V, grads_wanted(hidden_MD, weight_VD, bias_V)
    rows = live_M, ids_M, bad_M, temperature_M, [top_ids_MK, top_logp_MK, weight_M]
    match = partial(match_forward, _passes(False))
    loss, logp_M, stats = _LinearLoss.apply(hidden_MD, weight_VD, bias_V, *rows, spec, accurate, needs, match)
    stats[MATCH_STATS.index("rows_skipped")] += len(hidden_ND) - len(ids_M)
    return loss, logp_M, stats


def _reduce_to_groups(z_NV, temperature_N):
    """-> top_N, logz_N, and the largest logit of each group of columns [N, B], all fp32."""
    (N, V), dtype = z_NV.shape, wide(z_NV.dtype)
    B = min(V, NUM_GROUPS)
    (top_N, logz_N), largest_NB = z_NV.new_empty(2, N, dtype=dtype), z_NV.new_empty(N, B, dtype=dtype)
    for rows, z, _, scratch in _blocks(z_NV, None, None):
        largest, tail = largest_NB[rows], z[:, V - V % B :]
        torch.amax(z[:, : V - V % B].unflatten(1, (-1, B)), 1, out=largest)
        largest[:, : V % B] = torch.maximum(largest[:, : V % B], tail)
        top = largest.amax(1, keepdim=True)
        p = torch.sub(z, top, out=scratch)
        p = p if temperature_N is None else p.div_(temperature_N[rows, None])
        top_N[rows], logz_N[rows] = top[:, 0], p.exp_().sum(1).log()
    return top_N, logz_N, largest_NB


def linear_topk(hidden_ND, weight_VD, k, *, bias_V=None, temperature=1.0, rows_M=None, accurate=False):
    """As eager.linear_topk, a chunk of logits at a time; of a row, k groups of columns are searched, not all."""
    check_topk(hidden_ND, weight_VD, k, bias_V, temperature, rows_M)
    hidden_MD = take_rows(hidden_ND, rows_M)
    temperature_M = _temperature(temperature, hidden_MD.new_empty(len(hidden_MD), dtype=wide(hidden_MD.dtype)))
    accurate = accurate or weight_VD.shape[0] <= SMALL_V
    return topk_forward(_reduce_to_groups, hidden_MD, weight_VD, bias_V, temperature_M, k, accurate)


def _attend_to_rows(q_MKGD, keys_MKLD, values_MKLD, columns, scale):
    """A call a row: no column outside its slice is read."""
    out_MKGD = torch.zeros_like(q_MKGD)
    for q, keys, values, out, c in zip(*(x.split(1) for x in (q_MKGD, keys_MKLD, values_MKLD, out_MKGD)), columns):
        if c.stop:
            out[:] = F.scaled_dot_product_attention(q, keys[:, :, c], values[:, :, c], scale=scale)
    return out_MKGD


def _attend_to_all(q_MKGD, keys_MKLD, values_MKLD, outside_ML, c, scale):
    """One call for all rows over the slice `c` of columns; NaN or inf outside a row's own make its output NaN."""
    inside_M11L = ~outside_ML[:, None, None, c]
    return F.scaled_dot_product_attention(
        q_MKGD, keys_MKLD[:, :, c], values_MKLD[:, :, c], attn_mask=inside_M11L, scale=scale
    )


def _attend_unseen(q_MKGD, keys_MKLD, values_MKLD, outside_ML, scale):
    """All columns, in clean copies of a block of rows: the host does not know the lengths."""
    M, K, L, D = keys_MKLD.shape
    out_MKGD = torch.empty_like(q_MKGD)
    for r in spans(M, 2 * K * L * D * q_MKGD.dtype.itemsize, SCRATCH_BYTES[q_MKGD.device.type]):
        keys_RKLD, values_RKLD = (x[r].masked_fill(outside_ML[r, None, :, None], 0.0) for x in (keys_MKLD, values_MKLD))
        out_MKGD[r] = _attend_to_all(q_MKGD[r], keys_RKLD, values_RKLD, outside_ML[r], slice(L), scale)
    return out_MKGD.masked_fill_(outside_ML.all(1)[:, None, None, None], 0.0)


def _around(columns):
    """The slice that the rows' slices lie in."""
    return slice(min(c.start for c in columns), max(c.stop for c in columns))


def _num(columns):
    return columns.stop - columns.start


def _attend_to_block(q_MKGD, keys_MKLD, values_MKLD, outside_ML, columns, scale):
    """All rows together, or each by itself: where that spares much, or NaN and inf have to be kept out."""
    all_columns, itemsize = _around(columns), q_MKGD.dtype.itemsize
    unused = _num(all_columns) * len(columns) - sum(map(_num, columns))
    unused_bytes = unused * 2 * keys_MKLD.shape[1] * keys_MKLD.shape[3] * itemsize
    if all_columns.stop and unused_bytes <= len(columns) * SPARE_BYTES:
        out_MKGD = _attend_to_all(q_MKGD, keys_MKLD, values_MKLD, outside_ML, all_columns, scale)
        if math.isfinite(out_MKGD.sum().item()):
            return out_MKGD
    return _attend_to_rows(q_MKGD, keys_MKLD, values_MKLD, columns, scale)


def decode_attention(q_MHD, keys_SKLD, values_SKLD, length_M, *, scale=None, window=None):
    """As eager.decode_attention. On a CPU all rows are read up to the longest, or, where that spares much, each 16 up
    to the longest of them, or each row up to its own length, and from the first column of a window on as well. Stale
    but finite columns cost nothing; NaN or inf in them, a second pass.

    The query heads of a group enter as query tokens of one head: keys and values are read once and never repeated.
    """
    lengths = check_decode_attention(q_MHD, keys_SKLD, values_SKLD, length_M, scale, window)
    (M, H, _), (_, K, L, _) = q_MHD.shape, keys_SKLD.shape
    outside_ML = outside_columns(L, length_M, window)
    inputs = q_MHD.unflatten(1, (K, H // K)), keys_SKLD[:M], values_SKLD[:M], outside_ML
    if lengths is None:
        return _attend_unseen(*inputs, scale).flatten(1, 2)
    columns = [slice(0 if window is None else max(0, n - window), n) for n in lengths]
    blocks = [slice(m, min(m + ROWS_OF_A_BLOCK, M)) for m in range(0, M, ROWS_OF_A_BLOCK)]
    read = sum((r.stop - r.start) * _num(_around(columns[r])) for r in blocks)
    if M and read > 0.9 * M * _num(_around(columns)):
        blocks = [slice(0, M)]
    outs = [_attend_to_block(*(x[r] for x in inputs), columns[r], scale) for r in blocks]
    return torch.cat(outs).flatten(1, 2) if outs else torch.empty_like(q_MHD)
