"""Adapters: thin factors that are trained beside a frozen base (engine.linears), begun, read, written in PEFT's format
and merged.

    folder/adapter_config.json         the base, the scale as lora_alpha / r, the names of the linears
           adapter_model.safetensors   base_model.model.<linear>.lora_A.weight [R, D], .lora_B.weight [V, R]

Ours says in the metadata of its tensors which base it was trained on (`fingerprint`), which PEFT does not look at.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine import linears, model
from engine.config import Config, first_run
from engine.errors import UserError, first_line
from engine.settings import show
from engine.watch import announce

WEIGHTS = "adapter_model.safetensors"
PREFIX, ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
DTYPES = {"F32", "F16", "BF16"}
PLAIN = (
    *("peft_type", "task_type", "base_model_name_or_path", "peft_version", "auto_mapping"),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "inference_mode", "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size"),
)
"""Of adapter_config.json, what is read here, or changes nothing about what the tensors mean."""
USUAL = {"bias": "none", "revision": "main"}
"""Values, of other keys, that do not either."""
OF_ADAPTERS = ("lora_alpha", "lora_dropout", "lora_targets", "lora_base", "export")
"""Settings that mean nothing without."""
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin an adapter that change the base's weights too."""


@dataclass(frozen=True)
class Adapter:
    """As a folder holds it: A [R, D] and B [V, R] of each linear, by its name; `base` is a fingerprint or ""."""

    folder: str
    rank: int
    scale: float
    factors: dict[str, tuple[Tensor, Tensor]]
    base: str


def follow(config: Config) -> Config:
    """With rank and alpha of the adapter that a run starts from, if it does; UserError where they are set otherwise,
    for settings that mean nothing without an adapter, and for one that could not be exported."""
    if adapter := model.adapter_config(config.start):
        return _go_on(config, adapter)
    if config.lora_rank is None:
        if config.reference == "adapters_off":
            raise UserError("reference adapters_off needs adapters; set lora_rank, as 16, or leave it out.")
        for name in OF_ADAPTERS:
            if getattr(config, name) != getattr(Config, name):
                raise UserError(
                    f"{name} is of adapters, and all weights are trained; set lora_rank too, as 16, or pass "
                    f"--{name}={show(getattr(Config, name)).strip('-')}."
                )
        return config
    writes = config.export == "adapter" and not (config.dry_run or config.profile_steps or first_run(config))
    if writes and model.lacks_weights(config.start):
        raise UserError(
            f"The model {config.start} has random weights, which an exported adapter could not name as its base: pass "
            "--export merged, or start from a model with weights."
        )
    return config


def _go_on(config: Config, adapter: dict) -> Config:
    rank, scale = _shape_of(config.start, adapter)
    own = {"lora_rank": rank, "lora_alpha": scale * rank}
    for name, value in own.items():
        if getattr(config, name) not in (None, value):
            raise UserError(
                f"{name} is {getattr(config, name):g}, but the adapter {config.start} that the run goes on with has "
                f"{value:g}; leave it out, or merge the adapter first to begin another on top."
            )
    if (dropout := adapter.get("lora_dropout")) and not config.lora_dropout:
        announce(f"{config.start} had lora_dropout {dropout}, and goes on without: sft takes --lora_dropout {dropout}.")
    return dataclasses.replace(config, **own)


def load(start: str, seed: int, dtype: torch.dtype) -> nn.Module:
    """The plain model of a folder or hub id on the CPU, with its adapter in fp32 beside it if it is an adapter's."""
    lm = model.load_model(start, seed, dtype)
    if model.adapter_config(start):
        attach(lm, read(start))
    return lm


