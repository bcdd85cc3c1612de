"""The matrix products of the head, chunk by chunk: logits, and what their gradient gives to hidden, weight and bias.

  logits = h W^T + b;  dh = dlogits W;  dW = dlogits^T h;  db = sum dlogits
Products run in the inputs' dtype with fp32 accumulation inside; dW and db add up over chunks in fp32 and are rounded
once. M rows, C rows of a chunk, R those and zeros up to a whole tile (on a CPU), V vocabulary, D hidden.
Oracle: torch.nn.functional.linear.
"""

import torch
import torch.nn.functional as F

from .products import TILE, product, round_up

SLAB_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Memory for one chunk of logits, by device type: thousands of rows, so that reading W twice a chunk costs little."""
SLICE_BYTES = 8 << 20
"""Of a slice of the vocabulary on a CPU, its logits and weight together: what stays in a cache."""


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def unrounded(x):
    """The dtype of a product of matrices like x before it is rounded, where torch can write that: on CUDA."""
    return wide(x.dtype) if x.is_cuda else x.dtype


def spans(N, row_bytes, budget):
    """Slices of [0, N) whose rows fit the budget, as even as can be; long ones are whole tiles of 128."""
    most = max(1, budget // max(1, row_bytes))
    step = -(-N // max(1, -(-N // most)))
    if most >= 128 < step:
        step = min(step + -step % 128, most - most % 128)
    return [slice(start, min(start + step, N)) for start in range(0, N, step)] if N else []


class Head:
    """One pass over rows: `chunks()` yields logits, `add_gradient` takes them back as gradients.

    hidden_MD, weight_VD, bias_V (or None) of one dtype; live_M bool, or None: hidden rows read as 0 where False.
    needs: three bools, gradients wanted of each.
    dhidden_dtype: the inputs', or `unrounded`.
    """

    def __init__(self, hidden_MD, weight_VD, bias_V, live_M, accurate, needs, dhidden_dtype=None):
        self.hidden_MD, self.weight_VD, self.live_M = hidden_MD, weight_VD, live_M
        # One with gaps sends cuBLAS another way, to other bits.
        self.bias_V = None if bias_V is None else bias_V.contiguous()
        M, (V, D) = len(hidden_MD), weight_VD.shape
        dtype, device = hidden_MD.dtype, hidden_MD.device
        self.logits_dtype = wide(dtype) if accurate else dtype
        self.rounds = self.logits_dtype != wide(dtype)
        self.budget = SLAB_BYTES[device.type]
        self.spans = spans(M, V * self.logits_dtype.itemsize, self.budget)
        self.chunk_size = self.spans[0].stop if M else 0
        self.dhidden_MD = self.dweight_VD = self.dbias_V = None
        sum_dtype = dtype if len(self.spans) == 1 else wide(dtype)
        if needs[0]:
            self.dhidden_MD = torch.empty_like(hidden_MD, dtype=dhidden_dtype)
        if needs[1]:
            alloc = torch.empty if self.spans else torch.zeros
            self.dweight_VD = alloc(V, D, dtype=sum_dtype, device=device)
        if needs[2]:
            self.dbias_V = torch.zeros(V, dtype=wide(dtype), device=device)

    def chunks(self):
        """-> (slice of rows, h_CD, logits_CV in a slab that the next chunk overwrites)."""
        tile = 1 if self.hidden_MD.is_cuda else TILE
        slab_RV = self.hidden_MD.new_empty(
            round_up(self.chunk_size, tile), self.weight_VD.shape[0], dtype=self.logits_dtype
        )
        for span in self.spans:
            h_CD = self.hidden_MD[span]
            if self.live_M is not None:
                h_CD = torch.where(self.live_M[span, None], h_CD, 0.0)
            h_RD = F.pad(h_CD, (0, 0, 0, -len(h_CD) % tile)) if len(h_CD) % tile else h_CD
            self.chunk = h_RD, slab_RV[: len(h_RD)]
            self._make_logits(*self.chunk)
            yield span, h_CD, slab_RV[: len(h_CD)]

    def _make_logits(self, h_RD, out_RV):
        w_VD, b_V, dtype = self.weight_VD, self.bias_V, self.logits_dtype
        if not h_RD.is_cuda:
            h_RD = h_RD.to(dtype)
            for v in self._slices(h_RD):
                out_RV[:, v] = product(h_RD, w_VD[v].to(dtype).T, None if b_V is None else b_V[v].to(dtype))
        elif dtype != h_RD.dtype:
            torch.mm(h_RD, w_VD.T, out_dtype=dtype, out=out_RV)
            if b_V is not None:
                out_RV.add_(b_V)
        elif b_V is None:
            torch.mm(h_RD, w_VD.T, out=out_RV)
        else:
            torch.addmm(b_V, h_RD, w_VD.T, out=out_RV)

    def _slices(self, h_RD):
        """Slices of the vocabulary on a CPU, where a product has memory of its own and is copied while in cache."""
        row_bytes = sum(h_RD.shape) * 4
        return spans(self.weight_VD.shape[0], row_bytes, max(SLICE_BYTES, 128 * row_bytes))

    def add_gradient(self, span):
        """Adds what the gradient of the chunk's logits, written over them, gives to the inputs."""
        h_RD, dlogits_RV = self.chunk
        C = span.stop - span.start
        dlogits_RV[C:] = 0.0
        if self.dbias_V is not None:
            self.dbias_V += dlogits_RV[:C].sum(0, dtype=self.dbias_V.dtype)
        dlogits_RV = dlogits_RV.to(h_RD.dtype)
        if self.dhidden_MD is not None:
            self._dhidden(dlogits_RV, self.dhidden_MD[span])
        if self.dweight_VD is not None:
            self._add_dweight(span.start > 0, h_RD, dlogits_RV)

    def _dhidden(self, dlogits_RV, out_CD):
        if not out_CD.is_cuda:
            out_CD.copy_(product(dlogits_RV, self.weight_VD)[: len(out_CD)])
        elif out_CD.dtype == dlogits_RV.dtype:
            torch.mm(dlogits_RV, self.weight_VD, out=out_CD)
        else:
            torch.mm(dlogits_RV, self.weight_VD, out_dtype=out_CD.dtype, out=out_CD)

    def _add_dweight(self, keep, h_RD, dlogits_RV):
        """dweight_VD = keep * dweight_VD + dlogits^T h."""
        sums = self.dweight_VD
        if not h_RD.is_cuda:
            for v in self._slices(h_RD):
                part = product(dlogits_RV[:, v].T, h_RD)
                sums[v] = sums[v] + part if keep else part
        elif sums.dtype == h_RD.dtype:
            torch.addmm(sums, dlogits_RV.T, h_RD, beta=int(keep), out=sums)
        else:
            torch.addmm(sums, dlogits_RV.T, h_RD, out_dtype=sums.dtype, beta=int(keep), out=sums)

    def gradients(self):
        """-> dhidden_MD, dweight_VD, dbias_V in the inputs' dtype; None where not wanted."""
        self.chunk = None  # the slab goes before the weight's gradient is rounded into a second copy
        dtype = self.hidden_MD.dtype
        return tuple(x if x is None else x.to(dtype) for x in (self.dhidden_MD, self.dweight_VD, self.dbias_V))
