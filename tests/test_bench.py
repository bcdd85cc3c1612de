"""The benchmarks' own arithmetic, and what becomes of a rival that is wrong, absent or out of memory."""

import json
import sys

import pytest
import torch

from bench import BENCHES, clipped_surrogate, heads, logprob, memory, run, step, trl
from bench.harness import Benchmark, Experiment, Rival, Size, Work, Wrong, new_row, run_case, summarize, take_turns
from bench.table import render

PURE = [name for name, bench in BENCHES.items() if not isinstance(bench, Experiment)]
SIZE = Size(4, 0, 0)
ROOFS = {"matmul": 1e9, "copy": 1e9, "sum": 1e9}


def doubled(inputs):
    return lambda: {"logp_N": 2 * inputs["x_N"]}


def failing(error, calls_before=0):
    def build(inputs):
        calls = []

        def run():
            calls.append(1)
            if len(calls) > calls_before:
                raise error
            return {"logp_N": 2 * inputs["x_N"]}

        return run

    return build


def bench_of(**rivals):
    """A benchmark of x -> 2 x on four numbers."""
    return Benchmark(
        sizes={}, dtypes=("fp32",), inputs=lambda size, dtype, device: {"x_N": torch.ones(size.N, dtype=dtype)},
        truth=lambda inputs, task: {"logp_N": 2 * inputs["x_N"].double()},
        work=lambda size, itemsize, task: Work(2_000, 1_000), rivals={"eager": Rival(doubled), **rivals},
    )  # fmt: skip


def results(bench, clock=lambda calls: [call() and 1e-3 for call in calls], rounds=3):
    rows = run_case(bench, SIZE, "fp32", "cpu", rounds=rounds, clock=clock, roofs=ROOFS)
    return {row["rival"]: row for row in rows}


def test_work_is_counted():
    N, D, V = size = Size(6, 8, 32)
    assert heads.count_work(size, 2, "full") == Work(3 * 2 * N * D * V, 2 * 2 * (N * D + V * D))
    assert heads.count_work(size, 2, "half").flops == 3 * 2 * (N // 2) * D * V
    assert logprob.BENCH.work(size, 4, "full") == Work(0, 3 * 4 * N * V)
    assert logprob.FORWARD.work(size, 4, "full") == Work(0, 4 * N * V, "sum")
    assert clipped_surrogate.BENCH.work(size, 4, "full").bytes == N * 4 * (5 + 1 + 2)


def test_rivals_take_turns_and_quantiles_are_of_all_rounds():
    order = []
    clock = lambda name: order.append(name) or [float(len(order))]
    work = {"flops": 4e9, "bytes": 0, "roof": "copy"}
    rows = {name: {"status": "ok", "seconds": [], **work} for name in ("eager", "b", "c")}
    take_turns({name: name for name in rows}, rows, 3, clock)
    assert order == ["eager", "b", "c", "b", "c", "eager", "c", "eager", "b"]
    assert rows["eager"]["seconds"] == [1.0, 6.0, 8.0]
    summarize(rows, ROOFS)
    eager, b = rows["eager"], rows["b"]
    assert (eager["p20"], eager["median"], eager["p80"]) == pytest.approx((3.0, 6.0, 7.2))
    assert b["time_ratio"] == pytest.approx(4 / 6) and b["within_spread"]
    assert eager["floor"] == pytest.approx(4.0) and eager["roof_share"] == pytest.approx(4 / 6)


def test_half_the_rows_are_held_to_half_the_products():
    timed = lambda seconds, flops: {"status": "ok", "seconds": [seconds], "flops": flops, "bytes": 0, "roof": "copy"}
    rows = {"eager": timed(4.0, 8e9), "half": timed(2.0, 4e9), "GEMMs alone": timed(2.0, None)}
    summarize(rows, ROOFS)
    assert rows["eager"]["gemm_share"] == pytest.approx(0.5) and rows["half"]["gemm_share"] == pytest.approx(0.5)


def test_a_difference_above_the_spread_is_not_called_noise():
    seconds = {"eager": [1.0, 1.01, 1.02], "b": [0.5, 0.51, 0.52]}
    rows = {name: {"status": "ok", "seconds": s, "flops": 0, "bytes": 1, "roof": "sum"} for name, s in seconds.items()}
    summarize(rows, ROOFS)
    assert not rows["b"]["within_spread"]


@pytest.mark.parametrize(
    "output",
    [lambda x: 2.01 * x, lambda x: x * float("nan"), lambda x: 2 * x[:3]],
    ids=["off by half a percent", "not a number", "another shape"],
)
def test_a_wrong_rival_is_caught_before_it_is_timed(output):
    timed = []

    def clock(calls):
        timed.extend(calls)
        return [1e-3]

    row = results(bench_of(wrong=Rival(lambda inputs: lambda: {"logp_N": output(inputs["x_N"])})), clock)["wrong"]
    assert row["status"] == "wrong" and "logp_N" in row["why"] and row["seconds"] == []
    assert len(timed) == 3, "only eager, once a round"


def test_what_cannot_run_is_a_row():
    def missing(inputs):
        import a_package_nobody_has  # noqa: F401

    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    rows = results(bench_of(
        missing=Rival(missing), full=Rival(failing(full)), cuda_full=Rival(failing(torch.OutOfMemoryError("CUDA"))),
        late=Rival(failing(MemoryError(), calls_before=2)), broken=Rival(failing(KeyError("in /some/folder/x.py"))),
        elsewhere=Rival(doubled, device="cuda"),
    ))  # fmt: skip
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "eager": "ok", "missing": "absent", "full": "out of memory", "cuda_full": "out of memory",
        "late": "out of memory", "broken": "error", "elsewhere": "absent",
    }  # fmt: skip
    assert "a_package_nobody_has" in rows["missing"]["why"] and "/some" not in rows["broken"]["why"]
    assert len(rows["late"]["seconds"]) == 1 and "median" not in rows["late"]
    table = render("title", list(rows.values()))
    assert all(name in table for name in rows) and "OUT OF MEMORY" in table
    json.dumps(rows, allow_nan=False)


