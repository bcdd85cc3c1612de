"""Attention of one query token a row over its slot of a KV cache, Triton: splits of fixed length, then their sum.

  out = sum_l 2^(t_l - top) v_l / sum_l 2^(t_l - top),  t_l = scale log2(e) q . k_l,  length - window <= l < length
A program reads SPLIT columns of one key/value head for the query heads that share it and leaves top, total and acc of
those columns; a second kernel weighs the splits. SPLIT and the order of sums are constants, so what a row gives does
not depend on its batch. The grid depends on shapes alone and no host waits: a program past its row's length, or
before its window, leaves at once, and a CUDA graph may be replayed as rows grow.
M rows, S slots, H query heads, K key/value heads, G = H / K, L columns of a slot, P splits, D size of a head.
FlashAttention: arXiv 2205.14135; flash-decoding: Dao et al., 2023. Oracle: eager.decode_attention.
"""

import torch
import triton
import triton.language as tl

from .logprob import LOG2E, LOWEST, rows_in_units
from .ops import launching, op

SPLIT = 256
"""128 KiB of keys and values at D=128 in bf16, beside 3 to 6 % of that in parts written and read; parts take G / 256 of
the cache's memory. 8 heads fill 128 SMs with one row of 4k columns or 16 rows of 256; longer splits would idle them."""
MOST_HEADS, BLOCK_P = {2: 16, 4: 8}, 32
"""MOST_HEADS: of a program, by bytes of an element. 32 of bf16 take 176 registers at D=256; 16 of fp32 spill at 80."""
TILE_BYTES = 16 << 10
"""Of keys, and of values: with one tile of each ahead, 39 KiB and 106 registers, four programs share an SM (two on
sm_89)."""


@triton.jit
def _load_tile(ptr, start, stride, first, columns, d, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_L: tl.constexpr):
    """Columns [start, start + BLOCK_L) of a split -> [BLOCK_L, BLOCK_D]; 0, unread, outside [first, columns) and D."""
    c = start + tl.arange(0, BLOCK_L)[:, None]
    return tl.load(ptr + c * stride * UNIT + d, mask=(c >= first) & (c < columns) & (d < D), other=0.0)


