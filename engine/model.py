"""Models: load, tokenize, shard. The only importer of transformers."""

import contextlib
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from engine.batch import Batch
from engine.chat import TAGS, encode_prompt, turn_end  # noqa: F401 (for those who have a tokenizer from here)
from engine.config import Config
from engine.data.arithmetic import words
from engine.errors import UserError, first_line

with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    importlib.metadata.distribution("kernels")
    raise SystemExit("error: The PyPI package `kernels` clashes with the folder kernels/; run `pip uninstall kernels`.")

import transformers  # noqa: E402
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from kernels import products  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for each shape, and micro-batches have many; not measured

FAMILIES = ("qwen2", "qwen3", "llama")
_WRAPPER = r"(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
UNWRAP = {rf"^{_WRAPPER}": "", rf"\.{_WRAPPER}": "."}  # of torch.compile, DDP, FSDP and checkpointing, in names
TINY_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> transformers.Qwen2Tokenizer:
    """A byte-level BPE in which every word of the embedded task is one token, with a chat template.

    It splits text as Qwen2's does: AutoTokenizer gives any qwen2 folder that splitting, whatever was saved there.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(words(), trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    learned = json.loads(core.to_str())["model"]
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        pad_token=special[0],
        eos_token=special[1],
        unk_token=None,
        extra_special_tokens=special[2:],
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])  # kept when special tokens are skipped
    tokenizer.chat_template = TINY_TEMPLATE
    return tokenizer


def tiny_config(tokenizer) -> transformers.Qwen2Config:
    """Qwen2 architecture, about 0.7 million parameters."""
    return transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.04,
    )


def check_given(model: str) -> None:
    """UserError for the embedded model, whose weights are random, where a trained one is wanted."""
    if model == "tiny":
        raise UserError("The model tiny has random weights: pass --model DIR, as the export folder of a run.")


def check_folder(model: str) -> None:
    """UserError for what can only be a path and is not there, before a hub is asked for it, and for an adapter."""
    looks_local = (
        model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).parent.is_dir() and "/" in model
    )
    if looks_local and not Path(model).is_dir():
        raise UserError(f"There is no model folder {model}.")
    if adapter := next(Path(model).glob("adapter_*"), None):
        raise UserError(
            f"{model} holds an adapter ({adapter.name}), which would be left out: merge it into the weights first "
            "(peft's merge_and_unload), or take its files out of the folder."
        )


def load_tokenizer(model: str, today: datetime.date | None = None):
    """The tokenizer of a folder or hub id; UserError when it is missing or has no chat template.

    `today`: what its template takes for today, for as long as it lives; the day it is loaded if None.
    """
    tokenizer = tiny_tokenizer() if model == "tiny" else _load_tokenizer(model)
    tokenizer.today = today or datetime.date.today()
    return tokenizer


def _load_tokenizer(model: str):
    check_folder(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        has_template = tokenizer.chat_template and tokenizer.get_chat_template()
    except Exception as error:  # tokenizers raises nothing more special for a file it cannot read
        raise UserError(f"No tokenizer can be loaded from {model!r}: {first_line(error)}") from None
    if not has_template:
        raise UserError(
            f"The tokenizer of {model!r} has no chat template; use an instruct model, or add one to its folder."
        )
    return tokenizer


def check_vocabulary(tokenizer, rows: int, model: str) -> None:
    """UserError where a token that every chat needs is beyond the `rows` of the model's embedding."""
    if tokenizer.vocab_size > rows or turn_end(tokenizer) >= rows:
        raise UserError(
            f"The tokenizer of {model!r} has {max(tokenizer.vocab_size, turn_end(tokenizer) + 1)} tokens, the model "
            f"{rows}: they do not belong together, or the model must be resized (resize_token_embeddings)."
        )


def model_config(model: str):
    """The transformers config of a folder or hub id; UserError for a family that is not supported and for quantised
    weights."""
    if model == "tiny":
        return tiny_config(tiny_tokenizer())
    check_folder(model)
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except Exception as error:
        raise UserError(f"No model can be loaded from {model!r}: {first_line(error)}") from None
    if config.model_type not in FAMILIES:
        raise UserError(f"{model!r} is a {config.model_type} model; supported families: {', '.join(FAMILIES)}.")
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(
            f"The weights of {model!r} are quantised ({method}) and cannot be trained; use the model in bf16 or fp32."
        )
    return config


