"""Arguments of the public functions, refused by name where they enter.

N rows, V vocabulary, D hidden, M rows computed. Attention: M rows, H heads of D, S slots of K heads and L columns.
"""

import math

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)


def check(name, x, shape, dtypes, device, why=""):
    """ValueError naming the argument unless tensor `x` has this shape (None: any length), dtype and device."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape)):
        wanted = ["any" if s is None else s for s in shape]
        raise ValueError(f"{name} must have shape {wanted}{why}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def check_temperature(temperature, N, device, why=""):
    if isinstance(temperature, torch.Tensor):
        check("temperature", temperature, (N,), WIDE, device, why)
    elif not (isinstance(temperature, (int, float)) and 0 < temperature < float("inf")):
        raise ValueError(f"temperature must be a finite number above 0 or a tensor [N], got {temperature!r}")


def check_logits(logits_NV, ids_N, temperature, mask_N):
    check("logits_NV", logits_NV, (None, None), FLOATS, None)
    N, device = logits_NV.shape[0], logits_NV.device
    check("ids_N", ids_N, (N,), (torch.int64,), device)
    check_temperature(temperature, N, device)
    if mask_N is not None:
        check("mask_N", mask_N, (N,), (torch.bool,), device)


def check_head(hidden_ND, weight_VD, bias_V, temperature, rows_M):
    """-> M, and what a message says of it."""
    check("hidden_ND", hidden_ND, (None, None), FLOATS, None)
    (N, D), device = hidden_ND.shape, hidden_ND.device
    check("weight_VD", weight_VD, (None, D), (hidden_ND.dtype,), device)
    if bias_V is not None:
        check("bias_V", bias_V, (weight_VD.shape[0],), (hidden_ND.dtype,), device)
    if rows_M is not None:
        check("rows_M", rows_M, (None,), (torch.int64,), None)
        on_host = rows_M.device.type == "cpu" and not torch.compiler.is_compiling()  # a compiler cannot look at values
        if on_host and rows_M.numel() and not 0 <= rows_M.min() <= rows_M.max() < N:
            raise ValueError(f"rows_M must lie in [0, {N}), got {rows_M.min().item()} to {rows_M.max().item()}")
        if rows_M.device not in (device, torch.device("cpu")):
            raise ValueError(f"rows_M must be on {device} or cpu, got {rows_M.device}")
    M, why = (N, "") if rows_M is None else (len(rows_M), ", a value for each of rows_M")
    check_temperature(temperature, M, device, why)
    return M, why


def check_linear(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M, **vectors):
    """vectors: the loss's fp32 (or fp64) ones, by name; None where the argument is optional and absent."""
    M, why = check_head(hidden_ND, weight_VD, bias_V, temperature, rows_M)
    check("ids_M", ids_M, (M,), (torch.int64,), hidden_ND.device, why)
    check_rows(M, hidden_ND.device, why, **vectors)


