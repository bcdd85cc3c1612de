"""Asking a model and grading its answers: the one way of training, evaluation and `engine.generate`.

    question -> rollout -> texts -> grades

A group of answers is graded as soon as it is complete, on a thread beside the decoding of the others. There is no
collective in it: at lag 1 training asks beside an update, and two threads that share a process group deadlock.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from engine import adapters, dist, linears, model
from engine.chat import encode_prompt, opened_thoughts, read_answer
from engine.config import Config
from engine.data import Item
from engine.errors import UserError
from engine.policy import load_kernels
from engine.replica import Replica
from engine.rewards import Grades, Reward, grade, marked_answer, overlong_penalty, soft_overlong_penalty
from engine.rollouts import ROLLOUTS
from engine.rollouts.protocol import Completion, Rollout
from engine.rollouts.sampling import Sampling

Question = tuple[int, Item, list[int]]
"""Its number, which its noise depends on, what is asked, and that as token ids (`encode`)."""
Timer = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Group:
    """A question and its answers, graded; the lists have an entry per answer."""

    item: Item
    prompt: list[int]
    completions: list[Completion]
    texts: list[str]  # what is graded
    grades: Grades
    rewards: list[float]  # what the advantage is made of


def encode(item: Item, tokenizer, config: Config) -> list[int]:
    """Token ids of what is asked, up to where the answer begins."""
    return encode_prompt(tokenizer, item.prompt, config.enable_thinking)


def sampling_of(config: Config) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.stop)


def rollout_rows(config: Config, world_size: int) -> int:
    """Sequences a rank decodes at once, in training and in evaluation."""
    return config.rollout_batch or max(config.prompts_per_step * config.group_size // world_size, config.group_size)


def check_room(lm, config: Config, behind_examples: bool) -> None:
    """UserError when the longest prompt and answer together exceed the positions the model was made for."""
    shown = ("max_prompt_tokens", *(("max_context_tokens",) if behind_examples else ()))
    for name in shown:
        longest, positions = getattr(config, name) + config.max_new_tokens, lm.config.max_position_embeddings
        if longest > positions:
            raise UserError(
                f"{name} + max_new_tokens is {longest}, but the model has {positions} positions; lower them."
            )


def make_rollout(replica: Replica, tokenizer, config: Config, should_stop=dist.stop_requested):
    """The configured rollout back-end over a replica, its buffers made for the longest rows of `config`."""
    return ROLLOUTS[config.rollout](
        replica,
        eos_ids=model.eos_ids(replica.lm, tokenizer),
        pad_id=model.pad_id(replica.lm, tokenizer),
        ops=load_kernels(config, replica.device),
        vocabulary=max(tokenizer.get_vocab().values()) + 1,
        decode=functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False),
        max_batch=rollout_rows(config, dist.world_size()),
        max_prompt=config.longest_prompt,
        max_new=config.max_new_tokens,
        memory=int(config.kv_memory_gib * 2**30) or None,
        should_stop=should_stop,
    )


def open_rollout(tokenizer, config: Config, device: torch.device) -> Rollout:
    """A rollout of the model that the config names, where nothing is trained."""
    dtype = model.compute_dtype(device)
    lm = linears.convert(adapters.load(config.start, config.seed, dtype), config)
    check_room(lm, config, behind_examples=False)
    lm = model.cast_parameters(lm, dtype).to(device).eval().requires_grad_(False)
    return make_rollout(Replica(lm), tokenizer, config)


class Asker:
    """Asks questions of a rollout back-end and grades the answers by `rewards`; by none, they are only read.

    `progress(done, of)` hears of each answer that has ended."""

    def __init__(
        self,
        rollout: Rollout,
        tokenizer,
        rewards: Sequence[Reward],
        config: Config,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.rollout, self.tokenizer, self.rewards, self.config = rollout, tokenizer, rewards, config
        self.progress = progress

    def ask(
        self,
        questions: Sequence[Question],
        *,
        num_samples: int,
        sampling: Sampling,
        seed: int,
        span: Timer = nullcontext,
    ) -> list[Group]:
        """The answers to each question, in the order of the questions, whichever was complete first.

        `span(verb)` is entered around the "rollout" and, on the grading thread, around the "reward" of each group.
        A reward that fails ends the rollout; InterruptedError, when the rollout was told to stop, leaves what waits
        ungraded.
        """
        graded: dict[int, Future[Group]] = {}
        waiting: collections.deque[Future[Group]] = collections.deque()
        ended = itertools.count(1)

        def on_group(p: int, completions: list[Completion]) -> None:
            while waiting and waiting[0].done():
                waiting.popleft().result()  # raises what the reward did
            _, item, prompt = questions[p]
            graded[p] = grader.submit(self.grade, item, prompt, completions, span)
            waiting.append(graded[p])

        def on_answer() -> None:
            self.progress(next(ended), len(questions) * num_samples)

        with ThreadPoolExecutor(1, "reward") as grader:
            try:
                with span("rollout"):
                    self.rollout(
                        [prompt for _, _, prompt in questions],
                        num_samples=num_samples,
                        sampling=sampling,
                        seed=seed,
                        requests=[number * num_samples for number, _, _ in questions],
                        on_group=on_group,
                        on_answer=on_answer if self.progress else None,
                    )
                return [graded[p].result() for p in range(len(questions))]
            except BaseException:
                grader.shutdown(wait=False, cancel_futures=True)  # else all that waits would be graded first
                raise

    def grade(self, item: Item, prompt: list[int], completions: list[Completion], span: Timer = nullcontext) -> Group:
        """Reads the answers, behind the thoughts that the template has opened, and grades them."""
        with span("reward"):
            opened = opened_thoughts(self.tokenizer, item.prompt, self.config.enable_thinking)
            texts = [read_answer(self.tokenizer, c.ids, c.finish, opened) for c in completions]
            grades = grade(self.rewards, texts, [item] * len(texts), on_error=self.config.reward_on_error)
            fines = [self.fine(c, text) for c, text in zip(completions, texts, strict=True)]
            rewards = [r + fine for r, fine in zip(grades.totals, fines, strict=True)]
        return Group(item, prompt, completions, texts, grades, rewards)

    def fine(self, completion: Completion, text: str) -> float:
        """What an answer's length takes off its reward: 0 or less."""
        config = self.config
        if config.overlong_penalty:
            return overlong_penalty(completion.finish == "length", bool(marked_answer(text)))
        if config.overlong_buffer:
            return soft_overlong_penalty(len(completion.ids), config.max_new_tokens, config.overlong_buffer)
        return 0.0
