"""One whole update: forward, head and loss, backward, clipping, AdamW, on a fixed batch of samples; of GRPO, and of DPO
and distillation with the forward of their frozen model, which is the policy as it was.

The rivals are the three `kernels` of `Learner.learn`; they share one sharded policy with random weights, whose learning
rate is too small to move it. Compiled layers have another like it, and adapters one whose base is like it; they add
nothing yet, so that its loss is the same. Before anything is timed, losses are compared with that of the first rival
that runs, gradient norms with that of the first which trains the same parameters. The old policy's log-probabilities
lie around the policy's own, so that ratios differ from 1 and the clip binds.
Seconds are the caller's, from an idle device to an idle device; memory is what an update needs beyond weights and
optimizer state.
  in all    that memory, and what weights, buffers and optimizer state were seen to take between updates
  busy      time in which a kernel or copy runs, in a further update under torch's profiler, over the median; on a CPU
            that of its operations, which the profiler slows down
  launches  kernels and copies of that update; on a CPU its outermost operations, each with all it calls
  forward, backward, optimizer: of one more update, which waits for the device after each
"""

import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as c10d
from torch.autograd import DeviceType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from profiling.intervals import length, union

from . import memory
from .clocks import wall_clock
from .harness import LIMITS, Experiment, Wrong, outcome, summarize, take_turns
from .stand_in import make_model
from .table import megabytes, ratio, remarks, seconds, share, shown, spread

WAYS = {"compiled": {"compile": True}, "LoRA": {"lora_rank": 16}}
"""What a rival's name says behind its kernels, as settings."""
LORA = "adapters of rank 16"
RIVALS = {
    "eager": "", "ours chunked": "", "ours fused": "", "ours fused, compiled": "layers by torch.compile",
    "eager, LoRA": LORA, "ours chunked, LoRA": LORA, "ours fused, LoRA": LORA, "ours fused, compiled, LoRA": LORA,
}  # fmt: skip
PHASES = ("forward", "backward", "optimizer")
LR = "1e-12"  # below the last bit of an fp32 weight
GROUPS = {"grpo": 8, "dpo": 2, "distill": 1}


class Size(NamedTuple):
    """Sequences in groups of 8 (dpo: in pairs, distill: each with a prompt of its own), tokens of a prompt and at most
    of an answer, tokens a forward; the share of sequences whose group has no spread, and whether activations are made
    again in the backward."""

    model: str
    sequences: int
    prompt: int
    answer: int
    micro_tokens: int
    zero_advantage: float = 0.0
    checkpointed: bool = False
    algo: str = "grpo"


@contextlib.contextmanager
def one_rank(device):
    """A process group of this process alone, which FSDP2 and the learner's sums need."""
    from engine.dist import World

    c10d.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=c10d.HashStore(), rank=0,
                            world_size=1)  # fmt: skip
    try:
        yield World(0, 1, 0, torch.device(device), init_device_mesh(device, (1,)))
    finally:
        gc.collect()
        c10d.destroy_process_group()


