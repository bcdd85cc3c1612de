"""Layout: samples into micro-batches and rows; a sample in whatever row is what it is alone."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from engine import dist
from engine.algos import ALGOS
from engine.algos.loss import NLL, LogProbs, Surrogate, over_samples
from engine.attention import Padded
from engine.config import load_config
from engine.layout import lay_out, make_rows, members, tokens_of
from engine.learner import Learner
from engine.metrics import Tally
from engine.policy import Policy
from engine.samples import Batch, Sample, pack, unpack
from kernels import chunked, eager
from tests.test_model import FAMILIES, small

CPU = torch.device("cpu")


def draw_groups(seed=0, groups=((6, 3), (1, 1), (4, 2), (1, 2)), most=7, vocabulary=50) -> list[Sample]:
    """Answers of 1 to `most` tokens, for each (tokens of a prompt, number of answers)."""
    dice, samples = random.Random(seed), []
    draw = lambda n: [dice.randrange(5, vocabulary) for _ in range(n)]  # noqa: E731
    floats = lambda n: torch.tensor([dice.uniform(-5, -1) for _ in range(n)])  # noqa: E731
    for size, count in groups:
        prompt = draw(size)
        for _ in range(count):
            n = dice.randint(1, most)
            values = {name: floats(n) for name in ("logp_behaviour", "logp_old", "logp_ref")}
            samples.append(Sample(prompt, draw(n), dice.uniform(-2, 2), 3, dice.random(), values))
    return samples


def of_lengths(lengths, prompt=2) -> list[Sample]:
    """Samples of these numbers of tokens, no two of one prompt."""
    return [Sample([i] * prompt, [2] * (n - prompt)) for i, n in enumerate(lengths)]


def sizes(micros) -> list[int]:
    return [sum(map(tokens_of, micro)) for micro in micros]


def same(a: Sample, b: Sample) -> bool:
    plain = [dataclasses.replace(s, values={}) for s in (a, b)]
    return (
        plain[0] == plain[1]
        and a.values.keys() == b.values.keys()
        and all(torch.equal(x, b.values[name]) for name, x in a.values.items())
    )


@pytest.mark.parametrize("share", [False, None, True])
@pytest.mark.parametrize("tokens", [1, 9, 20, 60, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_keep_to_the_budget_and_lose_nothing(seed, tokens, share):
    samples = draw_groups(seed, [(6, 3), (1, 1), (4, 2), (30, 8), (2, 8)], most=20)
    micros = lay_out(samples, tokens, share)
    assert all(size <= tokens or len(members(micro)) == 1 for size, micro in zip(sizes(micros), micros))
    assert sorted(id(s) for micro in micros for s in members(micro)) == sorted(map(id, samples))
    assert all(s.prompt == unit[0].prompt for micro in micros for unit in micro for s in unit)


def test_the_longest_go_first():
    length = lambda s: len(s.prompt) + len(s.answer)  # noqa: E731
    [micro] = lay_out(of_lengths([3, 9, 5, 12, 4, 7]), 10**6)
    assert [length(s) for s in members(micro)] == [12, 9, 7, 5, 4, 3]
    micros = lay_out(of_lengths([4, 17, 5, 12, 4, 7]), 12)
    assert [[length(s) for s in members(micro)] for micro in micros] == [[17], [12], [7, 5], [4, 4]]


def test_no_budget_is_left_with_room_for_what_stands_in_a_later_micro_batch():
    """First fit: so there are at most twice as many as there must be, and usually hardly more."""
    dice = random.Random(0)
    micros = lay_out(of_lengths([dice.randint(16, 512) for _ in range(200)]), 2048)
    assert len(micros) == -(-sum(sizes(micros)) // 2048), "another order would need fewer"
    for i, micro in enumerate(micros):
        assert all(sum(map(tokens_of, micro)) + tokens_of(u) > 2048 for later in micros[i + 1 :] for u in later)


def test_a_group_is_cut_only_where_the_budget_forces_it():
    group = [Sample([1] * 10, [2] * 5)] * 6
    units = lambda tokens, share: [len(unit) for micro in lay_out(group, tokens, share) for unit in micro]  # noqa: E731
    assert units(9 + 30, True) == [6] and units(9 + 29, True) == [5, 1]
    assert units(3, True) == units(39, False) == [1] * 6


@pytest.mark.parametrize("share", [False, None, True])
@pytest.mark.parametrize("tokens", [1, 20, 60, 10_000])
def test_a_group_enters_a_micro_batch_whole_and_in_its_order(tokens, share):
    samples = [
        dataclasses.replace(s, group=i // 2) for i, s in enumerate(draw_groups(groups=((6, 4), (30, 2), (2, 6))))
    ]
    micros = lay_out(samples, tokens, share)
    assert all(size <= tokens or len(members(micro)) == 2 for size, micro in zip(sizes(micros), micros))
    found = [s for micro in micros for s in members(micro)]
    assert sorted(map(id, found)) == sorted(map(id, samples))
    pairs = [(found[i], found[i + 1]) for i in range(0, len(found), 2)]
    assert all(a is samples[2 * a.group] and b is samples[2 * a.group + 1] for a, b in pairs)


def test_sums_over_samples():
    samples = [Sample([1], [2] * n, adv=i, values={"adv": torch.full((n,), 0.5)}) for i, n in enumerate((3, 1, 4))]
    rows = make_rows([[s] for s in samples], Padded.plan)
    assert rows.first_N.tolist() == [0, 3, 4] and over_samples(torch.arange(8.0), rows).tolist() == [3, 3, 22]
    assert rows.adv_M.tolist() == [0.5] * 3 + [1.5] + [2.5] * 4 and not rows.values
    assert over_samples(torch.ones(0), make_rows([], Padded.plan)).shape == (0,)


def test_prompts_are_shared_where_that_saves_work():
    shares = lambda P, A, G: len(lay_out([Sample([1] * P, [2] * A)] * G, 10**6)[0][0]) > 1  # noqa: E731
    assert shares(60, 10, 8) and not shares(60, 10, 1)
    assert not shares(2, 10, 8), "a prompt of a token more or less"
    assert not shares(1, 10, 8), "nothing to share"
    other = [Sample([i] * 60, [2] * 10) for i in range(8)]
    assert {len(unit) for unit in lay_out(other, 10**6)[0]} == {1}


def test_a_row_of_samples_end_to_end():
    samples = [
        Sample([3, 4], [5, 6], 0.5, weight=0.1),
        Sample([7], [8], -1.0, weight=0.2),
        Sample([9, 9], []),
    ]
    rows = make_rows([[s] for s in samples], Padded.plan)
    assert rows.ids_T.tolist() == [3, 4, 5, 7, 9, 9] + [0] * 10, "up to a whole tile"
    assert rows.position_T[:6].tolist() == [0, 1, 2, 0, 0, 1]
    assert rows.source_M.tolist() == [1, 2, 3] and rows.ids_M.tolist() == [5, 6, 8]
    assert rows.adv_M.tolist() == [0.5, 0.5, -1.0]
    assert rows.weight_M.tolist() == pytest.approx([0.1, 0.1, 0.2])


def test_a_shared_prompt_stands_once_and_every_value_follows_its_token():
    samples = draw_groups()[:3]
    prompt, (a, b, c) = samples[0].prompt, (s.answer for s in samples)
    spans = []
    rows = make_rows([samples], lambda given: spans.extend(given))
    wanted = prompt[:-1] + [i for answer in (a, b, c) for i in [prompt[-1], *answer[:-1]]]
    assert rows.ids_T[: len(wanted)].tolist() == wanted and len(rows.ids_T) % 16 == 0
    assert rows.position_T[: len(wanted)].tolist() == [*range(5), *(5 + i for x in (a, b, c) for i in range(len(x)))]
    assert [tuple(s) for s in spans[:2]] == [(0, 5, 0, 0), (5, len(a), 0, 5)]
    assert sum(s.length for s in spans) == len(rows.ids_T)
    assert rows.ids_M.tolist() == a + b + c and rows.source_M.tolist() == list(range(5, len(wanted)))
    for name in ("logp_old", "logp_ref", "logp_behaviour"):
        assert torch.equal(rows.values[name], torch.cat([s.values[name] for s in samples]))
    assert rows.adv_M.tolist() == pytest.approx([s.adv for s in samples for _ in s.answer])


def test_a_row_of_nothing_has_no_trained_token():
    rows = make_rows([], Padded.plan)
    assert len(rows.ids_T) == 16 and len(rows.source_M) == len(rows.weight_M) == 0 and not rows.values


@pytest.mark.parametrize("ops", [eager, chunked])
@pytest.mark.parametrize("algo", ALGOS)
def test_a_row_of_nothing_has_a_loss_and_gradients_of_zero(algo, ops):
    hidden_TD, weight_VD = torch.randn(16, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    loss, _ = ALGOS[algo].loss(load_config(["--algo", algo]), ops)(
        hidden_TD, weight_VD, None, make_rows([], Padded.plan)
    )
    loss.backward()
    assert loss == 0 and hidden_TD.grad.count_nonzero() == weight_VD.grad.count_nonzero() == 0


def test_a_rank_with_less_to_do_takes_part_with_empty_rows(monkeypatch):
    monkeypatch.setattr(dist, "all_max", lambda values: [max(*values, 5.0)])  # another rank has five
    learner = SimpleNamespace(config=load_config(["--algo", "sft", "--micro_tokens", "10"]))
    assert [len(micro) for micro in Learner.micros(learner, of_lengths([9, 9]))] == [1, 1, 0, 0, 0]
    assert [len(micro) for micro in Learner.micros(learner, [])] == [0] * 5


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tokens", [1, 12, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_in_a_row_is_what_it_is_alone(family, tokens, share):
    """Its log-probabilities, and its gradient under either loss, against the plain model on its own tokens."""
    samples, config = draw_groups(), load_config(["--algo", "grpo", "--model", "none"])
    policy, plain = Policy(small(family).double(), CPU), small(family).double()
    micros = lay_out(samples, tokens, share)
    truth = {id(s): alone(plain, s) for s in samples}
    for micro in micros:
        logp_M = policy(make_rows(micro, policy.plan), LogProbs(config, eager))
        wanted = torch.cat([truth[id(s)].detach() for s in members(micro)])
        torch.testing.assert_close(logp_M, wanted, atol=1e-6, rtol=1e-6)
    for kind in (NLL, Surrogate):
        loss, total = kind(config, eager), 0.0
        policy.zero_grad()
        plain.zero_grad()
        for micro in micros:
            value, _ = policy(make_rows(micro, policy.plan), loss)
            value.backward()
            total += value.item()
        wanted = sum(written_out(kind, alone(plain, s), s, config) for s in samples)
        wanted.backward()
        assert total == pytest.approx(wanted.item(), rel=1e-6)
        for mine, p in zip(policy.parameters(), plain.parameters(), strict=True):
            assert (mine.grad - p.grad).abs().max() <= 1e-6 * p.grad.abs().max()


def test_a_large_vocabulary_is_scored_and_learned_in_slabs_as_whole():
    """Gemma 3's, in fp32 by the kernels that a CPU takes."""
    policy, plain = (make("gemma3_text", vocabulary=262_144) for make in (small, small))
    policy, samples, config = Policy(policy, CPU), draw_groups(vocabulary=262_144), load_config(["--algo", "sft"])
    logp_M = policy(make_rows([[s] for s in samples], policy.plan), LogProbs(config, chunked))
    loss, _ = policy(make_rows([[s] for s in samples], policy.plan), NLL(config, chunked))
    wanted_M = torch.cat([alone(plain, s) for s in samples])
    weight_M = torch.cat([torch.full([len(s.answer)], s.weight) for s in samples])
    torch.testing.assert_close(logp_M, wanted_M, atol=1e-4, rtol=1e-5)
    loss.backward()
    (-weight_M * wanted_M).sum().backward()
    for mine, p in zip(policy.parameters(), plain.parameters(), strict=True):
        assert (mine.grad - p.grad).abs().max() <= 1e-4 * p.grad.abs().max()


