"""Peak memory of one call beyond its inputs, and beyond the gradients it returns.

CUDA: the allocator's own peak. CPU: resident memory of a fresh process that holds only the inputs and one rival. It
runs the rival once (compilation, libraries' own state), gives freed memory back to the system, sets the kernel's
high-water mark to the present (5 into /proc/self/clear_refs), runs the rival again, and reads VmHWM. Allocations from
64 KiB up are mapped and unmapped one by one there (glibc's threshold pinned), so nothing freed stays resident.
Counts what was written to, libraries' scratch included, so an empty tensor counts from its first write on; where all
is written it agrees with the allocator's own sum to 0.25 MiB, the coarseness of the kernel's counters.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}


def resident_bytes(field):
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_on_cpu(run):
    """-> (most resident bytes during run() beyond those before, what run returned). Linux with glibc."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    outputs = run()
    return max(0, resident_bytes("VmHWM") - before), outputs


def peak_on_cuda(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, outputs


def describe(peak_bytes, outputs):
    """-> peak_bytes (returned gradients included) and extra_bytes (without them)."""
    gradient_bytes = sum(x.nbytes for name, x in outputs.items() if name.startswith("d"))
    return {"peak_bytes": peak_bytes, "extra_bytes": max(0, peak_bytes - gradient_bytes)}


def cuda_peak(rival_name, inputs, run):
    run()
    return describe(*peak_on_cuda(run))


def cpu_peak(bench_name, threads):
    """-> peak(rival name, inputs, run) that measures in a child process, where `run` is built anew."""

    def peak(rival_name, inputs, run):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "inputs.pt")
            torch.save(inputs, path)
            return in_child(threads, "bench.memory", bench_name, rival_name, path, str(threads))

    return peak


def in_child(threads, module, *arguments):
    """-> the JSON that `python -m module` prints last, in a process whose allocator hides nothing."""
    words, env = [sys.executable, "-m", module, *arguments], {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads)}
    child = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    if child.returncode == -9:
        raise MemoryError("the system ended the process that measured memory")
    if child.returncode:
        raise RuntimeError((child.stderr.strip() or "no message").splitlines()[-1])
    return json.loads(child.stdout.splitlines()[-1])


def main(bench_name, rival_name, path, threads):
    from bench import BENCHES

    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this process goes and no other
    torch.set_num_threads(int(threads))
    run = BENCHES[bench_name].rivals[rival_name].build(torch.load(path))
    run()
    print(json.dumps(describe(*peak_on_cpu(run))))


if __name__ == "__main__":
    main(*sys.argv[1:])
