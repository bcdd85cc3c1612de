"""Does it learn? Algorithms x seeds on the embedded task, beside SFT continued for the same wall time.

    python -m bench.learning [--algos grpo grpo-lora8] [--seeds 0 1 2] [--out runs/learning] [--threads 0]

The algorithms are those of RUNS. Each seed gets its own SFT start; the control trains on more traces from that start
for as long as the seed's slowest RL run took. A run that is there is not made again; each row says of which commit it
is. Prints a table, writes <out>/learning.json and <out>/learning.png, and prints the JSON last.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from engine.folder import LAUNCH_LOG, have_run

from .run import provenance

FIELDS = (
    "accuracy_before",
    "accuracy_after",
    "accuracy_before_sampled",
    "accuracy_after_sampled",
    "wall_seconds",
    "steps",
)
RUNS = {
    "grpo": ("--algo", "grpo"),
    "dr_grpo": ("--algo", "dr_grpo"),
    "dapo": ("--algo", "dapo"),
    "dpo": ("--algo", "dpo"),
    "grpo-lora8": ("--algo", "grpo", "--lora_rank", 8, "--lr", 2e-3),
}
CONTROL, CONTROL_LR = "sft continued", 1e-3


def train(*argv: object) -> None:
    subprocess.run([sys.executable, "train.py", "--tensorboard", "false", *map(str, argv)], check=True)


def run(out: Path, name: str, *argv: object) -> dict:
    """The summary of a run, made unless it is there."""
    have_run(out / name, lambda: train("--out", out, "--name", name, "--resume", "auto", *argv))
    summary = json.loads((out / name / "summary.json").read_text())
    launch = json.loads((out / name / LAUNCH_LOG).read_text().splitlines()[-1])
    found = {key: summary[key] for key in (*FIELDS, "seed", "device", "world_size", "versions")}
    return {"name": name} | found | {key: launch[key] for key in ("commit", "uncommitted")}


def run_seed(out: Path, algos: list[str], seed: int, threads: int) -> list[dict]:
    common = ("--seed", seed, "--threads", threads)
    rows = [run(out, f"{algo}-seed{seed}", *RUNS[algo], *common) | {"algo": algo} for algo in algos]
    start = out / f"sft-tiny-seed{seed}"
    sft = json.loads((start / "summary.json").read_text())
    steps = round(max(r["wall_seconds"] for r in rows) / (sft["wall_seconds"] / sft["steps"]))
    settings = ("--step_tokens", 2048, "--micro_tokens", 2048, "--lr", CONTROL_LR, "--steps", steps)
    control = run(out, f"control-seed{seed}", "--algo", "sft", "--model", start / "export", *settings, *common)
    before = {key: rows[0][key] for key in FIELDS[:4:2]}  # the same start, evaluated once
    return [*rows, control | before | {"algo": CONTROL}]


def table(rows: list[dict]) -> str:
    lines = [
        "| algorithm | seed | sampled before | sampled after | greedy before | greedy after | seconds |",
        "|" + "---|" * 7,
    ]
    for r in rows:
        cells = [r["algo"], r["seed"], *(f"{100 * r[k]:.1f}%" for k in (FIELDS[2], FIELDS[3], FIELDS[0], FIELDS[1]))]
        lines.append("| " + " | ".join(map(str, [*cells, f"{r['wall_seconds']:.0f}"])) + " |")
    return "\n".join(lines)


def plot(out: Path, rows: list[dict]) -> None:
    """Held-out accuracy over RL steps: a line per run, the control's end as dashes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {algo: f"C{i}" for i, algo in enumerate(RUNS)} | {CONTROL: "gray"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, mode in zip(axes, ("sampled", "greedy"), strict=True):
        for row in rows:
            if row["algo"] == CONTROL:
                axis.axhline(
                    row["accuracy_after_sampled" if mode == "sampled" else "accuracy_after"],
                    color="gray",
                    ls="--",
                    lw=1,
                )
                continue
            lines = (out / row["name"] / "metrics.jsonl").read_text().splitlines()
            points = [(r["step"], r["accuracy"]) for r in map(json.loads, lines) if r.get("eval") == mode]
            axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, color=colours[row["algo"]])
        axis.set(title=f"{mode} accuracy on 512 held-out problems", xlabel="RL step", ylim=(0.4, 1.01))
        axis.grid(alpha=0.25)
    for algo in dict.fromkeys(row["algo"] for row in rows):
        axes[1].plot([], [], color=colours[algo], ls="--" if algo == CONTROL else "-", label=algo)
    axes[1].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(out / "learning.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--algos", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    rows = [row for seed in args.seeds for row in run_seed(args.out, args.algos, seed, args.threads)]
    plot(args.out, rows)
    print(table(rows))
    kind = "cpu" if rows[0]["device"] == "cpu" else "cuda"
    results = {"provenance": provenance(kind, args.threads or None, sys.argv[1:], "bench.learning"), "rows": rows}
    (args.out / "learning.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
