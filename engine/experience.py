"""Where batches come from: rollouts scored by rewards (rl), or traces packed into rows (sft)."""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import model
from engine.algos import ALGOS, Algo
from engine.batch import Batch, completions_batch, empty_batch, packed_batch
from engine.chat import (
    continue_thoughts,
    encode_prompt,
    encode_text,
    encode_trace,
    may_mistake,
    opened_thoughts,
    read_answer,
    render,
)
from engine.config import Config
from engine.data import TASKS, Item, load_task
from engine.data.stream import Stream
from engine.dist import World
from engine.errors import UserError
from engine.log import Tally
from engine.rewards import Scores, marked_answer, overlong_penalty, score
from engine.rollouts.native import Completion
from engine.rollouts.sampling import Sampling


def load_items(config: Config, split: str) -> Sequence[Item]:
    """The task's rows for "train" or "test"; UserError for a missing file, an empty set or a wrong column.

    Of the test split a fixed sample of `eval_size`, whose answers are needed whatever the algorithm, and whose traces
    are not.
    """
    is_test = split == "test"
    return load_task(
        config.task,
        split,
        source=(config.test_data if is_test else config.train_data) or None,
        prompt_column=config.prompt_column or None,
        answer_column=config.answer_column or None,
        trace_column=config.trace_column or None,
        system_prompt=config.system_prompt,
        limit=(config.eval_size if is_test else config.train_limit) or None,
        seed=config.seed,
        sample=is_test,
        traces=not is_test,
        answers=is_test or ALGOS[config.algo].advantage is not None,
    )


def check_chats(items: Sequence[Item], tokenizer, config: Config) -> None:
    """UserError where tokenizer and model do not belong together, and, naming the row, for one that `check_chat`
    refuses: now, for it may be drawn late."""
    beyond = list_beyond(tokenizer, config)
    for item in items[:1] if TASKS[config.task].generated else items:
        try:
            check_chat(item, tokenizer, beyond, config)
        except UserError as error:
            raise UserError(f"{item.where}: {error}") from None


def list_beyond(tokenizer, config: Config) -> list[str]:
    """The tokens that the model has no embedding for; UserError if every chat needs one."""
    rows = model.model_config(config.start).vocab_size
    model.check_vocabulary(tokenizer, rows, config.start)
    return [token for token, i in tokenizer.get_vocab().items() if i >= rows]


def check_chat(item: Item, tokenizer, beyond: list[str], config: Config) -> None:
    """UserError for a chat or trace that the template refuses or leaves out, or that has a token of `beyond`."""
    thinking, trace = config.enable_thinking, item.trace if ALGOS[config.algo].advantage is None else None
    text = render(tokenizer, item.prompt, thinking)
    written = _letters(text)
    for i, message in enumerate(item.prompt):
        role, content = message["role"], message["content"]
        if role != "assistant" and _letters(content) not in written:  # left out, or written in another way
            other = [*item.prompt[:i], message | {"content": content + "x"}, *item.prompt[i + 1 :]]
            if render(tokenizer, other, thinking) == text:
                raise UserError(
                    f"The chat template leaves out what the role {role!r} says; most know system, user and assistant "
                    "only."
                )
    if trace:
        text += continue_thoughts(opened_thoughts(tokenizer, item.prompt, thinking), trace)
    if may_mistake(tokenizer) or any(token in text for token in beyond):  # spelled in data some are text
        ids = {*encode_prompt(tokenizer, item.prompt, thinking), *encode_text(tokenizer, trace or "")}
        if found := ids.intersection(tokenizer.convert_tokens_to_ids(beyond)):
            raise UserError(
                f"It has the token {tokenizer.convert_ids_to_tokens(min(found))!r}, for which the model has no "
                "embedding; resize the model (resize_token_embeddings), or take it out."
            )


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


def read_answers(tokenizer, item: Item, completions: Sequence[Completion], config: Config) -> list[str]:
    """What the model wrote in answer to `item`, behind the thoughts that its template has opened: what is graded."""
    opened = opened_thoughts(tokenizer, item.prompt, config.enable_thinking)
    return [read_answer(tokenizer, c.ids, c.finish, opened) for c in completions]


