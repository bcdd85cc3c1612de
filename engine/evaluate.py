"""Accuracy and pass@k on held-out problems.

    python -m engine.evaluate --model DIR --task gsm8k|math500|... [--samples K] [--json FILE] [--any setting]

Greedy accuracy always; with --samples K also sampled accuracy and the unbiased pass@k for k = 1, 2, 4, ... K.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from engine import dist, model
from engine.asking import Asker, encode, open_rollout, sampling_of
from engine.config import Config, load_command
from engine.data import TASKS, Item
from engine.errors import UserError
from engine.inputs import check_chats, load_items
from engine.rewards import correctness_reward, load_rewards
from engine.settings import setting
from engine.watch import announce


@dataclass(frozen=True)
class Options:
    """Of the command, beside the settings."""

    samples: int = setting(0, "answers drawn for each problem; 0: greedy accuracy only", least=0)
    json: str = setting("", "new file that gets the result too")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right: 1 - C(n-c, k) / C(n, k) (Chen et al., arXiv 2107.03374)."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def evaluate(
    rollout, tokenizer, items: Sequence[Item], rewards: list, config: Config, world, *, samples=0, progress=None
) -> dict:
    """Greedy (samples 0) or sampled results over `items`, shared among the ranks. Collective.

    Right is what one of `rewards` says (`engine.rewards.correctness_reward`). Problems that exceed max_prompt_tokens
    are left out and counted. `progress`: as `Asker` takes it, of this rank's answers.
    Returns accuracy and, with samples, pass@k as shares of the problems, the mean length in tokens, the share of
    answers at the length limit and the number of problems; nothing when a signal interrupted it on any rank.
    """
    mine = range(world.rank, len(items), world.world_size)
    questions = [(i, item, encode(item, tokenizer, config)) for i, item in ((i, items[i]) for i in mine)]
    questions = [question for question in questions if len(question[-1]) <= config.max_prompt_tokens]
    problems, of = map(int, dist.all_sum([float(len(questions)), float(len(mine))]))
    if not problems:
        raise UserError(f"All {of} held-out prompts exceed max_prompt_tokens {config.max_prompt_tokens}; raise it.")
    sampling = dataclasses.replace(sampling_of(config), temperature=config.temperature if samples else 0.0)
    ks = [2**i for i in range(samples.bit_length())] if samples else [1]
    count = max(samples, 1)
    try:
        groups = Asker(rollout, tokenizer, correctness_reward(rewards), config, progress).ask(
            questions,
            num_samples=count,
            sampling=sampling,
            seed=config.seed + 2**32,  # apart from the training rollouts' noise
        )
    except InterruptedError:
        groups = None
    if dist.all_sum([float(groups is None)])[0]:
        return {}
    completions = [c for group in groups for c in group.completions]
    right = [sum(group.grades.correct) for group in groups]
    tokens, at_limit, *passed = dist.all_sum(
        [sum(len(c.ids) for c in completions), sum(c.finish == "length" for c in completions)]
        + [sum(pass_at_k(count, r, k) for r in right) for k in ks]
    )
    result = {"accuracy": passed[0] / problems, "length": tokens / problems / count}
    result |= {"at_limit": at_limit / problems / count, "problems": problems}
    result |= {"dropped": of - problems} if of > problems else {}
    return result | ({f"pass@{k}": p / problems for k, p in zip(ks, passed, strict=True)} if samples else {})


@contextlib.contextmanager
def draw_bar(title: str, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if it is shown; gives the `progress` that moves it."""
    seconds = 0.2 if sys.stderr.isatty() else 10
    with tqdm(desc=title, unit="answer", disable=not is_shown, dynamic_ncols=True, mininterval=seconds) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield progress


def main() -> int:
    options, config = load_command(sys.argv[1:], Options, __doc__)
    config, samples, output = dataclasses.replace(config, init_from=""), options.samples, options.json
    if output and not Path(output).resolve().parent.is_dir():
        raise UserError(f"There is no folder for --json {output}; make it first.")
    if output and Path(output).exists():
        raise UserError(f"{output} is there already, and stays as it is: give --json another file.")
    if not config.eval_size:
        raise UserError("eval_size 0 leaves nothing to evaluate; set how many problems to take.")
    model.check_given(config.model)
    items = load_items(config, "test")
    rewards = load_rewards(config.rewards or TASKS[config.task].rewards, announce)
    world = dist.start(config.device)
    tokenizer = model.load_tokenizer(config.model, config.today)
    check_chats(items, tokenizer, config)
    rollout = open_rollout(tokenizer, config, world.device)
    result = {"model": config.model, "task": config.task, "seed": config.seed}
    for mode, count in [("greedy", 0), ("sampled", samples)][: 1 + bool(samples)]:
        with draw_bar(mode, world.rank == 0) as progress:
            result[mode] = evaluate(rollout, tokenizer, items, rewards, config, world, samples=count, progress=progress)
    if world.rank == 0:
        text = json.dumps(result, indent=2)
        print(text, flush=True)
        if output:
            Path(output).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    dist.run(main)
