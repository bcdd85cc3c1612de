"""The parts of a visit to a GPU machine: those of a first visit in their order, then the others.

The limits of a first visit are what an H200 took and about half as much again (of attention a guess, for it has not
ended there yet); they fit its minutes all together.
A command is a line of text, run at the root of the tree by this Python. Its words in braces are filled in from SCALES:
for a GPU, or for a toy run of the same commands on a CPU.
"""

import hashlib
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ABSENT = 2  # the exit code of the programs below where a tool or a file that they need is not there
SAYS_ABSENT = ("profiling/capture.py", "bench.gsm8k")
KERNELS = ("kernels/*.py", "bench/harness.py", "bench/clocks.py")
ENGINE = ("kernels/*.py", "engine/**/*.py", "configs/**/*.*", "train.py")
UPDATE = (
    *("kernels/*.py", "engine/algos/*.py"),
    *(
        f"engine/{name}.py"
        for name in ("learner", "layout", "attention", "samples", "policy", "linears", "model", "streams", "metrics")
    ),
)
ROLLOUT = (
    *("kernels/*.py", "engine/rollouts/*.py"),
    *(f"engine/{name}.py" for name in ("replica", "policy", "linears", "model", "streams")),
)
PROFILED = (*ENGINE, "profiling/*.py", "bench/stand_in.py")
ON_GPU = re.compile(r"\bmark\.gpu\b|\b(ON_GPU|DEVICES)\b")
"""How a test file says that it has tests for a GPU: with the marker, or with its two names in kernel_cases."""