class Prompts:
    """Draws encodable prompts; the too long ones are dropped and counted."""

    def __init__(self, items: Sequence[Item], tokenizer, config: Config, stream: Stream):
        self.items, self.tokenizer, self.config, self.stream = items, tokenizer, config, stream
        self.dropped = 0

    def draw(self) -> tuple[int, Item, list[int]]:
        """(number of the draw, item, prompt ids)."""
        for _ in range(len(self.items)):
            number, index = self.stream.draw()
            item = self.items[index]
            ids = encode_prompt(self.tokenizer, item.prompt, self.config.enable_thinking)
            if len(ids) <= self.config.max_prompt_tokens:
                return number, item, ids
            self.dropped += 1
        raise UserError(
            f"All {len(self.items)} prompts exceed max_prompt_tokens {self.config.max_prompt_tokens}; raise it."
        )


def sampling_of(config: Config) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.stop)


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, scored."""

    prompt: list[int]
    completions: list[Completion]
    rewards: list[float]  # what the advantage is made of
    scores: Scores
    texts: list[str]
    item: Item


@dataclass(frozen=True)
class Made:
    """A step's batch on this rank, with what was counted on the way."""

    batch: Batch
    tally: Tally
    cursor: int  # of the stream of prompts, before it

    def staleness(self, step: int) -> int:
        """Versions that the weights of `step` are ahead of the oldest sample's."""
        version_N = self.batch.version_N
        return 0 if version_N is None or not len(version_N) else step - int(version_N.min())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        rest = {"sums": self.tally.sums, "samples": self.tally.samples, "cursor": self.cursor}
        coded = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
        batch = {f"landed/{name}": x.contiguous() for name, x in self.batch.tensors().items()}
        return batch | {"landed": coded}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Made | None":
        """What `tensors` returned, or None where it is not among them."""
        if "landed" not in tensors:
            return None
        rest = json.loads(tensors["landed"].numpy().tobytes())
        tally = Tally()
        tally.sums, tally.samples = rest["sums"], rest["samples"]
        names = [name for name in tensors if name.startswith("landed/")]
        return cls(Batch(**{name.removeprefix("landed/"): tensors[name] for name in names}), tally, rest["cursor"])


