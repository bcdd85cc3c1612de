"""Attention of whole sequences: an update's, forward and backward, or a prefill's, forward.

By each back-end of torch's SDPA, under a dense mask where rows are not plainly causal, and by what else takes rows of
several sequences. Heads are grouped, as the models call it. Who sees whom:
  causal    a sequence a row
  segments  several answers in a row share its prompt, segment 0
  packed    one row of N*T tokens, sequences of 15/8 T down to T/8 of them end to end, each causal on its own
Errors are against attention written out in fp64. What rivals need of a layout (masks, offsets) is made before they are
timed: a model makes it once for all layers.
  first    seconds of the first call at one more length, after others have run, with what it needs of the layout: what
           a new shape costs
  roof     share of the time that the products over the needed pairs take at the measured matmul rate
"""

import contextlib
import functools
import inspect
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
    Rival,
    Work,
    cold_copies,
    gradients,
    outcome,
    output_errors,
    refuse_wrong,
    summarize,
    take_turns,
    why_left_out,
)
from .table import largest_error, ratio, remarks, seconds, share, shown, spread

LEAVES = ("q_NHTD", "k_NKTD", "v_NKTD")
SEGMENTS = 4  # equal parts of a row: the shared one and the others'
FEWER = 8  # tokens less in the first call of the next rival at a new shape: the default shares plans with its own
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


def lengths_of(size):
    """Of the sequences in a packed row, the longest first."""
    return torch.linspace(15 * size.T / 8, size.T / 8, size.N).round().int()


