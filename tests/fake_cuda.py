"""CUDA without a GPU: the engine's own code with real tensors on the host and fake ones on the device.

    python -m tests.fake_cuda [PART ...]      what each part of PARTS, or all, was seen to do; JSON in the last line

Every operation passes a `Recorder`, which notes what a GPU would suffer, with the line of the project it came from:
  sync      the host waits for the device: a value read, a shape that depends on values
  upload    host memory that is not pinned, or a copy that is not asked to run on: the call waits for its stream
  copy      pinned host memory to the device; waits for nothing, but has no place in what a graph records
  mixed     an operation on the device that is fed a host tensor which is no number
and counts launches: operations that start a kernel (views, allocations and metadata do not), and Triton's.
A value that is read is answered with ones, so that one run lists all there is; what has no such answer ends it, by
name. In a process of its own, since parts of torch, triton and the engine are replaced.
Not seen: whether a result is right; waits inside ATen's CUDA code, the allocators, Triton's compiler; streams and
events; FSDP2's hooks (with cpu_offload they do wait) and activation checkpointing: the backward runs node by node.
"""

import collections
import contextlib
import copy
import ctypes
import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
FREE = set(
    "view _unsafe_view reshape expand expand_as t transpose permute unsqueeze squeeze select slice narrow split chunk "
    "split_with_sizes unbind as_strided alias detach detach_ empty empty_like new_empty empty_strided "
    "new_empty_strided lift lift_fresh unfold diagonal is_pinned _reshape_alias record_stream set_ resize_ "
    "unsafe_split flatten unflatten requires_grad_ view_as device numpy_T".split()
    + ["dropout"]  # whole only where it does nothing
)
GEMMA = dict(hidden_size=640, intermediate_size=2048, num_attention_heads=4, num_key_value_heads=1, sliding_window=8)
YES = {"equal", "allclose", "is_nonzero"}
UNANSWERED = set("masked_select _unique2 unique_dim unique_consecutive bincount argwhere".split())
VOCABULARY = 1024  # of the models here; no other axis is as long


