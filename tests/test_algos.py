"""Algorithms against hand-written copies of the published formulas, in fp64, sign included.

Conventions: the papers (GRPO 2402.03300 eq. 3, Dr. GRPO 2503.20783, DAPO 2503.14476 eq. 8; RLOO 2402.14740, CISPO
2506.13585 eq. 4, GSPO 2507.18071 eq. 5, SAPO 2511.20347 eq. 5); TRL's `loss_type` grpo | dr_grpo | dapo; verl's
`loss_agg_mode` seq-mean-token-mean | seq-mean-token-sum-norm | token-mean. Where they differ: verl adds 1e-6 to the std
and clamps k3 to [-10, 10] (not reproduced here), TRL and we add 1e-4.
"""

import collections
import dataclasses
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from engine.algos import ALGOS
from engine.algos.advantage import batch_center, group_center, group_leave_one_out, group_zscore
from engine.algos.needs import ratio_base
from engine.config import load_config
from engine.errors import UserError
from engine.layout import Rows
from engine.samples import Sample
from kernels import chunked, eager

N, T, V, D, MAX_NEW = 8, 12, 17, 6, 10
LENGTHS = (1, 3, 8, 5, 2, 9, 4, 7)


class Truth(NamedTuple):
    """What the published formulas take."""

    ids_NT: torch.Tensor
    mask_NT: torch.Tensor
    adv_N: torch.Tensor
    rewards_PG: torch.Tensor

    def spread(self, values_M):
        """[N, T], 0 where nothing is trained."""
        return torch.zeros(N, T, dtype=values_M.dtype).masked_scatter(self.mask_NT, values_M)


def alone(values):
    return values


