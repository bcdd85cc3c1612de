"""Answers a prompt from a checkpoint's export or any supported model.

python -m engine.generate --model DIR --prompt "Mia has 47 pens ..." [--temperature 0] [--any setting of the config]
"""

import dataclasses
import sys
from dataclasses import dataclass

from engine import dist, model
from engine.asking import Asker, encode, open_rollout, sampling_of
from engine.config import load_command
from engine.data import TASKS, Item
from engine.data.item import build_prompt
from engine.errors import UserError
from engine.inputs import check_chat, list_beyond
from engine.settings import setting


@dataclass(frozen=True)
class Options:
    """Of the command, beside the settings."""

    prompt: str | None = setting(None, "what to answer; none: standard input")
    temperature: float = setting(0.0, "0: the likeliest answer; the setting of training is not used")


def main() -> int:
    options, config = load_command(sys.argv[1:], Options, __doc__)
    prompt = (sys.stdin.read() if options.prompt is None else options.prompt).strip()
    if not prompt:
        raise UserError("There is nothing to answer: pass --prompt TEXT, or the text on standard input.")
    config = dataclasses.replace(config, init_from="")
    model.check_given(config.model)
    world = dist.start(config.device)
    tokenizer = model.load_tokenizer(config.model, config.today)
    system_prompt = TASKS[config.task].system_prompt if config.system_prompt is None else config.system_prompt
    item = Item(build_prompt(prompt, system_prompt), "", None, {})
    check_chat(item, tokenizer, list_beyond(tokenizer, config), config)
    ids = encode(item, tokenizer, config)
    sampling = dataclasses.replace(sampling_of(config), temperature=options.temperature)
    alone = dataclasses.replace(config, rollout_batch=1, max_prompt_tokens=len(ids))
    asker = Asker(open_rollout(tokenizer, alone, world.device), tokenizer, [], config)
    [group] = asker.ask([(0, item, ids)], num_samples=1, sampling=sampling, seed=config.seed)
    print(*group.texts)
    return 0


if __name__ == "__main__":
    dist.run(main)
