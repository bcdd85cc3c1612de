"""Every public function with Triton behind it: the default on a GPU; on a CPU it runs under TRITON_INTERPRET=1.

fp32, bf16 or fp16 in, fp32 inside, fp32 log-probabilities out; deterministic, no atomics, int64 offsets;
torch.compile(fullgraph=True) takes them. The host never waits for the device: rows_M from the host is pinned and copied
(but inside torch.compile give it on the device, or pinned). Signatures, errors and oracle: eager.py.
"""

import torch
import triton

from .checks import check_decode_attention, check_linear, check_logits, check_match, check_rows, check_topk
from .decode_attention import decode_attention as _decode_attention_op
from .linear import grads_wanted, take_rows
from .linear_logprob import _LinearLogProb
from .linear_match import linear_match_fwd
from .linear_surrogate import _LinearLoss, linear_clipped_surrogate_fwd
from .logprob import _LogProb, _logprob_fwd_kernel
from .spec import MATCH_STATS, STATS, MatchSpec, SurrogateSpec
from .surrogate import _ClippedSurrogate, spec_numbers
from .topk import linear_topk as _linear_topk_op

__all__ = ["STATS", "SurrogateSpec", "logprob", "linear_logprob", "clipped_surrogate", "linear_clipped_surrogate"]
__all__ += ["MATCH_STATS", "MatchSpec", "linear_topk", "linear_match", "decode_attention"]

COMPILED = isinstance(_logprob_fwd_kernel, triton.JITFunction)  # decided by TRITON_INTERPRET when triton is imported


def _refuse_unless_it_runs(**tensors):
    for name, x in tensors.items():
        if x is not None and COMPILED and x.device.type == "cpu":
            raise ValueError(f"{name} is on a CPU, where these kernels need TRITON_INTERPRET=1; chunked runs there")
        if x is not None and x.dtype == torch.float64:
            raise ValueError(f"{name} must not be torch.float64 here: eager and chunked take it")
        if x is not None and x.dim() > 1 and x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must have stride 1 along its last axis, got {x.stride(-1)}")


def _temperature(temperature, like_ND):
    """Number or tensor -> fp32 [N], None for 1."""
    if isinstance(temperature, torch.Tensor):
        return temperature.detach().float().contiguous()
    return None if temperature == 1.0 else like_ND.new_full(like_ND.shape[:1], temperature, dtype=torch.float32)


def logprob(logits_NV, ids_N, *, temperature=1.0, mask_N=None, entropy=False):
    """As eager.logprob: one read of the logits forward, one read and one write backward. logits_NV rows contiguous."""
    check_logits(logits_NV, ids_N, temperature, mask_N)
    _refuse_unless_it_runs(logits_NV=logits_NV)
    return _LogProb.apply(logits_NV, ids_N, _temperature(temperature, logits_NV), mask_N, entropy)


def linear_logprob(
    hidden_ND, weight_VD, ids_M, *, bias_V=None, temperature=1.0, rows_M=None, entropy=False, accurate=False
):
    """As eager.linear_logprob: 1 GEMM without gradients, 2 with a frozen head and no entropy, else 4."""
    check_linear(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M)
    _refuse_unless_it_runs(hidden_ND=hidden_ND, weight_VD=weight_VD)
    hidden_MD = take_rows(hidden_ND, rows_M)
    temperature_M, needs = _temperature(temperature, hidden_MD), grads_wanted(hidden_MD, weight_VD, bias_V)
    logp_M, entropy_M = _LinearLogProb.apply(
        hidden_MD, weight_VD, bias_V, ids_M, temperature_M, accurate, entropy, needs
    )
    return (logp_M, entropy_M) if entropy else logp_M


def clipped_surrogate(
    logp_N, logp_old_N, adv_N, weight_N, spec, *, logp_ref_N=None, logp_behaviour_N=None, entropy_N=None
):
    """As eager.clipped_surrogate: value, gradient and stats in one launch, the backward in another."""
    others = dict(logp_ref_N=logp_ref_N, logp_behaviour_N=logp_behaviour_N, entropy_N=entropy_N)
    vectors = dict(logp_N=logp_N, logp_old_N=logp_old_N, adv_N=adv_N, weight_N=weight_N, **others)
    check_rows(logp_N.shape[0], logp_N.device, **vectors)
    _refuse_unless_it_runs(**vectors)
    return _ClippedSurrogate.apply(
        logp_N, entropy_N, logp_old_N, adv_N, weight_N, logp_ref_N, logp_behaviour_N, spec_numbers(spec)
    )