def fixed_batch(algo_name, seed=0):
    """Random hidden states and head in fp64, with logp_old spread widely enough for the clip to bind; the rewards, and
    the trained tokens both as rows and under a mask of [N, T], which `ids_NT` and `adv_N` go with."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N * T, D, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64, requires_grad=True)
    ids_NT = torch.randint(0, V, (N, T), generator=g)
    mask_NT = torch.zeros(N, T, dtype=torch.bool)
    for n, length in enumerate(LENGTHS):
        mask_NT[n, 3 : 3 + length] = True
    rewards_PG = torch.tensor([[0.0, 1.0, 1.0, 0.2], [1.0, 0.0, 0.0, 0.0]])
    algo = ALGOS[algo_name]
    adv_N = group_zscore(rewards_PG).flatten().double()
    if algo.source.rolls_out:
        adv_N = algo.source.advantage(rewards_PG, eps=1e-4, unbiased=True).flatten().double()
    logp_M = token_logps(hidden, weight, ids_NT).detach()[mask_NT]
    noise = lambda: 0.5 * torch.randn(N, T, generator=g, dtype=torch.float64)[mask_NT]  # noqa: E731
    lengths = torch.tensor(LENGTHS)
    weight_N = torch.tensor(algo.weight(LENGTHS, alone, MAX_NEW), dtype=torch.float64)
    rows = Rows(
        ids_T=ids_NT.flatten(),
        position_T=torch.arange(T).repeat(N),
        spans=None,
        source_M=mask_NT.flatten().nonzero()[:, 0] - 1,
        ids_M=ids_NT[mask_NT],
        weight_M=weight_N.repeat_interleave(lengths),
        adv_M=adv_N.repeat_interleave(lengths),
        first_N=lengths.cumsum(0) - lengths,
        values={"logp_old": logp_M + noise(), "logp_ref": logp_M + noise()},
    )
    return hidden, weight, rows, Truth(ids_NT, mask_NT, adv_N, rewards_PG.double())


def token_logps(hidden, weight, ids_NT):
    """Log-probability of token t from the hidden state at t - 1; position 0 gets 0."""
    logits = (hidden @ weight.T).view(N, T, V)[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, ids_NT[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(N, 1, dtype=logp.dtype), logp], 1)


def published_advantage(rewards_PG, name):
    mean = rewards_PG.mean(1, keepdim=True)
    return rewards_PG - mean if name == "dr_grpo" else (rewards_PG - mean) / (rewards_PG.std(1, keepdim=True) + 1e-4)


def per_token_loss(logp, old, ref, adv_N, beta, low, high):
    ratio = torch.exp(logp - old)
    adv = adv_N[:, None]
    loss = -torch.min(ratio * adv, torch.clamp(ratio, 1 - low, 1 + high) * adv)
    kl = torch.exp(ref - logp) - (ref - logp) - 1
    return loss + beta * kl


def trl(loss_NT, mask, name):
    if name == "grpo":
        return ((loss_NT * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if name == "dr_grpo":
        return (loss_NT * mask).sum() / (loss_NT.size(0) * MAX_NEW)
    return (loss_NT * mask).sum() / mask.sum().clamp(min=1.0)


def verl(loss_NT, mask, name):
    if name == "grpo":
        return torch.mean(torch.sum(loss_NT * mask, -1) / (torch.sum(mask, -1) + 1e-8))
    if name == "dr_grpo":
        return torch.sum(torch.sum(loss_NT * mask, -1)) / loss_NT.shape[0] / MAX_NEW
    return (loss_NT * mask).sum() / (mask.sum() + 1e-8)


@pytest.mark.parametrize("ops", [eager, chunked], ids=["eager", "chunked"])
@pytest.mark.parametrize("published", [trl, verl])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_loss_and_gradient_equal_the_published_formula(name, published, ops):
    config = load_config(["--algo", name, "--max_new_tokens", str(MAX_NEW)])
    hidden, weight, rows, truth = fixed_batch(name)
    loss, _ = ALGOS[name].loss(config, ops)(hidden, weight, None, rows)
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight)))

    adv_N = published_advantage(truth.rewards_PG, name).flatten()
    low, high = (0.2, 0.28) if name == "dapo" else (0.2, 0.2)
    logp_NT = token_logps(hidden, weight, truth.ids_NT)
    beta = 0.1 if name == "grpo" else 0.0
    old_NT, ref_NT = (truth.spread(rows.values[key]) for key in ("logp_old", "logp_ref"))
    loss_NT = per_token_loss(logp_NT, old_NT, ref_NT, adv_N, beta, low, high)
    mean = published(loss_NT, truth.mask_NT.double(), name)
    theirs = (mean, *torch.autograd.grad(mean, (hidden, weight)))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-6 * max(1.0, other.abs().max().item())
    assert theirs[1].abs().max() > 1e-3  # the comparison is not between zeros


def cispo(logp, old, mask, adv):
    return -torch.exp(logp - old).clamp(max=5.0).detach() * adv[:, None] * logp


def sapo(logp, old, mask, adv):
    tau = torch.tensor([1.05, 1.0], dtype=torch.float64)[(adv > 0).long()][:, None]
    return -torch.sigmoid(tau * (torch.exp(logp - old) - 1)) * 4 / tau * adv[:, None]


def gspo(logp, old, mask, adv):
    mean = ((logp - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return per_token_loss(mean, 0.0, mean, adv, 0.0, 0.0003, 0.0004).expand_as(logp)


def of_answers(loss, mask):
    return (loss * mask).sum(1).mean()


ROWS = {  # per token; how tokens become one number; the advantage of a group's rewards
    "rloo": (lambda p, old, m, a: -torch.exp(p - old) * a[:, None], of_answers, "others"),
    "reinforce": (lambda p, old, m, a: -torch.exp(p - old) * a[:, None], of_answers, "batch"),
    "cispo": (cispo, lambda loss, mask: (loss * mask).sum() / mask.sum(), "zscore"),
    "gspo": (gspo, lambda loss, mask: ((loss * mask).sum(1) / mask.sum(1)).mean(), "zscore"),
    "sapo": (sapo, lambda loss, mask: ((loss * mask).sum(1) / mask.sum(1)).mean(), "zscore"),
}
ADVANTAGES = {
    "others": lambda r: r - (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1),
    "batch": lambda r: r - r.mean(),
    "zscore": lambda r: published_advantage(r, "grpo"),
}


@pytest.mark.parametrize("ops", [eager, chunked], ids=["eager", "chunked"])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_formula_of_its_paper(name, on_policy, ops):
    per_token, reduce, advantage = ROWS[name]
    hidden, weight, rows, truth = fixed_batch(name)
    adv_N = ADVANTAGES[advantage](truth.rewards_PG).flatten()
    ours_N = torch.tensor([s.adv for s in ALGOS[name].baseline(samples_of(truth.adv_N), alone)], dtype=torch.float64)
    assert (ours_N - adv_N).abs().max() < 1e-6
    rows = dataclasses.replace(rows, adv_M=adv_N.repeat_interleave(torch.tensor(LENGTHS)))
    if on_policy:
        rows.values.pop("logp_old")
    loss, stats = ALGOS[name].loss(load_config(["--algo", name]), ops)(hidden, weight, None, rows)
    logp_NT = token_logps(hidden, weight, truth.ids_NT)
    old_NT = logp_NT.detach() if on_policy else truth.spread(rows.values["logp_old"])
    theirs = reduce(per_token(logp_NT, old_NT, truth.mask_NT, adv_N), truth.mask_NT.double())
    grads = [torch.autograd.grad(x, (hidden, weight)) for x in (loss, theirs)]
    assert (loss - theirs).abs() <= 1e-9 and grads[1][0].abs().max() > 1e-3
    for mine, other in zip(*grads, strict=True):
        assert (mine - other).abs().max() <= 1e-9


def samples_of(adv_N):
    return [Sample([1], [2], adv=adv) for adv in adv_N.tolist()]


def of_trl(config, logp_NT, old_NT, ref_NT, mask_NT, adv_N):
    """The loss by TRL's own GRPOTrainer, its model's log-probabilities given."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed").GRPOTrainer
    gathers = SimpleNamespace(gather=alone, reduce=lambda x, reduction: x, num_processes=1)
    names = dict(cispo="cispo", sapo="sapo", dapo="dapo", dr_grpo="dr_grpo")
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp_NT, torch.zeros_like(logp_NT), None),
        top_entropy_quantile=1.0, aux_loss_enabled=False, off_policy_mask_threshold=None, beta=config.beta,
        importance_sampling_level="sequence" if config.algo == "gspo" else "token", use_vllm=False,
        loss_type=names.get(config.algo, "grpo"), epsilon_low=config.clip_low,
        epsilon_high=config.clip_high + (config.algo == "cispo"), vllm_importance_sampling_correction=False,
        args=SimpleNamespace(
            delta=None, sapo_temperature_pos=config.tau_pos, sapo_temperature_neg=config.tau_neg,
            use_bias_correction_kl=False, steps_per_generation=1,
        ),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, accelerator=gathers,
        max_completion_length=MAX_NEW, _entropy_bonus_enabled=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )  # fmt: skip
    ids = torch.zeros_like(mask_NT, dtype=torch.int64)
    inputs = dict(
        prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask_NT.double(), advantages=adv_N,
        old_per_token_logps=old_NT, ref_per_token_logps=ref_NT, num_items_in_batch=mask_NT.sum(),
    )  # fmt: skip
    return trainer._compute_loss(stub, None, inputs)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo"])
