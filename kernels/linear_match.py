"""Hidden states to distillation's loss in one pass, as linear_surrogate.py is for RL: 3 GEMMs.

1 GEMM without gradients, 2 with a frozen head. The passes over a chunk are those of linear_logprob.py: they write the
gradient of a row that its own id alone has a slope in, and what the K add is written over it. M rows, K tokens of a
row, V vocabulary, D hidden.
Oracle: eager.linear_match.
"""

import torch

from .checks import safe_top_ids
from .linear import match_forward
from .linear_logprob import PASSES, fake_gradients
from .logprob import kernel_ids
from .ops import op
from .spec import MATCH_STATS, MatchSpec


@op("linear_match_fwd")
def linear_match_fwd(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, live_M: torch.Tensor | None,
    ids_M: torch.Tensor, temperature_M: torch.Tensor | None, top_ids_MK: torch.Tensor, top_logp_MK: torch.Tensor,
    weight_M: torch.Tensor, match: str, match_coef: float, nll_coef: float, accurate: bool, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """-> loss [], logp_M, stats, dhidden_MD, dweight_VD, dbias_V; empty where not needed."""
    _, top_ids_MK, bad_M = safe_top_ids(ids_M, top_ids_MK, len(weight_VD), live_M)
    rows = live_M, kernel_ids(ids_M, len(weight_VD), live_M), bad_M, temperature_M
    vectors, spec = (top_ids_MK, top_logp_MK, weight_M), MatchSpec(match, match_coef, nll_coef)
    loss, logp_M, stats, *grads = match_forward(
        PASSES, hidden_MD, weight_VD, bias_V, *rows, vectors, spec, accurate, needs
    )
    return [loss, logp_M, stats, *[hidden_MD.new_empty(0) if x is None else x for x in grads]]


@linear_match_fwd.register_fake
def _(hidden_MD, weight_VD, bias_V, live_M, ids_M, temperature_M, top_ids_MK, top_logp_MK, weight_M, match, match_coef,
      nll_coef, accurate, needs):  # fmt: skip
    new = lambda *size: hidden_MD.new_empty(size, dtype=torch.float32)
    return [new(), new(len(ids_M)), new(len(MATCH_STATS)), *fake_gradients(hidden_MD, weight_VD, needs)]
