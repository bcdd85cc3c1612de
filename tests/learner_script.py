"""Run by test_learner.py under one or two ranks: one update on fixed trajectories per case; rank 0 prints JSON.

learner_script.py CASES_JSON     each case: {"argv": [...], "share": [sequences of rank 0, of rank 1]}
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from engine import dist, model
from engine.algos import ALGOS
from engine.batch import completions_batch, empty_batch, packed_batch
from engine.config import load_config
from engine.learner import Learner
from engine.log import Log
from engine.rollouts.native import Completion
from kernels import chunked, eager

LENGTHS = (1, 9, 4, 12, 7, 3, 10, 2, 5, 8, 6, 11)
PROMPTS = (5, 3, 8)


def trajectories():
    """12 sequences in 3 groups, with sampled log-probabilities far enough off for the clip to bind."""
    g = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(1, 250, (n,), generator=g).tolist()  # noqa: E731
    prompts = [prompt for n in PROMPTS for prompt in [draw(n)] * 4]
    noise = lambda n: (-5.5 + 0.5 * torch.randn(n, generator=g)).tolist()  # noqa: E731
    completions = [Completion(draw(n), noise(n), noise(n), "eos") for n in LENGTHS]
    adv = [0.5, -0.2, 0.9, -1.2, 0, 0, 0, 0, 1.1, -0.4, -0.3, -0.4]
    return prompts, completions, adv


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


def run_case(case: dict, world) -> dict:
    model.compute_dtype = lambda device: torch.bfloat16 if case.get("bf16") else torch.float32
    config = load_config(["--lr", "1e-3", "--max_new_tokens", "12", "--max_grad_norm", "1e9", *case["argv"]])
    algo = ALGOS[config.algo]
    lm = model.load_model("tiny", 0, torch.float32)
    reference = None
    if config.beta:
        reference = model.shard(
            model.Policy(model.load_model("tiny", 1, torch.float32)), config, world.mesh, frozen=True
        )
    policy = model.shard(model.Policy(lm), config, world.mesh)
    optimizer = model.make_optimizer(policy, config)
    log = Log(config, Path(tempfile.gettempdir()), 0, False)
    ops = Spy({"eager": eager}.get(config.kernels, chunked))
    learner = Learner(config, algo, policy, reference, optimizer, ops, log, world, Path(tempfile.mkdtemp()))

    first = sum(case["share"][: world.rank])
    mine = slice(first, first + case["share"][world.rank])
    prompts, completions, adv = (part[mine] for part in trajectories())
    if config.algo == "sft":
        rows = [
            [(p, c.ids) for p, c in zip(prompts[i : i + 2], completions[i : i + 2])] for i in range(0, len(prompts), 2)
        ]
        batch = packed_batch(rows) if rows else empty_batch(0)
    else:
        batch = completions_batch(prompts, completions, adv) if prompts else empty_batch(0)
    if case.get("poison") == world.rank:
        batch.adv_N[0] = float("nan")
    error = ""
    for step in range(case.get("steps", 1)):
        try:
            learner.learn(batch, step)
        except FloatingPointError as stop:
            error = str(stop)
    weights = torch.cat([p.full_tensor().flatten() for p in policy.parameters()])
    stats = {n: v.tolist() for names, vector in log.device_sums.items() for n, v in zip(names, vector, strict=True)}
    totals = dist.all_sum([stats.get(k, 0.0) for k in ("tokens", "clip_low", "clip_high", "kl")])
    sums = {k: log.sums.get(k) for k in ("loss", "grad_norm", "updates", "skipped_steps")}
    names = [name for name, _ in policy.named_parameters()]
    return sums | {
        "moved": weights.double().norm().item(),
        "totals": totals,
        "dtypes": ops.dtypes,
        "error": error,
        "names": names,
    }


def main() -> int:
    world = dist.start("cpu")
    torch.set_num_threads(1)
    results = [run_case(case, world) for case in json.loads(sys.argv[1])]
    if world.rank == 0:
        print("RESULTS " + json.dumps(results))
    return 0


if __name__ == "__main__":
    dist.run(main)
