"""The benchmarks' own arithmetic, and what becomes of a rival that is wrong, absent or out of memory."""

import json
import sys

import pytest
import torch

from bench import (
    BENCHES,
    attention,
    clipped_surrogate,
    decode_step,
    decoding,
    heads,
    logprob,
    memory,
    overlap,
    run,
    stand_in,
    step,
    teachers,
    trl,
    trl_drop_in,
)
from bench.harness import Benchmark, Experiment, Rival, Size, Work, Wrong, new_row, run_case, summarize, take_turns
from bench.table import render
from engine import model
from engine.config import load_config
from engine.rollouts.cache import SlotCache
from kernels import drop_in

PURE = [name for name, bench in BENCHES.items() if not isinstance(bench, Experiment)]
NOT_RUN = ("absent", "skipped")
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


def results(bench, clock=lambda calls: [call() and 1e-3 for call in calls], rounds=3, **more):
    rows = {}
    run_case(rows, bench, SIZE, "fp32", "cpu", rounds=rounds, clock=clock, roofs=ROOFS, **more)
    return rows


def experiment(module, size=None, rounds=1):
    """The rows of a run of an experiment's (small) size."""
    rows = {rival: new_row(rival, note) for rival, note in module.BENCH.rivals.items()}
    module.BENCH.run(rows, "cpu", size or module.BENCH.sizes["small"][0], rounds, 1, lambda what: None)
    return rows


