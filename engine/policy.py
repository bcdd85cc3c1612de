"""Policy: the module that is trained: body, head and loss in one, sharded by FSDP2, and its optimizer."""

import importlib
import math

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from engine import linears
from engine.attention import Padded, Varlen, attend
from engine.config import Config
from engine.layout import Rows
from engine.model import compute_dtype, set_attention


class Policy(nn.Module):
    """Body, head and loss in one forward, so that FSDP2's hooks see all of it.

    From then on `lm` attends as the spans of its rows say; it is blind to a mask.
    """

    def __init__(self, lm: nn.Module, device: torch.device):
        super().__init__()
        self.lm = lm
        set_attention(lm, "policy", attend)
        flash = device.type == "cuda" and not lm.config.attention_dropout  # which the kernel does not know
        self.plan = Varlen.plan if flash else Padded.plan

    def forward(self, rows: Rows, loss):
        """`loss` is one of engine.algos.loss; its result is returned."""
        lm = self.lm
        hidden_1TD = lm.model(
            input_ids=rows.ids_T[None], position_ids=rows.position_T[None], spans=rows.spans, use_cache=False
        ).last_hidden_state
        return loss(hidden_1TD[0], lm.lm_head.weight, lm.lm_head.bias, rows)


class Base(nn.Module):
    """A policy without its adapters, in the same memory."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy

    def forward(self, rows: Rows, loss):
        with linears.adapters_off(self.policy.lm):
            return self.policy(rows, loss)


def shard(policy: Policy, config: Config, mesh, *, frozen: bool = False) -> Policy:
    """FSDP2 in place: every decoder layer its own unit, the rest (embedding, norm, head) the root.

    A base that is shared is in no unit, which would gather it in every micro-batch: there the adapters are one. On CUDA
    bf16 compute with fp32 master weights (bf16 where frozen) and fp32 reduction; fp32 on the CPU. Gradients are summed
    over ranks, never averaged: the weights of the loss carry the normalisation.
    """
    lm = policy.lm
    device, shares = torch.device(mesh.device_type), config.shares_base
    compute = compute_dtype(device)
    if frozen:
        lm.requires_grad_(False)
        if shares:
            return store(policy, compute).to(device).eval()
    if config.activation_checkpointing and not frozen:
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable  # old name
        enable({"use_reentrant": False})
    cast = {"param_dtype": compute, "reduce_dtype": torch.float32} if compute != torch.float32 else {}
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(**cast, cast_forward_inputs=False),
        "reshard_after_forward": False if config.reshard_after_forward is False and not frozen else None,
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload and device.type == "cuda" else OffloadPolicy(),
    }
    if config.compile:
        compile_layers(lm, frozen)
    for layer in lm.model.layers:
        store(layer, compute)
        if not shares:
            fully_shard(layer, **options)
    for rest in (lm.model.embed_tokens, lm.model.norm, lm.lm_head):
        store(rest, compute)
    base = {p for p in policy.parameters() if shares and not p.requires_grad}
    fully_shard(policy, ignored_params=base, **options)
    for module in policy.modules() if mesh.size() > 1 else ():  # one rank would divide by 1, into a copy
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # else a factor of 1 raises on gloo
            module.set_gradient_divide_factor(1.0)  # does not recurse
    return policy.eval() if frozen else policy.train()


def compile_layers(lm: nn.Module, frozen: bool) -> None:
    """Layers of a kind share graphs, which there are several of: with gradients and without, of policy and reference.
    What goes into the first gets a gradient, as into the others: beside a frozen embedding it would compile apart."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for layer in lm.model.layers:
        layer.compile()
    if not frozen and not lm.model.embed_tokens.weight.requires_grad:
        lm.model.embed_tokens.register_forward_hook(lambda *call: call[-1].requires_grad_(torch.is_grad_enabled()))


def store(module: nn.Module, compute: torch.dtype) -> nn.Module:
    """Casts parameters in place: what is trained to fp32, what is frozen to the dtype it is computed in."""
    for p in module.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else compute)
    return module


def remove_dropout(lm: nn.Module) -> nn.Module:
    """`lm`, from now on without any dropout: what samples, scores and learns in RL must be one and the same model."""
    for module in (lm.config, *lm.modules()):
        for name, value in vars(module).items():
            is_rate = isinstance(value, float | int) and not isinstance(value, bool)
            if is_rate and ("dropout" in name or isinstance(module, nn.Dropout) and name == "p"):
                setattr(module, name, 0.0)
    return lm


def shapes(policy: Policy) -> dict[str, list[int]]:
    """Full shape of every parameter: what tells one model's checkpoint from another's."""
    return {name: list(p.shape) for name, p in policy.named_parameters()}


def make_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """Fused AdamW of what is trained; weight decay on matrices only."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
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


def load_kernels(config: Config, device: torch.device):
    """The module of kernels that `config.kernels` names; auto is Triton's on a GPU, else the memory-lean torch ones."""
    name = config.kernels if config.kernels != "auto" else "fused" if device.type == "cuda" else "chunked"
    return importlib.import_module(f"kernels.{name}")
