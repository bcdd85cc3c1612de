"""kernels/drop_in.py: TRL's and verl's functions by their signatures, against plain torch in fp64.

test_drop_in_trl.py holds `install_in_trl` against TRL itself; here a module of TRL's name stands for it.
"""

import inspect
import sys
import types

import pytest
import torch

from kernels import drop_in
from kernels.drop_in import logprobs_from_logits, selective_log_softmax
from tests.kernel_cases import assert_close_as_eager

V = 37
FORMS = {  # shape of the rows, K; K of -3: three, two of them the same token
    "rows": ((5,), None),
    "batch": ((2, 3), None),
    "one": ((), None),
    "top 1": ((2, 3), 1),
    "top 4": ((5,), 4),
    "twice": ((2, 3), -3),
    "one, top 2": ((), 2),
    "no rows": ((0, 3), 2),
    "no tokens": ((3,), 0),
}


def inputs(shape, K, dtype, scale=4.0):
    gen = torch.Generator().manual_seed(3)
    logits = (torch.randn(*shape, V, generator=gen) * scale).to(dtype)
    index = torch.randint(V, shape if K is None else (*shape, abs(K)), generator=gen)
    if K is not None and K < 0:
        index[..., 1] = index[..., 0]
    return logits, index, torch.randn(index.shape, generator=gen)