@pytest.fixture
def narrow(monkeypatch):
    """The name of a stand-in with the whole vocabulary and little else."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setitem(stand_in.SHAPES, "narrow", sizes | {"num_attention_heads": 2, "num_key_value_heads": 1})
    return "narrow"


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
    run.main(["--device", "cpu", "--sizes", "small", "--rounds", "1", "--only", "ours,GEMMs", "--json", str(path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(path.read_text())
    assert {case["bench"] for case in found["cases"]} == set(BENCHES)
    assert found["provenance"]["versions"]["torch"] and found["provenance"]["threads"] == 1
    for case in found["cases"]:
        rows = {row["rival"]: row for row in case["rows"]}
        if case["bench"] not in PURE:
            assert list(rows) == list(BENCHES[case["bench"]].rivals)
            assert {row["status"] for name, row in rows.items() if name != "generate_batch"} <= {"ok", *NOT_RUN}, rows
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
        (["step", "--sizes", "1,2,3"], "sizes of this experiment are default, first, small, frozen-tiny, frozen"),
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


def test_the_other_trainers_padded_batch_becomes_samples():
    found = {
        "prompt_ids": torch.tensor([[0, 1, 2], [3, 4, 5]]), "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[6, 7], [8, 0]]), "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "advantages": torch.tensor([0.5, -0.5]),
    }  # fmt: skip
    samples = trl.as_samples(found)
    assert [(s.prompt, s.answer, s.adv) for s in samples] == [([1, 2], [6, 7], 0.5), ([3, 4, 5], [8], -0.5)]
    assert [s.values["logp_behaviour"].tolist() for s in samples] == [[0.0, 0.0], [0.0]]


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
    return lambda reward: experiment(trl, trl.Size("grpo", reward, "sft"), rounds=2)


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


def test_a_head_that_differs_from_trls_is_not_timed(monkeypatch):
    pytest.importorskip("trl", reason="needs TRL: pip install --no-deps -r requirements-bench.txt")
    own = drop_in._TRLHead.apply
    monkeypatch.setattr(drop_in._TRLHead, "apply", lambda *head: own(*head[:4], 1.1, *head[5:]))
    rows = experiment(trl_drop_in)
    assert rows["TRL"]["status"] == "ok" and rows["TRL"]["median"] > 0 and "median" not in rows["ours"]
    assert rows["ours"]["status"] == "wrong" and "off by" in rows["ours"]["why"]
    monkeypatch.undo()
    rows = experiment(trl_drop_in)
    assert rows["ours"]["median"] > 0 and rows["ours"]["off"] <= trl_drop_in.LIMIT


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


def test_a_first_visit_takes_few_sizes_once_and_nothing_that_compiles(monkeypatch, capsys):
    for bench in BENCHES.values():
        assert run.sizes_of(bench, "first", "cuda") == bench.sizes.get("first", bench.sizes["cuda"])
    assert [len(BENCHES[name].sizes["first"]) for name in ("linear_logprob", "logprob", "step", "decoding")] == [1] * 4
    rows = results(bench_of(compiled=Rival(failing(KeyError()), compiles=True)), brief=True)
    assert rows["compiled"]["status"] == "skipped" and rows["eager"]["status"] == "ok"
    asked = []
    monkeypatch.setattr(run, "run", lambda *arguments: asked.append(arguments[4]) or {})
    for more in ([], ["--sizes", "first"], ["--sizes", "first", "--rounds", "2"]):
        run.main(["logprob", "--device", "cpu", *more])
    assert asked == [3, 1, 2]


def test_what_was_timed_is_kept_when_the_run_ends_early(monkeypatch, tmp_path):
    def ends(rows, device, size, rounds, threads, tick):
        take_turns({"a": None}, rows, 1, lambda call: [2.0, 4.0], tick)
        tick("b")
        raise KeyboardInterrupt

    bench = Experiment({"small": [Size(1, 2, 3)], "cpu": []}, ends, {"a": "", "b": ""}, ())
    monkeypatch.setitem(BENCHES, "ends", bench)
    with pytest.raises(KeyboardInterrupt):
        run.main(["ends", "--device", "cpu", "--sizes", "small", "--json", str(tmp_path / "found.json")])
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    a, b = case["rows"]
    assert a["median"] == 3.0 and a["status"] == "ok"
    assert b["status"] == "unfinished" and "median" not in b


def test_bytes_of_a_decode_step_in_closed_form():
    lm, size = decoding.load("tiny", "cpu"), decode_step.Size("tiny", 4, 12)
    vocabulary, wide, kv, inner = 407, 128, 4 * 16, 768
    layer = 2 * wide * (wide + kv) + wide + 2 * kv + 3 * wide * inner + 2 * wide  # q, o, k, v; biases; mlp; norms
    head, cache = 4 * vocabulary * wide, 4 * 2 * 2 * kv * 12
    found = decode_step.least_bytes(lm, size, lm.dtype.itemsize)
    assert found["head"] == head and found["sampler"] == 4 * 4 * vocabulary
    assert found["body"] == 4 * (2 * layer + wide) + 4 * cache
    assert found["step"] == found["step, top-p"] == found["body"] + head
    assert found["place 4"] == found["place all"] == 4 * cache


def test_parts_of_a_decode_step(monkeypatch, narrow):
    monkeypatch.setattr(decode_step, "measure_roofs", lambda *arguments: ROOFS)
    rows = experiment(decode_step)
    assert all(row["status"] == "ok" and row["floor"] > 0 for row in rows.values()), rows
    assert rows["step"]["share"] == 1.0 and 0 < rows["sampler"]["share"] < rows["step, top-p"]["share"]
    assert rows["step"]["tokens_per_second"] == pytest.approx(4 / rows["step"]["median"])
    assert rows["step"]["logits_error"] < 1e-5, "of the plain forward in fp64"
    rows = experiment(decode_step, decode_step.Size(narrow, 1, 12))
    assert rows["place 4"]["status"] == "skipped" and rows["place all"]["status"] == "ok"
    assert 0 < rows["step"]["logits_error"] < 2 * rows["step"]["plain_error"] < 1e-2, "in bf16, against fp32"


def test_a_decode_step_that_reads_another_cache_is_wrong(monkeypatch):
    fill = SlotCache.fill
    shifted = lambda self, staged, row_N, slot_N, length_N: fill(
        self, [(key.roll(1, 2), value) for key, value in staged], row_N, slot_N, length_N
    )
    monkeypatch.setattr(SlotCache, "fill", shifted)
    rows = experiment(decode_step)
    assert {row["status"] for row in rows.values()} == {"wrong"} and "is off by" in rows["body"]["why"]
    assert not any(row["seconds"] for row in rows.values())


def test_a_row_that_ends_is_not_timed(monkeypatch):
    monkeypatch.setattr(decode_step, "ROOM", decode_step.DRAWN + 1)
    rows = experiment(decode_step)
    assert rows["step"]["status"] == "wrong" and "ended" in rows["step"]["why"]


def test_pairs_that_attention_needs_in_closed_form():
    T, part, lengths, causal = 48, 12, (90, 6), lambda n: n * (n + 1) // 2
    segments = 2 * (4 * causal(part) + 3 * part * part)
    wanted = {"causal": 2 * causal(T), "segments": segments, "packed": sum(map(causal, lengths))}
    for mask, pairs in wanted.items():
        size = attention.Size(2, 4, 2, 16, T, mask, "update")
        assert attention.needed_pairs(attention.make_inputs(size, torch.float32, "cpu")) == pairs
    assert tuple(attention.lengths_of(size).tolist()) == lengths
    assert attention.count_work(size, 100, 4) == Work(7 * 2 * 100 * 4 * 16, 2 * 4 * 2 * T * 16 * 2 * (4 + 2))
    assert attention.count_work(size._replace(use="prefill"), 100, 4).flops == 2 * 2 * 100 * 4 * 16


@pytest.mark.parametrize("size", attention.SIZES["small"], ids=lambda size: f"{size.mask}-{size.use}")
def test_attention_runs_by_what_is_for_its_mask(size):
    rows = experiment(attention, size)
    more = {"padded"} if size.mask == "packed" else set()
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"default", "flash", "math"} | more
    assert {row["status"] for row in rows.values()} == {"ok", "absent"}
    elsewhere = "needs a cuda device" if size.mask == "packed" else f"not for a mask that is {size.mask}"
    assert rows["varlen"]["why"] == elsewhere and "first" not in rows["varlen"]


def varlen_of(edges, attend):
    """torch's varlen_attn in this Python: attend on the tokens between two edges, who stand first."""

    def varlen_attn(q_THD, k_TKD, v_TKD, edge_q, edge_k, longest_q, longest_k, *, window_size, enable_gqa):
        assert window_size == (-1, 0) and edge_q.dtype == torch.int32 and edge_q.tolist() == edge_k.tolist() == edges
        assert longest_q == longest_k == max(b - a for a, b in zip(edges, edges[1:]))
        spans = [[x[a:b].transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD)] for a, b in zip(edges, edges[1:])]
        return torch.cat([attend(*qkv)[0].transpose(0, 1) for qkv in spans])

    return varlen_attn


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("mask", ["packed", "segments"])
def test_what_needs_a_gpu_is_asked_for_the_same_attention(monkeypatch, mask):
    size = attention.Size(2, 4, 2, 16, 80, mask, "prefill")
    inputs = attention.make_inputs(size, torch.float32, "cpu")
    qkv = [inputs[name] for name in attention.LEAVES]
    wanted = attention.truth(size, inputs)["out_NHTD"]
    monkeypatch.setattr(torch, "compile", lambda fn, **more: fn)
    assert (attention.flex(inputs)(*qkv) - wanted).abs().max() < 1e-5
    if mask == "packed":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of([0, 150, 160], attention.written_out))
        assert (attention.varlen(inputs)(*qkv) - wanted).abs().max() < 1e-5


