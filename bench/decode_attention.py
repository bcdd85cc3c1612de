"""Attention of one query token a row over a KV cache of fixed slots, lengths spread evenly and shuffled."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import chunked, eager

from .harness import Benchmark, Rival, Work

BLOCK_BYTES = 1 << 28


class Size(NamedTuple):
    """Rows, query heads, key/value heads, size of a head, columns of a slot, shortest and longest length."""

    M: int
    H: int
    K: int
    D: int
    L: int
    shortest: int
    longest: int


def lengths_of(size):
    gen = torch.Generator().manual_seed(0)
    return torch.linspace(size.shortest, size.longest, size.M).int()[torch.randperm(size.M, generator=gen)]


def make_inputs(size, dtype, device):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device=device).to(dtype)
    slots = (size.M, size.K, size.L, size.D)
    return {
        "q_MHD": draw(size.M, size.H, size.D),
        "keys_MKLD": draw(*slots),
        "values_MKLD": draw(*slots),
        "length_M": lengths_of(size).to(device),
    }


def truth(inputs, task):
    """Eager fed fp64, a block of rows at a time."""
    *wide, length_M = inputs.values()
    step = max(1, BLOCK_BYTES // (8 * wide[1][0].numel()))
    blocks = zip(*(x.split(step) for x in (*wide, length_M)))
    return {"out_MHD": torch.cat([eager.decode_attention(*(x.double() for x in xs), n_C) for *xs, n_C in blocks])}


def count_work(size, itemsize, task):
    """Keys and values read once up to each row's length; queries and outputs are small."""
    columns = lengths_of(size).sum().item()
    return Work(4 * columns * size.H * size.D, 2 * columns * size.K * size.D * itemsize, "sum")


def of(attention):
    """A form of decode_attention -> the build of a Rival."""
    return lambda inputs: lambda: {"out_MHD": attention(*inputs.values())}


def fused(inputs):
    from kernels import fused

    return of(fused.decode_attention)(inputs)


def masked(attention):
    """attention(q, keys, values, mask), all 4-d -> the build of a Rival. The mask is made once, as for all layers; a
    CPU cuts the slots at the longest length, a GPU's host does not know it."""

    def build(inputs):
        q_MHD, keys_MKLD, values_MKLD, length_M = inputs.values()
        columns = keys_MKLD.shape[2] if q_MHD.is_cuda else length_M.max().item()
        mask_M11L = (torch.arange(columns, device=q_MHD.device) < length_M[:, None])[:, None, None]
        keys_MKLD, values_MKLD = keys_MKLD[:, :, :columns], values_MKLD[:, :, :columns]
        return lambda: {"out_MHD": attention(q_MHD[:, :, None], keys_MKLD, values_MKLD, mask_M11L)[:, :, 0]}

    return build


def grouped_sdpa(q, keys, values, mask):
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


def repeated_sdpa(q, keys, values, mask):
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def flash_attn(inputs):
    from flash_attn import flash_attn_with_kvcache

    def attention(q_MHD, keys_MKLD, values_MKLD, length_M):
        keys_MLKD, values_MLKD = keys_MKLD.transpose(1, 2), values_MKLD.transpose(1, 2)
        return flash_attn_with_kvcache(q_MHD[:, None], keys_MLKD, values_MLKD, cache_seqlens=length_M)[:, 0]

    return of(attention)(inputs)


BENCH = Benchmark(
    sizes={
        "small": [Size(4, 4, 2, 16, 64, 10, 60)],
        "cpu": [Size(64, 8, 4, 16, 384, 40, 300), Size(128, 8, 4, 16, 384, 70, 110), Size(8, 14, 2, 64, 512, 100, 500)],
        "cuda": [
            Size(1, 28, 4, 128, 32768, 32000, 32000),
            Size(16, 14, 2, 64, 4096, 500, 4000),
            Size(128, 14, 2, 64, 2048, 100, 1500),
            Size(256, 28, 4, 128, 4096, 500, 3500),
        ],
    },
    dtypes=("fp32", "bf16"),
    inputs=make_inputs,
    truth=truth,
    work=count_work,
    rivals={
        "eager": Rival(of(eager.decode_attention)),
        "ours chunked": Rival(of(chunked.decode_attention)),
        "ours fused": Rival(fused, device="cuda"),
        "SDPA grouped": Rival(masked(grouped_sdpa), note="mask, enable_gqa"),
        "SDPA repeated": Rival(masked(repeated_sdpa), note="keys and values repeated, as transformers does"),
        "flash-attn": Rival(flash_attn, device="cuda", note="flash_attn_with_kvcache"),
    },
)
