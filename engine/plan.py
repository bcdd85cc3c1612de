"""What a run will need, before it starts: `--dry-run`, and advice when memory runs out."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from engine import adapters, dist
from engine.algos import algo_of
from engine.asking import rollout_rows
from engine.config import Config
from engine.errors import UserError
from engine.model import head_size, hollow_model
from engine.rollouts.cache import slot_bytes
from kernels.head import SLAB_BYTES

BY_SPEED = [(False, "last"), (False, "every"), (True, "last"), (True, "every")]
"""(reshard_after_forward, grad_sync), by the bytes that each moves; not measured."""
FILLED = 0.9
"""Share of a memory that an estimate may fill: the rest is CUDA's or the system's, and what the estimate misses."""
PROCESS_BYTES = {"cpu": 1 << 30, "cuda": 3 << 30}
"""Of a rank's process beside its tensors, by device: libraries, and on a CPU freed memory that it keeps, at most
(`dist.take_cores`); that beside a GPU is a guess."""
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What a plan is for."""

    name: str  # of the device of a rank
    gpu: float  # bytes of each GPU; 0 where it trains on the CPU
    host: float  # bytes that all its ranks share; 0: another machine, whose memory is not known
    ranks: int


@dataclass(frozen=True)
class Room:
    """A memory, and what a run needs of it, in bytes."""

    name: str
    needed: float
    size: float  # 0: not known

    @property
    def lacking(self) -> float:
        return max(self.needed - FILLED * self.size, 0.0) if self.size else 0.0

    def describe(self) -> str:
        needed, size, filled = (f"{x / 2**30:.1f}" for x in (self.needed, self.size, FILLED * self.size))
        if not self.size:
            return f"{self.name} must have {needed} GiB to spare"
        more = f"is {self.lacking / 2**30:.1f} more than" if self.lacking else "is within"
        return f"{needed} GiB of {self.name} {more} the {filled} that a plan may fill of {size}"


def describe(config: Config, world_size: int) -> str:
    """The resolved config, parameters, tokens per step, estimated memory per rank, and whether there is so much."""
    machine = find_machine(config)
    settled = settle(config, world_size, machine.gpu)
    lines = [yaml.safe_dump(dataclasses.asdict(settled), sort_keys=False).rstrip(), ""]
    lines.append(f"planned for       {machine.name}")
    lines.append(f"parameters        {count_of(config.start):,}")
    if config.lora_rank is not None:
        lines.append(f"trained           {trained_count(config):,}, in adapters")
    source = algo_of(config).source
    if source.rolls_out:
        sequences = config.prompts_per_step * config.group_size
        lines.append(
            f"sequences         {sequences:,} per step, {config.updates_per_rollout * config.epochs} update(s)"
        )
    drawn = "generated " if source.rolls_out else ""
    lines.append(f"tokens per step   {source.tokens(config):,} {drawn}at most")
    for title, when, memory in memories(settled, world_size):
        lines.append(f"{title:<18}{sum(memory.values()) / 2**30:.2f} GiB estimated on {world_size} rank(s){when}")
        lines += [f"  {name:<30}{size / 2**20:12,.1f} MiB" for name, size in memory.items() if size]
    return "\n".join([*lines, "", verdict(config, machine, world_size)])


def memories(config: Config, world_size: int) -> list[tuple[str, str, dict[str, float]]]:
    """(which memory, when it is fullest, bytes per rank by what holds them): of the device, and of a GPU's host."""
    when, host = max(host_moments(config, world_size).items(), key=lambda moment: sum(moment[1].values()))
    if not on_gpu(config):
        return [("memory per rank", when, host)]
    return [("memory per rank", ", on the GPU", estimate_memory(config, world_size)), ("host, per rank", when, host)]


def verdict(config: Config, machine: Machine, world_size: int) -> str:
    """Whether a run fits the machine, by how much, and where it does not, with which settings it would."""
    rooms = rooms_of(config, machine, world_size)
    told = "; ".join(room.describe() for room in rooms)
    if not any(room.lacking for room in rooms):
        return f"Fits: {told}."
    fits = lambda other: not any(room.lacking for room in rooms_of(other, machine, world_size))  # noqa: E731
    if change := remedy(config, fits, world_size):
        settings = " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())
        return f"Does not fit: {told}. It would with {settings}."
    return f"Does not fit: {told}. Lowering settings is not enough: use more ranks, a larger GPU or a smaller model."


