"""The estimate of --dry-run against the bytes that tensors really hold: an update in bf16, a draw, 3B on one card."""

import dataclasses
import weakref

import pytest
import torch
import torch.distributed as c10d
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import model, plan
from engine.config import load_config
from engine.layout import lay_out, make_rows
from engine.linears import convert
from engine.policy import Policy, shard
from engine.rollouts.sampling import Sampling, sample
from engine.samples import Sample

FIELDS = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
SHAPE_3B = dict(zip(FIELDS, (151936, 2048, 11008, 36, 16, 2)))
SMALL = dict(zip(FIELDS, (500, 64, 256, 4, 4, 2)))


class Live(TorchDispatchMode):
    """The most bytes at once in tensors made while it is on."""

    def __init__(self):
        super().__init__()
        self.most, self.storages = 0, weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages[storage._cdata] = storage
        self.most = max(self.most, sum(storage.nbytes() for storage in list(self.storages.values())))
        return out


def saved(folder, **sizes) -> str:
    """A folder with the config of a Qwen2 of these sizes; weights are not needed to plan."""
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    config.save_pretrained(folder)
    return str(folder)


def estimate(folder, *argv, world_size=1) -> dict[str, float]:
    config = load_config(["--algo", "grpo", "--model", folder, "--device", "cuda", *argv])
    return plan.estimate_memory(config, world_size)


@pytest.fixture
def one_rank():
    """A group of one rank."""
    c10d.init_process_group("gloo", store=c10d.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    c10d.destroy_process_group()


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_an_update_holds_what_the_estimate_says(one_rank, monkeypatch, tmp_path, checkpointing):
    """Gathered weights, activations and a backward; the loss is one here that holds nothing of its own."""
    monkeypatch.setattr("engine.policy.compute_dtype", lambda device: torch.bfloat16)
    folder = saved(tmp_path, **SMALL)
    argv = ["--activation_checkpointing", checkpointing, "--micro_tokens", "512"]
    config = load_config(["--algo", "grpo", "--model", folder, *argv])
    lm = transformers.AutoModelForCausalLM.from_config(model.model_config(folder))
    policy = shard(Policy(convert(lm, config), torch.device("cpu")), config, one_rank)
    (micro,) = lay_out([Sample([5] * 8, [6] * 56)] * 8, config.micro_tokens, share=False)
    rows = make_rows(micro, policy.plan)

    def loss(hidden_TD, weight_VD, *rest):
        return hidden_TD.sum() + weight_VD.sum()

    policy(rows, loss).backward()  # makes the gradients, which are not part of this
    with Live() as live:
        policy(rows, loss).backward()
    told = estimate(folder, *argv, "--max_prompt_tokens", "8", "--max_new_tokens", "56")
    parts = ("gathered weights", "activations", "head, or backward of a layer")
    assert live.most == pytest.approx(sum(told[name] for name in parts), rel=0.1)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}])
def test_a_draw_holds_what_the_estimate_says(tmp_path, filters):
    N, V = 16, 5000
    uniform_N = torch.rand(N, dtype=torch.float64)
    with Live() as live:
        sample(torch.randn(N, V), Sampling(8, **filters), uniform_N)
    argv = [word for name, value in filters.items() for word in (f"--{name}", str(value))]
    told = estimate(saved(tmp_path, **SMALL | {"vocab_size": V}), *argv, "--rollout_batch", str(N))
    assert live.most == pytest.approx(told["drawing tokens"], rel=0.1)


