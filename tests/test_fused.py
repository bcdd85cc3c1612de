"""The Triton form against the oracle: the shared cases and its own promises.

Where there is no GPU the kernels run in Triton's interpreter, which is chosen when triton is imported: this file then
runs itself once more in a process that has TRITON_INTERPRET=1.
"""

import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.spec import SurrogateSpec
from tests.kernel_cases import (
    CASES,
    CHUNK_CASES,
    CUDA_CASES,
    FULL,
    KL,
    LEAN_CASES,
    MSE,
    NEEDS_INTERPRETER,
    SAPO,
    assert_close_as_eager,
    double,
    gradients,
    head_of,
    loss_and_gradients,
    match_and_gradients,
    poisoned_memory,
    rows_near,
    rows_of,
    teacher_of,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

if not RUNS:

    @NEEDS_INTERPRETER
    def test_in_the_interpreter():
        quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
        command = [sys.executable, "-m", "pytest", *quiet, __file__]
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]

    def test_a_cpu_without_the_interpreter_is_refused():
        from kernels import fused

        with pytest.raises(ValueError, match="logits_NV is on a CPU"):
            fused.logprob(torch.randn(2, 3), torch.tensor([0, 1]))

else:
    from kernels import drop_in, eager, fused, head, linear_logprob, logprob, surrogate

    pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

    @pytest.mark.parametrize("K", [None, 3])
    def test_the_drop_in_runs_on_these_kernels(K, monkeypatch):
        monkeypatch.setattr(drop_in, "chunked", fused)  # where there is no GPU, fused runs on a CPU here
        gen = torch.Generator().manual_seed(0)
        logits = (torch.randn(3, 4, 200, generator=gen) * 4).bfloat16()
        index = torch.randint(200, (3, 4) if K is None else (3, 4, K), generator=gen)
        row_mask, dlogp = index % 3, torch.randn(index.shape, generator=gen)
        logits, index, row_mask, dlogp = (x.to(DEVICE) for x in (logits, index, row_mask, dlogp))
        ids = index if K else index[..., None]
        plain = lambda z: (z / 0.7).log_softmax(-1).gather(-1, ids).view(index.shape).masked_fill(row_mask == 0, 0.0)
        ours = lambda z: drop_in.selective_log_softmax(z, index, 0.7, row_mask)
        results = []
        for fn, z in ((plain, logits.double()), (lambda z: plain(z.float()), logits), (ours, logits)):
            z = z.detach().requires_grad_()
            logp = fn(z)
            results.append((logp.detach(), torch.autograd.grad(logp, z, dlogp.to(logp.dtype))[0]))
        assert_close_as_eager("logp dlogits", *results)

    class Dispatched(TorchDispatchMode):
        """Names of the ops called while it is on; not those inside a custom op."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

        def __enter__(self):
            self.names = []
            return super().__enter__()

    @pytest.fixture(autouse=True)
    def poison():
        with poisoned_memory():
            yield

    @pytest.mark.parametrize("case", CASES + LEAN_CASES, ids=lambda case: case.__name__)
    def test_case(case):
        case(fused, DEVICE)

    @pytest.mark.parametrize("case", CHUNK_CASES, ids=lambda case: case.__name__)
    def test_chunk_case(case, monkeypatch):
        case(fused, DEVICE, lambda size: monkeypatch.setitem(head.SLAB_BYTES, DEVICE, size))

    def test_the_likeliest_token_is_not_rounded():
        hidden, weight, ids = head_of(32, 4000, 64, torch.bfloat16, DEVICE)
        truth = eager.linear_logprob(hidden.double(), weight.double(), ids)
        ours, plain = ((impl.linear_logprob(hidden, weight, ids) - truth).abs().mean() for impl in (fused, eager))
        assert ours <= plain / 2

    @pytest.mark.parametrize("spec, num_grads", [(SurrogateSpec(), 1), (FULL, 2)])
    def test_surrogate_is_two_launches(spec, num_grads):
        """What torch runs besides the op is one multiplication, of both gradients."""
        old, adv, w, ref, behaviour = rows_of(40, DEVICE)
        leaves = [(old + 0.1).requires_grad_(), torch.rand(40, device=DEVICE).requires_grad_()]
        one = torch.ones((), device=DEVICE)

        def run():
            loss, _ = fused.clipped_surrogate(
                leaves[0], old, adv, w, spec, logp_ref_N=ref, logp_behaviour_N=behaviour, entropy_N=leaves[1]
            )
            grads = torch.autograd.grad(loss, leaves, one, allow_unused=True)
            assert sum(x is not None for x in grads) == num_grads

        if DEVICE == "cpu":
            with Dispatched() as dispatched:
                run()
            assert dispatched.names == ["kernels.clipped_surrogate_fwd.default", "aten._foreach_mul.Tensor"]
            return
        torch.use_deterministic_algorithms(False)  # memory is not poisoned: that would launch too
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(launched) == 2, launched

    def test_surrogate_over_several_programs():
        vectors = rows_of(2 * surrogate.SPAN + 100, DEVICE)
        old, adv, w, ref, behaviour = vectors
        logp = (old + 0.1).requires_grad_()
        outs = []
        for impl in (eager, fused):
            loss, stats = impl.clipped_surrogate(logp, old, adv, w, FULL, logp_ref_N=ref, logp_behaviour_N=behaviour)
            outs.append((loss, stats, *torch.autograd.grad(loss, logp)))
        for x, y in zip(*outs):
            assert torch.allclose(x, y, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiles_whole(dtype):
        hidden, weight, ids = head_of(20, 48, 16, dtype, DEVICE)
        old, adv, w, ref, behaviour = rows_of(20, DEVICE)
        rows = torch.arange(0, 20, 2, device=DEVICE)
        temperature = torch.linspace(0.5, 2, 10, device=DEVICE)
        picked, vectors = dict(rows_M=rows, temperature=temperature), [x[rows] for x in (ids, old, adv, w)]
        teacher = teacher_of(hidden, weight, ids, 4)
        losses = {
            "logprob": lambda h, x: fused.logprob(h @ x.T, ids, mask_N=w != 0, entropy=True)[0] * w,
            "frozen": lambda h, x: fused.linear_logprob(h, x.detach(), ids[rows], **picked),
            "linear": lambda h, x: torch.stack(fused.linear_logprob(h, x, ids, entropy=True)),
            "parts": lambda h, x: fused.clipped_surrogate(fused.linear_logprob(h, x, ids), old, adv, w, FULL)[0],
            "sapo": lambda h, x: fused.clipped_surrogate(fused.linear_logprob(h, x, ids), old, adv, w, SAPO)[0],
            "whole": lambda h, x: fused.linear_clipped_surrogate(
                h, x, *vectors, FULL, logp_ref_M=ref[rows], logp_behaviour_M=behaviour[rows], **picked
            )[0],
            "without rows": lambda h, x: fused.linear_clipped_surrogate(h, x, ids, old, adv, w, FULL)[0],
            "mse": lambda h, x: fused.linear_match(h, x, *[y[rows] for y in (*teacher, w)], MSE, **picked)[0],
            "kl": lambda h, x: fused.linear_match(h, x, *teacher, w, KL)[0],
        }
        for name, loss in losses.items():
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            plain, ours = (gradients(lambda h, x, fn=fn: 2 * fn(h, x).sum(), hidden, weight) for fn in (loss, compiled))
            for x, y in zip(plain, ours):
                assert x is y is None or torch.equal(x, y), name
            torch.compiler.reset()
        topk = torch.compile(fused.linear_topk, fullgraph=True, backend="aot_eager")
        found = [fn(hidden, weight, 3, **picked) for fn in (topk, fused.linear_topk)]
        assert all(torch.equal(x, y) for x, y in zip(*found))
        torch.compiler.reset()

    def test_ops_are_well_formed():
        logits, ids = torch.randn(5, 24, device=DEVICE), torch.tensor([0, 3, 23, 7, 7], device=DEVICE)
        torch.library.opcheck(logprob.logprob_fwd, (logits, ids, None, ids > 0, True))
        row = torch.rand(5, device=DEVICE)
        torch.library.opcheck(logprob.logprob_bwd, (logits, ids, row, row, row, row, row, row, None))

    def test_what_does_not_run_is_refused():
        ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        with pytest.raises(ValueError, match="logits_NV must have stride 1"):
            fused.logprob(torch.randn(8, 4, device=DEVICE).T, ids)
        with pytest.raises(ValueError, match="logits_NV must not be torch.float64"):
            fused.logprob(torch.randn(4, 8, device=DEVICE).double(), ids)

    def test_strided_expanded_and_misaligned_inputs():
        wide = torch.randn(6, 200, device=DEVICE)
        ids = torch.arange(14, device=DEVICE)[1::2][:6]
        for logits in (wide[:, 3:130], wide[:1].expand(6, 200), wide[::2].repeat_interleave(2, 0)[:, :128]):
            assert (fused.logprob(logits, ids) - eager.logprob(logits.double(), ids)).abs().max() < 1e-5
        leaf = wide.clone().requires_grad_()
        fused.logprob(leaf[:, 3:130], ids).sum().backward()
        want = gradients(lambda z: eager.logprob(z, ids), wide[:, 3:130].double())[1]
        assert (leaf.grad[:, 3:130] - want).abs().max() < 1e-5 and leaf.grad[:, 130:].eq(0).all()

    @pytest.mark.skipif(DEVICE == "cuda", reason="maps host memory")
    def test_rows_beyond_2_to_31_elements():
        """Two rows 2**31 elements apart, in memory that is only mapped: int32 offsets would read elsewhere."""
        stride, V, no_reserve = (1 << 31) + 64, 40, 0x4000
        memory = mmap.mmap(-1, 2 * (stride + V), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        logits = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, V), (stride, 1))
        logits.copy_(torch.randn(2, V))
        ids = torch.tensor([3, 39])
        near = logits.clone()
        logp, entropy = fused.logprob(logits, ids, entropy=True)
        want = gradients(lambda z: fused.logprob(z, ids, entropy=True), near)
        assert torch.equal(logp, want[0]) and torch.equal(entropy, want[1])
        rows = logprob._logprob_fwd(near, ids, None)
        logprob._logprob_bwd(logits, logits, ids, None, *rows, torch.ones(2), torch.ones(2))
        assert torch.equal(logits, want[2])

    @pytest.mark.gpu
    @pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
    class TestOnGpu:
        @pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.__name__)
        def test_case(self, case):
            case(fused, DEVICE)

        def test_no_host_sync(self):
            hidden, weight, ids = head_of(256, 1000, 64, torch.bfloat16, DEVICE)
            torch.use_deterministic_algorithms(False)  # torch's own deterministic forms may sync
            vectors, rows = rows_of(256, DEVICE), torch.arange(0, 256, 2, device=DEVICE)
            host_rows, picked = rows.cpu(), (ids[rows], [x[rows] for x in vectors])
            teacher = (*teacher_of(hidden, weight, ids, 8), vectors.weight)
            run = lambda: (
                loss_and_gradients(fused, (hidden, weight), *picked, FULL, rows_M=rows),
                loss_and_gradients(fused, (hidden, weight), *picked, FULL, rows_M=host_rows),
                loss_and_gradients(fused, (hidden, weight), ids, vectors, FULL),
                match_and_gradients(fused, (hidden, weight), *[x[rows] for x in teacher], KL, rows_M=host_rows),
                match_and_gradients(fused, (hidden, weight), *teacher, MSE),
                fused.linear_topk(hidden, weight, 8, rows_M=rows),
                gradients(lambda h, x: fused.linear_logprob(h, x, ids), hidden, weight),
                gradients(lambda z: fused.logprob(z, ids), hidden @ weight.T),
            )
            run()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")

        @pytest.mark.alone
        def test_the_host_runs_ahead(self):
            """Rows on the host, a device that is busy for a while: the calls return before it is at them."""
            hidden, weight, ids = head_of(256, 1000, 64, torch.bfloat16, DEVICE)
            torch.use_deterministic_algorithms(False)
            vectors, rows = rows_of(128, DEVICE), torch.arange(0, 256, 2)
            run = lambda: loss_and_gradients(fused, (hidden, weight), ids[:128], vectors, FULL, rows_M=rows)
            run()
            torch.cuda.synchronize()
            torch.cuda._sleep(4_000_000_000)  # cycles: seconds
            done = torch.cuda.Event()
            done.record()
            run()
            assert not done.query()
            torch.cuda.synchronize()

        def test_a_nan_logit_reads_nothing_foreign(self):
            """The last row of W is nan, and W ends where its allocation does."""
            V, D = 151936, 1024
            size = -(-(V * D) // (1 << 20)) * (1 << 20)  # whole 2 MiB pages
            weight = torch.zeros(size, device=DEVICE, dtype=torch.bfloat16)[-V * D :].view(V, D)
            hidden = torch.randn(16, D, device=DEVICE, dtype=torch.bfloat16)
            ids = torch.arange(16, device=DEVICE)
            weight.normal_(std=D**-0.5)[-1] = float("nan")
            logp, entropy = fused.linear_logprob(hidden, weight, ids, entropy=True)
            assert logp.isnan().all() and entropy.isnan().all()
            numbers = linear_logprob._linear_logprob_fwd(hidden @ weight.T, hidden, weight, None, ids, None)
            assert numbers[4].ge(-1).all() and numbers[4].lt(V).all()

        def test_bad_ids_are_counted(self):
            hidden, weight, ids = head_of(8, 50, 16, torch.bfloat16, DEVICE)
            ids[3], ids[5] = 50, -7
            old, adv, w, *_ = rows_of(8, DEVICE)
            _, logp, stats = fused.linear_clipped_surrogate(hidden, weight, ids, old, adv, w + 1, FULL)
            assert logp.isnan().nonzero()[:, 0].tolist() == [3, 5] and stats[fused.STATS.index("bad_ids")] == 2
            ids, top_ids, top_logp = teacher_of(hidden, weight, ids.clamp(0, 49), 4)
            ids[3], top_ids[5, 2] = 50, -7
            _, logp, stats = fused.linear_match(hidden, weight, ids, top_ids, top_logp, w + 1, KL)
            assert logp.isnan().nonzero()[:, 0].tolist() == [3, 5] and stats[fused.MATCH_STATS.index("bad_ids")] == 2

        @pytest.mark.parametrize("V", [128256, 129920, 151936, 152064])
        def test_real_vocabularies(self, V):
            hidden, weight, ids = head_of(512, V, 256, torch.bfloat16, DEVICE)
            vectors = rows_near(hidden, weight, ids)
            truth = loss_and_gradients(eager, double(hidden, weight), ids, double(*vectors), FULL)
            base = loss_and_gradients(eager, (hidden, weight), ids, vectors, FULL)
            ours = loss_and_gradients(fused, (hidden, weight), ids, vectors, FULL)
            for t, e, o in zip(truth[3:], base[3:], ours[3:]):
                err = lambda x: (x.double() - t).norm() / t.norm()
                assert err(o) <= 1.1 * err(e)
            teacher = (*teacher_of(hidden, weight, ids, 64), vectors.weight)
            truth = match_and_gradients(eager, double(hidden, weight), *double(*teacher), KL)
            base, ours = (match_and_gradients(impl, (hidden, weight), *teacher, KL) for impl in (eager, fused))
            for t, e, o in zip(truth[3:], base[3:], ours[3:]):
                assert (o.double() - t).norm() <= 1.1 * (e.double() - t).norm()
            logp, top_ids = fused.linear_topk(hidden, weight, 64)
            assert (logp - eager.linear_topk(hidden, weight, 64)[0]).abs().max() < 1e-4
            assert (logp - (hidden @ weight.T).float().log_softmax(1).gather(1, top_ids)).abs().max() < 1e-4

        def test_more_than_2_to_31_logits(self):
            N, V = 16384, 151936
            logits = torch.randn(N, V, device=DEVICE, dtype=torch.bfloat16)
            ids = torch.randint(0, V, (N,), device=DEVICE)
            slope = torch.randn(N, device=DEVICE)
            ours = gradients(lambda z: fused.logprob(z, ids), logits, grads=[slope])
            tail = lambda x: gradients(lambda z: eager.logprob(z, ids[-64:]), x, grads=[slope[-64:]])
            near = [tail(logits[-64:].double()), tail(logits[-64:])]
            assert_close_as_eager("logp dlogits", *near, [x[-64:] for x in ours])