def rooms_of(config: Config, machine: Machine, world_size: int) -> list[Room]:
    *device, host = [sum(m.values()) for _, _, m in memories(settle(config, world_size, machine.gpu), world_size)]
    own = "this machine's memory" if machine.host else f"the host of {machine.ranks} rank(s)"
    return [*(Room("each GPU", size, machine.gpu) for size in device), Room(own, machine.ranks * host, machine.host)]


def remedy(config: Config, fits: Callable[[Config], bool], world_size: int) -> dict[str, object]:
    """The fewest settings to lower, the cheapest in time first, and as little as will do; {} where none will."""
    longest, rows = config.max_prompt_tokens + config.max_new_tokens, rollout_rows(config, world_size)
    steps = {
        "micro_tokens": list(halves(config.micro_tokens, longest)),
        "rollout_batch": list(halves(rows, config.group_size)),
        "activation_checkpointing": [True],
        "cpu_offload": [] if config.shares_base else [True],
    }
    for number in range(1, len(steps) + 1):
        for names in itertools.combinations(steps, number):
            for values in itertools.product(*(steps[name] for name in names)):
                change = dict(zip(names, values, strict=True))
                if fits(dataclasses.replace(config, **change)):
                    return change
    return {}


def halves(number: int, least: int) -> Iterator[int]:
    """A half, a quarter ... of `number`, down to `least`."""
    while number > least:
        number = max(number // 2, least)
        yield number


def on_gpu(config: Config) -> bool:
    """Whether a plan is for a GPU: for one that is here, or of a memory that is given."""
    return config.device == "cuda" or config.device == "auto" and (config.memory_gib > 0 or torch.cuda.is_available())


def find_machine(config: Config) -> Machine:
    """What --dry-run plans for; UserError for a GPU that is neither here nor described."""
    ranks, here = dist.number("LOCAL_WORLD_SIZE", 1), torch.cuda.is_available()
    if not on_gpu(config):
        return Machine("the CPU, in fp32", 0, host_memory(), ranks)
    if config.memory_gib:
        name = f"a GPU of {config.memory_gib:g} GiB (--memory_gib), in bf16"
        return Machine(name, config.memory_gib * 2**30, host_memory() if here else 0, ranks)
    if not here:
        raise UserError("There is no GPU here to plan for: say what memory it has, as --memory_gib 24.")
    memory = device_memory(torch.device("cuda"))
    return Machine(f"{torch.cuda.get_device_name()}, {memory / 2**30:.1f} GiB, in bf16", memory, host_memory(), ranks)


def host_memory() -> int:
    """Bytes that this machine has, or this process's control groups leave it."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in CGROUP.read_text().splitlines() if CGROUP.exists() else ():
        _, kinds, path = line.split(":", 2)
        root, name = (CGROUPS, "memory.max") if not kinds else (CGROUPS / "memory", "memory.limit_in_bytes")
        own = root / path.lstrip("/")
        files = [folder / name for folder in (own, *own.parents) if folder.is_relative_to(root)]
        sizes += [int(text) for file in files if file.exists() and (text := file.read_text().strip()).isdecimal()]
    return min(sizes)


def host_moments(config: Config, world_size: int) -> dict[str, dict[str, float]]:
    """Bytes of a rank in its host's memory, by what holds them, at each moment that may be the fullest.

    Weights that their file has in the compute dtype are mapped, and take less than is said here. What is offloaded is
    pinned, but for the optimizer's state, and a pinned block has a power of two bytes. A checkpoint copies what is on a
    GPU, all of it at once, and nothing else.
    """
    cuda, count, beside = on_gpu(config), count_of(config.start), copied(config)
    trained, again = trained_count(config), config.lora_rank is not None and config.export == "merged"
    process = {"the process itself": PROCESS_BYTES["cuda" if cuda else "cpu"]}
    itemsize = 2 if cuda else 4
    loaded = itemsize * count  # every rank loads all of it
    start = process | {"model as loaded": loaded, "frozen model beside it": itemsize * count_of(beside)}
    if not cuda:
        training = estimate_memory(config, world_size) | {"base, read again to be merged": loaded if again else 0}
    elif config.cpu_offload:
        shapes = trained_shapes(config)
        shards = pinned_bytes(shapes, 4, world_size)
        training = {"master weights, fp32, pinned": shards, "gradients, fp32, pinned": shards}
        training["optimizer state, fp32"] = 8 * trained / world_size
        frozen = pinned_bytes(shapes_of(config.start), 2, world_size)
        training["frozen base, bf16, pinned"] = frozen if config.lora_rank is not None else 0
        training["frozen model, bf16, pinned"] = pinned_bytes(shapes_of(beside), 2, world_size)
    else:
        training = {"copy that a checkpoint writes": 12 * trained / world_size}
    return {", at the start": start, ", in training": process | training}


def copied(config: Config) -> str:
    """The frozen model, a reference or a teacher, that takes memory of its own; "" for none."""
    beside = algo_of(config).beside(config)
    return "" if beside == config.start and (config.shares_base or config.reference == "adapters_off") else beside


def pinned_bytes(shapes: Iterable[Sequence[int]], itemsize: int, world_size: int) -> int:
    """Of a rank's shards of parameters, each in pinned memory of its own."""
    sizes = (itemsize * -(-rows // world_size) * math.prod(rest) for rows, *rest in shapes)
    return sum(1 << (size - 1).bit_length() for size in sizes)


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters of a run's model."""

    count: int  # without adapters
    trained: int  # all of these, or the factors beside them
    embedding: int
    layer: float  # of a layer, without adapters
    layers: int
    adapted: bool
    shared: bool  # outside of FSDP2's units, one of which then holds all factors

    @property
    def frozen(self) -> int:
        return self.count if self.adapted else 0

    @property
    def whole(self) -> int:
        return self.frozen + self.trained

    @property
    def reduced(self) -> float:
        """Gradients of a unit."""
        return self.trained if self.shared else self.trained / self.layers if self.adapted else self.layer

    def gathered(self, keeps: bool) -> float:
        """What of the units is gathered at once, if a forward `keeps` it for the backward or not."""
        if self.shared:
            return self.trained
        return self.whole if keeps else 2 * (self.layer + self.reduced * self.adapted) + self.embedding


def weights_of(config: Config) -> Weights:
    shape, count = hollow_of(config.start).config, count_of(config.start)
    layers, embedding = shape.num_hidden_layers, shape.vocab_size * shape.hidden_size
    layer = (count - embedding * (1 if shape.tie_word_embeddings else 2)) / layers
    adapted = config.lora_rank is not None
    return Weights(count, trained_count(config), embedding, layer, layers, adapted, config.shares_base)


def estimate_memory(config: Config, world_size: int) -> dict[str, float]:
    """Bytes per rank on the training device, by what holds them; an estimate at the longest sequences."""
    shape, weights, cuda = hollow_of(config.start).config, weights_of(config), on_gpu(config)
    dtype = torch.bfloat16 if cuda else torch.float32
    compute, trained = dtype.itemsize, weights.trained
    here = not (config.cpu_offload and cuda)  # of what FSDP2 holds
    algo = algo_of(config)
    asks = algo.source.rolls_out or config.eval_size > 0  # else the replica is made when all is over, for the export
    context = 0 if config.context == "zeroshot" else config.max_context_tokens
    whole = (2 if algo.source.pairs else 1) * (max(config.max_prompt_tokens, context) + config.max_new_tokens)
    tokens = max(config.micro_tokens, whole)  # a longer sample, or pair, goes alone
    slot = slot_bytes(shape, config.longest_prompt + config.max_new_tokens, dtype)
    slots = rollout_rows(config, world_size)
    if config.kv_memory_gib:
        slots = min(slots, int(config.kv_memory_gib * 2**30 // slot))
    kept, added = activation_bytes(config, compute)
    reduced = 4 * (1 + 1 / world_size)  # of a gradient: what goes into a reduction and what comes out, fp32
    unsharded = 4 * trained if config.grad_sync == "last" else 0  # in the pool of another stream, so kept beside
    learning = 0 if weights.adapted else weights.embedding  # the head, whose gradient is made before any other
    head = min(tokens * shape.vocab_size * 4, SLAB_BYTES["cuda" if cuda else "cpu"]) + 4 * learning
    both = sum if config.activation_checkpointing else max  # else a layer's own go before its gradients are reduced
    backward = both((tokens * added, compute * learning + (compute + reduced) * weights.reduced))
    sharded = compute * weights.frozen / world_size if here else 0
    beside = count_of(copied(config)) / (1 if weights.shared else world_size)
    return {
        "frozen base": compute * weights.frozen if weights.shared else sharded,
        "master weights, fp32": here * 4 * trained / world_size,
        "optimizer state, fp32": here * 8 * trained / world_size,
        "gradients, fp32": here * 4 * trained / world_size + unsharded,
        "gathered weights": compute * weights.gathered(config.reshard_after_forward is False),
        "rollout replica": compute * (trained if weights.shared else weights.whole) if asks else 0,
        "frozen model": compute * beside if here else 0,
        "KV cache": slots * slot if asks else 0,
        "drawing tokens": slots * shape.vocab_size * draw_bytes(config) if asks else 0,
        "activations": tokens * kept,
        "head, or backward of a layer": max(head, backward, reduced * learning - tokens * kept),
    }


@functools.cache
def hollow_of(model: str):
    return hollow_model(model)


def shapes_of(model: str) -> list[torch.Size]:
    """Of all parameters, tied ones once; of none, "", none."""
    return [p.shape for p in hollow_of(model).parameters()] if model else []


def count_of(model: str) -> int:
    """Number of parameters, tied ones once."""
    return sum(map(math.prod, shapes_of(model)))


def trained_shapes(config: Config) -> list[tuple[int, ...]]:
    """Of what learns: all parameters, or both factors of each adapter."""
    if config.lora_rank is None:
        return shapes_of(config.start)
    return [shape for V, D in adapted_shapes(config) for shape in ((config.lora_rank, D), (V, config.lora_rank))]


def adapted_shapes(config: Config) -> list[torch.Size]:
    """[V, D] of the linears that have, or will have, an adapter."""
    return _adapted_shapes(Config(model=config.start, lora_rank=config.lora_rank, lora_targets=config.lora_targets))


@functools.cache  # a plan asks hundreds of times, and an adapter that is there has to be read
def _adapted_shapes(config: Config) -> list[torch.Size]:
    return [x.weight.shape for x in adapters.targets(hollow_of(config.start), config).values()]


def trained_count(config: Config) -> int:
    return sum(map(math.prod, trained_shapes(config)))


def inner_width(config: Config) -> float:
    """Values between the factors of a layer's adapters, of a token."""
    return (config.lora_rank or 0) * len(adapted_shapes(config)) / hollow_of(config.start).config.num_hidden_layers


def settle(config: Config, world_size: int, memory: float) -> Config:
    """With `reshard_after_forward` and `grad_sync` decided where they were left open: the fastest that fits `memory`,
    bytes of a rank's device, or `memory_gib` of them; as they are on a CPU, which says 0 and gains nothing."""
    if not memory:
        return config
    memory = min(memory, config.memory_gib * 2**30 or memory)
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


def activation_bytes(config: Config, compute: int) -> tuple[int, int]:
    """Per token: what a forward keeps for the backward, and what the backward of a layer adds.

    Of a layer: inputs of seven products, of the gate's two factors and of the attention, of each norm its input in fp32
    and its output before and after the weight, before it for one that learns, and what stands between an adapter's
    factors. `compute`: bytes of a value.
    """
    lm = hollow_of(config.start)
    shape, norm_outputs = lm.config, 2 if config.lora_rank is None else 1
    hidden, wide, head = shape.hidden_size, shape.intermediate_size, head_size(shape)
    attended = 2 * head * (shape.num_attention_heads + shape.num_key_value_heads)
    layer = compute * (4 * wide + attended + inner_width(config)) + (4 + norm_outputs * compute) * norm_width(lm)
    norm = (4 + compute) * hidden
    if not config.activation_checkpointing:
        return shape.num_hidden_layers * layer + norm, 3 * compute * wide
    return shape.num_hidden_layers * compute * hidden + norm, layer + 3 * compute * wide


def norm_width(lm: nn.Module) -> int:
    """Values that go into the norms of a layer, of a token: those of queries and keys have the size of a head."""
    heads = {"q_norm": lm.config.num_attention_heads, "k_norm": lm.config.num_key_value_heads}
    norms = [(name.rpartition(".")[2], x) for name, x in lm.model.layers[0].named_modules() if name.endswith("norm")]
    return sum(heads.get(name, 1) * x.weight.numel() for name, x in norms)


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
        sharded = "lora_base sharded" if config.shares_base else "cpu_offload true"
        return f"Out of memory while the model was set up: use more ranks, {sharded}, or a smaller model."
    longest = config.max_prompt_tokens + config.max_new_tokens
    if config.micro_tokens > longest:
        half = max(config.micro_tokens // 2, longest)
        return f"Out of memory during the update: lower micro_tokens from {config.micro_tokens} to {half}."
    for flag in ("activation_checkpointing", *(() if config.shares_base else ("cpu_offload",))):
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
