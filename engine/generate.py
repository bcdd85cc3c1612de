"""Answers a prompt from a checkpoint's export or any supported model.

python -m engine.generate --model DIR --prompt "Mia has 47 pens ..." [--temperature 0] [--any setting of the config]
"""

import dataclasses
import sys

from engine import dist, model
from engine.config import load_config, take_option
from engine.errors import UserError
from engine.evaluate import make_rollout
from engine.experience import sampling_of
from engine.replica import Replica


def main() -> int:
    argv = sys.argv[1:]
    prompt, temperature = take_option(argv, "--prompt"), take_option(argv, "--temperature", float, 0.0)
    prompt = prompt if prompt is not None else sys.stdin.read().strip()
    if not prompt:
        raise UserError("There is nothing to answer: pass --prompt TEXT, or the text on standard input.")
    config = load_config(argv)
    model.check_given(config.model)
    world = dist.start(config.device)
    tokenizer = model.load_tokenizer(config.model)
    lm = model.load_model(config.model, config.seed, model.compute_dtype(world.device)).to(world.device).eval()
    messages = [{"role": "user", "content": prompt}]
    if config.system_prompt:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    ids = model.encode_prompt(tokenizer, messages, config.enable_thinking)
    sampling = dataclasses.replace(sampling_of(config), temperature=temperature)
    alone = dataclasses.replace(config, rollout_batch=1, max_prompt_tokens=len(ids))
    ((completion,),) = make_rollout(Replica(lm), tokenizer, alone)(
        [ids], num_samples=1, sampling=sampling, seed=config.seed, requests=[0]
    )
    print(tokenizer.decode(completion.ids, skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    dist.run(main)
