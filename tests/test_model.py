"""Models: what is refused, tokenizers and templates, packed rows against separate ones, dtypes."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from engine import model
from engine.algos.loss import score, supervised_loss
from engine.algos.weight import per_token
from engine.batch import Batch, completions_batch, packed_batch, share_prompts, sharing_saves
from engine.config import load_config
from engine.data import load_task
from engine.errors import UserError
from engine.replica import make_replica
from engine.rollouts.native import Completion
from kernels import eager

FAMILIES = {
    "qwen2 tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 untied": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
}


def small(family: str):
    kind, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, initializer_range=0.2, **extra)  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_score_as_they_do_alone(family):
    policy = model.Policy(small(family))
    documents = [([3, 4, 5], [6, 7]), ([8], [9, 10, 11, 12]), ([13, 14], [15]), ([16, 17, 18], [19, 20])]
    batch = packed_batch([documents[:3], documents[3:]])
    config = load_config(["--algo", "sft"])
    logp_NT = policy(batch.needed_rows(), score, config, eager)
    alone = []
    for prompt, response in documents:
        ids = torch.tensor([prompt + response])
        logp = policy.lm(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        alone.append(logp[len(prompt) - 1 :])
    torch.testing.assert_close(logp_NT[batch.mask_NT], torch.cat(alone), atol=1e-5, rtol=1e-5)
    weight_NT = per_token(batch.mask_NT, lambda x: x, 0)
    weighted = dataclasses.replace(batch, weight_NT=weight_NT)
    loss, _ = policy(weighted.needed_rows(), supervised_loss, config, eager)
    assert loss.item() == pytest.approx(-torch.cat(alone).mean().item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_segments_are_causal_and_their_positions_stay_on_the_device(family, monkeypatch):
    lm, ids_NT = small(family), torch.randint(0, 50, (3, 16))
    expected_NTV = lm(ids_NT).logits

    def looks(*args):
        raise AssertionError("transformers looks at the positions, for which a GPU would be waited for")

    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", looks)
    policy, mask_NT = model.Policy(lm), torch.ones_like(ids_NT, dtype=torch.bool)
    batch = Batch(ids_NT, mask_NT, mask_NT.float(), torch.ones(3)).needed_rows()
    logp_NT = policy(batch, score, load_config(["--algo", "grpo"]), eager)
    expected_NT = expected_NTV.log_softmax(-1)[:, :-1].gather(-1, ids_NT[:, 1:, None])[..., 0]
    torch.testing.assert_close(logp_NT[:, 1:], expected_NT, atol=1e-6, rtol=1e-5)


def test_positions_restart_with_each_document():
    documents = [([3, 4], [5]), ([6], [7])]
    batch = packed_batch([documents, documents[:1] * 2])
    assert batch.position_NT.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]]
    assert batch.segment_NT.tolist() == [[1, 1, 1, 2, 2, -1], [1, 1, 1, 2, 2, 2]]
    mask = model.segment_mask(batch.segment_NT)[0, 0]
    assert mask[2].tolist() == [True] * 3 + [False] * 3 and mask[4].tolist() == [False] * 3 + [True] * 2 + [False]


@pytest.mark.parametrize("packed", (True, False))
def test_columns_that_fill_a_batch_up_change_no_value(packed):
    policy, config = model.Policy(small(next(iter(FAMILIES)))), load_config(["--algo", "grpo", "--model", "none"])
    batch = packed_batch([[([3, 4], [5]), ([6], [7])], [([3, 4, 8], [5, 9, 9])]]) if packed else groups()
    filled = batch.filled_up()
    assert filled.ids_NT.shape[1] == 16 and torch.equal(filled.select(slice(None)).ids_NT, batch.ids_NT)
    with torch.no_grad():
        logp_NT, filled_NT = (policy(rows.needed_rows(), score, config, eager) for rows in (batch, filled))
    torch.testing.assert_close(filled_NT[:, : batch.ids_NT.shape[1]], logp_NT, atol=1e-5, rtol=1e-5)
    assert not filled_NT[:, batch.ids_NT.shape[1] :].any()


def groups() -> Batch:
    """Three prompts, one of a single token, with 3, 1 and 2 answers."""
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(5, 50, (n,), generator=g).tolist()  # noqa: E731
    prompts = [prompt for size, count in ((6, 3), (1, 1), (4, 2)) for prompt in [draw(size)] * count]
    answers = [Completion(draw(n), draw(n), [0.0] * n, "eos") for n in (5, 2, 7, 3, 1, 4)]
    return completions_batch(prompts, answers, [1.0, -0.5, 0.25, 2.0, -1.0, 0.5])


def test_shared_prompts_stand_once_and_every_value_follows_its_token():
    batch = groups()
    rows, place_NT = share_prompts(batch)
    assert rows.segment_NT[0].tolist() == [0] * 5 + [1] * 6 + [2] * 3 + [3] * 8 + [-1] * 10, "up to a whole tile"
    assert rows.position_NT[0, :22].tolist() == [*range(5), *range(5, 11), *range(5, 8), *range(5, 13)]
    assert rows.segment_NT[1, :4].tolist() == [1] * 4 and (rows.segment_NT[1, 4:] == -1).all()
    assert rows.mask_NT.sum() == batch.mask_NT.sum() == 22
    trained = place_NT[batch.mask_NT]
    assert len(trained.unique()) == 22
    for name in ("ids_NT", "logp_behaviour_NT"):
        assert torch.equal(getattr(rows, name).flatten()[trained], getattr(batch, name)[batch.mask_NT])
    assert torch.equal(rows.adv_NT.flatten()[trained], batch.adv_N[:, None].expand_as(batch.ids_NT)[batch.mask_NT])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_behind_a_shared_prompt_score_as_they_do_alone(family):
    policy, batch = model.Policy(small(family)), groups()
    config = load_config(["--algo", "grpo", "--model", "none"])
    rows, place_NT = share_prompts(batch)
    with torch.no_grad():
        alone_NT = policy(batch.needed_rows(), score, config, eager)
        shared_NT = policy(rows.needed_rows(), score, config, eager).flatten()[place_NT]
    torch.testing.assert_close(shared_NT[batch.mask_NT], alone_NT[batch.mask_NT], atol=1e-5, rtol=1e-5)


def test_prompts_are_shared_where_that_saves_work():
    long, short = [5] * 60, [5] * 2
    answers = [Completion([6] * 10, [0.0] * 10, [0.0] * 10, "eos")] * 8
    of = lambda prompt, n: completions_batch([prompt] * n, answers[:n], [1.0] * n)  # noqa: E731
    assert sharing_saves(of(long, 8), 1e6, 100, 1) and not sharing_saves(of(long, 1), 1e6, 100, 1)
    assert not sharing_saves(of(short, 8), 1e6, 100, 1)
    assert not sharing_saves(of(long, 8), 1.0, 100, 1), "attention over the other answers costs more than it saves"
    assert not sharing_saves(packed_batch([[(long, short)]]), 1e6, 100, 1)
    assert sharing_saves(of(long, 8), 1e6, 6000, 1) and not sharing_saves(of(long, 8), 1e6, 6000, 4)


def test_the_tiny_model_is_about_a_million_parameters_and_depends_on_the_seed_alone():
    a, b, c = (model.load_model("tiny", seed, torch.float32) for seed in (0, 0, 1))
    assert 0.5e6 < model.count_parameters("tiny") == sum(p.numel() for p in a.parameters()) < 1.5e6
    assert torch.equal(a.lm_head.weight, b.lm_head.weight) and not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.config.model_type == "qwen2" and a.lm_head.weight is a.model.embed_tokens.weight


def test_the_tiny_tokenizer_survives_a_round_trip_through_autotokenizer(tmp_path):
    tokenizer = model.tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model.tiny_config(tokenizer).save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for item in load_task("arithmetic", "train")[:200]:
        ids = model.encode_prompt(tokenizer, item.prompt)
        assert model.encode_prompt(loaded, item.prompt) == ids and len(ids) < 32
        trace = loaded.encode(item.trace, add_special_tokens=False)
        assert loaded.decode(trace, skip_special_tokens=True) == item.trace and len(trace) < 26
    assert loaded.decode(loaded.encode("Καλημέρα 7/8")) == "Καλημέρα 7/8"


def test_every_id_that_ends_a_turn_is_known():
    tokenizer = model.tiny_tokenizer()
    lm = model.load_model("tiny", 0, torch.float32)
    assert model.turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    lm.generation_config.eos_token_id = [7, 9]
    assert model.eos_ids(lm, tokenizer) == sorted([7, 9, tokenizer.eos_token_id])


def test_enable_thinking_reaches_the_chat_template():
    tokenizer = model.tiny_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    messages = [{"role": "user", "content": "7"}]
    plain, without = (model.encode_prompt(tokenizer, messages, flag) for flag in (None, False))
    assert without == plain + tokenizer.encode("<think></think>")


def test_other_families_and_folders_without_a_model_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2.*qwen2, qwen3, llama"):
        model.model_config(str(tmp_path))
    with pytest.raises(UserError, match="There is no model folder /nowhere"):
        model.model_config("/nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"No model can be loaded from '{tmp_path}'"):
        model.model_config(str(tmp_path))


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    tokenizer = model.tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        model.load_tokenizer(str(tmp_path))


def folder_of(path, lm, weights=None, **config):
    """`lm` with the tiny tokenizer in a folder, its weights and the entries of its config.json replaced."""
    model.export_model(lm, model.tiny_tokenizer(), path)
    if weights is not None:
        save_file({k: w.clone() for k, w in weights.items()}, path / "model.safetensors", {"format": "pt"})
    given = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(given | config))
    return str(path)


def tiny_llama(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = len(model.tiny_tokenizer())
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
            with pytest.raises(UserError, match=f"{adapter}.*merge"):
                load(path)
        (tmp_path / "m" / adapter).unlink()


def test_an_export_ends_answers_where_a_rollout_does(tmp_path):
    tokenizer, lm = model.tiny_tokenizer(), tiny_llama(eos_token_id=7)
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
    tokenizer, lm = model.tiny_tokenizer(), tiny_llama()
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
    config, batch = load_config(["--algo", "grpo"]), groups().needed_rows()
    with torch.no_grad():
        truth_NT = model.Policy(copy.deepcopy(lm)).eval()(batch, score, config, eager)
        learning_NT = model.Policy(copy.deepcopy(lm)).train()(batch, score, config, eager)
        assert not torch.allclose(learning_NT, truth_NT, atol=1e-3), "there is dropout to remove"
    if checkpointing:
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable  # old name
        enable({"use_reentrant": False})
    policy = model.Policy(model.remove_dropout(lm)).train()
    torch.testing.assert_close(policy(batch, score, config, eager), truth_NT, atol=1e-6, rtol=1e-6)


def test_casting_leaves_rotary_frequencies_in_fp32():
    lm = small("llama")
    cast = model.cast_parameters(lm, torch.bfloat16)
    assert cast.lm_head.weight.dtype == torch.bfloat16
    assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
    replica = make_replica(small("qwen2 tied"), torch.device("cpu")).lm
    assert replica.lm_head.weight is replica.model.embed_tokens.weight and not replica.lm_head.weight.requires_grad


def test_the_tiny_model_in_bf16_turns_positions_as_its_export_does(tmp_path):
    tokenizer, lm = model.tiny_tokenizer(), model.load_model("tiny", 0, torch.bfloat16)
    model.export_model(lm, tokenizer, tmp_path / "export")
    read_back = model.load_model(str(tmp_path / "export"), 0, torch.bfloat16)
    for module in (lm, read_back):
        assert module.lm_head.weight.dtype == torch.bfloat16
        assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.equal(lm.model.rotary_emb.inv_freq, read_back.model.rotary_emb.inv_freq)
    ids = torch.arange(200)[None]
    assert torch.equal(lm(ids).logits, read_back(ids).logits)


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
    assert model.learning_rate(config, step, 100) == pytest.approx(expected)
