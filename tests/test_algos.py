"""Algorithms against hand-written copies of the published formulas, in fp64, sign included.

Conventions: the papers (GRPO 2402.03300 eq. 3, Dr. GRPO 2503.20783, DAPO 2503.14476 eq. 8); TRL's `loss_type`
grpo | dr_grpo | dapo; verl's `loss_agg_mode` seq-mean-token-mean | seq-mean-token-sum-norm | token-mean. Where they
differ: verl adds 1e-6 to the std and clamps k3 to [-10, 10] (not reproduced here), TRL and we add 1e-4.
"""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch

from engine.algos import ALGOS
from engine.algos.advantage import group_center, group_zscore
from engine.config import load_config
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
@pytest.mark.parametrize("advantage", [group_center, group_zscore])
def test_equal_rewards_have_advantage_exactly_zero(advantage, reward):
    assert torch.equal(advantage(torch.full((1, 8), reward)), torch.zeros(1, 8))


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
    assert of["dapo"] == of["sft"] == pytest.approx([1 / 14] * 3)
    assert all(ALGOS[name].weight([0, 0], two_ranks, 6) for name in ALGOS), "answers without a token divide by no 0"
    assert all(ALGOS[name].weight([], lambda values: values, 6) == [] for name in ALGOS), "a step without an answer"
