"""What every implementation of the kernels must do: cases run by test_eager.py, test_chunked.py and test_fused.py.

A case is a function of the implementation (a module) and a device; `CASES` lists them. Bounds come from the baseline:
the error of eager.py in the same dtype, against eager.py fed fp64.
"""

import dataclasses
import math
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch
from torch.torch_version import TorchVersion

from kernels import eager
from kernels.spec import MATCH_STATS, STATS, MatchSpec, SurrogateSpec

INF, NAN = float("inf"), float("nan")
FULL = SurrogateSpec(0.2, 0.28, dual_clip=3.0, kl_coef=0.1, entropy_coef=0.01, importance_cap=2.0)
CISPO = dataclasses.replace(FULL, form="cispo", dual_clip=None, mask_low=0.8, mask_high=1.3)
SAPO = dataclasses.replace(FULL, form="sapo", clip_low=1.0, clip_high=INF, dual_clip=None, tau_pos=1.5, tau_neg=2.0)
FORMS = {"clip": FULL, "cispo": CISPO, "sapo": SAPO}
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
NEEDS_INTERPRETER = pytest.mark.skipif(
    TorchVersion(version("triton")) < (3, 7) and TorchVersion(version("numpy")) >= (2, 4),
    reason="the interpreter of Triton before 3.7 needs numpy before 2.4",
)


@contextmanager
def poisoned_memory():
    """torch.empty gives NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def stat(stats, name):
    return stats[STATS.index(name)].item()


def gradients(fn, *inputs, grads=None):
    """Outputs of fn on fresh leaves, then the gradients of those leaves for the given (or unit) output gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = fn(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    live = [o for o in outs if o.requires_grad]
    grads = grads or [None] * len(live)
    torch.autograd.backward(live, [torch.ones_like(o) if g is None else g.to(o) for o, g in zip(live, grads)])
    return [o.detach() for o in outs] + [x.grad for x in leaves]


def assert_close_as_eager(names, truth, base, ours, terms=0.0, luck=0.0, ulps=1):
    """Error at most twice the baseline's, plus `ulps` of the largest value.

    The loss is a sum: its ulp is that of its `terms` added up, and `luck` is what the baseline's row errors would add
    up to if none cancelled another.
    """
    for name, t, e, o in zip(names.split(), truth, base, ours, strict=True):
        if not t.numel():
            continue
        err = lambda x: (x.double() - t).abs().max().item()
        least, largest = (luck, terms) if name == "loss" else (0.0, 0.0)
        ulp = torch.finfo(o.dtype).eps * max(t.abs().max().item(), largest)
        bound = 2 * max(err(e), least) + ulps * ulp
        assert err(o) <= bound, f"{name}: ours {err(o):.2e}, eager {err(e):.2e}, ulp {ulp:.2e}, bound {bound:.2e}"


def double(*xs):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in xs]


class Vectors(NamedTuple):
    """What a surrogate takes of each row, [N]; `old`, `ref` and `behaviour` are log-probabilities."""

    old: torch.Tensor
    adv: torch.Tensor
    weight: torch.Tensor
    ref: torch.Tensor
    behaviour: torch.Tensor


def rows_of(N, device, seed=0) -> Vectors:
    """Log-probabilities around -3, a fifth of the weights zero."""
    gen = torch.Generator().manual_seed(seed)
    draw = lambda scale: scale * torch.randn(N, generator=gen)
    old = -3 + draw(1.0)
    weight = torch.rand(N, generator=gen)
    weight[::5] = 0
    return Vectors(*(x.to(device) for x in (old, draw(1.0), weight, old + draw(0.2), old + draw(0.2))))


def rows_near(hidden_ND, weight_VD, ids_N, *, bias_V=None, temperature=1.0, seed=0):
    """rows_of around the head's own log-probabilities, log-ratios at least 0.05 from every clip edge of these tests.

    old, ref and behaviour move together, so that no row outweighs the others.
    """
    wide = double(hidden_ND, weight_VD, ids_N)
    temperature, bias_V = double(temperature, bias_V)
    logp_N = eager.linear_logprob(*wide, bias_V=bias_V, temperature=temperature)
    N = len(ids_N)
    gaps = torch.tensor([-0.1, 0.4, -0.5, 0.05], device=logp_N.device)
    for edge in (0.8, 1.2, 1.28, 3.0):
        assert (gaps - math.log(edge)).abs().min() >= 0.05
    vectors = rows_of(N, logp_N.device, seed)
    shift_N = logp_N.float() - gaps.repeat(N)[:N] - vectors.old
    return vectors._replace(**{name: getattr(vectors, name) + shift_N for name in ("old", "ref", "behaviour")})


def head_of(N, V, D, dtype, device, scale=3.0, seed=0):
    """hidden, weight, ids with logits of about `scale`."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=gen) * scale
    weight = torch.randn(V, D, generator=gen) / D**0.5
    ids = torch.randint(0, V, (N,), generator=gen)
    return hidden.to(device, dtype), weight.to(device, dtype), ids.to(device)


def watched(fn):
    """Runs fn -> number of matrix products, bytes of the largest tensor made; inside custom ops too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    events = profile.events()
    made = max(max(e.self_cpu_memory_usage, e.self_device_memory_usage) for e in events)
    return sum(e.name in ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise") for e in events), made


# --- logprob ---------------------------------------------------------------------------------------------------------


def logprob_accuracy(impl, device):
    for N, V in ((0, 7), (1, 1), (47, 123), (33, 507), (3, 3201)):
        for dtype in (torch.float32, torch.bfloat16):
            gen = torch.Generator().manual_seed(V)
            logits = (5 * torch.randn(N, V + 3, generator=gen)).to(device, dtype)[:, :V]  # rows are not contiguous
            ids = torch.randint(0, V, (N,), generator=gen).to(device)
            temperature = (0.5 + torch.rand(N, generator=gen)).to(device)
            grads = [torch.randn(N, generator=gen).to(device) for _ in range(2)]
            run = lambda impl, x, t: gradients(
                lambda z: impl.logprob(z, ids, temperature=t, entropy=True), x, grads=grads
            )
            truth = run(eager, logits.double(), temperature.double())
            base, ours = (run(i, logits, temperature) for i in (eager, impl))
            logp, _, dlogits = ours
            assert logp.dtype == torch.float32 and dlogits.dtype == dtype
            assert_close_as_eager("logp entropy dlogits", truth, base, ours)
            plain = lambda impl, x: gradients(lambda z: impl.logprob(z, ids), x, grads=grads)
            truth, base, ours = plain(eager, logits.double()), plain(eager, logits), plain(impl, logits)
            assert_close_as_eager("logp dlogits", truth, base, ours)


def logprob_masked_rows_do_not_leak(impl, device):
    logits = torch.randn(6, 9, device=device)
    mask = torch.tensor([True, False, True, False, False, True], device=device)
    ids = torch.tensor([1, -100, 2, 10**9, 3, 8], device=device)
    bad = logits.clone()
    bad[1], bad[3, 2], bad[4] = NAN, INF, -INF
    clean = gradients(lambda z: impl.logprob(z, ids, mask_N=mask, entropy=True), logits)
    ours = gradients(lambda z: impl.logprob(z, ids, mask_N=mask, entropy=True), bad)
    for x, y in zip(clean, ours):
        assert torch.equal(x, y) and x[~mask].eq(0).all() and x[mask].ne(0).any()
    none = gradients(lambda z: impl.logprob(z, ids, mask_N=torch.zeros_like(mask), entropy=True), bad)
    assert all(x.eq(0).all() for x in none)


def logprob_banned_tokens(impl, device):
    logits = torch.randn(5, 40, device=device)
    logits[:, 10:30] = -INF
    ids = torch.tensor([1, 12, 2, 3, 4], device=device)
    logits[3], logits[4, 7] = -INF, NAN
    kept = torch.cat((logits[:, :10], logits[:, 30:]), 1)
    logp, entropy, grad = gradients(lambda z: impl.logprob(z, ids, entropy=True), logits)
    want, want_entropy = eager.logprob(kept[[0, 2]].double(), ids[[0, 2]], entropy=True)
    assert (logp[[0, 2]] - want).abs().max() < 1e-6 and (entropy[[0, 2]] - want_entropy).abs().max() < 1e-6
    assert grad[:3, 10:12].eq(0).all() and grad[:3, 13:30].eq(0).all() and grad[:3].isfinite().all()
    assert logp[1] == -INF and logp[3:].isnan().all() and grad[3:].isnan().any(1).all()


def logprob_is_shift_invariant_and_exact_when_peaked(impl, device):
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 300, generator=gen).to(device)
    logits = (logits * 64).round() / 64  # so that adding 1e4 is exact
    ids = torch.tensor([0, 3, 299, 150], device=device)
    plain = impl.logprob(logits, ids)
    for shift in (-1e4, 1e4):
        assert (impl.logprob(logits + shift, ids) - plain).abs().max() < 1e-6
    peaked = torch.zeros(1, 1001, device=device)
    peaked[0, 7] = 23.0  # 1 - p = 1e-7
    seven = torch.tensor([7], device=device)
    truth = gradients(lambda z: eager.logprob(z, seven), peaked.double())
    ours = gradients(lambda z: impl.logprob(z, seven), peaked)
    if impl is not eager:
        for t, o in zip(truth, ours):
            assert (o.double() / t - 1).abs().max() < 1e-3


