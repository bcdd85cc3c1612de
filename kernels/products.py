"""Matrix products of fp32 on a CPU by oneDNN, as torch's bf16 ones are; anything else goes to torch as it is.

torch hands fp32 to MKL, which on a CPU that is not Intel's stops at AVX2; oneDNN, in the same torch, takes AVX-512,
which is up to twice as fast (`python -m bench.run linear`). On Intel's MKL makes the products: at batches of a small
model in 3 to 17% less time. oneDNN prepares itself for each shape it meets, and keeps that, about a MB a shape, for the
last thousand: fill rows up to whole tiles where their number varies.
ATEN_CPU_CAPABILITY=avx2 in the environment turns it off. M rows, D inputs, V outputs.
Oracle: torch.nn.functional.linear in fp64.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
CPUINFO = Path("/proc/cpuinfo")
INTEL = CPUINFO.exists() and "GenuineIntel" in CPUINFO.read_text()
LINEAR = torch.ops.mkldnn._linear_pointwise.default if AVX512 else None
"""oneDNN's (x [..., D], weight [V, D], bias or None, "none", [], "") -> [..., V]."""
ONEDNN = None if INTEL else LINEAR
"""That which is taken; None: torch's own products are."""
TILE = 16
"""Rows that a caller does well to make whole multiples of."""
SMALL = 1 << 21
"""Multiplications below which a call of oneDNN costs more than it saves."""


def round_up(n, unit=TILE):
    return -(-n // unit) * unit


def _suits(a, b, V):
    """Whether oneDNN makes the product of a and b, which has V columns."""
    large = ONEDNN is not None and a.numel() * V >= SMALL
    return large and a.dtype == b.dtype == torch.float32 and a.is_cpu and b.is_cpu


def product(a_MD, b_DV, bias_V=None):
    """a @ b + bias, [M, V] in the inputs' dtype; any strides, without autograd. RuntimeError as torch.mm's."""
    if _suits(a_MD, b_DV, b_DV.shape[1]):
        return ONEDNN(a_MD, b_DV.T, bias_V, "none", [], "")
    return a_MD @ b_DV if bias_V is None else F.linear(a_MD, b_DV.T, bias_V)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, weight_VD, bias_V):
        dx, dweight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_MD if dweight else None, weight_VD if dx else None)
        return product(x_MD, weight_VD.T, bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MV):
        x_MD, weight_VD = ctx.saved_tensors
        dx, dweight, dbias = ctx.needs_input_grad
        return (
            product(dy_MV, weight_VD) if dx else None,
            _outer(dy_MV, x_MD) if dweight else None,
            dy_MV.sum(0) if dbias else None,
        )


def _outer(dy_MV, x_MD):
    """dy^T x. oneDNN copies a left factor that is transposed, and autograd such a gradient: the less of both."""
    (M, V), D = dy_MV.shape, x_MD.shape[1]
    return product(x_MD.T, dy_MV).T if (M + V) * D < M * V else product(dy_MV.T, x_MD)


def linear(x, weight_VD, bias_V=None):
    """torch.nn.functional.linear, x [..., D] -> [..., V].

    Where oneDNN makes it, its gradient has no gradient and torch.func does not take it. Under autocast and inside
    torch.compile it is torch's own.
    """
    compiling = torch.compiler.is_compiling()  # first: a size compared there would be a guard
    if compiling or not _suits(x, weight_VD, len(weight_VD)) or _needs_torch(x, weight_VD):
        return F.linear(x, weight_VD, bias_V)
    if not torch.is_grad_enabled():
        return ONEDNN(x, weight_VD, bias_V, "none", [], "")
    y_MV = _Linear.apply(x.flatten(0, -2), weight_VD, bias_V)
    return torch.ops.aten._unsafe_view(y_MV, (*x.shape[:-1], len(weight_VD)))  # no view: it may be changed in place


def _needs_torch(x, weight_VD):
    return torch.is_autocast_enabled("cpu") or x.dim() < 2 or weight_VD.dim() != 2