def test_loss_and_gradient_equal_trls_own(name):
    config = load_config(["--algo", name, "--max_new_tokens", str(MAX_NEW)])
    hidden, weight, rows, truth = fixed_batch(name)
    logp_NT, (old_NT, ref_NT) = (
        token_logps(hidden, weight, truth.ids_NT),
        [truth.spread(rows.values[key]) for key in ("logp_old", "logp_ref")],
    )
    theirs = of_trl(config, logp_NT, old_NT, ref_NT, truth.mask_NT, truth.adv_N)
    loss, _ = ALGOS[name].loss(config, eager)(hidden, weight, None, rows)
    grads = [torch.autograd.grad(x, (hidden, weight)) for x in (loss, theirs)]
    assert (loss - theirs).abs() <= 1e-6
    for mine, other in zip(*grads, strict=True):
        assert (mine - other).abs().max() <= 1e-6


def test_the_ratio_of_an_answer_is_clipped_and_counted_as_one():
    """And KL and entropy are those of tokens, as in the other losses."""
    argv = ["--algo", "gspo", "--beta", "0.1", "--entropy_coef", "0.01", "--clip_low", "0.05", "--clip_high", "0.05"]
    hidden, weight, rows, truth = fixed_batch("gspo")
    both = [ALGOS[name].loss(load_config(argv[:1] + [name] + argv[2:]), eager) for name in ("gspo", "grpo")]
    gspo_stats, grpo_stats = (
        dict(zip(loss.stats, loss(hidden, weight, None, rows)[1].tolist(), strict=True)) for loss in both
    )
    logp_NT, mask = token_logps(hidden, weight, truth.ids_NT), truth.mask_NT
    mean_N = ((logp_NT - truth.spread(rows.values["logp_old"])) * mask).sum(1) / mask.sum(1)
    low_N, high_N = (truth.adv_N < 0) & (mean_N.exp() < 0.95), (truth.adv_N > 0) & (mean_N.exp() > 1.05)
    lengths = torch.tensor(LENGTHS)
    assert gspo_stats["clip_low"] == lengths[low_N].sum() and gspo_stats["clip_high"] == lengths[high_N].sum()
    assert low_N.any() and high_N.any()
    for name in ("tokens", "kl", "entropy", "kl_old"):
        assert gspo_stats[name] == pytest.approx(grpo_stats[name], rel=1e-5)
    no_adv = dataclasses.replace(rows, adv_M=torch.zeros_like(rows.adv_M))
    grads = [torch.autograd.grad(loss(hidden, weight, None, no_adv)[0], hidden)[0] for loss in both]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 1e-4


