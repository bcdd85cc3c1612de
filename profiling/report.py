"""Compares captures of the same loop by its ranges: a table, a page, a Perfetto trace and a verdict.

python profiling/report.py A B [C ...] [--labels a,b,c] -o DIR [--title T] [--min-speedup update=1.2 ...]

A, B, ... are folders of capture.py, nsys SQLite, .nsys-rep, ncu CSV, .ncu-rep or torch.profiler JSON (.gz). Captures
with equal labels stand for one variant: repeats of each other, or a timeline and ncu's counters.
Exit code: 1 when a --min-speedup is missed and for nothing else, 2 on bad input, 3 on a fault of this program.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import page
import timeline
from capture import find_tool
from ncu import read_csv, read_report
from sections import Variant, device_line, scrub, show_change, verdict
from summary import STEP, Summary, changes_of, summarize
from traces import BadInput, Trace, number, read_kineto, read_nsys, whole

OURS = ("provenance.json", "bytes.json")
VERDICT = "verdict.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captures", nargs="+", type=Path)
    parser.add_argument("--labels", help="one per capture, separated by commas; default: their names")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--title", default="")
    gate = "fails unless every later capture is X times as fast as the first in this range, beyond the spread"
    parser.add_argument("--min-speedup", action="append", default=[], metavar="RANGE=X", help=gate)
    args = parser.parse_args()
    try:
        check_out(args.out)
        wanted = [parse_gate(text) for text in args.min_speedup]
        variants = load(args.captures, labels_of(args))
        gates = [check_gate(name, least, variants[0], v) for name, least in wanted for v in variants[1:]]
        write(args.out, args.title or " against ".join(reversed([v.label for v in variants])), variants, gates)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join([device_line(variants), *verdict(variants), *(gate["sentence"] for gate in gates)]))
    return 0 if all(gate["passed"] for gate in gates) else 1


def check_out(out: Path) -> None:
    """Of a folder that holds something else, a capture above all, files of these names would be lost."""
    if out.is_dir() and any(out.iterdir()) and not (out / VERDICT).exists():
        raise BadInput(f"{out} holds something and no report, so it stays as it is; name another folder with -o.")


def labels_of(args) -> list[str]:
    labels = [label.strip() for label in args.labels.split(",")] if args.labels else [c.stem for c in args.captures]
    if len(labels) != len(args.captures) or not all(labels):
        raise BadInput(f"--labels gives {len(labels)} labels for {len(args.captures)} captures; give one for each.")
    if not args.labels and len(set(labels)) < len(labels):
        raise BadInput(f"The captures have the same name {labels[0]!r}; tell them apart with --labels.")
    if len(set(labels)) < 2:
        raise BadInput("A comparison needs two captures with different labels.")
    return labels


def load(paths: list[Path], labels: list[str]) -> list[Variant]:
    """The variants in the order of their labels."""
    variants = {label: Variant(label, [], []) for label in labels}
    for path, label in zip(paths, labels):
        trace = read(path)
        trace.label = label
        variants[label].traces.append(trace)
        if trace.tool != "ncu":
            variants[label].summaries.append(summarize(trace))
    return list(variants.values())


def read(path: Path) -> Trace:
    """The trace in a capture's folder or file, with the provenance beside it."""
    if not path.exists():
        raise BadInput(f"There is no capture {path}.")
    folder = path if path.is_dir() else path.parent
    files = files_of(path) if path.is_dir() else [path]
    trace = read_files(files)
    trace.provenance = {"tool": trace.tool} | read_ours(folder / "provenance.json")
    trace.bytes_model = {
        name: size for name, count in read_ours(folder / "bytes.json").items() if (size := number(count))
    }
    if peak := whole(trace.provenance.get("peak_resident_bytes")):
        trace.peaks["process, resident, whole run with the profiler"] = peak
    return trace


def files_of(folder: Path) -> list[Path]:
    """What a folder holds of the first kind found: an export before the report it was made from."""
    for pattern in ("*.sqlite", "*.nsys-rep", "*.csv", "*.ncu-rep", "*.json*"):
        found = sorted(file for file in folder.glob(pattern) if file.name not in OURS)
        if found:
            return found
    raise BadInput(f"{folder} holds no capture: make one with profiling/capture.py.")


def read_files(files: list[Path]) -> Trace:
    name = files[0].name
    with tempfile.TemporaryDirectory() as aside:
        if name.endswith((".json", ".json.gz")):
            return read_kineto(files)
        if len(files) > 1:
            raise BadInput(f"{files[0].parent} holds {len(files)} captures; name one of them.")
        if name.endswith(".nsys-rep"):
            return read_nsys(export_nsys(files[0], Path(aside)))
        if name.endswith((".sqlite", ".db")):
            return read_nsys(files[0])
        if name.endswith(".csv"):
            return read_csv(files[0])
        if name.endswith(".ncu-rep"):
            return read_report(files[0], find_tool("ncu"), Path(aside))
    raise BadInput(f"{name} is of no known kind: .sqlite, .nsys-rep, .csv, .ncu-rep, .json or .json.gz.")


