"""Sampling answers of given lengths: the rollout engine beside transformers' `generate` and its continuous batching.

Each answer has its own length, drawn between the shortest and the longest: no rival knows it before the token that
ends the answer. `generate` gets `slots` answers at a time, as a careful user calls it, and decodes each batch to its
longest; the others refill. Greedy tokens are compared with those of `generate` before a rival is timed (fp32 only: in
bf16 a tie of two logits may fall either way, and ours is timed before `generate` is tried).
  tokens/s  tokens of the answers, none of the padding, over the median time
  steps     batched forwards behind the prefills;  ideal: those of a schedule that refills a slot in the very next step
  roof      share of the time that reading the weights each ideal step, and each key and value, takes at the read-only
            rate measured in the same run
"""

import copy
import dataclasses
import functools
import heapq
import os
import random
from typing import NamedTuple

import torch

from .clocks import measure_roofs, wall_clock
from .harness import Experiment, Wrong, fail_with, outcome, summarize, take_turns
from .stand_in import SHAPES, make_model
from .table import ratio, remarks, seconds, share, shown, spread

RIVALS = {"ours": "", "generate": "", "generate_batch": "transformers' continuous batching"}
SAMPLES = 8  # answers to a prompt
CHECKED = 32  # most tokens of an answer that is compared


class Size(NamedTuple):
    """A model of bench.stand_in, or `pretrained`: the folder in $RL_REAL_MODEL. Rows at once, answers in all."""

    model: str
    slots: int
    answers: int
    prompt: int
    shortest: int
    longest: int


def requests(size, vocabulary):
    """(prompts, one per answer and the same object for the answers to one; their lengths)."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(5, vocabulary) for _ in range(draw.randint(size.prompt // 2, size.prompt))]
        for _ in range(-(-size.answers // SAMPLES))
    ]
    return (
        [prompts[i // SAMPLES] for i in range(size.answers)],
        [draw.randint(size.shortest, size.longest) for _ in range(size.answers)],
    )


def load(name, device):
    """The model in eval mode: fp32 for the embedded one, else bf16."""
    from engine import model

    folder = os.environ.get("RL_REAL_MODEL")
    if name != "pretrained":
        lm = model.cast_parameters(make_model(name, device), torch.bfloat16 if name in SHAPES else torch.float32)
    elif folder:
        lm = model.load_model(folder, 0, torch.bfloat16).to(device)
    else:
        raise ImportError("RL_REAL_MODEL names no Hugging Face folder")
    return lm.eval().requires_grad_(False)


def ideal_steps(lengths, slots):
    """Forwards of a schedule that takes the answers in order; the first token of each comes with its prefill."""
    free = [0] * min(slots, len(lengths))
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length - 1)
    return max(free)


def generate(lm, prompts, lengths, slots, greedy):
    """transformers: left-padded batches, each row stopped at its length. -> ids of the answers."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stop(StoppingCriteria):
        def __init__(self, width, lengths):
            self.ends = width + torch.tensor(lengths, device=lm.device)

        def __call__(self, ids, scores, **more):
            return ids.shape[1] >= self.ends

    answers = []
    for first in range(0, len(prompts), slots):
        batch, limits = prompts[first : first + slots], lengths[first : first + slots]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=lm.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=lm.device)
        stops = StoppingCriteriaList([Stop(width, limits)])
        plain = dict(do_sample=not greedy, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=None)
        out = lm.generate(ids, attention_mask=mask, max_new_tokens=max(limits), stopping_criteria=stops, **plain)
        answers += [row[width : width + limit].tolist() for row, limit in zip(out, limits)]
    return answers