def sampled(rows, log_ratio_M):
    """The rows, from a sampler whose log-probabilities are `log_ratio_M` below the old policy's."""
    return dataclasses.replace(rows, values=rows.values | {"logp_behaviour": rows.values["logp_old"] - log_ratio_M})


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "sapo"])
def test_a_token_outside_the_mask_teaches_nothing_and_one_inside_by_its_weight(name):
    argv = ["--algo", name, "--beta", "0", "--importance_mask", "0.5", "2"]
    hidden, weight, rows, truth = fixed_batch(name)
    log_ratio_M = torch.linspace(-1.2, 1.2, len(rows.ids_M), dtype=torch.float64)
    w_M = log_ratio_M.exp()
    kept_M = (w_M >= 0.5) & (w_M <= 2)
    masked = ALGOS[name].loss(load_config(argv), eager)
    loss, stats = masked(hidden, weight, None, sampled(rows, log_ratio_M))
    plain = ALGOS[name].loss(load_config(argv[:4]), eager)
    by_hand = dataclasses.replace(rows, adv_M=rows.adv_M * torch.where(kept_M, w_M, 0.0))
    want, _ = plain(hidden, weight, None, by_hand)
    grads = [torch.autograd.grad(x, hidden)[0] for x in (loss, want)]
    torch.testing.assert_close(*grads)
    assert grads[0][rows.source_M[~kept_M]].eq(0).all() and 0 < kept_M.sum() < len(kept_M)
    named = dict(zip(masked.stats, stats.tolist(), strict=True))
    now_M = token_logps(hidden, weight, truth.ids_NT)[truth.mask_NT].detach() - rows.values["logp_old"] + log_ratio_M
    for key, (low, high) in {"masked": (0.5, 2.0), "off_ratio": (0.9, 1.1)}.items():
        assert named[key] == ((now_M.exp() < low) | (now_M.exp() > high)).sum() > 0
    assert "masked" not in plain.stats and "off_ratio" in plain.stats


