"""Hidden states to policy loss in one pass: the gradient is formed while the logits of a chunk are at hand, 3 GEMMs.

1 GEMM without gradients, 2 with a frozen head. The passes over a chunk are those of linear_logprob.py; between them
runs objective.py, plain arithmetic. N rows, M rows kept, V vocabulary, D hidden.
Oracle: eager.linear_clipped_surrogate.
"""

import torch
from torch.autograd.function import once_differentiable

from .linear import kept, surrogate_forward
from .linear_logprob import PASSES, fake_gradients
from .logprob import kernel_ids
from .ops import op
from .spec import STATS, SurrogateSpec


@op("linear_clipped_surrogate_fwd")
def linear_clipped_surrogate_fwd(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, rows_M: torch.Tensor | None,
    ids_N: torch.Tensor, temperature_N: torch.Tensor | None, logp_old_N: torch.Tensor | None, adv_N: torch.Tensor,
    weight_N: torch.Tensor, logp_ref_N: torch.Tensor | None, logp_behaviour_N: torch.Tensor | None,
    spec: list[float], accurate: bool, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """-> loss [], logp_N, stats, dhidden_ND, dweight_VD, dbias_V; empty where not needed. spec: its fields in order."""
    V = weight_VD.shape[0]
    if rows_M is None and not hidden_ND.is_cuda:
        rows_M = weight_N.nonzero()[:, 0]
    live_M = weight_N != 0 if rows_M is None else None  # how many, the host cannot know: all enter, these as zeros
    ids_M, temperature_M, *vectors = kept(
        rows_M, ids_N, temperature_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N
    )
    ids_M = kernel_ids(ids_M, V, live_M)
    names = ("logp_old_N", "adv_N", "weight_N", "logp_ref_N", "logp_behaviour_N")
    loss, logp_N, stats, *grads = surrogate_forward(
        PASSES, hidden_ND, weight_VD, bias_V, rows_M, live_M, ids_M, ids_M == V, temperature_M,
        dict(zip(names, vectors)), SurrogateSpec(*spec), accurate, needs,
    )  # fmt: skip
    return [loss, logp_N, stats, *[hidden_ND.new_empty(0) if x is None else x for x in grads]]


@linear_clipped_surrogate_fwd.register_fake
def _(hidden_ND, weight_VD, bias_V, rows_M, ids_N, temperature_N, logp_old_N, adv_N, weight_N, logp_ref_N,
      logp_behaviour_N, spec, accurate, needs):  # fmt: skip
    new = lambda *size: hidden_ND.new_empty(size, dtype=torch.float32)
    return [new(), new(len(ids_N)), new(len(STATS)), *fake_gradients(hidden_ND, weight_VD, needs)]


class _LinearClippedSurrogate(torch.autograd.Function):
    """The op's arguments -> loss [], logp_N, stats."""

    @staticmethod
    def forward(ctx, *args):
        loss, logp_N, stats, *grads = linear_clipped_surrogate_fwd(*args)
        ctx.needs, ctx.num_args = args[-1], len(args)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(logp_N, stats)
        return loss, logp_N, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        # Out of place: a second backward finds them unscaled.
        grads = [(x * dloss).to(x.dtype) if need else None for x, need in zip(ctx.saved_tensors, ctx.needs)]
        return *grads, *[None] * (ctx.num_args - 3)
