"""The clipped surrogate of spec.py on [N] log-probabilities: value, gradient and stats in one Triton pass.

One program walks SPAN rows and keeps a lane of every sum; up to SPAN rows that is the whole forward, one launch, and
the backward is the other, entropy or not. Sums are added in a fixed order. N rows. Oracle: eager.clipped_surrogate.
"""

from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .logprob import _expm1
from .ops import launching, op
from .spec import FORMS, STATS, SurrogateSpec

BLOCK, SPAN = 1024, 32768
NUMBERS = [field.name for field in fields(SurrogateSpec) if field.name != "form"]


@triton.jit
def _bounded(x, bound):
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))  # unlike min and max, keeps a nan


@triton.jit
def _load_used(ptrs, inside, used):
    """0 in rows of weight 0, whatever they hold; the load's mask stays free of data, so that it is 128 bits wide."""
    return tl.where(used, tl.load(ptrs, mask=inside, other=0.0), 0.0)


@triton.jit
def _clipped_surrogate_kernel(
    logp_ptr, logp_old_ptr, adv_ptr, weight_ptr, logp_ref_ptr, logp_behaviour_ptr, entropy_ptr, dlogp_ptr,
    dentropy_ptr, sums_ptr, loss_ptr,
    floor, ceiling, dual_clip, kl_coef, entropy_coef, importance_cap, bound, mask_low, mask_high, tau_pos, tau_neg,
    N, FORM: tl.constexpr, NUM_SUMS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * SPAN
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    loss_sum, tokens, low_sum, high_sum, ratio_sum, kl_sum = zero, zero, zero, zero, zero, zero
    old_sum, entropy_sum, logp_sum, skipped, ratio_max = zero, zero, zero, zero, zero
    for start in range(0, tl.minimum(SPAN, N - first), BLOCK):
        n = first + start + lane
        inside = n < N
        weight = tl.load(weight_ptr + n, mask=inside, other=0.0)
        used = weight != 0.0
        logp = _load_used(logp_ptr + n, inside, used)
        adv = _load_used(adv_ptr + n, inside, used)
        old = logp
        if logp_old_ptr is not None:
            old = _load_used(logp_old_ptr + n, inside, used)
        log_ratio = logp - old
        ratio = tl.exp(_bounded(log_ratio, bound))
        low = (adv < 0.0) & (ratio < floor)
        high = (adv > 0.0) & (ratio > ceiling)
        scale, off = -adv, adv == 0.0
        if logp_behaviour_ptr is not None:
            importance = tl.exp(old - _load_used(logp_behaviour_ptr + n, inside, used))
            scale *= tl.where(importance > importance_cap, importance_cap, importance)
            off |= (importance < mask_low) | (importance > mask_high)
        if FORM == "clip":
            dual = (adv < 0.0) & (ratio > dual_clip)
            gain = tl.where(low, floor, tl.where(high, ceiling, tl.where(dual, dual_clip, ratio)))
            slope, flat = ratio, low | high | dual | (tl.abs(log_ratio) > bound)
        elif FORM == "cispo":
            low, high = (adv != 0.0) & (ratio < floor), (adv != 0.0) & (ratio > ceiling)
            slope = tl.where(low, floor, tl.where(high, ceiling, ratio))
            gain, flat = slope * logp, off
        else:
            tau = tl.where(adv > 0.0, tau_pos, tau_neg)
            x = tau * (ratio - 1.0)
            gain, slope = 4.0 / tau * tl.sigmoid(x), 4.0 * tl.sigmoid(x) * tl.sigmoid(-x) * ratio
            flat = (ratio == float("inf")) | (tl.abs(log_ratio) > bound)
        loss = tl.where(off, 0.0, scale * gain)
        dlogp = tl.where(off | flat, 0.0, scale * slope)
        if logp_ref_ptr is not None:
            d = _load_used(logp_ref_ptr + n, inside, used) - logp
            slope = _expm1(_bounded(d, bound))
            k3 = slope - _bounded(d, bound)
            kl_sum += tl.where(used, k3, 0.0)
            loss += tl.where(kl_coef == 0.0, 0.0, kl_coef * k3)
            dlogp -= tl.where((kl_coef == 0.0) | (tl.abs(d) > bound), 0.0, kl_coef * slope)
        if entropy_ptr is not None:
            entropy = _load_used(entropy_ptr + n, inside, used)
            entropy_sum += entropy
            loss -= tl.where(entropy_coef == 0.0, 0.0, entropy_coef * entropy)
        tl.store(dlogp_ptr + n, tl.where(used, weight * dlogp, 0.0), mask=inside)
        if dentropy_ptr is not None:
            tl.store(dentropy_ptr + n, -entropy_coef * weight, mask=inside)
        loss_sum += tl.where(used, weight * loss, 0.0)
        tokens += used.to(tl.float32)
        skipped += (inside & (weight == 0.0)).to(tl.float32)
        low_sum += low.to(tl.float32)
        high_sum += high.to(tl.float32)
        ratio_sum += tl.where(used, ratio, 0.0)
        old_sum -= log_ratio
        logp_sum += logp
        ratio = tl.where(used, ratio, 0.0)
        ratio_max = tl.where(ratio > ratio_max, ratio, tl.where(ratio == ratio, ratio_max, ratio))
    row_ptr = sums_ptr + tl.program_id(0) * NUM_SUMS
    tl.store(row_ptr + 0, tl.sum(tokens, 0))
    tl.store(row_ptr + 1, tl.sum(low_sum, 0))
    tl.store(row_ptr + 2, tl.sum(high_sum, 0))
    tl.store(row_ptr + 3, tl.sum(ratio_sum, 0))
    tl.store(row_ptr + 4, tl.sum(kl_sum, 0))
    tl.store(row_ptr + 5, tl.sum(old_sum, 0))
    tl.store(row_ptr + 6, tl.sum(entropy_sum, 0))
    tl.store(row_ptr + 7, tl.sum(logp_sum, 0))
    tl.store(row_ptr + 8, tl.sum(skipped, 0))
    tl.store(row_ptr + 9, 0.0)  # bad_ids: there are no ids here
    tl.store(row_ptr + 10, tl.max(ratio_max, 0))
    tl.store(loss_ptr + tl.program_id(0), tl.sum(loss_sum, 0))


def _clipped_surrogate(logp_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N, entropy_N, spec):
    """spec: `spec_numbers`.

    -> dlogp_N, dentropy_N (empty where entropy_coef is 0), stats and loss, with an axis of programs if several.
    """
    N = logp_N.shape[0]
    num_programs = max(1, triton.cdiv(N, SPAN))
    programs = () if num_programs == 1 else (num_programs,)
    dlogp_N = torch.empty_like(logp_N)
    wants_entropy = entropy_N is not None and spec[4] != 0
    dentropy_N = torch.empty_like(logp_N) if wants_entropy else logp_N.new_empty(0)
    stats, loss = logp_N.new_empty(*programs, len(STATS)), logp_N.new_empty(programs)
    clip_low, clip_high, *rest, form = spec
    with launching(logp_N):
        _clipped_surrogate_kernel[(num_programs,)](
            logp_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N, entropy_N, dlogp_N,
            dentropy_N if wants_entropy else None, stats, loss, 1 - clip_low, 1 + clip_high, *rest, N,
            FORM=FORMS[int(form)], NUM_SUMS=len(STATS), SPAN=SPAN, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return dlogp_N, dentropy_N, stats, loss


def spec_numbers(spec):
    """SurrogateSpec -> the floats an op takes, in its fields' order: absent bounds infinite, its form by number."""
    numbers = [getattr(spec, name) for name in NUMBERS]
    return [float("inf") if x is None else float(x) for x in numbers] + [float(FORMS.index(spec.form))]


def spec_of(numbers):
    """What `spec_numbers` was given, absent bounds infinite."""
    *numbers, form = numbers
    return SurrogateSpec(*numbers, FORMS[int(form)])


@op("clipped_surrogate_fwd")
def clipped_surrogate_fwd(
    logp_N: torch.Tensor, logp_old_N: torch.Tensor | None, adv_N: torch.Tensor, weight_N: torch.Tensor,
    logp_ref_N: torch.Tensor | None, logp_behaviour_N: torch.Tensor | None, entropy_N: torch.Tensor | None,
    spec: list[float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dlogp_N, dentropy_N (empty where entropy_coef is 0), stats, loss []."""
    vectors = (logp_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N, entropy_N)
    dlogp_N, dentropy_N, stats, loss = _clipped_surrogate(*[x if x is None else x.contiguous() for x in vectors], spec)
    if loss.dim():
        most = STATS.index("ratio_max")
        stats, parts = stats.sum(0), stats
        stats[most], loss = parts[:, most].max(), loss.sum()
    return dlogp_N, dentropy_N, stats, loss


@clipped_surrogate_fwd.register_fake
def _(logp_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N, entropy_N, spec):
    new = lambda *shape: logp_N.new_empty(shape)
    num_slopes = len(logp_N) if entropy_N is not None and spec[4] else 0
    return new(len(logp_N)), new(num_slopes), new(len(STATS)), new()


class _ClippedSurrogate(torch.autograd.Function):
    """(logp_N, entropy_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N, spec numbers) -> loss, stats."""

    @staticmethod
    def forward(ctx, logp_N, entropy_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N, spec):
        ctx.set_materialize_grads(False)  # zeros for stats would be a launch
        dlogp_N, dentropy_N, stats, loss = clipped_surrogate_fwd(
            logp_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N, entropy_N, spec
        )
        ctx.wants_entropy = entropy_N is not None and bool(spec[4])
        ctx.save_for_backward(*[dlogp_N, dentropy_N][: 1 + ctx.wants_entropy])
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        if dloss is None:
            return (None,) * 8
        grads = torch._foreach_mul(ctx.saved_tensors, dloss)  # one launch for both
        return *grads, *[None] * (8 - len(grads))
