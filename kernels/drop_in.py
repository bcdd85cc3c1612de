"""In place of the log-probabilities of TRL 1.16.0 and verl 0.9.1: `install_in_trl` for GRPOTrainer, and two functions
under their names and signatures.

Triton on a GPU, plain torch on a CPU and for fp64. All return fp32 whatever the inputs (fp64 for fp64). The two that
take logits keep no second [.., V] tensor: the one they make is the gradient. But rows need one stride: a slice such as
logits[:, :-1] is copied, so slice the result. N rows, K tokens of a row, V vocabulary, D hidden.
"""

from importlib import import_module

import torch
from torch.autograd.function import once_differentiable

from . import chunked, fused
from .checks import check, check_temperature, safe_ids

TRL_VERSION = "1.16.0"


def _kernels(x):
    return fused if x.is_cuda and x.dtype != torch.float64 else chunked


def _logprob(logits_NV, ids_N, temperature=1.0, mask_N=None):
    return _kernels(logits_NV).logprob(logits_NV, ids_N, temperature=temperature, mask_N=mask_N)


def _rows(logits):
    """[N, V] with stride 1 along V."""
    logits_NV = logits.reshape(-1, logits.shape[-1])
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()


class _TopLogProb(torch.autograd.Function):
    """(logits_NV, ids_NK, mask_NK, temperature) -> logp_NK, in two reads of the logits whatever K.

    With b the likeliest token of a row:  logp_k = (z_k - z_b) / T + logp_b
    dlogits_j = (g_j - G p_j) / T,  g_j = sum of dlogp_k where id_k = j,  G = sum_k dlogp_k
    The kernel's gradient of G logp_b is this wherever g_j = 0, but at b; there and at the ids it is written over.
    """

    @staticmethod
    def forward(ctx, logits_NV, ids_NK, mask_NK, temperature):
        best_N1 = logits_NV.argmax(1, keepdim=True)
        ids_NJ = torch.cat((ids_NK, best_N1), 1)
        z_NJ = logits_NV.gather(1, ids_NJ)
        z_NJ = z_NJ if z_NJ.dtype == torch.float64 else z_NJ.float()
        logp_N = _logprob(logits_NV, best_N1[:, 0], temperature)
        logp_NJ = (z_NJ - z_NJ[:, -1:]) / temperature + logp_N[:, None]
        ctx.temperature = temperature
        ctx.save_for_backward(logits_NV, ids_NJ, mask_NK, logp_NJ)
        return torch.where(mask_NK, logp_NJ[:, :-1], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_NK):
        logits_NV, ids_NJ, mask_NK, logp_NJ = ctx.saved_tensors
        g_NJ = torch.nn.functional.pad(torch.where(mask_NK, dlogp_NK, 0.0), (0, 1))
        total_N1 = g_NJ.sum(1, keepdim=True)
        with torch.enable_grad():
            logits_NV = logits_NV.detach().requires_grad_()
            logp_N = _logprob(logits_NV, ids_NJ[:, -1], ctx.temperature, mask_NK.any(1))
        (dlogits_NV,) = torch.autograd.grad(logp_N, logits_NV, total_N1[:, 0])
        own_NJ = _sum_of_equal(ids_NJ, g_NJ)
        grad_NJ = (own_NJ - total_N1 - total_N1 * torch.expm1(logp_NJ)) / ctx.temperature  # no cancellation at p = 1
        grad_NJ = torch.where(mask_NK.any(1, keepdim=True), grad_NJ, 0.0)
        return dlogits_NV.scatter_(1, ids_NJ, grad_NJ.to(dlogits_NV.dtype)), None, None, None


