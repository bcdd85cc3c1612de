"""Settings: layers, conversion by type, ranges, help, and errors that name what was meant."""

import dataclasses
import random
import sys

import pytest
import yaml

import train
from engine import evaluate, generate
from engine.algos import ALGOS
from engine.config import (
    CONFIGS,
    SETTINGS,
    TYPES,
    Config,
    check_batch,
    load_command,
    load_config,
    read_yaml,
    save_config,
)
from engine.data import TASKS
from engine.errors import UserError
from engine.hints import ELSEWHERE, OURS
from engine.rollouts.sampling import Sampling
from engine.settings import check


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
        (["--profile_steps", "40:50", "--steps", "40"], ["profile_steps 40:50", "after the last step, 39"]),
        (["--profile_steps", "3:6", "--resume", "auto"], ["profile_steps goes without resume", "--init_from"]),
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
        (
            ["data.train_batch_size=8"],
            ["is not an option", "Did you mean 'prompts_per_step' or 'pairs_per_step' or 'step_tokens'?"],
        ),
        (["configs/hardware/1x80gb.yaml"], ["--config configs/hardware/1x80gb.yaml?"]),
        (["--name", "--steps", "3"], ["--name needs a value", "--name=VALUE"]),
        (["--lr", "inf"], ["lr must be a finite number, not inf"]),
        (["--max_grad_norm", "nan"], ["max_grad_norm must be above 0, not nan"]),
        (["--seed", "4294967296"], ["seed must be at least 0 and below 4294967296"]),
        (["--top_p", "0"], ["top_p must be above 0 and at most 1, not 0.0"]),
        (["--temperature", "0.001"], ["temperature must be 0, or at least 0.01 and at most 100"]),
        (["--warmup_steps", "-1"], ["warmup_steps must be at least 0, not -1"]),
        (["--min_lr_ratio", "1.1"], ["min_lr_ratio must be at least 0 and at most 1"]),
        (["--betas", "0.9"], ["betas takes 2 values, not '0.9'"]),
        (["--betas="], ["betas needs a value"]),
        (["--betas", "0.9", "1"], ["betas must be at least 0 and below 1, not (0.9, 1.0)"]),
        (["--clip_low", "1.5"], ["clip_low must be in [0, 1]", "1.5"]),
        (["--clip_high", "nan"], ["clip_high must be >= 0", "nan"]),
        (["--dual_clip", "1"], ["dual_clip must be above 1 (3 is usual)"]),
        (["--importance_cap", "0"], ["importance_cap must be above 0 (2 is usual)"]),
        (["--importance_cap", "0", "--logp_old", "sampler"], ["importance_cap has no effect with logp_old sampler"]),
        (["--importance_mask", "0.5"], ["importance_mask takes 2 values, not '0.5'"]),
        (["--importance_mask", "2", "5"], ["importance_mask must be two bounds around 1, as 0.5 2, not 2 5"]),
        (["--importance_mask", "0.5", "nan"], ["importance_mask must be two bounds around 1"]),
        (["--sequence_mask", "1", "1"], ["sequence_mask must be two bounds around 1, as 0.5 2, not 1 1"]),
        (["--importance_mask", "0.5", "5", "--logp_old", "sampler"], ["importance_mask has no effect with logp_old"]),
        (["--sequence_mask", "0.5", "5", "--logp_old", "on_policy"], ["sequence_mask needs", "recompute"]),
        (["--lag", "1", "--logp_old", "on_policy"], ["needs importance_cap, as 2.0, or importance_mask"]),
        (["--tau_neg", "0"], ["tau_neg must be above 0"]),
        (["--algo", "dapo", "--overlong_buffer", "64"], ["overlong_buffer goes without overlong_penalty"]),
        (
            ["--overlong_buffer", "40", "--max_new_tokens", "40"],
            ["overlong_buffer 40 must be less", "max_new_tokens 40"],
        ),
        (["--algo", "reinforce", "--group_size", "1", "--dynamic_sampling"], ["dynamic_sampling keeps groups"]),
        (["--algo", "grpo", "--reference", "precomputed"], ["precomputed is for dpo", "not for grpo"]),
        (["--algo", "dpo", "--beta", "0"], ["beta 0 makes every margin 0"]),
        (["--algo", "dpo", "--updates_per_rollout", "2"], ["would cut pairs apart", "pairs_per_step"]),
        (["--algo", "dpo", "--preference", "ipo", "--label_smoothing", "0.1"], ["label_smoothing is of", "not of ipo"]),
        (["--algo", "dpo", "--label_smoothing", "0.5"], ["label_smoothing must be at least 0 and below 0.5"]),
        (["--algo", "dpo", "--lora_dropout", "0.1"], ["lora_dropout is for sft"]),
        (["--algo", "sft", "--teacher", "a"], ["teacher is for distill and opd, not for sft"]),
        (["--algo", "dpo", "--context", "fewshot"], ["context is for distill and opd, not for dpo"]),
        (["--algo", "opd", "--beta", "0.1"], ["beta weighs a reference", "is its teacher"]),
        (["--algo", "distill", "--reward_coef", "1"], ["reward_coef 1 is for opd"]),
        (["--algo", "opd", "--reward_coef", "1", "--group_size", "1"], ["group_size 2 or more"]),
        (["--algo", "distill", "--teacher", "a", "--reference", "adapters_off"], ["is of the student"]),
        (["--algo", "opd", "--context", "shuffled_answers", "--shots", "1"], ["needs shots 2 or more"]),
        (["--algo", "opd", "--task", "jsonl", "--dynamic_sampling"], ["dynamic_sampling keeps groups", "not graded"]),
        (["--algo", "grpo", "--reward_coef", "1"], ["reward_coef 1 is for opd"]),
    ],
)
def test_bad_input_is_refused_by_name(argv, words):
    with pytest.raises(UserError) as caught:
        load_config(argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_a_setting_has_a_meaning_and_a_default_that_it_allows(field):
    assert field.metadata["line"].meaning
    check(field, field.default)


@pytest.mark.parametrize(("key", "table"), [("task", TASKS), ("algo", ALGOS)])
def test_a_meaning_names_every_row_of_its_table(key, table):
    assert set(table) <= set(SETTINGS[key].metadata["line"].meaning.split())


@pytest.mark.parametrize(("key", "value"), [("top_p", 0.0), ("temperature", 200.0), ("top_k", -1)])
def test_a_sampling_asks_the_settings_for_its_ranges(key, value):
    with pytest.raises(UserError) as ours:
        load_config([f"--{key}={value}"])
    with pytest.raises(UserError) as theirs:
        Sampling(8, **{key: value})
    assert str(ours.value) == str(theirs.value)


def help_of(program, monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["program", "--steps", "3", "--help"])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("program", "first", "left_out"),
    [(train, ["algo"], set()), (evaluate, ["samples", "json"], {"lr"}), (generate, ["prompt", "temperature"], {"lr"})],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_help_explains_the_settings_that_a_program_reads_once_and_in_groups(
    program, first, left_out, monkeypatch, capsys
):
    lines = help_of(program, monkeypatch, capsys)
    assert lines[0] == program.__doc__.splitlines()[0] and max(map(len, lines)) <= 120
    keys = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert keys[: len(first)] == first and len(set(keys)) == len(keys) and not left_out & set(keys)
    assert left_out or keys == list(TYPES)
    assert {"seed", "model", "top_p"} <= set(keys) and Config.ANSWERS in lines


def test_a_line_of_the_help_says_type_default_meaning_and_range(monkeypatch, capsys):
    lines = [" ".join(line.split()) for line in help_of(train, monkeypatch, capsys)]
    for line in (
        "--steps INT 100 rollouts (rl) or optimizer steps (sft) (above 0)",
        "--betas FLOATS 0.9,0.95 decay of both moments (at least 0 and below 1)",
        "--dual_clip FLOAT none bound on a bad answer's loss, in advantages (above 1; 3 is usual)",
        "--adv_unbiased BOOL true that std with n - 1",
        "--stop TEXTS - texts that end an answer, and are part of it",
        '--name TEXT "" folder under `out`; empty: <algo>-<model>-seed<seed>',
    ):
        assert line in lines


def test_a_commands_own_options_are_no_settings(tmp_path):
    (tmp_path / "a.yaml").write_text("temperature: 0.7\nseed: 5\n")
    argv = ["--prompt=--", "--config", str(tmp_path / "a.yaml"), "--temperature", "0.5", "--seed", "3"]
    options, config = load_command(argv, generate.Options, "")
    assert options == generate.Options(prompt="--", temperature=0.5)
    assert (config.temperature, config.seed) == (0.7, 3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sample", "3"], "Did you mean 'samples'?"),
        (["-samples", "3"], "Did you mean --samples ...?"),
        (["--samples", "two"], "samples must be a whole number, not 'two'"),
        (["--samples=-1"], "samples must be at least 0, not -1"),
        (["--json"], "--json needs a value"),
        (["--samples", "3", "--group_size", "0"], "group_size must be above 0"),
    ],
)
def test_a_commands_options_are_refused_as_settings_are(argv, words):
    with pytest.raises(UserError) as caught:
        load_command(argv, evaluate.Options, "")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("learning_rate", "'lr'"),
        ("Lr", "'lr'"),
        ("learningRate", "'lr'"),
        ("batch_size", "'prompts_per_step' or 'pairs_per_step' or 'step_tokens' or 'micro_tokens'"),
        ("per_device_train_batch_size", "'micro_tokens'"),
        ("gradient-accumulation-steps", "'prompts_per_step' or 'pairs_per_step' or 'step_tokens'"),
        ("micro_batch", "'micro_tokens'"),
        ("pack_length", "'step_tokens'"),
        ("rows_per_step", "'step_tokens'"),
        ("max_seq_length", "'max_new_tokens'"),
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


