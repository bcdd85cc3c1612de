"""Models: what is refused, tokenizers and templates, what a policy is made of, dtypes."""

import copy
import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file

import engine.policy
import engine.replica
from engine import model
from engine.algos.loss import LogProbs
from engine.chat import encode_text
from engine.config import CONFIGS, Config, load_config
from engine.data import load_task
from engine.errors import UserError
from engine.inputs import check_chats
from engine.layout import make_rows
from engine.linears import Linear, convert
from engine.policy import Policy, learning_rate, remove_dropout
from engine.replica import hollow, make_replica
from engine.samples import Sample
from kernels import eager
from tests.test_arithmetic import PATTERN

WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "qwen2 tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 untied": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "gemma3_text": (transformers.Gemma3TextConfig, {"head_dim": 16, **WINDOWS}),
    "gemma3_text, heads of 256": (transformers.Gemma3TextConfig, {"head_dim": 256, **WINDOWS}),
    "qwen2 windows": (transformers.Qwen2Config, {"use_sliding_window": True, **WINDOWS}),
}


def plain(family: str, vocabulary: int = 50):
    kind, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **extra)  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def small(family: str, vocabulary: int = 50):
    return convert(plain(family, vocabulary), Config())


CPU = torch.device("cpu")


def score(policy: Policy, samples) -> torch.Tensor:
    """[M], at temperature 1."""
    rows = make_rows([[s] for s in samples], policy.plan)
    return policy(rows, LogProbs(load_config(["--algo", "grpo", "--model", "none"]), eager))


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_stay_on_the_device_and_no_layer_gets_a_mask(family, monkeypatch):
    def looks(*args):
        raise AssertionError("transformers looks at the positions, for which a GPU would be waited for")

    masks, attend = [], engine.policy.attend
    spy = lambda module, q, k, v, mask, **kwargs: masks.append(mask) or attend(module, q, k, v, mask, **kwargs)  # noqa: E731
    monkeypatch.setattr(engine.policy, "attend", spy)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", looks)
    assert score(Policy(small(family), CPU), [Sample([3, 4], [5, 6]), Sample([7], [8])]).isfinite().all()
    assert masks == [None] * 2


def test_the_tiny_model_is_about_a_million_parameters_and_depends_on_the_seed_alone():
    a, b, c = (model.load_model("tiny", seed, torch.float32) for seed in (0, 0, 1))
    assert [p.shape for p in model.hollow_model("tiny").parameters()] == [p.shape for p in a.parameters()]
    assert 0.5e6 < sum(p.numel() for p in a.parameters()) < 1.5e6
    assert torch.equal(a.lm_head.weight, b.lm_head.weight) and not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.config.model_type == "qwen2" and a.lm_head.weight is a.model.embed_tokens.weight


def test_the_tiny_tokenizer_survives_a_round_trip_through_autotokenizer(tmp_path):
    tokenizer = model.load_tokenizer("tiny")
    tokenizer.save_pretrained(tmp_path)
    model.model_config("tiny").save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for item in load_task("arithmetic", "train")[:200]:
        ids = model.encode_prompt(tokenizer, item.prompt)
        assert model.encode_prompt(loaded, item.prompt) == ids and len(ids) < 32
        trace = loaded.encode(item.trace, add_special_tokens=False)
        assert loaded.decode(trace, skip_special_tokens=True) == item.trace and len(trace) < 26
    assert loaded.decode(loaded.encode("Καλημέρα 7/8")) == "Καλημέρα 7/8"


def test_every_word_of_the_embedded_task_is_one_token():
    tokenizer = model.load_tokenizer("tiny")
    items = load_task("arithmetic", "train", limit=4000)
    words = {w for item in items for text in (item.prompt[0]["content"], item.trace) for w in re.findall(PATTERN, text)}
    assert len(words) > 70 and {word for word in words if len(tokenizer.encode(word)) != 1} == {", "}, "Qwen2 parts it"
    assert {"<think>", " has", "7"} < words and model.model_config("tiny").vocab_size == len(tokenizer)


def test_every_id_that_ends_a_turn_is_known():
    tokenizer = model.load_tokenizer("tiny")
    lm = model.load_model("tiny", 0, torch.float32)
    assert model.turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    lm.generation_config.eos_token_id = [7, 9]
    assert model.eos_ids(lm, tokenizer) == sorted([7, 9, tokenizer.eos_token_id])