def test_a_packed_row_that_sees_its_neighbours_is_wrong(monkeypatch):
    monkeypatch.setattr(attention, "mask_of", lambda inputs: None)
    rows = experiment(attention, attention.SIZES["small"][0])
    assert rows["default"]["status"] == rows["math"]["status"] == "wrong" and rows["padded"]["status"] == "ok"


def test_a_back_end_is_wrong_or_refuses_with_its_reason(monkeypatch):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    slanted = lambda *qkv, attn_mask, is_causal, **more: sdpa(*qkv, attn_mask=attn_mask, is_causal=False, **more)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", slanted)
    rows = experiment(attention, next(size for size in attention.SIZES["small"] if size.mask == "causal"))
    assert rows["math"]["status"] == rows["default"]["status"] == "wrong" and "first" not in rows["math"]
    assert rows["cuDNN"]["status"] == "absent" and "backend" in rows["cuDNN"]["why"]


def test_busy_time_and_launches_of_spans():
    on_streams, within = [(0, 4), (2, 6), (10, 12)], [(0, 10), (2, 4), (20, 25)]
    assert step.describe_spans(on_streams, "cuda") == {"kernel_seconds": 8e-9, "launches": 3}
    assert step.describe_spans(within, "cpu") == {"kernel_seconds": 15e-9, "launches": 2}
    assert step.describe_spans([], "cuda") == {}


