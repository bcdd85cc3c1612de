"""From hidden states to distillation's loss and its gradients: KL on a teacher's top K with a tail, and likelihood."""

import torch
import torch.nn.functional as F

from kernels import chunked, eager

from . import heads
from .harness import Benchmark, Rival, compiled, gradients
from .linear_topk import SIZES

SPEC = eager.MatchSpec("kl", match_coef=0.5)
VECTORS = ("ids_N", "top_ids_NK", "top_logp_NK", "weight_N")


def make_inputs(size, dtype, device):
    """The teacher is the student with another quarter of its weight's variance."""
    *size, K = size
    inputs = heads.make_inputs(size, dtype, device)
    hidden_ND, weight_VD = [inputs[name].detach() for name in heads.LEAVES]
    other_VD = weight_VD + torch.randn_like(weight_VD) * (0.5 * heads.LOGITS_STD * hidden_ND.shape[1] ** -0.5)
    blocks = heads.row_blocks(len(hidden_ND), len(weight_VD), 4)
    tops = [eager.linear_topk(hidden_ND[rows], other_VD, K) for rows in blocks]
    inputs["top_logp_NK"], inputs["top_ids_NK"] = (torch.cat(parts) for parts in zip(*tops))
    inputs["weight_N"] = torch.full((len(hidden_ND),), 1 / len(hidden_ND), device=device)
    return inputs


def truth(inputs, task):
    def value(hidden_CD, weight_VD, rows_C):
        vectors = [inputs[name][rows_C] for name in VECTORS]
        loss, logp_C, _ = eager.linear_match(hidden_CD, weight_VD, *vectors, SPEC)
        return loss, logp_C

    return heads.truth_by_rows(inputs, torch.arange(len(inputs["ids_N"])), value)


def of(match):
    """A form of linear_match -> the build of a Rival."""

    def build(inputs):
        def run():
            loss, logp_N, _ = match(*[inputs[name] for name in (*heads.LEAVES, *VECTORS)], SPEC)
            return {"loss": loss.detach(), "logp_N": logp_N, **gradients(loss, inputs, heads.LEAVES)}

        return run

    return build


def fused(inputs):
    from kernels import fused

    return of(fused.linear_match)(inputs)


def plain_match(hidden_ND, weight_VD, ids_N, top_ids_NK, top_logp_NK, weight_N, spec):
    """What one would write: log-probabilities of the whole vocabulary, torch's KL of the K and the tail."""
    logp_NV = F.linear(hidden_ND, weight_VD).float().log_softmax(1)
    logp_N = logp_NV.gather(1, ids_N[:, None])[:, 0]
    tail = lambda logp_NK: (1 - logp_NK.exp().sum(1, keepdim=True)).clamp(min=2.0**-20).log()
    student, teacher = (torch.cat((x, tail(x)), 1) for x in (logp_NV.gather(1, top_ids_NK), top_logp_NK))
    match_N = F.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
    return (weight_N * (spec.match_coef * match_N - spec.nll_coef * logp_N)).sum(), logp_N.detach(), None


BENCH = Benchmark(
    sizes=SIZES,
    dtypes=("fp32", "bf16"),
    inputs=make_inputs,
    truth=truth,
    work=lambda size, itemsize, task: heads.count_work(size[:3], itemsize, task),
    rivals={
        "eager": Rival(of(eager.linear_match)),
        "plain torch": Rival(of(plain_match), note="no statistics"),
        "ours chunked": Rival(of(chunked.linear_match)),
        "ours fused": Rival(fused, device="cuda"),
        "compiled eager": Rival(of(compiled(eager.linear_match)), compiles=True),
        "GEMMs alone": heads.CROSS_ENTROPY_PEERS["GEMMs alone"],
    },
)
