"""Adapters: the same as peft's, beside one base, from folder to folder."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train
from bench.step import one_rank
from engine import adapters, linears, model, parts
from engine.algos.loss import NLL
from engine.asking import open_rollout
from engine.config import load_config
from engine.errors import UserError
from engine.layout import lay_out, make_rows
from engine.plan import out_of_memory_advice
from engine.policy import Policy
from engine.rollouts.sampling import Sampling
from engine.samples import Sample
from kernels import chunked
from kernels.head import Head

RANK, ALPHA = 4, 8.0
LORA = ["--lora_rank", str(RANK), "--lora_alpha", str(ALPHA)]
SHAPE = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
KINDS = {
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
}
SAMPLES = [Sample([5, 6, 7], [8, 9, 10, 11]), Sample([20, 21], [22, 23]), Sample([5, 6, 7], [30])]


def base_of(folder: Path, kind: str = "qwen2", seed: int = 0) -> str:
    """A folder with a small model of random weights."""
    torch.manual_seed(seed)
    lm = transformers.AutoModelForCausalLM.from_config(KINDS[kind]())
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    lm.save_pretrained(folder)
    model.load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world():
    with one_rank("cpu") as world:
        yield world


@pytest.fixture
def base(tmp_path) -> str:
    return base_of(tmp_path / "base")


def moved(lm, config) -> None:
    """Begins adapters whose B is no longer 0."""
    adapters.begin(lm, config)
    draw = torch.Generator().manual_seed(1)
    for linear in linears.adapted(lm).values():
        linear.lora_B.data = torch.randn(linear.lora_B.shape, generator=draw) / 8


def trained(base: str, *argv: str):
    """(model with adapters that have moved, config)"""
    config = adapters.follow(load_config(["--model", base, *LORA, *argv]))
    lm = linears.convert(adapters.load(base, 0, torch.float32), config)
    moved(lm, config)
    return lm, config


def exported(lm, config, folder: Path) -> str:
    found = linears.adapted(lm)
    factors = {name: (x.lora_A.detach(), x.lora_B.detach()) for name, x in found.items()}
    whole = adapters.Adapter(config.start, RANK, config.lora_scale, factors, adapters.fingerprint(lm))
    adapters.export(whole, config, torch.float32, model.load_tokenizer("tiny"), folder)
    return str(folder)


def logits(lm, ids_NT=None) -> torch.Tensor:
    ids_NT = torch.arange(40).reshape(2, 20) + 5 if ids_NT is None else ids_NT
    with torch.no_grad():
        return lm.eval()(ids_NT).logits


def peft_of(base: str, adapter: str, **more):
    peft = pytest.importorskip("peft", reason="peft is the oracle; requirements-test.txt has it")
    lm = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(lm, adapter, **more)


def peft_made(base: str, folder: Path, dtype=torch.float32, **options) -> str:
    """An adapter that peft begins, with a B that is not 0, and saves."""
    peft = pytest.importorskip("peft", reason="peft is the oracle; requirements-test.txt has it")
    lm = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lm = peft.get_peft_model(lm, peft.LoraConfig(**{"r": RANK, "target_modules": ["q_proj", "down_proj"]} | options))
    draw = torch.Generator().manual_seed(3)
    for name, p in lm.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=draw) / 8
        if "lora_" in name:
            p.data = p.data.to(dtype)
    lm.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_a_step_are_pefts(tmp_path, kind, checkpointing):
    base = base_of(tmp_path / "base", kind)
    lm, config = trained(base)
    oracle = peft_of(base, exported(lm, config, tmp_path / "adapter"), is_trainable=True)
    linears.freeze(lm)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, torch.device("cpu")).train()
    total = sum(len(s.answer) for s in SAMPLES)
    [micro] = lay_out([dataclasses.replace(s, weight=1 / total) for s in SAMPLES], 64, True)
    loss, _ = policy(make_rows(micro, policy.plan), NLL(config, chunked))
    loss.backward()
    truth = sum(nll_of(oracle, s) for s in SAMPLES) / total
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    assert len(theirs) == 2 * len(linears.adapted(lm)) == 2 * 14
    for name, linear in linears.adapted(lm).items():
        for factor in ("lora_A", "lora_B"):
            wanted = theirs[f"base_model.model.{name}.{factor}.default.weight"]
            assert wanted.abs().max() > 1e-4
            torch.testing.assert_close(getattr(linear, factor).grad, wanted, rtol=1e-5, atol=1e-6)
    assert not [name for name, p in lm.named_parameters() if p.grad is not None and "lora_" not in name]


def nll_of(lm, sample: Sample) -> torch.Tensor:
    ids_T = torch.tensor([sample.prompt + sample.answer])
    labels_T = torch.tensor([[-100] * len(sample.prompt) + sample.answer])
    return lm(ids_T, labels=labels_T).loss * len(sample.answer)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_pefts_also_where_layers_run_again(tmp_path, base, checkpointing):
    lm, config = trained(base, "--algo", "sft", "--lora_dropout", "0.5")
    oracle = peft_of(base, exported(lm, config, tmp_path / "adapter"), is_trainable=True)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    ids_NT, found = torch.arange(20)[None] + 5, []
    for some in (linears.freeze(lm), oracle):
        torch.manual_seed(0)
        some.train()(ids_NT, labels=ids_NT).loss.backward()
        found.append({n.replace(".default.weight", ""): p.grad for n, p in some.named_parameters() if p.requires_grad})
    assert len(found[0]) == 2 * 14
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][f"base_model.model.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_an_export_is_the_same_model_in_peft_and_here(tmp_path, kind):
    base = base_of(tmp_path / "base", kind)
    lm, config = trained(base)
    folder = exported(lm, config, tmp_path / "adapter")
    truth = logits(lm)
    torch.testing.assert_close(logits(peft_of(base, folder)), truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(linears.convert(adapters.load(folder, 0, torch.float32), config)), truth)
    assert (truth - logits(model.load_model(base, 0, torch.float32))).abs().max() > 0.1, "the adapter does something"
    values = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert values["target_modules"] == sorted("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())


@pytest.mark.skipif(not os.environ.get("RL_REAL_MODEL"), reason="RL_REAL_MODEL names no Hugging Face folder")
def test_an_adapter_of_real_weights_is_the_same_in_peft(tmp_path):
    base = os.environ["RL_REAL_MODEL"]
    lm, config = trained(base)
    folder, ours = exported(lm, config, tmp_path / "adapter"), logits(lm)
    others = peft_of(base, folder), model.load_model(base, 0, torch.float32)
    error, effect = ((logits(other) - ours).abs().max() for other in others)
    assert error < 1e-3 * effect and effect > 1


def test_names_are_whole_where_their_ends_would_name_more(tmp_path, base):
    lm, config = trained(base, "--lora_targets", "layers.1.*_proj", "layers.0.self_attn.q_proj")
    folder = exported(lm, config, tmp_path / "adapter")
    assert len(json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]) == 8
    torch.testing.assert_close(logits(peft_of(base, folder)), logits(lm), rtol=1e-5, atol=1e-5)


def test_a_merged_export_is_a_plain_model(tmp_path, base):
    lm, config = trained(base, "--export", "merged")
    folder = exported(lm, config, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(lm), rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "merged").glob("adapter*")) and plain.generation_config.eos_token_id is not None


def test_merging_rounds_once(base):
    lm, _ = trained(base)
    wide = {name: x.weight + x.scale * x.lora_B @ x.lora_A for name, x in linears.adapted(lm).items()}
    merged = adapters.merge(model.cast_parameters(lm, torch.bfloat16))
    for name, weight in wide.items():
        assert type(merged.get_submodule(name)) is torch.nn.Linear
        error = (merged.get_submodule(name).weight.float() - weight).abs()
        assert (error <= 2**-7 * weight.abs() + 2**-8 * weight.abs().max()).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"dtype": torch.bfloat16},
        {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
        {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    ],
    ids=str,
)
def test_an_adapter_of_pefts_is_read_as_peft_reads_it(tmp_path, base, options):
    folder = peft_made(base, tmp_path / "theirs", **options)
    ours = adapters.load(folder, 0, torch.float32)
    torch.testing.assert_close(logits(ours), logits(peft_of(base, folder)), rtol=1e-5, atol=1e-5)


def test_the_head_of_a_frozen_base_takes_two_products(base, monkeypatch):
    counts = {"_make_logits": 0, "_dhidden": 0, "_add_dweight": 0}
    for name in counts:
        real = getattr(Head, name)

        def call(self, *args, name=name, real=real):
            counts[name] += 1
            return real(self, *args)

        monkeypatch.setattr(Head, name, call)
    for freezes, products in ((True, [1, 1, 0]), (False, [1, 1, 1])):
        counts.update(dict.fromkeys(counts, 0))
        lm, config = trained(base)
        policy = Policy(linears.freeze(lm) if freezes else lm, torch.device("cpu"))
        [micro] = lay_out([dataclasses.replace(s, weight=0.1) for s in SAMPLES], 64, True)
        loss, _ = policy(make_rows(micro, policy.plan), NLL(config, chunked))
        loss.backward()
        assert list(counts.values()) == products


def made_parts(world, base: str, *argv: str) -> parts.Parts:
    config = adapters.follow(load_config(["--algo", "grpo", "--model", base, *argv]))
    return parts.build(config, world, parts.load(config, world))


def storages(lm, wanted) -> set[int]:
    return {p.untyped_storage().data_ptr() for name, p in lm.named_parameters() if wanted(name)}


def test_policy_reference_and_rollout_have_one_base_and_adapters_of_their_own(world, base):
    made = made_parts(world, base, *LORA, "--beta", "0.1")
    is_base = lambda name: "lora_" not in name  # noqa: E731
    one = storages(made.policy.lm, is_base)
    assert storages(made.frozen.lm, is_base) == one == storages(made.replica.lm, is_base)
    assert not linears.adapted(made.frozen.lm), "what the run started from has no adapter"
    factors = [p.to_local() for p in made.policy.parameters() if p.requires_grad]
    assert not storages(made.replica.lm, lambda name: "lora_" in name) & {
        p.untyped_storage().data_ptr() for p in factors
    }
    trained = {name for name, p in made.policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in made.policy.named_parameters() if "lora_" in name} and len(trained) == 28
    assert sum(len(group["params"]) for group in made.optimizer.param_groups) == 28


def test_a_base_of_another_dtype_is_cast_once_for_all_of_them(world, base, monkeypatch):
    for module in ("model", "policy", "replica"):
        monkeypatch.setattr(f"engine.{module}.compute_dtype", lambda device: torch.bfloat16)
    config = load_config(["--algo", "grpo", "--model", base, *LORA, "--beta", "0.1"])
    made = parts.build(config, world, model.load_model(base, 0, torch.float32))
    is_base = lambda name: "lora_" not in name  # noqa: E731
    one = storages(made.policy.lm, is_base)
    assert storages(made.frozen.lm, is_base) == one == storages(made.replica.lm, is_base)
    assert one == storages(made.form, is_base), "nothing keeps the weights as they were given"
    assert {p.dtype for p in made.replica.lm.parameters()} == {torch.bfloat16}


def test_a_refresh_copies_the_adapters_and_leaves_the_base(world, base):
    made = made_parts(world, base, *LORA, "--beta", "0")
    made.publish(0)
    written = {name: p._version for name, p in made.replica.lm.named_parameters()}
    for p in made.policy.parameters():
        if p.requires_grad:
            p.to_local().data += 1
    made.publish(1)
    ours = dict(made.policy.lm.named_parameters())
    for name, p in made.replica.lm.named_parameters():
        assert p._version == written[name] + ("lora_" in name), name
        assert torch.equal(p, ours[name].full_tensor() if "lora_" in name else ours[name])


def test_the_reference_is_the_adapter_that_the_run_was_given(world, tmp_path, base):
    lm, config = trained(base)
    folder = exported(lm, config, tmp_path / "adapter")
    made = made_parts(world, folder, "--beta", "0.1")
    assert made.config.lora_rank == RANK and made.config.lora_scale == ALPHA / RANK
    for p in made.policy.parameters():
        if p.requires_grad:
            p.to_local().data.mul_(2)
    assert not any(p.requires_grad for p in made.frozen.parameters())
    given, kept = linears.adapted(lm), linears.adapted(made.frozen.lm)
    assert given.keys() == kept.keys() and len(given) == 14
    for name, linear in given.items():
        assert torch.equal(kept[name].lora_A, linear.lora_A) and torch.equal(kept[name].lora_B, linear.lora_B)
        assert kept[name].scale == linear.scale
    one = storages(made.policy.lm, lambda name: "lora_" not in name)
    assert storages(made.frozen.lm, lambda name: "lora_" not in name) == one


def test_a_sharded_base_is_held_by_each_of_them(world, base):
    made = made_parts(world, base, *LORA, "--beta", "0.1", "--lora_base", "sharded")
    made.publish(0)
    ours = dict(made.policy.lm.named_parameters())
    assert all(torch.equal(p, ours[name].full_tensor()) for name, p in made.replica.lm.named_parameters())
    assert not any(p.requires_grad for name, p in ours.items() if "lora_" not in name)


def test_a_rollout_of_an_adapter_is_the_models(tmp_path, base):
    lm, config = trained(base)
    config = load_config(["--model", exported(lm, config, tmp_path / "adapter"), "--max_new_tokens", "12"])
    tokenizer = model.load_tokenizer(config.model)
    [[answer]] = open_rollout(tokenizer, config, torch.device("cpu"))(
        [[5, 6, 7]], num_samples=1, sampling=Sampling(12), seed=0
    )
    truth_TV = logits(lm, torch.tensor([[5, 6, 7, *answer.ids]]))[0].log_softmax(-1)
    wanted = [truth_TV[2 + t, id].item() for t, id in enumerate(answer.ids)]
    assert answer.logp == pytest.approx(wanted, abs=1e-4) and len(answer.ids) > 1


def broken(base: str, folder: Path, tensors=None, **values) -> str:
    """An adapter of ours in which something is not as it should be."""
    lm, config = trained(base)
    exported(lm, config, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if tensors:
        save_file(tensors(load_file(folder / adapters.WEIGHTS)), folder / adapters.WEIGHTS)
    return str(folder)


def renamed(tensors: dict, part: str, other: str) -> dict:
    return {name.replace(part, other): x for name, x in tensors.items()}


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD, ONES = "base_model.model.lm_head.lora_", torch.ones(512, RANK)
BROKEN = {
    "dora": (dict(use_dora=True), "use_dora"),
    "a rank of its own": (dict(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "whole modules": (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (dict(bias="lora_only"), "bias"),
    "what is not known yet": (dict(use_tomorrows=True), "use_tomorrows"),
    "pissa": (dict(init_lora_weights="pissa_niter_16"), "init_lora_weights pissa_niter_16"),
    "another kind": (dict(peft_type="IA3"), "kind IA3"),
    "no rank": (dict(r=0), "r 0"),
    "another rank": (dict(r=8), "not of rank 8"),
    "half a rank": (dict(r=4.5), "r 4.5"),
    "another revision of its base": (dict(revision="v2"), "revision"),
    "no base": (dict(base_model_name_or_path=None), "names no base_model_name_or_path"),
    "an empty base": (dict(base_model_name_or_path=""), "names no base_model_name_or_path"),
    "a base that is gone": (dict(base_model_name_or_path="/nowhere/base"), "/nowhere/base"),
    "fp8": (dict(tensors=lambda x: x | {Q: x[Q].to(torch.float8_e4m3fn)}), "fp32, fp16 or bf16"),
    "fp64": (dict(tensors=lambda x: x | {Q: x[Q].double()}), "F64"),
    "names in memory": (dict(tensors=lambda x: renamed(x, ".weight", ".default.weight")), "none, but"),
    "not finite": (dict(tensors=lambda x: x | {Q: x[Q] * float("nan")}), "q_proj that are not finite"),
    "half a pair": (dict(tensors=lambda x: {k: v for k, v in x.items() if k != Q}), "missing"),
    "a wider base": (dict(tensors=lambda x: x | {Q: torch.zeros(RANK, 64)}), "belongs to another base"),
    "the head": (dict(tensors=lambda x: x | {HEAD + "A.weight": x[Q] + 0, HEAD + "B.weight": ONES}), "lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_adapter_that_would_be_computed_wrongly_is_refused_by_name(tmp_path, base, name):
    values, words = BROKEN[name]
    folder = broken(base, tmp_path / "adapter", **values)
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as refused:
        adapters.load(folder, 0, torch.float32)
    assert folder in str(refused.value)


@pytest.mark.parametrize("wrapped", ["base_model.model._orig_mod.model.", "module.base_model.model.model."])
def test_an_adapter_of_a_wrapped_model_is_the_same(tmp_path, base, wrapped):
    broken(base, tmp_path / "wrapped", tensors=lambda x: renamed(x, "base_model.model.model.", wrapped))
    lm, _ = trained(base)
    assert torch.equal(logits(adapters.load(str(tmp_path / "wrapped"), 0, torch.float32)), logits(lm))


def test_an_adapter_without_its_tokenizer_s_words_is_refused(tmp_path, base):
    folder = broken(base, tmp_path / "adapter")
    (tmp_path / "adapter/tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json"):
        model.load_tokenizer(folder)


def test_a_quantised_base_is_refused_with_the_place_where_it_is_named(tmp_path, base):
    folder = broken(base, tmp_path / "adapter")
    path = tmp_path / "base/config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(UserError, match=f"of '{base}' are quantised .*{folder}/adapter_config.json"):
        model.model_config(folder)


@pytest.mark.parametrize("asks_peft", [True, False])
def test_an_adapter_of_a_hub_is_refused_by_that_name(monkeypatch, base, asks_peft):
    """As transformers does with its id: it loads base and adapter with peft, or misses the config."""

    def fail(*_, **__):
        raise OSError("no config.json")

    if asks_peft:
        lm = model.load_model(base, 0, torch.float32)
        lm._hf_peft_config_loaded = True
        monkeypatch.setattr(model, "model_config", lambda _: lm.config)
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (lm, {}))
    else:
        monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", fail)
    monkeypatch.setattr(transformers.utils, "find_adapter_config_file", lambda name: f"/cache/{name}")
    with pytest.raises(UserError, match="'owner/lora' is an adapter on a hub, .*hf download owner/lora"):
        model.load_model("owner/lora", 0, torch.float32)


def test_a_run_that_makes_first_weights_on_an_adapter_trains_that(monkeypatch, tmp_path, base, world):
    made = []
    monkeypatch.setattr(train, "make_first", lambda config, world: made.append(config))
    monkeypatch.setattr(train, "load_inputs", lambda config: None)
    monkeypatch.setattr(train.dist, "start", lambda *_: world)
    argv = ["--model", broken(base, tmp_path / "adapter"), "--warm_start", "sft", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    assert train.main() == 0
    assert [(first.algo, first.lora_rank, first.lora_alpha) for first in made] == [("sft", RANK, ALPHA)]


def test_an_adapter_of_other_weights_is_refused(tmp_path, base):
    lm, config = trained(base)
    folder = exported(lm, config, tmp_path / "adapter")
    base_of(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match="trained on other weights"):
        adapters.load(folder, 0, torch.float32)


def test_a_fingerprint_is_the_same_in_fp32_and_bf16_and_beside_adapters(base):
    plain = adapters.fingerprint(model.load_model(base, 0, torch.bfloat16))
    lm = model.cast_parameters(model.load_model(base, 0, torch.bfloat16), torch.float32)
    assert adapters.fingerprint(lm) == plain
    adapters.begin(lm, load_config(LORA))
    assert adapters.fingerprint(lm) == plain
    lm.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert adapters.fingerprint(lm) != plain


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora_rank", "0"], "lora_rank must be above 0"),
        (["--lora_rank", "33"], "above the width of model.layers.0.self_attn.q_proj, 32"),
        (["--lora_rank", "4", "--lora_targets", "q_prj"], "Did you mean 'q_proj'"),
        (["--lora_rank", "4", "--lora_targets", "q_proj", "lm_head"], "names lm_head"),
        (["--lora_rank", "4", "--lora_targets", "q_proj,v_proj"], "must be written apart: q_proj v_proj"),
        (["--lora_rank", "4", "--lora_targets", "embed_tokens"], "names model.embed_tokens"),
        (["--lora_alpha", "4"], "set lora_rank"),
        (["--lora_targets", "q_proj"], "set lora_rank too, as 16, or pass --lora_targets=."),
        (["--lora_base", "sharded"], "or pass --lora_base=replicated"),
        (["--export", "merged"], "or pass --export=adapter"),
        (["--lora_rank", "4", "--lora_targets", "all-linear"], "leave it out"),
        (["--lora_rank", "4", "--lora_dropout", "0.1"], "lora_dropout is for sft"),
        (["--lora_rank", "4", "--cpu_offload", "true"], "lora_base sharded"),
        (["--lora_r", "4"], "'lora_rank'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_model_is_loaded(base, argv, words):
    with pytest.raises(UserError, match=words):
        config = adapters.follow(load_config(["--algo", "grpo", "--model", base, *argv]))
        adapters.targets(model.hollow_model(base), config)


def test_out_of_memory_beside_a_shared_base_nothing_is_advised_that_is_refused():
    config = load_config([*LORA, "--activation_checkpointing", "true", "--micro_tokens", "1"])
    assert "lora_base sharded" in out_of_memory_advice(config, "start", 1)
    assert "cpu_offload" not in out_of_memory_advice(config, "start", 1) + out_of_memory_advice(config, "update", 1)
    sharded = dataclasses.replace(config, lora_base="sharded")
    assert "set cpu_offload to true" in out_of_memory_advice(sharded, "update", 1)


def test_the_folder_of_a_run_names_its_adapter(tmp_path, base):
    folder = broken(base, tmp_path / "run/export")
    with pytest.raises(UserError, match=f"the run's model is in {folder}"):
        model.locate(str(tmp_path / "run"))


def test_a_run_goes_on_with_the_rank_of_its_adapter_and_no_other(tmp_path, base):
    lm, config = trained(base)
    folder = exported(lm, config, tmp_path / "adapter")
    given = adapters.follow(load_config(["--model", folder]))
    assert (given.lora_rank, given.lora_alpha) == (RANK, ALPHA)
    assert adapters.follow(load_config(["--init_from", folder])).lora_rank == RANK
    for argv in (["--lora_rank", "8"], ["--lora_alpha", "4"]):
        with pytest.raises(UserError, match="goes on with has"):
            adapters.follow(load_config(["--model", folder, *argv]))
    with pytest.raises(UserError, match="not those of the adapter"):
        adapters.targets(lm, dataclasses.replace(given, lora_targets=("q_proj",)))


def test_what_a_file_says_of_adapters_is_taken_back_with_the_words_of_the_refusal(tmp_path):
    (tmp_path / "lora.yaml").write_text("lora_rank: 8\nlora_alpha: 16\nlora_targets: [q_proj, v_proj]\n")
    argv = ["--config", str(tmp_path / "lora.yaml"), "--lora_rank", "none"]
    for name in ("lora_alpha", "lora_targets"):
        with pytest.raises(UserError, match=f"{name} is of adapters, .*--{name}=.*\\.$") as refused:
            adapters.follow(load_config(argv))
        argv.append(str(refused.value).split()[-1].removesuffix("."))
    assert adapters.follow(load_config(argv)).lora_targets == ()


def test_random_weights_have_no_adapter_that_could_be_exported():
    with pytest.raises(UserError, match="--export merged"):
        adapters.follow(load_config(["--algo", "sft", "--model", "tiny", "--lora_rank", "4"]))
    adapters.follow(load_config(["--algo", "sft", "--model", "tiny", "--lora_rank", "4", "--export", "merged"]))
    adapters.follow(load_config(["--algo", "grpo", "--model", "tiny", "--lora_rank", "4"]))  # it is warm-started
    adapters.follow(load_config(["--algo", "sft", "--lora_rank", "4", "--profile_steps", "1:2"]))  # exports nothing


def test_another_kind_of_export_leaves_no_file_of_the_one_before(tmp_path, base):
    lm, config = trained(base)
    merged = dataclasses.replace(config, export="merged")
    folder = tmp_path / "export"
    exported(lm, config, folder)
    (folder / "mine.txt").write_text("kept")
    exported(lm, merged, folder)
    assert not list(folder.glob("adapter*")) and (folder / "model.safetensors").exists()
    exported(lm, config, folder)
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    assert (folder / "mine.txt").read_text() == "kept" and model.adapter_config(str(folder))
