"""The loops of the linear functions over chunks of rows, the same for chunked.py and fused.py.

A `Passes` holds what runs on a chunk of logits: `reduce` (each row's numbers) and `differentiate` (logits become their
gradient, in place). Between them the objective is plain arithmetic on [C] values: objective.py.
N rows, M rows kept, C rows of a chunk, V vocabulary, D hidden, K tokens with exact logits. Oracle: eager.py.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch

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
    """What `logprob_forward` leaves for `logprob_backward`, and shows: over the kept rows, as `reduce` made it."""

    top_M: torch.Tensor
    logz_M: torch.Tensor
    logp_M: torch.Tensor
    entropy_M: torch.Tensor
    which_MK: torch.Tensor | None
    exact_MK: torch.Tensor | None


def kept(rows, *vectors):
    return [x if x is None or rows is None else x[rows] for x in vectors]


def spread(x_M, rows_M, N):
    return x_M if rows_M is None else x_M.new_zeros(N).index_copy_(0, rows_M, x_M)


def scale_rows(x_ND, by_N):
    """Rows times numbers; 0 selects: whatever the row holds, nothing is left of it."""
    return torch.where(by_N[:, None] == 0, 0.0, x_ND * by_N[:, None])


def grads_wanted(*inputs):
    """What a Function's forward or an op cannot see, its caller can: no_grad, and which inputs are trained."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]


def in_given_dtypes(loop):
    """The loop under no autocast: it rounds where it means to."""

    @wraps(loop)
    def run(passes, hidden_ND, *rest):
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return loop(passes, hidden_ND, *rest)

    return run


@in_given_dtypes
def logprob_forward(passes, hidden_ND, weight_VD, bias_V, rows_M, ids_M, temperature_M, accurate, early):
    """-> Rows, and with `early` dhidden_ND for unit dlogp: with a frozen head that is all the backward needs.

    On CUDA it is fp32, to be rounded once, after dlogp.
    """
    head = Head(
        hidden_ND, weight_VD, bias_V, rows_M, None, accurate, (early, False, False), dhidden_dtype=unrounded(hidden_ND)
    )
    parts = []
    for span, h_CD, z_CV in head.chunks():
        ids_C, temperature_C = kept(span, ids_M, temperature_M)
        *numbers, refined = passes.reduce(head, h_CD, z_CV, ids_C, temperature_C)
        parts.append((*numbers, *(refined or (None, None))))
        if early:
            one_C = torch.ones_like(numbers[0])
            passes.differentiate(z_CV, ids_C, temperature_C, *numbers, one_C, None, refined)
            head.add_gradient(span)
    if not parts:
        nothing = [hidden_ND.new_zeros(0, dtype=wide(hidden_ND.dtype)) for _ in range(4)]
        return Rows(*nothing, None, None), head.dhidden_ND
    return Rows(*[None if xs[0] is None else torch.cat(xs) for xs in zip(*parts)]), head.dhidden_ND


@in_given_dtypes
def logprob_backward(
    passes, hidden_ND, weight_VD, bias_V, rows_M, ids_M, temperature_M, accurate, rows, dlogp_N, dentropy_N, needs
):
    """-> dhidden_ND, dweight_VD, dbias_V (None where not needed), from logits made again."""
    dlogp_M, dentropy_M = kept(rows_M, dlogp_N, dentropy_N)
    head = Head(hidden_ND, weight_VD, bias_V, rows_M, None, accurate, needs)
    for span, _, z_CV in head.chunks():
        ids_C, temperature_C, dlogp_C, dentropy_C = kept(span, ids_M, temperature_M, dlogp_M, dentropy_M)
        *numbers, which_CK, exact_CK = kept(span, *rows)
        refined = None if which_CK is None else (which_CK, exact_CK)
        passes.differentiate(z_CV, ids_C, temperature_C, *numbers, dlogp_C, dentropy_C, refined)
        head.add_gradient(span)
    z_CV = None  # the slab goes before the gradients are rounded
    return head.gradients()


@in_given_dtypes
def surrogate_forward(
    passes, hidden_ND, weight_VD, bias_V, rows_M, live_M, ids_M, bad_M, temperature_M, vectors, spec, accurate, needs
):
    """-> loss [], logp_N, stats, dhidden_ND, dweight_VD, dbias_V (None where not needed), in one pass over the rows.

    vectors: arguments of `clipped_surrogate_rows` by name, over the kept rows. live_M bool or None: rows that count.
    """
    N = hidden_ND.shape[0]
    head = Head(hidden_ND, weight_VD, bias_V, rows_M, live_M, accurate, needs)
    loss = hidden_ND.new_zeros((), dtype=wide(hidden_ND.dtype))
    stats = hidden_ND.new_zeros(len(STATS), dtype=torch.float32)
    logp_M = hidden_ND.new_zeros(ids_M.shape, dtype=wide(hidden_ND.dtype))
    for span, h_CD, z_CV in head.chunks():
        ids_C, bad_C, temperature_C = kept(span, ids_M, bad_M, temperature_M)
        top_C, logz_C, logp_C, entropy_C, refined = passes.reduce(head, h_CD, z_CV, ids_C, temperature_C)
        shown_C = logp_C.masked_fill(bad_C, float("nan"))
        live_C = torch.ones_like(bad_C) if live_M is None else live_M[span]
        logp_M[span] = torch.where(live_C, shown_C, 0.0)
        chunk_loss, dlogp_C, dentropy_C, chunk_stats = clipped_surrogate_rows(
            shown_C, spec=spec, entropy_N=entropy_C, counted_N=live_C, bad_N=bad_C,
            **{name: x if x is None else x[span] for name, x in vectors.items()},
        )  # fmt: skip
        loss, stats = loss + chunk_loss, add_stats(stats, chunk_stats)
        if any(needs):
            passes.differentiate(
                z_CV, ids_C, temperature_C, top_C, logz_C, logp_C, entropy_C, dlogp_C, dentropy_C, refined
            )
            head.add_gradient(span)
    z_CV = None  # the slab goes before the gradients are rounded
    stats[STATS.index("rows_skipped")] = N - stats[0]
    return loss, spread(logp_M, rows_M, N), stats, *head.gradients()
