"""Batched generation with a transformers causal LM and our own KV cache, on one device, without any collective.

A prompt is prefilled once and its KV spread over its G samples; all rows then decode together, and the batch shrinks
as they finish. What has finished is looked at every few tokens only, so rows may run past their end: a completion is
cut at its first EOS, or at the first token that completed a stop string, and what came after is never seen.
Axes: P prompts, G samples, N rows of a wave, M rows of it still decoded, T tokens of an answer, V vocabulary.
Oracles: `generate` of transformers for greedy tokens, a plain forward for the log-probabilities.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.errors import UserError
from engine.rollouts.cache import KVCache
from engine.rollouts.sampling import Sampling, philox_uniform, sample

_POLL = 8  # tokens between two looks at what has finished, where a look costs: a device sync, or text to decode
_COMPACT_BELOW = 0.75  # share of live rows under which copying their KV is cheaper than carrying the others


@dataclass(frozen=True)
class Completion:
    """One sampled answer; its lists have one entry per token.

    ids end with the EOS, or with the token that completed a stop string, where one of them ended it. logp is under
    the whole distribution at the temperature, logp_sampled under the one drawn from (they differ with top-p, top-k).
    """

    ids: list[int]
    logp: list[float]
    logp_sampled: list[float]
    finish: str  # "eos", "stop" or "length"


class NativeRollout:
    """Samples from `model`, a Qwen2, Qwen3 or Llama of transformers in eval mode, without FSDP hooks.

    The model is used as it stands at each call: its weights may be refreshed in place in between.
    eos_ids: every id that ends a completion. pad_id: any id of the vocabulary, EOS or not: lengths are counted.
    decode: ids -> text, for stop strings. max_batch: most rows decoded at once; more run in waves.
    should_stop: asked after each token; when it says yes, the call raises InterruptedError.
    Raises `UserError` for a value out of range and for a model that it would decode wrongly.
    """

    def __init__(
        self,
        model,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        decode: Callable[[list[int]], str] | None = None,
        max_batch: int | None = None,
        should_stop: Callable[[], bool] | None = None,
    ):
        _refuse_unsupported(model.config)
        vocab_size = model.lm_head.weight.shape[0]
        for name, token in [("pad_id", pad_id), *(("eos_ids", token) for token in eos_ids)]:
            if not 0 <= token < vocab_size:
                raise UserError(f"{name} has {token}, which is outside the model's vocabulary of {vocab_size}")
        if max_batch is not None and max_batch < 1:
            raise UserError(f"max_batch is {max_batch}; it must be at least 1, or None for no limit")
        self.model, self.eos_ids, self.pad_id = model, frozenset(eos_ids), pad_id
        self.decode, self.max_batch, self.should_stop = decode, max_batch, should_stop

    @torch.inference_mode()
    def __call__(
        self,
        prompts: list[list[int]],
        *,
        num_samples: int,
        sampling: Sampling,
        seed: int,
        requests: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Returns completions [P][G]. Sample g of prompt p is request `requests[p] + g` (`p * num_samples + g` by
        default): its tokens depend on the weights, its prompt, `sampling`, `seed` and that number, not on what shares
        the batch.

        Raises ValueError for an empty prompt or num_samples below 1, `UserError` for stop strings without `decode`,
        FloatingPointError when the model gives probabilities that are not finite.
        """
        assert not self.model.training, "dropout would falsify the log-probabilities: call model.eval()"
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        for p, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {p} has no tokens")
        if sampling.stop and self.decode is None:
            raise UserError(f"stop is {sampling.stop!r}, but stop strings need a tokenizer: pass decode")
        total = len(prompts) * num_samples
        first_P = range(0, total, num_samples) if requests is None else requests
        size = self.max_batch or max(total, 1)
        if size > num_samples:
            size -= size % num_samples  # whole groups, so that no prompt is prefilled twice
        done: list[Completion] = []
        for start in range(0, total, size):
            rows = range(start, min(start + size, total))
            first, last = rows[0] // num_samples, rows[-1] // num_samples
            groups = [row // num_samples - first for row in rows]
            numbers = [first_P[row // num_samples] + row % num_samples for row in rows]
            done += self._wave(prompts[first : last + 1], groups, numbers, sampling, seed)
        return [done[start : start + num_samples] for start in range(0, total, num_samples)]

    def _wave(self, prompts, groups, requests, sampling, seed):
        """The completions of N rows: row n continues `prompts[groups[n]]` with the noise of `requests[n]`."""
        weight, max_new = self.model.lm_head.weight, sampling.max_new_tokens
        device = weight.device
        length_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
        group_N = torch.tensor(groups, device=device)
        cache = KVCache(group_N, length_P, max(map(len, prompts)), max_new, weight.dtype)
        taken = _Taken(len(groups), sampling, self.eos_ids, self.decode, weight)
        positions_T1 = torch.arange(max_new, device=device)[:, None]
        noise_TN = philox_uniform(seed, torch.tensor(requests, device=device), positions_T1)
        poll = 1 if device.type == "cpu" and not sampling.stop else _POLL

        logits_MV = self._prefill(prompts, length_P, cache)[group_N]
        for step in range(max_new):
            if step:
                logits_MV = self._decode(ids_M, cache)  # noqa: F821 - bound by the step before
            ids_M, logp_M, logp_sampled_M = sample(logits_MV, sampling, noise_TN[step, taken.row_M])
            taken.add(ids_M, logp_M, logp_sampled_M)
            if self.should_stop is not None and self.should_stop():
                raise InterruptedError("a signal asked for the end of the rollout")
            if taken.num_tokens % poll == 0:
                live_M = taken.look()
                num_live = int(live_M.sum())
                if num_live == 0:
                    break
                if num_live < _COMPACT_BELOW * len(live_M):
                    keep_M = live_M.nonzero()[:, 0]
                    ids_M = ids_M[keep_M]
                    cache.keep(keep_M)
                    taken.keep(keep_M)
        return taken.completions()

    def _prefill(self, prompts, length_P, cache):
        """The logits [P, V] after each prompt. Padding on the right needs no mask: no real token looks at it."""
        width = max(map(len, prompts))
        ids_PT = torch.tensor([prompt + [self.pad_id] * (width - len(prompt)) for prompt in prompts])
        positions_1T = torch.arange(width, device=length_P.device)[None]
        hidden_PTD = self._forward(ids_PT.to(length_P.device), positions_1T, None, cache)
        return self.model.lm_head(hidden_PTD[torch.arange(len(prompts), device=length_P.device), length_P - 1])

    def _decode(self, ids_M, cache):
        """The logits [M, V] after one more token per row."""
        hidden_M1D = self._forward(ids_M[:, None], cache.position_N[:, None], cache.mask(), cache)
        return self.model.lm_head(hidden_M1D[:, 0])

    def _forward(self, ids, positions, mask, cache):
        hidden = self.model.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        cache.advance(ids.shape[1])
        return hidden


class _Taken:
    """The tokens taken so far by N rows, M of which are still decoded, and which of those have ended."""

    def __init__(self, num_rows, sampling, eos_ids, decode, weight):
        shape, device = (sampling.max_new_tokens, num_rows), weight.device
        self.stop, self.eos_ids, self.decode = sampling.stop, eos_ids, decode
        self.is_eos_V = torch.zeros(weight.shape[0], dtype=torch.bool, device=device)
        self.is_eos_V[list(eos_ids)] = True
        self.ids_TN = torch.zeros(shape, dtype=torch.long, device=device)
        self.logp_TN = torch.zeros(shape, device=device)
        self.logp_sampled_TN = torch.zeros(shape, device=device) if sampling.filtered else self.logp_TN
        self.row_M = torch.arange(num_rows, device=device)
        self.live_M = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.num_tokens = self.num_seen = 0
        self.stopped: dict[int, int] = {}  # row -> length, where a stop string ended it

    def add(self, ids_M, logp_M, logp_sampled_M):
        self.ids_TN[self.num_tokens].index_copy_(0, self.row_M, ids_M)
        self.logp_TN[self.num_tokens].index_copy_(0, self.row_M, logp_M)
        if self.logp_sampled_TN is not self.logp_TN:
            self.logp_sampled_TN[self.num_tokens].index_copy_(0, self.row_M, logp_sampled_M)
        self.num_tokens += 1

    def look(self):
        """Which of the M rows go on, bool [M], after the tokens since the last look."""
        if self.stop:
            self._find_stops()
        self.live_M &= ~self.is_eos_V[self.ids_TN[self.num_seen : self.num_tokens, self.row_M]].any(0)
        self.num_seen = self.num_tokens
        return self.live_M

    def _find_stops(self):
        """Text is searched whole, then token by token where it holds a stop string: exact however tokens spell it."""
        live_M, row_M = self.live_M.tolist(), self.row_M.tolist()
        for m, ids in enumerate(self.ids_TN[: self.num_tokens, self.row_M].t().tolist()):
            if not live_M[m]:
                continue
            end = next((t for t in range(self.num_seen, len(ids)) if ids[t] in self.eos_ids), len(ids))
            if self._holds_stop(ids[:end]):
                ends = range(self.num_seen + 1, end + 1)
                self.stopped[row_M[m]] = next(t for t in ends if self._holds_stop(ids[:t]))
                live_M[m] = False
        self.live_M = torch.tensor(live_M, device=self.live_M.device)

    def _holds_stop(self, ids):
        text = self.decode(ids)
        return any(stop in text for stop in self.stop)

    def keep(self, keep_M):
        self.row_M, self.live_M = self.row_M[keep_M], self.live_M[keep_M]

    def completions(self):
        """One `Completion` per row, N of them, on the host."""
        if self.num_seen < self.num_tokens:
            self.look()
        if not self.logp_TN.isfinite().all():
            raise FloatingPointError("the model gives log-probabilities that are not finite; look at its weights")
        eos_TN = self.is_eos_V[self.ids_TN]
        has_eos, first_eos = eos_TN.any(0).tolist(), eos_TN.int().argmax(0).tolist()
        columns = (self.ids_TN, self.logp_TN, self.logp_sampled_TN)
        done = []
        for n, lists in enumerate(zip(*(column.t().tolist() for column in columns), strict=True)):
            if n in self.stopped:
                length, finish = self.stopped[n], "stop"
            elif has_eos[n]:
                length, finish = first_eos[n] + 1, "eos"
            else:
                length, finish = self.ids_TN.shape[0], "length"
            done.append(Completion(*(values[:length] for values in lists), finish))
        return done


def _refuse_unsupported(config):
    """Raises `UserError` for what would decode, but wrongly."""
    if (attention := config._attn_implementation) not in ("sdpa", "eager"):
        raise UserError(f"attention {attention!r} takes no mask of ours; load the model with 'sdpa' or 'eager'")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise UserError("the model has sliding-window layers, which rollouts do not support; use_sliding_window: false")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UserError(f"RoPE of type {rope!r} depends on the longest row of a batch, which rollouts do not support")
