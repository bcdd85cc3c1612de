"""The noise against published vectors and Triton; the draw against exact probabilities, tails and filters included."""

import os
import subprocess
import sys

import pytest
import torch

from engine.errors import UserError
from engine.rollouts.sampling import Sampling, philox, philox_uniform, sample

ONES = 0xFFFFFFFF
LARGEST = 1 - 2.0**-53

TRITON_SCRIPT = """
import torch, triton, triton.language as tl
from engine.rollouts.sampling import philox

@triton.jit
def _philox_kernel(seed_ptr, c0_ptr, c1_ptr, c2_ptr, out_ptr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    c0 = tl.load(c0_ptr + n).to(tl.uint32)
    c1 = tl.load(c1_ptr + n).to(tl.uint32)
    c2 = tl.load(c2_ptr + n).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, c0 * 0)
    tl.store(out_ptr + n, w0.to(tl.int64))
    tl.store(out_ptr + BLOCK + n, w1.to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + n, w2.to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + n, w3.to(tl.int64))

words = torch.randint(0, 2**32, (3, 64), generator=torch.Generator().manual_seed(0))
for seed in (0, 7, 2**31 + 5, 123456789012345678):
    out = torch.empty(4, 64, dtype=torch.long)
    _philox_kernel[(1,)](torch.tensor([seed]), *words, out, BLOCK=64)
    ours = philox((*words, torch.zeros_like(words[0])), (seed & 0xFFFFFFFF, seed >> 32))
    assert torch.equal(out, torch.stack(ours)), seed
print("same words")
"""


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """Random123's known-answer vectors for philox4x32, 10 rounds."""
    assert list(philox(counter, key)) == words
    assert [word.item() for word in philox([torch.tensor(c) for c in counter], key)] == words


def test_philox_gives_the_words_of_triton(tmp_path):
    script = tmp_path / "same_words.py"
    script.write_text(TRITON_SCRIPT)
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd()}
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=120)
    assert result.stdout == "same words\n", result.stderr


def test_uniform_is_made_of_the_first_two_words():
    request, position, seed = 2**40 + 9, 3, 2**33 + 1
    word0, word1, _, _ = philox((request & ONES, request >> 32, position, 0), (seed & ONES, seed >> 32))
    expected = ((word0 >> 5) * 2**26 + (word1 >> 6)) / 2**53
    assert philox_uniform(seed, torch.tensor([request]), position).item() == expected


def test_uniform_depends_on_seed_request_and_position_and_on_nothing_else():
    requests = torch.arange(64)
    noise = philox_uniform(5, requests, 3)
    assert noise.dtype == torch.float64
    assert torch.equal(noise.flip(0), philox_uniform(5, requests.flip(0), torch.full((64,), 3)))
    assert torch.equal(noise[10:20], philox_uniform(5, requests[10:20], 3))
    others = [philox_uniform(*case) for case in ((6, requests, 3), (5 + 2**32, requests, 3), (5, requests, 4))]
    others += [philox_uniform(5, requests + 2**32, 3), philox_uniform(5, requests + 64, 3)]
    assert torch.stack([noise, *others]).unique().numel() == 6 * 64


def test_uniform_fills_the_interval_evenly():
    noise = philox_uniform(0, torch.arange(1000), torch.arange(100)[:, None])
    assert noise.shape == (100, 1000) and noise.min() >= 0 and noise.max() < 1
    assert _chi_square(noise.histc(200, 0, 1), torch.full((200,), 1 / 200)) < 5
    neighbours = torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()])
    assert torch.corrcoef(neighbours)[0, 1].abs() < 5 / 100_000**0.5


def _chi_square(counts, probabilities):
    """How many standard deviations the statistic lies above its mean."""
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    expected = probabilities[kept].double() * counts.sum()
    freedom = int(kept.sum()) - 1
    return (((counts[kept] - expected) ** 2 / expected).sum() - freedom) / max(2 * freedom, 1) ** 0.5