@pytest.mark.parametrize(
    ("old", "behaviour", "learns"),
    [
        ((-1.0, -2.0), (-1.0, -2.0), True),
        ((-1.0, -2.0), (-2.0, -1.0), True),  # ratios e and 1/e: their geometric mean is 1
        ((-1.0, -2.0), (-1.3, -2.0), False),  # exp(0.15)
        ((-1.3, -2.0), (-1.0, -2.0), False),
        (None, (-1.0, -2.0), True),  # not known yet
    ],
)
def test_an_answer_too_far_from_its_sampler_is_left_out_whole(old, behaviour, learns):
    loss = ALGOS["grpo"].loss(load_config(["--sequence_mask", "0.9", "1.1"]), eager)
    values = {"logp_behaviour": torch.tensor(behaviour)} | ({} if old is None else {"logp_old": torch.tensor(old)})
    assert loss.can_learn(Sample([1], [2, 3], values=values)) == learns


@pytest.mark.parametrize(
    ("argv", "base"),
    [
        ("", "on_policy"),
        ("--epochs 2", "recompute"),
        ("--lag 1", "sampler"),
        ("--lag 1 --importance_cap 2", "on_policy"),
        ("--lag 1 --importance_mask 0.5 5", "on_policy"),
        ("--lag 1 --importance_mask 0.5 5 --epochs 2", "recompute"),
        ("--sequence_mask 0.9 1.1", "recompute"),
        ("--lag 1 --sequence_mask 0.9 1.1", "recompute"),
    ],
)
def test_what_the_ratio_is_against(argv, base):
    assert ratio_base(load_config(argv.split())) == base


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--algo sapo --clip_high 0.28", "sapo clips nothing"),
        ("--algo cispo --dual_clip 3", "cispo has none such"),
        ("--algo sapo --dual_clip 3", "sapo has none such"),
    ],
)
def test_a_setting_that_a_form_of_the_loss_has_no_use_for_is_refused(argv, words):
    config = load_config(argv.split())
    with pytest.raises(UserError, match=words):
        ALGOS[config.algo].loss(config, eager)


def test_the_clip_binds_on_both_sides_and_dapo_counts_fewer_high_ones():
    counts = {}
    for name in ("dr_grpo", "dapo"):
        loss = ALGOS[name].loss(load_config(["--algo", name]), eager)
        hidden, weight, rows, _ = fixed_batch(name)
        counts[name] = dict(zip(loss.stats, loss(hidden, weight, None, rows)[1].tolist(), strict=True))
    assert counts["dr_grpo"]["clip_low"] == counts["dapo"]["clip_low"] > 0
    assert counts["dr_grpo"]["clip_high"] > counts["dapo"]["clip_high"] > 0


def test_a_better_answer_becomes_likelier():
    hidden, weight, rows, truth = fixed_batch("dr_grpo")
    on_policy = dataclasses.replace(rows, values={})
    loss, _ = ALGOS["dr_grpo"].loss(load_config(["--algo", "dr_grpo"]), eager)(hidden, weight, None, on_policy)
    step = hidden - 0.1 * torch.autograd.grad(loss, hidden)[0]
    before, after = ((token_logps(h, weight, truth.ids_NT) * truth.mask_NT).sum(1) for h in (hidden, step))
    best, worst = truth.adv_N.argmax(), truth.adv_N.argmin()
    assert after[best] > before[best] and after[worst] < before[worst]