def generate_batch(lm, prompts, lengths, slots, greedy):
    """transformers' continuous batching, each request with its own limit; its cache is kept from call to call and holds
    `slots` of the longest answers. -> ids of the answers."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page, columns = 32, max(map(len, prompts)) + max(lengths)
    plain = dict(do_sample=not greedy, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=-1)
    config = GenerationConfig(max_new_tokens=max(lengths), **plain)
    word = {"page_size", "block_size"} & {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    batching = ContinuousBatchingConfig(
        **{max(word): page}, num_blocks=slots * (-(-columns // page) + 1), max_batch_tokens=max(512, slots)
    )
    found, attention = {}, lm.config._attn_implementation
    try:
        with lm.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, persistent_manager=True
        ) as manager:
            names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, lengths)]
            for result in manager:
                if result.is_finished():
                    found[result.request_id] = result.generated_tokens
                    if len(found) == len(names):
                        break
    finally:
        lm.config._attn_implementation = attention  # which it leaves its own where it fails
    return [found[name] for name in names]


def make_ours(lm, slots, prompt, new):
    """The rollout engine with `slots` rows of at most `prompt` and `new` tokens."""
    from engine.config import Config
    from engine.linears import convert
    from engine.policy import load_kernels
    from engine.replica import Replica
    from engine.rollouts.native import NativeRollout

    config = Config()
    replica, ops = Replica(convert(copy.deepcopy(lm), config)), load_kernels(config, lm.device)
    size = dict(max_batch=slots, max_prompt=prompt, max_new=new)
    return NativeRollout(replica, eos_ids=[], pad_id=0, ops=ops, **size)


def ours(rollout, prompts, lengths, greedy):
    from engine.rollouts.sampling import Sampling

    sampling = Sampling(max(lengths), temperature=0.0 if greedy else 1.0)
    groups = rollout(prompts, num_samples=1, sampling=sampling, seed=0, limits=lengths)
    return [group[0].ids for group in groups]


def check(answers, lengths, truth):
    """Wrong unless every answer has its length and, with a truth, its greedy tokens."""
    if [len(ids) for ids in answers] != lengths:
        raise Wrong("answers of other lengths than asked for")
    if truth is not None and answers != truth:
        differ = sum(a != b for a, b in zip(answers, truth))
        raise Wrong(f"{differ} of {len(truth)} greedy answers are not those of generate")


def floor_seconds(lm, size, prompts, lengths, device, small):
    """Seconds that the memory traffic of an ideal schedule takes."""
    from engine.rollouts.cache import slot_bytes

    dtype = next(lm.parameters()).dtype
    read = sum(len(p) * n + n * (n + 1) // 2 for p, n in zip(prompts, lengths)) * slot_bytes(lm.config, 1, dtype)
    weights = sum(p.nbytes for p in lm.parameters())
    rate = measure_roofs(device, dtype, small)["sum"]
    return (ideal_steps(lengths, size.slots) * weights + read) / rate


def run(rows, device, size, rounds, threads, tick):
    with outcome(rows["ours"]):
        lm = load(size.model, device)
        rollout = make_ours(lm, size.slots, size.prompt, size.longest)
    if rows["ours"]["status"] != "ok":
        return fail_with(rows, rows["ours"])
    prompts, lengths = requests(size, lm.config.vocab_size)
    of = {
        "ours": functools.partial(ours, rollout),
        "generate": functools.partial(generate, lm, slots=size.slots),
        "generate_batch": functools.partial(generate_batch, lm, slots=size.slots),
    }
    some = prompts[: 2 * size.slots], [min(CHECKED, length) for length in lengths[: 2 * size.slots]]
    truth, calls = None, {}
    if next(lm.parameters()).dtype == torch.float32:
        with outcome(rows["generate"]):
            truth = of["generate"](*some, greedy=True)
    floor = floor_seconds(lm, size, prompts, lengths, device, size in SIZES["small"])
    for name, row in rows.items():
        tick(f"check {name}")
        with outcome(row):
            check(of[name](*some, greedy=True), some[1], truth)
            calls[name] = [functools.partial(of[name], prompts, lengths, greedy=False)]
        take_turns({name: calls.get(name)}, rows, 1, wall_clock, tick)  # kept, whatever becomes of the others
        describe(rows, sum(lengths), floor)
    take_turns(calls, rows, rounds - 1, wall_clock, tick)
    describe(rows, sum(lengths), floor)
    rows["ours"]["steps"], rows["ours"]["ideal_steps"] = rollout.decode_steps, ideal_steps(lengths, size.slots)


def describe(rows, tokens, floor):
    summarize(rows, {}, base="generate")
    for row in rows.values():
        if "median" in row:
            row["tokens_per_second"] = tokens / row["median"]
            row["speed"] = rows["generate"].get("median", row["median"]) / row["median"]
            row["roof_share"] = floor / row["median"]


def steps(row):
    return f"{row['steps']} / {row['ideal_steps']}" if "steps" in row else "-"


SIZES = {
    "small": [Size("tiny", 4, 12, 8, 2, 9)],
    "first": [Size("qwen2.5-0.5b", 128, 128, 256, 128, 128)],
    "cpu": [
        Size("tiny", 64, 1024, 60, 16, 256),
        Size("tiny", 64, 512, 60, 64, 64),
    ],
    "cuda": [
        Size("qwen2.5-3b", 128, 512, 256, 512, 512),
        Size("qwen2.5-3b", 128, 512, 256, 16, 1024),
        Size("qwen2.5-0.5b", 128, 512, 256, 512, 512),
    ],
}
PRETRAINED = {
    "small": SIZES["small"],
    "cpu": [Size("pretrained", 8, 64, 60, 16, 128)],
    "cuda": [Size("pretrained", 128, 512, 256, 16, 512)],
}
COLUMNS = (
    ("rival", shown("rival")),
    ("time", shown("median", seconds)),
    ("p20-p80", spread),
    ("speed", shown("speed", ratio)),
    ("tokens/s", shown("tokens_per_second", "{:,.0f}".format)),
    ("steps / ideal", steps),
    ("roof", shown("roof_share", share)),
    ("", remarks),
)
BENCH = Experiment(SIZES, run, RIVALS, COLUMNS)
PRETRAINED_BENCH = Experiment(PRETRAINED, run, RIVALS, COLUMNS, dtype="bf16")