# --- linear_logprob --------------------------------------------------------------------------------------------------


def linear_logprob_accuracy(impl, device):
    for N, V, D, dtype, accurate in (
        (32, 507, 64, torch.float32, False),
        (37, 123, 24, torch.bfloat16, False),
        (32, 304, 64, torch.bfloat16, True),
        (32, 304, 64, torch.float16, False),
    ):
        hidden, weight, ids = head_of(N, V, D, dtype, device)
        bias = torch.linspace(-1, 1, V, device=device).to(dtype)
        temperature = torch.linspace(0.5, 1.5, N, device=device)
        rows = torch.arange(0, N, 2)
        picked = {"rows_M": rows, "temperature": temperature[rows]}
        for ids_M, kwargs in ((ids, {}), (ids[rows], picked), (ids, {"entropy": True})):
            grads = [torch.linspace(low, high, len(ids_M), device=device) for low, high in ((-1, 1), (1, 2))]

            def run(impl, inputs, ids_M=ids_M, kwargs=kwargs, grads=grads):
                fn = lambda h, w, b: impl.linear_logprob(h, w, ids_M, bias_V=b, accurate=accurate, **kwargs)
                return gradients(fn, *inputs, grads=grads)

            inputs = (hidden, weight, bias)
            results = [run(i, x) for i, x in ((eager, double(*inputs)), (eager, inputs), (impl, inputs))]
            names = "logp entropy dhidden dweight dbias" if "entropy" in kwargs else "logp dhidden dweight dbias"
            assert_close_as_eager(names, *results)


def linear_logprob_with_a_frozen_head(impl, device):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, ids = head_of(48, 304, 64, dtype, device)
        picked = {"rows_M": torch.arange(0, 48, 2), "temperature": torch.linspace(0.5, 1.5, 24).to(device)}
        for ids_M, kwargs in ((ids, {}), (ids[::2], picked)):
            grads = [torch.linspace(-1, 1, len(ids_M), device=device)]
            run = lambda impl, h, w, ids_M=ids_M, kwargs=kwargs, grads=grads: gradients(
                lambda h: impl.linear_logprob(h, w, ids_M, **kwargs), h, grads=grads
            )
            truth, base = run(eager, *double(hidden, weight)), run(eager, hidden, weight)
            logp, dhidden = run(impl, hidden, weight)
            assert dhidden.dtype == dtype
            assert_close_as_eager("logp dhidden", truth, base, (logp, dhidden))


def accurate_logits(impl, device):
    """bf16 inputs, |logit| up to 30: fp32 logits leave 1e-4."""
    hidden, weight, ids = head_of(64, 600, 64, torch.bfloat16, device, scale=9.0)
    truth = eager.linear_logprob(hidden.double(), weight.double(), ids)
    ours = impl.linear_logprob(hidden, weight, ids, accurate=True)
    assert (hidden.float() @ weight.float().T).abs().max() > 25
    assert (ours - truth).abs().max() <= 1e-4


def linear_rows_left_out(impl, device):
    hidden, weight, ids = head_of(12, 50, 8, torch.float32, device)
    rows = torch.tensor([7, 2, 11])
    hidden[0] = NAN
    fn = lambda h, w: impl.linear_logprob(h, w, ids[rows], rows_M=rows, entropy=True)
    logp, entropy, dhidden, dweight = gradients(fn, hidden, weight)
    truth = eager.linear_logprob(hidden[rows], weight, ids[rows])
    assert (logp - truth).abs().max() < 1e-5 and entropy.shape == (3,) and dweight.isfinite().all()
    out = torch.ones(12, dtype=torch.bool).index_fill(0, rows, False)
    assert dhidden[out].eq(0).all() and dhidden[rows].ne(0).any(1).all()
    empty = gradients(lambda h, w: impl.linear_logprob(h, w, ids[:0], rows_M=rows[:0]), hidden, weight)
    assert empty[0].shape == (0,) and all(x.eq(0).all() for x in empty)


