"""The matrix products of fp32 on a CPU: exact as torch's, whichever library makes them, and known to few shapes."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

from kernels import chunked, eager, products
from tests.kernel_cases import head_of

needs_onednn = pytest.mark.skipif(not products.LINEAR, reason="torch takes no oneDNN with AVX-512 on this machine")
ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((1, 1, 1), (2, 3, 5), (16, 128, 64), (47, 33, 620), (300, 129, 17), (400, 20, 90))
SMALL = products.SMALL


@pytest.fixture(autouse=True)
def onednn_makes_all(monkeypatch):
    """On Intel's processors too, and however small."""
    monkeypatch.setattr(products, "ONEDNN", products.LINEAR)
    monkeypatch.setattr(products, "SMALL", 1)


def error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def leaves_of(M, D, V, dtype=torch.float32, bias=True):
    gen = torch.Generator().manual_seed(M)
    draw = lambda *shape: torch.randn(shape, generator=gen).to(dtype)
    return [x.requires_grad_() for x in (draw(M, D), draw(V, D), *([draw(V)] if bias else []))], draw(M, V)


def run(linear, leaves, dy):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("bias", (True, False))
def test_value_and_gradients_are_as_near_fp64_as_torchs(bias):
    for shape in SHAPES:
        leaves, dy = leaves_of(*shape, bias=bias)
        truth = run(F.linear, [x.double() for x in leaves], dy.double())
        for ours, theirs, exact in zip(run(products.linear, leaves, dy), run(F.linear, leaves, dy), truth):
            assert ours.shape == exact.shape and ours.dtype == torch.float32
            assert error(ours, exact) <= 2 * error(theirs, exact) + 1e-7, shape


def test_any_strides_and_leading_axes():
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 8, 20, generator=gen)[::2, :, ::2], torch.randn(30, 10, generator=gen).T[:, ::3]
    bias = torch.randn(20, generator=gen)[::2]
    assert torch.allclose(products.product(a[0], b, bias), a[0] @ b + bias, atol=1e-5)
    assert torch.allclose(products.product(a[0].T, a[1, :, :4]), a[0].T @ a[1, :, :4], atol=1e-5)
    (x, w, c), dy = leaves_of(6, 4, 3)
    ours, theirs = run(products.linear, (x.view(3, 2, 4), w, c), dy.view(3, 2, 3)), run(F.linear, (x, w, c), dy)
    assert all(torch.allclose(a.flatten(), b.flatten(), atol=1e-5) for a, b in zip(ours, theirs))
    assert torch.allclose(products.linear(a, b.T), a @ b, atol=1e-5)


def test_what_comes_out_may_be_changed_in_place():
    (x, w, _), dy = leaves_of(6, 4, 3)
    y = products.linear(x.view(3, 2, 4), w).mul_(2)
    (y * dy.view_as(y)).sum().backward()
    assert torch.allclose(w.grad, 2 * dy.T @ x, atol=1e-5)


@needs_onednn
def test_small_products_are_torchs(monkeypatch):
    monkeypatch.setattr(products, "SMALL", SMALL)
    for M, named in ((16, "aten::mm"), (32, "mkldnn::_linear_pointwise")):
        (x, w, _), _ = leaves_of(M, 128, 768)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            products.product(x, w.T)
        assert [e.name for e in profile.events() if e.name in ("aten::mm", "mkldnn::_linear_pointwise")] == [named]


def test_nothing_in_gives_what_torch_gives():
    for M, D, V in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        leaves, dy = leaves_of(M, D, V)
        for ours, theirs in zip(run(products.linear, leaves, dy), run(F.linear, leaves, dy)):
            assert torch.equal(ours, theirs), (M, D, V)


def test_nan_and_inf_go_through():
    x = torch.zeros(2, 3)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    y = products.linear(x, torch.ones(2, 3))
    assert y[0].isnan().all() and y[1].isinf().all()


def test_only_the_gradients_that_are_wanted_are_made(monkeypatch):
    made, product = [], products.product
    monkeypatch.setattr(products, "product", lambda *args: (made.append(args[0].shape), product(*args))[1])
    for needs, count in (((True, False), 2), ((False, True), 2), ((True, True), 3), ((False, False), 1)):
        (x, w, _), dy = leaves_of(8, 4, 3)
        made.clear()
        y = products.linear(x.requires_grad_(needs[0]), w.requires_grad_(needs[1]))
        if any(needs):
            y.backward(dy)
        assert len(made) == (count if products.ONEDNN else 0), needs
    with torch.no_grad():
        assert not products.linear(*leaves_of(8, 4, 3)[0]).requires_grad


def test_a_frozen_weight_keeps_no_activation():
    (x, w, _), _ = leaves_of(8, 4, 3)
    hidden = x * 1
    seen = weakref.ref(hidden)
    y = products.linear(hidden, w.requires_grad_(False))
    del hidden
    assert seen() is None and y.requires_grad


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_other_dtypes_are_torchs(dtype):
    (x, w, b), _ = leaves_of(5, 4, 3, dtype)
    assert torch.equal(products.linear(x, w, b), F.linear(x, w, b))


def test_autocast_is_torchs():
    (x, w, b), _ = leaves_of(5, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, w, b).dtype == torch.bfloat16


def test_a_wrong_shape_is_refused():
    with pytest.raises(RuntimeError):
        products.linear(torch.zeros(2, 3), torch.zeros(4, 5))


def test_torch_compile_takes_it():
    leaves, dy = leaves_of(16, 8, 4)
    compiled = torch.compile(lambda *x: 2 * products.linear(*x), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled, leaves, dy), run(lambda *x: 2 * F.linear(*x), leaves, dy)):
        assert torch.allclose(ours, theirs, atol=1e-5)


@needs_onednn
@pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 13), reason="torch before 2.13 has a oneDNN that sums few rows otherwise"
)
def test_a_row_does_not_depend_on_how_many_others_there_are():
    x, w = torch.randn(64, 128), torch.randn(96, 128)
    whole = products.linear(x, w)
    for M in (2, 16, 17, 63):
        assert torch.equal(products.linear(x[:M], w), whole[:M])


def test_without_avx512_torchs_products_are_taken():
    code = (
        "import torch; from torch.nn.functional import linear; from kernels import products;"
        "assert not products.ONEDNN; x = torch.randn(400, 300); w = torch.randn(200, 300);"
        "assert torch.equal(products.linear(x, w), linear(x, w))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)


def test_the_head_shows_few_shapes_to_the_library(monkeypatch):
    """Rows are filled up to whole tiles; what fills them changes nothing, also where a bias bans a token."""
    shapes, product = set(), products.product
    monkeypatch.setattr("kernels.head.product", lambda a, b, bias=None: (shapes.add(a.shape), product(a, b, bias))[1])
    for N in range(33, 49):
        hidden, weight, ids = head_of(N, 40, 8, torch.float32, "cpu")
        bias = torch.zeros(40).index_fill_(0, torch.tensor([7]), -torch.inf)
        ids = ids.where(ids != 7, 8)
        grads = []
        for impl in (eager, chunked):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
            impl.linear_logprob(leaves[0], leaves[1], ids, bias_V=leaves[2]).sum().backward()
            grads.append([x.grad for x in leaves])
        for ours, theirs in zip(*reversed(grads)):
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert len(shapes) == 3
