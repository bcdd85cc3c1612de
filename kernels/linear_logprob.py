"""Log-probability and entropy from hidden states and the head's weight: products by torch, passes by Triton.

Where the chunk of logits is bf16, the id and the likeliest other token of each row get an exact logit: a dot product in
fp32 inside the kernel. bf16 rounds a logit of 30 by 0.06; what is left is mostly the rounding of the second likeliest.
Tokens that are looked up are exact too.
M rows, C rows of a chunk, K tokens of a row, V vocabulary, D hidden. Loops: linear.py. Oracle: eager.linear_logprob.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .head import unrounded
from .linear import Passes, Rows, logprob_backward, logprob_forward, scale_rows
from .logprob import (
    LOWEST,
    _add_block,
    _finish_row,
    _logprob_bwd,
    _logprob_fwd,
    _to_log2,
    block_of,
    kernel_ids,
    rows_in_units,
)
from .ops import launching, op


@triton.jit
def _exact_logit(hidden_row_ptr, weight_ptr, bias_ptr, id, weight_stride, D, BLOCK_D: tl.constexpr):
    row_ptr = weight_ptr + id.to(tl.int64) * weight_stride
    total = 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden_row_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.sum(h * tl.load(row_ptr + d, mask=d < D, other=0.0).to(tl.float32), 0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + id).to(tl.float32)
    return total


@triton.jit
def _linear_logprob_fwd_kernel(
    logits_ptr, hidden_ptr, weight_ptr, bias_ptr, ids_ptr, temperature_ptr, top_ptr, logz_ptr, logp_ptr, entropy_ptr,
    best_ids_ptr, best_ptr, strides, hidden_stride, weight_stride, columns, D,
    UNIT: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    V = columns * UNIT
    row_ptr = logits_ptr + n * strides * UNIT
    hidden_row_ptr = hidden_ptr + n * hidden_stride
    id = tl.load(ids_ptr + n)
    top, logz, logp, entropy, best = 0.0, 0.0, 0.0, 0.0, 0.0
    best_id = -1
    if id >= 0:
        factor = _to_log2(temperature_ptr, n)
        inside = id < V
        own = _exact_logit(hidden_row_ptr, weight_ptr, bias_ptr, tl.where(inside, id, 0), weight_stride, D, BLOCK_D)
        own = tl.where(inside, own, float("nan"))
        top, rest, moment = tl.maximum(own, LOWEST), 0.0, 0.0
        best = -float("inf")
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            if (id >= start) & (id < start + BLOCK_V):
                x = tl.where(v == id.to(tl.int32), -float("inf"), x)
            block_max = tl.max(x, 0)
            if block_max > best:
                best = block_max
                best_id = tl.minimum(start + tl.argmax(x, 0), V - 1)  # a nan logit makes argmax point anywhere
            top, rest, moment = _add_block(x, block_max, factor, top, rest, moment, MOMENT=True)
        if best_id >= 0:
            rounded = (best - top) * factor
            best = _exact_logit(hidden_row_ptr, weight_ptr, bias_ptr, best_id, weight_stride, D, BLOCK_D)
            exact = (best - top) * factor
            rest += tl.exp2(exact) - tl.exp2(rounded)
            moment += tl.exp2(exact) * exact - tl.exp2(rounded) * rounded
        logz, logp, entropy = _finish_row(own, temperature_ptr, n, factor, top, rest, moment)
    tl.store(top_ptr + n, top)
    tl.store(logz_ptr + n, logz)
    tl.store(logp_ptr + n, logp)
    tl.store(entropy_ptr + n, entropy)
    tl.store(best_ids_ptr + n, best_id)
    tl.store(best_ptr + n, best)


def _linear_logprob_fwd(logits_CV, h_CD, weight_VD, bias_V, ids_C, temperature_C):
    """-> top_C, logz_C, logp_C, entropy_C fp32, best_ids_C int32 (-1: none), best_C fp32."""
    C, V = logits_CV.shape
    outs = [torch.empty(C, dtype=torch.float32, device=h_CD.device) for _ in range(5)]
    best_ids_C = torch.empty(C, dtype=torch.int32, device=h_CD.device)
    unit, columns, (strides,) = rows_in_units(V, logits_CV.stride(0))
    block, num_warps = block_of(V)
    D = h_CD.shape[1]
    with launching(h_CD):
        _linear_logprob_fwd_kernel[(C,)](
            logits_CV, h_CD, weight_VD, bias_V, ids_C, temperature_C, *outs[:4], best_ids_C, outs[4], strides,
            h_CD.stride(0), weight_VD.stride(0), columns, D,
            UNIT=unit, BLOCK_V=block, BLOCK_D=min(1024, triton.next_power_of_2(D)), num_warps=num_warps,
        )  # fmt: skip
    return *outs[:4], best_ids_C, outs[4]


def _reduce(head, h_CD, z_CV, ids_C, temperature_C):
    if not head.rounds:
        return *_logprob_fwd(z_CV, ids_C, temperature_C), None
    *numbers, best_ids_C, best_C = _linear_logprob_fwd(z_CV, h_CD, head.weight_VD, head.bias_V, ids_C, temperature_C)
    return *numbers, (best_ids_C, best_C)


def _differentiate(z_CV, *rest):
    return _logprob_bwd(z_CV, z_CV, *rest)


@triton.jit
def _exact_logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, which_ptr, exact_ptr, hidden_stride, weight_stride, K, D, BLOCK_D: tl.constexpr
):
    c, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    id = tl.load(which_ptr + c * K + k)
    exact = _exact_logit(hidden_ptr + c * hidden_stride, weight_ptr, bias_ptr, id, weight_stride, D, BLOCK_D)
    tl.store(exact_ptr + c * K + k, exact)


def _exact_logits(h_CD, weight_VD, bias_V, which_CK):
    """-> exact_CK fp32; which_CK int64, all in the vocabulary."""
    (C, K), D = which_CK.shape, h_CD.shape[1]
    exact_CK = torch.empty(C, K, dtype=torch.float32, device=h_CD.device)
    with launching(h_CD):
        _exact_logits_kernel[(C, K)](
            h_CD, weight_VD, bias_V, which_CK.contiguous(), exact_CK, h_CD.stride(0), weight_VD.stride(0), K, D,
            BLOCK_D=min(1024, triton.next_power_of_2(D)),
        )  # fmt: skip
    return exact_CK


def _look_up(head, h_CD, z_CV, temperature_C, top_C, logz_C, which_CK):
    inputs = h_CD, head.weight_VD, head.bias_V
    z_CK = _exact_logits(*inputs, which_CK) if head.rounds else z_CV.gather(1, which_CK)
    gap_CK = z_CK - top_C[:, None]
    return (gap_CK if temperature_C is None else gap_CK / temperature_C[:, None]) - logz_C[:, None]


PASSES = Passes(_reduce, _differentiate, _look_up)


@op("linear_logprob_fwd")
def linear_logprob_fwd(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, ids_M: torch.Tensor,
    temperature_M: torch.Tensor | None, accurate: bool, early: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """-> logp_M, entropy_M, dhidden_MD for unit dlogp (empty unless early), ids_M as the kernels read them, *Rows."""
    ids_M = kernel_ids(ids_M, weight_VD.shape[0])
    rows, dhidden_MD = logprob_forward(PASSES, hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, early)
    if rows.which_MK is None:
        rows = rows._replace(which_MK=ids_M.new_empty(0, dtype=torch.int32), exact_MK=rows.logp_M.new_empty(0))
    shown = rows.logp_M.clone(), rows.entropy_M.clone()
    return [*shown, rows.logp_M.new_empty(0) if dhidden_MD is None else dhidden_MD, ids_M, *rows]


@linear_logprob_fwd.register_fake
def _(hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, early):
    M = len(ids_M)
    row = lambda size, dtype=torch.float32: hidden_MD.new_empty(size, dtype=dtype)
    num_best = 0 if accurate or hidden_MD.dtype == torch.float32 else M
    dhidden_MD = torch.empty_like(hidden_MD, dtype=unrounded(hidden_MD)) if early else row(0)
    best = row(num_best, torch.int32), row(num_best)
    return [row(M), row(M), dhidden_MD, row(M, torch.int64), *[row(M) for _ in range(4)], *best]


@op("linear_logprob_bwd")
def linear_logprob_bwd(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, ids_M: torch.Tensor,
    temperature_M: torch.Tensor | None, accurate: bool, rows: list[torch.Tensor], dlogp_M: torch.Tensor,
    dentropy_M: torch.Tensor | None, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """-> dhidden_MD, dweight_VD, dbias_V; empty where not needed."""
    rows = Rows(*rows)
    rows = rows if len(rows.which_MK) else rows._replace(which_MK=None, exact_MK=None)
    slopes = dlogp_M.contiguous(), None if dentropy_M is None else dentropy_M.contiguous()
    grads = logprob_backward(PASSES, hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, rows, *slopes, needs)
    return [hidden_MD.new_empty(0) if x is None else x for x in grads]


@linear_logprob_bwd.register_fake
def _(hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, rows, dlogp_M, dentropy_M, needs):
    return fake_gradients(hidden_MD, weight_VD, needs)


def fake_gradients(hidden_MD, weight_VD, needs):
    shapes = (hidden_MD.shape, weight_VD.shape, weight_VD.shape[:1])
    return [hidden_MD.new_empty(shape if need else 0) for shape, need in zip(shapes, needs)]


class _LinearLogProb(torch.autograd.Function):
    """(hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, entropy, needs) -> logp_M, entropy_M.

    1 GEMM without gradients; 2 with a frozen head, whose part of dhidden does not wait for dlogp; else 4.
    """

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, entropy, needs):
        ctx.set_materialize_grads(False)
        ctx.accurate, ctx.needs = accurate, needs
        ctx.early = needs[0] and not any(needs[1:]) and not entropy
        logp_M, entropy_M, *saved = linear_logprob_fwd(
            hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, ctx.early
        )
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, temperature_M, *saved)
        return logp_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_M, dentropy_M):
        hidden_MD, weight_VD, bias_V, temperature_M, dhidden_MD, ids_M, *rows = ctx.saved_tensors
        if dlogp_M is None and dentropy_M is None:
            return (None,) * 8
        if dlogp_M is None:
            dlogp_M = hidden_MD.new_zeros(len(hidden_MD), dtype=torch.float32)
        if ctx.early:
            return scale_rows(dhidden_MD, dlogp_M).to(hidden_MD.dtype), *[None] * 7
        grads = linear_logprob_bwd(
            hidden_MD, weight_VD, bias_V, ids_M, temperature_M, ctx.accurate, rows, dlogp_M, dentropy_M, ctx.needs
        )
        return *[x if need else None for x, need in zip(grads, ctx.needs)], *[None] * 5
