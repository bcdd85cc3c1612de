"""FSDP2 as the policy is sharded: what one rank leaves out, how often weights are gathered and layers compile."""

import collections
import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.step import Size, make_learners, one_rank, trajectories
from engine.attention import Varlen
from engine.model import load_model, model_config

SETTINGS = {"algo": "grpo", "logp_old": "sampler", "micro_tokens": 48, "max_new_tokens": 8}
SIZE = Size("tiny", 8, 8, 8, 48)
VOCABULARY = model_config("tiny").vocab_size  # no other axis is as long
PRODUCTS = ("mm", "addmm", "_linear_pointwise")


class Ops(TorchDispatchMode):
    """Counts operations, divisions by 1 apart, and the head's products once more."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        idle = func._overloadpacket is torch.ops.aten.div and not isinstance(args[1], torch.Tensor) and args[1] == 1
        name = func._overloadpacket.__name__
        self.counts["div by 1" if idle else name] += 1
        shapes = [x.shape for x in args if isinstance(x, torch.Tensor)] if name in PRODUCTS else ()
        self.counts["head"] += any(VOCABULARY in shape for shape in shapes)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def world():
    with one_rank("cpu") as world:
        yield world


def learned(world, folder, **settings):
    """(operations of an update of two micro-batches, which another went before; the learner)."""
    learner = make_learners(load_model("tiny", 0, torch.float32), SETTINGS | settings, world, folder)("chunked")
    samples = trajectories(SIZE, 250)
    learner.learn(samples, 0)  # the first makes buffers
    learner.log.forget()
    with Ops() as ops:
        learner.learn(samples, 0)
    return ops.counts, learner


def test_one_rank_does_not_divide_its_gradients(world, tmp_path):
    counts, _ = learned(world, tmp_path)
    assert counts["div by 1"] == 0
    assert counts["mm"] + counts["addmm"] > 20, "nothing was counted"


@pytest.mark.parametrize(
    "adapters, products",
    [({}, 3), ({"lora_rank": 4}, 2), ({"lora_rank": 4, "lora_base": "sharded"}, 2)],
    ids=["all weights", "adapters", "adapters of a sharded base"],
)
def test_a_frozen_head_takes_two_products(world, tmp_path, adapters, products):
    """Logits and their gradient to what went in; that to the weight is the third."""
    counts, learner = learned(world, tmp_path, **adapters)
    micros = len(learner.micros(trajectories(SIZE, 250)))
    assert learner.policy.lm.lm_head.weight.shape[0] == VOCABULARY and counts["head"] == products * micros


@pytest.mark.parametrize("keep", [False, True])
def test_weights_that_stay_gathered_are_gathered_once_an_update(world, tmp_path, monkeypatch, keep):
    gathered, real = [], FSDPParam.init_unsharded_param
    monkeypatch.setattr(FSDPParam, "init_unsharded_param", lambda self: gathered.append(1) or real(self))
    settings = {"reshard_after_forward": not keep, "grad_sync": "last" if keep else "every"}
    _, learner = learned(world, tmp_path, **settings)
    root, layers, micros, updates = 2, 2 * 12, 2, 2
    assert len(list(learner.policy.parameters())) == root + layers
    assert len(gathered) == updates * (root + layers if keep else micros * (root + 2 * layers))


def test_scoring_frees_what_it_gathered(world, tmp_path):
    _, learner = learned(world, tmp_path, reshard_after_forward=False)
    learner.with_logprobs(learner.policy, "logp_old", trajectories(SIZE, 250))
    assert all(isinstance(p, DTensor) for p in learner.policy.parameters())


@pytest.fixture
def varlen():
    """A GPU's plan of attention, on a CPU: the graphs are those, though nothing is attended to."""
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        for op in ("_varlen_attn", "_varlen_attn_backward"):
            shaped = getattr(torch.nn.attention.varlen, f"{op}_fake")
            zeros = lambda *given, shaped=shaped: tuple(x.zero_() for x in shaped(*given))  # noqa: E731
            library.impl(op, zeros, "CPU")
        yield Varlen.plan


@pytest.mark.parametrize("more", [{"share_prompts": "false"}, {"share_prompts": "true"}, {"lora_rank": 4}])
def test_layers_stop_compiling_after_two_updates_whatever_the_lengths(world, tmp_path, monkeypatch, more, varlen):
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    lm = load_model("tiny", 0, torch.float32)
    learner = make_learners(lm, SETTINGS | {"compile": True} | more, world, tmp_path)("chunked")
    learner.policy.plan = varlen
    before, seen = torch._dynamo.utils.counters["stats"]["unique_graphs"], []
    for longest, sequences in ((16, 8), (40, 8), (72, 16), (90, 24), (24, 8)):
        learner.learn(trajectories(Size("tiny", sequences, 8, longest, 0), 250), 0)
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    torch._dynamo.reset()
    assert 1 <= seen[0] <= 3 and seen[1:] == [4] * 4, "for the first lengths and numbers of spans, then for any"
    assert not any("_orig_mod" in name for name, _ in learner.policy.named_parameters())
