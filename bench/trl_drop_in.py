"""A micro-batch of TRL's GRPOTrainer with its own head and with `kernels.drop_in.install_in_trl`: loss and backward.

Both heads work for one trainer, on a model of random weights and a fixed batch whose old log-probabilities lie around
the policy's own, so that the clip binds. Loss and gradient norm must agree to 1e-5 before anything is timed.
  time    of the processor, all threads together: what others do on the machine meanwhile is not in it
  memory  beyond weights and their gradients, in a fresh process
TRL's head computes every position where Triton does not run, ours those of the answers alone.
"""

import importlib.util
import json
import math
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from time import process_time
from typing import NamedTuple
from unittest import mock

import torch

from . import memory, step
from .harness import Experiment, outcome, summarize, take_turns
from .table import megabytes, ratio, remarks, seconds, shown, spread

LIMIT = 1e-5
HEAD_SIZE = 64


class Size(NamedTuple):
    """Hidden size, layers and vocabulary of the model; sequences, tokens of a prompt and of an answer."""

    D: int
    layers: int
    V: int
    sequences: int
    prompt: int
    answer: int


def make_trainer(size, folder):
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from engine import model

    shape = transformers.Qwen2Config(
        vocab_size=size.V, hidden_size=size.D, intermediate_size=4 * size.D, num_hidden_layers=size.layers,
        num_attention_heads=size.D // HEAD_SIZE, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    config = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=size.sequences, num_generations=size.sequences, bf16=False,
        gradient_checkpointing=False, loss_type="dr_grpo", max_completion_length=size.answer, use_cpu=True,
        report_to="none",
    )  # fmt: skip
    return GRPOTrainer(
        transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32), reward, args=config,
        train_dataset=Dataset.from_list([{"prompt": "none is drawn"}]), processing_class=model.load_tokenizer("tiny"),
    )  # fmt: skip


def reward(completions, **columns):
    raise AssertionError("the batch is fixed: there is nothing to grade")


def batch(size):
    """What TRL keeps of a rollout."""
    draw = torch.Generator().manual_seed(0)
    ids = lambda length: torch.randint(size.V, (size.sequences, length), generator=draw)
    prompt_ids, completion_ids = ids(size.prompt), ids(size.answer)
    old = -math.log(size.V) + 0.3 * torch.randn(size.sequences, size.answer, generator=draw)
    return {
        "prompt_ids": prompt_ids, "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids, "completion_mask": torch.ones_like(completion_ids),
        "advantages": torch.randn(size.sequences, generator=draw), "old_per_token_logps": old,
    }  # fmt: skip


@contextmanager
def prepared(size):
    """-> update(side): its loss and gradient norm."""
    from trl.trainer import utils

    from kernels.drop_in import install_in_trl

    own = {name: getattr(utils, name) for name in ("_ChunkedLogProbFunction", "_use_triton")}
    with tempfile.TemporaryDirectory() as folder:
        trainer, inputs = make_trainer(size, folder), batch(size)
        trainer.current_gradient_accumulation_steps = 1
        model = trainer.model.train()

        def update(side):
            model.zero_grad()
            with mock.patch.multiple(utils, **own):
                if side == "ours":
                    install_in_trl()
                loss = trainer.compute_loss(model, inputs)
                loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            return {"loss": loss.item(), "grad_norm": norm.item()}

        yield update


def processor_seconds(call):
    start = process_time()
    call()
    return [process_time() - start]


def run(rows, device, size, rounds, threads, tick):
    if missing := [name for name in ("trl", "accelerate", "datasets") if importlib.util.find_spec(name) is None]:
        for row in rows.values():
            row["status"], row["why"] = "absent", f"not installed: {', '.join(missing)}"
        return
    with prepared(size) as update:
        for name, row in rows.items():
            tick(f"check {name}")
            with outcome(row):
                row.update(update(name))
                step.check(row, rows["TRL"], LIMIT)
                row.update(needed_memory(name, size, threads))
        calls = {name: partial(update, name) for name, row in rows.items() if row["status"] == "ok"}
        take_turns(calls, rows, rounds, processor_seconds, tick)
    summarize(rows, {}, base="TRL")


def needed_memory(side, size, threads):
    if size in SIZES["small"] or sys.platform != "linux":
        return {}
    return memory.in_child(threads, "bench.trl_drop_in", side, json.dumps(size), str(threads))


def main(side, size, threads):
    """Prints the memory of an update in this fresh process beyond the gradients, which the one before it leaves."""
    torch.set_num_threads(int(threads))
    with prepared(Size(*json.loads(size))) as update:
        update(side)
        print(json.dumps(memory.describe(memory.peak_on_cpu(partial(update, side))[0], {})))


SIZES = {
    "small": [Size(64, 1, 512, 2, 4, 8)],
    "cpu": [Size(896, 1, 151936, 4, 64, 192)],
    "cuda": [],
}  # fmt: skip
BENCH = Experiment(
    SIZES, run, {"TRL": "its own head", "ours": "install_in_trl"},
    (
        ("head", shown("rival")), ("time", shown("median", seconds)), ("p20-p80", spread),
        ("x TRL", shown("time_ratio", ratio)), ("memory", shown("extra_bytes", megabytes)),
        ("x TRL", shown("extra_ratio", ratio)), ("off", shown("off", "{:.0e}".format)), ("", remarks),
    ),
)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
