"""The linear layers of a model on a CPU, forward and backward."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import products

from .harness import Benchmark, Rival, Work, gradients


class Size(NamedTuple):
    """Rows, inputs, outputs."""

    M: int
    D: int
    V: int


def make_inputs(size, dtype, device):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device=device).to(dtype).requires_grad_()
    return {"x_MD": draw(size.M, size.D), "weight_VD": draw(size.V, size.D), "dy_MV": draw(size.M, size.V).detach()}


def of(linear):
    """A form of torch.nn.functional.linear -> the build of a Rival."""

    def build(inputs):
        def run():
            y_MV = linear(inputs["x_MD"], inputs["weight_VD"])
            return {"y_MV": y_MV.detach(), **gradients(y_MV, inputs, ("x_MD", "weight_VD"), inputs["dy_MV"])}

        return run

    return build


def truth(inputs, task):
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    return of(F.linear)(wide)()


def count_work(size, itemsize, task):
    M, D, V = size
    return Work(6 * M * D * V, 2 * (2 * M * D + 2 * V * D + 2 * M * V) * itemsize)


BENCH = Benchmark(
    sizes={
        "small": [Size(32, 16, 48)],
        "cpu": [Size(M, D, V) for D, V in ((128, 768), (896, 4864)) for M in (64, 1024)],
        "cuda": [],
    },
    dtypes=("fp32",),
    inputs=make_inputs,
    truth=truth,
    work=count_work,
    rivals={
        "eager": Rival(of(F.linear), note="torch.nn.functional.linear"),
        "ours": Rival(of(products.linear), note="oneDNN; on Intel torch's own"),
    },
)
