"""Updates: the same on one rank or two, whole or in pieces, with removable sequences or without them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("dpo", "distill", "opd")
ALGOS = ("sft", "grpo", "dr_grpo", "dapo", "reinforce", "gspo", *BESIDE)
"""Those that weigh, need or compare in a way of their own; rloo, cispo and sapo do as these in all that ranks share."""
OFF_POLICY = ["--logp_old", "sampler"]
RATES = ("2e-5", "4e-5", "6e-5", "1e-4")
A_FEW = ["--micro_tokens", "40"]
"""Of 126 tokens; the longest sample has 19."""
PIECES = {
    "one sample at a time": ["--micro_tokens", "1"],
    "a few": A_FEW,
    "reduced once": [*A_FEW, "--grad_sync", "last"],
    "kept gathered": [*A_FEW, "--reshard_after_forward", "false", "--grad_sync", "last"],
    "prompts shared": [*A_FEW, "--share_prompts", "true"],
    "prompts shared by all": ["--micro_tokens", "8192", "--share_prompts", "true"],
    "prompts repeated": [*A_FEW, "--share_prompts", "false"],
    "checkpointed": [*A_FEW, "--activation_checkpointing", "true"],
    "eager": ["--kernels", "eager"],
    "compiled": ["--compile", "true"],
}
LORA = ["--lora_rank", "4", "--lora_alpha", "8"]
BASES = ("replicated", "sharded")
SHARDED = ["--lora_base", "sharded"]
LORA_PIECES = {
    "a few": A_FEW,
    "reduced once": [*A_FEW, "--grad_sync", "last"],
    "kept gathered": [*A_FEW, "--reshard_after_forward", "false", "--grad_sync", "last"],
    "checkpointed": [*A_FEW, "--activation_checkpointing", "true"],
    "sharded": [*A_FEW, *SHARDED],
    "sharded and checkpointed": [*A_FEW, *SHARDED, "--activation_checkpointing", "true"],
}
FOUR_UPDATES = ["--updates_per_rollout", "2", "--epochs", "2"]


def case(algo: str, *argv: str, share=(12,), **rest) -> dict:
    return {"argv": ["--algo", algo, *argv], "share": share, **rest}


def off_policy(algo: str, *argv: str, **rest) -> dict:
    return case(algo, *OFF_POLICY, *argv, **rest)


def in_pieces() -> dict[str, dict]:
    cases = {f"{algo} {name}": off_policy(algo, *argv) for name, argv in PIECES.items() for algo in ("grpo", "dapo")}
    del cases["dapo compiled"]  # once is enough
    apart = {(algo, name) for algo in ("sft", "gspo", *BESIDE) for name in ("one sample at a time", "a few")}
    apart |= {(algo, name) for algo in ("gspo", *BESIDE) for name in ("prompts shared", "prompts repeated")}
    return cases | {f"{algo} {name}": off_policy(algo, *PIECES[name]) for algo, name in sorted(apart)}


ONE_RANK = {
    **{f"{algo} whole": off_policy(algo) for algo in ALGOS},
    **in_pieces(),
    "lora whole": off_policy("grpo", *LORA),
    **{f"lora {base} in bf16": off_policy("grpo", *LORA, "--lora_base", base, bf16=True) for base in BASES},
    **{f"lora {name}": off_policy("grpo", *LORA, *argv) for name, argv in LORA_PIECES.items()},
    # an entropy too small to matter, enough to keep every sequence in the body
    "dapo, all kept": off_policy("dapo", "--entropy_coef", "1e-30"),
    **{f"dapo, answers from {low}": case("dapo", "--sequence_mask", low, "2") for low in ("0.9", "0.7", "0")},
    "dapo in bf16": off_policy("dapo", "--kernels", "eager", bf16=True),
    "dapo poisoned": off_policy("dapo", poison=0, steps=3),
    "dapo, gathered for four updates": case("dapo", *FOUR_UPDATES, "--lr", RATES[0], *PIECES["kept gathered"]),
    **{
        f"recomputed, shared {share}": case("grpo", "--logp_old", "recompute", "--share_prompts", share)
        for share in ("true", "false")
    },
    **{f"{algo} at {lr}": case(algo, *FOUR_UPDATES, "--lr", lr) for algo in ("dapo", "dr_grpo") for lr in RATES},
}
TWO_RANKS = {
    **{f"{algo} uneven": off_policy(algo, "--micro_tokens", "20", share=(10, 2)) for algo in ALGOS},
    **{f"{algo}, a rank empty": off_policy(algo, "--micro_tokens", "30", share=(12, 0)) for algo in ALGOS},
    "lora uneven": off_policy("grpo", *LORA, "--micro_tokens", "20", share=(10, 2)),
    "lora, a rank empty": off_policy("grpo", *LORA, "--micro_tokens", "30", share=(12, 0)),
    "lora sharded": off_policy("grpo", *LORA, *SHARDED, "--micro_tokens", "20", share=(10, 2)),
    "dapo removable": off_policy("dapo", "--grad_sync", "last", share=(4, 8)),
    "dapo poisoned": off_policy("dapo", share=(6, 6), poison=1),
    **{
        f"bf16, checkpointed {on}": off_policy(
            "grpo", "--micro_tokens", "20", "--activation_checkpointing", on, share=(6, 6), bf16=True
        )
        for on in ("false", "true")
    },
}


def launch(ranks: int, cases: dict[str, dict]) -> dict[str, dict]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(ROOT / "tests/learner_script.py", json.dumps(cases), ranks=ranks),
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))[8:])


@pytest.fixture(scope="module")
def one():
    return launch(1, ONE_RANK)


@pytest.fixture(scope="module")
def two():
    return launch(2, TWO_RANKS)


def assert_same(a: dict, b: dict) -> None:
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert a["grad_norm"] > 1e-3 and a["updates"] == 1


@pytest.mark.parametrize("algo", ALGOS)
def test_two_ranks_with_uneven_work_equal_one(one, two, algo):
    assert_same(two[f"{algo} uneven"], one[f"{algo} whole"])
    assert two[f"{algo} uneven"]["totals"] == pytest.approx(one[f"{algo} whole"]["totals"], rel=1e-4)


@pytest.mark.parametrize("algo", ALGOS)
def test_a_rank_without_any_sequence_takes_part(one, two, algo):
    assert_same(two[f"{algo}, a rank empty"], one[f"{algo} whole"])


@pytest.mark.parametrize("name", ["uneven", ", a rank empty", "sharded"])
def test_two_ranks_train_an_adapter_as_one_does(one, two, name):
    spread = two["lora" + name if name[0] == "," else f"lora {name}"]
    assert_same(spread, one["lora whole"])
    assert spread["totals"] == pytest.approx(one["lora whole"]["totals"], rel=1e-4) and spread["totals"][3] > 0
    assert spread["moved"] == pytest.approx(one["lora whole"]["moved"], rel=1e-6)


@pytest.mark.parametrize("name", LORA_PIECES)
def test_pieces_recomputed_layers_and_a_sharded_base_do_not_change_an_adapters_gradient(one, name):
    assert_same(one[f"lora {name}"], one["lora whole"])


@pytest.mark.parametrize("name", in_pieces())
def test_budgets_and_layouts_do_not_change_the_gradient(one, name):
    assert_same(one[name], one[f"{name.split()[0]} whole"])
    assert all(not name.startswith("_") and "_orig" not in name for name in one[name]["names"])


def test_recomputed_log_probabilities_do_not_depend_on_shared_prompts(one):
    """The old policy's and the reference's, read back from rows that hold a group each."""
    shared, repeated = one["recomputed, shared true"], one["recomputed, shared false"]
    assert_same(shared, repeated)
    assert shared["totals"] == pytest.approx(repeated["totals"], rel=1e-4) and shared["totals"][3] > 0


def test_bf16_weights_leave_log_probabilities_and_weights_in_fp32(one):
    run = one["dapo in bf16"]
    hidden, weight, ids, *rest = run["dtypes"]["linear_clipped_surrogate"]
    assert hidden == weight == "torch.bfloat16" and ids == "torch.int64"
    assert [d for d in rest if "int64" not in d] == ["torch.float32"] * 3  # logp_old, advantage, weight
    assert run["loss"] == pytest.approx(one["dapo whole"]["loss"], rel=0.05)


@pytest.mark.parametrize("base", BASES)
def test_adapters_in_fp32_beside_a_base_in_bf16_are_computed_in_bf16_and_learn_in_fp32(one, base):
    run = one[f"lora {base} in bf16"]
    hidden, weight, *_ = run["dtypes"]["linear_clipped_surrogate"]
    assert hidden == weight == "torch.bfloat16" and set(run["trained"]) == {"torch.float32"}
    assert run["loss"] == pytest.approx(one["lora whole"]["loss"], rel=0.05)
    assert run["loss"] == one["lora replicated in bf16"]["loss"]


def test_the_third_non_finite_update_in_a_row_stops_and_names_the_saved_batch(one):
    stopped = one["dapo poisoned"]
    assert stopped["skipped_steps"] == 3 and stopped["updates"] is None
    assert "3 updates in a row" in stopped["error"] and "bad_batch_rank0" in stopped["error"]


def test_dropping_sequences_without_gradient_changes_nothing(one, two):
    kept, dropped = one["dapo, all kept"], one["dapo whole"]
    assert kept["grad_norm"] == pytest.approx(dropped["grad_norm"], rel=1e-6)
    assert kept["totals"][0] > dropped["totals"][0]  # the tokens really were left out
    assert_same(two["dapo removable"], dropped)


def test_answers_beyond_the_mask_are_left_out_and_still_counted_in_the_weights(one):
    none, few, each = (one[f"dapo, answers from {low}"] for low in ("0.9", "0.7", "0"))
    assert [run["removed_sequences"] for run in (none, few, each)] == [12, 11, 4]  # 4 have no advantage
    assert none["updates"] is None and few["totals"][0] == 8 < each["totals"][0]
    assert 0 < few["grad_norm"] < each["grad_norm"] / 2  # of a mean over the tokens of all


def test_four_updates_move_the_ratio_until_the_clip_binds(one):
    runs = {algo: [one[f"{algo} at {lr}"] for lr in RATES] for algo in ("dapo", "dr_grpo")}
    assert all(run["updates"] == 4 for algo in runs.values() for run in algo)
    dapo, dr_grpo = ([sum(r["totals"][i] for r in runs[algo]) for i in (1, 2)] for algo in ("dapo", "dr_grpo"))
    assert min(dapo) > 0 and min(dr_grpo) > 0
    assert dapo[1] < dr_grpo[1]  # clip_high 0.28 binds less often than 0.2


def test_weights_kept_gathered_are_those_of_the_last_update(one):
    """Old log-probabilities are scored, then four updates follow, each on the weights that the one before has left."""
    kept, anew = one["dapo, gathered for four updates"], one[f"dapo at {RATES[0]}"]
    assert kept["moved"] == pytest.approx(anew["moved"], rel=1e-9) and kept["updates"] == 4
    assert kept["totals"] == pytest.approx(anew["totals"], rel=1e-4)
    assert kept["loss"] == pytest.approx(anew["loss"], rel=1e-4)


def test_a_non_finite_loss_on_one_rank_skips_the_update_on_all(two):
    assert two["dapo poisoned"]["skipped_steps"] == 1 and two["dapo poisoned"]["updates"] is None


def test_checkpointed_layers_run_again_in_bf16_as_they_ran_first(two):
    """To the bit. Before torch 2.13 FSDP2 does not cast inputs or outputs when a layer runs again, so ours never do."""
    kept, again = (
        {k: two[f"bf16, checkpointed {on}"][k] for k in ("loss", "grad_norm", "moved", "totals")}
        for on in ("false", "true")
    )
    assert again == kept and kept["grad_norm"] > 1e-3
