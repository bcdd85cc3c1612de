"""All that is to be seen of a machine with a GPU, in one command: tests, tables, captures.

    python -m bench.gpu [-o DIR] [--minutes 25] [--parts NAME ...] [--dry-run]

Every part has its own time limit and log, and loses nobody else's results. DIR gets four files: cuda.json (what
bench.report reads, once it is in bench/results), cuda-summary.json and .md, and cuda-logs.tar.gz with logs, captures
and their reports. With --parts the other parts keep what they left before. Without a git checkout, BENCH_COMMIT names
the commit. Exit code: 1 when a part failed or ran out of time, 2 without a GPU.
"""

import argparse
import glob
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from . import BENCHES
from .harness import Experiment
from .report import markdown
from .run import known, provenance
from .table import seconds

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "gpu"
ARCHIVE_BYTES = 15 << 20
STAND_IN = WORK / "stand-in"
MINUTES = {  # of a benchmark; others 2
    "linear_logprob": 4.0, "linear_clipped_surrogate": 5.0, "step": 4.0, "overlap": 4.0, "decoding": 4.0,
}  # fmt: skip
EXPERIMENTS = ("step", "overlap", "decoding")
PYTHON = sys.executable


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other until one fails, for so many minutes together."""

    name: str
    minutes: float
    commands: tuple
    needs: str = ""  # a program


def bench_part(name, work):
    """Its JSON holds the cases that were done when the time ran out."""
    command = [PYTHON, "-m", "bench.run", name, "--device", "cuda", "--dtype", "bf16", "--json", f"{work / name}.json"]
    return Part(name, MINUTES.get(name, 2.0), (command,))


def capture_part(name, tool, work, *settings):
    """Three steps of train.py on a model of a real shape under a profiler."""
    folder = work / f"capture-{name}"
    train = [
        "train.py", "--algo", "grpo", "--model", STAND_IN, "--rewards", "bench/alternate.py:alternate", "--beta", 0,
        "--max_new_tokens", 128, "--micro_batch", 16, "--steps", 6, "--eval_size", 0, "--tensorboard", "false",
        "--out", work / "train", "--name", name, *settings,
    ]  # fmt: skip
    profiled = [PYTHON, "profiling/capture.py", "--tool", tool, "--steps", "3:6", "-o", folder, "--", *train]
    return Part(f"capture-{name}", 3.0, (["rm", "-rf", folder, work / "train" / name], profiled))


def report_part(name, a, b, work):
    pair = [work / f"capture-{side}" for side in (a, b)]
    return Part(
        f"report-{name}", 1.0,
        ([PYTHON, "profiling/report.py", *pair, "--labels", f"{a},{b}", "-o", work / f"report-{name}"],),
    )  # fmt: skip


def ncu_part(name, work):
    folder = work / f"ncu-{name}"
    profiled = [PYTHON, "profiling/capture.py", "--tool", "ncu", "--whole", "--ranges", name, "-o", folder, "--"]
    return Part(f"ncu-{name}", 1.5, (["rm", "-rf", folder], [*profiled, "-m", "bench.once", name]), needs="ncu")


def plan(work):
    """The parts, the most wanted first."""
    pure = [name for name, bench in BENCHES.items() if not isinstance(bench, Experiment) and bench.sizes["cuda"]]
    experiments = [name for name in EXPERIMENTS if name in BENCHES]
    fused = [name for name in pure if any("fused" in rival for rival in BENCHES[name].rivals)]
    tool = "nsys" if installed("nsys") else "torch"
    return [
        Part("tests", 5.0, ([PYTHON, "-m", "pytest", "tests", "-m", "gpu", "-q"],)),
        *[bench_part(name, work) for name in (*pure, *experiments)],
        Part("stand-in", 1.0, ([PYTHON, "-m", "bench.stand_in", "qwen2.5-0.5b", STAND_IN],)),
        capture_part("eager", tool, work, "--kernels", "eager"),
        capture_part("fused", tool, work, "--kernels", "fused"),
        capture_part("beside", tool, work, "--kernels", "fused", "--lag", 1),
        report_part("kernels", "eager", "fused", work),
        report_part("lag", "fused", "beside", work),
        *[ncu_part(name, work) for name in fused],
    ]


def installed(program):
    places = (f"/usr/local/cuda*/bin/{program}", f"/opt/nvidia/nsight-*/**/{program}")
    return bool(shutil.which(program) or any(glob.glob(place, recursive=True) for place in places))


def run_command(command, log, deadline):
    """-> its exit code, or None when the deadline came; nothing of its process group stays."""
    child = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        return child.wait(max(0.0, deadline - monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()


def run_part(part, work, most_seconds):
    """-> {"part", "status", "seconds", "said"}: ok | failed | timed out | absent; said is the log's last line."""
    start, log = monotonic(), work / f"{part.name}.log"
    row = {"part": part.name, "status": "ok", "seconds": 0.0, "said": ""}
    if part.needs and not installed(part.needs):
        return row | {"status": "absent", "said": f"{part.needs} is not installed"}
    deadline = start + min(60 * part.minutes, most_seconds)
    with log.open("w") as file:
        for command in part.commands:
            code = run_command(command, file, deadline)
            if code != 0:
                row["status"] = "timed out" if code is None else "failed"
                break
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("{")]
    return row | {"seconds": monotonic() - start, "said": said[-1].strip()[:160] if said else ""}


