"""From hidden states to the policy loss and its gradients: all rows, and with half of the rows removed.

Weights 1/N and one advantage a sequence, so that sequence-shaped peers compute the same loss. Ratios keep away from
the clip edges, where the rounding of one logit switches a row's gradient on or off.
"""

import torch

from kernels import chunked, eager

from . import heads
from .harness import Benchmark, Rival, compiled, gradients

SPEC = eager.SurrogateSpec(clip_low=0.2, clip_high=0.28)
VECTORS = ("logp_old_N", "adv_N", "weight_N")


def make_inputs(size, dtype, device):
    inputs = heads.make_inputs(size, dtype, device)
    small_N = 0.1 * torch.rand(size.N, device=device) - 0.05
    large_N = 0.6 * torch.randn(size.N, device=device).sign()
    step_N = torch.where(torch.rand(size.N, device=device) < 0.8, small_N, large_N)
    inputs["logp_old_N"] = inputs.pop("logp_N") - step_N
    inputs["adv_N"], _ = heads.advantages(size.N, device)
    inputs["weight_N"] = torch.full((size.N,), 1 / size.N, device=device)
    return inputs


def truth(inputs, task):
    if task == "cross_entropy":
        return heads.cross_entropy_truth(inputs)
    N = len(inputs["ids_N"])

    def value(hidden_CD, weight_VD, rows_C):
        ids_C, *vectors = [inputs[name][rows_C] for name in ("ids_N", *VECTORS)]
        loss, logp_C, _ = eager.linear_clipped_surrogate(hidden_CD, weight_VD, ids_C, *vectors, SPEC)
        return loss, logp_C

    rows_M = heads.half_the_rows(N) if task == "half" else torch.arange(N)
    return heads.truth_by_rows(inputs, rows_M, value)


def of(surrogate, half=False):
    """One of ours, or a form of it -> the build of a Rival."""

    def build(inputs):
        rows_M = heads.half_the_rows(len(inputs["ids_N"])) if half else None

        vectors = [inputs[name] if rows_M is None else inputs[name][rows_M] for name in ("ids_N", *VECTORS)]

        def run():
            loss, logp_M, _ = surrogate(*[inputs[name] for name in heads.LEAVES], *vectors, SPEC, rows_M=rows_M)
            return {"loss": loss.detach(), "logp_N": logp_M, **gradients(loss, inputs, heads.LEAVES)}

        return run

    return build


def fused(half=False):
    def build(inputs):
        from kernels import fused

        return of(fused.linear_clipped_surrogate, half)(inputs)

    return build


def from_logp(logp):
    """A peer's per-token logp, then eager's arithmetic on [N] values."""

    def build(inputs):
        def run():
            logp_N = logp(*[inputs[name] for name in heads.LEAVES], inputs["ids_N"])
            loss, _ = eager.clipped_surrogate(logp_N, *[inputs[name] for name in VECTORS], SPEC)
            return {"loss": loss.detach(), "logp_N": logp_N.detach(), **gradients(loss, inputs, heads.LEAVES)}

        return run

    return build


def liger_grpo(inputs):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden_ND, weight_VD = [inputs[name] for name in heads.LEAVES]
    _, shape = heads.advantages(len(hidden_ND), "cpu")
    ids, logp_old, adv = [inputs[name].view(shape) for name in ("ids_N", "logp_old_N", "adv_N")]
    mask = torch.ones_like(logp_old)
    grpo = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=SPEC.clip_low, epsilon_high=SPEC.clip_high, loss_type="grpo"
    )

    def run():
        hidden = hidden_ND.view(*shape, -1)
        loss, _ = grpo(hidden, weight_VD, ids, mask, adv[:, 0], old_per_token_logps=logp_old)
        return {"loss": loss.detach(), **gradients(loss, inputs, heads.LEAVES)}

    return run


HALF = "half of the rows removed"
BENCH = Benchmark(
    sizes=heads.SIZES,
    dtypes=("fp32", "bf16"),
    inputs=make_inputs,
    truth=truth,
    work=heads.count_work,
    rivals={
        "eager": Rival(of(eager.linear_clipped_surrogate), note="entropy for the statistics, as ours; others without"),
        **{name: Rival(from_logp(logp), **about) for name, (logp, about) in heads.CAREFUL_LOGP.items()},
        "ours chunked": Rival(of(chunked.linear_clipped_surrogate)),
        "ours chunked, half": Rival(of(chunked.linear_clipped_surrogate, half=True), "half", HALF),
        "ours fused": Rival(fused(), device="cuda"),
        "ours fused, half": Rival(fused(half=True), "half", HALF, device="cuda"),
        "compiled eager": Rival(of(compiled(eager.linear_clipped_surrogate)), compiles=True),
        "Liger chunked GRPO": Rival(liger_grpo, note="no logp a token", compiles=True),
        **{name: Rival(from_logp(logp), **about) for name, (logp, about) in heads.PEER_LOGP.items()},
        **heads.CROSS_ENTROPY_PEERS,
    },
)
