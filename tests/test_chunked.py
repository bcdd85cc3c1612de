"""The memory-lean form against the oracle: the shared cases, then its own promises: products, memory, gradients."""

import pytest
import torch

from kernels import chunked, eager, head
from kernels.spec import SurrogateSpec
from tests.kernel_cases import CASES, LEAN_CASES, gradients, head_of, products_are_counted
from tests.test_eager import check_gradients


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_case(case):
    case(chunked, "cpu")


@pytest.mark.parametrize("case", LEAN_CASES, ids=lambda case: case.__name__)
def test_lean_case(case, monkeypatch):
    case(chunked, "cpu", lambda size: monkeypatch.setitem(head.SLAB_BYTES, "cpu", size))


def test_products_are_counted():
    products_are_counted(chunked, "cpu")


def test_gradcheck(monkeypatch):
    monkeypatch.setitem(head.SLAB_BYTES, "cpu", 2 * 7 * 8)
    check_gradients(chunked)


def test_rounded_logits_do_not_round_the_likely_tokens():
    for scale in (3.0, 9.0):  # flat and peaked rows; largest logits about 15 and 45
        hidden, weight, ids = head_of(256, 4000, 64, torch.bfloat16, "cpu", scale=scale)
        truth = eager.linear_logprob(hidden.double(), weight.double(), ids)
        ours, plain = ((impl.linear_logprob(hidden, weight, ids) - truth).abs().max() for impl in (chunked, eager))
        assert ours <= plain / 4


def test_scratch_blocks_do_not_matter(monkeypatch):
    logits, ids = torch.randn(37, 50), torch.randint(0, 50, (37,))
    run = lambda: gradients(lambda z: chunked.logprob(z, ids, entropy=True), logits)
    whole = run()
    monkeypatch.setitem(chunked.SCRATCH_BYTES, "cpu", 3 * 50 * 4)
    assert all(torch.equal(x, y) for x, y in zip(whole, run()))


def test_spec_refuses_nonsense():
    for wrong in ({"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}, {"importance_cap": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SurrogateSpec(**wrong)
