"""Attention of one flat row against softmax under a T x T mask, written out in fp64; values and gradients."""

import itertools
import math

import pytest
import torch

from engine import attention
from engine.attention import Padded, Span, Varlen

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
ALONE = [Span(0, 5), Span(5, 1), Span(6, 17), Span(23, 16), Span(39, 4)]
SHARED = [Span(0, 12), Span(12, 5, 0, 12), Span(17, 1, 0, 12), Span(18, 9, 0, 12), Span(27, 4)]
TWO_GROUPS = [Span(0, 1), Span(1, 3, 0, 1), Span(4, 3, 0, 1), Span(7, 30), Span(37, 2, 7, 30), Span(39, 3, 7, 30)]
ROWS = {"alone": ALONE, "one": [Span(0, 33)], "a head shared": SHARED, "two heads shared": TWO_GROUPS}
WINDOWS = [None, 1, 3, 16, 32, 99]
"""The longest spans have 33 and 36 keys."""
PLANS = [Padded, pytest.param(Varlen, marks=GPU)]


def length(spans) -> int:
    return max(s.start + s.length for s in spans)


def mask_of(spans, window=None) -> torch.Tensor:
    """bool [T, T]: which keys a query sees."""
    T = length(spans)
    mask_TT = torch.zeros(T, T, dtype=torch.bool)
    for s in spans:
        keys = [*range(s.head_start, s.head_start + s.head_length), *range(s.start, s.start + s.length)]
        for i in range(s.length):
            seen = keys[: s.head_length + i + 1]
            mask_TT[s.start + i, seen if window is None else seen[-window:]] = True
    return mask_TT


def written_out(spans, q_THD, k_TKD, v_TKD, scaling: float, window=None) -> torch.Tensor:
    k_THD, v_THD = (x.repeat_interleave(q_THD.shape[1] // x.shape[1], 1) for x in (k_TKD, v_TKD))
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * scaling
    seen_TT = mask_of(spans, window).to(q_THD.device)
    return torch.einsum("hqk,khd->qhd", scores_HTT.masked_fill(~seen_TT, -torch.inf).softmax(-1), v_THD)


def draw(spans, H=4, K=2, D=16, dtype=torch.float32, device="cpu"):
    """Queries, keys, values, and the gradient of the output."""
    g, T = torch.Generator().manual_seed(0), length(spans)
    return [torch.randn(T, heads, D, generator=g).to(device, dtype) for heads in (H, K, K, H)]


def device_of(kind) -> str:
    return "cuda" if kind is Varlen else "cpu"


def planned(kind, spans):
    """On the device that it is for, as engine.layout.Rows.to moves it."""
    move = lambda x: x.to(device_of(kind)) if isinstance(x, torch.Tensor) else x  # noqa: E731
    plan = kind.plan(spans)
    return Varlen(*map(move, plan)) if kind is Varlen else plan


def forward_and_gradients(attend, q, k, v, out_grad) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out, leaves, out_grad)]


def error(x, truth) -> float:
    return (x.double() - truth).abs().max().item()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_attends_as_under_a_mask(name, H, K, window):
    spans, dtype = ROWS[name], torch.float64
    given = draw(spans, H, K, dtype=dtype)
    ours = forward_and_gradients(lambda *x: Padded.plan(spans).attend(*x, 0.3, 0.0, window), *given)
    truth = forward_and_gradients(lambda *x: written_out(spans, *x, 0.3, window), *given)
    for mine, wanted in zip(ours, truth, strict=True):
        assert error(mine, wanted) < 1e-12


def kernel_written_out(q, k, v, query_bounds, key_bounds, longest_query, longest_key, *, scale, window_size, **grouped):
    """What torch's variable-length kernel is documented to do: each query sees the keys of its sequence up to its own
    place counted from their end."""
    bounds = lambda b: list(itertools.pairwise(b.tolist()))  # noqa: E731
    assert window_size[1] == 0 and longest_query == max(b - a for a, b in bounds(query_bounds))
    assert longest_key == max(b - a for a, b in bounds(key_bounds))
    outs = []
    for (a, b), (c, d) in zip(bounds(query_bounds), bounds(key_bounds), strict=True):
        last = d - c - (b - a)  # that the first query sees
        sees_QK = torch.ones(b - a, d - c, dtype=torch.bool).tril(last)
        if window_size[0] >= 0:
            sees_QK = sees_QK.triu(last - window_size[0])
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees_QK, -torch.inf).softmax(-1), values))
    return torch.cat(outs)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", ROWS)
