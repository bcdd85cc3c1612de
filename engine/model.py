"""Models: a checkpoint folder as a plain causal language model with its tokenizer, and back. The only importer of
transformers."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import safetensors
import torch
from torch import nn

from engine.chat import encode_prompt, turn_end  # noqa: F401 (for those who have a tokenizer from here)
from engine.config import own_model
from engine.errors import UserError, first_line
from engine.watch import announce

with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    importlib.metadata.distribution("kernels")
    raise SystemExit("error: The PyPI package `kernels` clashes with the folder kernels/; run `pip uninstall kernels`.")

import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.backends.cuda.enable_cudnn_sdp(False)
"""On an H200 182 us where flash takes 238 (16 x 512 tokens, heads of the 0.5B; of the 3B 296 and 431), but 0.4 to 2 s
for each new shape, and prefills have many."""

FAMILIES = ("qwen2", "qwen3", "llama", "gemma3_text")
LAYER_TYPES = {"full_attention", "sliding_attention"}
_WRAPPER = r"(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
UNWRAP = {rf"^{_WRAPPER}": "", rf"\.{_WRAPPER}": "."}  # of torch.compile, DDP, FSDP and checkpointing, in names
OWN = (
    *("config.json", "generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors"),
    *("model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"),
)
"""Files of an export that mean another model where one of the next export does not stand in their place."""
TEXT = {"", ".json", ".jinja", ".md", ".model", ".txt", ".yaml"}
"""Suffixes of what is no weights, nor a part of them."""
PICKLED = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
"""Suffixes of weights that only running a program of their maker's brings back."""
ADAPTER_CONFIG = "adapter_config.json"
NO_CODE = {"trust_remote_code": False}
"""For all that transformers loads: left out, it asks on the terminal whether to run a folder's own code."""


