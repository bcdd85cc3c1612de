"""Imports go down the floors of the house, or to the right within one."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    ["train"],
    [
        "engine.run",
        "engine.folder",
        "engine.plan",
        "engine.generate",
        "engine.evaluate",
        "engine.experience",
        "engine.rollouts",
        "engine.learner",
    ],
    ["engine.checkpoint", "engine.replica", "engine.model", "engine.chat", "engine.algos", "engine.data"],
    [
        "engine.prefetch",
        "engine.batch",
        "engine.streams",
        "engine.rewards",
        "engine.log",
        "engine.config",
        "engine.hints",
        "engine.dist",
        "engine.watch",
        "engine.errors",
        "kernels",
    ],
]
PLACE = {name: (floor, i) for floor, names in enumerate(FLOORS) for i, name in enumerate(names)}


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


SOURCES = [ROOT / "train.py", *sorted(ROOT.glob("engine/**/*.py")), *sorted(ROOT.glob("kernels/**/*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_or_right(path):
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        there = room(module)
        if here and there and there != here:
            assert PLACE[here] < PLACE[there], f"{here} imports {there}"
        assert not module.startswith(("bench", "profiling", "tests")), f"{path} imports {module}"
        if module.split(".")[0] in ("transformers", "tokenizers"):
            assert here == "engine.model", f"{path} imports transformers; only engine/model.py may"


def test_kernels_import_only_each_other_and_relatively():
    for path in ROOT.glob("kernels/*.py"):
        assert not any(m.split(".")[0] in ("kernels", "engine") for m in imports(path)), path
