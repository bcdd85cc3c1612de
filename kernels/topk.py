"""The k likeliest tokens of each row from hidden states: products by torch, one read of a chunk of logits by Triton.

  logz = log sum_j exp((z_j - top) / T),  largest_b = max of z over columns b, b + B, b + 2 B ...
linear.py finds the k largest logits from these. M rows, C rows of a chunk, V vocabulary, D hidden, B groups.
Oracle: eager.linear_topk.
"""

import torch
import triton
import triton.language as tl

from .linear import topk_forward
from .logprob import LOWEST, _add_block, _to_log2, block_of, rows_in_units
from .ops import launching, op


@triton.jit
def _topk_kernel(
    logits_ptr, temperature_ptr, top_ptr, logz_ptr, largest_ptr, strides, columns,
    UNIT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    V = columns * UNIT
    row_ptr = logits_ptr + n * strides * UNIT
    factor = _to_log2(temperature_ptr, n)
    top, rest, moment = tl.full([], LOWEST, tl.float32), 0.0, 0.0
    largest = tl.full([BLOCK_V], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
        top, rest, moment = _add_block(x, tl.max(x, 0), factor, top, rest, moment, MOMENT=False)
    tl.store(top_ptr + n, top)
    tl.store(logz_ptr + n, tl.log(rest))
    tl.store(largest_ptr + n * BLOCK_V + tl.arange(0, BLOCK_V), largest)


def _topk(logits_CV, temperature_C):
    """-> top_C, logz_C, largest_CB, all fp32."""
    C, V = logits_CV.shape
    block, num_warps = block_of(V)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=logits_CV.device)
    top_C, logz_C, largest_CB = new(C), new(C), new(C, block)
    unit, columns, (strides,) = rows_in_units(V, logits_CV.stride(0))
    with launching(logits_CV):
        _topk_kernel[(C,)](
            logits_CV, temperature_C, top_C, logz_C, largest_CB, strides, columns,
            UNIT=unit, BLOCK_V=block, num_warps=num_warps,
        )  # fmt: skip
    return top_C, logz_C, largest_CB[:, :V]


@op("linear_topk")
def linear_topk(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, temperature_M: torch.Tensor | None,
    k: int, accurate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return topk_forward(_topk, hidden_MD, weight_VD, bias_V, temperature_M, k, accurate)


@linear_topk.register_fake
def _(hidden_MD, weight_VD, bias_V, temperature_M, k, accurate):
    logp_MK = hidden_MD.new_empty(len(hidden_MD), k, dtype=torch.float32)
    return logp_MK, torch.empty_like(logp_MK, dtype=torch.int64)
