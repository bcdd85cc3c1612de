"""Continuous batching with a transformers causal LM and our own KV cache, on one device, without any collective.

Each row that is decoded has a slot. A prompt is prefilled once and its KV copied to the slots of its G samples; a
slot whose row has ended takes the next row at once, so no row waits for a longer one. Only when nothing waits any more
does the batch shrink, the last rows moving into the holes. Sampling and stop flags stay on the device, and the host
looks at them every few tokens where a look costs; what a row does past its end is never seen.
Axes: P prompts, G samples, T tokens of an answer.
Oracles: `generate` of transformers for greedy tokens, a plain forward for the log-probabilities.
"""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model import FAMILIES, attention_of
from engine.replica import Replica
from engine.rollouts.cache import SlotCache, slot_bytes
from engine.rollouts.sampling import Sampling, philox_uniform
from engine.rollouts.slots import Prefill, Slots, attend
from engine.streams import upload
from kernels.chunked import ROWS_OF_A_BLOCK
from kernels.products import TILE, round_up

_POLL = 8  # tokens between two looks at what has ended, where a look costs: a device sync, or text to decode
_PREFILL_TOKENS = 8192  # of prompts prefilled together, padding included


@dataclass(frozen=True)
class Completion:
    """One sampled answer; its lists have one entry per token.

    ids end with the EOS, or with the token that completed a stop string, where one of them ended it. logp is under
    the whole distribution at the temperature, logp_sampled under the one drawn from (they differ with top-p, top-k
    and a head that is padded).
    """

    ids: list[int]
    logp: list[float]
    logp_sampled: list[float]
    finish: str  # "eos", "stop" or "length"
    version: int = 0  # of the weights that sampled it