def alone(lm, sample: Sample) -> torch.Tensor:
    """Log-probabilities [A] of its answer by the plain model, with nothing beside it."""
    ids = torch.tensor([sample.prompt + sample.answer])
    logp_TV = lm(ids).logits[0].log_softmax(-1)
    return logp_TV[len(sample.prompt) - 1 : -1].gather(-1, torch.tensor(sample.answer)[:, None])[:, 0]


def written_out(kind, logp_A, sample: Sample, config) -> torch.Tensor:
    """Its part of the loss."""
    if kind is NLL:
        return -sample.weight * logp_A.sum()
    ratio = (logp_A - sample.values["logp_old"]).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    d = sample.values["logp_ref"] - logp_A
    surrogate = torch.min(ratio * sample.adv, clipped * sample.adv) - config.beta * (d.exp() - d - 1)
    return -sample.weight * surrogate.sum()


@pytest.mark.parametrize("budget", [2048, 4096])
@pytest.mark.parametrize("spread", ["uniform", "mostly short"])
def test_padding_is_under_a_twentieth_of_the_tokens(budget, spread):
    """Of lengths from 16 to 512: what fills rows up, and beside it what attention's rectangles add on a CPU."""
    dice = random.Random(0)
    draw = {"uniform": lambda: dice.randint(16, 512), "mostly short": lambda: int(16 * 32 ** dice.random())}[spread]
    micros = lay_out(of_lengths([draw() for _ in range(128)]), budget)
    rows = [make_rows(micro, Padded.plan) for micro in micros]
    used, laid = sum(sizes(micros)), sum(len(r.ids_T) for r in rows)
    squares = lambda lengths: sum(n * n for n in lengths)  # noqa: E731
    padded = sum(b.query_SL.numel() * b.key_SL.shape[1] for r in rows for b in r.spans.blocks)
    needed = squares(tokens_of(unit) for micro in micros for unit in micro)
    assert used <= laid <= 1.05 * used
    assert padded <= 1.16 * needed, "powers of two added up to a third"


def test_samples_survive_the_tensors_of_a_checkpoint():
    samples = draw_groups() + [Sample([5], [], version=2), Sample([6, 7], [8], 1 / 3, weight=1e-30)]
    assert all(map(same, unpack(pack(samples)), samples)) and len(unpack(pack(samples))) == len(samples)
    assert unpack(pack([])) == []
    tally = Tally(2)
    tally.add(reward_sum=1 / 3, graded=2)
    tally.sample(prompt="¿", text='\n"', answer="5", reward=0.1)
    batch = Batch(samples, tally, 2**40)
    back = Batch.from_tensors({"cursor": torch.tensor([3])} | batch.tensors())
    assert all(map(same, back.samples, samples)) and back.cursor == 2**40
    assert (back.tally.sums, back.tally.samples) == (tally.sums, tally.samples)
    assert Batch.from_tensors({"cursor": torch.tensor([3])}) is None
    assert (back.staleness(5), Batch([Sample([1], [2])], Tally(), 0).staleness(5)) == (3, 0)