def linear_clipped_surrogate(
    hidden_ND, weight_VD, ids_M, logp_old_M, adv_M, weight_M, spec, *, bias_V=None, temperature=1.0, rows_M=None,
    logp_ref_M=None, logp_behaviour_M=None, accurate=False,
):  # fmt: skip
    """As eager.linear_clipped_surrogate, in one pass: 1 GEMM without gradients, 2 with a frozen head, else 3.

    The number of rows of nonzero weight is not known to a GPU's host: give rows_M to have the others removed.
    """
    vectors = dict(
        logp_old_M=logp_old_M, adv_M=adv_M, weight_M=weight_M, logp_ref_M=logp_ref_M, logp_behaviour_M=logp_behaviour_M
    )
    check_linear(hidden_ND, weight_VD, ids_M, bias_V, temperature, rows_M, **vectors)
    _refuse_unless_it_runs(hidden_ND=hidden_ND, weight_VD=weight_VD, **vectors)
    live_M = weight_M != 0 if rows_M is None else None  # all enter, those of weight 0 as zeros
    hidden_MD = take_rows(hidden_ND, rows_M)
    rows = live_M, ids_M, _temperature(temperature, hidden_MD), *vectors.values()
    spec, needs = spec_numbers(spec), grads_wanted(hidden_MD, weight_VD, bias_V)
    inputs = hidden_MD, weight_VD, bias_V, *rows, spec, accurate, needs
    loss, logp_M, stats = _LinearLoss.apply(*inputs, linear_clipped_surrogate_fwd)
    stats[STATS.index("rows_skipped")] += len(hidden_ND) - len(ids_M)
    return loss, logp_M, stats


def linear_match(
    hidden_ND, weight_VD, ids_M, top_ids_MK, top_logp_MK, weight_M, spec, *, bias_V=None, temperature=1.0, rows_M=None,
    accurate=False,
):  # fmt: skip
    """As eager.linear_match, in one pass: 1 GEMM without gradients, 2 with a frozen head, else 3."""
    check_match(hidden_ND, weight_VD, ids_M, top_ids_MK, top_logp_MK, weight_M, bias_V, temperature, rows_M)
    _refuse_unless_it_runs(hidden_ND=hidden_ND, weight_VD=weight_VD, top_logp_MK=top_logp_MK, weight_M=weight_M)
    live_M = weight_M != 0 if rows_M is None else None  # all enter, those of weight 0 as zeros
    hidden_MD = take_rows(hidden_ND, rows_M)
    rows = live_M, ids_M, _temperature(temperature, hidden_MD), top_ids_MK, top_logp_MK, weight_M
    spec = spec.match, float(spec.match_coef), float(spec.nll_coef)
    inputs = hidden_MD, weight_VD, bias_V, *rows, *spec, accurate, grads_wanted(hidden_MD, weight_VD, bias_V)
    loss, logp_M, stats = _LinearLoss.apply(*inputs, linear_match_fwd)
    stats[MATCH_STATS.index("rows_skipped")] += len(hidden_ND) - len(ids_M)
    return loss, logp_M, stats


def linear_topk(hidden_ND, weight_VD, k, *, bias_V=None, temperature=1.0, rows_M=None, accurate=False):
    """As eager.linear_topk: one read of a chunk of logits, then a search in k groups of its columns."""
    check_topk(hidden_ND, weight_VD, k, bias_V, temperature, rows_M)
    _refuse_unless_it_runs(hidden_ND=hidden_ND, weight_VD=weight_VD)
    hidden_MD = take_rows(hidden_ND, rows_M)
    return _linear_topk_op(hidden_MD, weight_VD, bias_V, _temperature(temperature, hidden_MD), k, accurate)


def decode_attention(q_MHD, keys_SKLD, values_SKLD, length_M, *, scale=None, window=None):
    """As eager.decode_attention, in two launches; D a multiple of 8 up to 256, stride 1 along it.

    Columns that do not count are not read. A row's output does not depend on the rest of the batch, to the bit.
    """
    check_decode_attention(q_MHD, keys_SKLD, values_SKLD, length_M, scale, window)
    _refuse_unless_it_runs(q_MHD=q_MHD, keys_SKLD=keys_SKLD, values_SKLD=values_SKLD)
    D, L = q_MHD.shape[2], keys_SKLD.shape[2]
    if D % 8 or not 0 < D <= 256:
        raise ValueError(f"q_MHD must have heads of a multiple of 8 up to 256 here, got {D}; eager and chunked take it")
    scale, window = D**-0.5 if scale is None else float(scale), L if window is None else min(window, L)
    return _decode_attention_op(q_MHD, keys_SKLD, values_SKLD, length_M, scale, window)
