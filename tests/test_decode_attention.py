"""Decode attention: eager against torch's own, chunked and fused against eager, and what each promises besides.

Where there is no GPU the fused form runs in Triton's interpreter, in a process of its own: see test_fused.py.
"""

import functools
import math
import mmap
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels import chunked, decode_attention, eager, fused
from kernels.checks import outside_columns
from tests.kernel_cases import (
    DEVICES,
    INF,
    NAN,
    NEEDS_INTERPRETER,
    ON_GPU,
    assert_close_as_eager,
    double,
    poisoned_memory,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FUSED_DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=ON_GPU)]
RUNS = [(fused, "cpu")] if INTERPRETED else [(impl, "cpu") for impl in (eager, chunked)]
RUNS += [pytest.param(impl, "cuda", marks=ON_GPU) for impl in (eager, chunked, fused) if not INTERPRETED]
every_form = pytest.mark.parametrize("impl, device", RUNS, ids=lambda x: getattr(x, "__name__", x))
where_fused_runs = pytest.mark.parametrize("device", FUSED_DEVICES)
where_torch_runs = pytest.mark.parametrize("device", [] if INTERPRETED else DEVICES)

SHAPES = {  # M, H, K, L, D, lengths
    "small": (3, 4, 2, 40, 16, (0, 1, 40)),
    "around the borders of the fused form's splits": (7, 14, 2, 523, 64, (523, 0, 1, 255, 256, 257, 512)),
    "a head for each": (3, 6, 6, 130, 24, (7, 65, 129)),
    "more heads on one key/value head than a program takes": (2, 20, 1, 70, 8, (69, 3)),
    "one of all": (1, 1, 1, 1, 256, (1,)),
}
SMALL, SPLIT = SHAPES["small"], SHAPES["around the borders of the fused form's splits"]
WIDE = (3, 4, 1, 520, 256, (520, 300, 9))  # heads of Gemma 3
WINDOWS = (1, 256, 257) if INTERPRETED else (1, 64, 256, 257, 500)


@pytest.fixture(autouse=True)
def poison():
    with poisoned_memory():
        yield


def cache_of(M, H, K, L, D, lengths, dtype=torch.float32, device="cpu", unused=NAN, seed=0, window=None):
    """q, keys, values, length: slices of larger buffers, values with the column before the head, two slots too many.

    `unused`: what columns past the length and before the window hold, in turn with its negative.
    """
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=gen).to(device, dtype)
    q_MHD, keys_SKLD = draw(M, H + 1, D)[:, :H], draw(M + 2, K, L + 3, D)[:, :, 2 : L + 2]
    values_SKLD = draw(M + 2, L, K + 1, D)[:, :, 1:].transpose(1, 2)
    for m, length in enumerate(lengths):
        for x in (keys_SKLD, values_SKLD):
            x[m, :, length::2], x[m, :, length + 1 :: 2] = unused, -unused
            if window is not None and window < length:
                x[m, :, : length - window : 2], x[m, :, 1 : length - window : 2] = unused, -unused
    return q_MHD, keys_SKLD, values_SKLD, torch.tensor(lengths, device=device)