def head_size(config) -> int:
    """Size of an attention head, from a transformers config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def load_model(model: str, seed: int, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The plain causal language model on the CPU; "tiny" has random weights drawn from `seed`.

    Raises UserError, naming keys, unless every weight of the model is in the file, in its shape, and nothing else;
    the prefixes that wrappers put before names are taken off, which is said.
    """
    config = model_config(model)
    if model == "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cast_parameters(transformers.Qwen2ForCausalLM(config), dtype)
    lm, report = _read_weights(model, dtype, {})
    wrapped = report["unexpected_keys"]
    if wrapped and sorted(map(_unwrap, wrapped)) == sorted(report["missing_keys"]):
        lm, report = _read_weights(model, dtype, UNWRAP)
        if os.environ.get("RANK", "0") == "0":
            print(f"Took the names of wrappers, as module., off those of the weights in {model}.", file=sys.stderr)
    _check_weights(model, lm, report)
    return lm


def _unwrap(name: str) -> str:
    for pattern, plain in UNWRAP.items():
        name = re.sub(pattern, plain, name)
    return name


def _read_weights(model: str, dtype: torch.dtype, renames: dict[str, str]) -> tuple[transformers.PreTrainedModel, dict]:
    """The model, and the report on its weights: what is missing has been drawn at random, and nothing has been said."""
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            attn_implementation="sdpa",
            key_mapping=renames,
            ignore_mismatched_sizes=True,  # reported instead
            output_loading_info=True,
        )
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise  # who started it knows what to lower
        raise UserError(
            f"No model can be loaded from {model!r}: {first_line(error)} (Are its files whole, none a git-lfs pointer?)"
        ) from None


def _check_weights(model: str, lm: transformers.PreTrainedModel, report: dict) -> None:
    faults = [f"{key} is {list(has)}, not {list(wants)}" for key, has, wants in report["mismatched_keys"]][:1]
    found = {"missing": report["missing_keys"], "left over": report["unexpected_keys"]}
    faults += [f"{_listed(names)} {fault}" for fault, names in found.items() if names]
    faults += [f"{name} is of integers" for name in _integer_weights(Path(model))][:1]
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


def count_parameters(model: str) -> int:
    """Number of parameters (tied ones once), without loading weights."""
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(model_config(model))
    lm.tie_weights()
    return sum(p.numel() for p in lm.parameters())


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


@contextlib.contextmanager
def attention_of(lm: transformers.PreTrainedModel, attend):
    """Inside, the layers of `lm` call `attend(module, query, key, value, None, scaling=..., **kwargs of the body)`.

    There is one name for all, so `attend` must find its state in the kwargs."""
    transformers.AttentionInterface.register("rollout", attend)
    before, lm.config._attn_implementation = lm.config._attn_implementation, "rollout"
    try:
        yield
    finally:
        lm.config._attn_implementation = before


