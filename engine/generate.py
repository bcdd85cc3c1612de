"""Answers a prompt from a checkpoint's export or any supported model.

python -m engine.generate --model DIR --prompt "Mia has 47 pens ..." [--temperature 0] [--any setting of the config]
"""

import dataclasses
import sys

from engine import dist, model
from engine.config import load_config, take_option
from engine.data import TASKS, Item
from engine.data.item import build_prompt
from engine.errors import UserError
from engine.evaluate import check_room, make_rollout
from engine.experience import check_chat, list_beyond, read_answers, sampling_of
from engine.replica import Replica


def main() -> int:
    argv = sys.argv[1:]
    prompt, temperature = take_option(argv, "--prompt"), take_option(argv, "--temperature", float, 0.0)
    prompt = (prompt if prompt is not None else sys.stdin.read()).strip()
    if not prompt:
        raise UserError("There is nothing to answer: pass --prompt TEXT, or the text on standard input.")
    config = dataclasses.replace(load_config(argv), init_from="")
    model.check_given(config.model)
    world = dist.start(config.device)
    tokenizer = model.load_tokenizer(config.model, config.today)
    system_prompt = TASKS[config.task].system_prompt if config.system_prompt is None else config.system_prompt
    item = Item(build_prompt(prompt, system_prompt), "", None, {})
    check_chat(item, tokenizer, list_beyond(tokenizer, config), config)
    lm = model.load_model(config.model, config.seed, model.compute_dtype(world.device)).to(world.device).eval()
    ids = model.encode_prompt(tokenizer, item.prompt, config.enable_thinking)
    sampling = dataclasses.replace(sampling_of(config), temperature=temperature)
    alone = dataclasses.replace(config, rollout_batch=1, max_prompt_tokens=len(ids))
    check_room(lm, alone)
    ((completion,),) = make_rollout(Replica(lm), tokenizer, alone)(
        [ids], num_samples=1, sampling=sampling, seed=config.seed, requests=[0]
    )
    print(*read_answers(tokenizer, item, [completion], config))
    return 0


if __name__ == "__main__":
    dist.run(main)