class Recorder(TorchDispatchMode):
    """Runs operations on host tensors as they are and the others on fake ones."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.region, self.pinned = "eager", []
        self.clear()

    def clear(self) -> None:
        self.launches, self.findings, self.before_a_wait = collections.Counter(), collections.Counter(), None
        self.head_products = 0

    def note(self, kind: str, what: str) -> None:
        self.findings[kind, self.region, what, place()] += 1
        if kind == "sync" and self.before_a_wait is None:
            self.before_a_wait = sum(self.launches.values())

    def seen(self) -> dict:
        launches = collections.defaultdict(dict)
        for (region, name), count in self.launches.items():
            launches[region][name] = count
        found = [[*key, count] for key, count in sorted(self.findings.items())]
        whole = {"before_a_wait": self.before_a_wait, "head_products": self.head_products}
        return {"launches": launches, "findings": found} | whole

    @contextlib.contextmanager
    def within(self, region: str):
        before, self.region = self.region, region
        try:
            yield
        finally:
            self.region = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, given = func._schema.name.partition("::")[2], list(tensors_in([args, kwargs]))
        device = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
        device = torch.device(device) if device is not None else given[0].device if given else torch.device("cpu")
        on_gpu = [x for x in given if x.is_cuda]
        if not on_gpu and device.type == "cpu":
            return func(*args, **kwargs)
        if on_gpu and (answer := self.look_at_values(name, args, device)) is not None:
            return answer
        args = self.look_at_inputs(name, given, on_gpu, args, kwargs, device)
        if name in ("_to_copy", "to") and not on_gpu:
            return new_on(device, args[0], kwargs.get("dtype"))
        with self.fake:
            out = func(*args, **kwargs)
        if name not in FREE and (out is not (args[0] if args else None) or name.endswith("_")):
            self.launches[self.region, name] += 1
        if name in ("mm", "addmm") and any(VOCABULARY in x.shape for x in given):
            self.head_products += 1
        return out

    def look_at_values(self, name: str, args, device: torch.device):
        """What the host gets when it asks the device for values; None when it does not."""
        if name in ("_local_scalar_dense", "item"):
            self.note("sync", "item")
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if name in ("_to_copy", "to") and args[0].is_cuda and device.type == "cpu":
            self.note("sync", f"{args[0].numel()} numbers to the host")
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        if name in YES or name == "nonzero":
            self.note("sync", name)
            return True if name in YES else args[0].new_zeros((1, args[0].dim()), dtype=torch.int64)
        if name in UNANSWERED:
            raise RuntimeError(f"{name} waits for the device, at {place()}")
        return None

    def look_at_inputs(self, name, given, on_gpu, args, kwargs, device):
        """Notes what crosses, and what does not belong together; the arguments, without indices that are masks."""
        if name in ("_to_copy", "to", "copy_"):
            source, target = (args[1], args[0].device) if name == "copy_" else (args[0], device)
            if source.device.type != target.type:
                self.crossing(source, target, kwargs.get("non_blocking") or any(x is True for x in args[1:]))
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [x for x in args[1] if x is not None]
            if any(not x.is_cuda for x in [*indices, *args[2:3]]):
                self.note("upload", "an index on the host, or a value put through one")
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.note("sync", "an index that is a mask")
                short = lambda x: x.new_zeros(1, dtype=torch.int64)  # noqa: E731
                return args[0], [x if x is None or x.dtype == torch.int64 else short(x) for x in args[1]], *args[2:]
        elif on_gpu and any(not x.is_cuda and x.dim() for x in given) and name not in ("lift_fresh", "set_data"):
            self.note("mixed", name)
            return [new_on(GPU, x) if isinstance(x, Tensor) and not x.is_cuda and x.dim() else x for x in args]
        return args

    def crossing(self, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        pinned = any(source.untyped_storage()._cdata == x.untyped_storage()._cdata for x in self.pinned)
        if target.type == "cpu":
            self.note("sync", "a copy to the host")
        else:
            self.note("copy" if pinned and non_blocking else "upload", f"{source.numel()} x {source.dtype}")

    def pin(self, x: Tensor) -> Tensor:
        self.pinned.append(x.clone())  # kept, so that no other storage gets its place
        return self.pinned[-1]


def new_on(device: torch.device, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    with RECORDER.fake:
        return torch.empty(like.shape, dtype=dtype or like.dtype, device=device)


def tensors_in(x):
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple):
        for y in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(y)


def place() -> str:
    """file:line of the innermost frame of the project, and of transformers within it."""
    inside = ""
    for frame in reversed(traceback.extract_stack()):
        if "/transformers/" in frame.filename:
            inside = inside or f" in {frame.filename.rpartition('/transformers/')[2]}:{frame.lineno}"
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path.name != Path(__file__).name:
            return f"{path.relative_to(ROOT)}:{frame.lineno}{inside}"
    return f"?{inside}"


RECORDER = Recorder()


class NoFence:
    def __init__(self, device):
        pass

    mark = wait = lambda self: None


def launch(kernel, *args, grid=None, warmup=False, **more):
    """In place of a Triton kernel: its name; its tensors must be on the device."""
    name = kernel.fn.__name__
    if any(isinstance(x, Tensor) and not x.is_cuda for x in args):
        RECORDER.note("mixed", name)
    RECORDER.launches[RECORDER.region, f"triton {name}"] += 1


def addmm(self, a, b, *, out_dtype=None, beta=1, alpha=1, out=None, real=torch.addmm):
    """Fake tensors know no addmm with out_dtype: what ATen's CUDA form refuses, then an operation like it."""
    if out_dtype is None or not self.is_cuda:
        return real(self, a, b, beta=beta, alpha=alpha, **({} if out is None else {"out": out}))
    assert a.dtype == b.dtype and out.dtype == out_dtype and out_dtype in (self.dtype, torch.float32)
    assert (a.shape[0], b.shape[1]) == tuple(out.shape) and a.shape[1] == b.shape[0]
    return out.copy_(torch.mm(a, b, out_dtype=out_dtype))


def backward(loss: Tensor) -> None:
    """loss.backward() in Python, node by node: torch's own engine asks the CUDA runtime for streams."""
    grads = collections.defaultdict(dict)
    grads[loss.grad_fn][0] = torch.ones_like(loss)
    for node in nodes_before(loss.grad_fn):
        given = grads.pop(node, {})
        if hasattr(node, "variable"):
            if given:
                x = node.variable
                x.grad = given[0].detach() if x.grad is None else x.grad + given[0]
        elif given:
            run = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
            outs = run(*[given.get(i) for i in range(len(node._input_metadata))])
            outs = outs if isinstance(outs, tuple) else (outs,)
            for (child, i), grad in zip(node.next_functions, outs, strict=False):
                if child is not None and grad is not None:
                    meta = child._input_metadata[i]
                    grad = (grad.sum_to_size(meta.shape) if grad.shape != meta.shape else grad).to(meta.dtype)
                    grads[child][i] = grad + grads[child][i] if i in grads[child] else grad


