"""Updates: the same on one rank or two, whole or in pieces, with removable sequences or without them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
ALGOS = {
    "sft": ["--algo", "sft"],
    "grpo": ["--algo", "grpo"],
    "dr_grpo": ["--algo", "dr_grpo"],
    "dapo": ["--algo", "dapo"],
}
OFF_POLICY = ["--logp_old", "sampler"]
RATES = ("2e-5", "4e-5", "6e-5", "1e-4")
PIECES = {
    "one sequence at a time": ["--micro_batch", "1"],
    "pieces of five": ["--micro_batch", "5"],
    "reduced once": ["--micro_batch", "5", "--grad_sync", "last"],
    "kept gathered": ["--micro_batch", "5", "--reshard_after_forward", "false", "--grad_sync", "last"],
    "prompts shared": ["--micro_batch", "5", "--share_prompts", "true"],
    "prompts repeated": ["--micro_batch", "5", "--share_prompts", "false"],
    "checkpointed": ["--micro_batch", "5", "--activation_checkpointing", "true"],
    "eager": ["--micro_batch", "16", "--kernels", "eager"],
    "compiled": ["--micro_batch", "16", "--compile", "true"],
}


def launch(ranks: int, cases: list[dict]) -> list[dict]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(ROOT / "tests/learner_script.py", json.dumps(cases), ranks=ranks),
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))[8:])


@pytest.fixture(scope="module")
def one_rank():
    cases = [{"argv": argv + OFF_POLICY + ["--micro_batch", "16"], "share": [12]} for argv in ALGOS.values()]
    cases += [{"argv": ALGOS["grpo"] + OFF_POLICY + pieces, "share": [12]} for pieces in PIECES.values()]
    cases += [{"argv": ALGOS["dapo"] + OFF_POLICY + pieces, "share": [12]} for pieces in list(PIECES.values())[:-1]]
    cases += [{"argv": ALGOS["sft"] + PIECES["pieces of five"], "share": [12]}]
    keep_all = ["--entropy_coef", "1e-30"]  # too small to matter, enough to keep every sequence in the body
    cases += [{"argv": ALGOS["dapo"] + OFF_POLICY + keep_all, "share": [12]}]
    cases += [{"argv": ALGOS["dapo"] + OFF_POLICY + ["--kernels", "eager"], "share": [12], "bf16": True}]
    cases += [{"argv": ALGOS["dapo"] + OFF_POLICY, "share": [12], "poison": 0, "steps": 3}]
    four = ["--updates_per_rollout", "2", "--epochs", "2", "--lr"]
    cases += [{"argv": ALGOS["dapo"] + four + [RATES[0]] + PIECES["kept gathered"][2:], "share": [12]}]
    cases += [
        {"argv": ALGOS["grpo"] + ["--logp_old", "recompute", "--share_prompts", share], "share": [12]}
        for share in ("true", "false")
    ]
    cases += [{"argv": ALGOS[name] + four + [lr], "share": [12]} for name in ("dapo", "dr_grpo") for lr in RATES]
    return launch(1, cases)


@pytest.fixture(scope="module")
def two_ranks():
    uneven = [{"argv": argv + OFF_POLICY + ["--micro_batch", "2"], "share": [10, 2]} for argv in ALGOS.values()]
    empty = [{"argv": argv + OFF_POLICY + ["--micro_batch", "4"], "share": [12, 0]} for argv in ALGOS.values()]
    removable = [{"argv": ALGOS["dapo"] + OFF_POLICY + ["--grad_sync", "last"], "share": [4, 8]}]
    poisoned = [{"argv": ALGOS["dapo"] + OFF_POLICY, "share": [6, 6], "poison": 1}]
    checkpointed = ["--micro_batch", "2", "--activation_checkpointing"]
    bf16 = [
        {"argv": ALGOS["grpo"] + OFF_POLICY + checkpointed + [on], "share": [6, 6], "bf16": True}
        for on in ("false", "true")
    ]
    return launch(2, uneven + empty + removable + poisoned + bf16)


def assert_same(a: dict, b: dict) -> None:
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert a["grad_norm"] > 1e-3 and a["updates"] == 1


@pytest.mark.parametrize("index", range(4), ids=ALGOS)
def test_two_ranks_with_uneven_work_equal_one(one_rank, two_ranks, index):
    assert_same(two_ranks[index], one_rank[index])
    assert two_ranks[index]["totals"] == pytest.approx(one_rank[index]["totals"], rel=1e-4)


@pytest.mark.parametrize("index", range(4), ids=ALGOS)
def test_a_rank_without_any_sequence_takes_part(one_rank, two_ranks, index):
    assert_same(two_ranks[4 + index], one_rank[index])


@pytest.mark.parametrize("index", range(len(PIECES)), ids=PIECES)
def test_micro_batches_do_not_change_the_gradient(one_rank, index):
    assert_same(one_rank[4 + index], one_rank[1])
    if index < len(PIECES) - 1:  # dapo and sft too, without compiling again
        assert_same(one_rank[4 + len(PIECES) + index], one_rank[3])
        assert_same(one_rank[3 + 2 * len(PIECES)], one_rank[0])
    assert all(not name.startswith("_") and "_orig" not in name for name in one_rank[4 + index]["names"])


def test_recomputed_log_probabilities_do_not_depend_on_shared_prompts(one_rank):
    """The old policy's and the reference's, read back from rows that hold a group each."""
    shared, repeated = one_rank[-10:-8]
    assert_same(shared, repeated)
    assert shared["totals"] == pytest.approx(repeated["totals"], rel=1e-4)


def test_bf16_weights_leave_log_probabilities_and_weights_in_fp32(one_rank):
    hidden, weight, ids, *rest = one_rank[5 + 2 * len(PIECES)]["dtypes"]["linear_clipped_surrogate"]
    assert hidden == weight == "torch.bfloat16" and ids == "torch.int64"
    assert [d for d in rest if "int64" not in d] == ["torch.float32"] * 3  # logp_old, advantage, weight
    assert one_rank[5 + 2 * len(PIECES)]["loss"] == pytest.approx(one_rank[3]["loss"], rel=0.05)


def test_the_third_non_finite_update_in_a_row_stops_and_names_the_saved_batch(one_rank):
    stopped = one_rank[6 + 2 * len(PIECES)]
    assert (
        stopped["skipped_steps"] == 3
        and "3 updates in a row" in stopped["error"]
        and "bad_batch_rank0" in stopped["error"]
    )


def test_dropping_sequences_without_gradient_changes_nothing(one_rank, two_ranks):
    kept = one_rank[4 + 2 * len(PIECES)]
    assert kept["grad_norm"] == pytest.approx(one_rank[3]["grad_norm"], rel=1e-6)
    assert kept["totals"][0] > one_rank[3]["totals"][0]  # the tokens really were left out
    assert_same(two_ranks[8], one_rank[3])


def test_four_updates_move_the_ratio_until_the_clip_binds(one_rank):
    assert all(run["updates"] == 4 for run in one_rank[-8:])
    dapo, dr_grpo = ([sum(r["totals"][i] for r in runs) for i in (1, 2)] for runs in (one_rank[-8:-4], one_rank[-4:]))
    assert min(dapo) > 0 and min(dr_grpo) > 0
    assert dapo[1] < dr_grpo[1]  # clip_high 0.28 binds less often than 0.2


def test_weights_kept_gathered_are_those_of_the_last_update(one_rank):
    """Old log-probabilities are scored, then four updates follow, each on the weights that the one before has left."""
    kept, anew = one_rank[-11], one_rank[-8]
    assert kept["moved"] == pytest.approx(anew["moved"], rel=1e-9) and kept["updates"] == 4
    assert kept["totals"] == pytest.approx(anew["totals"], rel=1e-4)
    assert kept["loss"] == pytest.approx(anew["loss"], rel=1e-4)


def test_a_non_finite_loss_on_one_rank_skips_the_update_on_all(two_ranks):
    assert two_ranks[9]["skipped_steps"] == 1 and two_ranks[9]["updates"] is None


def test_checkpointed_layers_run_again_in_bf16_as_they_ran_first(two_ranks):
    """To the bit. Before torch 2.13 FSDP2 does not cast inputs or outputs when a layer runs again, so ours never do."""
    kept, again = ({k: run[k] for k in ("loss", "grad_norm", "moved", "totals")} for run in two_ranks[10:12])
    assert again == kept and kept["grad_norm"] > 1e-3
