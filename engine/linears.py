"""Linears: what a loaded model's matrix products are, forward and gradient; the one seam where that is decided.

`convert` gives all of them the products of kernels.products; `adapt` puts thin trained factors beside a frozen one:

  y = W x + b + scale B A x     (LoRA, arXiv 2106.09685; A [R, D], B [V, R], W [V, D])

Axes: M rows, D inputs, V outputs, R rank. Oracle: peft.
"""

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import Config
from engine.errors import UserError
from engine.hints import nearest
from kernels import products


class Linear(nn.Linear):
    def forward(self, x):
        return products.linear(x, self.weight, self.bias)


class Adapted(Linear):
    """Made by `adapt`."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    dropout: float  # of what goes into A
    off: bool = False  # the base alone

    def forward(self, x):
        if self.off:
            return super().forward(x)
        x_MD = x.flatten(0, -2)
        y_MV = super().forward(x_MD)
        inner_MR = products.linear(F.dropout(x_MD, self.dropout, self.training), self.lora_A)
        y_MV.addmm_(inner_MR, self.lora_B.T, alpha=self.scale)  # in place: else a GPU copies y first
        return y_MV.view(*x.shape[:-1], -1)


def convert(lm: nn.Module, config: Config) -> nn.Module:
    """`lm`, its linears from now on those that the settings ask for: today always the products of kernels.products.

    Once behind loading, before copies are made: so policy, replica and reference compute alike."""
    for module in lm.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return lm


def adapt(linear: nn.Linear, a_RD: Tensor, b_VR: Tensor, scale: float) -> None:
    """Puts these factors beside a linear, as fp32 parameters that are trained."""
    linear.__class__ = Adapted
    linear.lora_A, linear.lora_B = (nn.Parameter(x.float()) for x in (a_RD, b_VR))
    linear.scale, linear.dropout = scale, 0.0


def adapted(lm: nn.Module) -> dict[str, Adapted]:
    """The linears that have factors beside them, by name."""
    return {name: module for name, module in lm.named_modules() if isinstance(module, Adapted)}


def freeze(lm: nn.Module) -> nn.Module:
    """`lm`, of which from now on only the factors are trained."""
    lm.requires_grad_(False)
    for linear in adapted(lm).values():
        linear.lora_A.requires_grad_(True)
        linear.lora_B.requires_grad_(True)
    return lm


@contextlib.contextmanager
def adapters_off(lm: nn.Module) -> Iterator[None]:
    """`lm` computes as its base alone."""
    linears = adapted(lm).values()
    try:
        for linear in linears:
            linear.off = True
        yield
    finally:
        for linear in linears:
            linear.off = False


def named(lm: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Linear]:
    """The linears of the body that a pattern names, all of them where there is none.

    A pattern is the end of a name, from a dot on, or all of it, with *, ? and [] as in file names: q_proj,
    layers.0.*, model.layers.[0-3].mlp.*_proj. UserError for one that names no linear of the body."""
    linears = {f"model.{name}": x for name, x in lm.model.named_modules() if isinstance(x, nn.Linear)}
    found = {p: [name for name in linears if _names(p, name)] for p in patterns}
    for pattern, names in found.items():
        if not names:
            raise UserError(_names_none(pattern, linears))
    wanted = {name for names in found.values() for name in names} if found else linears
    return {name: x for name, x in linears.items() if name in wanted}


def _names(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _names_none(pattern: str, linears: Iterable[str]) -> str:
    for rest in ("lm_head", "model.embed_tokens"):
        if _names(pattern, rest):
            return (
                f"lora_targets {pattern!r} names {rest}; only linears of the layers take an adapter, so leave it out."
            )
    if pattern == "all-linear":
        return "lora_targets all-linear is what it is without: leave it out."
    if "," in pattern:
        return f"lora_targets {pattern!r} must be written apart: {pattern.replace(',', ' ')}."
    last = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    near = nearest(pattern, [*last, *linears])
    return f"lora_targets {pattern!r} names no linear of the model; its layers have {', '.join(last)}.{near}"