def nodes_before(root) -> list:
    """`root` and all that lead to it, each before those that lead to it."""
    order, seen, stack = [], {root}, [(root, iter(root.next_functions))]
    while stack:
        node, rest = stack[-1]
        child = next((child for child, _ in rest if child is not None and child not in seen), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(child)
            stack.append((child, iter(child.next_functions)))
    return order[::-1]


def lend_a_guard() -> None:
    """A CPU build of torch has no device guard for CUDA, which indexing and autograd ask for: Meta's does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # of c10::DeviceType
    table[cuda] = table[cuda] or table[meta]


def replace_the_runtime() -> None:
    if torch.version.cuda is None:
        lend_a_guard()
    import triton

    import engine.dist
    import engine.parts
    import engine.replica
    import kernels.ops

    class Body:
        """An op's body itself: behind torch.library fake tensors would not get into it."""

        def __init__(self, body):
            self.body, self.register_fake = body, lambda fake: fake

        def __call__(self, *args):
            return self.body(*args)

    kernels.ops.op = lambda name: Body  # before the other modules of kernels are imported
    triton.JITFunction.run = launch
    engine.parts.shard, engine.parts.device_memory = unsharded, lambda device: 0
    engine.replica.Fence = NoFence
    engine.dist._all_reduce = lambda values, op: values
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device=...) starts on the host, then moves
    torch.cuda._lazy_init = lambda: None
    torch.cuda.device_of = lambda x: contextlib.nullcontext()
    torch.addmm, Tensor.backward = addmm, backward
    Tensor.pin_memory = lambda self, device=None: RECORDER.pin(self)
    Tensor.full_tensor = lambda self: self


