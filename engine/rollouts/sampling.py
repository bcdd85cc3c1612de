"""Counter-based noise and one draw from a row of logits: what a rollout needs to pick the next token.

    draw = first v with sum_{w <= v} p_w > u * sum p,     u = philox(seed, request, position)

The noise has no state: a token depends on its seed, request and position, never on what else is in the batch.
Axes: N rows, V vocabulary, K the tokens kept by a filter. Oracles: Random123's published vectors for the noise,
a chi-square against the exact probabilities for the draw.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch

from engine.config import check_ranges
from engine.errors import UserError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF
_MASS_ONE = 2.0**62  # probability 1 as an integer: a sum of probabilities stays below 2**63


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when a completion ends beside EOS.

    `temperature` 0 is greedy, and its log-probabilities are those at temperature 1. `top_k` 0 and `top_p` 1 are off;
    with both on, `top_p` is a share of what `top_k` kept. `stop` strings end a completion, and are part of it.
    Raises `UserError` on a value that the setting of its name does not allow.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        check_ranges(self)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop must be texts, none of them empty, not {self.stop!r}.")

    @functools.cached_property
    def drawing(self) -> "Sampling":
        """What of it says how a token is drawn; all that agree in it share a recorded step."""
        return dataclasses.replace(self, max_new_tokens=1, stop=())

    @property
    def filtered(self) -> bool:
        """Whether the distribution drawn from may differ from the one at the temperature."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter: four and key: two words, ints or int64 tensors that broadcast, each in [0, 2**32). Returns four words
    likewise. Exact integer arithmetic: the same words on every device, and as in Triton's `tl.philox`.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mul_32x32(c0, _MULTIPLIERS[0])
        high2, low2 = _mul_32x32(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def _mul_32x32(a, b: int):
    """The high and the low word of a 64-bit product, b in halves so that no partial product reaches the sign bit."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _LOW32


def philox_uniform(seed: int, requests: torch.Tensor, position) -> torch.Tensor:
    """Noise in [0, 1) on 53 bits, for the token at `position` of each request.

    seed: an int, of which 64 bits count. requests: int64 [N]; position: int or int64, broadcast against it.
    Returns float64 of the broadcast shape, on the device of `requests`, the same values on every device.
    """
    counter = (requests & _LOW32, (requests >> 32) & _LOW32, position, torch.zeros_like(requests))
    word0, word1, _, _ = philox(counter, (seed & _LOW32, (seed >> 32) & _LOW32))
    return ((word0 >> 5) * 2**26 + (word1 >> 6)).double() * 2.0**-53


def sample(logits_NV: torch.Tensor, sampling: Sampling, uniform_N: torch.Tensor, vocabulary: int | None = None):
    """Picks one token per row.

    logits_NV: any float dtype, -inf for a banned token (at least one is not). uniform_N: float64 in [0, 1).
    vocabulary: only ids below are drawn, as if the others, which pad the head, were a filter's; None: all.
    Returns ids_N (int64) and logp_N (fp32, under the whole distribution at the temperature, which is what a trainer
    recomputes, also where a filter cut it).
    A token of probability 0 is never drawn, whatever the noise.
    """
    logits_NV = logits_NV.float()
    if sampling.temperature not in (0, 1):
        logits_NV = logits_NV / sampling.temperature
    logp_NV = logits_NV.log_softmax(-1)
    known_NV = logp_NV[:, :vocabulary]
    if sampling.temperature == 0:
        ids_N = known_NV.argmax(-1)
    elif not sampling.filtered:
        ids_N = _draw(known_NV.exp(), uniform_N)
    else:
        logp_NK, order_NK = _filter(known_NV, sampling)
        ids_N = _pick(order_NK, _draw(logp_NK.exp(), uniform_N))
    return ids_N, _pick(logp_NV, ids_N)


def _filter(logp_NV, sampling):
    """Log-probabilities, renormalised, of the tokens that top-k then top-p keep (-inf: dropped), and their ids.

    The nucleus is the smallest set of likeliest tokens whose mass reaches top_p (Holtzman et al. 2020).
    """
    if sampling.top_k:
        logp_NK, order_NK = logp_NV.topk(min(sampling.top_k, logp_NV.shape[-1]), dim=-1)
    else:
        logp_NK, order_NK = logp_NV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_p < 1:
        p_NK = logp_NK.double().exp()
        upto_NK = p_NK.cumsum(-1)
        enough_NK = upto_NK - p_NK >= sampling.top_p * upto_NK[:, -1:]  # without this token already
        logp_NK = logp_NK.masked_fill(enough_NK, -torch.inf)
    return logp_NK.log_softmax(-1), order_NK


def _draw(p_NV, uniform_N):
    """Places drawn by inverse CDF in int64: sums are exact in any order, so probability 0 is a step of width 0 on any
    device."""
    upto_NV = (p_NV * _MASS_ONE).long().cumsum(-1)
    target_N = (uniform_N * upto_NV[:, -1]).long()  # below the total: a noise of 1 - 2**-53 survives the rounding
    ids_N = torch.searchsorted(upto_NV, target_N[:, None], right=True)[:, 0]
    return ids_N.clamp_(max=p_NV.shape[-1] - 1)  # only a row of nan gets there; its logp says so


def _pick(x_NV, ids_N):
    return x_NV.gather(-1, ids_N[:, None])[:, 0]
