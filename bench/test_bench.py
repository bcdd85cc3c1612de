"""The table under pytest-benchmark, small sizes: `pytest bench/ --benchmark-only [--benchmark-json FILE]`."""

import functools

import pytest
import torch

from . import BENCHES
from .harness import DTYPES, LIMITS, Experiment, new_row, output_errors, refuse_wrong, why_left_out

PURE = {name: bench for name, bench in BENCHES.items() if not isinstance(bench, Experiment)}
CASES = [(name, dtype, rival) for name, bench in PURE.items() for dtype in bench.dtypes for rival in bench.rivals]


@functools.cache
def prepared(name, dtype):
    """-> inputs, and truth(task), made once."""
    bench = BENCHES[name]
    inputs = bench.inputs(bench.sizes["small"][0], DTYPES[dtype], "cpu")
    return inputs, functools.cache(lambda task: bench.truth(inputs, task))


@pytest.mark.parametrize("name, dtype, rival_name", CASES)
def test_rival(benchmark, name, dtype, rival_name):
    bench = BENCHES[name]
    rival = bench.rivals[rival_name]
    if left_out := why_left_out(rival, "cpu", brief=True):
        pytest.skip(": ".join(left_out))
    torch.set_num_threads(1)
    inputs, truth = prepared(name, dtype)
    try:
        run = rival.build(inputs)
        outputs = run()
    except ImportError as error:
        pytest.skip(f"absent: {error}")
    if rival.task:
        errors = output_errors(outputs, truth(rival.task))
        refuse_wrong(errors, LIMITS[DTYPES[dtype]])
        work = bench.work(bench.sizes["small"][0], DTYPES[dtype].itemsize, rival.task)
        benchmark.extra_info.update(errors=errors, **work._asdict())
    benchmark.group = f"{name} {dtype}"
    benchmark.pedantic(run, rounds=3, iterations=1)


EXPERIMENTS = [(name, size) for name in BENCHES if name not in PURE for size in BENCHES[name].sizes["small"]]


@pytest.mark.parametrize("name, size", EXPERIMENTS)
def test_experiment(benchmark, name, size):
    """Its own rounds and clock: what pytest-benchmark times is the whole of it."""
    torch.set_num_threads(1)
    rows = {rival: new_row(rival, note) for rival, note in BENCHES[name].rivals.items()}
    benchmark.pedantic(lambda: BENCHES[name].run(rows, "cpu", size, 1, 1, lambda what: None), rounds=1)
    if all(row["status"] != "ok" for row in rows.values()):
        pytest.skip("; ".join(f"{row['rival']} {row['status']}: {row['why']}" for row in rows.values()))
    benchmark.extra_info["rows"] = list(rows.values())