def test_eager_out_of_memory_leaves_the_others_without_ratios():
    bench = bench_of(other=Rival(doubled))
    bench.rivals["eager"] = Rival(failing(MemoryError()))
    rows = results(bench)
    assert rows["eager"]["status"] == "out of memory"
    assert rows["other"]["status"] == "ok" and "time_ratio" not in rows["other"]


def test_every_benchmark_runs_and_its_last_line_is_json(capsys, tmp_path):
    path = tmp_path / "new" / "out.json"
    run.main(["--device", "cpu", "--sizes", "small", "--only", "ours,GEMMs", "--json", str(path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(path.read_text())
    assert {case["bench"] for case in found["cases"]} == set(BENCHES)
    assert found["provenance"]["versions"]["torch"] and found["provenance"]["threads"] == 1
    for case in found["cases"]:
        rows = {row["rival"]: row for row in case["rows"]}
        if case["bench"] not in PURE:
            assert list(rows) == list(BENCHES[case["bench"]].rivals)
            assert {row["status"] for row in rows.values()} <= {"ok", "absent", "skipped"}, rows
            continue
        assert list(rows)[0] == "eager" and case["roofs"]["matmul"] > 0
        for name in ["eager", *(name for name in rows if name.startswith("ours"))]:
            if BENCHES[case["bench"]].rivals[name].device == "cuda":
                assert rows[name]["status"] == "absent", "--device cpu"
                continue
            assert rows[name]["status"] == "ok", rows[name]
            assert rows[name]["p20"] <= rows[name]["median"] <= rows[name]["p80"]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["linear_logprobs"], "nearest: 'linear_logprob'"),
        (["logprob", "--dtype", "bf32"], "nearest: "),
        (["logprob", "--sizes", "1,2"], "N,D,V"),
        (["step", "--sizes", "1,2,3"], "small or default"),
        (["logprob", "--only", "nobody"], "'nobody'"),
    ],
)
def test_unknown_names_are_refused(argv, says):
    with pytest.raises(SystemExit) as stopped:
        run.main(argv)
    assert says in str(stopped.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_was_touched_and_freed():
    MiB = 1 << 20

    def call():
        first = torch.ones(96 * MiB // 4)
        del first
        return {"dx_N": torch.ones(64 * MiB // 4)}

    peak_bytes, outputs = memory.peak_on_cpu(call)
    assert peak_bytes == pytest.approx(96 * MiB, abs=2 * MiB)
    found = memory.describe(peak_bytes, outputs)
    assert found["extra_bytes"] == peak_bytes - 64 * MiB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_rival_in_its_own_process():
    inputs = clipped_surrogate.make_inputs(Size(1 << 20, 0, 0), torch.float32, "cpu")
    meter = memory.cpu_peak("clipped_surrogate", 1)
    found = meter("ours chunked", inputs, None)
    gradient_bytes = inputs["logp_N"].nbytes
    assert found["peak_bytes"] - found["extra_bytes"] == gradient_bytes < found["extra_bytes"] < 60 * gradient_bytes
    with pytest.raises(RuntimeError, match="nobody"):
        meter("nobody", inputs, None)


def test_an_update_whose_gradient_differs_is_not_timed():
    step.check(row := {"loss": 1.0, "grad_norm": 2.0}, {"loss": 1.0, "grad_norm": 2.0}, 1e-3)
    assert row["off"] == 0.0
    with pytest.raises(Wrong, match="gradient norm"):
        step.check({"loss": 1.0, "grad_norm": 2.1}, {"loss": 1.0, "grad_norm": 2.0}, 1e-3)


def fake_side(seconds, zero_advantage=0.0):
    def turn(size, export, threads):
        one = {"seconds": seconds, "rollout": 0.1, "reward": 0.05, "tokens": 50, "zero_advantage": zero_advantage}
        return [one | {"seconds": 99.0}] * trl.WARMUP + [one] * trl.COUNTED, 1 << 30, {"limit": size.limit}

    return turn


@pytest.fixture
def sides(monkeypatch):
    """TRL, present or not, and ours, without the processes."""
    monkeypatch.setattr(trl, "find_export", lambda start, threads: "export")
    monkeypatch.setattr(trl, "spawn", lambda arguments, threads: ('{"off": 0.0}', 0))
    monkeypatch.setattr(trl.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(trl, "SIDES", {"TRL": fake_side(0.6), "ours": fake_side(0.3)})
    return lambda reward: {row["rival"]: row for row in trl.run("cpu", trl.Size("grpo", reward, "sft"), 2, 1, print)}


def test_steps_of_both_sides_are_compared_without_the_warm_up(sides):
    rows = sides("alternate")
    ours, theirs = rows["ours"], rows["TRL"]
    assert ours["median"] == pytest.approx(0.3) and theirs["median"] == pytest.approx(0.6)
    assert ours["time_ratio"] == pytest.approx(0.5) and ours["num_steps"] == 2 * trl.COUNTED
    assert ours["update"] == pytest.approx(0.15) and ours["tokens_per_second"] == pytest.approx(50 / 0.3)
    assert ours["peak_bytes"] == 1 << 30 and theirs["settings"] == {"limit": 40}
    assert ours["rates"] == pytest.approx([2.0, 2.0]) and "rate" not in theirs
    assert "2.00x (2.00 - 2.00)" in render("title", list(rows.values()), trl.BENCH.columns)
    json.dumps(rows, allow_nan=False)


def test_equal_work_with_groups_to_leave_out_is_wrong(sides, monkeypatch):
    monkeypatch.setitem(trl.SIDES, "ours", fake_side(0.3, zero_advantage=0.25))
    assert sides("alternate")["ours"]["status"] == "wrong"
    assert sides("task")["ours"]["zero_advantage"] == 0.25


def test_absent_trl_is_a_row(sides, monkeypatch):
    monkeypatch.setattr(trl.importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    rows = sides("task")
    assert rows["TRL"]["status"] == "absent" and "trl" in rows["TRL"]["why"]
    assert rows["ours"]["status"] == "ok" and "time_ratio" not in rows["ours"]


def test_a_process_that_fails_is_a_row_with_its_last_line(sides, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="KeyError: 7"):
        trl.spawn(["-c", "raise KeyError(7)"], 1)
    out, peak = trl.spawn(["-c", "print(len(bytes(64 << 20)))"], 1)
    assert int(out) == 64 << 20 < peak


def test_a_row_that_is_new_has_what_the_table_needs():
    rows = {"a": new_row("a"), "b": new_row("b")}
    take_turns(rows, rows, 2, lambda row: [1.0 if row is rows["a"] else 2.0])
    summarize(rows, {}, base="a")
    assert rows["b"]["time_ratio"] == pytest.approx(2.0) and "roof_share" not in rows["b"]
