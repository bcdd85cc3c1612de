"""Long repetitions that `make test` has no time for; exits non-zero at the first failure.

python -m tests.soak kills 20     kill -9 at random moments of a run, resume, compare metrics and weights to the bit
python -m tests.soak exits 100    two-rank runs in a row, each of which must exit 0

A third argument names the JSON file of facts that bench.report prints; what it holds of the other kind stays.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from bench.run import provenance
from engine.log import read_rows
from tests.test_train import SMALL, rows, run, start

STEPS = 12


def trained(folder: Path) -> int:
    """Training steps that a run's metrics hold."""
    return len([r for r in read_rows(folder / "metrics.jsonl") if "eval" not in r])


def kills(times: int, out: Path, model: Path) -> None:
    algos, chance = ("grpo", "dapo", "dr_grpo", "sft"), random.Random(0)
    for i in range(times):
        args = ["--algo", algos[i % 4], "--model", model, "--out", out, "--seed", i // 4, *SMALL]
        args += ["--steps", STEPS, "--save_every", 1, "--lr", "1e-3", "--step_tokens", 1024, "--lag", i // 2 % 2]
        run(*args, "--name", f"whole{i}")
        done = 0
        killed_at = sorted(chance.sample(range(1, STEPS), 2))
        for stop in killed_at:
            process = start(*args, "--name", f"cut{i}", "--resume", "auto")
            while done < stop:
                assert process.poll() is None, process.communicate()
                done = trained(out / f"cut{i}")
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.3))  # anywhere in the next step: rollout, update, save
            process.kill()
            process.communicate()
        run(*args, "--name", f"cut{i}", "--resume", "auto")
        assert rows(out / f"cut{i}") == rows(out / f"whole{i}"), f"run {i}: metrics differ"
        weights = [(out / f"{name}{i}/export/model.safetensors").read_bytes() for name in ("whole", "cut")]
        assert weights[0] == weights[1], f"run {i}: weights differ"
        print(
            f"{i + 1}/{times} {algos[i % 4]}: killed in the steps after {killed_at}, then bit for bit the same",
            flush=True,
        )


def exits(times: int, out: Path, model: Path) -> None:
    for i in range(times):
        begun = time.monotonic()
        args = ["--algo", "grpo", "--model", model, "--steps", 1, "--out", out, "--name", f"exit{i}", *SMALL]
        run(*args, "--eval_size", 0, ranks=2)
        print(f"{i + 1}/{times} exit 0 after {time.monotonic() - begun:.1f} s", flush=True)


WHAT = {
    "kills": "runs killed twice with SIGKILL at random moments, then equal to an unbroken run to the bit "
    "(grpo, dapo, dr_grpo, sft; lag 0 and 1)",
    "exits": "two-rank runs in a row that exit 0",
}


def note(path: Path, kind: str, times: int) -> None:
    """Writes what was seen as a fact, with where it was seen."""
    facts = json.loads(path.read_text())["facts"] if path.exists() else []
    facts = [fact for fact in facts if fact["what"] != WHAT[kind]]
    facts.append({"what": WHAT[kind], "measured": f"{times} of {times}"})
    source = provenance("cpu", 1, sys.argv[1:], "tests.soak")
    path.write_text(json.dumps({"provenance": source, "facts": facts}, indent=1) + "\n")


def main(kind: str, times: str, path: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run("--algo", "sft", "--steps", 30, "--out", out, "--name", "sft", *SMALL)
        {"kills": kills, "exits": exits}[kind](int(times), out, out / "sft/export")
    if path:
        note(Path(path), kind, int(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
