"""The oracle itself: behaviour at the edges, and gradients against finite differences in fp64."""

import pytest
import torch

from kernels import eager
from tests.kernel_cases import CASES, FULL, head_of, rows_of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_case(case):
    case(eager, "cpu")


@pytest.mark.parametrize("accurate", [False, True])
def test_gradcheck(accurate):
    check_gradients(eager, accurate)


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
            h, x, ids, bias_V=b, rows_M=rows, temperature=temperature, entropy=True, accurate=accurate
        ),
        leaves,
    )
    assert check(lambda p, e: impl.clipped_surrogate(p, old, adv, w, FULL, logp_ref_N=ref, entropy_N=e)[0],
                 (logp.detach().requires_grad_(), logp.detach().neg().requires_grad_()))  # fmt: skip
    assert check(
        lambda h, x, b: impl.linear_clipped_surrogate(
            h, x, ids, old, adv, w, FULL, bias_V=b, temperature=temperature, logp_ref_N=ref,
            logp_behaviour_N=behaviour, accurate=accurate,
        )[0],
        leaves,
    )  # fmt: skip