def plain(logits, index, temperature=1.0, row_mask=None):
    """What TRL's docstring says, in fp32 or fp64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = (logits / temperature).log_softmax(-1)
    logp = logp.gather(-1, index if index.dim() == logits.dim() else index[..., None]).view(index.shape)
    return logp if row_mask is None else logp.masked_fill(row_mask == 0, 0.0)


def value_and_gradient(fn, logits, index, g, **kwargs):
    logits = logits.detach().requires_grad_()
    logp = fn(logits, index, **kwargs)
    (dlogits,) = torch.autograd.grad(logp, logits, g.to(logp.dtype))
    return logp.detach(), dlogits


def assert_close_to_plain(ours, *inputs, **kwargs):
    logits, *rest = inputs
    truth, base = (value_and_gradient(plain, x, *rest, **kwargs) for x in (logits.double(), logits))
    if logits.dtype == torch.float64:  # the baseline is the truth
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-14)
    else:
        assert_close_as_eager("logp dlogits", truth, base, ours)


@pytest.mark.parametrize(
    "temperature, masked",
    [(1.0, None), (0.7, None), (3, None), (1.0, torch.bool), (0.7, torch.int64), (3, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_log_softmax_and_gather(dtype, form, temperature, masked):
    logits, index, g = inputs(*FORMS[form], dtype)
    kwargs = {"temperature": temperature}
    if masked is not None:
        kwargs["row_mask"] = (torch.arange(index.numel()).view(index.shape) % 3 != 1).to(masked)
    ours = value_and_gradient(selective_log_softmax, logits, index, g, **kwargs)
    assert ours[0].shape == index.shape and ours[1].dtype == dtype
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_to_plain(ours, logits, index, g, **kwargs)


@pytest.mark.parametrize("K", [None, 2])
def test_where_the_mask_is_0_nothing_is_read(K):
    logits, index, g = inputs((4, 3), K, torch.float32)
    row_mask = torch.ones_like(index)
    row_mask[1], index[1], logits[1] = 0, -100, float("nan")
    if K:  # a single token of a row that counts
        row_mask[2, 0, 1], index[2, 0, 1] = 0, V + 5
    kept = [0, 2, 3]
    logp, dlogits = value_and_gradient(selective_log_softmax, logits, index, g, row_mask=row_mask)
    assert (logp[row_mask == 0] == 0).all() and (dlogits[1] == 0).all()
    want = value_and_gradient(plain, logits[kept], index[kept].clamp(0, V - 1), g[kept], row_mask=row_mask[kept])
    torch.testing.assert_close((logp[kept], dlogits[kept]), want)


def test_a_mask_may_be_broadcast_and_an_index_int32():
    logits, index, _ = inputs((4, 3), 2, torch.float32)
    row_mask = torch.tensor([1, 0, 1])[:, None]
    want = plain(logits, index, row_mask=row_mask)
    torch.testing.assert_close(selective_log_softmax(logits, index.int(), row_mask=row_mask), want)


@pytest.mark.parametrize("K", [None, 3])
def test_slices_and_transposes_are_rows_too(K):
    logits, index, g = inputs((4, 3), K, torch.float32)
    for view in (torch.stack([logits, logits])[:, :, :][1], logits.mT.contiguous().mT):
        torch.testing.assert_close(
            value_and_gradient(selective_log_softmax, view, index, g), value_and_gradient(plain, logits, index, g)
        )


def test_the_likeliest_tokens_of_a_peaked_row_keep_their_digits():
    """1 - p of a token that is almost sure, and the sum of all chosen, which is almost 1, do not cancel."""
    logits = torch.tensor([[30.0, 4.0, 0.0, -float("inf")], [0.0, 0.0, 0.0, 0.0]])
    index, g = torch.tensor([[0, 3], [1, 2]]), torch.ones(2, 2)
    logp, dlogits = value_and_gradient(selective_log_softmax, logits, index, g)
    want = value_and_gradient(plain, logits.double(), index, g)
    assert logp[0, 1] == -float("inf") and dlogits[1].tolist() == [-0.5, 0.5, 0.5, -0.5]
    for ours, truth in zip((logp, dlogits), want):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-15)  # the fp64 one does cancel


def test_bf16_gradients_of_many_tokens_are_rounded_once():
    logits, _, _ = inputs((8,), None, torch.bfloat16, scale=2.0)
    index, g = logits.topk(30).indices, torch.ones(8, 30)
    ours = value_and_gradient(selective_log_softmax, logits, index, g)[1]
    truth = value_and_gradient(plain, logits.double(), index, g)[1]
    assert ((ours.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-5).all()


def test_signatures_are_theirs():
    """Of TRL 1.16.0 and verl 0.9.1, as requirements-bench.txt pins them."""
    show = lambda fn: {p.name: p.default for p in inspect.signature(fn).parameters.values()}
    needed = inspect.Parameter.empty
    assert show(selective_log_softmax) == {"logits": needed, "index": needed, "temperature": 1.0, "row_mask": None}
    assert show(logprobs_from_logits) == {"logits": needed, "labels": needed, "inplace_backward": True}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_verls_function_leaves_the_logits_whole(dtype):
    logits, labels, g = inputs((2, 3), None, dtype)
    kept = logits.clone()
    ours = value_and_gradient(logprobs_from_logits, logits, labels, g, inplace_backward=True)
    assert_close_to_plain(ours, logits, labels, g)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": 0}, "temperature must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, "index must have shape"),
        ({"index": torch.zeros(3, 2, 2, dtype=torch.int64)}, "index must have shape"),
        ({"index": torch.zeros(2, 3)}, "must be torch.int64"),
        ({"index": torch.zeros(2, 3, 4)}, "index must be torch.int64"),
        ({"index": torch.full((2, 3), V)}, f"must lie in .0, {V}., got {V}"),
        ({"index": torch.full((2, 3, 2), -1)}, f"must lie in .0, {V}., got -1"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    logits, index, _ = inputs((2, 3), None, torch.float32)
    with pytest.raises(ValueError, match=words):
        selective_log_softmax(**({"logits": logits, "index": index} | change))
    with pytest.raises(ValueError, match="labels must have shape"):
        logprobs_from_logits(logits, index[:, :-1])


def test_many_tokens_cost_one_call_of_the_kernel(monkeypatch):
    calls = []
    counted = types.SimpleNamespace(logprob=lambda *a, **k: calls.append(1) or chunked(*a, **k))
    chunked = drop_in.chunked.logprob
    monkeypatch.setattr(drop_in, "chunked", counted)
    logits, index, _ = inputs((2, 3), 20, torch.float32)
    selective_log_softmax(logits, index)
    assert len(calls) == 1


@pytest.fixture
def fake_trl(monkeypatch):
    """Of TRL, present or not, what `install_in_trl` looks at."""
    package, utils = types.ModuleType("trl"), types.ModuleType("trl.trainer.utils")
    package.__version__, utils._ChunkedLogProbFunction, utils._use_triton = "1.16.0", "theirs", "theirs"
    monkeypatch.setitem(sys.modules, "trl", package)
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", utils)
    return types.SimpleNamespace(package=package, utils=utils)


def test_another_trl_is_refused_and_left_alone(fake_trl):
    fake_trl.package.__version__ = "1.17.0"
    with pytest.raises(ValueError, match="made for TRL 1.16.0, got 1.17.0"):
        drop_in.install_in_trl()
    assert fake_trl.utils._ChunkedLogProbFunction == fake_trl.utils._use_triton == "theirs"


HEAD = {"temperature": 1.0, "chunk_size": 32768, "softcap": None, "logit_scale": 1.0, "outputs": ("log_probs",)}


def head_inputs(weight_type=torch.Tensor):
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=gen), torch.randn(V, 8, generator=gen)
    return hidden, weight.as_subclass(weight_type), torch.randn(V, generator=gen), torch.randint(V, (6,), generator=gen)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")], ids=str)
def test_the_head_given_to_trl_is_linear_log_softmax_and_gather(fake_trl, outputs):
    drop_in.install_in_trl()
    *head, ids = head_inputs()
    options = {**HEAD, "temperature": 0.7, "logit_scale": 1.5, "outputs": outputs}
    logp, entropy, *others = fake_trl.utils._ChunkedLogProbFunction.apply(*head, ids, *options.values())
    logits = torch.nn.functional.linear(*(x.double() for x in head)) * 1.5 / 0.7
    torch.testing.assert_close(logp.double(), plain(logits, ids), rtol=1e-6, atol=1e-6)
    if "entropy" in outputs:
        want = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(entropy.double(), want, rtol=1e-6, atol=1e-6)
    assert others == [None] * 3 and (entropy is None) == ("entropy" not in outputs)


class Partitioned(torch.Tensor):
    ds_status = "as DeepSpeed's ZeRO-3 marks a parameter"


@pytest.mark.parametrize(
    "change, weight_type, words",
    [
        ({"softcap": 30.0}, torch.Tensor, "caps its logits at 30.0"),
        ({"outputs": ("log_probs", "entropy", "is_top1")}, torch.Tensor, "wants is_top1 too"),
        ({}, Partitioned, "ZeRO-3"),
    ],
)
def test_what_trls_head_would_do_and_ours_does_not_is_refused(change, weight_type, words):
    *head, ids = head_inputs(weight_type)
    with pytest.raises(ValueError, match=words):
        drop_in._TRLHead.apply(*head, ids, *{**HEAD, **change}.values())
