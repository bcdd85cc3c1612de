"""What the compiler makes of every Triton kernel, no GPU needed: `python -m bench.budgets` writes results/budgets.json.

Kernels are cross-compiled for sm_80, 89 and 90 by the Triton installed, and their machine code is counted: the same on
every machine. tests/test_kernel_budgets.py holds the kernels to the table.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

TABLE = Path(__file__).parent / "results" / "budgets.json"
COMMAND = "python -m bench.budgets"
ARCHS = (80, 89, 90)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""fp16 is as wide as bf16 and compiles to the same accesses."""
MOST_REGISTERS = {
    "logprob_fwd": 64,
    "logprob_bwd": 96,
    "linear_logprob_fwd": 96,
    "exact_logits": 64,
    "clipped_surrogate": 120,
    "topk": 96,
    "decode_attention_split": 168,
    "decode_attention_sum": 64,
}
"""A thread, whatever the Triton: past these, fewer programs fit on an SM."""
MORE_REGISTERS = {"3.6.0": {"linear_logprob_fwd fp32 sm_80": 112}}
"""By Triton: what it spends more on, a known weakness of it that costs no spills."""
WORSE = {"registers": 1, "spills": 1, "shared_bytes": 1, "loads_128": -1, "stores_128": -1, "tensor_core": -1}
"""+1 where more is worse. spills: loads and stores of local memory; loads_128: from global memory to registers or
straight to shared memory, 128 bits at a time; tensor_core: HMMA and HGMMA instructions."""


def offline(arch):
    """A stand-in for a CUDA driver: enough to compile, nothing to launch."""
    from triton.backends.compiler import GPUTarget

    class Offline:
        target = GPUTarget("cuda", arch, 32)
        launcher_cls = staticmethod(lambda src, metadata: None)
        get_current_target = lambda self: self.target
        get_current_device = lambda self: arch  # a kernel remembers what it compiled by device, not by target
        get_current_stream = lambda self, device: 0
        get_active_torch_device = lambda self: torch.device("cpu")
        map_python_to_cpp_type = lambda self, kind: kind

    return Offline()


def kernels_of(dtype):
    """-> name: warm-up of a kernel for inputs of `dtype`, pointers 16 bytes aligned and a vocabulary or a slot of 8
    times an odd number."""
    from kernels import decode_attention, linear_logprob, logprob, surrogate, topk
    from kernels.spec import STATS

    x, f32, i64, i32 = DTYPES[dtype], torch.float32, torch.int64, torch.int32
    columns = 18993
    block, num_warps = logprob.block_of(8 * columns)
    shape = dict(UNIT=8, BLOCK_V=block, num_warps=num_warps, grid=(1,))
    rows = (f32,) * 4

    def fwd(entropy):
        return logprob._logprob_fwd_kernel.warmup(x, i64, None, f32, f32, f32, entropy, columns, columns, **shape)

    def bwd(temperature, ids, best, e):
        return logprob._logprob_bwd_kernel.warmup(
            x, x, i64, temperature, ids, best, *rows, f32, e, columns, columns, columns, **shape
        )

    def linear():
        return linear_logprob._linear_logprob_fwd_kernel.warmup(
            x, x, x, x, i64, f32, *rows, i32, f32, columns, 2048, 2048, columns, 2048, BLOCK_D=1024, **shape
        )

    def exact():
        return linear_logprob._exact_logits_kernel.warmup(
            x, x, x, i64, f32, 2048, 2048, 64, 2048, BLOCK_D=1024, grid=(1, 1)
        )

    def largest(temperature):
        return topk._topk_kernel.warmup(x, temperature, f32, f32, f32, columns, columns, **shape)

    def loss(*optional, form="clip"):
        vectors = f32, optional[0], f32, f32, *optional[1:], f32, optional[3], f32, f32
        spec = 0.8, 1.2, 3.0, 0.1, 0.1, 2.0, 20.0, 0.5, 5.0, 1.1, 1.2
        shape = dict(FORM=form, NUM_SUMS=len(STATS), SPAN=surrogate.SPAN, BLOCK=surrogate.BLOCK, num_warps=8, grid=(1,))
        return surrogate._clipped_surrogate_kernel.warmup(*vectors, *spec, 16384, **shape)

    def split(G, D):
        c, K, L = D // 8, 8, 8 * 513
        slots, shape = (K * L * c, L * c, c), decode_attention.split_shape(G, D, x.itemsize)
        strides = K * G * c, c, *slots, *slots
        return decode_attention._decode_attention_split_kernel.warmup(
            x, x, x, i64, f32, f32, f32, 0.1, *strides, 64 * K, K, L, 17, L, UNIT=8, **shape, grid=(1,)
        )

    def total(D):
        return decode_attention._decode_attention_sum_kernel.warmup(
            f32, f32, f32, i64, x, 64, 8 * 513, 17, 8 * 513, **decode_attention.sum_shape(D), grid=(1,)
        )

    heads = {"tiny": (2, 16), "0.5b": (7, 64), "7b": (7, 128), "256": (8, 256)}  # G, D
    found = {
        f"logprob_fwd {dtype}": lambda: fwd(None),
        f"logprob_fwd {dtype} entropy": lambda: fwd(f32),
        f"logprob_bwd {dtype}": lambda: bwd(None, None, None, None),
        f"logprob_bwd {dtype} everything": lambda: bwd(f32, i32, f32, f32),
        f"linear_logprob_fwd {dtype}": linear,
        f"exact_logits {dtype}": exact,
        f"topk {dtype}": lambda: largest(None),
        f"topk {dtype} temperature": lambda: largest(f32),
        **{f"decode_attention_split {dtype} G={G} D={D}": lambda G=G, D=D: split(G, D) for G, D in heads.values()},
        **{f"decode_attention_sum {dtype} D={D}": lambda D=D: total(D) for _, D in heads.values()},
    }
    if dtype == "fp32":
        found["clipped_surrogate fp32"] = lambda: loss(f32, None, None, None)
        found["clipped_surrogate fp32 everything"] = lambda: loss(f32, f32, f32, f32)
        found["clipped_surrogate fp32 cispo"] = lambda: loss(f32, None, None, None, form="cispo")
        found["clipped_surrogate fp32 sapo"] = lambda: loss(f32, None, None, None, form="sapo")
    return found


