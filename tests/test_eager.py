"""The oracle itself: behaviour at the edges, and gradients against finite differences in fp64."""

from functools import partial

import pytest
import torch

from kernels import eager
from kernels.checks import move_rows
from kernels.spec import SurrogateSpec
from tests.kernel_cases import CASES, DEVICES, FULL, KL, MSE, SAPO, head_of, rows_of, teacher_of


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_case(case, device):
    case(eager, device)


@pytest.mark.parametrize("accurate", [False, True])
def test_gradcheck(accurate):
    check_gradients(eager, accurate)


def test_it_is_no_costlier_than_a_careful_user():
    """The baseline of every report: no graph of an entropy that only the stats show, no division by 1."""
    hidden, weight, ids = head_of(12, 30, 8, torch.float32, "cpu")
    old, adv, w, *_ = rows_of(12, "cpu")
    w[:] = 1

    def saved_and_divided(spec, **kwargs):
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
        leaf = hidden.clone().requires_grad_()
        with hooks, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            eager.linear_clipped_surrogate(leaf, weight, ids, old, adv, w, spec, **kwargs)
        return len({x.data_ptr() for x in saved if x.shape == (12, 30)}), sum(
            event.name == "aten::div" for event in profile.events()
        )

    assert saved_and_divided(SurrogateSpec()) == (1, 0)  # what log_softmax keeps
    with_entropy, divided = saved_and_divided(FULL, temperature=0.7)
    assert with_entropy > 1 and divided == 1


def test_rows_from_the_host_are_pinned_outside_a_compiler(monkeypatch):
    class Rows:
        device = torch.device("cpu")
        steps = ()

        def pin_memory(self):
            self.steps += ("pinned",)
            return self

        def to(self, device, non_blocking):
            return *self.steps, device.type, non_blocking

    assert move_rows(Rows(), torch.device("cuda", 0)) == ("pinned", "cuda", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert move_rows(Rows(), torch.device("cuda", 0)) == ("cuda", True)
    assert move_rows(None, torch.device("cuda", 0)) is None


def check_gradients(impl, accurate=False):
    hidden, weight, ids = head_of(6, 7, 4, torch.float64, "cpu", scale=1.0)
    bias = torch.linspace(-1, 1, 7).double()
    old, adv, w, ref, behaviour = [x.double() for x in rows_of(6, "cpu")]
    logp = impl.linear_logprob(hidden, weight, ids, bias_V=bias)
    old, ref, behaviour = logp + 0.1 * (old + 3), logp + 0.3, logp - 0.2
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    rows = torch.tensor([1, 2, 4, 5])
    temperature = torch.linspace(0.5, 1.5, 6).double()
    check = torch.autograd.gradcheck
    assert check(lambda z: impl.logprob(z, ids, temperature=temperature, entropy=True), hidden @ weight.detach().T)
    assert check(
        lambda h, x, b: impl.linear_logprob(
            h, x, ids[rows], bias_V=b, rows_M=rows, temperature=temperature[rows], entropy=True, accurate=accurate
        ),
        leaves,
    )
    for spec in (FULL, SAPO):
        loss = lambda p, e, spec=spec: impl.clipped_surrogate(p, old, adv, w, spec, logp_ref_N=ref, entropy_N=e)[0]
        assert check(loss, [x.detach().requires_grad_() for x in (logp, -logp)])
    more = dict(temperature=temperature, logp_ref_M=ref, logp_behaviour_M=behaviour, accurate=accurate)
    for spec in (FULL, SAPO):
        surrogate = partial(impl.linear_clipped_surrogate, ids_M=ids, logp_old_M=old, adv_M=adv, weight_M=w, spec=spec)
        assert check(lambda h, x, b, f=surrogate: f(h, x, bias_V=b, **more)[0], leaves)
    for spec, K in ((MSE, 3), (KL, 3), (KL, 7)):  # of all 7 tokens: no tail is left, and both are floored
        ids, top_ids, top_logp = teacher_of(hidden.detach(), weight.detach(), ids, K)
        fewer = dict(temperature=temperature[rows], rows_M=rows, accurate=accurate)
        vectors = [x[rows] for x in (ids, top_ids, top_logp.double(), w)]
        match = lambda h, x, b: impl.linear_match(h, x, *vectors, spec, bias_V=b, **fewer)[0]  # noqa: B023
        assert check(match, leaves)
