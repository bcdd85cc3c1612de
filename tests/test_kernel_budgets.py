"""What the compiler makes of every kernel on sm_80, 89 and 90, with no GPU: registers, spills, widths of memory access.

`python -m tests.test_kernel_budgets` cross-compiles and prints JSON; the tests run that in a process of its own: the
interpreter of the other tests and the compiler exclude each other. The budgets bound what was measured with
Triton 3.7.1 from above by a little: past them, fewer programs fit on an SM.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

ARCHS = (80, 89, 90)
BUDGETS = {  # kernel: registers a thread, bytes of shared memory, 128-bit loads and stores at least
    "logprob_fwd bf16": (64, 64, 4, 0),
    "logprob_fwd fp32": (64, 64, 8, 0),
    "logprob_fwd bf16 entropy": (64, 64, 4, 0),
    "logprob_bwd bf16": (56, 64, 4, 8),
    "logprob_bwd fp32": (64, 64, 8, 16),
    "logprob_bwd bf16 everything": (96, 64, 4, 8),
    "linear_logprob_fwd bf16": (96, 64, 8, 0),
    "clipped_surrogate": (104, 64, 4, 1),
    "clipped_surrogate everything": (120, 64, 7, 2),
}
"""128-bit accesses: of the loop over the vocabulary (or rows), four of bf16 a thread and eight of fp32.

logprob_bwd has two such loops of stores, zeros and gradients; linear_logprob_fwd reads hidden and weight twice besides.
"""


def compile_all(arch):
    """-> name: compiled kernel, for pointers 16 bytes aligned and a vocabulary that is 8 times an odd number."""
    import triton
    from triton.backends.compiler import GPUTarget

    from kernels import linear_logprob, logprob, surrogate
    from kernels.spec import STATS

    class Offline:
        """Stands in for a CUDA driver: enough to compile, nothing to launch."""

        target = GPUTarget("cuda", arch, 32)
        launcher_cls = staticmethod(lambda src, metadata: None)
        get_current_target = lambda self: self.target
        get_current_device = lambda self: arch  # a kernel remembers what it compiled by device, not by target
        get_current_stream = lambda self, device: 0
        get_active_torch_device = lambda self: torch.device("cpu")
        map_python_to_cpp_type = lambda self, kind: kind

    triton.runtime.driver.set_active(Offline())
    columns = 18993
    block, num_warps = logprob.block_of(8 * columns)
    shape = dict(UNIT=8, BLOCK_V=block, num_warps=num_warps, grid=(1,))
    f32, bf16, i64, i32 = torch.float32, torch.bfloat16, torch.int64, torch.int32
    rows = (f32,) * 4
    fwd = lambda x, entropy: logprob._logprob_fwd_kernel.warmup(
        x, i64, None, f32, f32, f32, entropy, columns, columns, **shape
    )
    bwd = lambda x, temperature, ids, best, e: logprob._logprob_bwd_kernel.warmup(
        x, x, i64, temperature, ids, best, *rows, f32, e, columns, columns, columns, **shape
    )
    loss = lambda *optional: surrogate._clipped_surrogate_kernel.warmup(
        f32, optional[0], f32, f32, *optional[1:], f32, optional[3], f32, f32,
        0.8, 1.2, 3.0, 0.1, 0.1, 2.0, 20.0, 16384,
        NUM_SUMS=len(STATS), SPAN=surrogate.SPAN, BLOCK=surrogate.BLOCK, num_warps=8, grid=(1,),
    )  # fmt: skip
    return {
        "logprob_fwd bf16": fwd(bf16, None),
        "logprob_fwd fp32": fwd(f32, None),
        "logprob_fwd bf16 entropy": fwd(bf16, f32),
        "logprob_bwd bf16": bwd(bf16, None, None, None, None),
        "logprob_bwd fp32": bwd(f32, None, None, None, None),
        "logprob_bwd bf16 everything": bwd(bf16, f32, i32, f32, f32),
        "linear_logprob_fwd bf16": linear_logprob._linear_logprob_fwd_kernel.warmup(
            bf16, bf16, bf16, bf16, i64, f32, *rows, i32, f32, columns, 2048, 2048, columns, 2048,
            BLOCK_D=1024, **shape,
        ),
        "clipped_surrogate": loss(f32, None, None, None),
        "clipped_surrogate everything": loss(f32, f32, f32, f32),
    }  # fmt: skip


def measure(compiled, arch):
    """-> registers, shared bytes, 128-bit loads, 128-bit stores, local (spilled) loads and stores."""
    import triton

    assert compiled.metadata.target.arch == arch
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = lambda flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
        sass, usage = dump("-sass"), dump("-res-usage")
    count = lambda pattern: len(re.findall(pattern, sass))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    wide = [count(rf"\b{kind}\.E\.(?:\w+\.)*128") for kind in ("LDG", "STG")]
    return registers, compiled.metadata.shared, *wide, count(r"\b(?:LDL|STL)\b")


@pytest.fixture(scope="module")
def measured():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_kernel_budgets"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", BUDGETS)
def test_budget(measured, name, arch):
    registers, shared, loads, stores, spills = measured[str(arch)][name]
    most_registers, most_shared, least_loads, least_stores = BUDGETS[name]
    assert spills == 0
    assert registers <= most_registers and shared <= most_shared
    assert loads >= least_loads and stores >= least_stores


def test_every_kernel_has_a_budget():
    folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "kernels")
    files = [open(os.path.join(folder, name)).read() for name in os.listdir(folder) if name.endswith(".py")]
    kernels = {name for text in files for name in re.findall(r"^def _(\w+)_kernel\(", text, re.MULTILINE)}
    assert kernels and kernels == {name.split()[0] for name in BUDGETS}


if __name__ == "__main__":
    print(json.dumps({arch: {name: measure(k, arch) for name, k in compile_all(arch).items()} for arch in ARCHS}))
