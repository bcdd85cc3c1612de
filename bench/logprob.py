"""Per-token log-probabilities from logits that exist: forward and backward, and the forward alone."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from kernels import chunked, eager

from .harness import Benchmark, Rival, Size, Work, compiled, gradients

LOGITS_STD = 6.0
BLOCK_BYTES = 1 << 28


def make_inputs(size, dtype, device):
    torch.manual_seed(0)
    logits_NV = (LOGITS_STD * torch.randn(size.N, size.V, device=device)).to(dtype).requires_grad_()
    ids_N = torch.randint(size.V, (size.N,), device=device)
    return {"logits_NV": logits_NV, "ids_N": ids_N, "dlogp_N": torch.randn(size.N, device=device)}


def without_gradient(*arguments):
    inputs = make_inputs(*arguments)
    inputs["logits_NV"].requires_grad_(False)
    return inputs


def truth(inputs, task):
    """Eager fed fp64, a block of rows at a time."""
    logits_NV = inputs["logits_NV"].detach()
    outputs = {"logp_N": [], "dlogits_NV": []}
    for rows in torch.arange(len(logits_NV)).split(max(1, BLOCK_BYTES // (8 * logits_NV.shape[1]))):
        block_CV = logits_NV[rows].double().requires_grad_()
        logp_C = eager.logprob(block_CV, inputs["ids_N"][rows])
        (gradient_CV,) = torch.autograd.grad(logp_C, block_CV, inputs["dlogp_N"][rows].double())
        outputs["logp_N"].append(logp_C.detach())
        outputs["dlogits_NV"].append(gradient_CV)
    return {name: torch.cat(blocks) for name, blocks in outputs.items()}


def count_work(size, itemsize, task):
    """Read the logits for the value, read them again for the gradient, write it."""
    return Work(flops=0, bytes=3 * size.N * size.V * itemsize)


def of(logprob):
    """logprob(logits_NV, ids_N) -> the build of a Rival."""

    def build(inputs):
        def run():
            logp_N = logprob(inputs["logits_NV"], inputs["ids_N"])
            return {"logp_N": logp_N.detach(), **gradients(logp_N, inputs, ["logits_NV"], inputs["dlogp_N"])}

        return run

    return build


def fused(inputs):
    from kernels import fused

    return of(fused.logprob)(inputs)


def trl(inputs):
    from trl.trainer.utils import selective_log_softmax

    return of(selective_log_softmax)(inputs)


def verl(inputs):
    from verl.utils.torch_functional import logprobs_from_logits

    return of(lambda logits_NV, ids_N: logprobs_from_logits(logits_NV, ids_N, inplace_backward=False))(inputs)


def quack(inputs):
    from quack.cross_entropy import cross_entropy

    return of(lambda logits_NV, ids_N: -cross_entropy(logits_NV, ids_N, reduction="none"))(inputs)


def plain_logprob(logits_NV, ids_N):
    return -F.cross_entropy(logits_NV.float(), ids_N, reduction="none")


BENCH = Benchmark(
    sizes={
        "small": [Size(64, 0, 8192)],
        "first": [Size(8192, 0, 151936)],
        "cpu": [Size(2048, 0, 151936)],
        "cuda": [Size(N, 0, 151936) for N in (8192, 16384)],
    },
    dtypes=("fp32", "bf16"),
    inputs=make_inputs,
    truth=truth,
    work=count_work,
    rivals={
        "eager": Rival(of(eager.logprob)),
        "plain torch": Rival(of(plain_logprob)),
        "ours chunked": Rival(of(chunked.logprob)),
        "ours fused": Rival(fused, device="cuda"),
        "compiled eager": Rival(of(compiled(eager.logprob)), compiles=True),
        "compiled plain torch": Rival(of(compiled(plain_logprob)), compiles=True),
        "TRL selective_log_softmax": Rival(trl, note="rounds to bf16 where the logits are bf16 and no kernel runs"),
        "verl logprobs_from_logits": Rival(verl, note="through flash-attn where installed"),
        "QuACK cross_entropy": Rival(quack, device="cuda"),
    },
)

FORWARD = replace(
    BENCH, inputs=without_gradient, work=lambda size, itemsize, task: Work(0, size.N * size.V * itemsize, "sum")
)