def test_enable_thinking_reaches_the_chat_template():
    tokenizer = model.load_tokenizer("tiny")
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    messages = [{"role": "user", "content": "7"}]
    plain, without = (model.encode_prompt(tokenizer, messages, flag) for flag in (None, False))
    assert without == plain + tokenizer.encode("<think></think>")


def test_other_families_and_folders_without_a_model_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2.*qwen2, qwen3, llama, gemma3_text.$"):
        model.model_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(UserError, match="of the family gemma3; .*; of Gemma 3 the text models alone"):
        model.model_config(str(tmp_path))
    for name in ("/nowhere", "nowhere", "./a/b", "~/a", "a/b/c", "engine/b"):
        with pytest.raises(UserError, match=f"There is no model folder {name}; "):
            model.model_config(name)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"No model can be loaded from '{tmp_path}'"):
        model.model_config(str(tmp_path))


UNSUPPORTED = {
    "final_logit_softcapping": (30.0, "final_logit_softcapping 30.0"),
    "attn_logit_softcapping": (50.0, "attn_logit_softcapping 50.0"),
    "use_bidirectional_attention": (True, r"bidirectional attention \(use_bidirectional_attention\)"),
    "sliding_window": (0, "sliding-window layers with a sliding_window of 0"),
    "layer_types": (["chunked_attention"] * 2, "layers of the type chunked_attention"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_would_be_computed_as_another_model_is_refused_by_name(tmp_path, name):
    value, says = UNSUPPORTED[name]
    plain("gemma3_text").config.save_pretrained(tmp_path)
    assert not model.unsupported(model.model_config(str(tmp_path)))
    given = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | {name: value}))
    with pytest.raises(UserError, match=f"{tmp_path}' has {says}, which is not supported"):
        model.model_config(str(tmp_path))


def test_the_folder_of_a_run_names_its_export(tmp_path):
    for load in (model.model_config, model.load_tokenizer, model.check_given):
        with pytest.raises(UserError, match=f"^{tmp_path} is no model folder, for it has no config.json.$"):
            load(str(tmp_path))
    weightless(tmp_path / "export")
    with pytest.raises(UserError, match=f"no config.json; the run's model is in {tmp_path}/export.$"):
        model.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("template", [None, "", {"tool_use": "x"}])
def test_a_chat_template_is_asked_for_by_what_renders_a_chat_alone(tmp_path, template):
    model.export_model(model.load_model("tiny", 0, torch.float32), model.load_tokenizer("tiny"), tmp_path / "m")
    tokenizer = model.load_tokenizer(str(tmp_path / "m"))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").unlink(missing_ok=True)
    config = load_config(["--model", str(tmp_path / "m")])
    lm, tokenizer = model.load_model(config.start, 0, torch.float32), model.load_tokenizer(config.start)
    with pytest.raises(UserError, match=rf"^The tokenizer of '{tmp_path}/m' has no chat template; use an instruct"):
        check_chats(load_task("arithmetic", "train", limit=1), tokenizer, config)
    assert model.turn_end(tokenizer) == tokenizer.eos_token_id and model.eos_ids(lm, tokenizer) == [398]
    assert encode_text(tokenizer, "7<|end|>") == tokenizer.encode("7<") + tokenizer.encode("|end|>")
    model.export_model(lm, tokenizer, tmp_path / "again")


def weightless(path, **files):
    """The folder of the embedded model without its settings, and other files: its name."""
    shutil.copytree(CONFIGS / "models" / "tiny", path, ignore=shutil.ignore_patterns("*.yaml"))
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return str(path)


def test_a_folder_without_weights_has_random_ones_which_is_said_and_only_learns(tmp_path, capsys, monkeypatch):
    beside = dict.fromkeys(("README.md", "LICENSE", ".gitattributes"), "") | {"generation_config.json": "{}"}
    path = weightless(tmp_path / "m", **beside)
    ours, given = model.load_model("tiny", 5, torch.float32), model.load_model(path, 5, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), given.parameters(), strict=True))
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{m} has no weights in its folder: they are drawn at random, from seed 5." for m in ("tiny", path)]
    monkeypatch.setenv("RANK", "1")
    model.load_model(path, 5, torch.float32)
    assert not capsys.readouterr().err
    for name in ("tiny", path):
        with pytest.raises(UserError, match=f"{name} has random weights.*pass --model DIR"):
            model.check_given(name)
    model.check_given(folder_of(tmp_path / "trained", ours))