def torch_attention(q_MHD, keys_SKLD, values_SKLD, length_M, scale=None, window=None):
    """A row and a head at a time, on exactly the columns that count."""
    out_MHD = torch.zeros_like(q_MHD)
    group = q_MHD.shape[1] // keys_SKLD.shape[1]
    for m, length in enumerate(length_M.tolist()):
        for h in range(q_MHD.shape[1] if length else 0):
            first = 0 if window is None else max(0, length - window)
            k_LD, v_LD = (x[m, h // group, first:length] for x in (keys_SKLD, values_SKLD))
            out_MHD[m, h] = F.scaled_dot_product_attention(q_MHD[m, h : h + 1], k_LD, v_LD, scale=scale)[0]
    return out_MHD


@where_torch_runs
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_eager_is_attention(shape, device):
    for how in ({}, {"scale": 0.3}, {"window": 1}, {"window": 30, "scale": 0.3}):
        inputs = double(*cache_of(*shape, device=device, window=how.get("window")))
        ours, want = eager.decode_attention(*inputs, **how), torch_attention(*inputs, **how)
        assert ours.dtype == torch.float64 and (ours - want).abs().max() < 1e-12


@every_form
def test_by_hand(impl, device):
    """Scores log 2, 0 and a column that does not count: two thirds of 3, one third of 6; without a query, the mean."""
    keys, values = torch.zeros(1, 1, 3, 8, device=device), torch.full((1, 1, 3, 8), NAN, device=device)
    keys[..., 0, 0], keys[..., 2, 0], values[..., 0, :], values[..., 1, :] = 1.0, NAN, 3.0, 6.0
    q = torch.zeros(1, 2, 8, device=device)
    q[0, 0, 0] = 2 * math.log(2)
    out = impl.decode_attention(q, keys, values, torch.tensor([2], device=device), scale=0.5)
    want = torch.tensor([4.0, 4.5], device=device)[:, None].expand(2, 8)
    assert torch.allclose(out[0], want, atol=1e-6)
    out = impl.decode_attention(q, keys, values, torch.tensor([2], device=device), scale=0.5, window=1)
    assert torch.equal(out, torch.full_like(out, 6.0)), "the last column alone"


def ulps_of(impl, device, dtype):
    """torch's attention of fp32 under a mask multiplies on tensor cores, as three products of tf32 (from compute
    capability 8.0 on): a factor keeps 22 of its 24 bits. Two ulp each for the probabilities and the values."""
    return 5 if (impl, device, dtype) == (chunked, "cuda", torch.float32) else 1


@every_form
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_accuracy(shape, impl, device):
    for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16):
        for scale in (None, 0.7):
            inputs = cache_of(*shape, dtype, device)
            truth = eager.decode_attention(*double(*inputs), scale=scale)
            base, ours = (i.decode_attention(*inputs, scale=scale) for i in (eager, impl))
            assert ours.dtype == dtype and ours.shape == truth.shape
            assert ours[inputs[3] == 0].eq(0).all()
            assert_close_as_eager("out", [truth], [base], [ours], ulps=ulps_of(impl, device, dtype))


@every_form
@pytest.mark.parametrize("shape", [SPLIT, WIDE], ids=["splits", "wide heads"])
@pytest.mark.parametrize("window", WINDOWS)
def test_accuracy_behind_a_window(window, shape, impl, device):
    for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16):
        inputs = cache_of(*shape, dtype, device, window=window)
        truth = torch_attention(*double(*inputs), window=window)
        base, ours = (i.decode_attention(*inputs, window=window) for i in (eager, impl))
        assert_close_as_eager("out", [truth], [base], [ours], ulps=ulps_of(impl, device, dtype))


@every_form
def test_a_window_as_long_as_the_slot_changes_no_bit(impl, device):
    inputs = cache_of(*SPLIT, device=device)
    whole = impl.decode_attention(*inputs)
    for window in (523, 1 << 40):
        assert torch.equal(impl.decode_attention(*inputs, window=window), whole)


@every_form
@pytest.mark.parametrize("window", [None, 256])
def test_whatever_the_unused_columns_hold(window, impl, device):
    run = lambda unused: impl.decode_attention(  # noqa: E731
        *cache_of(*SPLIT, device=device, unused=unused, window=window), window=window
    )
    clean = run(0.0)
    for unused in (NAN, INF, 1e30):
        ours = run(unused)
        assert (ours - clean).abs().max() <= 1e-6
        if impl is fused:
            assert torch.equal(ours, clean)


@every_form
def test_a_nan_that_counts_shows_where_it_is_read(impl, device):
    q, keys, values, length = cache_of(*SPLIT, device=device)
    keys[0, 1, 3, 0], values[3, 0, 0, 5] = NAN, NAN
    out = impl.decode_attention(q, keys, values, length)
    want = torch.zeros_like(out, dtype=torch.bool)
    want[0, 7:], want[3, :7, 5] = True, True
    assert torch.equal(out.isnan(), want)
    keys[5, 0, 256, 0], keys[6, 0, 212, 0], keys[6, 1, 211, 0] = NAN, NAN, NAN
    out = impl.decode_attention(q, keys, values, length, window=300)
    want[0], want[5, :7], want[6, :7] = False, True, True
    assert torch.equal(out.isnan(), want), "the first and the last column of a window, not those before it"


@every_form
def test_edges(impl, device):
    q, keys, values, length = cache_of(*SMALL, device=device)
    want = impl.decode_attention(q, keys, values, length)
    assert torch.equal(impl.decode_attention(q, keys, values, length.int()), want), "int32 lengths"
    assert torch.equal(impl.decode_attention(q, keys, values, length), want), "a rerun"
    assert impl.decode_attention(q, keys, values, torch.zeros_like(length)).eq(0).all()
    assert impl.decode_attention(q[:0], keys, values, length[:0]).shape == (0, 4, 16)
    none = impl.decode_attention(q, keys[:, :, :0], values[:, :, :0], torch.zeros_like(length))
    assert none.shape == q.shape and none.eq(0).all()
    odd = torch.randn(6, 2, 40, 16 + 3, device=device)[..., 1:17]  # rows that start on no 128-bit word
    ours, truth = (i.decode_attention(q, odd, odd, length) for i in (impl, eager))
    assert torch.allclose(ours, truth, atol=1e-6)


