"""Log-probability and entropy from hidden states and the head's weight: products by torch, passes by Triton.

Where the chunk of logits is bf16, the id and the likeliest other token of each row get an exact logit: a dot product in
fp32 inside the kernel. bf16 rounds a logit of 30 by 0.06; what is left is mostly the rounding of the second likeliest.
N rows, M rows kept, C rows of a chunk, V vocabulary, D hidden. Loops: linear.py. Oracle: eager.linear_logprob.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .head import unrounded
from .linear import Passes, Rows, kept, logprob_backward, logprob_forward, scale_rows, spread
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
)  # fmt: skip
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
    bias_V = None if bias_V is None else bias_V.contiguous()
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


PASSES = Passes(_reduce, _differentiate)


@op("linear_logprob_fwd")
def linear_logprob_fwd(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, rows_M: torch.Tensor | None,
    ids_N: torch.Tensor, temperature_N: torch.Tensor | None, accurate: bool, early: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """-> logp_N, entropy_N, dhidden_ND for unit dlogp (empty unless early), ids_M as the kernels read them, *Rows."""
    ids_M, temperature_M = kept(rows_M, ids_N, temperature_N)
    ids_M = kernel_ids(ids_M, weight_VD.shape[0])
    rows, dhidden_ND = logprob_forward(
        PASSES, hidden_ND, weight_VD, bias_V, rows_M, ids_M, temperature_M, accurate, early
    )
    if rows.which_MK is None:
        rows = rows._replace(which_MK=ids_M.new_empty(0, dtype=torch.int32), exact_MK=rows.logp_M.new_empty(0))
    shown = [spread(x_M, rows_M, len(ids_N)) for x_M in (rows.logp_M.clone(), rows.entropy_M.clone())]
    return [*shown, rows.logp_M.new_empty(0) if dhidden_ND is None else dhidden_ND, ids_M, *rows]


@linear_logprob_fwd.register_fake
def _(hidden_ND, weight_VD, bias_V, rows_M, ids_N, temperature_N, accurate, early):
    N, M = len(ids_N), len(ids_N if rows_M is None else rows_M)
    row = lambda size, dtype=torch.float32: hidden_ND.new_empty(size, dtype=dtype)
    num_best = 0 if accurate or hidden_ND.dtype == torch.float32 else M
    dhidden_ND = torch.empty_like(hidden_ND, dtype=unrounded(hidden_ND)) if early else row(0)
    return [row(N), row(N), dhidden_ND, row(M, torch.int64), row(M), row(M), row(M), row(M),
            row(num_best, torch.int32), row(num_best)]  # fmt: skip


@op("linear_logprob_bwd")
def linear_logprob_bwd(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, rows_M: torch.Tensor | None,
    ids_M: torch.Tensor, temperature_N: torch.Tensor | None, accurate: bool, rows: list[torch.Tensor],
    dlogp_N: torch.Tensor, dentropy_N: torch.Tensor | None, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """-> dhidden_ND, dweight_VD, dbias_V; empty where not needed."""
    rows = Rows(*rows)
    rows = rows if len(rows.which_MK) else rows._replace(which_MK=None, exact_MK=None)
    grads = logprob_backward(
        PASSES, hidden_ND, weight_VD, bias_V, rows_M, ids_M, kept(rows_M, temperature_N)[0], accurate, rows,
        dlogp_N.contiguous(), None if dentropy_N is None else dentropy_N.contiguous(), needs,
    )  # fmt: skip
    return [hidden_ND.new_empty(0) if x is None else x for x in grads]


@linear_logprob_bwd.register_fake
def _(hidden_ND, weight_VD, bias_V, rows_M, ids_M, temperature_N, accurate, rows, dlogp_N, dentropy_N, needs):
    return fake_gradients(hidden_ND, weight_VD, needs)


def fake_gradients(hidden_ND, weight_VD, needs):
    shapes = (hidden_ND.shape, weight_VD.shape, weight_VD.shape[:1])
    return [hidden_ND.new_empty(shape if need else 0) for shape, need in zip(shapes, needs)]


class _LinearLogProb(torch.autograd.Function):
    """(hidden_ND, weight_VD, bias_V, rows_M, ids_N, temperature_N, accurate, entropy, needs) -> logp_N, entropy_N.

    1 GEMM without gradients; 2 with a frozen head, whose part of dhidden does not wait for dlogp; else 4.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, rows_M, ids_N, temperature_N, accurate, entropy, needs):
        ctx.set_materialize_grads(False)
        ctx.accurate, ctx.needs = accurate, needs
        ctx.early = needs[0] and not any(needs[1:]) and not entropy
        logp_N, entropy_N, *saved = linear_logprob_fwd(
            hidden_ND, weight_VD, bias_V, rows_M, ids_N, temperature_N, accurate, ctx.early
        )
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, rows_M, temperature_N, *saved)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_N, dentropy_N):
        hidden_ND, weight_VD, bias_V, rows_M, temperature_N, dhidden_ND, ids_M, *rows = ctx.saved_tensors
        if dlogp_N is None and dentropy_N is None:
            return (None,) * 9
        if dlogp_N is None:
            dlogp_N = hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
        if ctx.early:
            return scale_rows(dhidden_ND, dlogp_N).to(hidden_ND.dtype), *[None] * 8
        grads = linear_logprob_bwd(
            hidden_ND, weight_VD, bias_V, rows_M, ids_M, temperature_N, ctx.accurate, rows, dlogp_N, dentropy_N,
            ctx.needs,
        )  # fmt: skip
        return *[x if need else None for x, need in zip(grads, ctx.needs)], *[None] * 6