def test_sft_loss_is_the_mean_negative_log_likelihood_of_responses():
    hidden, weight, rows, truth = fixed_batch("sft")
    loss = ALGOS["sft"].loss(load_config(["--algo", "sft"]), eager)
    value, stats = loss(hidden, weight, None, rows)
    logits = (hidden @ weight.T).view(N, T, V)
    labels = truth.ids_NT.masked_fill(~truth.mask_NT, -100)
    mean = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    each_NT = -token_logps(hidden, weight, truth.ids_NT) * truth.mask_NT
    assert abs(value.item() - mean.item()) < 1e-6
    named = dict(zip(loss.stats, stats.tolist(), strict=True))
    assert math.isclose(named["nll"] / named["tokens"], mean.item(), rel_tol=1e-6)
    assert math.isclose(named["nll_max"], each_NT.max().item(), rel_tol=1e-6)


CAN_LEARN = [
    ("sft", [], {"adv": 0.0}, True),
    ("sft", [], {"answer": []}, False),
    ("dapo", [], {"adv": 0.0}, False),
    ("dapo", [], {"adv": -0.1}, True),
    ("dapo", [], {"adv": 1.0, "answer": []}, False),
    ("dapo", ["--entropy_coef", "0.01"], {"adv": 0.0}, True),
    ("grpo", [], {"adv": 0.0}, True),
    ("grpo", ["--beta", "0"], {"adv": 0.0}, False),
]


@pytest.mark.parametrize(("name", "argv", "sample", "can"), CAN_LEARN)
def test_a_sample_whose_gradient_is_nothing_is_told(name, argv, sample, can):
    loss = ALGOS[name].loss(load_config(["--algo", name, *argv]), eager)
    assert loss.can_learn(Sample(**{"prompt": [1], "answer": [2]} | sample)) == can


@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3, 1e-8, -0.7, 1e6])
@pytest.mark.parametrize("advantage", [group_center, group_zscore, group_leave_one_out])
def test_equal_rewards_have_advantage_exactly_zero(advantage, reward):
    assert torch.equal(advantage(torch.full((1, 8), reward)), torch.zeros(1, 8))


@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3, 1e-8, -0.7, 1e6])
@pytest.mark.parametrize("counts", [(8, 0), (3, 5), (1, 6), (0, 0)])
def test_the_baseline_of_a_batch_is_that_of_all_ranks(counts, reward):
    ranks = [[float(torch.tensor(reward))] * count for count in counts]
    sums = [sum(map(sum, ranks)), float(sum(counts))]
    of = lambda adv: batch_center(samples_of(torch.tensor(adv, dtype=torch.float64)), lambda values: sums)  # noqa: E731
    assert [s.adv for adv in ranks for s in of(adv)] == [0.0] * sum(counts)
    sums = [3.0, 4.0]
    assert [s.adv for s in of([1.0, 0.0])] == [0.25, -0.75]


@pytest.mark.parametrize("unbiased", [True, False])
def test_advantages_equal_the_closed_form(unbiased):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    std = math.sqrt(3 / 16 * (4 / 3 if unbiased else 1))
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]]) / (std + 1e-4)
    torch.testing.assert_close(group_zscore(rewards, eps=1e-4, unbiased=unbiased), expected)
    torch.testing.assert_close(group_center(rewards), torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


def test_weights_sum_to_what_each_normalisation_says():
    lengths, two_ranks = [1, 4, 2], lambda values: [2 * v for v in values]  # another rank with as much
    of = {name: ALGOS[name].weight(lengths, two_ranks, 6) for name in ALGOS}
    assert [w * n for w, n in zip(of["grpo"], lengths)] == pytest.approx([1 / 6] * 3)
    assert of["dr_grpo"] == pytest.approx([1 / 36] * 3)
    assert of["dapo"] == of["sft"] == of["cispo"] == pytest.approx([1 / 14] * 3)
    assert of["rloo"] == of["reinforce"] == pytest.approx([1 / 6] * 3) and of["gspo"] == of["sapo"] == of["grpo"]
    assert all(ALGOS[name].weight([0, 0], two_ranks, 6) for name in ALGOS), "answers without a token divide by no 0"
    assert all(ALGOS[name].weight([], lambda values: values, 6) == [] for name in ALGOS), "a step without an answer"