@every_form
def test_wrong_arguments_are_named(impl, device):
    q, keys, values, length = cache_of(*SMALL, device=device)
    wrong = {
        "q_MHD must have shape": (q[0], keys, values, length),
        "q_MHD must have a multiple of 2": (q[:, :3], keys, values, length),
        "keys_SKLD must have shape": (q[..., :8], keys, values, length),
        "keys_SKLD must be torch.float32": (q, keys.half(), values, length),
        "keys_SKLD must have a slot": (q, keys[:2], values[:2], length),
        "values_SKLD must have shape": (q, keys, values[:, :, 1:], length),
        "values_SKLD must be torch.float32": (q, keys, values.half(), length),
        "length_M must be torch.int32": (q, keys, values, length.float()),
        "length_M must have shape": (q, keys, values, length[:2]),
        "length_M must be a tensor": (q, keys, values, [0, 1, 40]),
    }
    if device == "cpu":
        wrong["length_M must lie in \\[0, 40\\], got 0 to 41"] = (q, keys, values, length + (length == 40))
        wrong["got -1 to"] = (q, keys, values, length - 1)
    for says, arguments in wrong.items():
        with pytest.raises(ValueError, match=says):
            impl.decode_attention(*arguments)
    for scale in (NAN, "1"):
        with pytest.raises(ValueError, match="scale must be a finite number"):
            impl.decode_attention(q, keys, values, length, scale=scale)
    for window in (0, -1, 2.0, "1"):
        with pytest.raises(ValueError, match="window must be a whole number of columns from 1 on"):
            impl.decode_attention(q, keys, values, length, window=window)


@every_form
def test_a_gradient_is_refused(impl, device):
    q, keys, values, length = cache_of(*SMALL, device=device)
    for i in range(3):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, keys, values))]
        with pytest.raises(ValueError, match="has no gradient"):
            impl.decode_attention(*leaves, length)
        with torch.no_grad():
            assert torch.equal(impl.decode_attention(*leaves, length), impl.decode_attention(q, keys, values, length))


@every_form
def test_compiles_whole(impl, device):
    inputs = cache_of(*SMALL, device=device)
    for window in (None, 3):
        double_of = lambda *x, window=window: 2 * impl.decode_attention(*x, window=window)  # noqa: E731
        compiled = torch.compile(double_of, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(*inputs), double_of(*inputs), atol=1e-6)
    torch.compiler.reset()