@pytest.mark.parametrize("algo", ALGOS)
def test_saved_config_loads_back_equal(tmp_path, algo):
    masks = ["--importance_mask", "0.5", "inf", "--sequence_mask", "0.9,1.1"]
    config = load_config(["--algo", algo, "--stop", "x", "--dual_clip", "3", "--system_prompt", "Be brief.", *masks])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(["--config", str(tmp_path / "c.yaml")]) == config
    saved = set(yaml.safe_load((tmp_path / "c.yaml").read_text()))
    assert saved == {f.name for f in dataclasses.fields(Config)} - {"resume", "new_data", "dry_run"}


TEXTS = ["a: b # c", "- x", "&a *b !c", "\n", " two\n\nlines ", "\t\x00\x85\u2028", "x" * 300 + " " + "y" * 300, ""]
TEXTS += """no null ~ 1:30 007 2024-01-05 \N{SNOWMAN} '" [a] {a} .inf %""".split()


@pytest.mark.parametrize("seed", range(20))
def test_any_config_reads_back_as_it_was_saved(tmp_path, seed):
    pick = random.Random(seed)
    texts = {key: pick.choice(TEXTS) for key in ("out", "train_data", "test_data", "prompt_column", "system_prompt")}
    config = dataclasses.replace(
        load_config([]),
        **texts,
        stop=tuple(pick.choices(TEXTS, k=pick.randrange(4))),
        seed=pick.randrange(2**32),
        betas=(pick.random(), pick.random()),
        max_grad_norm=pick.choice([0.1 + 0.2, 1e22, float("inf")]),
        dual_clip=pick.choice([None, 3.0]),
        enable_thinking=pick.choice([None, True, False]),
        lr=10 ** pick.uniform(-12, 3),
    )
    if config.system_prompt == "null":  # on a command line too, it is none
        config = dataclasses.replace(config, system_prompt=None)
    save_config(config, tmp_path / "c.yaml")
    assert load_config(["--config", str(tmp_path / "c.yaml")]) == config


