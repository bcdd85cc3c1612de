"""Runs a program under a profiler and leaves one folder: the capture, and provenance.json saying what it is of.

python profiling/capture.py --tool auto|nsys|ncu|torch [--steps 3:6] [--graph-nodes] [--ranges a,b] -o DIR -- train.py
python profiling/capture.py --tool nsys|ncu --whole -o DIR -- -m bench.run logprob
python profiling/capture.py --list      JSON: the path of a usable nsys and ncu or null, and what auto would take

train.py records the steps FIRST:END (END excluded; it is given --profile_steps) and ends with them, in a folder of
runs/ that no resume looks at; another program is captured --whole.
auto is nsys where it can show the phases of a step and make a report, else torch. The program's output and exit code
are passed on.
"""

import argparse
import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ncu import METRICS
from traces import DOMAIN, BadInput

ROOT = Path(__file__).resolve().parents[1]
STEPS = "3:6"
PLACES = {
    "nsys": ("/usr/local/cuda*/bin/nsys", "/opt/nvidia/nsight-systems*/**/bin/nsys"),
    "ncu": ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute*/**/ncu"),
    "QdstrmImporter": ("/usr/lib/nsight-systems/*/QdstrmImporter", "/opt/nvidia/nsight-systems*/**/QdstrmImporter"),
}
GET = {
    "nsys": "Nsight Systems: apt package nsight-systems of NVIDIA's repository, or developer.nvidia.com/nsight-systems",
    "ncu": "Nsight Compute: part of the CUDA toolkit, or developer.nvidia.com/nsight-compute",
}
MADE = {"nsys": "capture.sqlite", "ncu": "capture.csv", "torch": "trace*.json.gz"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print which profilers can be used here, and end")
    parser.add_argument("--tool", choices=["auto", *sorted(MADE)], help="auto: nsys where it is usable, else torch")
    parser.add_argument("--steps", help=f"FIRST:END of train.py to record; default {STEPS}")
    parser.add_argument("--whole", action="store_true", help="nsys, ncu: record all of the program")
    parser.add_argument("--graph-nodes", action="store_true", help="nsys: the kernels inside CUDA graphs, at a cost")
    parser.add_argument("--ranges", default="", help="ncu: only kernels launched in these ranges, as forward,optimizer")
    parser.add_argument("-o", "--out", type=Path, help="folder for the capture; must not hold anything")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="after --: a script or -m module, and its arguments")
    args = parser.parse_args()
    if args.list:
        print(json.dumps(usable(gpus())))
        return 0
    if not (args.tool and args.out):
        parser.error("the following arguments are required: --tool and -o/--out, or --list")
    try:
        return capture(args)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Neither the folder nor the program could be had: {error}.", file=sys.stderr)
        return 2


def capture(args) -> int:
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    devices = gpus()
    if args.tool == "auto":
        args.tool = usable(devices)["auto"]
    check(args, program)
    tool = find_tool(args.tool) if args.tool in PLACES else None
    if args.tool in PLACES and not tool:
        raise BadInput(f"{args.tool} is not on PATH nor in the usual CUDA folders. Get {GET[args.tool]}.")
    check_gpu(args, devices)
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    inner = [*launcher(program), *program_args(args, program, out)]
    if args.tool == "torch" and not devices:
        print(
            "No GPU here: the trace will hold CPU operations, but no kernels, launches or GPU memory.", file=sys.stderr
        )
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    code, peak = run([*prefix(args, tool, out), *inner])
    if not code:
        export(args.tool, tool, out)
    known = provenance(args, tool, devices) | {"command": inner, "time": started, "exit_code": code}
    known["command"] = " ".join(["python", *known["command"][1:]] if inner[0] == sys.executable else inner)
    if args.tool != "nsys":  # whose own peak it would be: the program is no child of the command nsys
        known["peak_resident_bytes"] = peak
    (out / "provenance.json").write_text(json.dumps(known, indent=1) + "\n")
    if code:
        print(f"The program failed with exit code {code}, so {args.out} holds no capture to trust.", file=sys.stderr)
        return code
    if not list(out.glob(MADE[args.tool])):
        raise BadInput(f"{args.tool} left no capture in {args.out}: {cause(args, out)}")
    print(f"Captured to {args.out}; compare two with profiling/report.py.", file=sys.stderr)
    return 0