def locate(model: str) -> str:
    """Where transformers finds a model: the folder of configs/models that has its name, else a folder or hub id.

    Of an adapter's folder it is the base's. UserError for a folder that is not there, before a hub is asked for it, and
    for one without a model."""
    if adapter := adapter_config(model):
        return _locate_base(model, adapter)
    if own := own_model(model):
        return str(own)
    folder = Path(model)
    if not folder.is_dir():
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and not folder.parent.is_dir():
            return model
        raise UserError(f"There is no model folder {model}; the id of a hub's model has the form owner/name.")
    if adapter := next(folder.glob("adapter_*"), None):
        raise UserError(
            f"{model} holds an adapter ({adapter.name}) beside a model, or without {ADAPTER_CONFIG}: which of them is "
            "meant cannot be told, so take the files of one out of the folder."
        )
    if not (folder / "config.json").is_file():
        export = folder / "export"
        made = any((export / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
        instead = f"; the run's model is in {export}" if made else ""
        raise UserError(f"{model} is no model folder, for it has no config.json{instead}.")
    return model


def adapter_config(model: str) -> dict | None:
    """What adapter_config.json says, of a folder that holds that and no model; None of any other."""
    path = Path(model) / ADAPTER_CONFIG
    if not path.is_file() or any(path.parent.glob("model*.safetensors*")):
        return None
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not (isinstance(base, str) and base):
        raise UserError(f"{path} names no base_model_name_or_path: write in it which model the adapter belongs to.")
    return values


def base_of(model: str) -> str:
    """The model that an adapter's folder belongs to; any other is its own."""
    adapter = adapter_config(model)
    return adapter["base_model_name_or_path"] if adapter else model


def _locate_base(model: str, adapter: dict) -> str:
    base = adapter["base_model_name_or_path"]
    if adapter_config(base):
        raise UserError(f"The base of the adapter {model} is an adapter too, {base}: merge that one into its own base.")
    try:
        return locate(base)
    except UserError as error:
        raise UserError(
            f"The adapter {model} cannot be used without its base, which its {ADAPTER_CONFIG} names "
            f"(base_model_name_or_path; put it right where it has moved): {error}"
        ) from None


def lacks_weights(model: str) -> bool:
    """Whether it is a folder with a config, beside which is only text, and no index of weights: then they are random.

    Where a file says that there should be some (a pointer, a download's .incomplete or .metadata, weights of another
    kind), they are not random: loading them fails."""
    folder = Path(locate(model))
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return (folder / "config.json").is_file() and all(
        path.suffix in TEXT and not path.name.endswith(".index.json") for path in files
    )


def check_given(model: str) -> None:
    """UserError for a model without weights, which would be random, where a trained one is wanted."""
    if lacks_weights(model):
        raise UserError(
            f"The model {model} has random weights, for none are in its folder (were they left out of a download?): "
            "pass --model DIR, as the export folder of a run."
        )


def load_tokenizer(model: str, today: datetime.date | None = None):
    """The tokenizer of a folder or hub id; UserError when it is missing.

    `today`: what its chat template takes for today, for as long as it lives; the day it is loaded if None.
    """
    folder = locate(model)
    model_config(model)
    if adapter_config(model) and (Path(model) / "tokenizer_config.json").is_file():
        folder = model
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # tokenizers raises nothing more special for a file it cannot read
        raise UserError(f"No tokenizer can be loaded from {model!r}: {first_line(error)}") from None
    if not tokenizer.encode("a", add_special_tokens=False):
        raise UserError(f"The tokenizer of {model!r} knows no letters; are its files whole, as tokenizer.json?")
    if "auto_map" in tokenizer.init_kwargs:
        announce(f"{model} has a tokenizer of its own, whose code is not run: transformers' is taken.")
    tokenizer.today = today or datetime.date.today()
    return tokenizer


def check_vocabulary(tokenizer, rows: int, model: str) -> None:
    """UserError where a token that every chat needs is beyond the `rows` of the model's embedding."""
    if tokenizer.vocab_size > rows or turn_end(tokenizer) >= rows:
        raise UserError(
            f"The tokenizer of {model!r} has {max(tokenizer.vocab_size, turn_end(tokenizer) + 1)} tokens, the model "
            f"{rows}: they do not belong together, or the model must be resized (resize_token_embeddings)."
        )


def model_config(model: str):
    """The transformers config of a folder or hub id; UserError for a family that is not supported, before anything else
    of the folder is looked at, for what else is not (`unsupported`), and for quantised weights."""
    folder = locate(model)
    try:
        family = transformers.PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE) if family in FAMILIES else None
    except Exception as error:
        _refuse_hub_adapter(folder)
        raise UserError(f"No model can be loaded from {model!r}: {first_line(error)}") from None
    if config is None:
        text = "; of Gemma 3 the text models alone, as gemma-3-270m and 1b" if family == "gemma3" else ""
        raise UserError(f"{model!r} is of the family {family}; supported: {', '.join(FAMILIES)}{text}.")
    if part := unsupported(config):
        raise UserError(f"{model!r} has {part}, which is not supported: it would be computed as another model.")
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        where = f", and name it as the base in {Path(model) / ADAPTER_CONFIG}" if adapter_config(model) else ""
        raise UserError(
            f"The weights of {base_of(model)!r} are quantised ({method}) and cannot be trained; use the model in bf16 "
            f"or fp32{where}."
        )
    return config


def _refuse_hub_adapter(folder: str) -> None:
    """UserError for a hub's id that is an adapter's, which transformers would have peft load, or miss weights of."""
    if not Path(folder).is_dir() and transformers.utils.find_adapter_config_file(folder):
        raise UserError(
            f"{folder!r} is an adapter on a hub, and they are read from folders: hf download {folder} --local-dir DIR, "
            "and pass that."
        )


def unsupported(config) -> str | None:
    """What of a transformers config our attention and head would compute otherwise, by name; None if they would not."""
    types, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    if others := types - LAYER_TYPES:
        return f"layers of the type {min(others)}"
    if "sliding_attention" in types and not (window and window >= 1):
        return f"sliding-window layers with a sliding_window of {window}"
    if getattr(config, "use_bidirectional_attention", None):
        return "bidirectional attention (use_bidirectional_attention)"
    caps = ("final_logit_softcapping", "attn_logit_softcapping")
    return next((f"{cap} {getattr(config, cap)}" for cap in caps if getattr(config, cap, None) is not None), None)


def rope_types(config) -> set[str]:
    """Of a transformers config, which may have one for each type of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    return {part.get("rope_type", "default") for part in parts}


def head_size(config) -> int:
    """Size of an attention head, from a transformers config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def load_model(model: str, seed: int, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The plain causal language model on the CPU.

    Raises UserError, naming keys, unless every weight of the model is in the file, in its shape, and nothing else;
    the prefixes that wrappers put before names are taken off, which is said. Of a folder without any weights they are
    drawn from `seed`, which is said too. Pickled ones are refused, and code in the folder is not run.
    """
    config = model_config(model)
    if hasattr(config, "auto_map"):
        announce(f"{model} has a model of its own, whose code is not run: transformers' {config.model_type} is taken.")
    if lacks_weights(model):
        announce(f"{model} has no weights in its folder: they are drawn at random, from seed {seed}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm = _empty_model(config, torch.float32)
        return cast_parameters(lm, dtype)
    _refuse_pickled(model)
    lm, report = _read_weights(model, dtype, {})
    wrapped = report["unexpected_keys"]
    if wrapped and sorted(map(unwrap, wrapped)) == sorted(report["missing_keys"]):
        lm, report = _read_weights(model, dtype, UNWRAP)
        announce(f"Took the names of wrappers, as module., off those of the weights in {model}.")
    _check_weights(model, lm, report)
    return lm


def _empty_model(config, dtype: torch.dtype | None = None) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", **NO_CODE)


def _refuse_pickled(model: str) -> None:
    folder = Path(locate(model))
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if any(folder.glob("*.safetensors*")):
        pickled = [name for name in _indexed(folder) if not name.endswith(".safetensors")]
    if pickled:
        raise UserError(
            f"The weights in {model} are pickled ({pickled[0]}), and reading them would run whatever their maker put "
            "in: take the model's safetensors, or, if you trust it, load and save_pretrained it with transformers."
        )


def _indexed(folder: Path) -> Iterator[str]:
    """The files that indices of weights name, as far as these can be read."""
    for path in sorted(folder.rglob("*.safetensors.index.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            yield from map(str, json.loads(path.read_text())["weight_map"].values())


def unwrap(name: str) -> str:
    """The name of a weight without what wrappers put into it."""
    for pattern, plain in UNWRAP.items():
        name = re.sub(pattern, plain, name)
    return name


def _read_weights(model: str, dtype: torch.dtype, renames: dict[str, str]) -> tuple[transformers.PreTrainedModel, dict]:
    """The model, and the report on its weights: what is missing has been drawn at random, and nothing has been said."""
    try:
        read = transformers.AutoModelForCausalLM.from_pretrained(
            locate(model),
            **NO_CODE,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation="sdpa",
            key_mapping=renames,
            ignore_mismatched_sizes=True,  # reported instead
            output_loading_info=True,
        )
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise  # who started it knows what to lower
        _refuse_hub_adapter(locate(model))
        raise UserError(
            f"No model can be loaded from {model!r}: {first_line(error)} (Are its files whole, none a git-lfs pointer?)"
        ) from None
    if getattr(read[0], "_hf_peft_config_loaded", False):
        _refuse_hub_adapter(locate(model))
    return read


def _check_weights(model: str, lm: transformers.PreTrainedModel, report: dict) -> None:
    faults = [f"{key} is {list(has)}, not {list(wants)}" for key, has, wants in report["mismatched_keys"]][:1]
    found = {"missing": report["missing_keys"], "left over": report["unexpected_keys"]}
    faults += [f"{_listed(names)} {fault}" for fault, names in found.items() if names]
    faults += [f"{name} is of integers" for name in _integer_weights(Path(locate(model)))][:1]
    if faults:
        raise UserError(f"The weights of {model!r} do not fit its config.json: {'; '.join(faults)}.")
    if lm.config.tie_word_embeddings and lm.lm_head.weight is not lm.model.embed_tokens.weight:
        raise UserError(
            f"{model!r} has a head of its own (lm_head.weight), but its config.json ties it to the embedding; "
            "set tie_word_embeddings to false there, or remove that weight."
        )


def _integer_weights(folder: Path) -> Iterator[str]:
    """Names of weights that would be taken for numbers where they are codes."""
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            yield from (name for name in names if file.get_slice(name).get_dtype()[0] in "IU")


def _listed(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more are" if others else f"{first} is"


def hollow_model(model: str) -> transformers.PreTrainedModel:
    """The plain model without weights, which takes no memory."""
    with torch.device("meta"):
        lm = _empty_model(model_config(model))
    lm.tie_weights()
    return lm


def eos_ids(lm: transformers.PreTrainedModel, tokenizer) -> list[int]:
    """Every id that ends an answer: the generation config's, the tokenizer's and the chat template's end of turn."""
    ids = lm.generation_config.eos_token_id
    ids = map(int, ids if isinstance(ids, list) else [] if ids is None else [ids])
    known = range(lm.lm_head.weight.shape[0])
    return sorted({*ids, tokenizer.eos_token_id, turn_end(tokenizer)}.intersection(known))


def pad_id(lm: transformers.PreTrainedModel, tokenizer) -> int:
    """The tokenizer's padding where the model has it, else the end of a turn."""
    has = tokenizer.pad_token_id is not None and tokenizer.pad_token_id < lm.lm_head.weight.shape[0]
    return tokenizer.pad_token_id if has else turn_end(tokenizer)


def set_attention(lm: transformers.PreTrainedModel, name: str, attend=None) -> str:
    """The layers of `lm` from now on call `attend(module, query, key, value, mask, scaling=..., **kwargs of the body)`.

    It is SDPA if None. transformers knows it by `name`, one for all models, and makes no mask for such a name. Returns
    the name before."""
    transformers.AttentionInterface.register(name, attend or transformers.AttentionInterface()["sdpa"])
    before, lm.config._attn_implementation = lm.config._attn_implementation, name
    return before


@contextlib.contextmanager
def attention_of(lm: transformers.PreTrainedModel, attend):
    """Inside, the layers of `lm` call `attend` (`set_attention`) with None for a mask.

    There is one name for all, so `attend` must find its state in the kwargs."""
    before = set_attention(lm, "rollout", attend)
    try:
        yield
    finally:
        lm.config._attn_implementation = before


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts parameters in place; buffers stay, since rotary frequencies in bf16 would move every position."""
    for p in module.parameters():
        p.data = p.data.to(dtype)
    return module


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def export_model(lm, tokenizer, folder: Path) -> None:
    """A plain model as a Hugging Face folder (safetensors, tokenizer, generation config).

    Its generation config ends an answer wherever a rollout does, and keeps no other habit of the model it began as."""
    first, *others = eos_ids(lm, tokenizer)
    lm.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[first, *others] if others else first,
        pad_token_id=pad_id(lm, tokenizer),
    )
    write_export(folder, tokenizer, lm.save_pretrained)


def write_export(folder: Path, tokenizer, save: Callable[[Path], None]) -> None:
    """The folder with what `save` writes into it, and the tokenizer, complete or not there.

    UserError where it cannot be written. Of an export before it what has another name stays, unless it is one's own."""
    aside, before = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "before"))
    _take_over(before, folder)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save(aside)
        tokenizer.save_pretrained(aside)
        if folder.exists():
            os.rename(folder, before)
        os.rename(aside, folder)
        _take_over(before, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"The export {folder} could not be written: {error}. (A run's checkpoints stay: with --resume auto it is "
            "written again.)"
        ) from error


def _take_over(before: Path, folder: Path) -> None:
    """Moves into `folder` what it lacks of the one `before` it, if there is one, and ends that."""
    if before.exists() and not folder.exists():
        os.rename(before, folder)
    for path in [*before.glob("*")]:
        if not (folder / path.name).exists() and not any(map(path.match, OWN)):
            os.rename(path, folder / path.name)
    shutil.rmtree(before, ignore_errors=True)
