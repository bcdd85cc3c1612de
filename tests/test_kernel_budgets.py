"""Every kernel against its row of bench/results/budgets.json: registers, spills, widths of memory access. No GPU.

bench/budgets.py measures, in a process of its own: the interpreter of the other tests and the compiler exclude each
other.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import budgets

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("a_kernel bf16 sm_80", "a_kernel bf16 sm_90")


@pytest.fixture(scope="module")
def table():
    return json.loads(budgets.TABLE.read_text())


def test_kernels_are_as_the_table_says(table):
    """All architectures where the code is not that of the table, one where it is."""
    archs = ["90"] if budgets.sources() == table["sources"] else [str(arch) for arch in budgets.ARCHS]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.budgets", "--print", "--archs", *archs]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = {name: row for name, row in table["rows"].items() if name.endswith(tuple(archs))}
    found = budgets.complaints(json.loads(result.stdout.splitlines()[-1]), table | {"rows": rows})
    assert rows and not found, "\n".join(found)


def test_the_digest_of_the_code_leaves_words_aside(tmp_path, monkeypatch):
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    monkeypatch.setattr(budgets, "__file__", str(tmp_path / "bench" / "budgets.py"))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "budgets.py").touch()

    def digest(code):
        (kernels / "one.py").write_text(code)
        return budgets.sources()

    code = digest("def f(x):\n    return x + 1\n")
    assert digest('"""Words."""\n\n\ndef f(x):  # more\n    """And more."""\n    return x + 1\n') == code
    assert digest("def f(x):\n    return x + 2\n") != code


def test_every_kernel_has_a_row_for_each_architecture(table):
    text = "\n".join(path.read_text() for path in ROOT.glob("kernels/*.py"))
    kernels = set(re.findall(r"^def _(\w+)_kernel\(", text, re.MULTILINE))
    found = {(name.split()[0], name.split()[-1]) for name in table["rows"]}
    assert kernels == budgets.MOST_REGISTERS.keys()
    assert found == {(kernel, f"sm_{arch}") for kernel in kernels for arch in budgets.ARCHS}


def test_keys_and_values_arrive_in_wide_loads_and_meet_tensor_cores(table):
    """Two tiles each of keys and values before the loop and in it, as many loads as fill them with 128 threads."""
    for name, row in table["rows"].items():
        if shape := re.match(r"decode_attention_split (bf16|fp32) G=(\d+) D=(\d+) ", name):
            itemsize, D = {"bf16": 2, "fp32": 4}[shape[1]], int(shape[3])
            tile_bytes = min(64 * D * itemsize, 16384)
            assert row["loads_128"] >= 2 * 2 * tile_bytes // (16 * 128), name
            assert (row["tensor_core"] > 0) == (shape[1] == "bf16"), name


@pytest.fixture
def doctored(monkeypatch):
    """measured and table, alike, for the test to change."""
    monkeypatch.setitem(budgets.MOST_REGISTERS, "a_kernel", 64)
    row = dict(registers=48, spills=0, shared_bytes=64, loads_128=4, stores_128=2, tensor_core=0)
    table = {"triton": "1.0", "rows": {name: dict(row) for name in NAMES}}
    return copy.deepcopy(table), table


@pytest.mark.parametrize(
    "number, value, says",
    [
        ("registers", 49, "registers 49, the table says 48: worse"),
        ("registers", 40, "registers 40, the table says 48: better, so the table is out of date"),
        ("shared_bytes", 65, "worse"),
        ("loads_128", 3, "worse"),
        ("loads_128", 5, "out of date"),
        ("stores_128", 0, "worse"),
        ("tensor_core", 1, "out of date"),
    ],
)
def test_a_row_that_changed_is_one_sentence(doctored, number, value, says):
    measured, table = doctored
    assert budgets.complaints(measured, table) == []
    measured["rows"][NAMES[0]][number] = value
    (sentence,) = budgets.complaints(measured, table)
    assert sentence.startswith(NAMES[0]) and says in sentence and budgets.COMMAND in sentence


def test_rows_that_come_and_go_date_the_table(doctored):
    measured, table = doctored
    del table["rows"][NAMES[0]], measured["rows"][NAMES[1]]
    new, gone = budgets.complaints(measured, table)
    assert "only when measured: out of date" in new and "only in the table: out of date" in gone


def test_another_triton_is_held_to_the_hard_limits_alone(doctored):
    measured, table = doctored
    measured["triton"] = "2.0"
    del table["rows"][NAMES[0]]
    measured["rows"][NAMES[1]].update(registers=64, loads_128=0)
    assert budgets.complaints(measured, table) == []
    measured["rows"][NAMES[0]].update(registers=65, spills=3)
    spills, registers = budgets.complaints(measured, table)
    assert "spills: 3" in spills and "65 registers a thread, limit 64" in registers


def test_a_row_that_a_triton_is_known_to_spend_more_on_has_a_limit_of_its_own(doctored, monkeypatch):
    measured, table = doctored
    monkeypatch.setattr(budgets, "MORE_REGISTERS", {"2.0": {NAMES[0]: 70}})
    for row in measured["rows"].values():
        row["registers"] = 70
    measured["triton"] = "2.0"
    (other,) = budgets.complaints(measured, table)
    assert other == f"{NAMES[1]} takes 70 registers a thread, limit 64"