def test_adapters_are_compared_with_the_loss_of_all_weights_and_their_own_gradients():
    rows = experiment(step)
    eager, full, lora = (rows[name] for name in ("eager", "ours chunked", "ours chunked, LoRA"))
    assert lora["status"] == "ok" and lora["loss"] == pytest.approx(full["loss"], rel=1e-5)
    base = step.base_of(lora, rows)
    assert base == {"loss": eager["loss"], "grad_norm": rows["eager, LoRA"]["grad_norm"]}
    assert 0 < base["grad_norm"] != pytest.approx(full["grad_norm"], rel=0.1)
    assert step.base_of(full, rows) == {name: eager[name] for name in base}


def test_memory_in_all_holds_what_a_rival_keeps():
    kept = {}
    with step.prepared("cpu", step.SIZES["small"][0]) as updates:
        for rival in ("ours chunked", "ours chunked, LoRA"):
            updates(rival)
            policy, found = updates.learner(rival).policy, updates.memory(rival, lambda run: (1 << 20, run()))
            sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
            least = sum(4 * n * (3 if trained else 1) for n, trained in sizes)
            kept[rival] = found["all_bytes"] - found["extra_bytes"]
            assert found["extra_bytes"] == 1 << 20 and least <= kept[rival] <= least + 4096, (
                "moments of what is trained"
            )
    assert kept["ours chunked, LoRA"] < 0.7 * kept["ours chunked"]


def test_where_the_time_of_an_update_goes():
    row = experiment(step)["ours chunked"]
    assert row["busy"] == row["kernel_seconds"] / row["median"] > 0 and row["launches"] > 100
    assert all(row[phase] > 0 for phase in step.PHASES)


def test_eager_that_breaks_off_in_its_backward_harms_nobody(monkeypatch):
    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise MemoryError

    from kernels import eager

    whole = eager.linear_clipped_surrogate
    full = lambda hidden_ND, *arguments, **more: whole(Full.apply(hidden_ND), *arguments, **more)
    monkeypatch.setattr(eager, "linear_clipped_surrogate", full)
    rows = experiment(step, rounds=2)
    ours = rows["ours chunked"]
    assert rows["eager"]["status"] == "out of memory" and len(ours["seconds"]) == 2
    assert ours["status"] == "ok" and ours["off"] == 0.0 and "time_ratio" not in ours


def test_ours_is_timed_where_generate_fails(monkeypatch):
    def full(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoding, "generate", full)
    monkeypatch.setattr(decoding, "generate_batch", full)
    rows = experiment(decoding)
    assert rows["ours"]["status"] == "ok" and rows["ours"]["tokens_per_second"] > 0
    assert rows["generate"]["status"] == rows["generate_batch"]["status"] == "out of memory"


