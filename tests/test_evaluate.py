"""Evaluation: pass@k against enumeration, and the command against a hand-counted result."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import model
from engine.evaluate import pass_at_k

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (5, 4, 2), (6, 6, 4), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_command_writes_json_with_greedy_accuracy_and_pass_at_k(tmp_path):
    rows = [{"prompt": "Mia has 1 pens.", "answer": "7"}, {"prompt": "Tom has 2 pens.", "answer": "8"}]
    data = tmp_path / "two.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model.export_model(model.load_model("tiny", 0, torch.float32), model.tiny_tokenizer(), tmp_path / "lm")
    options = [
        "--model",
        str(tmp_path / "lm"),
        "--task",
        "jsonl",
        "--test_data",
        str(data),
        "--max_new_tokens",
        "4",
        "--samples",
        "3",
    ]
    command = [sys.executable, "-m", "engine.evaluate", *options, "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(done.stdout) == result
    assert result["greedy"]["problems"] == 2 and result["greedy"]["accuracy"] in (0.0, 0.5, 1.0)
    assert set(result["sampled"]) >= {"pass@1", "pass@2", "accuracy"} and result["greedy"]["length"] <= 4
