"""Attention of one flat row in which several sequences lie end to end, each blind to the others.

T tokens of the row, S spans of it. A span's queries are `length` tokens from `start` on; its keys are those same
tokens, causally, behind the `head_length` tokens from `head_start` on, which every query of it sees: the prompt that
several answers share, or nothing. So no product is spent on another sequence, and there is no T x T mask. In a layer
with a `window` a query sees the last so many of those keys alone, itself among them: they are a span's in its order.

On a GPU a variable-length flash kernel takes the row as it is (`Varlen`). On a CPU, which has none, spans of about one
length are gathered into a rectangle for torch's SDPA, and their outputs back (`Padded`): linear layers see no padding,
attention little. Oracle: softmax attention written out under a T x T mask (tests/test_attention.py).
"""

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # needless before

SHELF, SLACK = 7 / 8, 8
"""The shortest span of a rectangle: this part of its longest, less so many tokens. Narrower, they would be many."""


class Span(NamedTuple):
    """Places in the flat row; see above."""

    start: int
    length: int
    head_start: int = 0
    head_length: int = 0


class Varlen(NamedTuple):
    """What the flash kernel wants to know: boundaries of the spans' queries and keys, int32 [S + 1]."""

    query_bounds: Tensor
    key_bounds: Tensor
    key_K: Tensor | None  # int64: where the keys stand in the row; None: every span's are its queries' own
    longest_query: int
    longest_key: int

    @classmethod
    def plan(cls, spans: Sequence[Span]) -> "Varlen":
        """For spans that cover the row, in its order."""
        queries, keys = [s.length for s in spans], [s.head_length + s.length for s in spans]
        key_K = torch.cat([keys_of(s) for s in spans]) if queries != keys else None
        return cls(_bounds(queries), _bounds(keys), key_K, max(queries), max(keys))

    def attend(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scaling: float, dropout: float, window: int | None = None
    ) -> Tensor:
        assert not dropout, "the kernel knows no dropout"
        if self.key_K is not None:
            k_TKD, v_TKD = k_TKD[self.key_K], v_TKD[self.key_K]
        return varlen_attn(
            q_THD, k_TKD, v_TKD, self.query_bounds, self.key_bounds, self.longest_query, self.longest_key,
            scale=scaling, window_size=(-1 if window is None else window - 1, 0), **GROUPED,
        )  # fmt: skip


class Block(NamedTuple):
    """Spans of about one length as a rectangle: places in the row, int64, of queries and keys; a place is repeated
    where a span has fewer, behind all that count."""

    query_SL: Tensor
    key_SL: Tensor
    mask_S1LL: Tensor | None  # bool, True = attend; None: plainly causal

    @classmethod
    def plan(cls, spans: Sequence[Span]) -> "Block":
        query_SL = _padded([torch.arange(s.start, s.start + s.length) for s in spans])
        if not any(s.head_length for s in spans):
            return cls(query_SL, query_SL, None)
        key_SL = _padded([keys_of(s) for s in spans])
        last_S1 = torch.tensor([[s.head_length] for s in spans])
        seen_SL = last_S1 + torch.arange(query_SL.shape[1])
        return cls(query_SL, key_SL, (torch.arange(key_SL.shape[1]) <= seen_SL[:, :, None])[:, None])

    def attend(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scaling: float, dropout: float, window: int | None = None
    ) -> Tensor:
        """[S * L, H, D]"""
        q, k, v = (
            x.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)
            for x, at in ((q_THD, self.query_SL), (k_TKD, self.key_SL), (v_TKD, self.key_SL))
        )
        mask = narrowed(self.mask_S1LL, window, self.key_SL.shape[1], q.device)
        return sdpa(q, k, v, mask, scaling, dropout).transpose(1, 2).flatten(0, 1)


class Padded(NamedTuple):
    """Rectangles of spans, and where each token's output stands among theirs, int64 [T]."""

    blocks: tuple[Block, ...]
    place_T: Tensor

    @classmethod
    def plan(cls, spans: Sequence[Span]) -> "Padded":
        """For spans that cover the row, in its order."""
        shelves, first = _shelves(spans), 0
        place_T = torch.empty(sum(s.length for s in spans), dtype=torch.int64)
        for shelf in shelves:
            longest = shelf[0].length
            for i, s in enumerate(shelf):
                place_T[s.start : s.start + s.length] = torch.arange(s.length) + (first + i * longest)
            first += len(shelf) * longest
        return cls(tuple(map(Block.plan, shelves)), place_T)

    def attend(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scaling: float, dropout: float, window: int | None = None
    ) -> Tensor:
        outs = [block.attend(q_THD, k_TKD, v_TKD, scaling, dropout, window) for block in self.blocks]
        return (torch.cat(outs) if len(outs) > 1 else outs[0]).index_select(0, self.place_T)


def keys_of(span: Span) -> Tensor:
    """Where the keys of a span stand in the row, int64 [head_length + length]."""
    head = torch.arange(span.head_start, span.head_start + span.head_length)
    return torch.cat([head, torch.arange(span.start, span.start + span.length)])


def narrowed(mask: Tensor | None, window: int | None, length: int, device: torch.device) -> Tensor | None:
    """A mask over `length` keys [..., Q, K], True = attend, for queries that see the last `window` of their keys alone.

    None is plainly causal, before and after; so it stays where every window holds all keys."""
    if window is None or window >= length:
        return mask
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    first = mask.sum(-1, keepdim=True) - window  # a query sees keys from the first on, without gaps
    return mask & (torch.arange(length, device=device) >= first)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0):
    """torch's SDPA of query [N, H, T, D], key and value [N, K, T, D]; plainly causal where there is no mask."""
    if mask is not None and query.is_cuda:  # its kernel for masks knows no groups; what does takes memory of T x T
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, mask is None, scale=scaling, enable_gqa=grouped
    )


def attend(module, query, key, value, mask, *, spans, scaling, dropout=0.0, sliding_window=None, **kwargs):
    """The attention of transformers' layers: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D], None."""
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    return spans.attend(q_THD, k_TKD, v_TKD, scaling, dropout, sliding_window)[None], None


def _shelves(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans of about one length, the longest first; those behind a head apart."""
    shelves: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.head_length > 0, -s.length)):
        top = shelves[-1][0] if shelves else None
        if top is None or bool(top.head_length) != bool(span.head_length) or span.length < SHELF * top.length - SLACK:
            shelves.append([])
        shelves[-1].append(span)
    return shelves


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def _padded(places: list[Tensor]) -> Tensor:
    """[S, L] of ragged rows, each filled up with its last place."""
    longest = max(map(len, places))
    return torch.stack([torch.cat([p, p[-1:].expand(longest - len(p))]) for p in places])
