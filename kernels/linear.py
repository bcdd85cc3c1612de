"""The loops of the linear functions over chunks of rows, the same for chunked.py and fused.py.

A `Passes` holds what runs on a chunk of logits: `reduce` (each row's numbers) and `differentiate` (logits become their
gradient, in place). Between them the objective is plain arithmetic on [C] values: objective.py.
M rows, C rows of a chunk, V vocabulary, D hidden, K tokens with exact logits. Oracle: eager.py.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch

from .checks import move_rows
from .head import Head, unrounded, wide
from .objective import add_stats, clipped_surrogate_rows
from .spec import STATS


class Passes(NamedTuple):
    reduce: Callable
    """(head, h_CD, z_CV, ids_C, temperature_C) -> top_C, logz_C, logp_C, entropy_C, refined

    refined: None, or (which_CK, exact_CK), tokens and their logits where z_CV rounds them."""
    differentiate: Callable
    """(z_CV, ids_C, temperature_C, top_C, logz_C, logp_C, entropy_C, dlogp_C, dentropy_C, refined); overwrites z_CV"""


class Rows(NamedTuple):
    """What `logprob_forward` leaves for `logprob_backward`, and shows: as `reduce` made it."""

    top_M: torch.Tensor
    logz_M: torch.Tensor
    logp_M: torch.Tensor
    entropy_M: torch.Tensor
    which_MK: torch.Tensor | None
    exact_MK: torch.Tensor | None


class _TakeRows(torch.autograd.Function):
    """hidden_ND[rows_M], each row once: its gradient is a copy, where an index's would be sorted and summed."""

    @staticmethod
    def forward(ctx, hidden_ND, rows_M):
        ctx.save_for_backward(rows_M)
        ctx.shape = hidden_ND.shape
        return hidden_ND[rows_M]

    @staticmethod
    def backward(ctx, dhidden_MD):
        (rows_M,) = ctx.saved_tensors
        return dhidden_MD.new_zeros(ctx.shape).index_copy_(0, rows_M, dhidden_MD), None


def take_rows(hidden_ND, rows_M):
    """-> hidden_MD; rows_M int64 on the host or the device, None: all."""
    return hidden_ND if rows_M is None else _TakeRows.apply(hidden_ND, move_rows(rows_M, hidden_ND.device))


def cut(span, *vectors):
    return [x if x is None else x[span] for x in vectors]


def scale_rows(x_MD, by_M):
    """Rows times numbers; 0 selects: whatever the row holds, nothing is left of it."""
    return torch.where(by_M[:, None] == 0, 0.0, x_MD * by_M[:, None])


def grads_wanted(*inputs):
    """What a Function's forward or an op cannot see, its caller can: no_grad, and which inputs are trained."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]


def in_given_dtypes(loop):
    """The loop under no autocast: it rounds where it means to."""

    @wraps(loop)
    def run(passes, hidden_MD, *rest):
        with torch.autocast(hidden_MD.device.type, enabled=False):
            return loop(passes, hidden_MD, *rest)

    return run


@in_given_dtypes
def logprob_forward(passes, hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, early):
    """-> Rows, and with `early` dhidden_MD for unit dlogp: with a frozen head that is all the backward needs.

    On CUDA it is fp32, to be rounded once, after dlogp.
    """
    head = Head(hidden_MD, weight_VD, bias_V, None, accurate, (early, False, False), dhidden_dtype=unrounded(hidden_MD))
    parts = []
    for span, h_CD, z_CV in head.chunks():
        ids_C, temperature_C = cut(span, ids_M, temperature_M)
        *numbers, refined = passes.reduce(head, h_CD, z_CV, ids_C, temperature_C)
        parts.append((*numbers, *(refined or (None, None))))
        if early:
            one_C = torch.ones_like(numbers[0])
            passes.differentiate(z_CV, ids_C, temperature_C, *numbers, one_C, None, refined)
            head.add_gradient(span)
    if not parts:
        nothing = [hidden_MD.new_zeros(0, dtype=wide(hidden_MD.dtype)) for _ in range(4)]
        return Rows(*nothing, None, None), head.dhidden_MD
    return Rows(*[None if xs[0] is None else torch.cat(xs) for xs in zip(*parts)]), head.dhidden_MD


@in_given_dtypes
def logprob_backward(
    passes, hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, rows, dlogp_M, dentropy_M, needs
):
    """-> dhidden_MD, dweight_VD, dbias_V (None where not needed), from logits made again."""
    head = Head(hidden_MD, weight_VD, bias_V, None, accurate, needs)
    for span, _, z_CV in head.chunks():
        ids_C, temperature_C, dlogp_C, dentropy_C = cut(span, ids_M, temperature_M, dlogp_M, dentropy_M)
        *numbers, which_CK, exact_CK = cut(span, *rows)
        refined = None if which_CK is None else (which_CK, exact_CK)
        passes.differentiate(z_CV, ids_C, temperature_C, *numbers, dlogp_C, dentropy_C, refined)
        head.add_gradient(span)
    z_CV = None  # the slab goes before the gradients are rounded
    return head.gradients()


@in_given_dtypes
def surrogate_forward(
    passes, hidden_MD, weight_VD, bias_V, live_M, ids_M, bad_M, temperature_M, vectors, spec, accurate, needs
):
    """-> loss [], logp_M, stats, dhidden_MD, dweight_VD, dbias_V (None where not needed), in one pass over the rows.

    vectors: logp_old_M, adv_M, weight_M, logp_ref_M, logp_behaviour_M. live_M bool or None: rows that count.
    """
    head = Head(hidden_MD, weight_VD, bias_V, live_M, accurate, needs)
    loss = hidden_MD.new_zeros((), dtype=wide(hidden_MD.dtype))
    stats = hidden_MD.new_zeros(len(STATS), dtype=torch.float32)
    logp_M = hidden_MD.new_zeros(ids_M.shape, dtype=wide(hidden_MD.dtype))
    for span, h_CD, z_CV in head.chunks():
        ids_C, bad_C, temperature_C = cut(span, ids_M, bad_M, temperature_M)
        top_C, logz_C, logp_C, entropy_C, refined = passes.reduce(head, h_CD, z_CV, ids_C, temperature_C)
        shown_C = logp_C.masked_fill(bad_C, float("nan"))
        live_C = torch.ones_like(bad_C) if live_M is None else live_M[span]
        logp_M[span] = torch.where(live_C, shown_C, 0.0)
        old_C, adv_C, weight_C, ref_C, behaviour_C = cut(span, *vectors)
        others = dict(logp_ref_N=ref_C, logp_behaviour_N=behaviour_C, entropy_N=entropy_C)
        chunk_loss, dlogp_C, dentropy_C, chunk_stats = clipped_surrogate_rows(
            shown_C, old_C, adv_C, weight_C, spec, **others, counted_N=live_C, bad_N=bad_C
        )
        loss, stats = loss + chunk_loss, add_stats(stats, chunk_stats)
        if any(needs):
            passes.differentiate(
                z_CV, ids_C, temperature_C, top_C, logz_C, logp_C, entropy_C, dlogp_C, dentropy_C, refined
            )
            head.add_gradient(span)
    z_CV = None  # the slab goes before the gradients are rounded
    return loss, logp_M, stats, *head.gradients()
