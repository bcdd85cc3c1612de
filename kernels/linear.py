"""The loops of the linear functions over chunks of rows, the same for chunked.py and fused.py.

A `Passes` holds what runs on a chunk of logits: `reduce` (each row's numbers) and `differentiate` (logits become their
gradient, in place). Between them the objective is plain arithmetic on [C] values: objective.py.
The k largest logits of a row are found in one read of it: columns B apart are a group, `reduce` leaves the largest of
each, and the k groups of the largest hold k logits that none outside them passes.
M rows, C rows of a chunk, V vocabulary, D hidden, K tokens of a row, J those after the row's own. Oracle: eager.py.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .checks import move_rows
from .head import Head, unrounded, wide
from .objective import add_stats, clipped_surrogate_rows, match_rows
from .spec import MATCH_STATS, STATS


class Passes(NamedTuple):
    reduce: Callable
    """(head, h_CD, z_CV, ids_C, temperature_C) -> top_C, logz_C, logp_C, entropy_C, refined

    refined: None, or (which_CK, exact_CK), tokens and their logits where z_CV rounds them."""
    differentiate: Callable
    """(z_CV, ids_C, temperature_C, top_C, logz_C, logp_C, entropy_C, dlogp_C, dentropy_C, refined); overwrites z_CV"""
    look_up: Callable
    """(head, h_CD, z_CV, temperature_C, top_C, logz_C, which_CK) -> logp_CK of more tokens"""


class Part(NamedTuple):
    """What an objective gives of a chunk: the loss [], its slopes, its stats, and where slopes of more tokens than the
    row's own come in, (which_CJ, the gradient there of the logits over the temperature)."""

    loss: torch.Tensor
    dlogp_C: torch.Tensor
    dentropy_C: torch.Tensor | None
    stats: torch.Tensor
    exact: tuple | None = None


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


def surrogate_forward(passes, hidden_MD, weight_VD, bias_V, live_M, ids_M, bad_M, temperature_M, vectors, spec, *rest):
    """As loss_forward. vectors: logp_old_M, adv_M, weight_M, logp_ref_M, logp_behaviour_M."""

    def objective(span, logp_C, entropy_C, counted_C, look_up):
        old_C, adv_C, weight_C, ref_C, behaviour_C, bad_C = cut(span, *vectors, bad_M)
        others = dict(logp_ref_N=ref_C, logp_behaviour_N=behaviour_C, entropy_N=entropy_C)
        return Part(
            *clipped_surrogate_rows(logp_C, old_C, adv_C, weight_C, spec, **others, counted_N=counted_C, bad_N=bad_C)
        )

    rows = live_M, ids_M, bad_M, temperature_M
    return loss_forward(passes, hidden_MD, weight_VD, bias_V, *rows, objective, len(STATS), *rest)


def match_forward(passes, hidden_MD, weight_VD, bias_V, live_M, ids_M, bad_M, temperature_M, vectors, spec, *rest):
    """As loss_forward. vectors: top_ids_MK (all in the vocabulary), top_logp_MK, weight_M."""

    def objective(span, logp_C, entropy_C, counted_C, look_up):
        ids_C, bad_C, top_ids_CK, teacher_CK, weight_C = cut(span, ids_M, bad_M, *vectors)
        own_CK = top_ids_CK == ids_C[:, None]
        loss, dlogp_C, exact_CJ, stats = match_rows(
            logp_C, look_up(top_ids_CK), teacher_CK, own_CK, weight_C, spec, counted_N=counted_C, bad_N=bad_C
        )
        own_C1 = ids_C[:, None].clamp(0, len(weight_VD) - 1)  # of a row left out, or bad: 0 and NaN go anywhere
        return Part(loss, dlogp_C, None, stats, (torch.cat((own_C1, top_ids_CK), 1), exact_CJ))

    rows = live_M, ids_M, bad_M, temperature_M
    return loss_forward(passes, hidden_MD, weight_VD, bias_V, *rows, objective, len(MATCH_STATS), *rest)


