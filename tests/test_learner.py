"""Updates: the same on one rank or two, whole or in pieces, with removable sequences or without them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALGOS = {
    "sft-like": ["--algo", "dr_grpo", "--clip_low", "1", "--clip_high", "1e9"],
    "grpo": ["--algo", "grpo"],
    "dr_grpo": ["--algo", "dr_grpo"],
    "dapo": ["--algo", "dapo"],
}
OFF_POLICY = ["--logp_old", "sampler"]
PIECES = {
    "one sequence at a time": ["--micro_batch", "1"],
    "pieces of five": ["--micro_batch", "5"],
    "reduced once": ["--micro_batch", "5", "--grad_sync", "last"],
    "checkpointed": ["--micro_batch", "5", "--activation_checkpointing", "true"],
    "eager": ["--micro_batch", "16", "--kernels", "eager"],
}


def launch(ranks: int, cases: list[dict]) -> list[dict]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/learner_script.py"), json.dumps(cases)],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))[8:])


@pytest.fixture(scope="module")
def one_rank():
    cases = [{"argv": argv + OFF_POLICY + ["--micro_batch", "16"], "share": [12]} for argv in ALGOS.values()]
    cases += [{"argv": ALGOS["grpo"] + OFF_POLICY + pieces, "share": [12]} for pieces in PIECES.values()]
    cases += [{"argv": ALGOS["dapo"] + OFF_POLICY + pieces, "share": [12]} for pieces in PIECES.values()]
    keep_all = ["--entropy_coef", "1e-30"]  # too small to matter, enough to keep every sequence in the body
    cases += [{"argv": ALGOS["dapo"] + OFF_POLICY + keep_all, "share": [12]}]
    four = ["--updates_per_rollout", "2", "--epochs", "2", "--lr", "4e-5"]
    cases += [{"argv": ALGOS[name] + four, "share": [12]} for name in ("dapo", "dr_grpo")]
    return launch(1, cases)


@pytest.fixture(scope="module")
def two_ranks():
    uneven = [{"argv": argv + OFF_POLICY + ["--micro_batch", "2"], "share": [10, 2]} for argv in ALGOS.values()]
    empty = [{"argv": argv + OFF_POLICY + ["--micro_batch", "4"], "share": [12, 0]} for argv in ALGOS.values()]
    removable = [{"argv": ALGOS["dapo"] + OFF_POLICY + ["--grad_sync", "last"], "share": [4, 8]}]
    poisoned = [{"argv": ALGOS["dapo"] + OFF_POLICY, "share": [6, 6], "poison": 1}]
    return launch(2, uneven + empty + removable + poisoned)


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
    assert_same(one_rank[4 + len(PIECES) + index], one_rank[3])


def test_dropping_sequences_without_gradient_changes_nothing(one_rank, two_ranks):
    kept = one_rank[4 + 2 * len(PIECES)]
    assert kept["grad_norm"] == pytest.approx(one_rank[3]["grad_norm"], rel=1e-6)
    assert kept["totals"][0] > one_rank[3]["totals"][0]  # the tokens really were left out
    assert_same(two_ranks[8], one_rank[3])


def test_four_updates_move_the_ratio_until_the_clip_binds(one_rank):
    dapo, dr_grpo = one_rank[-2:]
    assert dapo["updates"] == dr_grpo["updates"] == 4
    for counts in (dapo["totals"], dr_grpo["totals"]):
        assert counts[1] > 0 and counts[2] > 0
    assert dapo["totals"][2] < dr_grpo["totals"][2]  # clip_high 0.28 binds less often than 0.2


def test_a_non_finite_loss_on_one_rank_skips_the_update_on_all(two_ranks):
    assert two_ranks[9]["skipped_steps"] == 1 and two_ranks[9]["updates"] is None
