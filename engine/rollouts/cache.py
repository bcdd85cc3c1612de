"""The KV cache of a rollout: fixed buffers, one slot per row that is decoded, and the attention that reads them.

RoPE is applied before a key gets here; the key of a row's token t stands in column t of its slot, in every layer:
where a layer has a window, what lies before it stays, unread. It is duck-typed as the cache that transformers' decoder
layers write to, and `attend` as the attention function they call.
Axes: S slots, M rows = slots [0, M), N rows of a prefill, H query heads, K key/value heads, L columns, T tokens of a
prompt, D size of a head.
"""

import torch

from engine.attention import narrowed, sdpa
from engine.model import head_size


class SlotCache:
    """`columns` keys and values for each of `slots` rows and each layer of a transformers `config`.

    ops: kernels.chunked or kernels.fused, for the attention of one query token.
    """

    is_compileable = False

    def __init__(self, config, slots: int, columns: int, dtype: torch.dtype, device: torch.device, ops):
        shape = (slots, config.num_key_value_heads, columns, head_size(config))
        self.num_slots, self.columns, self.ops = slots, columns, ops
        self.layers_SKLD = [
            tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]
        self.slot_S = torch.arange(slots, device=device)
        self.length_S = torch.zeros(slots, dtype=torch.int64, device=device)  # columns filled
        self.staged: list | None = None  # a prefill collects its layers here

    def update(self, key, value, layer_idx: int, *args, **kwargs):
        """Called by a decoder layer: keeps a prefill's [N, K, T, D] aside, writes a decoded token's [M, K, 1, D]."""
        if self.staged is not None:
            self.staged.append((key, value))
            return key, value
        keys_SKLD, values_SKLD = self.layers_SKLD[layer_idx]
        rows = len(key)
        column_M = self.length_S[:rows]
        keys_SKLD[self.slot_S[:rows], :, column_M] = key[:, :, 0]
        values_SKLD[self.slot_S[:rows], :, column_M] = value[:, :, 0]
        return keys_SKLD, values_SKLD

    def attend(self, query, key, value, scale: float, window: int | None = None):
        """[M, H, T, D] -> [M, T, H, D]: causal among the tokens of a prefill, over its slot for a decoded token; the
        last `window` keys alone, where there is one."""
        if self.staged is not None:
            mask = narrowed(None, window, query.shape[2], query.device)
            return sdpa(query, key, value, mask, scale).transpose(1, 2)
        length_M = self.length_S[: len(query)] + 1
        return self.ops.decode_attention(query[:, :, 0], key, value, length_M, scale=scale, window=window)[:, None]

    def fill(self, staged: list, row_N: torch.Tensor, slot_N: torch.Tensor, length_N: torch.Tensor) -> None:
        """Copies prefilled rows `row_N` into `slot_N`; their prompts have `length_N` tokens, all int64 [N]."""
        for (keys_SKLD, values_SKLD), (key, value) in zip(self.layers_SKLD, staged, strict=True):
            width = key.shape[2]
            keys_SKLD[slot_N, :, :width] = key[row_N]
            values_SKLD[slot_N, :, :width] = value[row_N]
        self.length_S[slot_N] = length_N

    def move(self, from_N: torch.Tensor, to_N: torch.Tensor, width: int) -> None:
        """Moves rows between slots, their first `width` columns."""
        for layer in self.layers_SKLD:
            for x_SKLD in layer:
                x_SKLD[to_N, :, :width] = x_SKLD[from_N, :, :width]
        self.length_S[to_N] = self.length_S[from_N]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given


def slot_bytes(config, columns: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one row."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * columns * head_size(config) * dtype.itemsize