def _sum_of_equal(ids_NJ, values_NJ):
    """Per entry the sum of the values of all entries of its row with the same id."""
    sorted_NJ, order_NJ = ids_NJ.sort(dim=1, stable=True)
    group_NJ = torch.nn.functional.pad(sorted_NJ.diff(dim=1) != 0, (1, 0)).cumsum(1)
    group_NJ = torch.empty_like(group_NJ).scatter_(1, order_NJ, group_NJ)
    return torch.zeros_like(values_NJ).scatter_add_(1, group_NJ, values_NJ).gather(1, group_NJ)


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    """TRL's: logits [.., V] float, index [..] or [.., K] int64 or int32 -> log-probabilities fp32, shaped as index.

    Of logits / temperature. row_mask, of any dtype, is broadcast to index: where it is 0 the value is 0, the index is
    not read, and no gradient flows. ValueError for a wrong shape, dtype or temperature, or (on a CPU; on a GPU the
    value is NaN) an index outside the vocabulary.
    """
    temperature = float(temperature)
    check_temperature(temperature, None, None)
    logits_NV, index = _rows(logits), index.long() if index.dtype == torch.int32 else index
    mask = None if row_mask is None else (row_mask != 0).broadcast_to(index.shape)
    if index.shape == logits.shape[:-1]:
        mask_N = None if mask is None else mask.reshape(-1)
        return _logprob(logits_NV, index.reshape(-1), temperature, mask_N).view(index.shape)
    if index.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"index must have shape {list(logits.shape[:-1])}, or K more, got {list(index.shape)}")
    check("index", index, index.shape, (torch.int64,), logits.device)
    ids_NK = index.reshape(len(logits_NV), index.shape[-1])
    mask_NK = torch.ones_like(ids_NK, dtype=torch.bool) if mask is None else mask.reshape(ids_NK.shape)
    ids_NK, bad_NK = safe_ids(ids_NK, logits.shape[-1], mask_NK)
    logp_NK = _TopLogProb.apply(logits_NV, ids_NK, mask_NK, temperature)
    return logp_NK.masked_fill(bad_NK, float("nan")).view(index.shape)


def logprobs_from_logits(logits, labels, inplace_backward=True):
    """verl's: logits [.., V] float, labels [..] int64 -> log-probabilities [..] fp32.

    inplace_backward is accepted and has no effect: the gradient is a new tensor, the logits stay whole.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must have shape {list(logits.shape[:-1])}, got {list(labels.shape)}")
    return _logprob(_rows(logits), labels.reshape(-1)).view(labels.shape)


class _TRLHead:
    """Called as TRL's ChunkedLogProbFunction is, by the forward that its `add_fused_lm_head` gives a model."""

    @staticmethod
    def apply(hidden_ND, weight_VD, bias_V, ids_N, temperature, chunk_size, softcap, logit_scale, outputs):
        """-> logp_N, entropy_N (None unless in `outputs`), and None for the three that are refused.

        Of logits * logit_scale / temperature, the product in the dtype of autocast where it is on. chunk_size, the
        width of TRL's tiles, has no effect.
        """
        if softcap is not None:
            raise ValueError(f"this model caps its logits at {softcap}, ours do not: train without install_in_trl")
        if others := set(outputs) - {"log_probs", "entropy"}:
            raise ValueError(f"this trainer wants {', '.join(sorted(others))} too: run it without install_in_trl")
        if hasattr(weight_VD, "ds_status"):
            raise ValueError("DeepSpeed's ZeRO-3 takes the head's weight away before the backward needs it: use ZeRO-2")
        device, dtype = hidden_ND.device.type, hidden_ND.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        hidden_ND, weight_VD, bias_V = (x if x is None else x.to(dtype) for x in (hidden_ND, weight_VD, bias_V))
        options = {"bias_V": bias_V, "temperature": temperature / logit_scale, "entropy": "entropy" in outputs}
        found = _kernels(hidden_ND).linear_logprob(hidden_ND, weight_VD, ids_N, **options)
        logp_N, entropy_N = found if options["entropy"] else (found, None)
        return logp_N, entropy_N, None, None, None


def install_in_trl():
    """From now on, in this process, TRL's GRPOTrainer has its log-probabilities and entropies from `linear_logprob`.

    The policy's, the old policy's and the reference's, of trainers made before or after. TRL's own forward still runs
    the body and reads the head, so that what wraps them (PEFT, DDP, autocast) is as it was. Positions without a label
    never reach the head, on a CPU too. RLOOTrainer and KTOTrainer have theirs from here too, untested. ValueError for
    any TRL but TRL_VERSION; at the first forward for capped logits (Gemma 2), for a trainer that wants more of the head
    (SFTTrainer), and under ZeRO-3.
    """
    version = import_module("trl").__version__
    if version != TRL_VERSION:
        raise ValueError(f"install_in_trl is made for TRL {TRL_VERSION}, got {version}, whose trainers may call others")
    utils = import_module("trl.trainer.utils")
    utils._ChunkedLogProbFunction = _TRLHead
    utils._use_triton = lambda device: True  # there it only decides whether positions without a label are left out