def check(args, program: list[str]) -> None:
    if not program:
        raise BadInput("Name the program after --, as: -o DIR -- train.py --algo grpo")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise BadInput(f"{args.out} already holds something; name a new folder, so that captures do not mix.")
    if not is_train(program) and args.tool == "torch":
        raise BadInput("A torch trace is written by train.py itself; capture other programs with --tool nsys or ncu.")
    if not is_train(program) and (args.steps or not args.whole):
        raise BadInput(f"Only train.py has steps; capture {program[0]} with --whole.")
    if args.whole and (args.steps or args.tool == "torch"):
        raise BadInput("--whole records all of a program under nsys or ncu; it goes without --steps.")
    if args.graph_nodes and args.tool != "nsys" or args.ranges and args.tool != "ncu":
        raise BadInput("--graph-nodes is for nsys and --ranges for ncu.")
    if is_train(program) and (args.ranges or args.tool == "nsys" and not args.whole) and not has_nvtx():
        raise BadInput(f"{args.tool} finds the phases of train.py by the package nvtx, which is not installed here.")
    if any(word.partition("=")[0] in ("--profile_steps", "--profile_trace") for word in program):
        raise BadInput("capture.py sets profile_steps and profile_trace itself; say --steps FIRST:END before the --.")


def check_gpu(args, devices: list[dict[str, str]]) -> None:
    """Refuses what records nothing without a GPU, before anything is run or made."""
    if args.tool == "nsys" and not (devices or args.whole):
        raise BadInput("There is no GPU here, which the window of steps needs; use --whole, or --tool torch.")
    if args.tool == "ncu" and not devices:
        raise BadInput("There is no GPU here, which ncu needs; use --tool nsys --whole, or --tool torch.")


def has_nvtx() -> bool:
    return importlib.util.find_spec("nvtx") is not None


def is_train(program: list[str]) -> bool:
    return any(Path(word).name == "train.py" for word in program)


def launcher(program: list[str]) -> list[str]:
    """What starts the program: this Python for a script or module, nothing for a command such as torchrun."""
    return [sys.executable] if program[0].startswith("-") or program[0].endswith(".py") else []


def program_args(args, program: list[str], out: Path) -> list[str]:
    if args.whole:
        return program
    trace = ["--profile_trace", str(out / "trace.json.gz")] if args.tool == "torch" else []
    return [*program, "--profile_steps", args.steps or STEPS, *trace]


def prefix(args, tool: str | None, out: Path) -> list[str]:
    """The profiler's own command line, up to the program."""
    if args.tool == "nsys":
        window = [] if args.whole else ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
        nodes = ["--cuda-graph-trace=node"] * args.graph_nodes
        quiet = ["--sample=none", "--cpuctxsw=none"]
        return [tool, "profile", "--trace=cuda,nvtx", *quiet, *window, *nodes, "-o", str(out / "capture")]
    if args.tool == "ncu":
        window = [] if args.whole else ["--profile-from-start", "off"]
        names = [f"{domain}{name}/" for name in args.ranges.split(",") if name for domain in (f"{DOMAIN}@", "")]
        wanted = [word for name in names for word in ("--nvtx-include", name)]
        metrics = ["--metrics", ",".join(METRICS)]
        return [tool, "--clock-control", "none", "--nvtx", *wanted, *window, *metrics, "-o", str(out / "capture")]
    return []


