"""README.md says what is there: the loop, every file, and no more than a page."""

import ast
import re
import textwrap
from pathlib import Path

from bench.report import REGION
from engine.algos import ALGOS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def tree():
    """{path: what stands beside it}; a space deeper is inside what stands above."""
    found, inside = {}, []
    for line in re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)[1].splitlines():
        name, _, words = line.strip().partition(" ")
        inside = [*inside[: len(line) - len(line.lstrip())], name]
        found["".join(inside).rstrip("/")] = words.strip()
    return found


def test_the_step_is_the_loop_of_train_py():
    source = (ROOT / "train.py").read_text()
    loop = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "loop")
    lines = source.splitlines()[loop.body[1].lineno - 1 : loop.end_lineno]  # behind its docstring
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert shown == textwrap.dedent("\n".join(lines)) + "\n" and len(lines) <= 10


def test_every_file_of_engine_and_kernels_stands_in_the_tree_with_what_it_is():
    files = [path for room in ("engine", "kernels") for path in ROOT.glob(f"{room}/**/*.py")]
    paths = {str((path.parent if path.stem == "__init__" else path).relative_to(ROOT)) for path in files}
    told = tree()
    assert paths - told.keys() == set() and [path for path in told if not (ROOT / path).exists()] == []
    assert [path for path, words in told.items() if not words and path != "engine"] == []


def test_every_algorithm_stands_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(ALGOS)


def test_it_is_a_page_beside_its_table():
    assert len(REGION.sub("", README).encode()) <= 8_900  # twelve algorithms, ninety files
