"""Accuracy and pass@k on held-out problems.

    python -m engine.evaluate --model DIR --task gsm8k|math500|... [--samples K] [--json FILE] [--any setting]

Greedy accuracy always; with --samples K also sampled accuracy and the unbiased pass@k for k = 1, 2, 4, ... K.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from engine import dist, model
from engine.config import Config, load_config, take_option
from engine.data import TASKS, Item
from engine.errors import UserError
from engine.experience import check_chats, load_items, read_answers, sampling_of
from engine.replica import Replica
from engine.rewards import judge_of, load_rewards, score
from engine.rollouts import ROLLOUTS


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right: 1 - C(n-c, k) / C(n, k) (Chen et al., arXiv 2107.03374)."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def rollout_rows(config: Config, world_size: int) -> int:
    """Sequences a rank decodes at once, in training and in evaluation."""
    return config.rollout_batch or max(config.prompts_per_step * config.group_size // world_size, config.group_size)


def check_room(lm, config: Config) -> None:
    """UserError when the longest prompt and answer together exceed the positions the model was made for."""
    longest, positions = config.max_prompt_tokens + config.max_new_tokens, lm.config.max_position_embeddings
    if longest > positions:
        raise UserError(
            f"max_prompt_tokens + max_new_tokens is {longest}, but the model has {positions} positions; lower them."
        )


def make_rollout(replica: Replica, tokenizer, config: Config, should_stop=dist.stop_requested):
    """The configured rollout back-end over a replica, its buffers made for the longest rows of `config`."""
    return ROLLOUTS[config.rollout](
        replica,
        eos_ids=model.eos_ids(replica.lm, tokenizer),
        pad_id=model.pad_id(replica.lm, tokenizer),
        ops=model.load_kernels(config, replica.device),
        vocabulary=max(tokenizer.get_vocab().values()) + 1,
        decode=functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False),
        max_batch=rollout_rows(config, dist.world_size()),
        max_prompt=config.max_prompt_tokens,
        max_new=config.max_new_tokens,
        memory=int(config.kv_memory_gib * 2**30) or None,
        should_stop=should_stop,
    )


def evaluate(rollout, tokenizer, items: Sequence[Item], rewards: list, config: Config, world, *, samples=0) -> dict:
    """Greedy (samples 0) or sampled results over `items`, shared among the ranks. Collective.

    Right is what the judge among `rewards` says (`engine.rewards.judge_of`). Problems that exceed max_prompt_tokens
    are left out and counted. Returns accuracy and, with samples, pass@k as shares of the problems, the mean length in
    tokens, the share of answers at the length limit and the number of problems; nothing when a signal interrupted it
    on any rank.
    """
    mine = range(world.rank, len(items), world.world_size)
    prompts = {i: model.encode_prompt(tokenizer, items[i].prompt, config.enable_thinking) for i in mine}
    prompts = {i: ids for i, ids in prompts.items() if len(ids) <= config.max_prompt_tokens}
    problems, of = map(int, dist.all_sum([float(len(prompts)), float(len(mine))]))
    if not problems:
        raise UserError(f"All {of} held-out prompts exceed max_prompt_tokens {config.max_prompt_tokens}; raise it.")
    sampling = dataclasses.replace(sampling_of(config), temperature=config.temperature if samples else 0.0)
    ks = [2**i for i in range(samples.bit_length())] if samples else [1]
    count = max(samples, 1)
    try:
        groups = rollout(
            list(prompts.values()),
            num_samples=count,
            sampling=sampling,
            seed=config.seed + 2**32,  # apart from the training rollouts' noise
            requests=[i * count for i in prompts],
        )
    except InterruptedError:
        groups = None
    if dist.all_sum([float(groups is None)])[0]:
        return {}
    completions = [c for group in groups for c in group]
    answered = [items[i] for i in prompts]
    texts = [t for item, group in zip(answered, groups) for t in read_answers(tokenizer, item, group, config)]
    repeated = [item for item in answered for _ in range(count)]
    correct = score(judge_of(rewards), texts, repeated, on_error=config.reward_on_error).correct
    right = [sum(correct[p * count : (p + 1) * count]) for p in range(len(prompts))]
    tokens, at_limit, *passed = dist.all_sum(
        [sum(len(c.ids) for c in completions), sum(c.finish == "length" for c in completions)]
        + [sum(pass_at_k(count, r, k) for r in right) for k in ks]
    )
    result = {"accuracy": passed[0] / problems, "length": tokens / problems / count}
    result |= {"at_limit": at_limit / problems / count, "problems": problems}
    result |= {"dropped": of - problems} if of > problems else {}
    return result | ({f"pass@{k}": p / problems for k, p in zip(ks, passed, strict=True)} if samples else {})


def main() -> int:
    argv = sys.argv[1:]
    samples, output = take_option(argv, "--samples", int, 0), take_option(argv, "--json")
    config = dataclasses.replace(load_config(argv), init_from="")
    if samples < 0:
        raise UserError(f"--samples must not be negative, as {samples} is.")
    if output and not Path(output).resolve().parent.is_dir():
        raise UserError(f"There is no folder for --json {output}; make it first.")
    model.check_given(config.model)
    items = load_items(config, "test")
    rewards = load_rewards(config.rewards or TASKS[config.task].rewards)
    world = dist.start(config.device)
    tokenizer = model.load_tokenizer(config.model, config.today)
    check_chats(items, tokenizer, config)
    dtype = model.compute_dtype(world.device)
    lm = model.load_model(config.model, config.seed, dtype).to(world.device).eval().requires_grad_(False)
    check_room(lm, config)
    rollout = make_rollout(Replica(lm), tokenizer, config)
    result = {"model": config.model, "task": config.task, "seed": config.seed}
    result["greedy"] = evaluate(rollout, tokenizer, items, rewards, config, world)
    if samples:
        result["sampled"] = evaluate(rollout, tokenizer, items, rewards, config, world, samples=samples)
    if world.rank == 0:
        text = json.dumps(result, indent=2)
        print(text, flush=True)
        if output:
            Path(output).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    dist.run(main)
