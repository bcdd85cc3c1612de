"""The Triton form against the oracle: the shared cases and its own promises.

Where there is no GPU the kernels run in Triton's interpreter, which is chosen when triton is imported: this file then
runs itself once more in a process that has TRITON_INTERPRET=1.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.kernel_cases import CASES, LEAN_CASES, products_are_counted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

if not RUNS:

    def test_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]

else:
    from kernels import eager, fused, head

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
    def test_case(case):
        case(fused, DEVICE)

    @pytest.mark.parametrize("case", LEAN_CASES, ids=lambda case: case.__name__)
    def test_lean_case(case, monkeypatch):
        case(fused, DEVICE, lambda size: monkeypatch.setitem(head.SLAB_BYTES, DEVICE, size))

    def test_products_are_counted():
        products_are_counted(fused, DEVICE)
