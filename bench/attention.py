"""Attention of whole sequences by back-end of torch's SDPA: an update's, forward and backward, or a prefill's, forward.

Heads are grouped, as the models call it: `causal` rows, or rows in which several answers share one prompt and
engine.model.segment_mask says who sees whom. Errors are against attention written out in fp64.
  first    seconds of the first call at one more length, after others have run: what a back-end spends on a new shape
  roof     share of the time that the products over the needed pairs take at the measured matmul rate
"""

import contextlib
import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .clocks import CLOCKS, measure_roofs, wall_clock
from .harness import (
    DTYPES,
    LIMITS,
    Experiment,
    Work,
    cold_copies,
    gradients,
    outcome,
    output_errors,
    refuse_wrong,
    summarize,
    take_turns,
)
from .table import largest_error, ratio, remarks, seconds, share, shown, spread

BACKENDS = {
    "default": None, "cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
LEAVES = ("q_NHTD", "k_NKTD", "v_NKTD")
SEGMENTS = 4  # equal parts of a row: the shared one and the others'
FEWER = 8  # tokens less in the first call of the next back-end at a new shape: the default shares plans with its own
REFUSALS = ("No available kernel", "No viable backend")


class Size(NamedTuple):
    """Sequences, query heads, key/value heads, size of a head, tokens; causal | segments, update | prefill."""

    N: int
    H: int
    K: int
    D: int
    T: int
    mask: str
    use: str


def make_inputs(size, dtype, device):
    """Laid out as a model's projections leave them; the mask is absent where rows are plainly causal."""
    from engine.model import segment_mask

    torch.manual_seed(0)
    draw = lambda heads: torch.randn(size.N, size.T, heads, size.D, device=device).to(dtype).transpose(1, 2)
    inputs = dict(zip(LEAVES, map(draw, (size.H, size.K, size.K))))
    if size.mask == "segments":
        segment_T = torch.arange(size.T, device=device) * SEGMENTS // size.T
        inputs["mask_N1TT"] = segment_mask(segment_T.expand(size.N, -1))
    if size.use == "update":
        inputs["dout_NHTD"] = draw(size.H)
        for name in LEAVES:
            inputs[name].requires_grad_()
    return inputs


def written_out(q_NHTD, k_NKTD, v_NKTD, mask_N1TT):
    """Attention by its formula, in the inputs' dtype."""
    k_NHTD, v_NHTD = (x.repeat_interleave(q_NHTD.shape[1] // x.shape[1], 1) for x in (k_NKTD, v_NKTD))
    scores_NHTT = q_NHTD @ k_NHTD.transpose(2, 3) * q_NHTD.shape[3] ** -0.5
    return scores_NHTT.masked_fill(~mask_N1TT, -torch.inf).softmax(-1) @ v_NHTD


def outputs_of(attention, inputs):
    """The output and, in an update, the gradients of what requires them."""
    out_NHTD = attention(*[inputs[name] for name in LEAVES])
    return {"out_NHTD": out_NHTD.detach(), **gradients(out_NHTD, inputs, LEAVES, inputs.get("dout_NHTD"))}


def needed_pairs(inputs):
    """Bool, broadcast over sequences and heads: who sees whom."""
    T = inputs["q_NHTD"].shape[2]
    return inputs.get("mask_N1TT", torch.ones(1, 1, T, T, dtype=torch.bool, device=inputs["q_NHTD"].device).tril())


def truth(inputs):
    wide = {
        name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items() if x.is_floating_point()
    }
    return outputs_of(functools.partial(written_out, mask_N1TT=needed_pairs(inputs)), wide)


def attend(backend, inputs):
    """By one back-end, or by torch's own choice; RuntimeError from a back-end that does not take the shape."""
    mask_N1TT = inputs.get("mask_N1TT")
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        sdpa = functools.partial(
            F.scaled_dot_product_attention, attn_mask=mask_N1TT, is_causal=mask_N1TT is None, enable_gqa=True
        )
        return outputs_of(sdpa, inputs)


def count_work(size, pairs, itemsize):
    """Two products over the needed pairs, five more in a backward; inputs and output, and once more as gradients."""
    products, passes = (7, 2) if size.use == "update" else (2, 1)
    tensors = size.N * size.T * size.D * 2 * (size.H + size.K)
    return Work(2 * products * pairs * size.H * size.D, passes * tensors * itemsize)


def check(row, backend, inputs, wanted, limit):
    """Runs a back-end; one that refuses is absent, with the reasons that torch warns of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with outcome(row):
            row["errors"] = output_errors(attend(backend, inputs), wanted)
            refuse_wrong(row["errors"], limit)
            row["note"] = "" if backend else f"which is {chosen(inputs)}"
    if any(words in row["why"] for words in REFUSALS):
        reasons = [str(warning.message).split(" (Triggered")[0] for warning in said]
        row["status"], row["why"] = "absent", "; ".join(reasons or [row["why"]])[:240]


def chosen(inputs):
    """The name of the back-end that torch chooses."""
    mask_N1TT, qkv = inputs.get("mask_N1TT"), [inputs[name] for name in LEAVES]
    number = torch._fused_sdp_choice(*qkv, mask_N1TT, 0.0, mask_N1TT is None, enable_gqa=True)
    return next((name for name, backend in BACKENDS.items() if backend and backend.value == number), "another")


def run(rows, device, size, rounds, threads, tick):
    dtype = DTYPES["bf16" if device == "cuda" else "fp32"]
    inputs, calls = make_inputs(size, dtype, device), {}
    copies, wanted = cold_copies(inputs, device), truth(inputs)
    work = count_work(size, int(needed_pairs(inputs).expand(size.N, -1, -1, -1).sum()), dtype.itemsize)
    for i, (name, backend) in enumerate(BACKENDS.items(), 1):
        tick(f"check {name}")
        rows[name].update(work._asdict())
        check(rows[name], backend, inputs, wanted, LIMITS[dtype])
        if rows[name]["status"] == "ok":
            shorter = make_inputs(size._replace(T=size.T - i * FEWER), dtype, device)
            (rows[name]["first"],) = wall_clock([functools.partial(attend, backend, shorter)])
            calls[name] = [functools.partial(attend, backend, copy) for copy in copies]
    take_turns(calls, rows, rounds, CLOCKS[device], tick)
    summarize(rows, measure_roofs(device, dtype, size in SIZES["small"]), base="default")


CASES = (("causal", "update"), ("segments", "update"), ("causal", "prefill"))
SIZES = {
    "small": [Size(2, 4, 2, 16, 48, *case) for case in CASES],
    "cpu": [Size(2, 14, 2, 64, 256, *case) for case in CASES],
    "cuda": [Size(16, *heads, 512, *case) for heads in ((14, 2, 64), (16, 2, 128)) for case in CASES],  # 0.5B, 3B
}
BENCH = Experiment(
    SIZES, run, {name: "" for name in BACKENDS},
    (
        ("back-end", shown("rival")), ("time", shown("median", seconds)), ("p20-p80", spread),
        ("x default", shown("time_ratio", ratio)), ("first", shown("first", seconds)),
        ("roof", shown("roof_share", share)), ("error", lambda row: largest_error(row, lambda name: True, "relative")),
        ("", remarks),
    ),
)  # fmt: skip