def rows_in_any_order_are_the_whole_gathered(impl, device):
    """Outputs and gradients of shuffled rows, all vectors [M], are those of all rows with the others left out."""
    N = 24
    hidden, weight, ids = head_of(N, 60, 8, torch.float32, device)
    inputs, temperature = (hidden, weight, torch.linspace(-1, 1, 60, device=device)), torch.linspace(0.5, 1.5, N)
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(1))[: N // 2]
    vectors, slope = rows_of(N, device), torch.linspace(-1, 1, N, device=device)
    vectors = vectors._replace(weight=torch.zeros(N, device=device).index_fill(0, rows.to(device), 0.5))
    temperature, left_out = temperature.to(device), vectors.weight == 0

    def logp(ids, temperature, slope, **kwargs):
        fn = lambda h, w, b: impl.linear_logprob(h, w, ids, bias_V=b, temperature=temperature, **kwargs)
        trained = gradients(fn, *inputs, grads=[slope])
        return trained, gradients(lambda h: fn(h, *inputs[1:]), hidden, grads=[slope])

    def loss(ids, vectors, temperature, **kwargs):
        return loss_and_gradients(impl, inputs, ids, vectors, FULL, temperature=temperature, **kwargs)

    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    whole = logp(ids, temperature, slope.masked_fill(left_out, 0.0))
    ours = logp(ids[rows], temperature[rows], slope[rows], rows_M=rows)
    for (want_logp, *want), (got_logp, *got) in zip(whole, ours, strict=True):
        close(got_logp, want_logp[rows])
        close(got, want)
    want_loss, want_logp, *want = loss(ids, vectors, temperature)
    got_loss, got_logp, *got = loss(ids[rows], [x[rows] for x in vectors], temperature[rows], rows_M=rows)
    close(got_logp, want_logp[rows])
    close([got_loss, *got], [want_loss, *want])
    assert stat(got[0], "tokens") == stat(got[0], "rows_skipped") == N // 2


def linear_partial_gradients(impl, device):
    hidden, weight, ids = head_of(10, 33, 8, torch.float32, device)
    both = gradients(lambda h, w: impl.linear_logprob(h, w, ids), hidden, weight, grads=[torch.arange(10.0)])
    only_h = gradients(lambda h: impl.linear_logprob(h, weight, ids), hidden, grads=[torch.arange(10.0)])
    only_w = gradients(lambda w: impl.linear_logprob(hidden, w, ids), weight, grads=[torch.arange(10.0)])
    assert (both[1] - only_h[1]).abs().max() < 1e-5 and (both[2] - only_w[1]).abs().max() < 1e-5
    assert not impl.linear_logprob(hidden, weight, ids).requires_grad


# --- clipped_surrogate -----------------------------------------------------------------------------------------------


def literal_policy(logp, old, adv, spec):
    """The formulas of the papers as written, for finite values, with torch's own subgradients of min and clamp."""
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    if spec.form == "cispo":
        return -clipped.detach() * adv * logp
    if spec.form == "sapo":
        tau = torch.tensor([spec.tau_neg, spec.tau_pos], dtype=adv.dtype, device=adv.device)[(adv > 0).long()]
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * adv
    policy = -torch.min(ratio * adv, clipped * adv)
    return torch.where(adv < 0, policy.clamp(max=spec.dual_clip * adv.abs()), policy)


def literal_loss(logp, old, adv, weight, spec, ref, behaviour, entropy):
    importance = (old - behaviour).exp()
    outside = (importance < spec.mask_low) | (importance > spec.mask_high)
    policy = literal_policy(logp, old, adv, spec) * importance.clamp(max=spec.importance_cap).masked_fill(outside, 0.0)
    d = ref - logp
    return (weight * (policy + spec.kl_coef * (d.exp() - d - 1) - spec.entropy_coef * entropy)).sum()


def surrogate_is_the_formula(impl, device):
    N = 500
    old, adv, weight, ref, behaviour = rows_of(N, device)
    logp, entropy = old + 1.3 * torch.linspace(-1, 1, N, device=device), torch.linspace(0, 5, N, device=device)
    more = {"logp_ref_N": ref, "logp_behaviour_N": behaviour}
    for spec in FORMS.values():
        fn = lambda p, e, spec=spec: literal_loss(p, *double(old, adv, weight), spec, *double(ref, behaviour), e)
        truth = gradients(fn, *double(logp, entropy))
        loss = lambda p, e, impl, spec=spec: impl.clipped_surrogate(p, old, adv, weight, spec, entropy_N=e, **more)[0]
        run = lambda impl, loss=loss: gradients(partial(loss, impl=impl), logp, entropy)
        base, ours = run(eager), run(impl)
        assert_close_as_eager("loss dlogp dentropy", truth, base, ours, terms=weight.sum().item())
        masked = ((old - behaviour).exp() < spec.mask_low) | ((old - behaviour).exp() > spec.mask_high)
        assert masked.any() == (spec is CISPO) and truth[1].abs().max() > 1e-2
    stats = impl.clipped_surrogate(logp, old, adv, weight, FULL, logp_ref_N=ref, entropy_N=entropy)[1]
    used, ratio = weight != 0, (logp - old).exp()
    assert stats.dtype == torch.float32 and stats.shape == (len(STATS),)
    want = {
        "tokens": used.sum(),
        "clip_low": (used & (adv < 0) & (ratio < 0.8)).sum(),
        "clip_high": (used & (adv > 0) & (ratio > 1.28)).sum(),
        "ratio": ratio[used].sum(),
        "kl": ((ref - logp).expm1() - (ref - logp))[used].sum(),
        "kl_old": (old - logp)[used].sum(),
        "entropy": entropy[used].sum(),
        "logp": logp[used].sum(),
        "rows_skipped": (~used).sum(),
        "bad_ids": 0,
        "ratio_max": ratio[used].max(),
    }
    for name, value in want.items():
        assert abs(stat(stats, name) - float(value)) <= 1e-4 * abs(float(value)) + 1e-3, name


def surrogate_cispo_clips_whatever_the_sign_and_keeps_the_gradient(impl, device):
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, 0.5], device=device)
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0], device=device)
    spec = SurrogateSpec(clip_low=0.2, clip_high=0.28, form="cispo")
    run = lambda p: impl.clipped_surrogate(p, torch.zeros_like(p), adv, torch.ones_like(p), spec)
    _, stats, grad = gradients(run, logp)
    want = torch.tensor([-1.28, 1.28, -0.8, 0.8, -math.exp(0.1), 0.0], device=device)
    torch.testing.assert_close(grad, want)
    assert stat(stats, "clip_low") == stat(stats, "clip_high") == 2


def surrogate_ties_keep_the_gradient(impl, device):
    """The edge is put on the ratio that the implementation itself reports, and then one ulp inside it."""
    one = torch.ones(1, device=device)
    cases = (  # advantage, log-ratio, the spec whose edge is at r
        (1.0, 0.3, lambda r: SurrogateSpec(clip_high=r - 1)),
        (-1.0, -0.3, lambda r: SurrogateSpec(clip_low=1 - r)),
        (-1.0, 0.7, lambda r: SurrogateSpec(dual_clip=r)),
    )
    for adv, log_ratio, spec_at in cases:
        run = lambda spec, adv=adv, gap=log_ratio: gradients(
            lambda p: impl.clipped_surrogate(p, 0 * one, adv * one, one, spec), gap * one
        )
        ratio = stat(run(SurrogateSpec())[1], "ratio")
        loss, stats, grad = run(spec_at(ratio))
        assert stat(stats, "ratio") == ratio and loss == grad == -adv * ratio
        assert stat(stats, "clip_low") == stat(stats, "clip_high") == 0
        inward = torch.nextafter(torch.tensor(ratio), torch.tensor(1.0)).item()
        loss, _, grad = run(spec_at(inward))
        assert loss == -adv * torch.tensor(inward) and grad == 0
    old, adv, one = torch.zeros(3, device=device), torch.tensor([-1.0, 1.0, -1.0], device=device), one.expand(3)
    inside = gradients(lambda p: impl.clipped_surrogate(p, old, adv, one, SurrogateSpec(0, 0))[0], old.clone())[1]
    assert torch.equal(inside, -adv)  # both edges at ratio 1


def surrogate_extreme_ratios_of_every_form(impl, device):
    """Infinite ratios and importance weights: sapo's gate closes, what is masked or has no advantage is nothing."""
    gaps = torch.tensor([88.0, 89.0, 1e4, INF, -88.0, -1e4, -INF], device=device)
    one, old = torch.ones_like(gaps), torch.zeros_like(gaps)
    for adv_value, spec in ((1.0, SAPO), (-1.0, SAPO), (0.0, CISPO), (0.0, SAPO)):
        spec = dataclasses.replace(spec, kl_coef=0.0)
        run = lambda p, spec=spec, adv=adv_value: impl.clipped_surrogate(p, old, adv * one, one, spec)[0]
        loss, grad = gradients(run, gaps)
        assert loss.isfinite() and grad.abs().max() < 1e-30
    masked = dataclasses.replace(FULL, mask_low=0.5, mask_high=5.0, kl_coef=0.0)
    run = lambda p: impl.clipped_surrogate(p, old, one, one, masked, logp_behaviour_N=-gaps)[0]
    loss, grad = gradients(run, old)
    assert loss == 0 and grad.eq(0).all()


def surrogate_extreme_ratios(impl, device):
    gaps = [1e-8, 20.0, 88.0, 89.0, 1e4, INF]
    gaps = torch.tensor(gaps + [-g for g in gaps], device=device)
    dual = SurrogateSpec(dual_clip=3.0)
    for adv_value, spec in ((1.0, SurrogateSpec()), (-1.0, dual), (0.0, dual)):
        adv, weight, old = torch.full_like(gaps, adv_value), torch.ones_like(gaps), torch.zeros_like(gaps)
        run = lambda impl, p: gradients(lambda p: impl.clipped_surrogate(p, old, adv, weight, spec)[0], p)
        loss, grad = run(impl, gaps)
        ratio = gaps.double().exp()
        binds = ratio > 1.2 if adv_value > 0 else (ratio < 0.8) | (ratio > 3)
        assert loss.isfinite() and grad.isfinite().all() and grad[binds].eq(0).all()
        assert torch.allclose(grad[~binds], (-adv * ratio.float())[~binds], rtol=1e-5)
        if adv_value == 0:
            assert loss == 0 and grad.eq(0).all()
    one = torch.ones(1, device=device)
    loss, grad = gradients(lambda p: impl.clipped_surrogate(p, 0 * one, -one, one, SurrogateSpec())[0], 100 * one)
    assert loss == INF and grad == INF  # the loss as specified: nothing bounds it without dual_clip
    clamped = SurrogateSpec(log_ratio_clamp=20.0, kl_coef=1.0)
    run = lambda p: impl.clipped_surrogate(p, 0 * one, -one, one, clamped, logp_ref_N=0 * one)[0]
    loss, grad = gradients(run, 100 * one)
    assert loss.isfinite() and grad == 0


