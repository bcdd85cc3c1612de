"""The fixed folder names shadow other packages; what keeps that harmless is tested here."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_transformers_loads_a_model_beside_our_kernels_folder():
    code = "import transformers, kernels; transformers.Qwen2Model; print(kernels.__version__, kernels.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.startswith("0.0.0 ") and str(ROOT) in out


def test_kernels_package_imports_nothing():
    tree = ast.parse((ROOT / "kernels/__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


def test_profiling_is_no_package_and_tests_are_flat():
    assert not (ROOT / "profiling/__init__.py").exists()  # a stdlib package from Python 3.15
    assert not [p for p in (ROOT / "tests").iterdir() if p.is_dir() and (p / "__init__.py").exists()]
