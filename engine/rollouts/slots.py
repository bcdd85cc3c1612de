"""Slots: the rows of a rollout on the device, in fixed buffers, and the two forwards that fill them.

Every tensor a decode step reads or writes is made once, so that the step can be recorded as a CUDA graph; on a CPU the
same step runs as it stands. Rows that have ended stay harmless until the host takes them out: they decode on, but
write to a column that nobody reads.
Axes: S slots, M slots [0, M) of a step, N rows placed at once, P prompts, T tokens, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rollouts.cache import SlotCache
from engine.rollouts.graphs import Graphs
from engine.rollouts.sampling import Sampling, sample
from engine.streams import upload
from kernels.head import unrounded
from kernels.products import round_up


@dataclass(frozen=True)
class Prefill:
    """P prompts after their forward: keys and values of each layer, [P, K, T, D], and the logits that follow."""

    layers: list[tuple[Tensor, Tensor]]
    logits_PV: Tensor
    length_P: Tensor


class Slots:
    """`cache.num_slots` rows of at most `max_new` tokens below `vocabulary`, decoded by `lm` until one of `eos_ids`."""

    def __init__(self, lm, cache: SlotCache, max_new: int, eos_ids: Iterable[int], vocabulary: int | None = None):
        self.lm, self.cache, self.max_new, self.vocabulary = lm, cache, max_new, vocabulary
        device, count = cache.slot_S.device, cache.num_slots
        self.is_eos_V = torch.zeros(lm.lm_head.weight.shape[0], dtype=torch.bool, device=device)
        self.is_eos_V[list(eos_ids)] = True
        self.next_S = torch.zeros(count, dtype=torch.int64, device=device)  # token drawn last, not in the cache yet
        self.taken_S, self.limit_S = torch.zeros_like(self.next_S), torch.zeros_like(self.next_S)
        self.live_S = torch.zeros(count, dtype=torch.bool, device=device)
        self.noise_ST = torch.zeros(count, max_new, dtype=torch.float64, device=device)
        self.ids_ST = torch.zeros(count, max_new + 1, dtype=torch.int64, device=device)  # column max_new: of the ended
        self.logp_ST = torch.zeros(self.ids_ST.shape, device=device)
        self.graphs = Graphs(device)

    def start(self) -> None:
        """Empties all slots."""
        self.live_S.zero_()
        self.cache.length_S.zero_()

    def prefill_width(self, prompts: list[list[int]]) -> int:
        """Columns of a forward over `prompts`: whole tiles, as many as a slot has."""
        return min(round_up(max(map(len, prompts))), self.cache.columns)

    def prefill(self, prompts: list[list[int]], pad_id: int) -> Prefill:
        """One forward over `prompts`, padded on the right: no real token looks at the padding."""
        device, width = self.next_S.device, self.prefill_width(prompts)
        ids_PT = upload(torch.tensor([prompt + [pad_id] * (width - len(prompt)) for prompt in prompts]), device)
        length_P = upload(torch.tensor([len(prompt) for prompt in prompts]), device)
        self.cache.staged = layers = []
        try:
            hidden_PTD = self._forward(ids_PT, torch.arange(width, device=device)[None])
        finally:
            self.cache.staged = None
        last_PD = hidden_PTD[torch.arange(len(prompts), device=device), length_P - 1]
        return Prefill(layers, self.logits(last_PD), length_P)

    def place(self, prefill: Prefill, prompt_N: Tensor, slot_N: Tensor, limit_N: Tensor, noise_NT: Tensor, sampling):
        """Starts rows in `slot_N` behind the prompts `prompt_N`, at most `limit_N` tokens each, and draws the first."""
        self.cache.fill(prefill.layers, prompt_N, slot_N, prefill.length_P[prompt_N])
        self.taken_S.index_fill_(0, slot_N, 0)  # a number put through an index would be copied, and waited for
        self.live_S.index_fill_(0, slot_N, True)
        self.limit_S[slot_N] = limit_N
        self.noise_ST[slot_N, : noise_NT.shape[1]] = noise_NT
        self._take(prefill.logits_PV[prompt_N], slot_N, sampling)

    def decode(self, rows: int, sampling: Sampling) -> None:
        """One more token for slots [0, rows); `record` was called for them on a GPU."""
        self.graphs.run(self._decode, rows, sampling.drawing)

    def record(self, rows: int, sampling: Sampling) -> None:
        """Makes the graph that `decode` launches, while all slots are empty; nothing on a CPU."""
        self.graphs.record(self._decode, rows, sampling.drawing)

    def _decode(self, rows, sampling):
        hidden_M1D = self._forward(self.next_S[:rows, None], self.cache.length_S[:rows, None])
        self.cache.length_S[:rows].add_(self.live_S[:rows])  # += would copy the slice onto itself
        self._take(self.logits(hidden_M1D[:, 0]), self.cache.slot_S[:rows], sampling)

    def _forward(self, ids, positions):
        return self.lm.model(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, slots=self.cache
        ).last_hidden_state

    def logits(self, hidden_ND):
        """[N, V] as the model's head makes them, but unrounded where torch can: bf16 rounds a logit of 30 by 0.06."""
        head, dtype = self.lm.lm_head, unrounded(hidden_ND)
        if dtype == hidden_ND.dtype:
            return head(hidden_ND)
        logits_NV = torch.mm(hidden_ND, head.weight.T, out_dtype=dtype)
        return logits_NV if head.bias is None else logits_NV + head.bias

    def _take(self, logits_NV, slot_N, sampling):
        """Draws a token for each row and notes whether the row has ended."""
        taken_N, live_N = self.taken_S[slot_N], self.live_S[slot_N]
        column_N = taken_N.masked_fill(~live_N, self.max_new)
        uniform_N = self.noise_ST[slot_N, taken_N.clamp(max=self.max_new - 1)]
        ids_N, logp_N = sample(logits_NV, sampling, uniform_N, self.vocabulary)
        self.ids_ST[slot_N, column_N], self.logp_ST[slot_N, column_N] = ids_N, logp_N
        self.next_S[slot_N] = ids_N
        taken_N = taken_N + live_N
        self.taken_S[slot_N] = taken_N
        self.live_S[slot_N] = live_N & ~self.is_eos_V[ids_N] & (taken_N < self.limit_S[slot_N])

    def look(self, rows: int) -> tuple[list[bool], list[int]]:
        """(still live, tokens taken) of slots [0, rows); waits for the device."""
        live_M, taken_M = torch.stack([self.live_S[:rows].long(), self.taken_S[:rows]]).cpu().tolist()
        return live_M, taken_M

    def read(self, slot_N: Tensor, width: int) -> tuple[list, list]:
        """(ids, logp) of the first `width` tokens of each slot."""
        columns = [x_ST[slot_N, :width].double() for x_ST in (self.ids_ST, self.logp_ST)]
        ids_NT, logp_NT = torch.stack(columns).cpu()  # in one piece: exact, ids are below 2**53
        return ids_NT.long().tolist(), logp_NT.tolist()

    def move(self, from_N: Tensor, to_N: Tensor, width: int) -> None:
        """Moves rows of at most `width` columns to other slots."""
        self.cache.move(from_N, to_N, width)
        slots = self.next_S, self.taken_S, self.limit_S, self.live_S, self.noise_ST, self.ids_ST, self.logp_ST
        for x in slots:
            x[to_N] = x[from_N]


def attend(module, query, key, value, mask, scaling: float, *, slots: SlotCache, sliding_window=None, **kwargs):
    """The attention function of transformers' layers during a rollout; `mask` is None."""
    return slots.attend(query, key, value, scaling, sliding_window), None
