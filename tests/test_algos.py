"""Algorithms against hand-written copies of the published formulas, in fp64, sign included.

Conventions: the papers (GRPO 2402.03300 eq. 3, Dr. GRPO 2503.20783, DAPO 2503.14476 eq. 8); TRL's `loss_type`
grpo | dr_grpo | dapo; verl's `loss_agg_mode` seq-mean-token-mean | seq-mean-token-sum-norm | token-mean. Where they
differ: verl adds 1e-6 to the std and clamps k3 to [-10, 10] (not reproduced here), TRL and we add 1e-4.
"""

import math

import pytest
import torch

from engine.algos import ALGOS
from engine.algos.advantage import group_center, group_zscore
from engine.batch import Batch
from engine.config import load_config
from kernels import chunked, eager

N, T, V, D, MAX_NEW = 8, 12, 17, 6, 10


def alone(values):
    return values


def fixed_batch(algo_name, seed=0):
    """Random hidden states and head in fp64, with logp_old spread widely enough for the clip to bind."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N * T, D, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64, requires_grad=True)
    ids_NT = torch.randint(0, V, (N, T), generator=g)
    mask_NT = torch.zeros(N, T, dtype=torch.bool)
    for n, length in enumerate((1, 3, 8, 5, 2, 9, 4, 7)):
        mask_NT[n, 3 : 3 + length] = True
    rewards_PG = torch.tensor([[0.0, 1.0, 1.0, 0.2], [1.0, 0.0, 0.0, 0.0]])
    algo = ALGOS[algo_name]
    adv_N = algo.advantage(rewards_PG, eps=1e-4, unbiased=True).flatten().double()
    logp_NT = token_logps(hidden, weight, ids_NT).detach()
    noise = lambda: 0.5 * torch.randn(N, T, generator=g, dtype=torch.float64)  # noqa: E731
    batch = Batch(
        ids_NT, mask_NT, algo.weight(mask_NT, alone, MAX_NEW).double(), adv_N,
        logp_old_NT=logp_NT + noise(), logp_ref_NT=logp_NT + noise(),
    ).needed_rows()  # fmt: skip
    return hidden, weight, batch, rewards_PG.double()


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
    hidden, weight, batch, rewards_PG = fixed_batch(name)
    loss, stats = ALGOS[name].loss(hidden, weight, None, batch, config, ops)
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight)))

    adv_N = published_advantage(rewards_PG, name).flatten()
    low, high = (0.2, 0.28) if name == "dapo" else (0.2, 0.2)
    logp_NT = token_logps(hidden, weight, batch.ids_NT)
    beta = 0.1 if name == "grpo" else 0.0
    loss_NT = per_token_loss(logp_NT, batch.logp_old_NT, batch.logp_ref_NT, adv_N, beta, low, high)
    truth = published(loss_NT, batch.mask_NT.double(), name)
    theirs = (truth, *torch.autograd.grad(truth, (hidden, weight)))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-6 * max(1.0, other.abs().max().item())
    assert theirs[1].abs().max() > 1e-3  # the comparison is not between zeros


def test_the_clip_binds_on_both_sides_and_dapo_counts_fewer_high_ones():
    counts = {}
    for name in ("dr_grpo", "dapo"):
        config = load_config(["--algo", name])
        hidden, weight, batch, _ = fixed_batch(name)
        stats = ALGOS[name].loss(hidden, weight, None, batch, config, eager)[1]
        counts[name] = dict(zip(ALGOS[name].loss.stats, stats.tolist(), strict=True))
    assert counts["dr_grpo"]["clip_low"] == counts["dapo"]["clip_low"] > 0
    assert counts["dr_grpo"]["clip_high"] > counts["dapo"]["clip_high"] > 0


def test_a_better_answer_becomes_likelier():
    config = load_config(["--algo", "dr_grpo"])
    hidden, weight, batch, _ = fixed_batch("dr_grpo")
    on_policy = Batch(batch.ids_NT, batch.mask_NT, batch.weight_NT, batch.adv_N).needed_rows()
    loss, _ = ALGOS["dr_grpo"].loss(hidden, weight, None, on_policy, config, eager)
    step = hidden - 0.1 * torch.autograd.grad(loss, hidden)[0]
    before = (token_logps(hidden, weight, batch.ids_NT) * batch.mask_NT).sum(1)
    after = (token_logps(step, weight, batch.ids_NT) * batch.mask_NT).sum(1)
    best, worst = batch.adv_N.argmax(), batch.adv_N.argmin()
    assert after[best] > before[best] and after[worst] < before[worst]


def test_sft_loss_is_the_mean_negative_log_likelihood_of_responses():
    hidden, weight, batch, _ = fixed_batch("grpo")
    weighted = Batch(batch.ids_NT, batch.mask_NT, ALGOS["sft"].weight(batch.mask_NT, alone, 0).double(), batch.adv_N)
    loss, stats = ALGOS["sft"].loss(hidden, weight, None, weighted.needed_rows(), load_config(["--algo", "sft"]), eager)
    logits = (hidden @ weight.T).view(N, T, V)
    labels = batch.ids_NT.masked_fill(~batch.mask_NT, -100)
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(loss.item() - truth.item()) < 1e-6
    assert math.isclose(stats[0].item() / stats[1].item(), truth.item(), rel_tol=1e-6)


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
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 1:2], mask[1, 1:5], mask[2, 2:4] = True, True, True
    two_ranks = lambda values: [2 * v for v in values]  # noqa: E731  another rank with as much
    assert torch.allclose(ALGOS["grpo"].weight(mask, two_ranks, 6).sum(1), torch.full((3,), 1 / 6))
    assert torch.allclose(ALGOS["dr_grpo"].weight(mask, two_ranks, 6)[mask], torch.full((7,), 1 / 36))
    assert torch.allclose(ALGOS["dapo"].weight(mask, two_ranks, 6)[mask], torch.full((7,), 1 / 14))
