"""The KV cache of one wave in fixed buffers, duck-typed as the cache that transformers' decoder layers write to.

Columns [0, width) hold the prompts, padded on the right; column width + t holds token t of every row's answer. RoPE
is applied before a key gets here, so a key's column need not be its position: `position_N` carries the position, and
`mask_N11S` hides the padding between a row's prompt and its answer.
Axes: P prompts, N rows, H key/value heads, S columns, T prompt tokens, D size of a head.
"""

import torch


class KVCache:
    """Prefilled with P prompts, decoded with N rows; row n starts from prompt `group_N[n]`.

    group_N, length_P: int64 [N], [P]; width: the longest prompt; max_new: most tokens a row will get.
    `dtype` is that of the model. Buffers are made in the first pass through each layer, [N, H, S, D] each.
    """

    is_compileable = False

    def __init__(self, group_N, length_P, width: int, max_new: int, dtype: torch.dtype):
        self.group_N, self.length = group_N, 0
        self.position_N = length_P[group_N]
        self.size = -(-(width + max_new) // 16) * 16  # a multiple of 16, or CUDA's masked attention copies the mask
        column_S = torch.arange(self.size, device=group_N.device)
        padding_NS = (column_S >= self.position_N[:, None]) & (column_S < width)
        mask_NS = torch.zeros(padding_NS.shape, dtype=dtype, device=group_N.device)
        self.mask_N11S = mask_NS.masked_fill_(padding_NS, -torch.inf)[:, None, None]
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key, value, layer_idx: int, *args, **kwargs):
        """Stores a layer's keys and values and returns those to attend to.

        Prefill: [P, H, T, D], spread over the rows and returned as they came. Decode: [N, H, 1, D], written to
        column `length`; returns all columns up to it.
        """
        if self.length == 0:
            self.layers.append((self._spread(key), self._spread(value)))
            return key, value
        keys, values = self.layers[layer_idx]
        keys[:, :, self.length] = key[:, :, 0]
        values[:, :, self.length] = value[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def _spread(self, x_PHTD):
        _, heads, width, head_size = x_PHTD.shape
        x_NHSD = x_PHTD.new_empty(len(self.group_N), heads, self.size, head_size)
        x_NHSD[:, :, :width] = x_PHTD[self.group_N]
        return x_NHSD

    def mask(self):
        """The additive mask of the next decoded token, [N, 1, 1, columns], that token's own column included."""
        return self.mask_N11S[..., : self.length + 1]

    def advance(self, num_columns: int):
        """Counts what a whole forward has written. The first call ends the prefill and moves no position."""
        if self.length:
            self.position_N = self.position_N + num_columns
        self.length += num_columns

    def keep(self, keep_N):
        """Drops all rows but `keep_N` (int64, ascending), inside the same buffers."""
        rows = len(keep_N)
        for index, layer in enumerate(self.layers):
            for x_NHSD in layer:
                x_NHSD[:rows, :, : self.length] = x_NHSD[keep_N, :, : self.length]
            self.layers[index] = tuple(x_NHSD[:rows] for x_NHSD in layer)
        self.position_N, self.mask_N11S = self.position_N[keep_N], self.mask_N11S[keep_N]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0
