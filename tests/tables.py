"""Data files for tests, and the real data sets where this machine has them."""

import json
from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not (REAL / "gsm8k").exists(), reason="the real data sets are not on this machine")
ROWS = [{"prompt": f"What is {n}?", "answer": str(n), "why": f"It is {n}.", "extra": n} for n in range(5)]


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    return text