def test_answers_other_than_those_of_generate_are_wrong(monkeypatch):
    whole = decoding.ours
    other = lambda *arguments, **more: [[(ids[0] + 1) % 400, *ids[1:]] for ids in whole(*arguments, **more)]
    monkeypatch.setattr(decoding, "ours", other)
    monkeypatch.setattr(decoding, "generate_batch", decoding.generate)
    rows = experiment(decoding)
    assert rows["ours"]["status"] == "wrong" and "8 of 8" in rows["ours"]["why"]
    assert rows["generate"]["status"] == rows["generate_batch"]["status"] == "ok"


def test_a_stand_in_is_saved_with_a_tokenizer_that_loads_fast(narrow, tmp_path):
    stand_in.save(narrow, tmp_path / "model", "cpu")
    tokenizer, tiny = model.load_tokenizer(str(tmp_path / "model")), model.load_tokenizer("tiny")
    assert len(tokenizer) == stand_in.VOCABULARY
    assert tokenizer.get_added_vocab() == tiny.get_added_vocab(), "each added token is searched for, in every text"
    assert all(tokenizer.decode([i]) for i in range(0, stand_in.VOCABULARY, 97))
    assert tokenizer.decode([151935, 700]) == "<151935><700>"
    text = "What is 12 + 7? <think>12 + 7 = 19</think><answer>19</answer> <700>"
    chat = [{"role": "user", "content": text}]
    assert tokenizer.encode(text) == tiny.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert model.encode_prompt(tokenizer, chat) == model.encode_prompt(tiny, chat)
    assert model.turn_end(tokenizer) == model.turn_end(tiny)


def test_rotary_frequencies_of_a_bf16_model_stay_fp32(narrow):
    lm, exact = decoding.load(narrow, "cpu"), stand_in.make_model(narrow, "cpu")
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert torch.equal(lm.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


def fake_training(seconds):
    """train_steps without the process; seconds: of a step by lag."""

    def train(settings, threads):
        phases = {"rollout": 0.3, "advantage": 0.1, "update": 0.5, "forward": 0.2, "weight_sync": 0.1, "wait": 0.02}
        tokens = 10 if settings["kernels"] == "auto" else 11
        row = {"generated_tokens": tokens, "seconds/step": seconds[settings["lag"]]}
        return [row | {f"seconds/{phase}": x for phase, x in phases.items()}] * settings["steps"], 1 << 30

    return train


def test_phases_of_both_lags_and_what_is_hidden(monkeypatch):
    monkeypatch.setattr(overlap, "find_model", lambda *arguments: "tiny")
    monkeypatch.setattr(overlap, "train_steps", fake_training({0: 1.0, 1: 0.7}))
    monkeypatch.setattr(overlap, "leave_out", lambda *arguments: None)
    rows = experiment(overlap, overlap.Size("tiny", 4, 4, 8, 512))
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    lag1 = rows["lag 1"]
    assert lag1["hidden"] == pytest.approx((0.4 + 0.6 - 0.7) / 0.4) and lag1["speed"] == pytest.approx(1 / 0.7)
    assert [lag1[phase] for phase in overlap.PHASES] == [0.3, 0.0, 0.1, 0.5, 0.2, 0.0, 0.0, 0.1, 0.02]
    assert "1024 MiB" in render("title", list(rows.values()), overlap.BENCH.columns)
    estimate = overlap.estimated_memory({**overlap.SETTINGS, "model": "tiny"})
    assert estimate > overlap.estimated_memory({**overlap.SETTINGS, "model": "tiny", "micro_tokens": 1}) > 0


@pytest.mark.parametrize("way", teachers.WAYS)
def test_a_student_has_its_own_shape_and_settings_that_train_takes(tmp_path, way):
    start, *settings = teachers.WAYS[way]
    folder = teachers.make_student(tmp_path / "student")
    config = load_config([*map(str, settings), "--model", str(folder), "--init_from", start])
    assert start in ("student", *teachers.WAYS) and config.start == start and config.context == "zeroshot"
    assert json.loads((folder / "config.json").read_text()).items() >= teachers.STUDENT.items()
    assert (folder / "tokenizer.json").exists() and not list(folder.glob("*.yaml"))