def test_what_the_kernel_is_asked_for_is_what_the_mask_says(name, H, K, window, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", kernel_written_out)
    spans, given = ROWS[name], draw(ROWS[name], H, K, dtype=torch.float64)
    ours = forward_and_gradients(lambda *x: Varlen.plan(spans).attend(*x, 0.3, 0.0, window), *given)
    truth = forward_and_gradients(lambda *x: written_out(spans, *x, 0.3, window), *given)
    for mine, wanted in zip(ours, truth, strict=True):
        assert error(mine, wanted) < 1e-12


@pytest.mark.parametrize(("D", "window"), [(16, None), (64, None), (128, None), (64, 8), (256, 8)])
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", ROWS)
def test_in_bf16_a_row_is_as_near_to_fp64_as_the_written_out_one(name, kind, D, window):
    spans, scaling = ROWS[name], 1 / math.sqrt(D)
    given = draw(spans, D=D, dtype=torch.bfloat16, device=device_of(kind))
    plan = planned(kind, spans)
    ours = forward_and_gradients(lambda *x: plan.attend(*x, scaling, 0.0, window), *given)
    plain = forward_and_gradients(lambda *x: written_out(spans, *x, scaling, window), *given)
    truth = forward_and_gradients(lambda *x: written_out(spans, *x, scaling, window), *(x.double() for x in given))
    for mine, other, wanted in zip(ours, plain, truth, strict=True):
        ulp = torch.finfo(torch.bfloat16).eps * wanted.abs().max().item()
        assert mine.dtype == torch.bfloat16 and mine.shape == wanted.shape
        assert error(mine, wanted) <= 2 * error(other, wanted) + ulp


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", ROWS)
def test_what_else_lies_in_the_row_changes_nothing_and_its_nan_does_not_leak(name, kind, window):
    spans, dtype = ROWS[name], torch.bfloat16 if kind is Varlen else torch.float32
    given = draw(spans, dtype=dtype, device=device_of(kind))
    plan = planned(kind, spans)
    attend = lambda *x: plan.attend(*x, 0.25, 0.0, window)  # noqa: E731
    whole = forward_and_gradients(attend, *given)
    for s in spans:
        seen = torch.zeros(length(spans), dtype=torch.bool, device=device_of(kind))
        seen[s.start : s.start + s.length] = True
        own = seen.clone()
        seen[s.head_start : s.head_start + s.head_length] = True
        broken = [x.masked_fill(~seen[:, None, None], torch.nan) for x in given]
        out, dq, *_ = forward_and_gradients(attend, *broken)
        assert torch.equal(out[own], whole[0][own]) and torch.equal(dq[own], whole[1][own])


@pytest.mark.parametrize("kind", [Padded, Varlen])
def test_a_plan_looks_at_no_other_sequence(kind):
    """Keys that are gathered: a span's own and its head's, and those filled up behind them in a rectangle."""
    plan = kind.plan(SHARED)
    if kind is Varlen:
        bounds = plan.key_bounds.tolist()
        for i, s in enumerate(SHARED):
            keys = plan.key_K[bounds[i] : bounds[i + 1]].tolist()
            head = list(range(s.head_start, s.head_start + s.head_length))
            assert keys == head + list(range(s.start, s.start + s.length))
        assert plan.query_bounds.tolist() == [0, 12, 17, 18, 27, 31]
        assert (plan.longest_query, plan.longest_key) == (12, 21)
    else:
        places = torch.cat([block.query_SL.flatten() for block in plan.blocks])
        assert torch.equal(places[plan.place_T], torch.arange(31))


def test_rows_without_shared_prompts_need_no_copy_of_the_keys_and_no_mask():
    assert Varlen.plan(ALONE).key_K is None
    assert all(block.mask_S1LL is None and block.key_SL is block.query_SL for block in Padded.plan(ALONE).blocks)


def test_a_window_that_holds_every_key_of_a_rectangle_needs_no_mask(monkeypatch):
    masks, real = [], attention.sdpa
    monkeypatch.setattr(
        attention, "sdpa", lambda q, k, v, mask, *rest: masks.append(mask) or real(q, k, v, mask, *rest)
    )
    for window in (None, 17, 16):
        Padded.plan(ALONE).attend(*draw(ALONE)[:3], 0.3, 0.0, window)
    assert [None if mask is None else tuple(mask.shape) for mask in masks] == [None] * 4 + [(17, 17), None]
