"""The machine: its GPU, versions, tools, and the roofs that tables are measured against.

python -m bench.env --device cpu|cuda --json FILE
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from engine.provenance import shell

from .clocks import measure_roofs
from .harness import DTYPES
from .parts import ROOT
from .run import provenance

GPU = ("name", "memory.total", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "ecc.mode.current")
PROGRAMS = ("git", "make", "nvcc", "nvidia-smi")
OPTIONAL = ("nvtx", "xdist", "pytest_timeout", "datasets", "math_verify", "matplotlib", "tensorboard")


def profilers():
    """Whether profiling/capture.py finds each, and what it would take; or its complaint."""
    command = [sys.executable, "profiling/capture.py", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip()
    return {name: path if name == "auto" else bool(path) for name, path in json.loads(done.stdout).items()}


def gpu():
    """By nvidia-smi, and by torch."""
    said = shell("nvidia-smi", f"--query-gpu={','.join(GPU)}", "--format=csv,noheader") or ""
    about = torch.cuda.get_device_properties(0)
    own = {"processors": about.multi_processor_count, "l2_bytes": about.L2_cache_size, "bytes": about.total_memory}
    return dict(zip(GPU, said.split(", "))) | own | {"cudnn": torch.backends.cudnn.version()}


def describe(device):
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": gpu() if device == "cuda" else None,
        "programs": {name: bool(shutil.which(name)) for name in PROGRAMS},
        "profilers": profilers(),
        "modules": {name: bool(find_spec(name)) for name in OPTIONAL},
    }
    roofs = {name: measure_roofs(device, dtype, device == "cpu") for name, dtype in DTYPES.items()}
    return {"provenance": provenance(device, None, [], "bench.env"), "machine": machine, "roofs": roofs}


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m bench.env", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    found = describe(args.device)
    print(json.dumps(found, indent=1))
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    for dtype, roofs in found["roofs"].items():
        flops, copy, read = (roofs[name] / 1e12 for name in ("matmul", "copy", "sum"))
        print(f"{dtype}: {flops:.4g} TFLOP/s, copy {copy:.3g} TB/s, read {read:.3g} TB/s")


if __name__ == "__main__":
    main(sys.argv[1:])
