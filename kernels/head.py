"""The matrix products of the head, chunk by chunk: logits, and what their gradient gives to hidden, weight and bias.

  logits = h W^T + b;  dh = dlogits W;  dW = dlogits^T h;  db = sum dlogits
Products run in the inputs' dtype with fp32 accumulation inside; dW and db add up over chunks in fp32 and are rounded
once. N rows, M rows kept, C rows of a chunk, V vocabulary, D hidden. Oracle: torch.nn.functional.linear.
"""

import torch

SLAB_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Memory for one chunk of logits, by device type: thousands of rows, so that reading W twice a chunk costs little."""


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
    """One pass over kept rows: `chunks()` yields logits, `add_gradient` takes them back as gradients.

    hidden_ND, weight_VD, bias_V (or None) of one dtype; rows_M int64 on their device, or None for all;
    live_M bool, or None: hidden rows read as 0 where False. needs: three bools, gradients wanted of each.
    dhidden_dtype: the inputs', or `unrounded`.
    """

    def __init__(self, hidden_ND, weight_VD, bias_V, rows_M, live_M, accurate, needs, dhidden_dtype=None):
        self.hidden_ND, self.weight_VD, self.bias_V, self.rows_M, self.live_M = (
            hidden_ND, weight_VD, bias_V, rows_M, live_M,
        )  # fmt: skip
        V, D = weight_VD.shape
        M = hidden_ND.shape[0] if rows_M is None else rows_M.shape[0]
        dtype, device = hidden_ND.dtype, hidden_ND.device
        self.logits_dtype = wide(dtype) if accurate else dtype
        self.rounds = self.logits_dtype != wide(dtype)
        self.budget = SLAB_BYTES[device.type]
        self.spans = spans(M, V * self.logits_dtype.itemsize, self.budget)
        self.chunk_size = self.spans[0].stop if M else 0
        self.dhidden_ND = self.dweight_VD = self.dbias_V = None
        sum_dtype = dtype if len(self.spans) == 1 else wide(dtype)
        if needs[0]:
            alloc = torch.empty_like if rows_M is None else torch.zeros_like
            self.dhidden_ND = alloc(hidden_ND, dtype=dhidden_dtype)
        if needs[1]:
            alloc = torch.empty if self.spans else torch.zeros
            self.dweight_VD = alloc(V, D, dtype=sum_dtype, device=device)
        if needs[2]:
            self.dbias_V = torch.zeros(V, dtype=wide(dtype), device=device)

    def chunks(self):
        """-> (slice of kept rows, h_CD, logits_CV in a slab that the next chunk overwrites)."""
        slab_CV = self.hidden_ND.new_empty(self.chunk_size, self.weight_VD.shape[0], dtype=self.logits_dtype)
        for span in self.spans:
            h_CD = self.hidden_ND[span] if self.rows_M is None else self.hidden_ND[self.rows_M[span]]
            if self.live_M is not None:
                h_CD = torch.where(self.live_M[span, None], h_CD, 0.0)
            yield span, h_CD, self._logits(h_CD, slab_CV[: span.stop - span.start])

    def _logits(self, h_CD, out_CV):
        w_VD, b_V = self.weight_VD, self.bias_V
        if self.logits_dtype == h_CD.dtype:
            return torch.mm(h_CD, w_VD.T, out=out_CV) if b_V is None else torch.addmm(b_V, h_CD, w_VD.T, out=out_CV)
        if h_CD.is_cuda:
            torch.mm(h_CD, w_VD.T, out_dtype=self.logits_dtype, out=out_CV)
        else:  # no out_dtype on a CPU: widen a slice of W at a time
            for v in spans(w_VD.shape[0], w_VD.shape[1] * 4, self.budget // 8):
                out_CV[:, v] = h_CD.float() @ w_VD[v].float().T
        return out_CV if b_V is None else out_CV.add_(b_V)

    def add_gradient(self, span, h_CD, dlogits_CV):
        if self.dbias_V is not None:
            self.dbias_V += dlogits_CV.sum(0, dtype=self.dbias_V.dtype)
        dlogits_CV = dlogits_CV.to(h_CD.dtype)
        if self.dhidden_ND is not None:
            if self.rows_M is None:
                self._dhidden(dlogits_CV, self.dhidden_ND[span])
            else:
                dh_CD = torch.empty_like(h_CD, dtype=self.dhidden_ND.dtype)
                self.dhidden_ND.index_copy_(0, self.rows_M[span], self._dhidden(dlogits_CV, dh_CD))
        if self.dweight_VD is not None:
            self._add_dweight(span.start > 0, h_CD, dlogits_CV)

    def _dhidden(self, dlogits_CV, out_CD):
        if out_CD.dtype == dlogits_CV.dtype:
            return torch.mm(dlogits_CV, self.weight_VD, out=out_CD)
        return torch.mm(dlogits_CV, self.weight_VD, out_dtype=out_CD.dtype, out=out_CD)

    def _add_dweight(self, keep, h_CD, dlogits_CV):
        """dweight_VD = keep * dweight_VD + dlogits^T h."""
        sums = self.dweight_VD
        if sums.dtype == h_CD.dtype:
            torch.addmm(sums, dlogits_CV.T, h_CD, beta=int(keep), out=sums)
        elif h_CD.is_cuda:
            torch.addmm(sums, dlogits_CV.T, h_CD, out_dtype=sums.dtype, beta=int(keep), out=sums)
        else:  # no out_dtype on a CPU: a slice of the product at a time
            for v in spans(*sums.shape[:1], sums.shape[1] * 4, self.budget // 4):
                product = torch.mm(dlogits_CV[:, v].T, h_CD)
                sums[v] = sums[v] + product if keep else product

    def gradients(self):
        """-> dhidden_ND, dweight_VD, dbias_V in the inputs' dtype; None where not wanted."""
        dtype = self.hidden_ND.dtype
        return tuple(x if x is None else x.to(dtype) for x in (self.dhidden_ND, self.dweight_VD, self.dbias_V))