def surrogate_zero_weight_rows_do_not_leak(impl, device):
    old, adv, weight, ref, behaviour = rows_of(20, device)
    weight[:] = 0
    weight[3] = 0.5
    logp, entropy = old + 0.1, torch.rand(20, device=device)
    rest = torch.arange(20, device=device) != 3
    run = lambda p, e, spec=FULL: impl.clipped_surrogate(
        p, old, adv, weight, spec, logp_ref_N=ref, logp_behaviour_N=behaviour, entropy_N=e
    )
    of_all = lambda: [gradients(partial(run, spec=spec), logp, entropy) for spec in FORMS.values()]
    clean = of_all()
    for value in (NAN, INF, -INF):
        for x in (old, adv, ref, behaviour, logp, entropy):
            x[rest] = value
        assert all(torch.equal(x, y) for old_, new in zip(clean, of_all()) for x, y in zip(old_, new))
    weight[3] = 0
    loss, stats, dlogp, _ = gradients(run, logp, entropy)
    assert loss == 0 and dlogp.eq(0).all() and stats[:-3].eq(0).all() and stat(stats, "rows_skipped") == 20
    nothing = impl.clipped_surrogate(*[logp[:0]] * 4, SurrogateSpec())
    assert nothing[0] == 0 and nothing[1].eq(0).all()


def surrogate_on_policy(impl, device):
    old, adv, weight, *_ = rows_of(30, device)
    loss, stats, grad = gradients(lambda p: impl.clipped_surrogate(p, None, adv, weight, SurrogateSpec()), old)
    assert torch.equal(grad, torch.where(weight == 0, 0.0, -adv * weight))
    assert stat(stats, "ratio") == stat(stats, "tokens") == (weight != 0).sum() and stat(stats, "ratio_max") == 1
    fed_back = gradients(lambda p: impl.clipped_surrogate(p, old, adv, weight, SurrogateSpec()), old)
    assert all(torch.equal(x, y) for x, y in zip((loss, stats, grad), fed_back))


# --- linear_clipped_surrogate ----------------------------------------------------------------------------------------


def loss_and_gradients(impl, inputs, ids, vectors, spec, **kwargs):
    old, adv, w, ref, behaviour = vectors
    kwargs |= {"logp_ref_M": ref, "logp_behaviour_M": behaviour}
    fn = lambda h, x, b=None: impl.linear_clipped_surrogate(h, x, ids, old, adv, w, spec, bias_V=b, **kwargs)
    return gradients(fn, *inputs)


def linear_surrogate_accuracy(impl, device):
    for N, V, D, dtype, accurate, spec in (
        (64, 507, 64, torch.float32, False, SurrogateSpec()),
        (64, 304, 64, torch.float32, False, FULL),
        (48, 304, 64, torch.bfloat16, False, SurrogateSpec()),
        (48, 123, 64, torch.bfloat16, True, FULL),
        (64, 304, 64, torch.float32, False, dataclasses.replace(CISPO, mask_low=0.0, mask_high=INF)),
        (48, 304, 64, torch.bfloat16, False, SAPO),
    ):
        hidden, weight, ids = head_of(N, V, D, dtype, device, scale=1.5)
        bias = torch.linspace(-1, 1, V, device=device).to(dtype)
        temperature = torch.linspace(0.5, 1.5, N, device=device)
        picked = torch.arange(1, N, 3)
        for rows, kwargs in ((slice(None), {}), (picked, {"rows_M": picked, "temperature": temperature[picked]})):
            ids_M = ids[rows]
            vectors = rows_near(hidden[rows], weight, ids_M, bias_V=bias, temperature=kwargs.get("temperature", 1.0))
            wide_kwargs = {k: x.double() if k == "temperature" else x for k, x in kwargs.items()}
            inputs, wide = (hidden, weight, bias), double(hidden, weight, bias)
            results = [
                loss_and_gradients(eager, wide, ids_M, double(*vectors), spec, **wide_kwargs),
                loss_and_gradients(eager, inputs, ids_M, vectors, spec, accurate=accurate, **kwargs),
                loss_and_gradients(impl, inputs, ids_M, vectors, spec, accurate=accurate, **kwargs),
            ]
            (_, true_logp, true_stats, *_), (_, base_logp, *_), (_, _, stats, *_) = results
            old, adv, w, ref, behaviour = double(*vectors)
            slope = gradients(
                lambda p: eager.clipped_surrogate(p, old, adv, w, spec, logp_ref_N=ref, logp_behaviour_N=behaviour),
                true_logp,
            )[-1]
            luck, terms = (slope * (base_logp - true_logp)).abs().sum().item(), vectors.weight.sum().item()
            smooth = [(loss, logp, *grads) for loss, logp, _, *grads in results]
            assert_close_as_eager("loss logp dhidden dweight dbias", *smooth, terms=terms, luck=luck)
            for name, t, o in zip(STATS, true_stats, stats):
                slack = 1e-4 if dtype == torch.float32 or accurate else 0.05
                assert abs(t - o) <= slack * (1 + abs(t)), f"{name}: {o} for {t}"


def linear_surrogate_rows_left_out(impl, device):
    N = 24
    hidden, weight, ids = head_of(N, 60, 8, torch.float32, device)
    vectors = rows_of(N, device)
    rows = vectors.weight.nonzero()[:, 0].cpu()
    out = vectors.weight == 0
    picked = lambda rows: (ids[rows], [x[rows] for x in vectors])
    clean = loss_and_gradients(impl, (hidden, weight), *picked(rows), FULL, rows_M=rows)
    hidden[out], ids[out] = NAN, -100
    for x in (vectors.old, vectors.adv, vectors.ref, vectors.behaviour):
        x[out] = NAN
    among = loss_and_gradients(impl, (hidden, weight), *picked(rows), FULL, rows_M=rows)
    whole = loss_and_gradients(impl, (hidden, weight), ids, vectors, FULL)
    assert whole[1][out].eq(0).all()
    whole[1] = whole[1][rows]
    for ours in (among, whole):
        for x, y in zip(clean, ours, strict=True):
            assert (x - y).abs().max() <= 1e-5 * x.abs().max()
        assert ours[3][out].eq(0).all()
        assert stat(ours[2], "tokens") == len(rows) and stat(ours[2], "rows_skipped") == N - len(rows)
    vectors.weight[:] = 0
    for rows_M, arguments in ((rows[:0], picked(rows[:0])), (None, (ids, vectors))):
        loss, logp, stats, *grads = loss_and_gradients(impl, (hidden, weight), *arguments, FULL, rows_M=rows_M)
        assert len(logp) == len(arguments[0]) and stat(stats, "tokens") == 0 and stat(stats, "rows_skipped") == N
        assert loss == 0 and all(x.eq(0).all() for x in (logp, *grads))


def linear_surrogate_is_its_parts(impl, device):
    hidden, weight, ids = head_of(40, 90, 16, torch.float32, device)
    old, adv, w, ref, behaviour = rows_of(40, device)
    whole = loss_and_gradients(impl, (hidden, weight), ids, (old, adv, w, ref, behaviour), FULL)

    def parts(h, wt):
        logp, entropy = impl.linear_logprob(h, wt, ids, entropy=True)
        return impl.clipped_surrogate(
            logp, old, adv, w, FULL, logp_ref_N=ref, logp_behaviour_N=behaviour, entropy_N=entropy
        )

    loss, stats, dhidden, dweight = gradients(parts, hidden, weight)
    for x, y in zip((loss, stats, dhidden, dweight), (whole[0], *whole[2:])):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()