@in_given_dtypes
def loss_forward(
    passes, hidden_MD, weight_VD, bias_V, live_M, ids_M, bad_M, temperature_M, objective, num_stats, accurate, needs
):
    """-> loss [], logp_M, stats, dhidden_MD, dweight_VD, dbias_V (None where not needed), in one pass over the rows.

    objective(slice of rows, logp_C, entropy_C, counted_C, look_up(which_CK) -> logp_CK) -> Part.
    live_M bool or None: rows that count.
    """
    head = Head(hidden_MD, weight_VD, bias_V, live_M, accurate, needs)
    loss = hidden_MD.new_zeros((), dtype=wide(hidden_MD.dtype))
    stats = hidden_MD.new_zeros(num_stats, dtype=torch.float32)
    logp_M = hidden_MD.new_zeros(ids_M.shape, dtype=wide(hidden_MD.dtype))
    for span, h_CD, z_CV in head.chunks():
        ids_C, bad_C, temperature_C = cut(span, ids_M, bad_M, temperature_M)
        *numbers, refined = passes.reduce(head, h_CD, z_CV, ids_C, temperature_C)
        top_C, logz_C, logp_C, entropy_C = numbers
        shown_C = logp_C.masked_fill(bad_C, float("nan"))
        live_C = torch.ones_like(bad_C) if live_M is None else live_M[span]
        logp_M[span] = torch.where(live_C, shown_C, 0.0)
        look_up = partial(passes.look_up, head, h_CD, z_CV, temperature_C, top_C, logz_C)
        part = objective(span, shown_C, entropy_C, live_C, look_up)
        loss, stats = loss + part.loss, add_stats(stats, part.stats)
        if any(needs):
            passes.differentiate(z_CV, ids_C, temperature_C, *numbers, part.dlogp_C, part.dentropy_C, refined)
            if part.exact is not None:
                _write(z_CV, temperature_C, *part.exact)
            head.add_gradient(span)
    z_CV = None  # the slab goes before the gradients are rounded
    return loss, logp_M, stats, *head.gradients()


def _write(z_CV, temperature_C, which_CJ, exact_CJ):
    """Over the gradient of the logits; an id that is in a row twice has one value."""
    exact_CJ = exact_CJ if temperature_C is None else exact_CJ / temperature_C[:, None]
    z_CV.scatter_(1, which_CJ, exact_CJ.to(z_CV.dtype))


@in_given_dtypes
def topk_forward(reduce, hidden_MD, weight_VD, bias_V, temperature_M, k, accurate):
    """-> logp_MK in descending order, ids_MK.

    reduce: (z_CV, temperature_C) -> top_C, a logit, logz_C, largest_CB: of columns b, b + B, b + 2 B ...
    """
    head = Head(hidden_MD, weight_VD, bias_V, None, accurate, (False, False, False))
    logp_MK = hidden_MD.new_empty(len(hidden_MD), k, dtype=wide(hidden_MD.dtype))
    ids_MK = torch.empty_like(logp_MK, dtype=torch.int64)
    for span, _, z_CV in head.chunks():
        (temperature_C,) = cut(span, temperature_M)
        top_C, logz_C, largest_CB = reduce(z_CV, temperature_C)
        ids_MK[span] = ids_CK = _largest(z_CV, largest_CB, k)
        gap_CK = z_CV.gather(1, ids_CK) - top_C[:, None]
        logp_MK[span] = (gap_CK if temperature_C is None else gap_CK / temperature_C[:, None]) - logz_C[:, None]
    return logp_MK, ids_MK


def _largest(z_CV, largest_CB, k):
    """-> ids_CK of the k largest logits, the largest first. G groups of W columns."""
    V, B = z_CV.shape[1], largest_CB.shape[1]
    G, whole = min(k, B), V - V % B
    groups_CG = largest_CB.topk(G, sorted=False).indices
    take = lambda z_CWB: z_CWB.gather(2, groups_CG[:, None].expand(-1, z_CWB.shape[1], -1))
    # A banned token comes before what is no token.
    z_CWG = take(z_CV[:, :whole].unflatten(1, (-1, B))).clamp(min=torch.finfo(z_CV.dtype).min)
    if V % B:
        tail_CB = F.pad(z_CV[:, whole:].clamp(min=torch.finfo(z_CV.dtype).min), (0, B - V % B), value=-float("inf"))
        z_CWG = torch.cat((z_CWG, take(tail_CB[:, None])), 1)
    at_CK = z_CWG.flatten(1).topk(k).indices
    return at_CK // G * B + groups_CG.gather(1, at_CK % G)
