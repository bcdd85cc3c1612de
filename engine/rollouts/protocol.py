"""What a rollout back-end is: prompts in, completions with their log-probabilities out.

Axes: P prompts, G samples of each, T tokens of an answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.replica import Replica
from engine.rollouts.sampling import Sampling


@dataclass(frozen=True)
class Completion:
    """One sampled answer; its lists have one entry per token.

    ids end with the EOS, or with the token that completed a stop string, where one of them ended it. logp is under
    the whole distribution at the temperature, also where top-p or top-k cut the one drawn from.
    """

    ids: list[int]
    logp: list[float]
    finish: str  # "eos", "stop" or "length"
    version: int = 0  # of the weights that sampled it


class Rollout(Protocol):
    """Samples from the weights of a replica, which others write between two calls.

    It may not: call a collective, for at lag 1 it runs beside an update; write the weights, or read them outside of
    `replica.reading()`; on a GPU work on another stream than the caller's current one without waiting for each other;
    leave anything running, or a state that the next call sees, when it returns or raises.
    """

    def prepare(self, sampling: Sampling) -> None:
        """Does now what would make the first call slow (graphs, kernels); it may be nothing."""

    def __call__(
        self,
        prompts: list[list[int]],
        *,
        num_samples: int,
        sampling: Sampling,
        seed: int,
        requests: Sequence[int] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
        on_answer: Callable[[], None] | None = None,
    ) -> list[list[Completion]]:
        """Completions [P][G] of prompts [P], lists of token ids, none of them empty; G is `num_samples`.

        Sample g of prompt p is request `requests[p] + g`, by default `p * num_samples + g`. Its tokens depend on the
        weights, its prompt, `sampling`, `seed` and that number alone: not on what shares the batch or was asked before.
        `on_answer()` is called in the caller's thread for each answer that has ended, `on_group(p, completions)` for
        each prompt that has all its answers, both as soon as that is known; what they raise ends the call.
        Raises InterruptedError soon after `should_stop` says yes, within tokens rather than answers.
        """


class BackEnd(Protocol):
    """A row of ROLLOUTS: makes a Rollout."""

    def __call__(
        self,
        replica: Replica,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        ops,
        vocabulary: int | None,
        decode: Callable[[list[int]], str],
        max_batch: int,
        max_prompt: int,
        max_new: int,
        memory: int | None,
        should_stop: Callable[[], bool],
    ) -> Rollout:
        """eos_ids: every id that ends a completion. pad_id: an id of the vocabulary that padding may have.
        ops: kernels.eager, kernels.chunked or kernels.fused. vocabulary: ids from there on are never drawn.
        decode: ids -> text, for stop strings. max_batch: the most rows to decode at once. max_prompt, max_new: the most
        tokens of a prompt and of an answer. memory: bytes that keys and values may take; None: no limit.
        should_stop: to be asked after each token, cheap.
        """