def make_lm(layers=2, dtype=torch.bfloat16, family="qwen2"):
    """A Qwen2 with the widths of the 0.5B, or a Gemma 3 of the 270M, and a small vocabulary, on the device."""
    import transformers

    from bench.stand_in import SHAPES
    from engine.config import Config
    from engine.linears import convert
    from engine.model import cast_parameters

    size = {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    if family == "qwen2":
        config = transformers.Qwen2Config(max_position_embeddings=4096, **SHAPES["qwen2.5-0.5b"] | size)
    else:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"][:layers]
        config = transformers.Gemma3TextConfig(**GEMMA, **size, layer_types=kinds)
    with torch.device(GPU), torch.no_grad():
        lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    cast_parameters(lm, dtype)
    assert all(x.is_cuda for x in [*lm.parameters(), *lm.buffers()])
    return convert(lm, Config()).eval().requires_grad_(False)


def unsharded(policy, config, mesh, *, frozen=False):
    """In place of engine.policy.shard, whose hooks talk to the CUDA runtime: factors move to the device, and what is
    fp32 is cast before each forward."""
    from engine.linears import adapted
    from engine.policy import Policy

    class Unsharded(Policy):
        set_requires_gradient_sync = set_reshard_after_backward = lambda self, *args: None

        def forward(self, rows, loss):
            with RECORDER.within("gather"):
                cast = {name: p.bfloat16() for name, p in self.named_parameters() if p.dtype == torch.float32}
            plain = copy.copy(self)
            plain.__class__ = Policy
            return torch.func.functional_call(plain, cast, (rows, loss))

    policy.__class__ = Unsharded
    for linear in adapted(policy.lm).values():
        for name in ("lora_A", "lora_B"):
            setattr(linear, name, torch.nn.Parameter(new_on(GPU, getattr(linear, name))))
    return policy.requires_grad_(False).eval() if frozen else policy.train()


def build(lm, **settings):
    """The parts of a run with these settings, made of `lm`."""
    from engine import parts
    from engine.config import load_config
    from engine.dist import World

    config = load_config([f"--{key}={value}" for key, value in ({"algo": "grpo", "model": "x"} | settings).items()])
    return parts.build(config, World(0, 1, 0, GPU, None), lm.requires_grad_())


def copied(lm, of) -> list[str]:
    """Names of the parameters of `lm` that have memory of their own, apart from the model `of`."""
    memory = {name: p.untyped_storage()._cdata for name, p in of.named_parameters()}
    return [name for name, p in lm.named_parameters() if p.untyped_storage()._cdata != memory.get(name)]


def decode(plant: str = "", layers=2, family="qwen2", **settings) -> dict:
    """The step that a graph records, for each way of drawing; what `plant` does at its end."""
    from engine.model import attention_of
    from engine.rollouts.cache import SlotCache
    from engine.rollouts.sampling import Sampling
    from engine.rollouts.slots import Slots, attend
    from kernels import fused

    rows, found = 16, {}
    lm = build(make_lm(layers, family=family), **settings).replica.lm
    slots = Slots(lm, SlotCache(lm.config, rows, 64, torch.bfloat16, GPU, fused), 32, [3])
    ways = {"": {}, "greedy": {"temperature": 0.0}, "top-k": {"temperature": 0.7, "top_k": 50}, "top-p": {"top_p": 0.9}}
    ways |= {"padded": {}}  # the head, beyond the vocabulary
    for name, way in list(ways.items())[: 1 if plant else None]:
        slots.vocabulary = lm.config.vocab_size - 8 if name == "padded" else None
        RECORDER.clear()
        with torch.inference_mode(), attention_of(lm, attend), RECORDER.within("capture"):
            slots._decode(rows, Sampling(32, **way))
            exec(plant, {"torch": torch, "slots": slots})
        found[name] = RECORDER.seen() | {"logits": str(slots.logits(new_on(GPU, lm.model.norm.weight[None])).dtype)}
    return found


def rollout(family="qwen2") -> dict:
    """A whole call: prefills, places, looks and reads; replays count tokens on the host."""
    from engine.replica import Replica
    from engine.rollouts import native
    from engine.rollouts.graphs import Graphs
    from engine.rollouts.sampling import Sampling
    from engine.rollouts.schedule import Schedule
    from engine.rollouts.slots import Slots
    from kernels import fused

    schedules, found, keys = [], {}, []
    real_init, real_look, real_read = Schedule.__init__, Slots.look, Slots.read

    def init(self, *args, **kwargs):
        schedules.append(self)
        real_init(self, *args, **kwargs)

    def look(self, rows):
        with RECORDER.within("look"):
            real_look(self, rows)
        held = schedules[-1].held[:rows]
        taken = [0 if row is None else 1 + schedules[-1].steps - row.begun for row in held]
        taken = [n if row is None else min(n, row.limit) for n, row in zip(taken, held, strict=True)]
        return [row is not None and n < row.limit for n, row in zip(taken, held, strict=True)], taken

    def read(self, slot_N, width):
        with RECORDER.within("read"):
            return real_read(self, slot_N, width)

    def record(self, step, rows, key):
        if (rows, key) not in self.graphs:
            keys.append([rows, repr(key)])
            with RECORDER.within("capture"):
                self.graphs[rows, key] = step(rows, key)

    def replay(self, step, rows, key):
        assert (rows, key) in self.graphs, "a step that was not recorded"

    Schedule.__init__, Slots.look, Slots.read, Graphs.record, Graphs.run = init, look, read, record, replay
    engine = native.NativeRollout(
        Replica(make_lm(family=family)), eos_ids=[3], pad_id=0, ops=fused, max_batch=16, max_prompt=64, max_new=64
    )
    engine.prepare(Sampling(40))
    found["prepare"] = RECORDER.seen()
    RECORDER.clear()
    prompts, limits = [list(range(5, 15 + 3 * p)) for p in range(6)], [12, 40, 25, 33, 8, 19]
    answers = engine(prompts, num_samples=8, sampling=Sampling(64), seed=0, limits=limits)
    assert [len(c.ids) for group in answers for c in group] == [n for n in limits for _ in range(8)]
    return found | {"call": RECORDER.seen(), "graphs": keys, "answers": 48, "steps": engine.decode_steps}


def refresh(dtype=torch.float32, **settings) -> dict:
    """Of a rollout's copy that has had its first, which brings what is frozen too."""
    built = build(make_lm(dtype=dtype), beta=0.1, **settings)
    lm, replica = built.policy.lm, built.replica
    replica.refresh(built.policy, 0)
    RECORDER.clear()
    replica.refresh(built.policy, 1)
    trained = [name for name, p in lm.named_parameters() if p.requires_grad]
    copies = {"rollout": copied(replica.lm, lm), "reference": copied(built.frozen.lm, lm)}
    return RECORDER.seen() | {"trained": trained, "copied": copies, "parameters": len(list(lm.parameters()))}


def refresh_from_the_host() -> dict:
    """Weights that FSDP2 offloads: shards in pinned memory of the host."""
    from torch.distributed.tensor import DTensor, Shard

    from bench.step import one_rank
    from engine.replica import Replica

    replica = Replica(make_lm())
    with one_rank("cpu") as world:
        shards = {
            name: DTensor.from_local(RECORDER.pin(torch.zeros(p.shape)), world.mesh, [Shard(0)]).requires_grad_()
            for name, p in replica.lm.named_parameters()
        }
        policy = torch.nn.Module()
        policy.lm = torch.nn.Module()
        policy.lm.named_parameters = shards.items
        RECORDER.clear()
        replica.refresh(policy, 1)
        return RECORDER.seen() | {"parameters": len(shards)}


def functions() -> dict:
    """Every public function of kernels.fused forward and backward, all options on, in bf16 and in fp32."""
    from kernels import fused

    N, M, D, V = 256, 128, 128, 4096
    spec = fused.SurrogateSpec(0.2, 0.28, kl_coef=0.1, entropy_coef=0.01, importance_cap=2.0)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        new = lambda *shape: torch.empty(shape, device=GPU, dtype=dtype, requires_grad=True)  # noqa: E731, B023
        vector = lambda: torch.empty(M, device=GPU)  # noqa: E731
        ids, rows = torch.zeros(M, dtype=torch.int64, device=GPU), torch.arange(0, N, 2)
        tops = torch.zeros(M, 8, dtype=torch.int64, device=GPU), torch.empty(M, 8, device=GPU)
        old, adv, weight, ref, behaviour = (vector() for _ in range(5))
        head = {"bias_V": new(V), "temperature": 0.7, "rows_M": rows}
        more_N, more_M = ({f"logp_ref_{x}": ref, f"logp_behaviour_{x}": behaviour} for x in "NM")
        calls = {
            "logprob": lambda: sum(fused.logprob(new(M, V), ids, temperature=0.7, entropy=True)).sum(),
            "linear_logprob": lambda: sum(fused.linear_logprob(new(N, D), new(V, D), ids, entropy=True, **head)).sum(),
            "clipped_surrogate": lambda: fused.clipped_surrogate(
                vector().requires_grad_(), old, adv, weight, spec, entropy_N=vector().requires_grad_(), **more_N
            )[0],
            "linear_clipped_surrogate": lambda: fused.linear_clipped_surrogate(
                new(N, D), new(V, D), ids, old, adv, weight, spec, **head, **more_M
            )[0],
            "linear_match": lambda: fused.linear_match(
                new(N, D), new(V, D), ids, *tops, weight, fused.MatchSpec("kl"), **head
            )[0],
        }
        for name, call in calls.items():
            RECORDER.clear()
            with RECORDER.within("forward"):
                out = call()
            assert out.is_cuda and out.dtype == torch.float32, (name, out)
            with RECORDER.within("backward"):
                out.backward()
            found[f"{name} {dtype}"] = RECORDER.seen()
        RECORDER.clear()
        with torch.no_grad():
            out = fused.decode_attention(new(4, 14, 64), new(8, 2, 600, 64), new(8, 2, 600, 64), ids[:4])
        assert out.is_cuda and out.dtype == dtype
        found[f"decode_attention {dtype}"] = RECORDER.seen()
        RECORDER.clear()
        with torch.no_grad():
            out, _ = fused.linear_topk(new(N, D), new(V, D), 8, **head)
        assert out.is_cuda and out.dtype == torch.float32
        found[f"linear_topk {dtype}"] = RECORDER.seen()
    return found


def update(kernels="fused", algo="grpo", plant: str = "", family="qwen2", **settings) -> dict:
    """Two micro-batches through `Learner.learn`, then scored; `plant` runs at the end of each forward."""
    from bench.step import GROUPS, Size, trajectories
    from engine.log import Log
    from engine.metrics import DeviceStats
    from engine.samples import Sample

    class Spans(Log):
        def span(self, verb, step):
            return RECORDER.within(verb)

    class Stats(DeviceStats):
        def add(self, names, stats):
            with RECORDER.within("stats"):
                exec(plant, {"torch": torch, "stats": stats})
                super().add(names, stats)

    settings = {
        "beta": 0,
        "logp_old": "sampler",
        "micro_tokens": 704,
        "share_prompts": False,
        "max_new_tokens": 32,
        "context": "zeroshot",
    } | settings
    built = build(make_lm(family=family), algo=algo, kernels=kernels, **settings)
    built.optimizer.zero_grad = lambda: None  # they are looked at
    folder = Path(tempfile.mkdtemp())
    log = Spans(built.config, folder, 0, False)
    log.device_stats = Stats()
    learner, policy = built.learner(log, folder), built.policy
    samples = trajectories(Size("tiny", 32, 16, 32, 704, algo=algo if algo in GROUPS else "grpo"), 1024)
    if algo == "sft":
        samples = [Sample([5] * 9, [6] * 16), Sample([7] * 4, [8] * 13)] * 24
    RECORDER.clear()
    learner.learn(samples, 0)
    found = RECORDER.seen()
    given = dict(policy.named_parameters())
    right = lambda p: p.grad is not None and p.grad.dtype == p.dtype and p.grad.is_cuda  # noqa: E731
    wrong = [name for name, p in given.items() if not (right(p) if p.requires_grad else p.grad is None)]
    RECORDER.clear()
    with RECORDER.within("score"):
        learner.with_logprobs(policy, "logp_old", samples)
    found |= {"micros": len(learner.micros(samples)), "layers": 2, "wrong": wrong, "score": RECORDER.seen()}
    return found | {"trained": sorted({str(p.dtype) for p in given.values() if p.requires_grad})}


PLANTED_DECODE = {
    "a value read": "slots.live_S.any().item()",
    "a mask as index": "slots.ids_ST[slots.live_S]",
    "a tensor made of numbers": "torch.tensor([1, 2], device='cuda')",
    "an operand on the host": "slots.logp_ST[:2, 0].add(torch.ones(2))",
    "a decision on values": "bool(slots.live_S.all())",
    "a number through an index": "slots.live_S[slots.next_S] = True",
    "a pinned copy": "torch.ones(2).pin_memory().to('cuda', non_blocking=True)",
}
PLANTED_UPDATE = {"a value read": "stats.sum().item()", "an upload": "torch.ones(2).to('cuda', non_blocking=True)"}
PARTS = {
    "decode": decode,
    "deeper": lambda: decode(layers=3),
    "decode, windows": lambda: decode(family="gemma3_text"),
    "deeper, windows": lambda: decode(layers=3, family="gemma3_text"),
    "decode, adapters": lambda: decode(lora_rank=16),
    "deeper, adapters": lambda: decode(layers=3, lora_rank=16),
    "rollout": rollout,
    "rollout, windows": lambda: rollout("gemma3_text"),
    "refresh": refresh,
    "refresh from the host": refresh_from_the_host,
    "refresh, adapters": lambda: refresh(torch.bfloat16, lora_rank=16),
    "refresh, adapters of a sharded base": lambda: refresh(torch.bfloat16, lora_rank=16, lora_base="sharded"),
    "functions": functions,
    "update": update,
    "update, shared prompts": lambda: update(share_prompts=True),
    "update, chunked": lambda: update("chunked"),
    "update, cap and entropy": lambda: update(
        logp_old="recompute", importance_cap=2.0, entropy_coef=0.01, temperature=0.7
    ),
    "update, sft": lambda: update(algo="sft"),
    "update, dpo": lambda: update(algo="dpo", beta=0.1),
    "update, distill": lambda: update(algo="distill"),
    "update, gspo": lambda: update(algo="gspo"),
    "update, windows": lambda: update(share_prompts=True, family="gemma3_text"),
    "update, adapters": lambda: update(lora_rank=16),
    "update, adapters and reference": lambda: update(lora_rank=16, beta=0.1),
    "planted": lambda: {
        "decode": {name: decode(plant) for name, plant in PLANTED_DECODE.items()},
        "update": {name: update(plant=plant) for name, plant in PLANTED_UPDATE.items()},
    },
}


def main(names: list[str]) -> None:
    replace_the_runtime()
    found = {}
    for name in names or PARTS:
        with RECORDER:
            RECORDER.clear()
            found[name] = PARTS[name]()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