def run_parts(parts, work, minutes):
    """-> a row per part; what there is no time left for is a row that says so."""
    rows, end = [], monotonic() + 60 * minutes
    for part in parts:
        left = end - monotonic()
        if left <= 0:
            rows.append({"part": part.name, "status": "timed out", "seconds": 0.0, "said": "no time was left for it"})
            continue
        print(f"{part.name}: at most {min(60 * part.minutes, left):.0f} s", flush=True)
        rows.append(run_part(part, work, left))
        print(f"{part.name}: {rows[-1]['status']}, {rows[-1]['said']}", flush=True)
    return rows


def collect(work):
    """The cases of all tables in one file of the form of bench.run's."""
    files = [json.loads(path.read_text()) for path in sorted(work.glob("*.json")) if path.stem in BENCHES]
    return [case for file in files for case in file["cases"]]


def archive(work, path):
    """Logs, captures and reports, the largest left out until it is small enough -> the names of those."""
    kept = [file for file in work.rglob("*") if file.is_file() and wanted(file.relative_to(work))]
    kept.sort(key=lambda file: file.stat().st_size)
    left_out = []
    while True:
        with tarfile.open(path, "w:gz") as tar:
            for file in kept:
                tar.add(file, Path("gpu") / file.relative_to(work))
        if path.stat().st_size <= ARCHIVE_BYTES:
            return left_out
        left_out.append(str(kept.pop().relative_to(work)))


def wanted(path):
    return path.parts[0].startswith(("capture-", "report-", "ncu-")) or path.suffix == ".log"


def write(out, work, rows, about):
    """The four files."""
    out.mkdir(parents=True, exist_ok=True)
    left_out = archive(work, out / "cuda-logs.tar.gz")
    cases = collect(work)
    if cases:
        (out / "cuda.json").write_text(json.dumps({"provenance": about, "cases": cases}, indent=1) + "\n")
    summary = {"provenance": about, "parts": rows, "left_out": left_out}
    (out / "cuda-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [[row["part"], row["status"], seconds(row["seconds"]), row["said"]] for row in rows]
    table = markdown(["part", "outcome", "time", "last line"], lines)
    flat = about | {"versions": ", ".join(f"{name} {x}" for name, x in about["versions"].items() if x)}
    where = "\n".join(f"- {name}: {value}" for name, value in flat.items() if value)
    (out / "cuda-summary.md").write_text(f"# GPU run\n\n{where}\n\n{table}\n")


def before(work, names):
    """The rows that parts not in `names` left in an earlier run."""
    path = work / "summary.json"
    return [row for row in json.loads(path.read_text()) if row["part"] not in names] if path.exists() else []


def run(parts, chosen, out, work, minutes, about):
    """Runs the chosen parts -> exit code."""
    if len(chosen) == len(parts):
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    kept = before(work, chosen)
    rows = run_parts([part for part in parts if part.name in chosen], work, minutes)
    order = [part.name for part in parts]
    rows = sorted([*kept, *rows], key=lambda row: order.index(row["part"]))
    (work / "summary.json").write_text(json.dumps(rows) + "\n")
    write(out, work, rows, about)
    print((out / "cuda-summary.md").read_text())
    return int(any(row["status"] in ("failed", "timed out") for row in rows))


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "runs" / "gpu-results")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these; the others keep their earlier results")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    args = parser.parse_args(argv)
    parts = plan(WORK)
    try:
        chosen = [known("part", name, [part.name for part in parts]) for name in args.parts or [p.name for p in parts]]
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.dry_run:
        for part in parts:
            if part.name in chosen:
                print(f"{part.name}, at most {part.minutes:g} min", *[shlex.join(map(str, c)) for c in part.commands],
                      sep="\n    ")  # fmt: skip
        return 0
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here; --dry-run prints what would be run.", file=sys.stderr)
        return 2
    return run(parts, chosen, args.out, WORK, args.minutes, provenance("cuda", None, argv, "bench.gpu"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