def test_3b_with_a_reference_fits_a_card_of_80_gb(tmp_path):
    """Term by term; P parameters, E of them in the tied embedding, 8 x 1024 tokens at once."""
    folder, P, E = saved(tmp_path, **SHAPE_3B), 3_085_938_688, 151936 * 2048
    files = ["configs/models/qwen2.5-3b.yaml", "configs/hardware/1x80gb.yaml"]
    argv = ["--algo", "grpo", "--config", *files, "--model", folder, "--device", "cuda"]
    config = plan.settle(load_config(argv), 1, 85.0e9)
    assert (config.reshard_after_forward, config.grad_sync) == (True, "every")
    told = plan.estimate_memory(config, 1)
    layer = (P - E) / 36
    known = {
        "master weights, fp32": 4 * P,
        "optimizer state, fp32": 8 * P,
        "gradients, fp32": 4 * P,
        "gathered weights": 2 * (E + 2 * layer),
        "rollout replica": 2 * P,
        "reference, sharded": 2 * P,
        "KV cache": 128 * 36 * 2 * 2 * 128 * 1024 * 2,
        "drawing tokens": 128 * 151936 * 28,
        "activations": 8192 * (36 * 2 + 6) * 2048,
    }
    assert {name: told[name] for name in known} == pytest.approx(known)
    again = 8192 * (2 * 7 * 11008 + 2 * 2 * 128 * 18 + 16 * 2048)
    slab, sums = 2**31, 4 * E
    assert again + 2 * E + 10 * layer < slab + sums == told["head, or backward of a layer"]
    assert 70e9 < sum(told.values()) < 75e9
    without = plan.estimate_memory(dataclasses.replace(config, beta=0.0), 1)
    assert sum(told.values()) - sum(without.values()) == 2 * P


def test_sft_asks_nobody_unless_it_is_evaluated(tmp_path):
    folder = saved(tmp_path, **SMALL)
    asking = ("rollout replica", "KV cache", "drawing tokens")
    alone, examined = (estimate(folder, "--algo", "sft", "--eval_size", size) for size in ("0", "64"))
    assert not any(alone[name] for name in asking) and all(examined[name] for name in asking)
    assert alone["reference, sharded"] == 0 < estimate(folder)["reference, sharded"]


def test_what_is_sharded_offloaded_or_reduced_once_is_counted_so(tmp_path):
    folder = saved(tmp_path, **SMALL)
    one, two = estimate(folder), estimate(folder, world_size=2)
    last, last_of_two = (estimate(folder, "--grad_sync", "last", world_size=n) for n in (1, 2))
    offloaded = estimate(folder, "--cpu_offload", "true", world_size=2)
    for name in ("master weights, fp32", "optimizer state, fp32", "gradients, fp32", "reference, sharded"):
        assert two[name] == one[name] / 2 > 0 == offloaded[name]
    whole = one["gradients, fp32"]
    assert last["gradients, fp32"] == 2 * whole and last_of_two["gradients, fp32"] == 1.5 * whole
    assert one["rollout replica"] == two["rollout replica"] == offloaded["rollout replica"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_left_to_memory_is_the_fastest_that_fits(tmp_path, ranks):
    config = load_config(["--algo", "grpo", "--model", saved(tmp_path, **SMALL), "--device", "cuda"])
    need = lambda **more: sum(plan.estimate_memory(dataclasses.replace(config, **more), ranks).values())  # noqa: E731
    settle = lambda needed: plan.settle(config, ranks, needed / plan.FILLED * 1.0001)  # noqa: E731
    rich = settle(need(reshard_after_forward=False, grad_sync="last"))
    poor = settle(need(reshard_after_forward=True, grad_sync="every"))
    assert (rich.reshard_after_forward, rich.grad_sync) == (False, "last")
    assert (poor.reshard_after_forward, poor.grad_sync) == (True, "every")


def test_the_plan_is_that_of_the_weights_a_run_starts_from(tmp_path):
    folder = saved(tmp_path, **SMALL)
    named = load_config(["--algo", "grpo", "--model", folder, "--device", "cuda"])
    begun = dataclasses.replace(named, model="tiny", init_from=folder)
    assert plan.estimate_memory(begun, 1) == plan.estimate_memory(named, 1)


def test_what_is_set_or_on_a_cpu_is_not_settled(tmp_path):
    argv = ["--algo", "grpo", "--model", saved(tmp_path, **SMALL)]
    asked = load_config([*argv, "--device", "cuda", "--reshard_after_forward", "true", "--grad_sync", "every"])
    assert plan.settle(asked, 2, 1e15) == asked
    config = load_config([*argv, "--device", "cpu"])
    assert plan.settle(config, 2, plan.device_memory(torch.device("cpu"))) is config
