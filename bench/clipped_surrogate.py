"""The clipped surrogate with KL on [N] fp32 values: value, gradient and statistics."""

import torch

from kernels import chunked, eager

from .harness import Benchmark, Rival, Size, Work, compiled, gradients

SPEC = eager.SurrogateSpec(clip_low=0.2, clip_high=0.28, kl_coef=0.05)
VECTORS = ("logp_N", "logp_old_N", "adv_N", "weight_N")


def make_inputs(size, dtype, device):
    torch.manual_seed(0)
    noise = lambda scale: scale * torch.randn(size.N, device=device)
    logp_N = -noise(2.0).abs()
    return {
        "logp_N": logp_N.clone().requires_grad_(),
        "logp_old_N": logp_N + noise(0.2),
        "adv_N": noise(1.0),
        "weight_N": torch.full((size.N,), 1 / size.N, device=device),
        "logp_ref_N": logp_N + noise(0.2),
    }


def truth(inputs, task):
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    return of(eager.clipped_surrogate)(wide)()


def count_work(size, itemsize, task):
    """Five vectors read; the gradient written in the forward, scaled (read, written) in the backward."""
    return Work(flops=0, bytes=8 * 4 * size.N)


def of(surrogate):
    """A form of clipped_surrogate -> the build of a Rival."""

    def build(inputs):
        def run():
            loss, _ = surrogate(*[inputs[name] for name in VECTORS], SPEC, logp_ref_N=inputs["logp_ref_N"])
            return {"loss": loss.detach(), **gradients(loss, inputs, ["logp_N"])}

        return run

    return build


def fused(inputs):
    from kernels import fused

    return of(fused.clipped_surrogate)(inputs)


def plain_surrogate(logp_N, logp_old_N, adv_N, weight_N, spec, *, logp_ref_N):
    ratio_N = (logp_N - logp_old_N).exp()
    clipped_N = ratio_N.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    d_N = logp_ref_N - logp_N
    loss_N = -torch.min(ratio_N * adv_N, clipped_N * adv_N) + spec.kl_coef * (d_N.exp() - d_N - 1)
    return (weight_N * loss_N).sum(), None


BENCH = Benchmark(
    sizes={
        "small": [Size(4096, 0, 0)],
        "cpu": [Size(1 << 20, 0, 0)],
        "cuda": [Size(N, 0, 0) for N in (8192, 32768, 1 << 20)],
    },
    dtypes=("fp32",),
    inputs=make_inputs,
    truth=truth,
    work=count_work,
    rivals={
        "eager": Rival(of(eager.clipped_surrogate)),
        "plain torch": Rival(of(plain_surrogate), note="no statistics, no care for overflow"),
        "ours chunked": Rival(of(chunked.clipped_surrogate)),
        "ours fused": Rival(fused, device="cuda"),
        "compiled eager": Rival(of(compiled(eager.clipped_surrogate)), compiles=True),
        "compiled plain torch": Rival(of(compiled(plain_surrogate)), compiles=True),
    },
)
