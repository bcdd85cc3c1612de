"""Hidden states to policy loss in one pass: the gradient is formed while the logits of a chunk are at hand, 3 GEMMs.

1 GEMM without gradients, 2 with a frozen head. The passes over a chunk are those of linear_logprob.py; between them
runs objective.py, plain arithmetic. M rows, V vocabulary, D hidden.
Oracle: eager.linear_clipped_surrogate.
"""

import torch
from torch.autograd.function import once_differentiable

from .linear import surrogate_forward
from .linear_logprob import PASSES, fake_gradients
from .logprob import kernel_ids
from .ops import op
from .spec import STATS
from .surrogate import spec_of


@op("linear_clipped_surrogate_fwd")
def linear_clipped_surrogate_fwd(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, live_M: torch.Tensor | None,
    ids_M: torch.Tensor, temperature_M: torch.Tensor | None, logp_old_M: torch.Tensor | None, adv_M: torch.Tensor,
    weight_M: torch.Tensor, logp_ref_M: torch.Tensor | None, logp_behaviour_M: torch.Tensor | None,
    spec: list[float], accurate: bool, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """-> loss [], logp_M, stats, dhidden_MD, dweight_VD, dbias_V; empty where not needed. spec: `spec_numbers`."""
    ids_M = kernel_ids(ids_M, len(weight_VD), live_M)
    rows = live_M, ids_M, ids_M == len(weight_VD), temperature_M
    vectors, spec = (logp_old_M, adv_M, weight_M, logp_ref_M, logp_behaviour_M), spec_of(spec)
    loss, logp_M, stats, *grads = surrogate_forward(
        PASSES, hidden_MD, weight_VD, bias_V, *rows, vectors, spec, accurate, needs
    )
    return [loss, logp_M, stats, *[hidden_MD.new_empty(0) if x is None else x for x in grads]]


@linear_clipped_surrogate_fwd.register_fake
def _(hidden_MD, weight_VD, bias_V, live_M, ids_M, temperature_M, logp_old_M, adv_M, weight_M, logp_ref_M,
      logp_behaviour_M, spec, accurate, needs):  # fmt: skip
    new = lambda *size: hidden_MD.new_empty(size, dtype=torch.float32)
    return [new(), new(len(ids_M)), new(len(STATS)), *fake_gradients(hidden_MD, weight_VD, needs)]


class _LinearLoss(torch.autograd.Function):
    """An op's arguments, of which the last is needs, and the op -> loss [], logp_M, stats."""

    @staticmethod
    def forward(ctx, *args):
        *args, loss_op = args
        loss, logp_M, stats, *grads = loss_op(*args)
        ctx.needs, ctx.num_args = args[-1], len(args)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(logp_M, stats)
        return loss, logp_M, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        # Out of place: a second backward finds them unscaled.
        grads = [(x * dloss).to(x.dtype) if need else None for x, need in zip(ctx.saved_tensors, ctx.needs)]
        return *grads, *[None] * (ctx.num_args - 2)