def _filtered(logits_V, temperature, top_k, top_p):
    """The distribution drawn from, in fp64, one token at a time."""
    p_V = (logits_V.double() / temperature).softmax(-1)
    ranked = sorted(range(len(p_V)), key=lambda v: -p_V[v].item())[: top_k or None]
    total, mass, kept = sum(p_V[v].item() for v in ranked), 0.0, []
    for v in ranked:
        if kept and mass >= top_p * total:
            break
        kept.append(v)
        mass += p_V[v].item()
    q_V = torch.zeros_like(p_V)
    q_V[kept] = p_V[kept] / p_V[kept].sum()
    return p_V, q_V


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (7, 1.0), (0, 0.8), (12, 0.7), (100, 1.0), (1, 1.0), (0, 1e-9)])
def test_sampled_distribution(temperature, top_k, top_p):
    num_draws = 50_000
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    logits_V[[0, 17, 39]] = -torch.inf
    sampling = Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p)
    noise = philox_uniform(3, torch.arange(num_draws), 0)
    ids, logp = sample(logits_V.expand(num_draws, -1), sampling, noise)
    p_V, q_V = _filtered(logits_V, temperature, top_k, top_p)
    assert _chi_square(ids.bincount(minlength=40), q_V) < 5
    torch.testing.assert_close(logp, p_V[ids].log().float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", [{}, {"temperature": 0.7}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_ids_beyond_the_vocabulary_are_never_drawn(way):
    """As if a filter had dropped them: the likeliest half is padding of the head."""
    num_draws, known = 20_000, 20
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(3))
    logits_V[known:] += 3
    noise, sampling = philox_uniform(5, torch.arange(num_draws), 0), Sampling(1, **way)
    ids, logp = sample(logits_V.expand(num_draws, -1), sampling, noise, known)
    assert ids.max() < known
    logp_V = (logits_V / (sampling.temperature or 1)).log_softmax(-1)
    torch.testing.assert_close(logp, logp_V[ids], atol=1e-5, rtol=0)
    if sampling.temperature == 0:
        return
    _, q_V = _filtered(logits_V[:known], sampling.temperature, sampling.top_k, sampling.top_p)
    assert _chi_square(ids.bincount(minlength=known), q_V) < 5


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.999999}])
@pytest.mark.parametrize("noise", [0.0, 2.0**-53, 0.5, LARGEST])
def test_impossible_token_is_never_drawn(filters, noise):
    logits = torch.full((3, 6), -torch.inf)
    logits[0, 2] = logits[1, [1, 4]] = 0.0
    logits[2] = torch.tensor([-torch.inf, 30.0, -torch.inf, -50.0, 20.0, -torch.inf])
    ids, logp = sample(logits, Sampling(1, **filters), torch.full((3,), noise, dtype=torch.float64))
    assert logits.gather(1, ids[:, None]).isfinite().all() and logp.isfinite().all()
    assert ids[0] == 2


def test_rare_tokens_keep_their_share():
    """Token 1 has probability 1e-12: it is drawn by the noise in [1 - 1e-12, 1), and by no other."""
    logits = torch.tensor([[0.0, -27.631021]]).expand(4, -1)
    noise = torch.tensor([0.0, 1 - 2e-12, 1 - 0.5e-12, LARGEST], dtype=torch.float64)
    assert sample(logits, Sampling(1), noise)[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabulary_keeps_its_ends(dtype):
    """152k equal tokens: an fp32 running sum would lose the last ones."""
    size = 151_936
    noise = torch.tensor([0.0, 0.25, 0.5, LARGEST], dtype=torch.float64)
    ids, logp = sample(torch.zeros(4, size, dtype=dtype), Sampling(1), noise)
    assert ids.tolist() == [0, size // 4, size // 2, size - 1] and logp.dtype == torch.float32
    torch.testing.assert_close(logp, torch.full((4,), -11.931214), atol=1e-5, rtol=0)


def test_greedy_is_argmax_at_temperature_one():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(2))
    noise = philox_uniform(0, torch.arange(8), 0)
    ids, logp = sample(logits, Sampling(1, temperature=0, top_k=5, top_p=0.5), noise)
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1))
    assert torch.equal(ids, sample(logits, Sampling(1, top_k=1), noise)[0])


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", 1e-6),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("stop", "text"),
        ("stop", ("ok", "")),
    ],
)
def test_bad_setting_is_named(field, value):
    with pytest.raises(UserError, match=field):
        Sampling(**{"max_new_tokens": 4, field: value})
