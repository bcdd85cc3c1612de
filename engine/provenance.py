"""What ran: command line, commit and versions, as runs and benchmarks keep them."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve()
PACKAGES = ("torch", "triton", "transformers", "datasets")


def describe(packages: Iterable[str] = PACKAGES) -> dict:
    """For JSON: command, time, commit, uncommitted, python, versions."""
    return {
        "command": command_line(),
        "time": datetime.now(UTC).isoformat("T", "seconds"),
        **describe_checkout(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in packages},
    }


def describe_checkout() -> dict:
    """The commit, None where this is no checkout or git is missing; and whether any file is not as in it."""
    if shell("git", "ls-files", "--error-unmatch", HERE.name) is None:  # installed in somebody else's checkout
        return {"commit": None, "uncommitted": False}
    changes = shell("git", "--no-optional-locks", "status", "--porcelain")
    return {"commit": shell("git", "rev-parse", "HEAD"), "uncommitted": bool(changes)}


def command_line() -> str:
    """How this program was started, as shell text; of torchrun's options its numbers of processes and nodes."""
    words, torchrun = sys.orig_argv[1:], "TORCHELASTIC_RUN_ID" in os.environ
    if not torchrun:
        return shlex.join(["python", *words])
    sizes = {"nnodes": os.environ["GROUP_WORLD_SIZE"], "nproc_per_node": os.environ["LOCAL_WORLD_SIZE"]}
    options = [f"--{name}={size}" for name, size in sizes.items() if size != "1"]
    return shlex.join(["torchrun", *options, *words[words[0] == "-u" :]])


def resume_line(checkpoint: str | Path = "auto") -> str:
    """The command line that goes on with this run; of two --resume the last counts."""
    line, resume = command_line(), shlex.join(["--resume", str(checkpoint)])
    return line if f" {resume} " in f"{line} " else f"{line} {resume}"


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def shell(*command: str) -> str | None:
    """The stdout of a program that runs in this folder, or None where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