def count(compiled):
    """-> the numbers of a row."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = lambda pattern: len(re.findall(pattern, dump))
    return {
        "registers": int(re.search(r"REG:(\d+)", dump)[1]),
        "spills": found(r"\b(?:LDL|STL)\b"),
        "shared_bytes": compiled.metadata.shared,
        "loads_128": found(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*128"),
        "stores_128": found(r"\bSTG\.E\.(?:\w+\.)*128"),
        "tensor_core": found(r"\bHG?MMA\b"),
    }


def sources():
    """A digest of the code that the table is of, comments and documentation aside."""
    digest = hashlib.sha256()
    for path in (*sorted((Path(__file__).parents[1] / "kernels").glob("*.py")), Path(__file__)):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [line for line in body if not is_text(line)]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def is_text(line):
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def measure(archs):
    """-> {"triton": version, "sources", "rows": {"kernel dtype case sm_90": numbers}}. Not for a process with a GPU
    driver."""
    import triton

    rows = {}
    work = [(arch, name, warm) for arch in archs for dtype in DTYPES for name, warm in kernels_of(dtype).items()]
    for arch, name, warm in tqdm(work, disable=None):
        triton.runtime.driver.set_active(offline(arch))
        compiled = warm()
        assert compiled.metadata.target.arch == arch
        rows[f"{name} sm_{arch}"] = count(compiled)
    return {"triton": triton.__version__, "sources": sources(), "rows": dict(sorted(rows.items()))}


def complaints(measured, table):
    """-> a sentence for each row beyond its hard limits, worse than its row of the table, or not as the table says.

    Another Triton compiles otherwise: there, the hard limits alone.
    """
    found = []
    for name, row in measured["rows"].items():
        limit = MORE_REGISTERS.get(measured["triton"], {}).get(name, MOST_REGISTERS[name.split()[0]])
        if row["spills"]:
            found.append(f"{name} spills: {row['spills']} loads and stores of local memory")
        if row["registers"] > limit:
            found.append(f"{name} takes {row['registers']} registers a thread, limit {limit}")
    if measured["triton"] != table["triton"]:
        return found
    remake = f"If that is meant, {COMMAND} remakes the table."
    for name in sorted(measured["rows"].keys() | table["rows"].keys()):
        row, want = measured["rows"].get(name), table["rows"].get(name)
        if not row or not want:
            found.append(f"{name} has a row only {'in the table' if want else 'when measured'}: out of date. {remake}")
            continue
        for what, sign in WORSE.items():
            if row[what] != want[what]:
                verdict = "worse" if (row[what] - want[what]) * sign > 0 else "better, so the table is out of date"
                found.append(f"{name}: {what} {row[what]}, the table says {want[what]}: {verdict}. {remake}")
    return found


def main(argv):
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="the table as JSON on stdout; write nothing")
    parser.add_argument("--archs", type=int, nargs="+", choices=ARCHS, default=ARCHS, help="with --print: only these")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set; the interpreter compiles nothing")
    table = measure(args.archs if args.print else ARCHS)
    if args.print:
        print(json.dumps(table))
        return
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table["rows"].items())
    head = "".join(f" {json.dumps(key)}: {json.dumps(table[key])},\n" for key in ("triton", "sources"))
    TABLE.write_text(f'{{\n{head} "rows": {{\n{rows}\n }}\n}}\n')
    print(
        f"{len(table['rows'])} rows in {TABLE.relative_to(Path.cwd()) if TABLE.is_relative_to(Path.cwd()) else TABLE}"
    )
    for sentence in complaints(table, table):
        print(sentence)


if __name__ == "__main__":
    main(sys.argv[1:])