def read(folder: str) -> Adapter:
    """UserError for an adapter that is not whole, or is of a kind that would be computed wrongly."""
    rank, scale = _shape_of(folder, model.adapter_config(folder))
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickled = path.with_suffix(".bin").exists()
        more = " Pickled ones (.bin) are not read: load and save it with peft." if pickled else ""
        raise UserError(f"The adapter {folder} has no {WEIGHTS}.{more}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            odd = [f"{n} is {d}" for n in names if (d := file.get_slice(n).get_dtype()) not in DTYPES]
            tensors = {name: file.get_tensor(name) for name in names} if not odd else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if odd:
        raise UserError(f"The adapter {folder} must be of fp32, fp16 or bf16, but {odd[0]}.")
    return Adapter(folder, rank, scale, _pairs(folder, tensors, rank), metadata.get("base", ""))


def _shape_of(folder: str, values: dict) -> tuple[int, float]:
    """(rank, scale) of an adapter's config; UserError for what is not supported."""
    kind, start = values.get("peft_type"), str(values.get("init_lora_weights")).lower()
    odd = [name for name, value in values.items() if value and name not in PLAIN and value != USUAL.get(name)]
    if kind != "LORA":
        raise UserError(f"The adapter {folder} is of the kind {kind}; only LORA is supported.")
    if start.startswith(MOVES_BASE):
        odd.insert(0, f"init_lora_weights {start}")
    if odd:
        raise UserError(
            f"The adapter {folder} has {', '.join(odd)} in its {model.ADAPTER_CONFIG}, which is not supported: merge "
            "it into its base with peft (merge_and_unload) and start from that."
        )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not (type(rank) is int and rank > 0 and type(alpha) in (int, float) and 0 < alpha < math.inf):
        raise UserError(
            f"The adapter {folder} has r {rank!r} and lora_alpha {alpha!r}; they must be a whole number and a number, "
            "above 0."
        )
    return rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _pairs(folder: str, tensors: dict[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = {model.unwrap(name): tensor for name, tensor in tensors.items()}
    names = {name.removeprefix(PREFIX).removesuffix(end) for name in tensors for end in ENDS if name.endswith(end)}
    wanted = {f"{PREFIX}{name}{end}" for name in names for end in ENDS}
    if not names or (wrong := sorted(wanted ^ tensors.keys())):
        alone = f"{wrong[0]} {'alone' if wrong[0] in tensors else 'missing'}" if names else ""
        fault = alone or f"none, but {min(tensors, default='nothing else')}"
        raise UserError(
            f"The adapter {folder} does not hold two factors for each linear: it has {fault}. What is of no linear, as "
            "embeddings, can be merged into its base with peft (merge_and_unload)."
        )
    pairs = {name: tuple(tensors[f"{PREFIX}{name}{end}"] for end in ENDS) for name in sorted(names)}
    for name, (a, b) in pairs.items():
        if a.dim() != 2 or b.dim() != 2 or len(a) != rank or b.shape[1] != rank:
            raise UserError(
                f"The adapter {folder} has factors {list(a.shape)} and {list(b.shape)} of {name}, not of rank {rank}."
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(f"The adapter {folder} has factors of {name} that are not finite: its training failed.")
    return pairs


def attach(lm: nn.Module, adapter: Adapter) -> None:
    """Puts an adapter beside its base; UserError, by name, where it belongs to another."""
    body = linears.named(lm, ())
    for name, (a_RD, b_VR) in adapter.factors.items():
        if name not in body:
            raise UserError(
                f"The adapter {adapter.folder} has factors of {name}, which is no linear in the layers of its base: it "
                "belongs to another model, or adapts what only merging can use (lm_head)."
            )
        shape = [len(b_VR), a_RD.shape[1]]
        if shape != list(body[name].weight.shape):
            raise UserError(
                f"The adapter {adapter.folder} belongs to another base: its {name} is {shape}, this one's "
                f"{list(body[name].weight.shape)}."
            )
    if adapter.base and adapter.base != fingerprint(lm):
        raise UserError(
            f"The adapter {adapter.folder} was trained on other weights than its base has now: put those back, or name "
            f"them in its {model.ADAPTER_CONFIG}."
        )
    for name, factors in adapter.factors.items():
        linears.adapt(body[name], *factors, adapter.scale)


def begin(lm: nn.Module, config: Config) -> None:
    """Puts new factors beside the linears that `targets` gives, unless `lm` has some: A as nn.Linear's weights are
    drawn, from the seed, and B zero, so that nothing changes yet. UserError as of `targets`."""
    generator = torch.Generator().manual_seed(config.seed)
    for linear in targets(lm, config).values() if not linears.adapted(lm) else ():
        V, D = linear.weight.shape
        a_RD = (2 * torch.rand(config.lora_rank, D, generator=generator) - 1) / math.sqrt(D)
        linears.adapt(linear, a_RD, torch.zeros(V, config.lora_rank), config.lora_scale)
    for linear in linears.adapted(lm).values():
        linear.dropout = config.lora_dropout


def targets(lm: nn.Module, config: Config) -> dict[str, nn.Linear]:
    """The linears of `lm` that have, or will have, an adapter, by name; none without `lora_rank`.

    UserError for a name in `lora_targets` that is no linear's or not that of an adapter given, and for a rank above a
    width."""
    if config.lora_rank is None:
        return {}
    wanted = linears.named(lm, config.lora_targets)
    if model.adapter_config(config.start):
        given = read(config.start).factors
        if config.lora_targets and (odd := sorted(given.keys() ^ wanted.keys())):
            raise UserError(
                f"lora_targets are not those of the adapter {config.start}, as {odd[0]} shows; leave them out."
            )
        return {name: linear for name, linear in wanted.items() if name in given}
    for name, linear in wanted.items():
        if config.lora_rank > (width := min(linear.weight.shape)):
            raise UserError(f"lora_rank {config.lora_rank} is above the width of {name}, {width}; 8 to 64 are usual.")
    return wanted


def fingerprint(lm: nn.Module, whole: bool = False) -> str:
    """Of a base, or with the factors beside it of the `whole`: a hash of names, shapes and values, these as bf16, in
    whatever dtype they are kept."""
    digest, factors = hashlib.sha256(), {f"{name}.{x}" for name in linears.adapted(lm) for x in ("lora_A", "lora_B")}
    for name, p in lm.named_parameters():
        if whole or name not in factors:
            digest.update(f"{name} {list(p.shape)}".encode())
            digest.update(p.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def merge(lm: nn.Module) -> nn.Module:
    """`lm` with its factors added to the weights, in fp32 and rounded once, and its linears plain again."""
    for linear in linears.adapted(lm).values():
        wide = linear.weight.float() + linear.scale * (linear.lora_B.float() @ linear.lora_A.float())
        linear.weight.data = wide.detach().to(linear.weight.dtype)
        del linear.lora_A, linear.lora_B
        linear.__class__ = nn.Linear
    return lm


def gather(lm: nn.Module, config: Config, base: str) -> Adapter:
    """The adapter that is trained beside a sharded `lm`, whole, on the CPU. Collective."""
    found = linears.adapted(lm)
    factors = {name: tuple(x.detach().full_tensor().cpu() for x in (y.lora_A, y.lora_B)) for name, y in found.items()}
    return Adapter(config.start, config.lora_rank, config.lora_scale, factors, base)


def export(adapter: Adapter, config: Config, dtype: torch.dtype, tokenizer, folder: Path) -> None:
    """Writes a trained adapter in PEFT's format or, where `config.export` says so, its base in `dtype` with it merged
    in. UserError where it cannot be written, or the base is not what it was."""
    base = model.base_of(config.start)
    if config.export == "merged":
        lm = model.load_model(base, config.seed, dtype)
        attach(lm, adapter)
        model.export_model(merge(lm), tokenizer, folder)
    else:
        model.write_export(folder, tokenizer, functools.partial(_save, adapter, base, config.lora_dropout))


def _shortest(names: Iterable[str], base: str) -> list[str]:
    """The last parts of the names of linears, where these name them and no other, else the names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    same = linears.named(model.hollow_model(base), last).keys() == set(names)
    return last if same else list(names)


def _save(adapter: Adapter, base: str, dropout: float, folder: Path) -> None:
    place = Path(model.locate(base))
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(place.absolute()) if place.is_dir() else base,
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "lora_dropout": dropout,
        "target_modules": _shortest(adapter.factors, base),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{name}{end}": x.contiguous()
        for name, factors in adapter.factors.items()
        for end, x in zip(ENDS, factors, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt", "base": adapter.base})
    (folder / model.ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n")
