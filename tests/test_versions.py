"""What is installed: which known combination of versions it is, what the code needs of it, and what may be missing."""

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.profiler import ProfilerActivity, profile

from engine import log
from engine.config import Config

ROOT = Path(__file__).resolve().parents[1]
PINNED = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M))
KNOWN = {
    "requirements.txt": {name: PINNED[name] for name in ("torch", "triton", "transformers")},
    "CUDA image": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"},
}
BARE = {"torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "yaml", "tqdm", "pytest", "packaging"}
BARE |= {"jinja2"}  # which torch needs
"""What a GPU image has. nvtx, datasets, math-verify, tensorboard, matplotlib and all rivals are imported where used."""
OURS = {"engine", "kernels", "bench", "profiling", "tests", "train"} | {p.stem for p in ROOT.glob("profiling/*.py")}


@pytest.mark.parametrize("name", KNOWN)
def test_the_installed_versions_are_a_known_combination(name):
    installed = {package: importlib.metadata.version(package).partition("+")[0] for package in KNOWN[name]}
    if installed != KNOWN[name]:
        others = [other for other, versions in KNOWN.items() if versions == installed]
        said = ", ".join(f"{package} {version}" for package, version in installed.items())
        pytest.skip(f"installed: {said}; known to pass: {others[0] if others else 'not this combination'}")
    assert torch.__version__.startswith(installed["torch"]) and transformers.__version__ == installed["transformers"]


def test_what_the_code_calls_is_there():
    """Each came, or changed its signature, within the last releases."""
    takes = lambda function, name: name in inspect.signature(function).parameters  # noqa: E731
    assert "dtype_out" in torch.ops.aten.mm.overloads() and "dtype_out" in torch.ops.aten.addmm.overloads()
    assert takes(torch.cuda.graph.__init__, "capture_error_mode") and takes(MixedPrecisionPolicy, "cast_forward_inputs")
    assert {"set_force_sum_reduction_for_comms", "set_gradient_divide_factor"} <= set(dir(FSDPModule))
    assert torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    assert hasattr(transformers.AttentionInterface, "register")


def imported_at_once(tree: ast.AST) -> set[str]:
    """Packages that importing a module imports: those not inside a function."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            found |= imported_at_once(node)
    return found


@pytest.mark.parametrize("folder", ["engine", "kernels", "bench", "profiling", "tests", "train.py"])
def test_importing_needs_only_what_a_gpu_image_has(folder):
    """So that `pytest -m gpu` collects, and train.py runs, without the packages of other tasks and of reports."""
    for path in [ROOT / folder] if folder.endswith(".py") else sorted((ROOT / folder).rglob("*.py")):
        needed = imported_at_once(ast.parse(path.read_text())) - sys.stdlib_module_names - OURS
        assert needed <= BARE, f"{path.relative_to(ROOT)} imports {', '.join(needed - BARE)} at once"


def test_without_nvtx_spans_time_and_name_their_phase_and_the_run_says_so_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    spec = importlib.util.spec_from_file_location("metrics_without_nvtx", ROOT / "engine/metrics.py")
    metrics = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, metrics)
    spec.loader.exec_module(metrics)
    kept = metrics.Tally()
    monkeypatch.setattr(metrics.Tally, "tracing", True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for step in range(2):
            with kept.span("forward", step):
                torch.ones(2) + 1
    assert kept.seconds["forward"] > 0 and metrics.NVTX is None
    assert {e.key: e.count for e in recorded.key_averages()}["train/forward"] == 2
    monkeypatch.setattr(log, "NVTX", None)
    log.Log(Config(tensorboard=False), tmp_path, 0, True).close()
    assert capsys.readouterr().out.count("nvtx is not installed") == 1
