"""The estimate of --dry-run against the bytes that tensors and processes really hold, and its verdict."""

import dataclasses
import json
import re
import shutil
import subprocess
import weakref

import pytest
import torch
import torch.distributed as c10d
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import adapters, dist, model, plan
from engine.config import CONFIGS, load_config
from engine.errors import UserError
from engine.layout import lay_out, make_rows
from engine.linears import convert, freeze
from engine.policy import Policy, shard
from engine.rollouts.sampling import Sampling, sample
from engine.samples import Sample
from tests.warm import command

FIELDS = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
SHAPE_3B = dict(zip(FIELDS, (151936, 2048, 11008, 36, 16, 2)))
SMALL = dict(zip(FIELDS, (500, 64, 256, 4, 4, 2)))
SHAPES = {
    "Qwen2.5-0.5B": dict(zip(FIELDS, (151936, 896, 4864, 24, 14, 2))),
    "Qwen2.5-1.5B": dict(zip(FIELDS, (151936, 1536, 8960, 28, 12, 2))),
    "Qwen2.5-3B": SHAPE_3B,
}
CLAIM = re.compile(r"^#   (\S+)(.*?) +([\d.]+) of the GPU, +([\d.]+) of the host$", re.MULTILINE)

PEAK = """
import train
from engine import dist, plan
from engine.log import peak_resident as peak
from engine.run import Run

def close(self):
    over = stop(self)
    told = plan.memories(self.config, 1)[0][2]
    print("peak", peak() - before, sum(told.values()) - told["the process itself"])
    return over

before, stop, Run.close = peak(), Run.close, close
dist.run(train.main)
"""


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


