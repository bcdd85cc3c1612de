"""What `pip install .` gives to others, and that its ranges hold the versions of the requirements files."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FILE = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = FILE["project"]
BUILDER = Requirement(*FILE["build-system"]["requires"])
EXTRAS = PROJECT["optional-dependencies"]
PINS = {"train": "requirements.txt", "wandb": "requirements-wandb.txt", "test": "requirements-test.txt"}
ELSEWHERE = """
import json, pathlib, sys
import kernels, rl_kernels.chunked, rl_kernels.drop_in, rl_kernels.eager, torch
logits, ids = torch.randn(4, 9), torch.arange(4)
assert torch.allclose(rl_kernels.chunked.logprob(logits, ids), rl_kernels.eager.logprob(logits, ids), atol=1e-6)
folder = pathlib.Path(rl_kernels.__file__).parent
own = [name for name in sys.modules if name.split(".")[0] in ("kernels", "rl_kernels", "engine", "bench")]
print(json.dumps([kernels.WHOSE, str(folder.parent), sorted(path.name for path in folder.glob("*.py")), own]))
"""


@pytest.mark.skipif(
    not any(BUILDER.specifier.contains(found.version) for found in distributions(name=BUILDER.name)),
    reason=f"needs {BUILDER} installed",
)
def test_the_kernels_are_installed_as_rl_kernels_beside_a_package_named_kernels(tmp_path):
    source, target, elsewhere = tmp_path / "source", tmp_path / "target", tmp_path / "elsewhere"
    (target / "kernels").mkdir(parents=True)
    (target / "kernels" / "__init__.py").write_text("WHOSE = 'PyPI'\n")
    elsewhere.mkdir()
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", target, source], check=True, timeout=120)
    script = f"import sys; sys.path.insert(0, {str(target)!r})\n{ELSEWHERE}"
    done = subprocess.run([sys.executable, "-c", script], cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    whose, folder, files, modules = json.loads(done.stdout)
    assert whose == "PyPI" and Path(folder) == target
    assert files == sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
    assert {name.split(".")[0] for name in modules} == {"kernels", "rl_kernels"} and "kernels.eager" not in modules
    installed = {path.name for path in target.iterdir() if path.is_dir()}
    assert installed - {"kernels"} == {"rl_kernels", f"rl_kernels-{PROJECT['version']}.dist-info"}


@pytest.mark.parametrize("extra", PINS)
def test_what_is_pinned_is_what_is_declared_and_within_its_range(extra):
    text = (ROOT / PINS[extra]).read_text()
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M))
    declared = EXTRAS[extra] + (PROJECT["dependencies"] if extra == "train" else [])
    ranges = {one.name: one.specifier for one in map(Requirement, declared)}
    assert set(ranges) == set(pins) and set(EXTRAS) == set(PINS)
    assert all(ranges[name].contains(version) for name, version in pins.items())
