"""Does a teacher lift a smaller student above what traces teach it? Off and on policy, on the embedded task.

    python -m bench.teachers [--seeds 0 1 2] [--out runs/learning] [--threads 1]

The teacher of a seed is bench.learning's run of GRPO. The student, of half its width, begins with traces, of which 40%
are wrong, and goes on as WAYS says. A run that is there is not made again. Prints a table, writes
<out>/teachers.json, and prints the JSON last.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from engine.config import own_model

from .learning import RUNS, run, table
from .run import provenance

TINY = own_model("tiny")
STUDENT = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Its shape, in all else the embedded model's."""
TRACES, ANSWERS = ("--config", TINY / "sft.yaml", "--lr", 1e-3), ("--config", TINY / "rl.yaml", "--eval_every", 0)
KL = ("--context", "zeroshot", "--match", "kl", "--match_coef", 4)
WAYS = {
    "student-sft": ("student", "--algo", "sft", *TRACES, "--steps", 300),
    "student-distill": ("student", "--algo", "distill", *TRACES, "--steps", 300, *KL),
    "student-sft-longer": ("student-sft", "--algo", "sft", *TRACES, "--steps", 400),
    "student-opd": ("student-sft", "--algo", "opd", *ANSWERS, "--steps", 160, "--lr", 5e-4, "--prompts_per_step", 32),
}
"""Run: the one that it begins with the weights of, and its settings."""


def make_student(folder: Path) -> Path:
    """A model's folder without weights."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.yaml"), dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | STUDENT, indent=2) + "\n")
    return folder


def run_seed(out: Path, seed: int, threads: int) -> list[dict]:
    common = ("--seed", seed, "--threads", threads)
    teacher = run(out, f"grpo-seed{seed}", *RUNS["grpo"], *common)
    common += ("--model", make_student(out / "student"))
    run(out, f"student-seed{seed}", "--algo", "sft", "--config", TINY / "sft.yaml", *common)
    rows = [teacher | {"algo": "the teacher"}]
    for way, (start, *settings) in WAYS.items():
        begin = ("--init_from", out / f"{start}-seed{seed}" / "export")
        taught = () if "sft" in settings else ("--teacher", out / teacher["name"] / "export")
        rows.append(run(out, f"{way}-seed{seed}", *settings, *begin, *taught, *common) | {"algo": way})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = [row for seed in args.seeds for row in run_seed(args.out, seed, args.threads)]
    print(table(rows))
    device = "cpu" if rows[0]["device"] == "cpu" else "cuda"
    results = {"provenance": provenance(device, args.threads, sys.argv[1:], "bench.teachers"), "rows": rows}
    (args.out / "teachers.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