def trajectories(size, vocabulary):
    """Samples as a source leaves them; answers are from half to all of the limit long."""
    from engine.samples import Sample

    draw = torch.Generator().manual_seed(0)
    ids = lambda count: torch.randint(5, vocabulary, (count,), generator=draw).tolist()
    lengths = torch.randint(size.answer // 2, size.answer + 1, (size.sequences,), generator=draw).tolist()
    logp = lambda count: -math.log(vocabulary) + 0.3 * torch.randn(count, generator=draw)
    group = GROUPS[size.algo]
    prompts = [ids(size.prompt) for _ in range(size.sequences // group)]
    if size.algo != "grpo":
        return [Sample(prompts[i // group], ids(count), group=i // group) for i, count in enumerate(lengths)]
    adv_PG = torch.randn(size.sequences // group, group, generator=draw)
    adv_PG[: round(size.zero_advantage * len(adv_PG))] = 0.0
    return [
        Sample(prompts[i // group], ids(count), adv, 0, values={"logp_behaviour": logp(count)})
        for i, (count, adv) in enumerate(zip(lengths, adv_PG.flatten().tolist()))
    ]


def make_learners(lm, settings, world, folder):
    """-> learner(kernels), all on one policy made of `lm`, one optimizer and one log, which waits for the device at the
    end of each span while its `waits` is set."""
    from engine import parts
    from engine.config import load_config
    from engine.log import Log

    class WaitingLog(Log):
        waits = False

        @contextlib.contextmanager
        def span(self, verb, step):
            with super().span(verb, step):
                yield
                if self.waits:
                    wait(world.device)

    settings = {"beta": 0, "lr": LR, "schedule": "constant", "warmup_steps": 0, **settings}
    built = parts.build(load_config([f"--{key}={value}" for key, value in settings.items()]), world, lm)
    log = WaitingLog(built.config, folder, 0, False)

    def learner(kernels):
        return dataclasses.replace(built, ops=importlib.import_module(f"kernels.{kernels}")).learner(log, folder)

    return learner


class Updates:
    """Updates on the batch of a size; rivals whose WAYS are the same share a policy."""

    def __init__(self, size, world, folder):
        self.size, self.world, self.folder = size, world, folder
        self.learners = functools.cache(self.make_learners)
        self.samples = functools.cache(functools.partial(trajectories, size))

    def make_learners(self, *ways):
        from engine.model import cast_parameters, compute_dtype

        size, device = self.size, self.world.device
        settings = {
            "algo": size.algo, "logp_old": "sampler", "micro_tokens": size.micro_tokens, "max_new_tokens": size.answer,
            "activation_checkpointing": size.checkpointed, "context": "zeroshot", "beta": 0.1 * (size.algo == "dpo"),
        }  # fmt: skip
        for way in ways:
            settings |= WAYS[way]
        if device.type == "cuda":  # as train.py settles it on a card that holds all of it
            settings |= {"reshard_after_forward": False, "grad_sync": "last"}
        lm = cast_parameters(make_model(size.model, device), compute_dtype(device))
        return make_learners(lm, settings, self.world, self.folder)

    def learner(self, rival):
        kernels, *ways = rival.removeprefix("ours ").split(", ")
        return self.learners(*ways)(kernels)

    def forget(self):
        """Drops the policies: an update that broke off inside FSDP2's hooks leaves one unusable."""
        self.learners.cache_clear()
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, rival):
        """One update -> its loss and gradient norm, once the device is idle."""
        learner = self.learner(rival)
        return update(learner, self.samples(learner.policy.lm.config.vocab_size))

    def phases(self, rival):
        """{verb: seconds} of an update that waits after each."""
        log = self.learner(rival).log
        log.waits = True
        self(rival)
        log.waits = False
        return {verb: log.seconds[verb] for verb in PHASES}

    def memory(self, rival, peak):
        """Bytes of an update, which another went before; peak(run) -> bytes beyond those before, what run returned."""
        found = memory.describe(peak(functools.partial(self, rival))[0], {})
        return found | {"all_bytes": found["extra_bytes"] + held_bytes(self.learner(rival))}


@contextlib.contextmanager
def prepared(device, size):
    """-> the Updates of a size."""
    with tempfile.TemporaryDirectory() as folder, one_rank(device) as world:
        yield Updates(size, world, Path(folder))


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def update(learner, samples):
    """One update -> its loss and gradient norm, once the device is idle."""
    learner.log.forget()
    learner.learn(samples, 0)
    wait(learner.world.device)
    return {name: learner.log.sums[name] for name in ("loss", "grad_norm")}


def held_bytes(learner):
    """Of the memory behind weights, buffers and optimizer state; what is shared counts once."""
    state = [x for values in learner.optimizer.state.values() for x in values.values()]
    tensors = [*learner.policy.parameters(), *learner.policy.buffers(), *state]
    storages = [(x.to_local() if isinstance(x, DTensor) else x).untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def base_of(row, rows):
    """The loss of the first rival that ran, the gradient norm of the first with the same parameters."""
    adapts = lambda other: "LoRA" in other["rival"]
    ran = [other for other in rows.values() if "loss" in other]
    alike = next(other for other in ran if adapts(other) == adapts(row))
    return {"loss": ran[0]["loss"], "grad_norm": alike["grad_norm"]}


def check(row, base, limit):
    """Wrong unless the loss and the gradient norm are the base's; the difference goes into the row."""
    row["off"] = max(abs(row[name] - base[name]) / max(abs(base[name]), 1e-3) for name in ("loss", "grad_norm"))
    if not row["off"] <= limit:
        raise Wrong(f"loss or gradient norm is off by {row['off']:.1e} of the first rival's, limit {limit:.0e}")


def kernel_time(call, device):
    """Busy seconds and launches of a call, under the profiler."""
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as recorder:
        call()
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in recorder.profiler.kineto_results.events()
        if (event.device_type() == DeviceType.CUDA) == (device == "cuda") and not event.is_user_annotation()
    ]
    return describe_spans(spans, device)


def describe_spans(spans, device):
    """Of intervals in nanoseconds, which overlap on a GPU and lie within each other on a CPU; {} where there are none:
    a profiler that sees nothing."""
    busy = union(spans)
    return {"kernel_seconds": length(busy) / 1e9, "launches": len(spans if device == "cuda" else busy)} if spans else {}


def needed_memory(rival, size, device, updates, threads, small):
    if device == "cuda":
        return updates.memory(rival, memory.peak_on_cuda)
    if small or sys.platform != "linux":
        return {}
    return memory.in_child(threads, "bench.step", rival, json.dumps(size), str(threads))


def leave_out(rows, device, size):
    for name, row in rows.items():
        if "fused" in name and device != "cuda":
            row["status"], row["why"] = "absent", "needs a cuda device"
        elif "compiled" in name and size.checkpointed:
            row["status"], row["why"] = "skipped", "no room for a second policy"
        elif "compiled" in name and size.algo != "grpo":
            row["status"], row["why"] = "skipped", "its layers are those of grpo"


def run(rows, device, size, rounds, threads, tick):
    """`small` sizes leave the memory out."""
    small, limit = size in SIZES["small"], LIMITS[torch.bfloat16 if device == "cuda" else torch.float32]
    leave_out(rows, device, size)
    calls = {}
    with prepared(device, size) as updates:
        for name in [name for name, row in rows.items() if row["status"] == "ok"]:
            tick(f"check {name}")
            row, call = rows[name], functools.partial(updates, name)
            with outcome(row):
                row.update(call())
                check(row, base_of(row, rows), limit)
                row.update(needed_memory(name, size, device, updates, threads, small))
                row.update(updates.phases(name), **kernel_time(call, device))
                calls[name] = [call]
            if row["status"] != "ok":
                updates.forget()
            take_turns({name: calls.get(name)}, rows, 1, wall_clock, tick)  # kept, whatever becomes of the others
            describe(rows)
        take_turns(calls, rows, rounds - 1, wall_clock, tick)
    describe(rows)


def describe(rows):
    summarize(rows, {})
    for row in rows.values():
        if "median" in row and "kernel_seconds" in row:
            row["busy"] = row["kernel_seconds"] / row["median"]


def main(rival, size, threads):
    """Prints the memory of one update in this fresh process."""
    torch.set_num_threads(int(threads))
    with prepared("cpu", Size(*json.loads(size))) as updates:
        updates(rival)
        print(json.dumps(updates.memory(rival, memory.peak_on_cpu)))


def phases_of(row):
    return " / ".join(seconds(row[verb]) for verb in PHASES) if PHASES[0] in row else "-"


SIZES = {
    "small": [Size("tiny", 16, 8, 8, 256, algo=algo) for algo in GROUPS],
    "first": [Size("qwen2.5-0.5b", 64, 128, 384, 8192)],
    "cpu": [
        *[Size("tiny", 128, 24, 24, 2048, zero) for zero in (0.0, 0.5)],
        Size("smollm2-135m", 16, 24, 24, 512),
    ],
    "frozen-tiny": [Size("tiny", 128, 24, 24, 2048, algo=algo) for algo in ("dpo", "distill")],
    "cuda": [
        *[Size("qwen2.5-0.5b", 64, 128, 384, 8192, zero) for zero in (0.0, 0.5)],
        *[Size("qwen2.5-3b", 64, 128, 384, 8192, zero, True) for zero in (0.0, 0.5)],
    ],
    "frozen": [Size("qwen2.5-0.5b", 64, 128, 384, 8192, algo=algo) for algo in ("dpo", "distill")],
}
BENCH = Experiment(
    SIZES, run, RIVALS,
    (
        ("rival", shown("rival")), ("update", shown("median", seconds)), ("p20-p80", spread),
        ("x eager", shown("time_ratio", ratio)), ("memory", shown("extra_bytes", megabytes)),
        ("x eager", shown("extra_ratio", ratio)), ("in all", shown("all_bytes", megabytes)),
        (" / ".join(PHASES), phases_of),
        ("busy", shown("busy", share)), ("launches", shown("launches", "{:,}".format)),
        ("loss", shown("loss", "{:.6f}".format)),
        ("gradient norm", shown("grad_norm", "{:.6f}".format)), ("", remarks),
    ),
)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