class Explorer:
    """One call: prompts -> rollout -> reward -> advantage, on this rank alone (no collective in it)."""

    def __init__(self, config: Config, algo: Algo, prompts: Prompts, rollout, rewards: list, world: World):
        self.config, self.algo, self.prompts, self.rollout = config, algo, prompts, rollout
        self.rewards, self.share = rewards, config.prompts_per_step // world.world_size
        self.num_samples = config.num_samples if world.rank == 0 else 0

    def __call__(self, step: int) -> Made:
        """This rank's trajectories of the step; none when every group was dropped."""
        config, groups, tally = self.config, [], Tally(self.num_samples)
        cursor = self.prompts.stream.cursor
        for _ in range(1 + (config.max_refills if config.dynamic_sampling else 0)):
            groups += self.explore(self.share - len(groups), step, tally)
            if len(groups) == self.share:
                break
        tally.add(prompts_dropped=self.prompts.dropped)
        self.prompts.dropped = 0
        with tally.span("advantage", step):
            batch = self.batch_of(groups) if groups else empty_batch(0)
        return Made(batch, tally, cursor)

    def batch_of(self, groups: list[Group]) -> Batch:
        rewards_PG = torch.tensor([group.rewards for group in groups])
        adv_PG = self.algo.advantage(rewards_PG, eps=self.config.adv_eps, unbiased=self.config.adv_unbiased)
        pairs = [(group.prompt, c) for group in groups for c in group.completions]
        return completions_batch(*zip(*pairs, strict=True), adv_PG.flatten().tolist())

    def explore(self, count: int, step: int, tally: Tally) -> list[Group]:
        """Rolls out `count` prompts; with dynamic sampling, only groups of mixed correctness return.

        A group is scored as soon as it is complete, beside the decoding of the others.
        """
        config = self.config
        numbers, items, prompts = zip(*(self.prompts.draw() for _ in range(count)), strict=True)
        with ThreadPoolExecutor(1, "reward") as judge:
            scored: dict[int, Future[Group]] = {}

            def on_group(p: int, completions: list[Completion]) -> None:
                for group in scored.values():
                    if group.done():
                        group.result()  # a reward that fails ends the rollout too
                scored[p] = judge.submit(self.judge, prompts[p], completions, items[p], step, tally)

            try:
                with tally.span("rollout", step):
                    self.rollout(
                        list(prompts),
                        num_samples=config.group_size,
                        sampling=sampling_of(config),
                        seed=config.seed,
                        requests=[number * config.group_size for number in numbers],
                        on_group=on_group,
                    )
            except BaseException:
                judge.shutdown(wait=False, cancel_futures=True)  # else all that waits would be scored first
                raise
            groups = [scored[p].result() for p in range(count)]
        self.count(groups, tally)
        if config.dynamic_sampling:
            groups = [group for group in groups if len(set(group.scores.correct)) > 1]
            tally.add(groups_kept=len(groups), groups_drawn=count)
        return groups

    def judge(self, prompt: list[int], completions: list[Completion], item: Item, step: int, tally: Tally) -> Group:
        """Scores one group."""
        with tally.span("reward", step):
            texts = read_answers(self.prompts.tokenizer, item, completions, self.config)
            scores = score(self.rewards, texts, [item] * len(texts), on_error=self.config.reward_on_error)
            rewards = scores.totals
            if self.config.overlong_penalty:
                cut = [(c.finish == "length", bool(marked_answer(text))) for c, text in zip(completions, texts)]
                rewards = [r + overlong_penalty(*pair) for r, pair in zip(rewards, cut, strict=True)]
        return Group(prompt, completions, rewards, scores, texts, item)

    def count(self, groups: list[Group], tally: Tally) -> None:
        """Counts groups in the order they were drawn, so that sums do not depend on which was complete first."""
        for group in groups:
            tokens = sum(len(c.ids) for c in group.completions)
            tally.add(
                reward_sum=sum(group.rewards),
                correct=sum(group.scores.correct),
                sequences=len(group.completions),
                length_sum=tokens,
                generated_tokens=tokens,
                at_limit_count=sum(c.finish == "length" for c in group.completions),
                reward_errors=group.scores.errors,
                reward_timeouts=group.scores.unfinished,
            )
            question, answer = group.item.prompt[-1]["content"], group.item.answer
            for text, reward in zip(group.texts, group.rewards, strict=True):
                tally.sample(prompt=question, text=text, answer=answer, reward=reward)


class Traces:
    """One call: packed rows of (prompt, response) documents; every rank packs all rows and takes its share."""

    def __init__(self, config: Config, prompts: Prompts, world: World):
        self.config, self.prompts, self.world = config, prompts, world

    def __call__(self, step: int) -> Made:
        length, count, cursor = self.config.pack_length, self.config.rows_per_step, self.prompts.stream.cursor
        rows: list[list] = [[] for _ in range(count)]
        room = [length] * count
        while True:
            prompt, response = self.document()
            size = len(prompt) + len(response)
            if size > length:
                self.skip(size)
                continue
            fit = next((r for r, free in enumerate(room) if free >= size), None)
            if fit is None:
                self.prompts.stream.cursor -= 1  # opens the next step
                break
            rows[fit].append((prompt, response))
            room[fit] -= size
        tally = Tally()
        tally.add(prompts_dropped=self.prompts.dropped if self.world.rank == 0 else 0)
        self.prompts.dropped = 0
        return Made(packed_batch(rows[self.world.rank :: self.world.world_size]), tally, cursor)

    def document(self) -> tuple[list[int], list[int]]:
        _, item, prompt = self.prompts.draw()
        return prompt, encode_trace(self.prompts.tokenizer, item.prompt, item.trace, self.config.enable_thinking)

    def skip(self, size: int) -> None:
        self.prompts.dropped += 1
        if self.prompts.dropped > len(self.prompts.items):
            raise UserError(
                f"No trace fits pack_length {self.config.pack_length} (the last has {size} tokens); raise it."
            )