class NativeRollout:
    """Samples from the model of a replica: a Qwen2, Qwen3 or Llama of transformers in eval mode, without FSDP hooks.

    eos_ids: every id that ends a completion. pad_id: any id of the vocabulary, EOS or not: lengths are counted.
    vocabulary: ids from there on, which pad the head beyond the tokenizer, are never drawn; None: all are.
    ops: kernels.eager, kernels.chunked or kernels.fused, for decode attention. decode: ids -> text, for stop strings.
    max_batch: slots, thus most rows decoded at once. max_prompt, max_new: tokens a slot is made for. Where a call
    needs more tokens, or more rows and max_batch is None, the buffers are made anew.
    memory: bytes that the KV cache may take; slots that do not fit are not made. None: no limit.
    should_stop: asked after each step; when it says yes, the call raises InterruptedError.
    After a call, `decode_steps` is the number of its batched forwards behind the prefills.
    Raises `UserError` for a value out of range and for a model that it would decode wrongly.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        ops,
        vocabulary: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
        max_batch: int | None = None,
        max_prompt: int = 0,
        max_new: int = 0,
        memory: int | None = None,
        should_stop: Callable[[], bool] | None = None,
    ):
        self.replica, self.lm, self.ops = replica, replica.lm, ops
        _refuse_unsupported(self.lm.config)
        vocab_size = self.lm.lm_head.weight.shape[0]
        for name, token in [("pad_id", pad_id), *(("eos_ids", token) for token in eos_ids)]:
            if not 0 <= token < vocab_size:
                raise UserError(f"{name} has {token}, which is outside the model's vocabulary of {vocab_size}")
        if max_batch is not None and max_batch < 1:
            raise UserError(f"max_batch is {max_batch}; it must be at least 1, or None for no limit")
        self.eos_ids, self.pad_id, self.decode = frozenset(eos_ids), pad_id, decode
        self.vocabulary = vocabulary
        self.max_batch, self.memory, self.should_stop = max_batch, memory, should_stop
        self.decode_steps = 0
        self.slots: Slots | None = None
        self.rows, self.max_prompt, self.max_new = 1, max_prompt, max_new
        if max_prompt and max_new and max_batch:
            self._make_slots(max_batch, max_prompt, max_new)

    @torch.inference_mode()
    def prepare(self, sampling: Sampling) -> None:
        """On a GPU, records the decode steps of `sampling` now, not in the first call; needs all sizes."""
        with self.replica.reading(), attention_of(self.lm, attend):
            self._record(sampling, self.slots.cache.num_slots)

    def _record(self, sampling, rows):
        self.slots.start()
        for bucket in sorted({self.bucket(n) for n in range(1, rows + 1)}, reverse=True):  # the largest makes the pool
            self.slots.record(bucket, sampling)

    @torch.inference_mode()
    def __call__(
        self,
        prompts: list[list[int]],
        *,
        num_samples: int,
        sampling: Sampling,
        seed: int,
        requests: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Returns completions [P][G]. Sample g of prompt p is request `requests[p] + g` (`p * num_samples + g` by
        default): its tokens depend on the weights, its prompt, `sampling`, `seed` and that number, not on what shares
        the batch. limits: most tokens of each prompt's answers [P], where fewer than `sampling.max_new_tokens`.
        on_group(p, completions) is called as soon as prompt p has all its answers.

        Raises ValueError for an empty prompt, a limit or num_samples below 1, `UserError` for stop strings without
        `decode` and for a memory that holds no row, FloatingPointError when the model gives probabilities that are
        not finite, RuntimeError while the replica is in use elsewhere.
        """
        limits = [min(sampling.max_new_tokens, x) for x in limits or [sampling.max_new_tokens] * len(prompts)]
        self._check(prompts, num_samples, sampling, limits)
        self._make_room(len(prompts) * num_samples, max(map(len, prompts), default=1), sampling.max_new_tokens)
        first_P = range(0, len(prompts) * num_samples, num_samples) if requests is None else requests
        queue = [
            _Row(prompt, p * num_samples + g, first_P[p] + g, limits[p])
            for p, prompt in enumerate(prompts)
            for g in range(num_samples)
        ]
        done: list[Completion | None] = [None] * len(queue)
        missing = [num_samples] * len(prompts)
        with self.replica.reading() as version, attention_of(self.lm, attend):
            self._record(sampling, min(len(queue), self.slots.cache.num_slots))
            for row, taken, finish in _Pass(self, queue, sampling, seed).run():
                done[row.index] = Completion(*taken, finish, version)
                p = row.index // num_samples
                missing[p] -= 1
                if on_group is not None and not missing[p]:
                    on_group(p, done[p * num_samples : (p + 1) * num_samples])
        return [done[start : start + num_samples] for start in range(0, len(done), num_samples)]

    def _check(self, prompts, num_samples, sampling, limits):
        assert not self.lm.training, "dropout would falsify the log-probabilities: call model.eval()"
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        if len(limits) != len(prompts) or min(limits, default=1) < 1:
            raise ValueError(f"limits is {limits}; it needs a number of at least 1 for each of {len(prompts)} prompts")
        for p, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {p} has no tokens")
        if sampling.stop and self.decode is None:
            raise UserError(f"stop is {sampling.stop!r}, but stop strings need a tokenizer: pass decode")

    def _make_room(self, rows: int, prompt: int, new: int):
        fits = prompt <= self.max_prompt and new <= self.max_new and self.slots is not None
        if fits and (self.max_batch is not None or rows <= self.rows):
            return
        self._make_slots(self.max_batch or max(rows, self.rows), max(prompt, self.max_prompt), max(new, self.max_new))

    def _make_slots(self, rows: int, prompt: int, new: int):
        """Slots for `rows`, or as many as the memory allows."""
        weight, config, columns, count = self.lm.lm_head.weight, self.lm.config, prompt + new, rows
        if self.memory is not None:
            each = slot_bytes(config, columns, weight.dtype)
            if self.memory < each:
                raise UserError(
                    f"The KV cache of one row of {columns} tokens takes {each:,} bytes, but kv_memory_gib allows "
                    f"{self.memory:,}: raise it, or lower max_prompt_tokens or max_new_tokens."
                )
            count = min(rows, self.memory // each)
        self.slots = None  # the old buffers go before the new ones come
        cache = SlotCache(config, count, columns, weight.dtype, self.replica.device, self.ops)
        self.slots = Slots(self.lm, cache, new, self.eos_ids, self.vocabulary)
        self.rows, self.max_prompt, self.max_new = rows, prompt, new

    def bucket(self, rows: int) -> int:
        """Rows of a step for `rows`: on a CPU whole tiles, or as many where those make none; else a power of two,
        which has a CUDA graph."""
        if self.replica.device.type == "cpu":
            return rows if rows < TILE else min(round_up(rows), self.slots.cache.num_slots)
        return min(1 << (rows - 1).bit_length(), self.slots.cache.num_slots)


@dataclass
class _Row:
    """A request on its way through a slot."""

    prompt: list[int]
    index: int  # among the completions
    request: int  # number of its noise
    limit: int  # most tokens
    begun: int = 0  # decode steps before its own first
    searched: int = 0  # tokens known to hold no stop string


class _Pass:
    """One call's scheduler: queue -> staged -> held in a slot -> ended. `run` yields (row, its lists, finish)."""

    def __init__(self, rollout: NativeRollout, queue: list[_Row], sampling: Sampling, seed: int):
        self.rollout, self.slots, self.sampling, self.seed = rollout, rollout.slots, sampling, seed
        self.queue = collections.deque(queue)
        self.staged: collections.deque[tuple[_Row, int, Tensor]] = collections.deque()  # row, its prompt there, noise
        self.prefill: Prefill | None = None  # of the staged rows
        self.held: list[_Row | None] = [None] * self.slots.cache.num_slots
        looks_are_free = self.slots.next_S.device.type == "cpu" and not sampling.stop
        self.poll = 1 if looks_are_free else _POLL
        self.order = self.slots.next_S.device.type == "cpu"  # a GPU's attention reads each row up to its own length

    def run(self) -> Iterator[tuple[_Row, tuple, str]]:
        rollout = self.rollout
        rollout.decode_steps = 0
        while True:
            yield from self._end()
            if self._place():
                continue  # a first token may be the last
            if not any(self.held):
                return
            rows = rollout.bucket(self._compact())
            for _ in range(self._steps_to_look()):
                self.slots.decode(rows, self.sampling)
                rollout.decode_steps += 1
                if rollout.should_stop is not None and rollout.should_stop():
                    raise InterruptedError("a signal asked for the end of the rollout")

    def _occupied(self):
        return [m for m, row in enumerate(self.held) if row is not None]

    def _end(self):
        """Frees the slots of rows that have ended."""
        occupied = self._occupied()
        if not occupied:
            return
        live_M, taken_M = self.slots.look(occupied[-1] + 1)
        cut = self._find_stops(occupied, taken_M) if self.sampling.stop else {}
        ended = [m for m in occupied if m in cut or not live_M[m]]
        if not ended:
            return
        ended_N, length_N = self._ids(ended), [cut.get(m, taken_M[m]) for m in ended]
        self.slots.live_S.index_fill_(0, ended_N, False)
        columns = self.slots.read(ended_N, max(length_N))
        for m, length, *lists in zip(ended, length_N, *columns, strict=True):
            row, self.held[m] = self.held[m], None
            ids, logp, logp_sampled = (values[:length] for values in lists)
            if not all(map(math.isfinite, logp)):
                raise FloatingPointError("the model gives log-probabilities that are not finite; look at its weights")
            finish = "stop" if m in cut else "eos" if ids[-1] in self.rollout.eos_ids else "length"
            yield row, (ids, logp, logp_sampled), finish

    def _find_stops(self, occupied, taken_M):
        """{slot: length at which its text first holds a stop string}. Text is searched whole, then token by token
        where it holds one: exact however tokens spell it."""
        cut, ids_MT = {}, self.slots.read(self._ids(occupied), max(taken_M))[0]
        for m, ids_T in zip(occupied, ids_MT, strict=True):
            row, ids = self.held[m], ids_T[: taken_M[m]]
            end = len(ids) - (ids[-1] in self.rollout.eos_ids)
            if self._holds_stop(ids[:end]):
                cut[m] = next(t for t in range(row.searched + 1, end + 1) if self._holds_stop(ids[:t]))
            row.searched = end
        return cut

    def _holds_stop(self, ids):
        text = self.rollout.decode(ids)
        return any(stop in text for stop in self.sampling.stop)

    def _place(self):
        """Puts waiting rows into free slots, as many as come from one prefill; how many."""
        free = [m for m, row in enumerate(self.held) if row is None]
        if free and not self.staged and self.queue:
            self._stage()
        if free and self.staged and self.order:
            self._promote()
            free = [m for m, row in enumerate(self.held) if row is None]
        into = free[: len(self.staged)]
        if not into:
            return 0
        rows, prompts, noise = zip(*(self.staged.popleft() for _ in into), strict=True)
        for m, row in zip(into, rows, strict=True):
            self.held[m], row.begun = row, self.rollout.decode_steps
        prompt_N, slot_N, limit_N = self._ids([prompts, into, [row.limit for row in rows]])
        self.slots.place(self.prefill, prompt_N, slot_N, limit_N, torch.stack(noise), self.sampling)
        return len(into)

    def _stage(self):
        """Prefills the prompts of the next rows, about a slotful, and makes their noise."""
        rows, prompts, longest = [], [], 0
        while self.queue:
            row = self.queue[0]
            if not prompts or row.prompt is not prompts[-1]:
                longest = max(longest, self.slots.prefill_width([row.prompt]))
                if prompts and (len(rows) >= len(self.held) or longest * (len(prompts) + 1) > _PREFILL_TOKENS):
                    break
                prompts.append(row.prompt)
            rows.append((self.queue.popleft(), len(prompts) - 1))
        self.prefill = None  # its memory goes first
        self.prefill = self.slots.prefill(prompts, self.rollout.pad_id)
        positions_T = torch.arange(self.sampling.max_new_tokens, device=self.slots.next_S.device)
        requests_N1 = self._ids([row.request for row, _ in rows])[:, None]
        noise_NT = philox_uniform(self.seed, requests_N1, positions_T)
        self.staged.extend((row, p, noise_T) for (row, p), noise_T in zip(rows, noise_NT, strict=True))

    def _promote(self):
        """Fills the holes of each block of slots with the longest rows behind it, so that rows of like length stay
        together and the new ones, which are short, come last: attention reads a block up to its longest row."""
        moves = {}  # hole -> slot that its row comes from
        for first in range(0, len(self.held), ROWS_OF_A_BLOCK):
            end = first + ROWS_OF_A_BLOCK
            behind = sorted((m for m in self._occupied() if m >= end), key=self._length, reverse=True)
            holes = (m for m in range(first, min(end, len(self.held))) if self.held[m] is None)
            for hole, m in zip(holes, behind, strict=False):
                self.held[hole], self.held[m], moves[hole] = self.held[m], None, m
        self._move(moves)

    def _length(self, m):
        return len(self.held[m].prompt) + self.rollout.decode_steps - self.held[m].begun

    def _move(self, moves):
        if moves:
            columns = max(map(self._length, moves)) + 1
            self.slots.move(*self._ids([list(moves.values()), list(moves)]), columns)

    def _compact(self):
        """Slots to decode: up to the last that is held, after moving the last rows into holes if that saves a step's
        width. Holes are only left when nothing waits for them."""
        held = self._occupied()
        width = held[-1] + 1
        if self.rollout.bucket(len(held)) < self.rollout.bucket(width):
            holes = [m for m in range(len(held)) if self.held[m] is None]
            moves = dict(zip(holes, held[-len(holes) :], strict=True))
            for hole, m in moves.items():
                self.held[hole], self.held[m] = self.held[m], None
            self._move(moves)
            width = len(held)
        return width

    def _steps_to_look(self):
        """Steps until the host looks again; no more than the row with the most left can take."""
        left = max(row.limit - 1 - (self.rollout.decode_steps - row.begun) for row in self.held if row is not None)
        return max(1, min(self.poll, left))

    def _ids(self, numbers):
        return upload(torch.tensor(numbers), self.slots.next_S.device)


def _refuse_unsupported(config):
    """Raises `UserError` for what would not decode, or wrongly."""
    if config.model_type not in FAMILIES:
        raise UserError(f"rollouts know no {config.model_type!r} model; supported families: {', '.join(FAMILIES)}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise UserError("the model has sliding-window layers, which rollouts do not support; use_sliding_window: false")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UserError(f"RoPE of type {rope!r} depends on the longest row of a batch, which rollouts do not support")