def linear_surrogate_on_policy_is_likelihood(impl, device):
    hidden, weight, ids = head_of(16, 40, 8, torch.float32, device)
    w = rows_of(16, device).weight
    one = torch.ones_like(w)
    spec = SurrogateSpec()
    ours = gradients(lambda h, x: impl.linear_clipped_surrogate(h, x, ids, None, one, w, spec)[0], hidden, weight)
    nll = gradients(lambda h, x: -(w * impl.linear_logprob(h, x, ids)).sum(), hidden, weight)
    for x, y in zip(ours[1:], nll[1:]):
        assert (x - y).abs().max() < 1e-5


def linear_surrogate_backward_scales_and_repeats(impl, device):
    hidden, weight, ids = head_of(16, 40, 8, torch.float32, device)
    old, adv, w, *_ = rows_of(16, device)
    spec = SurrogateSpec()
    once = gradients(lambda h, x: impl.linear_clipped_surrogate(h, x, ids, old, adv, w, spec)[0], hidden, weight)
    h, x = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = impl.linear_clipped_surrogate(h, x, ids, old, adv, w, spec)[0]
    for factor in (1.0, 2.0, 0.0):
        (factor * loss).backward(retain_graph=True)
    assert (h.grad - 3 * once[1]).abs().max() < 1e-5 and (x.grad - 3 * once[2]).abs().max() < 1e-5
    micro = torch.zeros_like(weight)
    for part in (slice(0, 5), slice(5, 16)):
        leaf = weight.clone().requires_grad_()
        rest = [x[part] for x in (ids, old, adv, w)]
        impl.linear_clipped_surrogate(hidden[part], leaf, *rest, spec)[0].backward()
        micro += leaf.grad
    assert (micro - once[2]).abs().max() < 1e-5


def outputs_may_go_unused(impl, device):
    """The gradient of one of the two outputs, and of neither: a loss whose entropy term is off passes none on."""
    hidden, weight, ids = head_of(12, 30, 8, torch.float32, device)
    old, adv, w, *_ = rows_of(12, device)
    for fn in (
        lambda impl, h: impl.linear_logprob(h, weight.to(h.dtype), ids, entropy=True),
        lambda impl, h: impl.logprob(h @ weight.to(h.dtype).T, ids, entropy=True),
    ):
        for which in (0, 1):
            slope = lambda impl, x: gradients(lambda h: fn(impl, h)[which], x)[1]
            truth, ours = slope(eager, hidden.double()), slope(impl, hidden)
            assert (truth - ours).abs().max() <= 1e-5 * truth.abs().max()
        leaf = hidden.clone().requires_grad_()
        logp = old.clone().requires_grad_()
        impl.clipped_surrogate(logp, old, adv, w, SurrogateSpec(), entropy_N=fn(impl, leaf)[1])[0].backward()
        assert leaf.grad is None or leaf.grad.eq(0).all()


def same_training_curve(impl, device):
    """Steps of gradient descent through body and head, two per rollout: the losses of eager in fp64.

    Within 2e-6 of the largest loss in fp32, within 5e-3 in bf16 under fp32 masters: there the products round.
    """
    gen = torch.Generator().manual_seed(0)
    N, V, D = 16, 40, 8
    x, body, head = (torch.randn(*shape, generator=gen).to(device) for shape in ((N, D), (D, D), (V, D)))
    ids = torch.randint(0, V, (N,), generator=gen).to(device)
    weight = torch.full((N,), 1 / N, device=device)
    weight[::4] = 0
    rows = weight.nonzero()[:, 0].cpu()
    adv = ids % 2 - 0.3

    def train(impl, wide, dtype):
        cast = lambda *xs: [x.to(wide) for x in xs]
        w, a, *masters = cast(weight[rows], adv[rows], body / D**0.5, head / D**0.5)
        masters = [master.requires_grad_() for master in masters]
        optimizer = torch.optim.SGD(masters, lr=1.0, momentum=0.5)
        run = lambda: ((x.to(wide) @ masters[0]).to(dtype), masters[1].to(dtype), ids[rows])
        score = lambda: impl.linear_logprob(*run(), rows_M=rows).detach()
        ref, losses = score(), []
        for step in range(6):
            old = score() if step % 2 == 0 else old  # noqa: F821
            loss = impl.linear_clipped_surrogate(*run(), old, a, w, FULL, logp_ref_M=ref, rows_M=rows)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=torch.float64)

    truth = train(eager, torch.float64, torch.float64)
    assert truth.diff().abs().min() > 1e-3  # it goes somewhere
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
        off = ((train(impl, torch.float32, dtype) - truth).abs() / truth.abs().max()).max().item()
        assert off <= bound, f"{dtype}: {off:.1e}"


def strides_do_not_matter(impl, device):
    """Every vector a column of something wider, on a CPU also matrices with a gap after each row: the same bits."""
    hidden, weight, ids = head_of(10, 304, 16, torch.bfloat16, device)
    bias = torch.linspace(-3, 3, 304, device=device).bfloat16()
    temperature = torch.linspace(0.5, 1.5, 10, device=device)
    vectors, (_, top_ids, top_logp) = rows_of(10, device), teacher_of(hidden, weight, ids, 4)
    column = lambda x: torch.stack((x, x.flip(0)), 1)[:, 0]
    padded = lambda x: torch.cat((x, x[:, :8]), 1)[:, : x.shape[1]]
    same = lambda x: x

    def run(of, pad):
        old, adv, w, ref, behaviour = map(of, vectors)
        more = {"temperature": of(temperature), "rows_M": of(torch.arange(10))}
        surrogate = lambda h, x, b: impl.linear_clipped_surrogate(
            pad(h), pad(x), of(ids), old, adv, w, FULL, bias_V=of(b), logp_ref_M=ref, logp_behaviour_M=behaviour, **more
        )
        logp = lambda h, x, b: impl.linear_logprob(pad(h), pad(x), of(ids), bias_V=of(b), temperature=of(temperature))
        plain = lambda z: impl.logprob(pad(z), of(ids), temperature=of(temperature), mask_N=of(w != 0), entropy=True)
        loss = lambda p, e: impl.clipped_surrogate(
            of(p), old, adv, w, FULL, logp_ref_N=ref, logp_behaviour_N=behaviour, entropy_N=of(e)
        )
        match = lambda h, x, b: impl.linear_match(
            pad(h), pad(x), of(ids), pad(top_ids), pad(top_logp), w, KL, bias_V=of(b), **more
        )
        return [
            *gradients(surrogate, hidden, weight, bias),
            *gradients(logp, hidden, weight, bias, grads=[adv]),
            *gradients(plain, hidden @ weight.T, grads=[adv, old]),
            *gradients(loss, vectors.old + 0.1, vectors.weight),
            *gradients(match, hidden, weight, bias),
            *impl.linear_topk(pad(hidden), pad(weight), 3, bias_V=of(bias), temperature=of(temperature)),
        ]

    names = (
        "linear loss, its logp, its stats, its dhidden, its dweight, its dbias, linear logp, its dhidden, its dweight, "
        "its dbias, logp, its entropy, its dlogits, loss, its stats, its dlogp, its dentropy, match, its logp, "
        "its stats, its dhidden, its dweight, its dbias, top logp, top ids"
    ).split(", ")
    results = run(same, same), run(column, padded if device == "cpu" else same)
    for name, x, y in zip(names, *results, strict=True):
        off = (x.double() - y.double()).abs().max().item()
        assert torch.equal(x, y), f"{name} in {x.dtype}: off by {off:.1e}, of at most {x.abs().max().item():.1e}"


