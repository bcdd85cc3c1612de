"""What a run will need, before it starts: `--dry-run`, and advice when memory runs out."""

import contextlib
import dataclasses
import functools

import torch
import yaml

from engine import dist
from engine.algos import algo_of
from engine.asking import rollout_rows
from engine.config import Config
from engine.errors import UserError
from engine.model import count_parameters, head_size, model_config
from engine.rollouts.cache import slot_bytes
from kernels.head import SLAB_BYTES

BY_SPEED = [(False, "last"), (False, "every"), (True, "last"), (True, "every")]
"""(reshard_after_forward, grad_sync), by the bytes that each moves; not measured."""
FILLED = 0.9
"""Share of a device's memory that an estimate may fill: the rest is CUDA's own, and what the estimate misses."""


def describe(config: Config, world_size: int) -> str:
    """The resolved config, parameters, tokens per step and estimated memory per rank."""
    if config.device != "cpu" and torch.cuda.is_available():
        config = settle(config, world_size, device_memory(torch.device("cuda")))
    memory = estimate_memory(config, world_size)
    lines = [yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip(), ""]
    lines.append(f"parameters        {shape_of(config.start)[1]:,}")
    source = algo_of(config).source
    if source.rolls_out:
        sequences = config.prompts_per_step * config.group_size
        lines.append(
            f"sequences         {sequences:,} per step, {config.updates_per_rollout * config.epochs} update(s)"
        )
    drawn = "generated " if source.rolls_out else ""
    lines.append(f"tokens per step   {source.tokens(config):,} {drawn}at most")
    lines.append(f"memory per rank   {sum(memory.values()) / 2**30:.2f} GiB estimated on {world_size} rank(s)")
    return "\n".join(lines + [f"  {name:<30}{size / 2**20:12,.1f} MiB" for name, size in memory.items() if size])


def estimate_memory(config: Config, world_size: int) -> dict[str, float]:
    """Bytes per rank on the training device, by what holds them; an estimate at the longest sequences."""
    shape, count = shape_of(config.start)
    cuda = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    compute, layers, hidden = dtype.itemsize, shape.num_hidden_layers, shape.hidden_size
    embedding = shape.vocab_size * hidden
    layer = (count - embedding * (1 if shape.tie_word_embeddings else 2)) / layers
    offloaded = config.cpu_offload and cuda
    algo = algo_of(config)
    asks = algo.source.rolls_out or config.eval_size > 0  # else the replica is made when all is over, for the export
    tokens = max(config.micro_tokens, config.max_prompt_tokens + config.max_new_tokens)  # a longer sample goes alone
    slot = slot_bytes(shape, config.max_prompt_tokens + config.max_new_tokens, dtype)
    slots = rollout_rows(config, world_size)
    if config.kv_memory_gib:
        slots = min(slots, int(config.kv_memory_gib * 2**30 // slot))
    kept, again = activation_bytes(shape, compute, config.activation_checkpointing)
    reduced = 4 * (1 + 1 / world_size)  # of a gradient: what goes into a reduction and what comes out, fp32
    sharded = 0 if offloaded else 4 * count / world_size
    unsharded = 4 * count if config.grad_sync == "last" else 0  # in the pool of another stream, so kept beside
    head = min(tokens * shape.vocab_size * 4, SLAB_BYTES["cuda" if cuda else "cpu"]) + 4 * embedding
    backward = tokens * again + compute * embedding + (compute + reduced) * layer  # behind the head's own gradient
    return {
        "master weights, fp32": 0 if offloaded else 4 * count / world_size,
        "optimizer state, fp32": 0 if offloaded else 8 * count / world_size,
        "gradients, fp32": sharded + unsharded,
        "gathered weights": compute * (count if config.reshard_after_forward is False else 2 * layer + embedding),
        "rollout replica": compute * count if asks else 0,
        "reference, sharded": compute * count / world_size if algo.compares(config) and not offloaded else 0,
        "KV cache": slots * slot if asks else 0,
        "drawing tokens": slots * shape.vocab_size * draw_bytes(config) if asks else 0,
        "activations": tokens * kept,
        "head, or backward of a layer": max(head, backward, reduced * embedding - tokens * kept),
    }


@functools.cache
def shape_of(model: str) -> tuple:
    """(transformers config, number of parameters)."""
    return model_config(model), count_parameters(model)


def settle(config: Config, world_size: int, memory: float) -> Config:
    """With `reshard_after_forward` and `grad_sync` decided where they were left open: the fastest that fits `memory`,
    bytes of a rank's device; as they are on a CPU, which says 0 and gains nothing."""
    if not memory:
        return config
    for reshard, sync in BY_SPEED:
        settled = dataclasses.replace(
            config,
            reshard_after_forward=reshard if config.reshard_after_forward is None else config.reshard_after_forward,
            grad_sync=sync if config.grad_sync == "auto" else config.grad_sync,
        )
        if sum(estimate_memory(settled, world_size).values()) <= FILLED * memory:
            break
    return settled


def device_memory(device: torch.device) -> int:
    """Bytes; 0 for a CPU, whose own are not planned."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def activation_bytes(shape, compute: int, checkpointing: bool) -> tuple[int, int]:
    """Per token: what a forward keeps for the backward, and what the backward adds when it runs a layer again.

    Of a layer: inputs of seven products, of the gate's two factors and of the attention, and of each norm its input
    in fp32 and its output before and after the weight. `shape`: a transformers config; `compute`: bytes of a value.
    """
    hidden, wide, head = shape.hidden_size, shape.intermediate_size, head_size(shape)
    attended = 2 * head * (shape.num_attention_heads + shape.num_key_value_heads)
    layer = compute * (4 * wide + attended) + 2 * (4 + 2 * compute) * hidden
    norm = (4 + compute) * hidden
    if not checkpointing:
        return shape.num_hidden_layers * layer + norm, 0
    return shape.num_hidden_layers * compute * hidden + norm, layer + 3 * compute * wide


def draw_bytes(config: Config) -> int:
    """Of a logit, while a token is drawn: itself and its logarithm in fp32; then probabilities, int64 and their sums,
    or sorted, their ids, fp64, sums and differences of sums, and what they cut."""
    by_mass = config.top_p < 1 and not config.top_k
    return 2 * 4 + (4 + 4 * 8 + 1 if by_mass else 4 + 2 * 8)


def out_of_memory_advice(config: Config, phase: str, world_size: int) -> str:
    """Which setting to lower, and to what."""
    rows = rollout_rows(config, world_size)
    if phase == "rollout" and rows > 1:
        return f"Out of memory during the rollout: set rollout_batch to {rows // 2}."
    if phase == "rollout":
        return f"Out of memory decoding one sequence: lower max_new_tokens from {config.max_new_tokens}."
    if phase == "start":
        return "Out of memory while the model was set up: use more ranks, cpu_offload true, or a smaller model."
    longest = config.max_prompt_tokens + config.max_new_tokens
    if config.micro_tokens > longest:
        half = max(config.micro_tokens // 2, longest)
        return f"Out of memory during the update: lower micro_tokens from {config.micro_tokens} to {half}."
    for flag in ("activation_checkpointing", "cpu_offload"):
        if not getattr(config, flag):
            return f"Out of memory during the update, with room for one sample of the longest: set {flag} to true."
    return f"Out of memory during the update: lower max_new_tokens ({config.max_new_tokens})."


@contextlib.contextmanager
def guard_memory(config: Config, phase: str):
    """Turns running out of memory into the setting to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises a plain RuntimeError
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(out_of_memory_advice(config, phase, dist.world_size())) from error
        raise