def segments_of(size, device):
    """segment_NT as `segment_mask` takes it, or None where rows are plainly causal."""
    if size.mask == "segments":
        return (torch.arange(size.T, device=device) * SEGMENTS // size.T).expand(size.N, -1)
    if size.mask == "packed":
        return torch.arange(1, size.N + 1, device=device).repeat_interleave(lengths_of(size).to(device))[None]


def make_inputs(size, dtype, device):
    """Laid out as a model's projections leave them."""
    torch.manual_seed(0)
    rows, tokens = (1, size.N * size.T) if size.mask == "packed" else (size.N, size.T)
    draw = lambda heads: torch.randn(rows, tokens, heads, size.D, device=device).to(dtype).transpose(1, 2)
    inputs = dict(zip(LEAVES, map(draw, (size.H, size.K, size.K))))
    if size.mask != "causal":
        inputs["segment_NT"] = segments_of(size, device)
    if size.use == "update":
        inputs["dout_NHTD"] = draw(size.H)
        for name in LEAVES:
            inputs[name].requires_grad_()
    return inputs


def segment_mask(segment_NT):
    """Causal attention inside each segment and to segment 0: bool [N, 1, T, T], True = attend."""
    query, key = segment_NT[:, None, :, None], segment_NT[:, None, None, :]
    return ((query == key) | (key == 0)).tril()


def mask_of(inputs):
    """Bool [N, 1, T, T], True = attend, or None where rows are plainly causal."""
    return segment_mask(inputs["segment_NT"]) if "segment_NT" in inputs else None


def written_out(q_NHTD, k_NKTD, v_NKTD, mask_N1TT=None):
    """Attention by its formula, in the inputs' dtype."""
    k_NHTD, v_NHTD = (x.repeat_interleave(q_NHTD.shape[1] // x.shape[1], 1) for x in (k_NKTD, v_NKTD))
    scores_NHTT = q_NHTD @ k_NHTD.transpose(2, 3) * q_NHTD.shape[3] ** -0.5
    seen = torch.ones_like(scores_NHTT[0, 0], dtype=torch.bool).tril() if mask_N1TT is None else mask_N1TT
    return scores_NHTT.masked_fill(~seen, -torch.inf).softmax(-1) @ v_NHTD


def outputs_of(attention, inputs):
    """The output and, in an update, the gradients of what requires them."""
    out_NHTD = attention(*[inputs[name] for name in LEAVES])
    return {"out_NHTD": out_NHTD.detach(), **gradients(out_NHTD, inputs, LEAVES, inputs.get("dout_NHTD"))}


def needed_pairs(inputs):
    """How many tokens all tokens see, for one head."""
    (N, _, T, _), mask_N1TT = inputs["q_NHTD"].shape, mask_of(inputs)
    return N * T * (T + 1) // 2 if mask_N1TT is None else int(mask_N1TT.sum())


def one_by_one(lengths):
    """Packed sequences, each by itself: a mask of the whole row would not fit in fp64."""

    def attention(*qkv):
        parts = zip(*(x.split(lengths, 2) for x in qkv))
        return torch.cat([written_out(*part) for part in parts], 2)

    return attention


def truth(size, inputs):
    wide = {
        name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items() if x.is_floating_point()
    }
    if size.mask == "packed":
        return outputs_of(one_by_one(lengths_of(size).tolist()), wide)
    return outputs_of(functools.partial(written_out, mask_N1TT=mask_of(inputs)), wide)


def sdpa(backend=None):
    """By one back-end, or by torch's own choice -> the build of a Rival: inputs -> attention(q, k, v)."""

    def build(inputs):
        mask_N1TT = mask_of(inputs)

        def attention(*qkv):
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                return F.scaled_dot_product_attention(
                    *qkv, attn_mask=mask_N1TT, is_causal=mask_N1TT is None, enable_gqa=True
                )

        return attention

    return build


def sequences_of(inputs):
    """Of a packed row: lengths and starts [S], and the longest."""
    length_S = inputs["segment_NT"][0].unique_consecutive(return_counts=True)[1]
    return length_S, length_S.cumsum(0) - length_S, length_S.max().item()


def varlen(inputs):
    from torch.nn.attention.varlen import varlen_attn

    length_S, _, longest = sequences_of(inputs)
    edge_S = F.pad(length_S.cumsum(0), (1, 0)).int()
    asked = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 takes grouped heads unasked
    causal = {"window_size": (-1, 0), **({"enable_gqa": True} if asked else {})}

    def attention(*qkv):
        tokens_first = [x[0].transpose(0, 1) for x in qkv]
        return varlen_attn(*tokens_first, edge_S, edge_S, longest, longest, **causal).transpose(0, 1)[None]

    return attention


def flex(inputs):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segment_NT = inputs["segment_NT"]
    N, T = segment_NT.shape

    def attends(n, head, query, key):
        return ((segment_NT[n, query] == segment_NT[n, key]) | (segment_NT[n, key] == 0)) & (query >= key)

    blocks = create_block_mask(attends, N, None, T, T, device=segment_NT.device)
    return functools.partial(torch.compile(flex_attention), block_mask=blocks, enable_gqa=True)


def padded(inputs):
    """Scattered into right-padded rows of one sequence each, and gathered again."""
    length_S, start_S, longest = sequences_of(inputs)
    sequence_T = inputs["segment_NT"][0] - 1
    place_T = sequence_T * longest + torch.arange(len(sequence_T), device=length_S.device) - start_S[sequence_T]

    def pad(x_1HTD):
        x_THD = x_1HTD[0].transpose(0, 1)
        wide_THD = x_THD.new_zeros(len(length_S) * longest, *x_THD.shape[1:]).index_copy(0, place_T, x_THD)
        return wide_THD.unflatten(0, (-1, longest)).transpose(1, 2)

    def attention(*qkv):
        out_SHTD = F.scaled_dot_product_attention(*map(pad, qkv), is_causal=True, enable_gqa=True)
        return out_SHTD.transpose(1, 2).flatten(0, 1).index_select(0, place_T).transpose(0, 1)[None]

    return attention


BACKENDS = {
    "default": None, "cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
RIVALS = {
    **{name: Rival(sdpa(backend), compiles=name == "cuDNN") for name, backend in BACKENDS.items()},
    "varlen": Rival(varlen, device="cuda"),
    "flex": Rival(flex, device="cuda", compiles=True),
    "padded": Rival(padded),
}
"""compiles: or plans, for a second or more at each new shape."""
MASKS = {"varlen": ("packed",), "flex": ("segments", "packed"), "padded": ("packed",)}
"""What those that are no back-ends are for."""
COMPILED_D = 64
"""The largest heads that what compiles runs at on a GPU: it would take most of the time otherwise."""


def left_out(name, size, device):
    """(status, why) or None."""
    if size.mask not in MASKS.get(name, (size.mask,)):
        return "absent", f"not for a mask that is {size.mask}"
    return why_left_out(RIVALS[name], device, device == "cuda" and size.D > COMPILED_D)


def count_work(size, pairs, itemsize):
    """Two products over the needed pairs, five more in a backward; inputs and output, and once more as gradients."""
    products, passes = (7, 2) if size.use == "update" else (2, 1)
    tensors = size.N * size.T * size.D * 2 * (size.H + size.K)
    return Work(2 * products * pairs * size.H * size.D, passes * tensors * itemsize)


def chosen(inputs):
    """The name of the back-end that torch chooses."""
    mask_N1TT, qkv = mask_of(inputs), [inputs[name] for name in LEAVES]
    number = torch._fused_sdp_choice(*qkv, mask_N1TT, 0.0, mask_N1TT is None, enable_gqa=True)
    return next((name for name, backend in BACKENDS.items() if backend and backend.value == number), "another")


def try_out(row, build, inputs, shorter, wanted, limit):
    """-> attention(q, k, v) of a rival that is right; one that refuses is absent, as torch warns why."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with outcome(row):
            attention = build(inputs)
            row["errors"] = output_errors(outputs_of(attention, inputs), wanted)
            refuse_wrong(row["errors"], limit)
            (row["first"],) = wall_clock([lambda: outputs_of(build(shorter), shorter)])
            return attention
    if any(words in row["why"] for words in REFUSALS):
        reasons = [str(warning.message).split(" (Triggered")[0] for warning in said]
        row["status"], row["why"] = "absent", "; ".join(reasons or [row["why"]])[:240]


def run(rows, device, size, rounds, threads, tick):
    dtype = DTYPES["bf16" if device == "cuda" else "fp32"]
    inputs, calls = make_inputs(size, dtype, device), {}
    copies, wanted = cold_copies(inputs, device), truth(size, inputs)
    work = count_work(size, needed_pairs(inputs), dtype.itemsize)
    rows["default"]["note"] = f"which is {chosen(inputs)}"
    for i, (name, rival) in enumerate(RIVALS.items(), 1):
        rows[name].update(work._asdict())
        if reason := left_out(name, size, device):
            rows[name]["status"], rows[name]["why"] = reason
            continue
        tick(f"check {name}")
        shorter = make_inputs(size._replace(T=size.T - i * FEWER), dtype, device)
        if attention := try_out(rows[name], rival.build, inputs, shorter, wanted, LIMITS[dtype]):
            calls[name] = [functools.partial(outputs_of, attention, copy) for copy in copies]
    take_turns(calls, rows, rounds, CLOCKS[device], tick)
    summarize(rows, measure_roofs(device, dtype, size in SIZES["small"]), base="default")


CASES = (("packed", "update"), ("causal", "update"), ("segments", "update"), ("causal", "prefill"))
SIZES = {
    "small": [Size(2, 4, 2, 16, 80, *case) for case in CASES],
    "cpu": [Size(4, 14, 2, 64, 256, *case) for case in CASES],
    "cuda": [Size(16, *heads, 512, *case) for heads in ((14, 2, 64), (16, 2, 128)) for case in CASES],  # 0.5B, 3B
}
BENCH = Experiment(
    SIZES, run, dict.fromkeys(RIVALS, ""),
    (
        ("back-end", shown("rival")), ("time", shown("median", seconds)), ("p20-p80", spread),
        ("x default", shown("time_ratio", ratio)), ("first", shown("first", seconds)),
        ("roof", shown("roof_share", share)), ("error", lambda row: largest_error(row, lambda name: True, "relative")),
        ("", remarks),
    ),
)  # fmt: skip