def outputs_may_be_changed_in_place(impl, device):
    """2 * out and out *= 2 are one thing, also to the backward; no output is a view of another."""
    hidden, weight, ids = head_of(10, 33, 8, torch.float32, device)
    old, adv, w, *_ = rows_of(10, device)
    logits = hidden @ weight.T
    together = lambda outs: outs if isinstance(outs, tuple) else (outs,)
    functions = [
        (lambda z: impl.logprob(z, ids), logits),
        (lambda z: impl.logprob(z, ids, entropy=True), logits),
        (lambda z: impl.logprob(z, ids, entropy=True, mask_N=w != 0), logits),
        (lambda h: impl.linear_logprob(h, weight, ids), hidden),
        (lambda h, x: impl.linear_logprob(h, x, ids, entropy=True), hidden, weight),
        (lambda p, e: impl.clipped_surrogate(p, old, adv, w, FULL, entropy_N=e), old + 0.1, w),
        (lambda h, x: impl.linear_clipped_surrogate(h, x, ids, old, adv, w, FULL), hidden, weight),
        (lambda h, x: impl.linear_match(h, x, *teacher_of(hidden, weight, ids, 3), w, KL), hidden, weight),
    ]
    for fn, *inputs in functions:
        plain = gradients(lambda *leaves, fn=fn: tuple(2 * x for x in together(fn(*leaves))), *inputs)
        ours = gradients(lambda *leaves, fn=fn: tuple(x.mul_(2) for x in together(fn(*leaves))), *inputs)
        assert all(torch.equal(x, y) for x, y in zip(plain, ours, strict=True))


def reruns_are_equal_to_the_bit(impl, device):
    hidden, weight, ids = head_of(32, 200, 16, torch.bfloat16, device)
    vectors = rows_of(32, device)
    teacher = teacher_of(hidden, weight, ids, 6)
    for run in (
        lambda: loss_and_gradients(impl, (hidden, weight), ids, vectors, FULL),
        lambda: match_and_gradients(impl, (hidden, weight), *teacher, vectors.weight, KL),
        lambda: impl.linear_topk(hidden, weight, 6),
    ):
        assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


def wrong_arguments_are_named(impl, device):
    hidden, weight, ids = head_of(6, 20, 8, torch.float32, device)
    vector = torch.ones(6, device=device)
    logits, rows = hidden @ weight.T, torch.tensor([4, 1])
    ids, top_ids, top_logp = teacher_of(hidden, weight, ids, 3)
    match = lambda *teacher: impl.linear_match(hidden, weight, ids, *teacher, vector, MSE)
    mistakes = {
        "logits_NV": lambda: impl.logprob(logits[0], ids),
        "ids_N": lambda: impl.logprob(logits, ids.int()),
        "mask_N": lambda: impl.logprob(logits, ids, mask_N=vector),
        "temperature must be": lambda: impl.logprob(logits, ids, temperature=0.0),
        "weight_VD": lambda: impl.linear_logprob(hidden, weight.bfloat16(), ids),
        "bias_V": lambda: impl.linear_logprob(hidden, weight, ids, bias_V=vector),
        "rows_M": lambda: impl.linear_logprob(hidden, weight, ids[:1], rows_M=torch.tensor([6])),
        "ids_M must have shape [2], a value for each of rows_M": lambda: impl.linear_logprob(
            hidden, weight, ids, rows_M=rows
        ),
        "temperature": lambda: impl.linear_logprob(hidden, weight, ids[rows], rows_M=rows, temperature=vector),
        "weight_M": lambda: impl.linear_clipped_surrogate(
            hidden, weight, ids[rows], vector[rows], vector[rows], vector, SurrogateSpec(), rows_M=rows
        ),
        "adv_N": lambda: impl.clipped_surrogate(vector, vector, vector[1:], vector, SurrogateSpec()),
        "weight_N": lambda: impl.clipped_surrogate(vector, vector, vector, vector.bfloat16(), SurrogateSpec()),
        "logp_old_M": lambda: impl.linear_clipped_surrogate(hidden, weight, ids, 1.0, vector, vector, SurrogateSpec()),
        "k must be a whole number from 1 to 20": lambda: impl.linear_topk(hidden, weight, 21),
        "linear_topk has no gradient": lambda: impl.linear_topk(hidden, weight.clone().requires_grad_(), 3),
        "top_ids_MK must have shape": lambda: match(top_ids[1:], top_logp[1:]),
        "top_ids_MK must have 1 to 20 ids": lambda: match(top_ids[:, :0], top_logp[:, :0]),
        "top_logp_MK must have shape [6, 3], as top_ids_MK has": lambda: match(top_ids, top_logp[:, :2]),
        "top_logp_MK must be torch.float64 or torch.float32": lambda: match(top_ids, top_logp.bfloat16()),
    }
    if device == "cpu":
        mistakes["ids must lie"] = lambda: impl.logprob(logits, ids + 20)
        mistakes["ids must lie "] = lambda: impl.linear_logprob(hidden, weight, ids - 20)
        mistakes["ids must lie  "] = lambda: match(top_ids + 20, top_logp)
    for name, mistake in mistakes.items():
        try:
            mistake()
        except ValueError as error:
            assert name.strip() in str(error), f"{name} not named by: {error}"
        else:
            raise AssertionError(f"{name}: no ValueError")


# --- linear_topk -----------------------------------------------------------------------------------------------------


def topk_accuracy(impl, device):
    for N, V, D, k, dtype, accurate in (
        (32, 507, 64, 5, torch.float32, False),
        (9, 33, 8, 33, torch.float32, False),
        (8, 5003, 16, 20, torch.float32, False),
        (8, 4104, 16, 3, torch.bfloat16, False),
        (32, 304, 64, 7, torch.bfloat16, True),
    ):
        hidden, weight, _ = head_of(N, V, D, dtype, device)
        bias = torch.linspace(-1, 1, V, device=device).to(dtype)
        temperature, rows = torch.linspace(0.5, 1.5, N, device=device), torch.arange(N - 1, 0, -2)
        for options in ({}, {"temperature": 0.7}, {"rows_M": rows, "temperature": temperature[rows]}):
            run = lambda impl, *head, **o: impl.linear_topk(*head[:2], k, bias_V=head[2], accurate=accurate, **o)
            wide = dict(zip(options, double(*options.values())))
            truth = run(eager, *double(hidden, weight, bias), **wide)
            base, ours = (run(i, hidden, weight, bias, **options) for i in (eager, impl))
            assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.int64
            assert_close_as_eager("logp", truth[:1], base[:1], ours[:1])
            every = eager.linear_topk(*double(hidden, weight), V, bias_V=bias.double(), **wide)
            whole = torch.empty_like(every[0]).scatter_(1, every[1], every[0])
            assert_close_as_eager("logp_of_ids", *[[x] for x in (whole.gather(1, ours[1]), base[0], ours[0])])
            assert ours[1].sort(1).values.diff(dim=1).gt(0).all()
            if k < V:
                clear = every[0][:, k - 1] - every[0][:, k] > 4 * (base[0] - truth[0]).abs().max() + 1e-5
                assert clear.any() and torch.equal(*[x[1][clear].sort(1).values for x in (truth, ours)])


def topk_of_banned_tokens_and_broken_rows(impl, device):
    """Six tokens are left, in a vocabulary that is no whole number of groups."""
    V = 4100
    hidden, weight, _ = head_of(3, V, 8, torch.float32, device)
    bias = torch.full((V,), -INF, device=device)
    left = torch.tensor([0, 5, 4000, 4095, 4096, 4099], device=device)
    bias[left] = 0.0
    hidden[2, 1] = NAN
    for k in (10, V):
        logp, ids = impl.linear_topk(hidden, weight, k, bias_V=bias)
        assert torch.equal(ids[:2, :6].sort(1).values, left.expand(2, -1)) and logp[:2, 6:].eq(-INF).all()
        assert (logp[:2, :6].exp().sum(1) - 1).abs().max() < 1e-5 and logp[2].isnan().all()
        assert ids.ge(0).all() and ids.lt(V).all() and ids.sort(1).values.diff(dim=1).gt(0).all()
    nothing = impl.linear_topk(hidden, weight, 10, rows_M=torch.arange(0))
    assert [x.shape for x in nothing] == [(0, 10)] * 2


# --- linear_match ----------------------------------------------------------------------------------------------------

MSE, KL = MatchSpec("mse", 0.7, 0.5), MatchSpec("kl", 0.7, 0.5)


