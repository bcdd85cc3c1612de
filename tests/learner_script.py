"""Run by test_learner.py under one or two ranks: updates on fixed samples per case; rank 0 prints JSON.

learner_script.py CASES_JSON     name: {"argv": [...], "share": [sequences of rank 0, of rank 1], ...}
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.tensor import distribute_tensor

import engine.policy
from engine import dist, linears, model, parts
from engine.config import load_config
from engine.log import Log
from engine.samples import Sample

LENGTHS = (1, 9, 4, 12, 7, 3, 10, 2, 5, 8, 6, 11)
PROMPTS = (5, 3, 8)
SETTINGS = "--lr 1e-3 --schedule constant --warmup_steps 0 --max_new_tokens 12 --max_grad_norm 1e9".split()
TOTALS = ("tokens", "clip_low", "clip_high", "kl", "margin", "chosen_logp", "match")
ADV = (0.5, -0.2, 0.9, -1.2, 0, 0, 0, 0, 1.1, -0.4, -0.3, -0.4)


def draw_samples(taught: bool, pairs: bool) -> list[Sample]:
    """12 sequences in 3 groups, with sampled log-probabilities far enough off for the clip to bind; where taught, with
    what a teacher sees instead of the prompt, and as 6 pairs each of which enters a micro-batch whole."""
    g = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(1, 250, (n,), generator=g).tolist()  # noqa: E731
    prompts = [prompt for n in PROMPTS for prompt in [draw(n)] * 4]
    behaviour = lambda n: {"logp_behaviour": -5.5 + 0.5 * torch.randn(n, generator=g)}  # noqa: E731
    samples = [
        Sample(prompt, draw(n), adv, 0, values={} if pairs else behaviour(n))
        for prompt, n, adv in zip(prompts, LENGTHS, ADV, strict=True)
    ]
    contexts = [draw(3 + n % 3) + s.prompt if taught else [] for n, s in enumerate(samples)]
    groups = [n // 2 if pairs else None for n in range(len(samples))]
    return [dataclasses.replace(s, context=c, group=g) for s, c, g in zip(samples, contexts, groups, strict=True)]


class Spy:
    """Kernels that note the dtypes they are given."""

    def __init__(self, ops):
        self.ops, self.dtypes = ops, {}

    def __getattr__(self, name):
        def call(hidden, weight, *args, **kwargs):
            given = (hidden, weight, *args, *kwargs.values())
            self.dtypes[name] = [str(x.dtype) for x in given if isinstance(x, torch.Tensor)]
            return getattr(self.ops, name)(hidden, weight, *args, **kwargs)

        return call


@torch.no_grad()
def build(case: dict, world) -> parts.Parts:
    """Random weights, and others for the reference."""
    engine.policy.compute_dtype = lambda device: torch.bfloat16 if case.get("bf16") else torch.float32
    config = load_config([*SETTINGS, *case["argv"]])
    made, other = (
        parts.build(dataclasses.replace(config, seed=seed), world, model.load_model("tiny", seed, torch.float32))
        for seed in (0, 1)
    )
    made.frozen = other.frozen
    draw = torch.Generator().manual_seed(2)
    for linear in linears.adapted(made.policy.lm).values():  # begun with 0, under which A has no gradient
        whole = torch.randn(linear.lora_B.shape, generator=draw) / 8
        linear.lora_B.to_local().copy_(distribute_tensor(whole, world.mesh, linear.lora_B.placements).to_local())
    made.ops = Spy(made.ops)
    return made


def run_case(case: dict, world) -> dict:
    made = build(case, world)
    log = Log(made.config, Path(tempfile.gettempdir()), 0, False)
    learner = made.learner(log, Path(tempfile.mkdtemp()))
    first = sum(case["share"][: world.rank])
    samples = draw_samples(made.config.taught, made.algo.source.pairs)[first : first + case["share"][world.rank]]
    if case.get("poison") == world.rank:
        samples[0] = dataclasses.replace(samples[0], adv=float("nan"))
    error = ""
    for step in range(case.get("steps", 1)):
        try:
            learner.learn(samples, step)
        except FloatingPointError as stop:
            error = str(stop)
    log.device_stats.read(log)
    weights = torch.cat([p.full_tensor().flatten() for p in made.policy.parameters() if p.requires_grad])
    return {
        **{k: log.sums.get(k) for k in ("loss", "grad_norm", "updates", "skipped_steps", "removed_sequences")},
        "moved": weights.double().norm().item(),
        "totals": dist.all_sum([log.sums.get(k, 0.0) for k in TOTALS]),
        "dtypes": made.ops.dtypes,
        "error": error,
        "trained": [str(p.dtype) for p in made.policy.parameters() if p.requires_grad],
        "names": [name for name, _ in made.policy.named_parameters()],
    }


def main() -> int:
    world = dist.start("cpu")
    torch.set_num_threads(1)
    results = {name: run_case(case, world) for name, case in json.loads(sys.argv[1]).items()}
    if world.rank == 0:
        print("RESULTS " + json.dumps(results))
    return 0


if __name__ == "__main__":
    dist.run(main)
