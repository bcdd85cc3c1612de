"""Config: layers, conversion by type, and errors that name what was meant."""

import dataclasses
import random

import pytest
import yaml

from engine.config import CONFIGS, TYPES, Config, check_batch, load_config, read_yaml, save_config
from engine.errors import UserError
from engine.hints import ELSEWHERE, OURS


def test_later_layers_win_over_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("clip_high: 0.4\nlr: 1e-6\n")
    (tmp_path / "b.yaml").write_text("lr: 2e-6\n")
    assert load_config(["--algo", "dapo"]).clip_high == 0.28
    config = load_config(
        ["--algo", "dapo", "--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--steps", "7"]
    )
    assert (config.clip_high, config.lr, config.steps) == (0.4, 2e-6, 7)
    assert load_config(["--config", str(tmp_path / "a.yaml"), "--lr=3e-6"]).lr == 3e-6


def test_values_are_converted_by_the_fields_type():
    config = load_config(
        [
            "--lr",
            "1e-6",
            "--steps",
            "1e3",
            "--dry-run",
            "--betas",
            "0.9,0.99",
            "--dual_clip",
            "none",
            "--stop",
            "a",
            "b",
            "--beta",
            "0",
        ]
    )
    assert config.lr == 1e-6 and isinstance(config.lr, float)
    assert config.steps == 1000 and isinstance(config.steps, int)
    assert config.dry_run is True and config.betas == (0.9, 0.99) and config.dual_clip is None
    assert config.stop == ("a", "b") and isinstance(config.beta, float)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt_per_step", "4"], ["prompt_per_step", "'prompts_per_step'"]),
        (["--algo", "grop"], ["'grop'", "'grpo'"]),
        (["--lr", "fast"], ["lr must be a number", "'fast'"]),
        (["--lag", "2"], ["lag must be one of 0, 1, not 2"]),
        (["--steps", "2.5"], ["steps must be a whole number"]),
        (["--steps", "0"], ["steps must be above 0"]),
        (["--steps"], ["--steps needs a value"]),
        (["steps", "3"], ["'steps'", "--key value"]),
        (["--group_size", "1"], ["group_size 1", "at least 2"]),
        (["--schedule", "cosin"], ["schedule must be one of constant, cosine"]),
        (["--temperature", "0"], ["temperature 0"]),
        (["--profile_steps", "6:3"], ["FIRST:END"]),
        (["--date", "tomorrow"], ["date must be written YYYY-MM-DD", "'tomorrow'"]),
        (["--config", "configs/models/qwen2.5-3.yaml"], ["no config file", "qwen2.5-3b.yaml"]),
        (["--epochs", "2", "--logp_old", "on_policy"], ["single update"]),
        (["--activation_checkpointing", "maybe"], ["must be true or false, not 'maybe'"]),
        (["--seed", "0x10"], ["seed must be a whole number, not '0x10'"]),
        (["--algo", "sft", "grpo"], ["algo takes one value"]),
        (["--algo", "GRPO"], ["'GRPO'", "'grpo'"]),
        (["--Group-Size", "4"], ["'Group_Size'", "'group_size'"]),
        (["--LR", "1"], ["Did you mean 'lr'?"]),
        (["lr=3e-5"], ["'lr=3e-5' is not an option", "--lr 3e-5?"]),
        (["-group-size", "4"], ["'-group-size' is not an option", "--group_size"]),
        (["--steps", "4", "-lr=2"], ["'-lr=2' is not an option", "--lr 2?"]),
        (["\N{EM DASH}steps", "4"], ["is not an option", "--steps"]),
        (["data.train_batch_size=8"], ["is not an option", "Did you mean 'prompts_per_step' or 'rows_per_step'?"]),
        (["configs/hardware/1x80gb.yaml"], ["--config configs/hardware/1x80gb.yaml?"]),
    ],
)
def test_bad_input_is_refused_by_name(argv, words):
    with pytest.raises(UserError) as caught:
        load_config(argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("learning_rate", "'lr'"),
        ("Lr", "'lr'"),
        ("learningRate", "'lr'"),
        ("batch_size", "'prompts_per_step' or 'rows_per_step' or 'micro_batch'"),
        ("per_device_train_batch_size", "'micro_batch'"),
        ("gradient-accumulation-steps", "'prompts_per_step' or 'rows_per_step'"),
        ("max_tokens", "'max_new_tokens'"),
        ("max_completion_length", "'max_new_tokens'"),
        ("num_generations", "'group_size'"),
        ("model_name_or_path", "'model'"),
        ("output_dir", "'out'"),
        ("save_steps", "'save_every'"),
        ("kl_coef", "'beta'"),
        ("clip_ratio", "'clip_low' or 'clip_high'"),
        ("algorithm.kl_ctrl.kl_coef", "'beta'"),
        ("actor_rollout_ref.rollout.n", "'group_size'"),
        ("learning_rat", "'lr'"),
        ("temp", "'temperature'"),
        ("topk", "'top_k'"),
    ],
)
def test_a_name_from_another_trainer_gets_ours(foreign, ours):
    with pytest.raises(UserError) as caught:
        load_config([f"--{foreign}", "1"])
    assert str(caught.value) == f"There is no setting {foreign.replace('-', '_')!r}. Did you mean {ours}?"