INDEX = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
LEFT_OUT = {
    "an index whose shards are absent": {"model.safetensors.index.json": INDEX},
    "a git-lfs pointer": {"model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"},
    "a download that was broken off": {".cache/huggingface/download/model.safetensors.1.incomplete": ""},
    "a download of the config alone": {".cache/huggingface/download/config.json.metadata": ""},
    "weights of another kind": {"original/consolidated.00.pth": ""},
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_weights_that_were_left_out_are_not_taken_for_random_ones(name, tmp_path):
    path = weightless(tmp_path / "m", **LEFT_OUT[name])
    model.check_given(path)
    with pytest.raises(UserError, match=f"^No model can be loaded from '{path}'"):
        model.load_model(path, 0, torch.float32)


def folder_of(path, lm, weights=None, **config):
    """`lm` with the tiny tokenizer in a folder, its weights and the entries of its config.json replaced."""
    model.export_model(lm, model.load_tokenizer("tiny"), path)
    if weights is not None:
        save_file({k: w.clone() for k, w in weights.items()}, path / "model.safetensors", {"format": "pt"})
    given = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(given | config))
    return str(path)


def tiny_llama(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = len(model.load_tokenizer("tiny"))
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=vocabulary, num_key_value_heads=1, **sizes, **config)
    )


WRAPPED = {
    "torch.compile": lambda k: f"_orig_mod.{k}",
    "DDP": lambda k: f"module.{k}",
    "both": lambda k: f"module._orig_mod.{k}",
    "FSDP, checkpointing and compiled layers": lambda k: f"_fsdp_wrapped_module.{k}".replace(
        ".layers.0.", ".layers.0._checkpoint_wrapped_module._orig_mod."
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_that_wrappers_have_named_are_found_and_that_is_said(name, tmp_path, capsys):
    weights = tiny_llama().state_dict()
    path = folder_of(tmp_path / "m", tiny_llama(), {WRAPPED[name](k): w for k, w in weights.items()})
    found = model.load_model(path, 0, torch.float32).state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[k], w) for k, w in weights.items())
    assert "Took the names of wrappers" in capsys.readouterr().err
    model.load_model(folder_of(tmp_path / "plain", tiny_llama()), 0, torch.float32)
    assert not capsys.readouterr().err


