"""Sampling answers of given lengths: the rollout engine beside transformers' `generate` and its continuous batching.

Each answer has its own length, drawn between the shortest and the longest: no rival knows it before the token that
ends the answer. `generate` gets `slots` answers at a time, as a careful user calls it, and decodes each batch to its
longest; the others refill. Greedy tokens are compared with those of `generate` before anything is timed (fp32 only: in
bf16 a tie of two logits may fall either way).
  tokens/s  tokens of the answers, none of the padding, over the median time
  steps     batched forwards behind the prefills;  ideal: those of a schedule that refills a slot in the very next step
  roof      share of the time that reading the weights each ideal step, and each key and value, takes at the read-only
            rate measured in the same run
"""

import copy
import functools
import heapq
import os
import random
from typing import NamedTuple

import torch

from .clocks import cpu_clock, measure_roofs
from .harness import Experiment, Wrong, new_row, outcome, summarize, take_turns
from .stand_in import make_model
from .table import ratio, remarks, seconds, share, shown, spread

RIVALS = {"generate": "", "generate_batch": "transformers' continuous batching", "ours": ""}
SAMPLES = 8  # answers to a prompt


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


def load(size, device):
    """The model in eval mode: fp32 for the embedded one, else bf16."""
    if size.model != "pretrained":
        lm = make_model(size.model, device)
        return (lm if size.model == "tiny" else lm.to(torch.bfloat16)).eval().requires_grad_(False)
    from engine import model

    folder = os.environ.get("RL_REAL_MODEL")
    if not folder:
        raise ImportError("RL_REAL_MODEL names no Hugging Face folder")
    return model.load_model(folder, 0, torch.bfloat16).to(device).eval().requires_grad_(False)


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
        out = lm.generate(
            ids, attention_mask=mask, do_sample=not greedy, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
            max_new_tokens=max(limits), eos_token_id=None, stopping_criteria=stops,
        )  # fmt: skip
        answers += [row[width : width + limit].tolist() for row, limit in zip(out, limits)]
    return answers


def generate_batch(lm, prompts, lengths, slots, greedy):
    """transformers' continuous batching, each request with its own limit; its cache is kept from call to call and holds
    `slots` of the longest answers. -> ids of the answers."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page, columns = 32, max(map(len, prompts)) + max(lengths)
    config = GenerationConfig(
        do_sample=not greedy, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=-1, pad_token_id=0,
        max_new_tokens=max(lengths),
    )  # fmt: skip
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=slots * (-(-columns // page) + 1), max_batch_tokens=max(512, slots)
    )
    found = {}
    with lm.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching, persistent_manager=True
    ) as manager:
        names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, lengths)]
        for result in manager:
            if result.is_finished():
                found[result.request_id] = result.generated_tokens
                if len(found) == len(names):
                    break
    return [found[name] for name in names]


def make_ours(lm, size):
    from engine.config import Config
    from engine.model import load_kernels
    from engine.replica import Replica
    from engine.rollouts.native import NativeRollout

    return NativeRollout(
        Replica(copy.deepcopy(lm)), eos_ids=[], pad_id=0, ops=load_kernels(Config(), lm.device), max_batch=size.slots,
        max_prompt=size.prompt, max_new=size.longest,
    )  # fmt: skip


def ours(rollout, prompts, lengths, greedy):
    from engine.rollouts.sampling import Sampling

    sampling = Sampling(max(lengths), temperature=0.0 if greedy else 1.0)
    groups = rollout(prompts, num_samples=1, sampling=sampling, seed=0, limits=lengths)
    return [group[0].ids for group in groups]


def check(row, answers, lengths, truth):
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


def run(device, size, rounds, threads, tick):
    """-> a row per rival."""
    rows, calls = {name: new_row(name, note) for name, note in RIVALS.items()}, {}
    with outcome(rows["generate"]):
        lm = load(size, device)
    if rows["generate"]["status"] != "ok":
        return [{**row, "status": rows["generate"]["status"], "why": rows["generate"]["why"]} for row in rows.values()]
    prompts, lengths = requests(size, lm.config.vocab_size)
    rollout = make_ours(lm, size)
    of = {
        "generate": functools.partial(generate, lm, slots=size.slots),
        "generate_batch": functools.partial(generate_batch, lm, slots=size.slots),
        "ours": functools.partial(ours, rollout),
    }
    few, exact = slice(0, 2 * size.slots), next(lm.parameters()).dtype == torch.float32
    truth = None
    for name, row in rows.items():
        tick(f"check {name}")
        with outcome(row):
            answers = of[name](prompts[few], lengths[few], greedy=True)
            check(row, answers, lengths[few], truth if exact else None)
            truth = truth or answers
            calls[name] = [functools.partial(of[name], prompts, lengths, greedy=False)]
    take_turns(calls, rows, rounds, timed(device), tick)
    summarize(rows, {}, base="generate")
    floor = floor_seconds(lm, size, prompts, lengths, device, size in SIZES["small"])
    for row in rows.values():
        if "median" in row:
            row["tokens_per_second"] = sum(lengths) / row["median"]
            row["speed"] = rows["generate"].get("median", row["median"]) / row["median"]
            row["roof_share"] = floor / row["median"]
    rows["ours"]["steps"], rows["ours"]["ideal_steps"] = rollout.decode_steps, ideal_steps(lengths, size.slots)
    return list(rows.values())


def timed(device):
    """Seconds of each call, from an idle device to an idle one."""

    def clock(calls):
        return cpu_clock([lambda call=call: (call(), device == "cuda" and torch.cuda.synchronize()) for call in calls])

    return clock


def steps(row):
    return f"{row['steps']} / {row['ideal_steps']}" if "steps" in row else "-"


SIZES = {
    "small": [Size("tiny", 4, 12, 8, 2, 9)],
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
    ("rival", shown("rival")), ("time", shown("median", seconds)), ("p20-p80", spread),
    ("speed", shown("speed", ratio)), ("tokens/s", shown("tokens_per_second", "{:,.0f}".format)),
    ("steps / ideal", steps), ("roof", shown("roof_share", share)), ("", remarks),
)  # fmt: skip
BENCH = Experiment(SIZES, run, RIVALS, COLUMNS)
PRETRAINED_BENCH = Experiment(PRETRAINED, run, RIVALS, COLUMNS, dtype="bf16")