def test_hints_name_settings_there_are_by_names_that_are_none():
    assert set(ELSEWHERE) <= set(TYPES) and not set(OURS) & set(TYPES)


@pytest.mark.parametrize(
    ("line", "key", "want"),
    [
        ("wandb: off", "wandb", "off"),
        ("profile_steps: 13:59", "profile_steps", "13:59"),
        ("name: 007", "name", "007"),
        ("name: yes", "name", "yes"),
        ("name: 12:30:45", "name", "12:30:45"),
        ("name: 2024-01-05", "name", "2024-01-05"),
        ("name: 1e3  # text", "name", "1e3"),
        ("name: 1_000", "name", "1_000"),
        ("name: '~'", "name", "~"),
        ("name: !!python/name:os.system x", "name", "x"),
        ('name: "null"', "name", "null"),
        ("name: null", "name", ""),
        ("out: .", "out", "."),
        ("steps: 0100", "steps", 100),
        ("steps: 1_000", "steps", 1000),
        ("steps: '20'", "steps", 20),
        ("group-size: 4", "group_size", 4),
        ("lr: 1e-6", "lr", 1e-6),
        ("max_grad_norm: .inf", "max_grad_norm", float("inf")),
        ("clip_high: .Inf", "clip_high", float("inf")),
        ("betas: [0.8, 0.9]", "betas", (0.8, 0.9)),
        ("betas: 0.8,0.9", "betas", (0.8, 0.9)),
        ('stop: [no, 1:30, null, "\\n"]', "stop", ("no", "1:30", "null", "\n")),
        ("stop:\n- on\n- 2024-01-05", "stop", ("on", "2024-01-05")),
        ("stop: off", "stop", ("off",)),
        ("stop:", "stop", ()),
        ("dual_clip: ~", "dual_clip", None),
        ("system_prompt:", "system_prompt", None),
        ("system_prompt: ''", "system_prompt", ""),
        ("system_prompt: on", "system_prompt", "on"),
        ("enable_thinking: null", "enable_thinking", None),
        ("enable_thinking: No", "enable_thinking", False),
        ("compile: ON", "compile", True),
        ("\ufeffsteps: 3\r\nseed: 4\r\n", "steps", 3),
        ("# nothing\n", "steps", load_config([]).steps),
        ("", "steps", load_config([]).steps),
    ],
)
def test_a_setting_reads_in_yaml_as_it_is_written(tmp_path, line, key, want):
    (tmp_path / "c.yaml").write_text(line, encoding="utf-8", newline="")
    got = getattr(load_config(["--config", str(tmp_path / "c.yaml")]), key)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: [1,\n", "cannot be read as YAML"),
        ("lr:\t1\n\tsteps: 3", "cannot be read as YAML"),
        ("steps: 3\n---\nsteps: 4", "cannot be read as YAML"),
        ("[" * 100_000, "cannot be read as YAML"),
        ("steps: 3\x00", "cannot be read as YAML"),
        ("- steps", "must hold `key: value` lines"),
        ("just words", "must hold `key: value` lines"),
        ("steps: 3\nseed: 1\nsteps: 4", "sets steps once more in line 3"),
        ("group_size: 3\ngroup-size: 4", "sets group_size once more in line 2"),
        ("steps:", "steps needs a value"),
        ("lr: null", "lr needs a value"),
        ("steps: [3, 4]", "steps takes one value"),
        ("stop: [[a]]", "stop must be one value or a list of them, not what line 1 says"),
        ("seed: 1\nlr: {a: 1}", "lr must be one value or a list of them, not what line 2 says"),
        ("optimizer: {lr: 1}", "There is no setting 'optimizer'"),
        ("learning_rate: 1e-6", "Did you mean 'lr'?"),
        ("? [a, b]\n: 3", "must hold `key: value` lines"),
        ("lr: off", "lr must be a number, not 'off'"),
    ],
)
def test_bad_yaml_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(["--config", str(tmp_path / "bad.yaml")])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_file_of_ours_is_read_as_yaml_would_not():
    for path in CONFIGS.rglob("*.yaml"):
        plain = yaml.safe_load(path.read_text()) or {}
        assert {k: float(v) if k == "lr" else v for k, v in plain.items()} == read_yaml(path), path


