"""What the two benchmarks on hidden states and a head share: inputs, truth, work, and everyone's per-token logp.

logits = hidden @ weight.T with a standard deviation of 6, so up to about 30 at V=150k, and ids drawn from their
softmax, as in RL. N rows in sequences of up to SEQUENCE, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import eager

from .harness import Rival, Size, Work, compiled, gradients

LEAVES = ("hidden_ND", "weight_VD")
LOGITS_STD = 6.0
SEQUENCE = 256
BLOCK_BYTES = 1 << 28
TRL_VOCAB_CHUNK = 32768  # what its GRPO trainer passes
SIZES = {
    "small": [Size(64, 32, 2048)],
    "first": [Size(16384, 2048, 151936)],
    "cpu": [Size(2048, 896, 151936)],
    "cuda": [
        *[Size(N, 2048, 151936) for N in (8192, 16384, 32768)],  # Qwen2.5 3B
        *[Size(N, 3584, 152064) for N in (8192, 16384, 32768)],  # Qwen2.5 7B
        Size(16384, 128, 200_000),  # a factorized head
    ],
}


def row_blocks(N, V, itemsize=8):
    return torch.arange(N).split(max(1, BLOCK_BYTES // (V * itemsize)))


def make_inputs(size, dtype, device):
    """hidden_ND, weight_VD (leaves), ids_N, and logp_N fp32 of the ids."""
    torch.manual_seed(0)
    N, D, V = size
    hidden_ND = torch.randn(N, D, device=device).to(dtype)
    weight_VD = (torch.randn(V, D, device=device) * (LOGITS_STD * D**-0.5)).to(dtype)
    ids, logp = [], []
    for rows in row_blocks(N, V, 4):
        logp_CV = (hidden_ND[rows] @ weight_VD.T).float().log_softmax(1)
        ids.append(logp_CV.exp().multinomial(1))
        logp.append(logp_CV.gather(1, ids[-1]))
    ids_N, logp_N = torch.cat(ids)[:, 0], torch.cat(logp)[:, 0]
    leaf = lambda x: x.requires_grad_()
    return {"hidden_ND": leaf(hidden_ND), "weight_VD": leaf(weight_VD), "ids_N": ids_N, "logp_N": logp_N}


def advantages(N, device):
    """fp32 [N], one value a sequence -> adv_N and the shape [sequences, tokens]."""
    length = SEQUENCE if N % SEQUENCE == 0 else N
    return torch.randn(N // length, device=device).repeat_interleave(length), (N // length, length)


def truth_by_rows(inputs, rows_M, value):
    """Sum value(hidden_CD, weight_VD, rows_C) -> (scalar, logp_C) in fp64 over blocks of rows_M, with its gradients."""
    hidden_ND, weight_VD = [inputs[name].detach().double().requires_grad_() for name in LEAVES]
    total, logp = 0.0, []
    for at in row_blocks(len(rows_M), len(weight_VD)):
        rows_C = rows_M[at]
        loss, logp_C = value(hidden_ND[rows_C], weight_VD, rows_C)
        loss.backward()
        total, logp = total + loss.detach(), logp + [logp_C.detach()]
    grads = {"dhidden_ND": hidden_ND.grad, "dweight_VD": weight_VD.grad}
    return {"loss": total, "logp_N": torch.cat(logp), **grads}


def cross_entropy_truth(inputs):
    """The mean over all rows of -logp."""
    N = len(inputs["ids_N"])

    def value(hidden_CD, weight_VD, rows_C):
        logp_C = eager.linear_logprob(hidden_CD, weight_VD, inputs["ids_N"][rows_C])
        return -logp_C.sum() / N, logp_C

    return truth_by_rows(inputs, torch.arange(N), value)


def count_work(size, itemsize, task):
    """Three products over the rows that enter; each input read once and its gradient written once."""
    N, D, V = size
    rows = len(half_the_rows(N)) if task == "half" else N
    return Work(flops=6 * rows * D * V, bytes=2 * (rows + V) * D * itemsize)


def half_the_rows(N):
    return torch.arange(0, N, 2)


def plain_logp(hidden_ND, weight_VD, ids_N):
    return -F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), ids_N, reduction="none")


def checkpointed_logp(hidden_ND, weight_VD, ids_N, chunk_size=512):
    rows = zip(hidden_ND.split(chunk_size), ids_N.split(chunk_size))
    return torch.cat([checkpoint(plain_logp, h_CD, weight_VD, ids_C, use_reentrant=False) for h_CD, ids_C in rows])


def trl_logp(hidden_ND, weight_VD, ids_N):
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, ids_N, 1.0, TRL_VOCAB_CHUNK, None, 1.0, ())[0]


def verl_logp(hidden_ND, weight_VD, ids_N):
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    return FusedLinearForPPOFunction.apply(hidden_ND, weight_VD, ids_N)[0]


def verl_triton_logp(hidden_ND, weight_VD, ids_N):
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden_ND, weight_VD, ids_N, 1.0, "none")[0]


def liger_logp(hidden_ND, weight_VD, ids_N):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll_N = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden_ND, weight_VD, ids_N)
    return -(nll_N[0] if isinstance(nll_N, tuple) else nll_N).float()


def cce_logp(impl):
    def logp(hidden_ND, weight_VD, ids_N):
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden_ND, weight_VD, ids_N, reduction="none", impl=impl).float()

    return logp


CAREFUL_LOGP = {
    "plain torch": (plain_logp, {}),
    "checkpointed rows": (checkpointed_logp, {"note": "plain torch on 512 rows at a time, made again in backward"}),
}
PEER_LOGP = {
    "compiled plain torch": (compiled(plain_logp), {"compiles": True}),
    "Liger scaled CE": (liger_logp, {}),
    "TRL chunked logp": (trl_logp, {}),
    "verl fused linear": (verl_logp, {"note": "its torch form, with entropy"}),
    "verl Triton": (verl_triton_logp, {"device": "cuda", "note": "with entropy"}),
    "CCE compiled": (cce_logp("torch_compile"), {"compiles": True}),
    "CCE": (cce_logp("cce"), {"device": "cuda", "note": "drops small gradients"}),
}
"""What a careful user writes, and peers: name -> (logp(hidden_ND, weight_VD, ids_N), the Rival's other fields)."""


def torch_cross_entropy(inputs):
    from torch.nn import LinearCrossEntropyOptions  # torch 2.13

    options = LinearCrossEntropyOptions()

    def run():
        hidden_ND, weight_VD = [inputs[name] for name in LEAVES]
        loss = F.linear_cross_entropy(hidden_ND, weight_VD, inputs["ids_N"], options=options)
        return {"loss": loss.detach(), **gradients(loss, inputs, LEAVES)}

    return run


def quack_cross_entropy(inputs):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run():
        loss = chunked_linear_cross_entropy(*[inputs[name] for name in LEAVES], inputs["ids_N"])
        return {"loss": loss.detach(), **gradients(loss, inputs, LEAVES)}

    return run


def gemms_alone(inputs):
    """The three products on the logits' true gradient, into memory that is there before."""
    hidden_ND, weight_VD = [inputs[name].detach() for name in LEAVES]
    N, V = len(hidden_ND), len(weight_VD)
    dlogits_NV = hidden_ND.new_empty(N, V)
    for rows in row_blocks(N, V, 4):
        p_CV = (hidden_ND[rows] @ weight_VD.T).float().softmax(1)
        dlogits_NV[rows] = (p_CV - F.one_hot(inputs["ids_N"][rows], V)).to(dlogits_NV.dtype) / N

    outs = torch.empty_like(dlogits_NV), torch.empty_like(hidden_ND), torch.empty_like(weight_VD)

    def run():
        torch.mm(hidden_ND, weight_VD.T, out=outs[0])
        torch.mm(dlogits_NV, weight_VD, out=outs[1])
        torch.mm(dlogits_NV.T, hidden_ND, out=outs[2])

    return run


CROSS_ENTROPY_PEERS = {
    "torch chunked CE": Rival(torch_cross_entropy, "cross_entropy", "cross-entropy only: no logp a token"),
    "QuACK CE": Rival(quack_cross_entropy, "cross_entropy", "cross-entropy only: no logp a token", device="cuda"),
    "GEMMs alone": Rival(gemms_alone, "", "the three products on the same data by torch.mm, no loss"),
}
