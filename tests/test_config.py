"""Config: layers, conversion by type, and errors that name what was meant."""

import dataclasses

import pytest
import yaml

from engine.config import Config, check_batch, load_config, save_config
from engine.errors import UserError


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
        (["--lr", "fast"], ["lr must be float", "'fast'"]),
        (["--steps", "2.5"], ["steps must be int"]),
        (["--steps", "0"], ["steps must be above 0"]),
        (["--steps"], ["--steps needs a value"]),
        (["steps", "3"], ["'steps'", "--key value"]),
        (["--group_size", "1"], ["group_size 1", "at least 2"]),
        (["--schedule", "cosin"], ["schedule must be one of constant, cosine"]),
        (["--temperature", "0"], ["temperature 0"]),
        (["--profile_steps", "6:3"], ["FIRST:END"]),
        (["--config", "configs/models/qwen2.5-3.yaml"], ["no config file", "qwen2.5-3b.yaml"]),
        (["--epochs", "2", "--logp_old", "on_policy"], ["single update"]),
        (["--activation_checkpointing", "yes"], ["must be bool"]),
    ],
)
def test_bad_input_is_refused_by_name(argv, words):
    with pytest.raises(UserError) as caught:
        load_config(argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unreadable_yaml_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("lr: [1,\n")
    with pytest.raises(UserError, match="bad.yaml"):
        load_config(["--config", str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize("algo", ["sft", "grpo", "dr_grpo", "dapo"])
def test_saved_config_loads_back_equal(tmp_path, algo):
    config = load_config(["--algo", algo, "--stop", "x", "--dual_clip", "3", "--system_prompt", "Be brief."])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(["--config", str(tmp_path / "c.yaml")]) == config
    saved = set(yaml.safe_load((tmp_path / "c.yaml").read_text()))
    assert saved == {f.name for f in dataclasses.fields(Config)} - {"resume", "dry_run"}


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