BIAS = "model.layers.1.self_attn.q_proj.bias"
MISFITS = {
    "no head": (lambda w: drop(w, "lm_head"), {}, "lm_head.weight is missing"),
    "no layer": (lambda w: drop(w, "layers.1."), {}, "model.layers.1.input_layernorm.weight and 8 more are missing"),
    "a bias": (lambda w: w | {BIAS: torch.zeros(16)}, {}, f"{BIAS} is left over"),
    "fewer layers": (dict, {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight and 8 more are left over"),
    "another shape": (
        lambda w: w | {"model.norm.weight": torch.ones(8)},
        {},
        r"model.norm.weight is \[8\], not \[16\]",
    ),
    "other names": (lambda w: {f"net.{k}": x for k, x in w.items()}, {}, "missing; net.lm_head.weight and 20 more"),
    "half wrapped": (lambda w: {f"module.{k}": x for k, x in drop(w, "norm.weight").items()}, {}, "missing; module"),
    "codes": (lambda w: w | {"model.norm.weight": torch.ones(16, dtype=torch.int8)}, {}, "norm.weight is of integers"),
    "a head beside a tie": (dict, {"tie_word_embeddings": True}, "has a head of its own"),
    "quantised": (dict, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "are quantised .gptq."),
}


def drop(weights, part):
    return {k: w for k, w in weights.items() if part not in k}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit_are_refused_by_name(name, tmp_path):
    change, config, reason = MISFITS[name]
    path = folder_of(tmp_path / "m", tiny_llama(), change(tiny_llama().state_dict()), **config)
    with pytest.raises(UserError, match=reason):
        model.load_model(path, 0, torch.float32)


def test_two_sets_of_weights_in_one_file_are_refused(tmp_path):
    weights = tiny_llama().state_dict()
    layer = {f"_orig_mod.{k}": w + 1 for k, w in weights.items() if ".layers.1." in k}
    for name, other in (("all", {f"module.{k}": w + 1 for k, w in weights.items()}), ("a layer", layer)):
        with pytest.raises(UserError, match="more are left over"):
            model.load_model(folder_of(tmp_path / name, tiny_llama(), weights | other), 0, torch.float32)


def test_weights_of_a_model_without_a_head_of_its_own_fit_with_or_without_the_copy(tmp_path):
    lm = tiny_llama(tie_word_embeddings=True)
    for name, weights in (("without", None), ("with", lm.state_dict())):
        found = model.load_model(folder_of(tmp_path / name, lm, weights), 0, torch.float32)
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert torch.equal(found.lm_head.weight, lm.lm_head.weight)


def test_an_adapter_beside_weights_and_a_file_cut_short_are_named(tmp_path):
    path = folder_of(tmp_path / "m", tiny_llama())
    weights = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UserError, match="No model can be loaded"):
        model.load_model(path, 0, torch.float32)
    for adapter in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "m" / adapter).write_text("{}")
        for load in (model.load_tokenizer, model.model_config):
            with pytest.raises(UserError, match=f"{adapter}.*beside a model"):
                load(path)
        (tmp_path / "m" / adapter).unlink()


def test_an_export_ends_answers_where_a_rollout_does(tmp_path):
    tokenizer, lm = model.load_tokenizer("tiny"), tiny_llama(eos_token_id=7)
    tokenizer.eos_token = "<|user|>"
    model.export_model(lm, tokenizer, tmp_path / "m")
    ends = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").generation_config
    assert ends.eos_token_id == sorted([7, *tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])])
    assert ends.eos_token_id == model.eos_ids(lm, tokenizer) and ends.pad_token_id == tokenizer.pad_token_id
    assert lm.config.eos_token_id == 7


PUBLISHED = {"temperature": 0.6, "do_sample": False, "early_stopping": True, "output_scores": True}
PUBLISHED |= {"length_penalty": 0.5, "min_new_tokens": 64, "max_length": 20, "stop_strings": ["x"], "eos_token_id": 2.0}


def test_an_export_keeps_no_other_habits_of_the_model_it_began_as(tmp_path):
    path = folder_of(tmp_path / "m", tiny_llama())
    published = json.loads((tmp_path / "m" / "generation_config.json").read_text()) | PUBLISHED
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(published))
    tokenizer = model.load_tokenizer(path)
    model.export_model(model.load_model(path, 0, torch.float32), tokenizer, tmp_path / "export")
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "export")
    assert saved.eos_token_id == [2, model.turn_end(tokenizer)]
    assert not {*PUBLISHED, "do_sample"} & saved.to_diff_dict().keys() - {"eos_token_id"}


def test_a_tokenizer_that_the_model_has_no_rows_for_is_refused(tmp_path):
    tokenizer, lm = model.load_tokenizer("tiny"), tiny_llama()
    rows = len(tokenizer)
    model.check_vocabulary(tokenizer, rows, "m")
    for fewer in (tokenizer.vocab_size - 1, model.turn_end(tokenizer)):
        with pytest.raises(UserError, match=f"'m' has .* tokens, the model {fewer}"):
            model.check_vocabulary(tokenizer, fewer, "m")
    tokenizer.add_special_tokens({"eos_token": "<|new|>", "pad_token": "<|pad2|>"})
    assert model.eos_ids(lm, tokenizer) == [2, model.turn_end(tokenizer)], "2: Llama's own; the new one has no row"
    assert model.pad_id(lm, tokenizer) == model.turn_end(tokenizer)


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_without_dropout_scores_itself_alike_while_it_learns(family, checkpointing):
    lm = small(family)
    for layer in lm.model.layers:
        layer.self_attn.attention_dropout = 0.3 if layer is lm.model.layers[0] else 1  # as config.json may have it
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.3))
    samples = [Sample([3, 4, 5], [6, 7]), Sample([8], [9, 10, 11])]
    with torch.no_grad():
        truth_M = score(Policy(copy.deepcopy(lm), CPU).eval(), samples)
        learning_M = score(Policy(copy.deepcopy(lm), CPU).train(), samples)
        assert not torch.allclose(learning_M, truth_M, atol=1e-3), "there is dropout to remove"
    if checkpointing:
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable  # old name
        enable({"use_reentrant": False})
    policy = Policy(remove_dropout(lm), CPU).train()
    torch.testing.assert_close(score(policy, samples), truth_M, atol=1e-6, rtol=1e-6)