def test_a_model_that_comes_with_settings_has_them_under_each_file_and_option(tmp_path):
    (tmp_path / "mine.yaml").write_text("max_new_tokens: 7\n")
    for algo, lr in (("sft", 3e-3), ("dapo", 2e-4)):
        config = load_config(["--algo", algo, "--model", "tiny", "--config", str(tmp_path / "mine.yaml")])
        assert (config.lr, config.max_new_tokens, config.threads) == (lr, 7, 1)
        assert load_config(["--algo", algo, "--model", "tiny", "--lr", "1"]).lr == 1
    plain = load_config(["--algo", "dapo", "--model", "none"])
    for other in (str(CONFIGS / "models/tiny"), "configs/models/tiny", "org/tiny", "tiny2", "", ".", ".."):
        assert load_config(["--algo", "dapo", f"--model={other}"]) == dataclasses.replace(plain, model=other)


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("algo", ALGOS)
def test_a_file_of_a_models_settings_has_its_name_and_is_for_every_algorithm(path, algo):
    config = load_config(["--algo", algo, "--config", str(path)])
    owner, _, name = config.model.partition("/")
    assert owner and name.lower().startswith(path.stem) and config.task == "gsm8k"
    assert config.enable_thinking is (False if path.stem.startswith("qwen3") else None)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config([]).lr = 1.0


def test_batches_that_do_not_divide_name_one_that_does():
    with pytest.raises(UserError, match="prompts_per_step 10 does not divide over 4 ranks; use 8"):
        check_batch(Config(prompts_per_step=10), 4)
    with pytest.raises(UserError, match="updates_per_rollout 3"):
        check_batch(Config(prompts_per_step=2, group_size=8, updates_per_rollout=3), 1)
    for algo in ("sft", "dpo", "distill"):
        check_batch(Config(algo=algo, prompts_per_step=10), 4)
    check_batch(Config(prompts_per_step=8), 4)