SCALES = {
    "real": {
        "device": "cuda", "first": "first", "full": "default", "frozen": "frozen",
        "workers": 8, "alone": "gpu and alone", "sft_steps": 200, "steps": 20, "problems": 256, "tool": "auto",
        "shape": "qwen2.5-0.5b", "tokens": 64, "fused": "fused", "gsm8k": "--minutes 9",
    },
    "toy": {
        "device": "cpu", "first": "small", "full": "small", "frozen": "small",
        "workers": 2, "alone": "gpu and not alone", "sft_steps": 2, "steps": 2, "problems": 8, "tool": "torch",
        "shape": "tiny", "tokens": 8, "fused": "chunked", "gsm8k": "--toy",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other until one fails, for at most `limit_s` seconds together. `worth` weighs
    what is learnt against the other parts; `sources` are globs of the files that are measured."""

    name: str
    learns: str
    limit_s: float
    worth: float
    sources: tuple
    commands: tuple
    first: bool = False  # in a first visit
    after: tuple = ()  # parts that must have a good result before --missing takes it
    needs: tuple = ()  # folders without which --missing leaves it
    again: tuple = ()  # commands that come before the others
    goes_on: bool = False  # after a command that failed


def key_of(part):
    """A digest of its commands and of the names and contents of its sources: equal on every machine, without git."""
    digest = hashlib.sha256("\n".join(part.commands).encode())
    for path in sorted({path for glob in part.sources for path in ROOT.glob(glob)}):
        digest.update(f"\n{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def words_of(command, scale, work):
    """The command as a list of words."""
    values = SCALES[scale]
    spread = f"-n {values['workers']} --dist worksteal" if find_spec("xdist") else ""
    timeout = "--timeout=100" if find_spec("pytest_timeout") else ""
    words = shlex.split(command.format(**values, spread=spread, timeout=timeout, work=shlex.quote(str(work))))
    return [sys.executable if word == "python" else word for word in words]


def gpu_tests():
    """The test files that hold tests for a GPU."""
    files = sorted(ROOT.glob("tests/test_*.py"))
    return tuple(f"tests/{path.name}" for path in files if ON_GPU.search(path.read_text()))


def pytest_command(tests, *more):
    return " ".join(["python -m pytest", *tests, "-v --tb=short --durations=10 {timeout}", *more])


def bench_command(names, sizes, file, *more):
    """bench.run writes its file after each case: what was done when the time ran out is kept."""
    words = ["python -m bench.run", names, "--device {device} --dtype bf16 --sizes", sizes, *more]
    return " ".join([*words, f"--json {{work}}/{file}.json"])


def kernel_table(name, limit_s, worth, file):
    """Every size, beside every rival that does not compile for long."""
    command = bench_command(name, "{full}", name, "--brief")
    return Part(name, "our kernels beside their peers", limit_s, worth, (*KERNELS, file), (command,))


def capture_command(name, *settings):
    """Two steps of train.py, on a model of a real shape with random weights; the step after them keeps lag 1 busy."""
    return " ".join([
        f"python profiling/capture.py --tool {{tool}} --steps 2:4 -o {{work}}/captures/{name} --",
        "train.py --algo grpo --model {work}/stand-in --rewards bench/alternate.py:alternate --beta 0 --steps 5",
        "--max_new_tokens {tokens} --eval_size 0 --tensorboard false --device {device}",
        f"--out {{work}}/captured --name {name}", *settings,
    ])  # fmt: skip


def captures_part(name, learns, worth, pair):
    """`pair`: label -> settings of train.py; two captures and their comparison."""
    a, b = pair
    report = f"python profiling/report.py {{work}}/captures/{a} {{work}}/captures/{b} -o {{work}}/captures/{name}"
    make = "python -m bench.stand_in {shape} {work}/stand-in"
    commands = (make, *[capture_command(label, settings) for label, settings in pair.items()], report)
    return Part(name, learns, 150, worth, PROFILED, commands)


def ncu_part(name, worth):
    folder = f"{{work}}/captures/ncu_{name}"
    profiled = f"python profiling/capture.py --tool ncu --whole --ranges {name} -o {folder} -- -m bench.once {name}"
    sources = (*KERNELS, "bench/once.py", "profiling/*.py")
    return Part(f"ncu_{name}", "what bounds our kernel", 60, worth, sources, (profiled,))


def smoke_commands():
    """The embedded model from nothing to an evaluated export, in a few steps."""
    train = "python train.py --tensorboard false --device {device} --out {work}/smoke"
    grpo = f"{train} --algo grpo --init_from {{work}}/smoke/sft/export --steps {{steps}} --eval_size {{problems}}"
    return (
        f"{train} --algo sft --name sft --steps {{sft_steps}} --eval_size 0",
        f"{grpo} --lag 0 --name lag0",
        f"{grpo} --lag 1 --name lag1",
        "python -m engine.evaluate --model {work}/smoke/lag1/export --device {device} --eval_size {problems} "
        "--max_prompt_tokens 64 --max_new_tokens 40 --json {work}/smoke.json",
    )


def frozen_commands():
    """A few steps beside a frozen model, of each algorithm that has one."""
    train = "python train.py --tensorboard false --device {device} --out {work}/frozen"
    first = "--init_from {work}/frozen/sft/export --steps {steps}"
    return (
        f"{train} --algo sft --name sft --steps {{sft_steps}} --eval_size 0",
        f"{train} --algo dpo --name dpo {first} --eval_size {{problems}}",
        f"{train} --algo dpo --name known {first} --eval_size 0 --reference precomputed",
        f"{train} --algo distill --name distill {first} --eval_size {{problems}}",
        f"{train} --algo opd --name opd {first} --eval_size {{problems}} --teacher {{work}}/frozen/dpo/export",
    )


TESTS = gpu_tests()
TABLES = (
    kernel_table("logprob", 60, 20, "bench/logprob.py"),
    kernel_table("logprob_forward", 45, 8, "bench/logprob.py"),
    kernel_table("linear_logprob", 150, 30, "bench/linear_logprob.py"),
    kernel_table("clipped_surrogate", 40, 8, "bench/clipped_surrogate.py"),
    kernel_table("linear_clipped_surrogate", 180, 45, "bench/linear_clipped_surrogate.py"),
    kernel_table("linear_topk", 60, 8, "bench/linear_topk.py"),
    kernel_table("linear_match", 90, 20, "bench/linear_match.py"),
    kernel_table("decode_attention", 60, 15, "bench/decode_attention.py"),
)
PARTS = (
    Part(
        "env", "the machine and its roofs", 10, 8, ("bench/env.py", "bench/clocks.py"),
        ("python -m bench.env --device {device} --json {work}/env.json",), first=True,
    ),
    Part(
        "tests", "is it right", 110, 100, (*ENGINE, *TESTS, "tests/kernel_cases.py"),
        (
            pytest_command(TESTS, "-m 'gpu and not alone' {spread} --junitxml {work}/tests.xml"),
            pytest_command(TESTS, "-m '{alone}' --junitxml {work}/tests-alone.xml"),
        ),
        first=True, goes_on=True,
    ),
    Part(
        "attention", "which attention, packed rows too", 75, 20,
        ("engine/attention.py", "engine/model.py", "bench/attention.py"),
        (bench_command("attention", "{first}", "attention"),), first=True,
    ),
    Part(
        "decode_step", "where a decode step's time goes", 40, 60, (*ROLLOUT, "bench/decode_step.py"),
        (bench_command("decode_step", "{first}", "decode_step"),), first=True,
    ),
    Part(
        "head", "head and loss against their matrix products", 30, 60,
        (*KERNELS, "bench/heads.py", "bench/linear_clipped_surrogate.py", "bench/logprob.py"),
        (
            bench_command(
                "linear_clipped_surrogate logprob", "{first}", "head",
                "--only 'ours fused,plain torch,GEMMs alone'",
            ),
        ),
        first=True,
    ),
    Part(
        "step", "where an update's time goes, compiled too", 60, 60, (*UPDATE, "bench/step.py"),
        (bench_command("step", "{first}", "step"),), first=True,
    ),
    Part("smoke", "the whole product", 90, 40, ENGINE, smoke_commands(), first=True),
    Part("smoke_frozen", "runs with a reference or a teacher", 120, 30, ENGINE, frozen_commands()),
    Part(
        "decoding", "answers beside those of generate", 60, 40, (*ROLLOUT, "bench/decoding.py"),
        (bench_command("decoding", "{first}", "decoding"),),
    ),
    Part(
        "overlap", "a rollout beside an update", 110, 40, (*ENGINE, "bench/overlap.py"),
        (bench_command("overlap", "{first}", "overlap"),),
    ),
    *TABLES,
    captures_part("kernels", "a step kernel by kernel", 35, {"eager": "--kernels eager", "fused": "--kernels {fused}"}),
    captures_part("lags", "what runs beside what", 20, {"lag0": "--lag 0", "lag1": "--lag 1"}),
    Part(
        "steps", "updates of both models, with adapters too", 360, 30, (*UPDATE, "bench/step.py"),
        (bench_command("step", "{full}", "steps"),),
    ),
    Part(
        "step_frozen", "updates beside a reference or a teacher", 90, 30, (*UPDATE, "bench/step.py"),
        (bench_command("step", "{frozen}", "step_frozen"),),
    ),
    *[ncu_part(part.name, 10) for part in TABLES],
    Part(
        "gsm8k", "does it learn with real weights", 570, 100, (*ENGINE, "bench/gsm8k.py", "bench/weights.py"),
        ("python -m bench.gsm8k {gsm8k} -o {work}/gsm8k --json {work}/gsm8k.json",),
        after=("step", "decoding", *[part.name for part in TABLES]), needs=("runs/gsm8k/model", "runs/gsm8k/data"),
    ),
)  # fmt: skip