def run(command: list[str]) -> tuple[int, int]:
    """(exit code, peak resident bytes of the largest process) of a command; it is told of a SIGTERM."""
    child = subprocess.Popen(command)
    handlers = {signal.SIGTERM: lambda number, frame: child.send_signal(number), signal.SIGINT: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:  # Ctrl-C reaches the child from the terminal
        _, status, usage = os.wait4(child.pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    child.returncode = code
    return code if code >= 0 else 128 - code, usage.ru_maxrss * 1024


def import_stream(nsys: str, out: Path) -> None:
    """nsys's report from the raw stream that it leaves where it does not find its importer, as Debian's does not."""
    stream, made = out / "capture.qdstrm", out / "capture.nsys-rep"
    importer = find_importer(nsys) if stream.exists() and not made.exists() else None
    if importer and not subprocess.run([importer, "-i", stream, "-o", made], stdout=sys.stderr).returncode:
        stream.unlink()


def export(name: str, tool: str | None, out: Path) -> None:
    """What report.py reads, made from the profiler's own file where there is one."""
    if name == "nsys":
        import_stream(tool, out)
    if name == "nsys" and (out / "capture.nsys-rep").exists():
        made = str(out / "capture.sqlite")
        subprocess.run(
            [tool, "export", "--type", "sqlite", "-o", made, str(out / "capture.nsys-rep")], stdout=sys.stderr
        )
    if name == "ncu" and (out / "capture.ncu-rep").exists():
        with (out / "capture.csv").open("w") as page:
            command = [
                tool,
                "--import",
                str(out / "capture.ncu-rep"),
                "--page",
                "raw",
                "--csv",
                "--print-units",
                "base",
            ]
            if subprocess.run(command, stdout=page).returncode:
                (out / "capture.csv").unlink()


def cause(args, out: Path) -> str:
    """The likely reason that there is no capture, and what to do."""
    steps = args.steps or STEPS
    late = f"the run may have ended before step {steps.partition(':')[0]}; give train.py more --steps."
    if (out / "capture.qdstrm").exists():
        return "nothing here imports nsys's own file; run its QdstrmImporter on capture.qdstrm, or use another nsys."
    if (out / "capture.nsys-rep").exists() or (out / "capture.ncu-rep").exists():
        return "the export failed; what the tool printed says why."
    return "the program made no GPU work in the ranges asked for." if args.whole or args.ranges else cap(late)


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def find_tool(name: str) -> str | None:
    """The program on PATH or in the usual places, the newest there; None when there is none.

    The nsys in Nsight Compute's folder is its own: it records, and has nothing to make a report with.
    """
    usual = sorted(path for place in PLACES[name] for path in glob.glob(place, recursive=True))
    found = [path for path in (shutil.which(name), *reversed(usual)) if path and shutil.which(path)]
    return next((path for path in found if name != "nsys" or "nsight-compute" not in os.path.realpath(path)), None)


def find_importer(nsys: str) -> str | None:
    """The program that makes a report of nsys's raw stream: the one of its own installation, or another."""
    own = Path(nsys).resolve().parents[1].glob("host-*/QdstrmImporter")
    return next(map(str, own), None) or find_tool("QdstrmImporter")


def usable(devices: list[dict[str, str]]) -> dict[str, str | None]:
    """{"nsys": path or None, "ncu": path or None, "auto": "nsys" | "torch"}: what leaves a capture that can be read."""
    nsys = find_tool("nsys")
    nsys = nsys if nsys and find_importer(nsys) else None
    return {"nsys": nsys, "ncu": find_tool("ncu"), "auto": "nsys" if nsys and devices and has_nvtx() else "torch"}


def gpus() -> list[dict[str, str]]:
    """Name, driver and clocks of each GPU, from nvidia-smi; none where it is absent or fails."""
    keys = ["name", "driver_version", "clocks.sm", "clocks.mem", "power.limit"]
    answer = ask(["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"])
    return [dict(zip(keys, (cell.strip() for cell in line.split(",")))) for line in answer.splitlines() if line]


def ask(command: list[str]) -> str:
    """A command's output, or "" when it cannot be run or fails."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return "" if done.returncode else done.stdout.strip()
    return ""


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"CPU {model}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "nvtx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def tool_version(tool: str | None) -> str:
    said = ask([tool, "--version"]).splitlines() if tool else [f"torch {versions().get('torch', 'missing')}"]
    return said[-1] if said else "unknown"


def provenance(args, tool: str | None, devices: list[dict[str, str]]) -> dict:
    return {
        "tool": args.tool,
        "tool_version": tool_version(tool),
        "device": ", ".join(gpu["name"] for gpu in devices) or cpu(),
        "driver": devices[0]["driver_version"] if devices else "none",
        "gpus": devices,
        "versions": versions(),
        "commit": os.environ.get("BENCH_COMMIT") or ask(["git", "rev-parse", "HEAD"]),
        "dirty": bool(ask(["git", "status", "--porcelain", "--untracked-files=no"])),
        "window": "whole" if args.whole else args.steps or STEPS,
    }


if __name__ == "__main__":
    sys.exit(main())