def teacher_of(hidden_ND, weight_VD, ids_N, k):
    """ids of which each second is among the k likeliest of another head, these ids, and their log-probabilities."""
    gen = torch.Generator().manual_seed(5)
    noise_VD = torch.randn(weight_VD.shape, generator=gen).to(weight_VD)
    other_VD = weight_VD + 0.3 * weight_VD.float().std().item() * noise_VD
    logp_NK, top_ids_NK = eager.linear_topk(*double(hidden_ND, other_VD), k)
    ids_N = ids_N.clone()
    ids_N[::2] = top_ids_NK[::2, k // 2]
    return ids_N, top_ids_NK, logp_NK.float()


def match_and_gradients(impl, inputs, ids, top_ids, top_logp, w, spec, **kwargs):
    match = lambda h, x, b=None: impl.linear_match(h, x, ids, top_ids, top_logp, w, spec, bias_V=b, **kwargs)
    return gradients(match, *inputs)


def match_accuracy(impl, device):
    for N, V, D, K, dtype, accurate, spec in (
        (40, 507, 64, 9, torch.float32, False, MSE),
        (40, 304, 64, 32, torch.float32, False, KL),
        (12, 48, 16, 48, torch.float32, False, KL),
        (32, 304, 64, 1, torch.bfloat16, False, MatchSpec("kl", 1.0, 0.0)),
        (32, 2304, 64, 8, torch.bfloat16, False, MSE),
        (32, 2304, 64, 8, torch.bfloat16, False, KL),
        (32, 123, 64, 8, torch.bfloat16, True, KL),
    ):
        hidden, weight, ids = head_of(N, V, D, dtype, device, scale=1.5)
        bias = torch.linspace(-1, 1, V, device=device).to(dtype)
        temperature, picked = torch.linspace(0.5, 1.5, N, device=device), torch.arange(1, N, 3)
        teacher = teacher_of(hidden, weight, ids, K)
        for rows, kwargs in ((slice(None), {}), (picked, {"rows_M": picked, "temperature": temperature[picked]})):
            vectors = [x[rows] for x in (*teacher, rows_of(N, device).weight)]
            inputs, wide = (hidden, weight, bias), double(hidden, weight, bias)
            wide_kwargs = dict(zip(kwargs, double(*kwargs.values())))
            results = [
                match_and_gradients(eager, wide, *double(*vectors), spec, **wide_kwargs),
                match_and_gradients(eager, inputs, *vectors, spec, accurate=accurate, **kwargs),
                match_and_gradients(impl, inputs, *vectors, spec, accurate=accurate, **kwargs),
            ]

            def row_losses(inputs, vectors, spec=spec, **kwargs):
                """The loss is linear in the weights: its slope in them is that of each row."""
                h, x, b = (x.detach() for x in inputs)
                loss = lambda w: eager.linear_match(h, x, *vectors[:3], w, spec, bias_V=b, **kwargs)[0]
                return gradients(loss, vectors[3])[1]

            true_rows = row_losses(wide, double(*vectors), **wide_kwargs)
            off = row_losses(inputs, vectors, accurate=accurate, **kwargs) - true_rows
            luck, terms = (x.abs().mul(vectors[3]).sum().item() for x in (off, true_rows))
            smooth = [(loss, logp, *grads) for loss, logp, _, *grads in results]
            assert_close_as_eager("loss logp dhidden dweight dbias", *smooth, terms=terms, luck=luck)
            for name, t, o in zip(MATCH_STATS, results[0][2], results[2][2], strict=True):
                slack = 1e-4 if dtype == torch.float32 or accurate else 0.05
                assert name == "agree" and slack > 0.01 or abs(t - o) <= slack * (1 + abs(t)), f"{name}: {o} for {t}"


def match_is_the_formula(impl, device):
    """Against torch's own KL of the K + 1 bins, and centred logits; the gradient of a row is sum g_k (onehot_k - p)."""
    N, V, K = 20, 60, 6
    hidden, weight, ids = head_of(N, V, 8, torch.float32, device, scale=1.5)
    ids, top_ids, top_logp = teacher_of(hidden, weight, ids, K)
    w = rows_of(N, device).weight
    logits = (hidden.double() @ weight.double().T).requires_grad_()
    logp = logits.log_softmax(1)
    student, teacher = logp.gather(1, top_ids), top_logp.double()
    bins = [torch.cat((x, (-x.exp().sum(1, keepdim=True)).log1p()), 1) for x in (student, teacher)]
    kl = torch.nn.functional.kl_div(*bins, log_target=True, reduction="none").sum(1)
    mse = (logits.gather(1, top_ids) - teacher).var(1, correction=0)
    nll = -logp.gather(1, ids[:, None])[:, 0]
    for spec, match in ((MSE, mse), (KL, kl)):
        want = (w * (0.7 * match + 0.5 * nll)).sum()
        (dlogits,) = torch.autograd.grad(want, logits, retain_graph=True)
        loss, ours, stats, dhidden, dweight = match_and_gradients(
            impl, (hidden, weight), ids, top_ids, top_logp, w, spec
        )
        assert abs(loss - want) <= 1e-5 * want and (ours + nll)[w != 0].abs().max() < 1e-5
        assert (dhidden - dlogits @ weight.double()).abs().max() < 1e-5
        assert (dweight - dlogits.T @ hidden.double()).abs().max() < 1e-5
        used = w != 0
        sums = [used, nll * used, match * used, *[x.exp().sum(1) * used for x in (teacher, student)]]
        sums += [(teacher.argmax(1) == student.argmax(1)) & used, ~used, 0 * w]
        for name, value, got in zip(MATCH_STATS, [*[x.sum() for x in sums], nll[used].max()], stats, strict=True):
            assert abs(value - got) <= 1e-5 * (1 + abs(value)), name
    nll_alone = match_and_gradients(impl, (hidden, weight), ids, top_ids, top_logp, w, MatchSpec(match_coef=0.0))
    plain = gradients(lambda h, x: -(w * impl.linear_logprob(h, x, ids)).sum(), hidden, weight)
    for x, y in zip(plain[1:], nll_alone[3:]):
        assert (x - y).abs().max() < 1e-5


def match_rows_left_out(impl, device):
    N = 24
    hidden, weight, ids = head_of(N, 60, 8, torch.float32, device)
    vectors = (*teacher_of(hidden, weight, ids, 5), rows_of(N, device).weight)
    ids, top_ids, top_logp, w = vectors
    rows, out = w.nonzero()[:, 0].cpu(), w == 0
    picked = lambda rows: [x[rows] for x in vectors]
    for spec in (MSE, KL):
        clean = match_and_gradients(impl, (hidden, weight), *picked(rows), spec, rows_M=rows)
        broken, around = hidden.clone(), [x.clone() for x in vectors]
        broken[out], around[0][out], around[1][out], around[2][out] = NAN, -100, 10**9, NAN
        among = match_and_gradients(impl, (broken, weight), *picked(rows), spec, rows_M=rows)
        whole = match_and_gradients(impl, (broken, weight), *around, spec)
        assert whole[1][out].eq(0).all()
        whole[1] = whole[1][rows]
        for ours in (among, whole):
            for x, y in zip(clean, ours, strict=True):
                assert (x - y).abs().max() <= 1e-5 * x.abs().max()
            assert ours[3][out].eq(0).all() and ours[2][0] == len(rows) and ours[2][6] == N - len(rows)
        for arguments, rows_M in ((picked(rows[:0]), rows[:0]), ((*vectors[:3], 0 * w), None)):
            loss, logp, stats, *grads = match_and_gradients(impl, (hidden, weight), *arguments, spec, rows_M=rows_M)
            assert loss == 0 and all(x.eq(0).all() for x in (logp, *grads)) and stats[0] == 0 and stats[6] == N


def match_of_banned_tokens(impl, device):
    """A teacher's -inf is a token of p = 0; a student's, where neither wants it, has no gradient."""
    hidden, weight, ids = head_of(6, 40, 8, torch.float32, device)
    ids, top_ids, top_logp = teacher_of(hidden, weight, ids, 4)
    w, bias = torch.ones(6, device=device), torch.zeros(40, device=device)
    want = match_and_gradients(impl, (hidden, weight), ids, top_ids[:, :3], top_logp[:, :3], w, KL)
    top_logp[:, 3] = -INF
    ours = match_and_gradients(impl, (hidden, weight), ids, top_ids, top_logp, w, KL)
    truth = match_and_gradients(eager, double(hidden, weight), ids, top_ids, top_logp.double(), w.double(), KL)
    assert all((t - o).abs().max() < 1e-5 for t, o in zip(truth[3:], ours[3:])) and ours[0] != want[0]
    banned = [v for v in range(40) if v not in set(top_ids.flatten().tolist() + ids.tolist())]
    bias[banned] = -INF
    loss, *_, dbias = match_and_gradients(impl, (hidden, weight, bias), ids, top_ids, top_logp, w, KL)
    assert loss.isfinite() and dbias.isfinite().all() and dbias[banned].eq(0).all()


# --- beyond eager ----------------------------------------------------------------------------------------------------


def autocast_changes_nothing(impl, device):
    hidden, weight, ids = head_of(8, 40, 8, torch.float32, device)
    vectors = rows_of(8, device)
    teacher = teacher_of(hidden, weight, ids, 4)
    for run in (
        lambda: loss_and_gradients(impl, (hidden, weight), ids, vectors, FULL),
        lambda: match_and_gradients(impl, (hidden, weight), *teacher, vectors.weight, KL),
        lambda: impl.linear_topk(hidden, weight, 4),
    ):
        plain = run()
        with torch.autocast(device, dtype=torch.bfloat16):
            cast = run()
        assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))
    logits = 5 * torch.randn(8, 400, device=device)
    for fn, *inputs in (
        (lambda z: impl.logprob(z, ids, entropy=True), logits),
        (lambda h, x: impl.linear_logprob(h, x, ids, entropy=True), hidden, weight),
    ):
        plain = gradients(fn, *inputs)
        with torch.autocast(device, dtype=torch.bfloat16):
            cast = gradients(fn, *inputs)
        assert all(torch.equal(x, y) for x, y in zip(plain, cast))