def export_nsys(path: Path, aside: Path) -> Path:
    nsys = find_tool("nsys")
    if not nsys:
        raise BadInput(f"Reading {path.name} needs the program nsys; export it to SQLite where there is one.")
    made = aside / "capture.sqlite"
    command = [nsys, "export", "--type", "sqlite", "-o", str(made), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if not made.exists():
        raise BadInput(f"nsys could not export {path.name}: {(done.stderr or done.stdout).strip()[-300:]}")
    return made


def read_ours(path: Path) -> dict:
    """What capture.py or a benchmark wrote beside a capture; {} where it wrote nothing."""
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({error}).") from None
    if not isinstance(known, dict):
        raise BadInput(f"{path} must hold names and values, as capture.py writes it.")
    return known


def parse_gate(text: str) -> tuple[str, float]:
    name, _, least = text.partition("=")
    if not (number(least) or 0) > 0:
        raise BadInput(f"--min-speedup must read RANGE=NUMBER, as update=1.2; not {text!r}.")
    return name, float(least)


def check_gate(name: str, least: float, first: Variant, other: Variant) -> dict:
    """A gate above 1 also fails when the difference is within the spread."""
    changes = changes_of(first.summaries, other.summaries)
    change = changes.get(name)
    if change is None or not change.speedup:
        known = ", ".join(n for n, c in changes.items() if c.speedup) or "none"
        raise BadInput(
            f"--min-speedup {name}: {first.label} and {other.label} share no range {name!r}; they share {known}."
        )
    passed = change.speedup >= least and (least <= 1 or change.verdict in ("faster", "unknown"))
    asked = f"{least:g}x faster" if least > 1 else f"at most {1 / least:.3g}x slower" if least < 1 else "no slower"
    sentence = f"{'Passed' if passed else 'FAILED'}: {other.label} at {name}: {show_change(change)}; asked: {asked}."
    found = {"got": change.speedup, "verdict": change.verdict, "passed": passed, "sentence": sentence}
    return {"range": name, "label": other.label, "asked": least, **found}


def verdict_of(variants: list[Variant], gates: list[dict]) -> dict:
    """What verdict.json holds; times in ns. A speedup is the first capture's time over the other's: below 1 slower."""
    first = variants[0]
    comparisons = []
    for v in variants[1:]:
        for change in changes_of(first.summaries, v.summaries).values():
            found = dataclasses.asdict(change) | {"speedup": change.speedup, "verdict": change.verdict}
            comparisons.append({"label": v.label, "against": first.label, **found})
    return {
        "device": device_line(variants),
        "sentences": verdict(variants),
        "step": [c for c in comparisons if c["name"] == STEP],
        "comparisons": comparisons,
        "gates": gates,
        "host": {v.label: [host_of(s) for s in v.summaries] for v in variants},
        "uses": {v.label: [dataclasses.asdict(use) for s in v.summaries[:1] for use in s.uses] for v in variants},
    }


def host_of(s: Summary) -> dict[str, dict[int, int]]:
    """Per range its host time in each step: the parts of one, with the rest of it, add up to it."""
    return {name: dict(row.by_step["host"]) for name, row in s.rows.items() if "host" in row.by_step}


def write(out: Path, title: str, variants: list[Variant], gates: list[dict]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        said = [gate["sentence"] for gate in gates]
        (out / "report.md").write_text(page.markdown(title, variants, said))
        (out / "report.html").write_text(page.html(title, variants, said))
        (out / VERDICT).write_text(json.dumps(verdict_of(variants, gates), indent=1) + "\n")
        provenance = {
            v.label: [trace.provenance | {"steps": list(trace.steps)} for trace in v.traces] for v in variants
        }
        (out / "provenance.json").write_text(scrub(json.dumps(provenance, indent=1)) + "\n")
        shown = [s for v in variants for s in v.summaries[:1]]
        if shown:
            timeline.write_chrome(shown, out / "trace.json")
            timeline.png(shown, out / "timeline.png")
    except OSError as error:
        raise BadInput(f"The report cannot be written to {out}: {error}.") from None


if __name__ == "__main__":
    try:
        code = main()
    except Exception:  # noqa: BLE001 - Python would end with 1, which is a missed gate
        traceback.print_exc()
        code = 3
    sys.exit(code)