class TestChunked:
    @where_torch_runs
    @pytest.mark.parametrize("scratch_bytes", [1, 1 << 30])
    @pytest.mark.parametrize("window", [None, 300])
    def test_forms_agree(self, window, device, scratch_bytes, monkeypatch):
        monkeypatch.setitem(chunked.SCRATCH_BYTES, device, scratch_bytes)
        M, H, K, L, D, lengths = SPLIT
        q, keys, values, length = cache_of(*SPLIT, device=device, unused=1e4)
        inputs = q.unflatten(1, (K, H // K)), keys[:M], values[:M]
        outside = outside_columns(L, length, window)
        columns = [slice(max(0, n - (window or L)), n) for n in lengths]
        rows = chunked._attend_to_rows(*inputs, columns, None)
        everything = chunked._attend_to_all(*inputs, outside, slice(max(lengths)), None)
        unseen = chunked._attend_unseen(*inputs, outside, None)
        assert torch.allclose(rows, unseen, atol=1e-6)
        assert torch.allclose(rows[length > 0], everything[length > 0], atol=1e-6)

    @pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter")
    def test_columns_past_the_longest_are_not_read(self, monkeypatch):
        """Nor rows one by one, unless their own columns are much shorter or hold NaN."""
        calls = []
        by_row = chunked._attend_to_rows
        monkeypatch.setattr(chunked, "_attend_to_rows", lambda *x: calls.append(1) or by_row(*x))
        run = lambda lengths, **kwargs: chunked.decode_attention(*cache_of(3, 4, 2, 900, 64, lengths, **kwargs))
        run((300, 300, 300), unused=NAN)
        run((300, 290, 200), unused=1e4)
        assert len(calls) == 0
        run((300, 290, 200), unused=NAN)
        assert len(calls) == 1
        run((900, 10, 20), unused=1e4)
        assert len(calls) == 2

    @pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter")
    def test_columns_before_all_windows_are_not_read(self, monkeypatch):
        read, attend = [], F.scaled_dot_product_attention
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, *x, **y: read.append(k) or attend(q, k, *x, **y)
        )
        chunked.decode_attention(*cache_of(3, 4, 2, 900, 64, (300, 290, 299), unused=1.0), window=100)
        assert [k.shape[:3] for k in read] == [(3, 2, 110)]


class TestFused:
    @NEEDS_INTERPRETER
    @pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="runs by itself there")
    def test_in_the_interpreter(self):
        quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
        command = [sys.executable, "-m", "pytest", *quiet, __file__]
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]

    @pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter")
    def test_a_cpu_without_the_interpreter_is_refused(self):
        with pytest.raises(ValueError, match="q_MHD is on a CPU"):
            fused.decode_attention(*cache_of(*SMALL))

    @where_fused_runs
    def test_what_does_not_run_is_refused(self, device):
        q, keys, values, length = cache_of(*SMALL, device=device)
        with pytest.raises(ValueError, match="q_MHD must not be torch.float64"):
            fused.decode_attention(*double(q, keys, values, length))
        with pytest.raises(ValueError, match="keys_SKLD must have stride 1"):
            fused.decode_attention(q, keys.mT.contiguous().mT, values, length)
        for wrong in (12, 264):
            with pytest.raises(ValueError, match=f"a multiple of 8 up to 256 here, got {wrong}"):
                fused.decode_attention(*cache_of(1, 1, 1, 4, wrong, (2,), device=device))

    @where_fused_runs
    @pytest.mark.parametrize("window", [200] if INTERPRETED else [None, 200])
    def test_a_row_does_not_depend_on_its_batch(self, window, device):
        q, keys, values, length = cache_of(*SPLIT, device=device)
        attend = functools.partial(fused.decode_attention, window=window)
        whole = attend(q, keys, values, length)
        order = torch.tensor([4, 2, 6, 0, 1, 3, 5], device=device)
        mixed = attend(q[order], keys[order], values[order], length[order])
        assert torch.equal(mixed, whole[order])
        for m in (0, 3, 5):
            row = slice(m, m + 1)
            assert torch.equal(attend(q[row], keys[row], values[row], length[row]), whole[row])
        short = attend(q[3:4], keys[3:4, :, :255], values[3:4, :, :255], length[3:4])
        assert torch.equal(short, whole[3:4]), "a smaller slot"

    @where_fused_runs
    @pytest.mark.parametrize("window", [None, 300])
    def test_more_splits_than_are_summed_at_once(self, window, device, monkeypatch):
        monkeypatch.setattr(decode_attention, "BLOCK_P", 1)
        inputs = cache_of(*SPLIT, device=device)
        forms = (eager, double(*inputs)), (eager, inputs), (fused, inputs)
        assert_close_as_eager("out", *[[form.decode_attention(*x, window=window)] for form, x in forms])

    @where_fused_runs
    def test_the_op_is_well_formed(self, device):
        torch.library.opcheck(decode_attention.decode_attention, (*cache_of(*SMALL, device=device), 0.25, 7))

    @pytest.mark.skipif(not INTERPRETED, reason="maps host memory")
    @pytest.mark.parametrize("M, L, slot, column", [(3, 5, (1 << 30) + 7, 8), (1, 260, 0, (1 << 23) + 1)])
    def test_beyond_2_to_31_elements(self, M, L, slot, column):
        """Slots, or columns, over 2**31 elements of memory that is only mapped: int32 offsets would read elsewhere."""
        q, keys, values, length = cache_of(M, 2, 1, L, 8, (L,) * M)
        far = []
        for x in (keys, values):
            size, no_reserve = 4 * ((M - 1) * slot + L * column), 0x4000
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
            far.append(torch.frombuffer(memory, dtype=torch.float32).as_strided((M, 1, L, 8), (slot, 0, column, 1)))
            far[-1].copy_(x[:M])
        assert torch.equal(fused.decode_attention(q, *far, length), fused.decode_attention(q, keys, values, length))

    @where_fused_runs
    @pytest.mark.skipif(INTERPRETED, reason="launches on a device")
    @pytest.mark.parametrize("window", [None, 200])
    def test_a_graph_replays_other_lengths_without_a_sync(self, window, device):
        q, keys, values, length = cache_of(*SPLIT, torch.bfloat16, device, unused=1.0)
        attend = functools.partial(fused.decode_attention, q, keys, values, length, window=window)
        torch.use_deterministic_algorithms(False)  # poisoning would be captured too
        attend()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend()
        for shift in (0, 1, 3):
            length.copy_(length.roll(shift))
            graph.replay()
            assert torch.equal(out, attend())
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @where_fused_runs
    @pytest.mark.skipif(INTERPRETED, reason="too slow there")
    @pytest.mark.parametrize("M, H, K, D", [(1, 28, 4, 128), (32, 14, 2, 64), (4, 16, 8, 256)])
    @pytest.mark.parametrize("window", [None, 1024])
    def test_long_slots(self, window, M, H, K, D, device):
        gen = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 32768, (M,), generator=gen).tolist()
        inputs = cache_of(M, H, K, 32768, D, lengths, torch.bfloat16, device)
        base, ours = (impl.decode_attention(*inputs, window=window) for impl in (eager, fused))
        truth = torch_attention(*double(*inputs), window=window)
        assert_close_as_eager("out", [truth], [base], [ours])
