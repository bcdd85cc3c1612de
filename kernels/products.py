"""Matrix products of fp32 on a CPU by oneDNN, as torch's bf16 ones are; anything else goes to torch as it is.

torch hands fp32 to MKL, which on a CPU that is not Intel's stops at AVX2; oneDNN, in the same torch, takes AVX-512,
which is up to twice as fast (`python -m bench.run linear`). It prepares itself for each shape it meets, and keeps about
a MB of the last thousand: fill rows up to whole tiles where their number varies. ATEN_CPU_CAPABILITY=avx2 in the
environment turns it off. M rows, D inputs, V outputs. Oracle: torch.nn.functional.linear in fp64.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)

TILE = 16
"""Rows that a caller does well to make whole multiples of."""


def round_up(n, unit=TILE):
    return -(-n // unit) * unit


def _by_onednn(*inputs):
    return ONEDNN and all(x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() for x in inputs)


def product(a_MD, b_DV, bias_V=None):
    """a @ b + bias, [..., V] in the inputs' dtype; any strides, without autograd. RuntimeError as torch.matmul's."""
    if _by_onednn(a_MD, b_DV):
        return torch.ops.mkldnn._linear_pointwise(a_MD, b_DV.mT, bias_V, "none", [], "")
    return a_MD @ b_DV if bias_V is None else F.linear(a_MD, b_DV.mT, bias_V)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, weight_VD, bias_V):
        ctx.save_for_backward(x_MD, weight_VD)
        return product(x_MD, weight_VD.T, bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MV):
        x_MD, weight_VD = ctx.saved_tensors
        dx, dweight, dbias = ctx.needs_input_grad
        return (
            product(dy_MV, weight_VD) if dx else None,
            _outer(dy_MV.flatten(0, -2), x_MD.flatten(0, -2)) if dweight else None,
            dy_MV.flatten(0, -2).sum(0) if dbias else None,
        )


def _outer(dy_MV, x_MD):
    """dy^T x; the narrow one stands on the left, since oneDNN copies a left factor that is transposed."""
    if dy_MV.shape[1] <= x_MD.shape[1]:
        return product(dy_MV.T, x_MD)
    return product(x_MD.T, dy_MV).T


def linear(x_MD, weight_VD, bias_V=None):
    """torch.nn.functional.linear, [..., D] -> [..., V]; its gradient has no gradient where oneDNN makes it.

    Under autocast and inside torch.compile it is torch's own.
    """
    torchs = x_MD.dim() < 2 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if torchs or not _by_onednn(x_MD, weight_VD):
        return F.linear(x_MD, weight_VD, bias_V)
    if torch.is_grad_enabled():
        return _Linear.apply(x_MD, weight_VD, bias_V)
    return product(x_MD, weight_VD.T, bias_V)
