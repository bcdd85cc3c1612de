"""The k likeliest tokens of each row and their log-probabilities, from hidden states and a head: no gradient."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import chunked, eager

from . import heads
from .harness import Benchmark, Rival, Work, compiled


class Size(NamedTuple):
    """Rows, hidden size, vocabulary, tokens of a row."""

    N: int
    D: int
    V: int
    K: int


SIZES = {
    "small": [Size(64, 32, 5000, 8)],
    "first": [Size(16384, 2048, 151936, 64)],
    "cpu": [Size(256, 896, 151936, K) for K in (32, 128)],
    "cuda": [Size(16384, 2048, 151936, 32), Size(16384, 2048, 151936, 128)],
}


def make_inputs(size, dtype, device):
    """hidden_ND, weight_VD, and ids_K, which says no more than how many."""
    *size, K = size
    inputs = {name: x.detach() for name, x in heads.make_inputs(size, dtype, device).items() if name in heads.LEAVES}
    return inputs | {"ids_K": torch.arange(K, device=device)}


def truth(inputs, task):
    weight_VD, K = inputs["weight_VD"].double(), len(inputs["ids_K"])
    blocks = inputs["hidden_ND"].split(len(heads.row_blocks(len(inputs["hidden_ND"]), len(weight_VD))[0]))
    return {"logp_NK": torch.cat([eager.linear_topk(h_CD.double(), weight_VD, K)[0] for h_CD in blocks])}


def count_work(size, itemsize, task):
    """One product; hidden states and weight read once."""
    N, D, V, _ = size
    return Work(2 * N * D * V, (N + V) * D * itemsize, "sum")


def of(topk):
    """A form of linear_topk -> the build of a Rival."""

    def build(inputs):
        hidden_ND, weight_VD, ids_K = inputs.values()
        return lambda: {"logp_NK": topk(hidden_ND, weight_VD, len(ids_K))[0]}

    return build


def fused(inputs):
    from kernels import fused

    return of(fused.linear_topk)(inputs)


def plain_topk(hidden_ND, weight_VD, k):
    """torch.topk of the whole logits, as they are rounded, then their log-sum-exp."""
    logits_NV = F.linear(hidden_ND, weight_VD)
    z_NK, ids_NK = logits_NV.topk(k)
    return z_NK.float() - logits_NV.float().logsumexp(1, keepdim=True), ids_NK


def gemm_alone(inputs):
    hidden_ND, weight_VD, _ = inputs.values()
    out_NV = hidden_ND.new_empty(len(hidden_ND), len(weight_VD))
    return lambda: torch.mm(hidden_ND, weight_VD.T, out=out_NV)


BENCH = Benchmark(
    sizes=SIZES,
    dtypes=("fp32", "bf16"),
    inputs=make_inputs,
    truth=truth,
    work=count_work,
    rivals={
        "eager": Rival(of(eager.linear_topk), note="log_softmax, then torch.topk"),
        "plain torch": Rival(of(plain_topk), note="torch.topk of the logits, logsumexp"),
        "ours chunked": Rival(of(chunked.linear_topk)),
        "ours fused": Rival(fused, device="cuda"),
        "compiled eager": Rival(of(compiled(eager.linear_topk)), compiles=True),
        "GEMMs alone": Rival(gemm_alone, "", "the product by torch.mm"),
    },
)
