"""Run benchmarks: a table per case on the terminal, and everything as JSON in the last line of stdout.

python -m bench.run [NAME ...] [--device cpu|cuda] [--sizes small|first|default|N,D,V] [--dtype fp32,bf16]
                    [--rounds N] [--threads 1] [--only RIVAL,...] [--brief] [--json FILE]
`small` cases take milliseconds and leave out what compiles and the measurement of memory, which start processes.
`first` are the few of a first visit to a GPU: one round, unless told otherwise, of what does not compile for long.
"""

import argparse
import difflib
import json
import os
import platform
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from engine.provenance import describe, shell

from . import BENCHES, memory
from .clocks import CLOCKS, measure_roofs
from .harness import DTYPES, Experiment, new_row, num_ticks, reached, run_case
from .table import COLUMNS, render

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "trl",
    "accelerate",
    "cut-cross-entropy",
    "verl",
    "quack-kernels",
    "flash-attn",
)


def known(kind, name, names):
    """`name`, or ValueError naming the nearest."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    raise ValueError(f"unknown {kind} {name!r}; nearest: {near[0]!r}; all: {', '.join(names)}")


def sizes_of(bench, spec, device):
    default = bench.sizes[device]
    named = {"default": default, "first": default} | {k: v for k, v in bench.sizes.items() if k not in ("cpu", "cuda")}
    if spec in named:
        return named[spec]
    if isinstance(bench, Experiment):
        raise ValueError(f"sizes of this experiment are {', '.join(named)}, not {spec!r}")
    kind = type(bench.sizes["small"][0])
    try:
        return [kind(*map(int, spec.split(",")))]
    except (TypeError, ValueError):
        raise ValueError(f"sizes must be small, first, default or {','.join(kind._fields)}, got {spec!r}") from None


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def dtypes_of(bench, dtypes, device):
    """Those asked for that it has, or all it has; an experiment's is what the engine computes in."""
    if isinstance(bench, Experiment):
        return [bench.dtype or ("bf16" if device == "cuda" else "fp32")]
    return [dtype for dtype in dtypes if dtype in bench.dtypes] or bench.dtypes


def provenance(device, threads, argv, program="bench.run"):
    words = [Path(word).name if word.startswith("/") else word for word in map(str, argv)]
    driver = shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else None
    about = describe(PACKAGES)
    return about | {
        "kind": device,
        "device": device_name(device),
        "isa": torch.backends.cpu.get_cpu_capability() if device == "cpu" else None,
        "driver": driver,
        "cuda": torch.version.cuda,
        "threads": threads,
        "commit": os.environ.get("BENCH_COMMIT") or about["commit"],
        "command": " ".join([f"python -m {program}", *words]),
    }


def memory_meter(name, device, threads, small):
    if small or (device == "cpu" and sys.platform != "linux"):
        return None
    return memory.cuda_peak if device == "cuda" else memory.cpu_peak(name, threads)


def plan_of(names, device, sizes, dtypes):
    """-> [(name, size, dtype)], one for each case."""
    return [
        (name, size, dtype)
        for name in names
        for size in sizes_of(BENCHES[name], sizes, device)
        for dtype in dtypes_of(BENCHES[name], dtypes, device)
    ]


def run(names, device, sizes, dtypes, rounds, threads, only, brief=False, argv=(), save=lambda results: None):
    """-> {"provenance", "cases"}; saves all so far at every step, prints a table as a case ends; progress on stderr."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    small, plan = sizes == "small", plan_of(names, device, sizes, dtypes)
    results = {"provenance": provenance(device, threads, argv), "rounds": rounds, "sizes": sizes, "cases": []}
    timed = {dtype for name, _, dtype in plan if not isinstance(BENCHES[name], Experiment)}
    roofs = {dtype: measure_roofs(device, DTYPES[dtype], small) for dtype in sorted(timed)}
    with tqdm(total=sum(num_ticks(BENCHES[name], rounds, only) for name, *_ in plan), disable=None) as bar:
        for name, size, dtype in plan:
            bench, rows, case = BENCHES[name], {}, {"bench": name, "size": size._asdict(), "dtype": dtype}
            results["cases"].append(case)

            def tick(what):
                bar.set_description(f"{name} {dtype} {what}")
                bar.update()
                case["rows"] = reached(rows)
                save(results)

            torch.compiler.reset()
            if isinstance(bench, Experiment):
                rows.update({rival: new_row(rival, note) for rival, note in bench.rivals.items()})
                bench.run(rows, device, size, rounds, threads, tick)
            else:
                case["roofs"] = roofs[dtype]
                meters = dict(clock=CLOCKS[device], roofs=roofs[dtype], peak=memory_meter(name, device, threads, small))
                short = brief or sizes in ("small", "first")
                run_case(rows, bench, size, dtype, device, rounds=rounds, only=only, tick=tick, brief=short, **meters)
            case["rows"] = list(rows.values())
            save(results)
            title = f"\n{name} {dtype} {device} " + " ".join(f"{k}={v}" for k, v in size._asdict().items() if v)
            tqdm.write(render(title, case["rows"], getattr(bench, "columns", COLUMNS)), file=sys.stdout)
    return results


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--device", choices=list(CLOCKS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default="default", help="small, first, default or N,D,V")
    parser.add_argument("--dtype", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--rounds", type=int, help="3 unless given, 1 at the sizes `first`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="comma-separated beginnings of rivals' names; eager always runs")
    parser.add_argument("--brief", action="store_true", help="leave out the rivals that compile for long")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    try:
        names = [known("benchmark", name, list(BENCHES)) for name in args.names or BENCHES]
        dtypes = [known("dtype", dtype, list(DTYPES)) for dtype in args.dtype.split(",")]
        for name in names:
            sizes_of(BENCHES[name], args.sizes, args.device)
        only = tuple(args.only.split(",")) if args.only else ()
        for start in only:
            if not any(rival.startswith(start) for name in names for rival in BENCHES[name].rivals):
                raise ValueError(f"no rival begins with {start!r}; see the table of any run")
    except ValueError as error:
        sys.exit(f"error: {error}")

    def save(results):
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            aside = args.json.with_suffix(".partial")
            aside.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
            aside.replace(args.json)  # whole, whenever the run is ended

    rounds = args.rounds or (1 if args.sizes == "first" else 3)
    results = run(names, args.device, args.sizes, dtypes, rounds, args.threads, only, args.brief, argv, save)
    save(results)
    print(json.dumps(results, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