@pytest.mark.parametrize("algo", ["sft", "grpo", "dr_grpo", "dapo"])
def test_saved_config_loads_back_equal(tmp_path, algo):
    config = load_config(["--algo", algo, "--stop", "x", "--dual_clip", "3", "--system_prompt", "Be brief."])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(["--config", str(tmp_path / "c.yaml")]) == config
    saved = set(yaml.safe_load((tmp_path / "c.yaml").read_text()))
    assert saved == {f.name for f in dataclasses.fields(Config)} - {"resume", "new_data", "dry_run"}


TEXTS = ("", "no", "null", "~", "1:30", "007", "2024-01-05", "a: b # c", "\n", " two\n\nlines ", "\t\x00\x85\u2028",
         "\N{SNOWMAN}", "'\"", "- x", "[a]", "{a}", "&a *b !c", "x" * 300 + " " + "y" * 300, ".inf", "%")  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_any_config_reads_back_as_it_was_saved(tmp_path, seed):
    pick = random.Random(seed)
    texts = {key: pick.choice(TEXTS) for key in ("name", "out", "train_data", "prompt_column", "system_prompt")}
    config = dataclasses.replace(
        load_config([]), **texts, stop=tuple(pick.choices(TEXTS, k=pick.randrange(4))), seed=pick.randrange(2**32),
        betas=(pick.random(), pick.random()), max_grad_norm=pick.choice([0.1 + 0.2, 1e22, float("inf")]),
        dual_clip=pick.choice([None, 3.0]), enable_thinking=pick.choice([None, True, False]),
        lr=10 ** pick.uniform(-12, 3),
    )  # fmt: skip
    if config.system_prompt == "null":  # on a command line too, it is none
        config = dataclasses.replace(config, system_prompt=None)
    save_config(config, tmp_path / "c.yaml")
    assert load_config(["--config", str(tmp_path / "c.yaml")]) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config([]).lr = 1.0


def test_batches_that_do_not_divide_name_one_that_does():
    with pytest.raises(UserError, match="prompts_per_step 10 does not divide over 4 ranks; use 8"):
        check_batch(Config(prompts_per_step=10), 4)
    with pytest.raises(UserError, match="updates_per_rollout 3"):
        check_batch(Config(prompts_per_step=2, group_size=8, updates_per_rollout=3), 1)
    with pytest.raises(UserError, match="rows_per_step 9"):
        check_batch(Config(algo="sft", rows_per_step=9), 2)
    check_batch(Config(prompts_per_step=8), 4)