def saved(folder, kind=transformers.Qwen2Config, **sizes) -> str:
    """A folder with the config of a model of these sizes; weights are not needed to plan."""
    config = kind(**sizes, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
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


KINDS = (transformers.Qwen2Config, transformers.Qwen3Config, transformers.Gemma3TextConfig)
ADAPTERS = {"all": [], "adapters": ["--lora_rank", "8"], "sharded": ["--lora_rank", "8", "--lora_base", "sharded"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ADAPTERS)
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_an_update_holds_what_the_estimate_says(one_rank, monkeypatch, tmp_path, checkpointing, trained, kind):
    """Gathered weights, activations and a backward; the loss is one here that holds nothing of its own."""
    monkeypatch.setattr("engine.policy.compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr("engine.plan.SLAB_BYTES", {"cpu": 0, "cuda": 0})
    folder = saved(tmp_path, kind, **SMALL, head_dim=16)
    argv = ["--activation_checkpointing", checkpointing, "--micro_tokens", "512", *ADAPTERS[trained]]
    config = load_config(["--algo", "grpo", "--model", folder, *argv])
    lm = transformers.AutoModelForCausalLM.from_config(model.model_config(folder))
    adapters.begin(convert(lm, config), config)
    if trained != "all":
        freeze(lm)
    policy = shard(Policy(lm, torch.device("cpu")), config, one_rank)
    (micro,) = lay_out([Sample([5] * 8, [6] * 56)] * 8, config.micro_tokens, share=False)
    rows = make_rows(micro, policy.plan)

    def loss(hidden_TD, weight_VD, *rest):
        return hidden_TD.sum() + weight_VD.sum()

    policy(rows, loss).backward()  # makes the gradients, which are not part of this
    with Live() as live:
        policy(rows, loss).backward()
    told = estimate(folder, *argv, "--max_prompt_tokens", "8", "--max_new_tokens", "56")
    parts = ("gathered weights", "activations", "head, or backward of a layer")
    total = sum(told[name] for name in parts)
    assert 0.9 * live.most < total < (1.1 if trained == "all" else 1.2) * live.most


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
        "frozen model": 2 * P,
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


def test_3b_with_adapters_has_policy_reference_and_rollout_on_one_card_of_24_gb(tmp_path):
    """Term by term; A parameters of rank 32 beside all linears of the layers, 256 rows of 1024 tokens."""
    folder, P, wide = saved(tmp_path, **SHAPE_3B), 3_085_938_688, 11008
    A = 36 * 32 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + wide))
    argv = ["--config", "configs/models/qwen2.5-3b.yaml", "--model", folder, "--memory_gib", "24"]
    told = estimate(folder, *argv, "--lora_rank", "32", "--rollout_batch", "256", "--activation_checkpointing", "true")
    known = {
        "frozen base": 2 * P,
        "master weights, fp32": 4 * A,
        "optimizer state, fp32": 8 * A,
        "gradients, fp32": 4 * A,
        "gathered weights": 2 * A,
        "rollout replica": 2 * A,
        "frozen model": 0,
        "KV cache": 256 * 36 * 2 * 2 * 128 * 1024 * 2,
    }
    assert {name: told[name] for name in known} == pytest.approx(known)
    assert sum(told.values()) < plan.FILLED * 24 * 2**30
    sharded = estimate(folder, *argv, "--lora_rank", "32", "--lora_base", "sharded", world_size=2)
    assert sharded["frozen base"] == sharded["frozen model"] == P
    assert sharded["rollout replica"] == 2 * (P + A)


def test_sft_asks_nobody_unless_it_is_evaluated(tmp_path):
    folder = saved(tmp_path, **SMALL)
    asking = ("rollout replica", "KV cache", "drawing tokens")
    alone, examined = (estimate(folder, "--algo", "sft", "--eval_size", size) for size in ("0", "64"))
    assert not any(alone[name] for name in asking) and all(examined[name] for name in asking)
    assert alone["frozen model"] == 0 < estimate(folder)["frozen model"]


def test_what_is_sharded_offloaded_or_reduced_once_is_counted_so(tmp_path):
    folder = saved(tmp_path, **SMALL)
    one, two = estimate(folder), estimate(folder, world_size=2)
    last, last_of_two = (estimate(folder, "--grad_sync", "last", world_size=n) for n in (1, 2))
    offloaded = estimate(folder, "--cpu_offload", "true", world_size=2)
    for name in ("master weights, fp32", "optimizer state, fp32", "gradients, fp32", "frozen model"):
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


def wanted(text: str) -> list[str]:
    """The settings that a verdict names."""
    return text.partition("It would with ")[2].rstrip(".").split()


@pytest.mark.parametrize("path", sorted((CONFIGS / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_card_holds_the_models_that_its_settings_name_as_they_say(tmp_path, path):
    """Two ranks are those of one machine."""
    ranks, gib = map(int, re.fullmatch(r"(\d+)x(\d+)gb", path.stem).groups())
    claims = CLAIM.findall(path.read_text())
    assert claims
    for name, more, of_gpu, of_host in claims:
        own = CONFIGS / "models" / f"{name.lower()}.yaml"
        lengths = own if own.exists() else CONFIGS / "models/qwen2.5-3b.yaml"
        folder = saved(tmp_path / name, **SHAPES[name])
        argv = ["--config", str(lengths), str(path), "--model", folder, "--memory_gib", str(gib), *more.split()]
        config = load_config(argv if "--algo" in more else ["--algo", "grpo", *argv])
        machine = plan.Machine("", gib * 2**30, 0, ranks)
        gpu, host = plan.rooms_of(config, machine, ranks)
        assert not gpu.lacking and plan.verdict(config, machine, ranks).startswith("Fits: ")
        assert [f"{room.needed / 2**30:.1f}" for room in (gpu, host)] == [of_gpu, of_host]


def test_a_plan_for_a_card_elsewhere_is_that_of_a_gpu(monkeypatch, tmp_path):
    folder = saved(tmp_path, **SMALL)
    elsewhere = load_config(["--algo", "grpo", "--model", folder, "--memory_gib", "24"])
    assert plan.estimate_memory(elsewhere, 1) == estimate(folder)
    machine = plan.find_machine(elsewhere)
    assert "24 GiB" in machine.name and (machine.gpu, machine.host) == (24 * 2**30, 0)
    assert plan.find_machine(load_config(["--algo", "grpo"])).gpu == 0
    with pytest.raises(UserError, match="--memory_gib 24"):
        plan.find_machine(load_config(["--algo", "grpo", "--device", "cuda"]))
    with pytest.raises(UserError, match="memory_gib 24 is of a GPU"):
        load_config(["--algo", "grpo", "--device", "cpu", "--memory_gib", "24"])


def test_a_share_of_a_card_is_planned_as_a_card_of_that_size(tmp_path):
    argv = ["--algo", "grpo", "--model", saved(tmp_path, **SMALL), "--device", "cuda"]
    whole, share = load_config(argv), load_config([*argv, "--memory_gib", "0.001"])
    fast, slow = plan.settle(whole, 1, 80e9), plan.settle(share, 1, 80e9)
    assert (fast.reshard_after_forward, slow.reshard_after_forward) == (False, True)
    assert plan.settle(share, 1, 0) is share and plan.settle(whole, 1, 0.001 * 2**30) == dataclasses.replace(
        slow, memory_gib=0.0
    )


@pytest.mark.parametrize(
    "model, argv, names",
    [
        ("Qwen2.5-0.5B", (), {"micro_tokens"}),
        ("Qwen2.5-0.5B", ("--micro_tokens", "1024", "--rollout_batch", "1024"), {"rollout_batch"}),
        ("Qwen2.5-1.5B", ("--micro_tokens", "1024", "--rollout_batch", "64"), {"cpu_offload"}),
        ("Qwen2.5-3B", ("--prompts_per_step", "32"), {"activation_checkpointing", "cpu_offload"}),
    ],
)
def test_what_does_not_fit_is_told_the_fewest_settings_with_which_it_does(tmp_path, model, argv, names):
    argv = ["--algo", "grpo", "--model", saved(tmp_path, **SHAPES[model]), "--memory_gib", "24", *argv]
    tell = lambda *more: plan.verdict(load_config([*argv, *more]), plan.Machine("", 24 * 2**30, 0, 1), 1)  # noqa: E731
    text = tell()
    assert text.startswith("Does not fit: ") and " more than the 21.6 that a plan may fill of 24.0" in text
    words = wanted(text)
    assert {word[2:] for word in words[::2]} == names and tell(*words).startswith("Fits: ")
    for i in range(0, len(words), 2):
        assert tell(*words[:i], *words[i + 2 :]).startswith("Does not fit: ")


def test_what_no_setting_makes_fit_asks_for_more(tmp_path):
    config = load_config(["--algo", "grpo", "--model", saved(tmp_path, **SHAPE_3B), "--memory_gib", "8"])
    assert "use more ranks, a larger GPU or a smaller model" in plan.verdict(config, plan.Machine("", 2**33, 0, 1), 1)


def test_a_host_is_asked_for_what_is_offloaded_to_it(tmp_path):
    """Pinned blocks have a power of two bytes: of the 3B's 86 MiB 128, of its embedding's 1187 MiB 2048."""
    folder, count = saved(tmp_path, **SHAPE_3B), 3_085_938_688
    argv = ["--algo", "grpo", "--model", folder, "--memory_gib", "24"]
    moments = plan.host_moments(load_config([*argv, "--cpu_offload", "true"]), 1)
    training, layer = moments[", in training"], 3 * 128 + 2 * 16 + 2 * 2
    small = 36 * (2 * 8192 + 8192 + 2 * 1024) + 8192  # norms and biases
    known = 36 * layer * 2**20 + 2048 * 2**20 + small
    assert training["master weights, fp32, pinned"] == training["gradients, fp32, pinned"] == known
    assert training["frozen model, bf16, pinned"] == known / 2
    assert training["optimizer state, fp32"] == 8 * count
    two = plan.host_moments(load_config([*argv, "--cpu_offload", "true"]), 2)[", in training"]
    assert two["master weights, fp32, pinned"] == known / 2
    held = plan.host_moments(load_config(argv), 1)
    assert held[", in training"]["copy that a checkpoint writes"] == 12 * count
    assert held[", at the start"]["model as loaded"] == held[", at the start"]["frozen model beside it"] == 2 * count
    tight = plan.Machine("", 24 * 2**30, 64 * 2**30, 1)
    text = plan.verdict(load_config([*argv, "--cpu_offload", "true", "--activation_checkpointing", "true"]), tight, 1)
    assert "this machine's memory is 10.3 more than the 57.6 that a plan may fill of 64.0" in text


def test_on_a_cpu_all_ranks_share_the_memory_of_the_machine(tmp_path):
    config = load_config(["--algo", "grpo", "--model", saved(tmp_path, **SMALL), "--device", "cpu"])
    [room] = plan.rooms_of(config, plan.Machine("", 0, 2**33, 2), 2)
    assert room.needed == 2 * (plan.PROCESS_BYTES["cpu"] + sum(plan.estimate_memory(config, 2).values()))
    assert plan.verdict(config, plan.Machine("", 0, 2**33, 2), 2).startswith("Fits: ")
    assert plan.verdict(config, plan.Machine("", 0, 2**31, 2), 2).startswith("Does not fit: ")


@pytest.mark.parametrize(
    "line, files",
    [
        ("0::/a/b", {"memory.max": "max", "a/memory.max": "4096", "a/b/memory.max": "8192"}),
        ("0::/", {"memory.max": "4096"}),
        ("3:memory:/of/the/host", {"memory/memory.limit_in_bytes": "4096"}),
    ],
)
def test_a_control_group_and_those_above_it_bound_the_host(monkeypatch, tmp_path, line, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "cgroup").write_text(line + "\n")
    monkeypatch.setattr(plan, "CGROUPS", tmp_path)
    monkeypatch.setattr(plan, "CGROUP", tmp_path / "none")
    assert plan.host_memory() > 2**28
    monkeypatch.setattr(plan, "CGROUP", tmp_path / "cgroup")
    assert plan.host_memory() == 4096


def test_a_run_on_a_cpu_takes_the_memory_that_is_told(tmp_path):
    """24 million parameters: told 615 MB, 480 to 580 were taken, some of it room that imports had left free; beyond its
    tensors a process keeps at most so much of what it has freed."""
    tiny = CONFIGS / "models/tiny"
    folder = shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.yaml"))
    sizes = {"hidden_size": 768, "intermediate_size": 4096}
    (folder / "config.json").write_text(json.dumps(json.loads((tiny / "config.json").read_text()) | sizes))
    argv = "--algo sft --steps 1 --eval_size 0 --step_tokens 256 --micro_tokens 128 --max_prompt_tokens 64 "
    argv += "--max_new_tokens 64 --threads 1 --tensorboard false --device cpu"
    words = command("-c", PEAK, *argv.split(), "--model", folder, "--out", tmp_path)
    done = subprocess.run(words, cwd=CONFIGS.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, told = map(float, re.search(r"peak (\S+) (\S+)", done.stdout).groups())
    assert told > 0.4e9 and 0.7 * told < peak < told + dist.MALLOC[-1]
