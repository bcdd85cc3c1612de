"""Continuous batching with a transformers causal LM and our own KV cache, on one device, without any collective.

`schedule` says which row goes where and when, `slots` holds the rows on the device; here the one is done to the other.
Sampling and stop flags stay on the device; what a row does past its end is never seen.
Axes: P prompts, G samples, N rows, M slots, T tokens of an answer.
Oracles: `generate` of transformers for greedy tokens, a plain forward for the log-probabilities.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model import FAMILIES, attention_of, rope_types, unsupported
from engine.replica import Replica
from engine.rollouts.cache import SlotCache, slot_bytes
from engine.rollouts.protocol import Completion
from engine.rollouts.sampling import Sampling, philox_uniform
from engine.rollouts.schedule import Row, Schedule
from engine.rollouts.slots import Prefill, Slots, attend
from engine.streams import upload
from kernels.chunked import ROWS_OF_A_BLOCK
from kernels.products import TILE, round_up

_POLL = 8  # tokens between two looks at what has ended, where a look costs: a device sync, or text to decode


class NativeRollout:
    """Samples from the model of a replica: of transformers' FAMILIES, in eval mode, without FSDP hooks.

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
        on_answer: Callable[[], None] | None = None,
    ) -> list[list[Completion]]:
        """As `protocol.Rollout` says. limits: most tokens of each prompt's answers [P], where fewer than
        `sampling.max_new_tokens`.

        Raises ValueError for an empty prompt, a limit or num_samples below 1, `UserError` for stop strings without
        `decode` and for a memory that holds no row, FloatingPointError when the model gives probabilities that are
        not finite, RuntimeError while the replica is in use elsewhere.
        """
        limits = [min(sampling.max_new_tokens, x) for x in limits or [sampling.max_new_tokens] * len(prompts)]
        self._check(prompts, num_samples, sampling, limits)
        self._make_room(len(prompts) * num_samples, max(map(len, prompts), default=1), sampling.max_new_tokens)
        first_P = range(0, len(prompts) * num_samples, num_samples) if requests is None else requests
        rows = [
            Row(prompt, p, g, first_P[p] + g, limits[p]) for p, prompt in enumerate(prompts) for g in range(num_samples)
        ]
        groups: list[list[Completion]] = [[] for _ in prompts]
        with self.replica.reading() as version, attention_of(self.lm, attend):
            self._record(sampling, min(len(rows), self.slots.cache.num_slots))
            schedule = self._schedule(rows, _Mover(self, sampling, seed, version), bool(sampling.stop))
            for p, group in schedule.groups(on_answer):
                groups[p] = group
                if on_group is not None:
                    on_group(p, group)
        self.decode_steps = schedule.steps
        return groups

    def _schedule(self, rows: list[Row], mover: "_Mover", has_stops: bool) -> Schedule:
        on_cpu = self.replica.device.type == "cpu"
        return Schedule(
            rows,
            mover,
            poll=1 if on_cpu and not has_stops else _POLL,
            block=ROWS_OF_A_BLOCK if on_cpu else 0,  # a GPU's attention reads each row up to its own length
            should_stop=self.should_stop,
        )

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


class _Mover:
    """One call's tensors (`engine.rollouts.schedule.Mover`): its prefill, its noise, and the slots they go into."""

    def __init__(self, rollout: NativeRollout, sampling: Sampling, seed: int, version: int):
        self.slots, self.sampling, self.seed, self.version = rollout.slots, sampling, seed, version
        self.eos_ids, self.pad_id, self.text = rollout.eos_ids, rollout.pad_id, rollout.decode
        self.bucket = rollout.bucket
        self.device, self.num_slots = rollout.replica.device, rollout.slots.cache.num_slots
        self.prefilled: Prefill | None = None
        self.noise_NT: Tensor | None = None  # of the rows that are not placed yet

    def width(self, prompt: list[int]) -> int:
        return self.slots.prefill_width([prompt])

    def prefill(self, prompts: list[list[int]], rows: list[Row]) -> None:
        self.prefilled = self.noise_NT = None  # their memory goes first
        self.prefilled = self.slots.prefill(prompts, self.pad_id)
        positions_T = torch.arange(self.sampling.max_new_tokens, device=self.device)
        requests_N1 = self._ids([row.request for row in rows])[:, None]
        self.noise_NT = philox_uniform(self.seed, requests_N1, positions_T)

    def place(self, slots: list[int], rows: list[Row]) -> None:
        prompt_N, slot_N, limit_N = self._ids([[row.source for row in rows], slots, [row.limit for row in rows]])
        noise_NT, self.noise_NT = self.noise_NT[: len(rows)], self.noise_NT[len(rows) :]
        self.slots.place(self.prefilled, prompt_N, slot_N, limit_N, noise_NT, self.sampling)

    def decode(self, slots: int) -> None:
        self.slots.decode(slots, self.sampling)

    def move(self, sources: list[int], targets: list[int], columns: int) -> None:
        self.slots.move(*self._ids([sources, targets]), columns)

    def look(self, held: dict[int, Row]) -> Iterator[tuple[int, Completion]]:
        live_M, taken_M = self.slots.look(max(held) + 1)
        cut = self._find_stops(held, taken_M) if self.sampling.stop else {}
        ended = [m for m in held if m in cut or not live_M[m]]
        if not ended:
            return
        ended_N, length_N = self._ids(ended), [cut.get(m, taken_M[m]) for m in ended]
        self.slots.live_S.index_fill_(0, ended_N, False)
        columns = self.slots.read(ended_N, max(length_N))
        for m, length, *lists in zip(ended, length_N, *columns, strict=True):
            ids, logp = (values[:length] for values in lists)
            if not all(map(math.isfinite, logp)):
                raise FloatingPointError("the model gives log-probabilities that are not finite; look at its weights")
            finish = "stop" if m in cut else "eos" if ids[-1] in self.eos_ids else "length"
            yield m, Completion(ids, logp, finish, self.version)

    def _find_stops(self, held: dict[int, Row], taken_M: list[int]) -> dict[int, int]:
        """{slot: length at which its text first holds a stop string}. Text is searched whole, then token by token
        where it holds one: exact however tokens spell it."""
        cut, ids_MT = {}, self.slots.read(self._ids(list(held)), max(taken_M))[0]
        for (m, row), ids_T in zip(held.items(), ids_MT, strict=True):
            ids = ids_T[: taken_M[m]]
            end = len(ids) - (ids[-1] in self.eos_ids)
            if self._holds_stop(ids[:end]):
                cut[m] = next(t for t in range(row.searched + 1, end + 1) if self._holds_stop(ids[:t]))
            row.searched = end
        return cut

    def _holds_stop(self, ids):
        text = self.text(ids)
        return any(stop in text for stop in self.sampling.stop)

    def _ids(self, numbers):
        return upload(torch.tensor(numbers), self.device)


def _refuse_unsupported(config):
    """Raises `UserError` for what would not decode, or wrongly."""
    if config.model_type not in FAMILIES:
        raise UserError(f"rollouts know no {config.model_type!r} model; supported families: {', '.join(FAMILIES)}")
    if part := unsupported(config):
        raise UserError(f"the model has {part}, which rollouts do not support")
    if bad := sorted(rope_types(config) & {"dynamic", "longrope"}):
        raise UserError(f"RoPE of type {bad[0]!r} depends on the longest row of a batch, which rollouts do not support")