@triton.jit(do_not_specialize=["rows", "L", "num_splits", "window"])  # one binary for every number of rows
def _decode_attention_split_kernel(
    q_ptr, keys_ptr, values_ptr, length_ptr, top_ptr, total_ptr, acc_ptr, factor,
    q_row, q_head, keys_slot, keys_head, keys_column, values_slot, values_head, values_column, rows, K, L, num_splits,
    window, G: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    split = tl.program_id(0) // rows  # the slowest axis: programs past their length come last
    row = tl.program_id(0) % rows // BLOCKS
    m, k = (row // K).to(tl.int64), (row % K).to(tl.int64)
    origin = split.to(tl.int64) * SPLIT
    length = tl.minimum(tl.load(length_ptr + m).to(tl.int64), L)
    columns = tl.minimum(length - origin, SPLIT).to(tl.int32)
    first = tl.maximum(length - window - origin, 0).to(tl.int32)
    if first < columns:
        g = tl.program_id(0) % BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        q_group_ptr = q_ptr + (m * q_row + k * G * q_head) * UNIT
        keys_split_ptr = keys_ptr + (m * keys_slot + k * keys_head + origin * keys_column) * UNIT
        values_split_ptr = values_ptr + (m * values_slot + k * values_head + origin * values_column) * UNIT
        q = tl.load(q_group_ptr + g * q_head * UNIT + d, mask=(g < G) & (d < D), other=0.0)
        top = tl.full([BLOCK_G, 1], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_G, 1], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for start in range(first // BLOCK_L * BLOCK_L, columns, BLOCK_L):
            keys = _load_tile(keys_split_ptr, start, keys_column, first, columns, d, D, UNIT, BLOCK_L)
            values = _load_tile(values_split_ptr, start, values_column, first, columns, d, D, UNIT, BLOCK_L)
            # Few heads are padded for the tensor cores by the compiler, in fp32 not at all: ieee is no tensor core's.
            t = tl.dot(q, tl.trans(keys), input_precision="ieee") * factor
            c = start + tl.arange(0, BLOCK_L)[None, :]
            t = tl.where((c >= first) & (c < columns), t, -float("inf"))
            new_top = tl.maximum(top, tl.max(t, 1, keep_dims=True))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(t - new_top)
            total = shrink * total + tl.sum(p, 1, keep_dims=True)
            acc = tl.dot(p.to(values.dtype), values, shrink * acc, input_precision="ieee")
            top = new_top
        part = (row.to(tl.int64) * G + g) * num_splits + split
        tl.store(top_ptr + part, top, mask=g < G)
        tl.store(total_ptr + part, total, mask=g < G)
        tl.store(acc_ptr + part * D + d, acc, mask=(g < G) & (d < D))


@triton.jit(do_not_specialize=["L", "num_splits", "window"])
def _decode_attention_sum_kernel(
    top_ptr, total_ptr, acc_ptr, length_ptr, out_ptr, H, L, num_splits, window,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(length_ptr + head // H), L).to(tl.int32)
    first, used = (length - window) // SPLIT, tl.cdiv(length, SPLIT)
    d = tl.arange(0, BLOCK_D)[None, :]
    top, total, acc = tl.full([], LOWEST, tl.float32), 0.0, tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, used, BLOCK_P):  # not from the first on, which would take twice the registers
        split = start + tl.arange(0, BLOCK_P)
        inside = (split >= first) & (split < used)
        part = head * num_splits + split
        part_top = tl.load(top_ptr + part, mask=inside, other=LOWEST)
        part_total = tl.load(total_ptr + part, mask=inside, other=0.0)
        part_acc = tl.load(acc_ptr + part[:, None] * D + d, mask=inside[:, None] & (d < D), other=0.0)
        new_top = tl.maximum(top, tl.max(part_top, 0))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(part_top - new_top)
        total = shrink * total + tl.sum(weight * part_total, 0)
        acc = shrink * acc + tl.sum(weight[:, None] * part_acc, 0)
        top = new_top
    out = tl.where(used > 0, acc / total, 0.0)
    d = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + head * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def split_shape(G, D, itemsize):
    """What _decode_attention_split_kernel is compiled for."""
    block_d = max(16, triton.next_power_of_2(D))
    block_g = min(MOST_HEADS[itemsize], triton.next_power_of_2(G))
    blocks = dict(BLOCK_G=block_g, BLOCK_D=block_d, BLOCK_L=min(64, TILE_BYTES // (block_d * itemsize)))
    return dict(G=G, D=D, SPLIT=SPLIT, **blocks, num_warps=4, num_stages=2)


def sum_shape(D):
    """What _decode_attention_sum_kernel is compiled for."""
    return dict(D=D, SPLIT=SPLIT, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_P=BLOCK_P, num_warps=4)


def _decode_attention(q_MHD, keys_SKLD, values_SKLD, length_M, scale, window):
    (M, H, D), (_, K, L, _) = q_MHD.shape, keys_SKLD.shape
    P, G = max(1, triton.cdiv(L, SPLIT)), H // K
    out_MHD = torch.empty_like(q_MHD, memory_format=torch.contiguous_format)
    if not out_MHD.numel():
        return out_MHD
    top_MHP, total_MHP = (torch.empty(M, H, P, dtype=torch.float32, device=q_MHD.device) for _ in range(2))
    acc_MHPD = torch.empty(M, H, P, D, dtype=torch.float32, device=q_MHD.device)
    unit, _, strides = rows_in_units(D, *q_MHD.stride()[:2], *keys_SKLD.stride()[:3], *values_SKLD.stride()[:3])
    shape = split_shape(G, D, q_MHD.dtype.itemsize)
    rows = M * K * triton.cdiv(G, shape["BLOCK_G"])
    with launching(q_MHD):
        _decode_attention_split_kernel[(rows * P,)](
            q_MHD, keys_SKLD, values_SKLD, length_M, top_MHP, total_MHP, acc_MHPD, scale * LOG2E.value, *strides,
            rows, K, L, P, window, UNIT=unit, **shape,
        )  # fmt: skip
        _decode_attention_sum_kernel[(M * H,)](
            top_MHP, total_MHP, acc_MHPD, length_M, out_MHD, H, L, P, window, **sum_shape(D)
        )
    return out_MHD


@op("decode_attention")
def decode_attention(
    q_MHD: torch.Tensor, keys_SKLD: torch.Tensor, values_SKLD: torch.Tensor, length_M: torch.Tensor, scale: float,
    window: int,
) -> torch.Tensor:  # fmt: skip
    return _decode_attention(q_MHD, keys_SKLD, values_SKLD, length_M.contiguous(), scale, window)


@decode_attention.register_fake
def _(q_MHD, *_):
    return torch.empty_like(q_MHD, memory_format=torch.contiguous_format)
