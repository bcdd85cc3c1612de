"""The memory-lean form against the oracle: the shared cases, then its own promises: products, memory, gradients."""

import pytest
import torch

from kernels import chunked, eager, head, linear, objective
from kernels.spec import MatchSpec, SurrogateSpec
from tests.kernel_cases import (
    CASES,
    CHUNK_CASES,
    CUDA_CASES,
    DEVICES,
    FULL,
    KL,
    LEAN_CASES,
    MSE,
    assert_close_as_eager,
    double,
    gradients,
    head_of,
    loss_and_gradients,
    poisoned_memory,
    rows_near,
    rows_of,
)
from tests.test_eager import check_gradients


@pytest.fixture(autouse=True)
def poison():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES + LEAN_CASES, ids=lambda case: case.__name__)
def test_case(case, device):
    case(chunked, device)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.__name__)
def test_cuda_case(case, device):
    case(chunked, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CHUNK_CASES, ids=lambda case: case.__name__)
def test_chunk_case(case, device, monkeypatch):
    case(chunked, device, lambda size: monkeypatch.setitem(head.SLAB_BYTES, device, size))


def test_gradcheck(monkeypatch):
    monkeypatch.setitem(head.SLAB_BYTES, "cpu", 2 * 7 * 8)
    check_gradients(chunked)


def test_rounded_logits_do_not_round_the_likely_tokens():
    for scale in (3.0, 9.0):  # flat and peaked rows; largest logits about 15 and 45
        hidden, weight, ids = head_of(256, 4000, 64, torch.bfloat16, "cpu", scale=scale)
        truth = eager.linear_logprob(hidden.double(), weight.double(), ids)
        ours, plain = ((impl.linear_logprob(hidden, weight, ids) - truth).abs().max() for impl in (chunked, eager))
        assert ours <= plain / 4


def test_rounded_logits_under_the_whole_loss():
    hidden, weight, ids = head_of(64, 4000, 64, torch.bfloat16, "cpu")
    vectors = rows_near(hidden, weight, ids)
    results = [loss_and_gradients(eager, double(hidden, weight), ids, double(*vectors), FULL)]
    results += [loss_and_gradients(impl, (hidden, weight), ids, vectors, FULL) for impl in (eager, chunked)]
    pick = lambda r: [r[0], r[1], *r[3:]]
    assert_close_as_eager("loss logp dhidden dweight", *map(pick, results))


def test_rows_the_host_cannot_count_enter_as_zeros():
    """What a GPU does without rows_M: rows of weight 0 stay in the products and give exactly nothing."""
    hidden, weight, ids = head_of(20, 50, 8, torch.float32, "cpu")
    vectors = rows_of(20, "cpu")
    want = loss_and_gradients(chunked, (hidden, weight), ids, vectors, FULL)
    live = vectors.weight != 0
    hidden[~live] = float("nan")
    rows, needs = (None, live, ids, ids < 0, None), (True, True, False)
    ours = linear.surrogate_forward(chunked._passes(True), hidden, weight, *rows, vectors, FULL, False, needs)
    for x, y in zip(want, ours):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)
    assert ours[3][~live].eq(0).all()


@pytest.mark.parametrize("spec", [MSE, KL], ids=lambda spec: spec.match)
def test_a_row_own_id_among_the_teachers_has_one_gradient(spec):
    """Whichever of the two is written last."""
    student, teacher = (torch.randn(5, 6).log_softmax(1)[:, :4] for _ in range(2))
    own, every = torch.eye(5, 4, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    logp = torch.cat((student.diagonal() + 0.01, torch.tensor([-2.0])))
    rest = torch.rand(5), spec
    *_, exact, _ = objective.match_rows(logp, student, teacher, own, *rest, counted_N=every, bad_N=~every)
    assert torch.equal(exact[:4, 0], exact[:4, 1:].diagonal()) and exact.ne(0).all()


def test_scratch_blocks_do_not_matter(monkeypatch):
    logits, ids = torch.randn(37, 50), torch.randint(0, 50, (37,))
    run = lambda: gradients(lambda z: chunked.logprob(z, ids, entropy=True), logits)
    whole = run()
    monkeypatch.setitem(chunked.SCRATCH_BYTES, "cpu", 3 * 50 * 4)
    assert all(torch.equal(x, y) for x, y in zip(whole, run()))


def test_spans_of_the_surrogate_do_not_matter(monkeypatch):
    old, adv, weight, ref, behaviour = rows_of(1000, "cpu")
    more = dict(logp_ref_N=ref, logp_behaviour_N=behaviour)
    run = lambda: gradients(
        lambda p, e: chunked.clipped_surrogate(p, old, adv, weight, FULL, entropy_N=e, **more), ref, old.abs()
    )
    loss, stats, *grads = run()
    for rows in (1, 7, 300):
        monkeypatch.setitem(chunked.SCRATCH_BYTES, "cpu", rows * chunked.ROW_BYTES)
        assert len(head.spans(1000, chunked.ROW_BYTES, chunked.SCRATCH_BYTES["cpu"])) > 3
        ours = run()
        assert torch.allclose(ours[0], loss, rtol=1e-5) and torch.allclose(ours[1], stats, rtol=1e-5)
        assert all(torch.equal(x, y) for x, y in zip(grads, ours[2:]))


def test_spec_refuses_nonsense():
    for wrong in (
        {"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}, {"importance_cap": 0.0}, {"form": "soft"},
        {"dual_clip": 3.0, "form": "cispo"}, {"clip_low": 0.2, "form": "sapo"}, {"mask_low": 2.0, "mask_high": 1.0},
        {"tau_pos": 0.0}, {"tau_neg": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("_low")):
            SurrogateSpec(**wrong)
    for wrong in ({"match": "reverse"}, {"match_coef": -1.0}, {"nll_coef": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MatchSpec(**wrong)
