"""Imports go down the floors of the house, or to the right within one; what only some rooms may know."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    "train",
    "engine.run engine.folder engine.record engine.parts engine.known engine.learner engine.plan",
    "engine.generate engine.evaluate engine.inputs",
    "engine.algos engine.sources engine.asking engine.rollouts",
    "engine.log engine.checkpoint engine.replica engine.policy engine.layout",
    "engine.attention engine.samples engine.metrics engine.prefetch",
    "engine.adapters engine.linears engine.model engine.chat engine.data engine.rewards engine.streams",
    "engine.config engine.settings engine.provenance engine.hints engine.dist engine.watch engine.errors kernels",
]
PLACE = {name: (floor, i) for floor, names in enumerate(FLOORS) for i, name in enumerate(names.split())}
SOURCES = [ROOT / "train.py", *sorted(ROOT.glob("engine/**/*.py")), *sorted(ROOT.glob("kernels/**/*.py"))]
TEXT_ONLY = ("engine.rewards",)
KNOW_ALGORITHMS = ("engine.algos", "engine.config")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room(module: str) -> str | None:
    parts = module.split(".")
    return next((name for n in (2, 1) if (name := ".".join(parts[:n])) in PLACE), None)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module} if node.module != "engine" else {f"engine.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_or_right(path):
    here = room(name_of(path))
    assert here or path.name == "__init__.py", f"{path} stands on no floor"
    for module in imports(path):
        there = room(module)
        if here and there and there != here:
            assert PLACE[here] < PLACE[there], f"{here} imports {there}"
        assert not module.startswith(("bench", "profiling", "tests")), f"{path} imports {module}"
        if module.split(".")[0] in ("transformers", "tokenizers"):
            assert here == "engine.model", f"{path} imports transformers; only engine/model.py may"
        if module.split(".")[0] == "torch":
            assert here not in TEXT_ONLY, f"{path} knows tensors"


def test_kernels_import_only_each_other_and_relatively():
    for path in ROOT.glob("kernels/*.py"):
        assert not any(m.split(".")[0] in ("kernels", "engine") for m in imports(path)), path


def tells_algorithms_apart(path: Path) -> bool:
    """Whether it asks which algorithm runs, by `config.algo` or by the name of one that is like no other."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "algo"
        and "config" in ast.unparse(node.value)
        or isinstance(node, ast.Constant)
        and node.value == "sft"
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_which_algorithm_runs_is_known_to_the_table_and_the_settings_alone():
    knowing = {room(name_of(path)) for path in SOURCES if tells_algorithms_apart(path)}
    assert knowing == set(KNOW_ALGORITHMS)