def load_kernels(config: Config, device: torch.device):
    """The module of kernels that `config.kernels` names; auto is Triton's on a GPU, else the memory-lean torch ones."""
    name = config.kernels if config.kernels != "auto" else "fused" if device.type == "cuda" else "chunked"
    return importlib.import_module(f"kernels.{name}")


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts parameters in place; buffers stay, since rotary frequencies in bf16 would move every position."""
    for p in module.parameters():
        p.data = p.data.to(dtype)
    return module


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Linear(nn.Linear):
    def forward(self, x):
        return products.linear(x, self.weight, self.bias)


def use_products(lm: nn.Module) -> nn.Module:
    """`lm`, from now on with the matrix products of kernels.products."""
    for module in lm.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return lm


class Policy(nn.Module):
    """Body, head and loss in one forward, so that FSDP2's hooks see all of it.

    From then on `lm` attends as its rows say, causally or by their segments; it is blind to a mask of padding.
    """

    def __init__(self, lm: transformers.PreTrainedModel):
        super().__init__()
        self.lm = use_products(lm)
        # SDPA under a name for which transformers makes no mask: on the way to none it looks at positions, which waits
        transformers.AttentionInterface.register("policy", transformers.AttentionInterface()["sdpa"])
        lm.config._attn_implementation = "policy"
        layer = sum(p.numel() for p in lm.model.layers[0].parameters())
        # operations of a layer: per token, and per token and key
        self.costs = 2 * layer, 4 * lm.config.num_attention_heads * head_size(lm.config)

    def forward(self, batch: Batch, loss, config: Config, ops):
        """`loss` is a function of engine.algos.loss; its result is returned."""
        lm, ids_NT = self.lm, batch.ids_NT
        mask = None if batch.segment_NT is None else segment_mask(batch.segment_NT)
        hidden_NTD = lm.model(
            input_ids=ids_NT, position_ids=batch.position_NT, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return loss(hidden_NTD.flatten(0, 1), lm.lm_head.weight, lm.lm_head.bias, batch, config, ops)


def segment_mask(segment_NT: Tensor) -> Tensor:
    """Causal attention inside each segment and to segment 0: bool [N, 1, T, T], True = attend."""
    query, key = segment_NT[:, None, :, None], segment_NT[:, None, None, :]
    return ((query == key) | (key == 0)).tril()


def shard(policy: Policy, config: Config, mesh, *, frozen: bool = False) -> Policy:
    """FSDP2 in place: every decoder layer its own unit, the rest (embedding, norm, head) the root.

    On CUDA bf16 compute with fp32 master weights (bf16 when frozen) and fp32 reduction; fp32 on the CPU.
    Gradients are summed over ranks, never averaged: the weights of the loss carry the normalisation.
    """
    lm = policy.lm
    lm.requires_grad_(not frozen)
    device = torch.device(mesh.device_type)
    storage = compute_dtype(device) if frozen else torch.float32
    if config.activation_checkpointing and not frozen:
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable  # old name
        enable({"use_reentrant": False})
    compute = compute_dtype(device)
    cast = {"param_dtype": compute, "reduce_dtype": torch.float32} if compute != torch.float32 else {}
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(**cast, cast_forward_inputs=False),
        "reshard_after_forward": False if config.reshard_after_forward is False and not frozen else None,
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload and device.type == "cuda" else OffloadPolicy(),
    }
    for layer in lm.model.layers:
        if config.compile:
            layer.compile()
        fully_shard(cast_parameters(layer, storage), **options)
    for rest in (lm.model.embed_tokens, lm.model.norm, lm.lm_head):
        cast_parameters(rest, storage)
    fully_shard(policy, **options)
    for module in policy.modules() if mesh.size() > 1 else ():  # one rank would divide by 1, into a copy
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # else a factor of 1 raises on gloo
            module.set_gradient_divide_factor(1.0)  # does not recurse
    return policy.eval() if frozen else policy.train()


def remove_dropout(lm: nn.Module) -> nn.Module:
    """`lm`, from now on without any dropout: what samples, scores and learns in RL must be one and the same model."""
    for module in lm.modules():
        for name, value in vars(module).items():
            is_rate = isinstance(value, float | int) and not isinstance(value, bool)
            if is_rate and ("dropout" in name or isinstance(module, nn.Dropout) and name == "p"):
                setattr(module, name, 0.0)
    return lm


def shapes(policy: Policy) -> dict[str, list[int]]:
    """Full shape of every parameter: what tells one model's checkpoint from another's."""
    return {name: list(p.shape) for name, p in policy.named_parameters()}


def make_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    matrices = [p for p in policy.parameters() if p.dim() >= 2]
    vectors = [p for p in policy.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: Config, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then constant or cosine decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def export_model(lm, tokenizer, folder: Path) -> None:
    """A plain model as a Hugging Face folder (safetensors, tokenizer, generation config), complete or not there.

    Its generation config ends an answer wherever a rollout does, and keeps no other habit of the model it began as."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    first, *others = eos_ids(lm, tokenizer)
    lm.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[first, *others] if others else first,
        pad_token_id=pad_id(lm, tokenizer),
    )
    lm.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)
