"""Does a rollout one version behind learn as well? GRPO on the embedded task at lag 0 and lag 1, from the same starts.

    python -m bench.lag [--seeds 0 1 2 3 4] [--out runs/learning] [--threads 1]

Prints a table and writes <out>/lag.json: held-out accuracies per seed, and the mean difference of the pairs with its
standard error. "Within the noise" says that 0 lies inside the 95% interval of Student's t over the pairs.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

from .learning import FIELDS, run, table
from .run import provenance

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # of n pairs


def compare(rows: list[dict], key: str) -> dict:
    """The mean over seeds of lag 1 less lag 0, with its standard error."""
    pairs = zip(*([row[key] for row in rows if row["algo"] == f"grpo, lag {lag}"] for lag in (0, 1)), strict=True)
    gaps = [one - zero for zero, one in pairs]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    mean = statistics.mean(gaps)
    return {"mean": mean, "standard_error": error, "within_noise": abs(mean) <= T_95[len(gaps)] * error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if len(args.seeds) not in T_95:
        parser.error(f"give 2 to {max(T_95)} seeds, not {len(args.seeds)}")
    rows = []
    for seed in args.seeds:
        for lag in (0, 1):
            words = f"--algo grpo --lag {lag} --seed {seed} --threads {args.threads}".split()
            rows.append(run(args.out, f"grpo-lag{lag}-seed{seed}", *words) | {"algo": f"grpo, lag {lag}"})
    gaps = {key: compare(rows, key) for key in (FIELDS[1], FIELDS[3])}
    print(table(rows))
    device = "cpu" if rows[0]["device"] == "cpu" else "cuda"
    about = provenance(device, args.threads, sys.argv[1:], "bench.lag")
    results = {"provenance": about, "rows": rows, "lag 1 less lag 0": gaps}
    (args.out / "lag.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
