"""Log-probability and entropy of the chosen token from logits, Triton.

  logp = z_id - top - logz,  logz = log sum_j exp(z_j - top),  H = logz - sum_j p_j (z_j - top),  z = logits / T
  dlogits_j = (g (onehot_j - p_j) - e p_j (log p_j + H)) / T,  g = dL/dlogp, e = dL/dH
The forward reads the logits once; the backward reads and writes them once, in place where told to. `top` is kept as a
logit, before the temperature. Inside the kernels a row with id < 0 is left out (0, unread); id >= V gives NaN.
N rows, V vocabulary. Oracle: eager.logprob.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .checks import safe_ids
from .ops import launching, op

LOWEST = tl.constexpr(-3.0e38)  # finite, so that a block of banned tokens (all -inf) adds 0, not nan
BANNED = tl.constexpr(-1.0e30)  # stands for -inf where p = 0 multiplies it
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log1p(x):
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def _expm1(x):
    u = tl.exp(x)
    return tl.where(u == 1.0, x, tl.where((u < 0.5) | (u > 2.0), u - 1.0, (u - 1.0) * (x / tl.log(u))))


@triton.jit
def _to_log2(temperature_ptr, n):
    """Factor from a logit to log2 units: powers of two cost one instruction less than powers of e."""
    return LOG2E if temperature_ptr is None else tl.div_rn(tl.full([], LOG2E, tl.float32), tl.load(temperature_ptr + n))


@triton.jit
def _cooled(gap, temperature_ptr, n):
    """A difference of logits in nats, rounded once: the way through log2 units would round three times."""
    return gap if temperature_ptr is None else tl.div_rn(gap, tl.load(temperature_ptr + n))


@triton.jit
def _add_block(x, block_max, factor, top, rest, moment, MOMENT: tl.constexpr):
    """Online sums after one more block of logits: with t = (x - top) factor, rest = sum 2^t and moment = sum 2^t t."""
    new_top = tl.maximum(top, block_max)
    gap = tl.maximum((top - new_top) * factor, BANNED)
    shrink = tl.exp2(gap)
    t = (x - new_top) * factor
    p = tl.exp2(t)
    if MOMENT:
        moment = shrink * (moment + gap * rest) + tl.sum(p * tl.maximum(t, BANNED), 0)
    return new_top, shrink * rest + tl.sum(p, 0), moment


@triton.jit
def _finish_row(own, temperature_ptr, n, factor, top, rest, moment):
    """-> logz, logp, entropy in nats, for a token of logit `own`, the others summed in rest and moment."""
    t = (own - top) * factor
    p = tl.exp2(t)
    total = rest + p
    logz = tl.log(total)
    # A peaked row: log(total) would round 1 - p to multiples of 2**-24.
    logp = tl.where(rest < p, -_log1p(rest / p), _cooled(own - top, temperature_ptr, n) - logz)
    return logz, logp, logz - LN2 * (moment + p * tl.maximum(t, BANNED)) / total


@triton.jit
def _logprob_fwd_kernel(
    logits_ptr, ids_ptr, temperature_ptr, top_ptr, logz_ptr, logp_ptr, entropy_ptr, strides, columns,
    UNIT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)  # int64: n * V passes 2**31 at 14k rows of a 152k vocabulary
    V = columns * UNIT
    row_ptr = logits_ptr + n * strides * UNIT
    id = tl.load(ids_ptr + n)
    top, logz, logp, entropy = 0.0, 0.0, 0.0, 0.0
    if id >= 0:
        factor = _to_log2(temperature_ptr, n)
        own = tl.load(row_ptr + id, mask=id < V, other=float("nan")).to(tl.float32)
        top, rest, moment = tl.maximum(own, LOWEST), 0.0, 0.0
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            if (id >= start) & (id < start + BLOCK_V):
                x = tl.where(v == id.to(tl.int32), -float("inf"), x)
            top, rest, moment = _add_block(x, tl.max(x, 0), factor, top, rest, moment, MOMENT=entropy_ptr is not None)
        logz, logp, entropy = _finish_row(own, temperature_ptr, n, factor, top, rest, moment)
    tl.store(top_ptr + n, top)
    tl.store(logz_ptr + n, logz)
    tl.store(logp_ptr + n, logp)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + n, entropy)


@triton.jit
def _logprob_bwd_kernel(
    logits_ptr, dlogits_ptr, ids_ptr, temperature_ptr, best_ids_ptr, best_ptr, top_ptr, logz_ptr, logp_ptr, entropy_ptr,
    dlogp_ptr, dentropy_ptr, strides, out_strides, columns, UNIT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    V = columns * UNIT
    row_ptr = logits_ptr + n * strides * UNIT
    out_ptr = dlogits_ptr + n * out_strides * UNIT
    id = tl.load(ids_ptr + n)
    g = tl.load(dlogp_ptr + n)
    e = 0.0 * g if dentropy_ptr is None else tl.load(dentropy_ptr + n)
    if (id < 0) | ((g == 0.0) & (e == 0.0)):
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            tl.store(out_ptr + v, tl.zeros([BLOCK_V], dlogits_ptr.dtype.element_ty), mask=v < V)
    else:
        factor = _to_log2(temperature_ptr, n)
        scale = factor * LN2
        logp = tl.load(logp_ptr + n)
        top, logz = tl.load(top_ptr + n), tl.load(logz_ptr + n) * LOG2E
        own = -scale * g * _expm1(logp)  # g (1 - p) with no cancellation
        if dentropy_ptr is not None:
            entropy = tl.load(entropy_ptr + n)
            own -= scale * e * tl.exp(logp) * (tl.maximum(logp, BANNED) + entropy)
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            if best_ids_ptr is not None:
                best_id = tl.load(best_ids_ptr + n)
                if (best_id >= start) & (best_id < start + BLOCK_V):
                    x = tl.where(v == best_id, tl.load(best_ptr + n), x)
            t = (x - top) * factor - logz
            grad = -scale * g * tl.exp2(t)
            if dentropy_ptr is not None:
                grad -= scale * e * tl.exp2(t) * (tl.maximum(t * LN2, BANNED) + entropy)
            if (id >= start) & (id < start + BLOCK_V):
                grad = tl.where(v == id.to(tl.int32), own, grad)
            tl.store(out_ptr + v, grad.to(dlogits_ptr.dtype.element_ty), mask=v < V)


def rows_in_units(V, *strides):
    """(UNIT, V in units, strides in units): the kernel sees that rows start on, and hold, whole 128-bit words."""
    unit = 8 if all(x % 8 == 0 for x in (V, *strides)) else 1
    return unit, V // unit, [x // unit for x in strides]


def block_of(V):
    """BLOCK_V and num_warps: four 128-bit loads of bf16 a thread, and fewer threads for a small vocabulary."""
    block = min(4096, max(64, triton.next_power_of_2(V)))
    return block, max(1, block // 1024)


def _logprob_fwd(logits_NV, ids_N, temperature_N, want_entropy=True):
    """-> top_N, logz_N, logp_N, entropy_N fp32; the last None unless wanted."""
    N, V = logits_NV.shape
    outs = [torch.empty(N, dtype=torch.float32, device=logits_NV.device) for _ in range(3 + want_entropy)]
    outs += [None] * (not want_entropy)
    unit, columns, (strides,) = rows_in_units(V, logits_NV.stride(0))
    block, num_warps = block_of(V)
    with launching(logits_NV):
        _logprob_fwd_kernel[(N,)](
            logits_NV, ids_N, temperature_N, *outs, strides, columns, UNIT=unit, BLOCK_V=block, num_warps=num_warps
        )
    return outs


def _logprob_bwd(
    logits_NV, dlogits_NV, ids_N, temperature_N, top_N, logz_N, logp_N, entropy_N, dlogp_N, dentropy_N, refined=None
):
    """dlogits_NV, which may be logits_NV, is overwritten. refined: (best ids [N], their exact logits [N])."""
    N, V = logits_NV.shape
    best_ids_N, best_N = refined or (None, None)
    unit, columns, strides = rows_in_units(V, logits_NV.stride(0), dlogits_NV.stride(0))
    block, num_warps = block_of(V)
    with launching(logits_NV):
        _logprob_bwd_kernel[(N,)](
            logits_NV, dlogits_NV, ids_N, temperature_N, best_ids_N, best_N, top_N, logz_N, logp_N, entropy_N,
            dlogp_N, dentropy_N, *strides, columns, UNIT=unit, BLOCK_V=block, num_warps=num_warps,
        )  # fmt: skip
    return dlogits_NV


def kernel_ids(ids_N, V, active_N=None):
    """int64 ids as the kernels read them: -1 for a row left out, V for an id outside the vocabulary (a CPU raises)."""
    _, bad_N = safe_ids(ids_N, V, active_N)
    ids_N = ids_N.masked_fill(bad_N, V)
    return (ids_N if active_N is None else ids_N.masked_fill(~active_N, -1)).contiguous()


@op("logprob_fwd")
def logprob_fwd(
    logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature_N: torch.Tensor | None, mask_N: torch.Tensor | None,
    want_entropy: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """-> the ids as the kernels read them, top_N, logz_N, logp_N, and entropy_N if wanted."""
    ids_N = kernel_ids(ids_N, logits_NV.shape[1], mask_N)
    rows = _logprob_fwd(logits_NV, ids_N, temperature_N, want_entropy)
    return [ids_N, *rows[: 3 + want_entropy]]


@logprob_fwd.register_fake
def _(logits_NV, ids_N, temperature_N, mask_N, want_entropy):
    row = lambda dtype: logits_NV.new_empty(ids_N.shape, dtype=dtype)
    return [row(torch.int64), *[row(torch.float32) for _ in range(3 + want_entropy)]]


@op("logprob_bwd")
def logprob_bwd(
    logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature_N: torch.Tensor | None, top_N: torch.Tensor,
    logz_N: torch.Tensor, logp_N: torch.Tensor, entropy_N: torch.Tensor | None, dlogp_N: torch.Tensor,
    dentropy_N: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    dlogits_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    rows, dlogp_N = (top_N, logz_N, logp_N, entropy_N), dlogp_N.contiguous()
    dentropy_N = None if dentropy_N is None else dentropy_N.contiguous()
    return _logprob_bwd(logits_NV, dlogits_NV, ids_N, temperature_N, *rows, dlogp_N, dentropy_N)


@logprob_bwd.register_fake
def _(logits_NV, *_):
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


class _LogProb(torch.autograd.Function):
    """(logits_NV, ids_N, temperature_N, mask_N, want_entropy) -> logp_N, or logp_N and entropy_N."""

    @staticmethod
    def forward(ctx, logits_NV, ids_N, temperature_N, mask_N, want_entropy):
        ctx.set_materialize_grads(False)
        rows = logprob_fwd(logits_NV, ids_N, temperature_N, mask_N, want_entropy)
        ctx.save_for_backward(logits_NV, temperature_N, *rows)
        shown = [x.clone() for x in rows[3:]]  # the saved stay as they are, whatever is done to these
        return tuple(shown) if want_entropy else shown[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_N, dentropy_N=None):
        logits_NV, temperature_N, ids_N, top_N, logz_N, logp_N, *entropy_N = ctx.saved_tensors
        dlogp_N = torch.zeros_like(logp_N) if dlogp_N is None else dlogp_N
        entropy_N = entropy_N[0] if entropy_N else None
        dlogits_NV = logprob_bwd(logits_NV, ids_N, temperature_N, top_N, logz_N, logp_N, entropy_N, dlogp_N, dentropy_N)
        return dlogits_NV, None, None, None, None