def check_topk(hidden_ND, weight_VD, k, bias_V, temperature, rows_M):
    check_head(hidden_ND, weight_VD, bias_V, temperature, rows_M)
    if not (isinstance(k, int) and 1 <= k <= weight_VD.shape[0]):
        raise ValueError(f"k must be a whole number from 1 to {weight_VD.shape[0]}, the vocabulary, got {k!r}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden_ND, weight_VD, bias_V)):
        raise ValueError("linear_topk has no gradient: call it under torch.no_grad()")


def check_match(hidden_ND, weight_VD, ids_M, top_ids_MK, top_logp_MK, weight_M, bias_V, temperature, rows_M):
    check_linear(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M, weight_M=weight_M)
    M, device = len(ids_M), hidden_ND.device
    check("top_ids_MK", top_ids_MK, (M, None), (torch.int64,), device)
    check("top_logp_MK", top_logp_MK, top_ids_MK.shape, WIDE, device, ", as top_ids_MK has")
    if not 1 <= top_ids_MK.shape[1] <= weight_VD.shape[0]:
        raise ValueError(f"top_ids_MK must have 1 to {weight_VD.shape[0]} ids a row, got {top_ids_MK.shape[1]}")


def move_rows(rows_M, device):
    """rows_M on the device. A host's rows are pinned first: the copy of pageable memory may wait for the device.

    A compiler cannot pin: there, only rows already on the device (or pinned) leave the host free.
    """
    if rows_M is None or rows_M.device == device:
        return rows_M
    if device.type == "cuda" and not torch.compiler.is_compiling():
        rows_M = rows_M.pin_memory()
    return rows_M.to(device, non_blocking=True)


def check_rows(N, device, why="", **vectors):
    """The loss's fp32 (or fp64) vectors [N]; None where the argument is optional and absent."""
    for name, x in vectors.items():
        if x is not None:
            check(name, x, (N,), WIDE, device, why)


def over_weighted_rows(surrogate, **by_row):
    """surrogate(rows_M=the rows of nonzero weight_M, **by_row there); its logp is 0 elsewhere. A GPU's host waits."""
    N, rows_M = len(by_row["weight_M"]), by_row["weight_M"].nonzero()[:, 0]
    by_row = {name: x[rows_M] if isinstance(x, torch.Tensor) else x for name, x in by_row.items()}
    loss, logp_M, stats = surrogate(rows_M=rows_M, **by_row)
    return loss, logp_M.new_zeros(N).index_copy(0, rows_M, logp_M), stats


def safe_ids(ids_N, V, active_N=None):
    """-> ids_N with 0 wherever the id cannot be read, and bad_N bool: active rows whose id is outside [0, V).

    A bad id raises ValueError on a CPU. `active_N` bool, None: all rows.
    """
    outside_N = (ids_N < 0) | (ids_N >= V)
    bad_N = outside_N if active_N is None else outside_N & active_N
    if ids_N.device.type == "cpu" and bad_N.any():
        raise ValueError(f"ids must lie in [0, {V}), got {ids_N[bad_N][0].item()}")
    return ids_N.masked_fill(outside_N, 0), bad_N


def safe_top_ids(ids_N, top_ids_NK, V, active_N=None):
    """safe_ids of both; bad_N: rows where either has an id outside [0, V)."""
    ids_N, bad_N = safe_ids(ids_N, V, active_N)
    top_ids_NK, bad_NK = safe_ids(top_ids_NK, V, None if active_N is None else active_N[:, None])
    return ids_N, top_ids_NK, bad_N | bad_NK.any(1)


def check_decode_attention(q_MHD, keys_SKLD, values_SKLD, length_M, scale, window):
    """-> the lengths as a list where looking at them is free, else None."""
    check("q_MHD", q_MHD, (None, None, None), FLOATS, None)
    (M, H, D), device = q_MHD.shape, q_MHD.device
    check("keys_SKLD", keys_SKLD, (None, None, None, D), (q_MHD.dtype,), device)
    check("values_SKLD", values_SKLD, keys_SKLD.shape, (q_MHD.dtype,), device)
    check("length_M", length_M, (M,), (torch.int32, torch.int64), device)
    S, K, L, _ = keys_SKLD.shape
    if S < M:
        raise ValueError(f"keys_SKLD must have a slot for each of {M} rows, got {S}")
    if K == 0 or H % K:
        raise ValueError(f"q_MHD must have a multiple of {K} heads, as keys_SKLD has, got {H}")
    if not (scale is None or isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    if not (window is None or isinstance(window, int) and window >= 1):
        raise ValueError(f"window must be a whole number of columns from 1 on, or None, got {window!r}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_MHD, keys_SKLD, values_SKLD)):
        raise ValueError("decode_attention has no gradient: call it under torch.no_grad()")
    if device.type != "cpu" or torch.compiler.is_compiling():
        return None
    lengths = length_M.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= L:
        raise ValueError(f"length_M must lie in [0, {L}], got {min(lengths)} to {max(lengths)}")
    return lengths


def outside_columns(L, length_M, window):
    """bool [M, L]: the columns that decode attention leaves out of each row."""
    column_L = torch.arange(L, device=length_M.device)
    outside_ML = column_L >= length_M[:, None]
    return outside_ML if window is None else outside_ML | (column_L < length_M[:, None].clamp(max=L) - window)
