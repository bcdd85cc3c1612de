"""Per-token log-probabilities from hidden states and a head, forward and backward under a given gradient of each."""

import torch

from kernels import chunked, eager

from . import heads
from .harness import Benchmark, Rival, compiled, gradients


def make_inputs(size, dtype, device):
    inputs = heads.make_inputs(size, dtype, device)
    inputs["dlogp_N"] = torch.randn(size.N, device=device) / size.N
    return inputs


def truth(inputs, task):
    if task == "cross_entropy":
        return heads.cross_entropy_truth(inputs)

    def value(hidden_CD, weight_VD, rows_C):
        logp_C = eager.linear_logprob(hidden_CD, weight_VD, inputs["ids_N"][rows_C])
        return (logp_C * inputs["dlogp_N"][rows_C]).sum(), logp_C

    return heads.truth_by_rows(inputs, torch.arange(len(inputs["ids_N"])), value)


def of(logp):
    """logp(hidden_ND, weight_VD, ids_N) -> the build of a Rival."""

    def build(inputs):
        def run():
            logp_N = logp(*[inputs[name] for name in heads.LEAVES], inputs["ids_N"])
            return {"logp_N": logp_N.detach(), **gradients(logp_N, inputs, heads.LEAVES, inputs["dlogp_N"])}

        return run

    return build


def fused(inputs):
    from kernels import fused

    return of(fused.linear_logprob)(inputs)


BENCH = Benchmark(
    sizes=heads.SIZES,
    dtypes=("fp32", "bf16"),
    inputs=make_inputs,
    truth=truth,
    work=heads.count_work,
    rivals={
        "eager": Rival(of(eager.linear_logprob)),
        **{name: Rival(of(logp), **about) for name, (logp, about) in heads.CAREFUL_LOGP.items()},
        "ours chunked": Rival(of(chunked.linear_logprob)),
        "ours fused": Rival(fused, device="cuda"),
        "compiled eager": Rival(of(compiled(eager.linear_logprob)), compiles=True),
        **{name: Rival(of(logp), **about) for name, (logp, about) in heads.PEER_LOGP.items()},
        **heads.CROSS_ENTROPY_PEERS,
    },
)