def frozen_head_rows_of_slope_0_do_not_leak(impl, device):
    hidden, weight, ids = head_of(6, 40, 8, torch.float32, device)
    slope = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5, 0.0], device=device)
    run = lambda: gradients(lambda h: impl.linear_logprob(h, weight, ids), hidden, grads=[slope])[1]
    clean = run()
    hidden[1], hidden[3, 2] = NAN, INF
    assert torch.equal(clean, run()) and clean[slope == 0].eq(0).all() and clean[slope != 0].ne(0).any(1).all()


def frozen_head_rounds_once(impl, device):
    """Uniform rows over 256 tokens have logit gradients that bf16 holds exactly: what is left is one rounding.

    On CUDA: torch has no product of bf16 matrices in fp32 elsewhere.
    """
    hidden, weight, ids = head_of(40, 256, 64, torch.bfloat16, device, scale=0.0)
    slope = torch.linspace(-1, 1, 40, device=device)
    run = lambda impl, h, w: gradients(lambda h: impl.linear_logprob(h, w, ids), h, grads=[slope])[1]
    truth = run(eager, *double(hidden, weight)).bfloat16()
    assert (run(impl, hidden, weight) == truth).float().mean() > 0.98


def a_second_derivative_is_refused(impl, device):
    """Better than a silent zero."""
    logits, ids = torch.randn(3, 5, device=device, requires_grad=True), torch.tensor([0, 1, 2], device=device)
    (grad,) = torch.autograd.grad(impl.logprob(logits, ids).sum(), logits, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError:
        return
    raise AssertionError("differentiated twice")


def products_are_counted(impl, device):
    hidden, weight, ids = head_of(16, 40, 8, torch.float32, device)
    old, adv, w, *_ = rows_of(16, device)

    def count(fn, *trained):
        leaves = [x.clone().requires_grad_(on) for x, on in zip((hidden, weight), trained)]

        def run():
            out = fn(*leaves)
            if out.requires_grad:
                out.sum().backward()

        return watched(run)[0]

    surrogate = lambda h, x: impl.linear_clipped_surrogate(h, x, ids, old, adv, w, SurrogateSpec())[0]
    logp = lambda h, x: impl.linear_logprob(h, x, ids)
    teacher = teacher_of(hidden, weight, ids, 4)
    match = lambda h, x: impl.linear_match(h, x, *teacher, w, KL)[0]
    with torch.no_grad():
        topk = lambda h, x: impl.linear_topk(h, x, 4)[0]
        assert {count(fn, True, True) for fn in (surrogate, match, logp, topk)} == {1}
    assert {count(fn, True, False) for fn in (surrogate, match, logp)} == {2}
    assert count(surrogate, True, True) == count(match, True, True) == 3 and count(logp, True, True) == 4


def logits_are_never_whole(impl, device, set_slab):
    N, V, D = 64, 256, 8
    hidden, weight, ids = head_of(N, V, D, torch.float32, device)
    vectors = rows_of(N, device)
    teacher = teacher_of(hidden, weight, ids, 4)

    def run():
        found.extend(loss_and_gradients(impl, (hidden, weight), ids, vectors, FULL))
        found.extend(gradients(lambda h, x: impl.linear_logprob(h, x, ids), hidden, weight))
        found.extend(match_and_gradients(impl, (hidden, weight), *teacher, vectors.weight, KL))
        found.extend(impl.linear_topk(hidden, weight, 4))

    found = []
    run()
    whole, found = found, []
    set_slab(8 * V * 4)
    assert watched(run)[1] <= N * V * 4 // 4
    for x, y in zip(whole, found, strict=True):
        assert (x - y).abs().max() <= 1e-5 * x.abs().max()


def weight_gradient_does_not_drift(impl, device, set_slab):
    """32 chunks of bf16: the fp32 sum keeps the error of one chunk."""
    N, V, D = 256, 64, 16
    hidden, weight, ids = head_of(N, V, D, torch.bfloat16, device)
    vectors = rows_of(N, device)
    truth = loss_and_gradients(eager, double(hidden, weight), ids, double(*vectors), SurrogateSpec())[4]
    ours = lambda: loss_and_gradients(impl, (hidden, weight), ids, vectors, SurrogateSpec(), accurate=True)[4]
    run = lambda: (ours() - truth).norm()
    one = run()
    set_slab(8 * V * 4)
    assert run() <= 1.5 * one


CASES = [
    logprob_accuracy,
    logprob_masked_rows_do_not_leak,
    logprob_banned_tokens,
    logprob_is_shift_invariant_and_exact_when_peaked,
    linear_logprob_accuracy,
    linear_logprob_with_a_frozen_head,
    accurate_logits,
    linear_rows_left_out,
    rows_in_any_order_are_the_whole_gathered,
    linear_partial_gradients,
    surrogate_is_the_formula,
    surrogate_cispo_clips_whatever_the_sign_and_keeps_the_gradient,
    surrogate_ties_keep_the_gradient,
    surrogate_extreme_ratios,
    surrogate_extreme_ratios_of_every_form,
    surrogate_zero_weight_rows_do_not_leak,
    surrogate_on_policy,
    linear_surrogate_accuracy,
    linear_surrogate_rows_left_out,
    linear_surrogate_is_its_parts,
    linear_surrogate_backward_scales_and_repeats,
    linear_surrogate_on_policy_is_likelihood,
    outputs_may_go_unused,
    same_training_curve,
    strides_do_not_matter,
    outputs_may_be_changed_in_place,
    reruns_are_equal_to_the_bit,
    wrong_arguments_are_named,
    topk_accuracy,
    topk_of_banned_tokens_and_broken_rows,
    match_accuracy,
    match_is_the_formula,
    match_rows_left_out,
    match_of_banned_tokens,
]
LEAN_CASES = [
    autocast_changes_nothing,
    frozen_head_rows_of_slope_0_do_not_leak,
    a_second_derivative_is_refused,
    products_are_counted,
]
CHUNK_CASES = [logits_are_never_whole, weight_gradient_does_not_drift]
CUDA_CASES = [frozen_head_rounds_once]