def test_casting_leaves_rotary_frequencies_in_fp32():
    lm = small("llama")
    cast = model.cast_parameters(lm, torch.bfloat16)
    assert cast.lm_head.weight.dtype == torch.bfloat16
    assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
    replica = make_replica(small("qwen2 tied"), CPU).lm
    assert replica.lm_head.weight is replica.model.embed_tokens.weight and not replica.lm_head.weight.requires_grad


def test_the_tiny_model_in_bf16_turns_positions_as_its_export_does(tmp_path):
    tokenizer, lm = model.load_tokenizer("tiny"), model.load_model("tiny", 0, torch.bfloat16)
    model.export_model(lm, tokenizer, tmp_path / "export")
    read_back = model.load_model(str(tmp_path / "export"), 0, torch.bfloat16)
    for module in (lm, read_back):
        assert module.lm_head.weight.dtype == torch.bfloat16
        assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.equal(lm.model.rotary_emb.inv_freq, read_back.model.rotary_emb.inv_freq)
    ids = torch.arange(200)[None]
    assert torch.equal(lm(ids).logits, read_back(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replica_of_the_weights_alone_is_the_model(family, dtype, monkeypatch):
    """Buffers, as rotary frequencies and the scale of embeddings, are made on the way, and not rounded."""
    monkeypatch.setattr(engine.replica, "compute_dtype", lambda device: dtype)
    lm, ids = small(family), torch.arange(12)[None]
    replica = make_replica(hollow(lm), CPU)
    replica.refresh(Policy(copy.deepcopy(lm), CPU), 1)
    wanted = model.cast_parameters(lm.eval(), dtype)(ids).logits
    assert torch.equal(replica.lm(ids).logits, wanted) and wanted.dtype == dtype
    assert (replica.lm.lm_head.weight is replica.lm.model.embed_tokens.weight) == lm.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_read_back_as_the_same_model(family, tmp_path):
    lm, ids = plain(family, len(model.load_tokenizer("tiny"))).eval(), torch.arange(12)[None]
    path = folder_of(tmp_path / "m", lm)
    for read in (model.load_model(path, 0, torch.float32), transformers.AutoModelForCausalLM.from_pretrained(path)):
        assert torch.equal(read(ids).logits, lm(ids).logits)
        assert (read.lm_head.weight is read.model.embed_tokens.weight) == lm.config.tie_word_embeddings
    assert model.model_config(path).model_type == lm.config.model_type


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_replica_and_reference_have_the_linears_that_the_model_was_given(family):
    for lm, kind in ((plain(family), torch.nn.Linear), (small(family), Linear)):
        copies = Policy(copy.deepcopy(lm), CPU), make_replica(lm, CPU).lm, Policy(lm, CPU)
        for one in copies:
            assert {type(m) for m in one.modules() if isinstance(m, torch.nn.Linear)} == {kind}


@pytest.mark.parametrize(
    ("argv", "step", "expected"),
    [
        (["--lr", "1", "--warmup_steps", "4"], 0, 0.25),
        (["--lr", "1", "--warmup_steps", "4"], 3, 1.0),
        (["--lr", "1", "--schedule", "cosine"], 50, 0.5),
        (["--lr", "1", "--schedule", "cosine", "--min_lr_ratio", "0.2"], 100, 0.2),
        (["--lr", "1", "--schedule", "constant"], 99, 1.0),
    ],
)
def test_learning_rate_follows_the_schedule(argv, step, expected):
    config = load_config(["--algo", "dapo", "--model", "none", *argv])
    assert learning_rate(config, step, 100) == pytest.approx(expected)
