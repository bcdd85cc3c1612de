"""profiling/capture.py: the flags of each tool, what it refuses, and one real torch capture of train.py."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.parts import PARTS, words_of
from engine.config import Config, first_run, load_config
from engine.errors import UserError
from engine.folder import claim_folder
from engine.inputs import load_inputs
from engine.policy import learning_rate
from engine.record import describe_recording
from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--device cpu --threads 1 --tensorboard false".split()

FAKE_NSYS = """#!{python}
import pathlib, subprocess, sys
argv = sys.argv[1:]
if argv[0] == "--version":
    print("NVIDIA Nsight Systems version 9.9")
elif argv[0] == "export":
    pathlib.Path(argv[argv.index("-o") + 1]).write_text("exported")
else:
    at = argv.index("-o")
    pathlib.Path(argv[at + 1] + "{left}").write_text(" ".join(argv[:at]))
    sys.exit(subprocess.run(argv[at + 2 :]).returncode)
"""
FAKE_IMPORTER = """#!{python}
import pathlib, sys
argv = sys.argv[1:]
streamed = pathlib.Path(argv[argv.index("-i") + 1]).read_text()
pathlib.Path(argv[argv.index("-o") + 1]).write_text("imported " + streamed)
"""
FAKE_SMI = "#!{python}\nprint('Some GPU, 1.2, 3 MHz, 4 MHz, 5 W')\n"
FAKE_NCU = """#!{python}
import pathlib, subprocess, sys
argv = sys.argv[1:]
if "--import" in argv:
    print("ID,Kernel Name")
elif "-o" in argv:
    at = argv.index("-o")
    pathlib.Path(argv[at + 1] + ".ncu-rep").write_text(" ".join(argv[:at]))
    sys.exit(subprocess.run(argv[at + 2 :]).returncode)
"""


@pytest.fixture
def stage(tmp_path):
    """A folder with a train.py that prints its arguments and exits with --code, and one for fake profilers."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "train.py").write_text(
        "import os, signal, sys\nprint(*sys.argv[1:])\n"
        "if '--kill' in sys.argv: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(int(sys.argv[sys.argv.index('--code') + 1]) if '--code' in sys.argv else 0)\n"
    )
    return tmp_path


def add_tool(stage: Path, name: str, source: str, left: str = ".nsys-rep") -> None:
    path = stage / "bin" / name
    path.write_text(source.format(python=sys.executable, left=left))
    path.chmod(0o755)


def capture(stage: Path, words: str, **environment) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{stage / 'bin'}:/usr/sbin:/sbin", "OMP_NUM_THREADS": "1"}
    env |= {name: str(value) for name, value in environment.items()}
    command = [sys.executable, str(ROOT / "profiling/capture.py"), *words.split()]
    return subprocess.run(command, cwd=stage, capture_output=True, text=True, env=env)


def test_nsys_flags(stage):
    add_tool(stage, "nsys", FAKE_NSYS)
    add_tool(stage, "nvidia-smi", FAKE_SMI)
    done = capture(stage, "--tool nsys --steps 2:4 --graph-nodes -o out -- train.py --algo grpo")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "--algo grpo --profile_steps 2:4\n", "the program's own output"
    flags = (stage / "out" / "capture.nsys-rep").read_text()
    assert flags == (
        "profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --capture-range=cudaProfilerApi "
        "--capture-range-end=stop --cuda-graph-trace=node"
    )
    assert (stage / "out" / "capture.sqlite").read_text() == "exported"
    known = json.loads((stage / "out" / "provenance.json").read_text())
    assert known["tool_version"] == "NVIDIA Nsight Systems version 9.9" and known["exit_code"] == 0
    assert known["command"] == "python train.py --algo grpo --profile_steps 2:4" and known["window"] == "2:4"
    assert set(known) >= {"device", "driver", "versions", "commit", "dirty", "time"} and known["device"] == "Some GPU"
    assert "peak_resident_bytes" not in known, "it would be that of the command nsys, whose child the program is not"


def test_a_whole_program(stage):
    add_tool(stage, "nsys", FAKE_NSYS)
    (stage / "bench.py").write_text("import sys; print('bench', *sys.argv[1:])")
    done = capture(stage, "--tool nsys --whole -o out -- -m bench logprob")
    assert done.returncode == 0 and done.stdout == "bench logprob\n", done.stderr
    assert "--capture-range" not in (stage / "out" / "capture.nsys-rep").read_text()


def test_a_stream_that_nsys_did_not_import(stage):
    """As Debian's nsys leaves it, which does not find its own importer."""
    add_tool(stage, "nsys", FAKE_NSYS, left=".qdstrm")
    add_tool(stage, "QdstrmImporter", FAKE_IMPORTER)
    done = capture(stage, "--tool nsys --whole -o out -- train.py")
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (stage / "out").iterdir()}
    assert made == {"capture.nsys-rep", "capture.sqlite", "provenance.json"}
    assert (stage / "out" / "capture.nsys-rep").read_text().startswith("imported profile --trace")


def test_a_stream_that_cannot_be_imported(stage):
    add_tool(stage, "nsys", FAKE_NSYS, left=".qdstrm")
    add_tool(stage, "QdstrmImporter", "#!{python}\nraise SystemExit(1)\n")
    done = capture(stage, "--tool nsys --whole -o out -- train.py")
    assert done.returncode == 2 and "QdstrmImporter" in done.stderr.splitlines()[-1], done.stderr
    assert (stage / "out" / "capture.qdstrm").exists()


@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not installed")
def test_a_real_nsys_capture_of_a_whole_program(tmp_path):
    (tmp_path / "tiny.py").write_text("import nvtx\nwith nvtx.annotate('x'):\n    print('done')\n")
    words = f"profiling/capture.py --tool nsys --whole -o {tmp_path}/out -- {tmp_path}/tiny.py"
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "done\n" in done.stdout, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"capture.nsys-rep", "capture.sqlite", "provenance.json"}


def test_ncu_flags(stage):
    add_tool(stage, "ncu", FAKE_NCU)
    add_tool(stage, "nvidia-smi", FAKE_SMI)
    done = capture(stage, "--tool ncu --ranges forward,optimizer -o out -- train.py")
    assert done.returncode == 0, done.stderr
    flags = (stage / "out" / "capture.ncu-rep").read_text()
    assert flags.startswith(
        "--clock-control none --nvtx --nvtx-include train@forward/ --nvtx-include forward/ "
        "--nvtx-include train@optimizer/ --nvtx-include optimizer/ --profile-from-start off "
        "--metrics gpu__time_duration.sum,dram__bytes_read.sum,"
    )
    assert (stage / "out" / "capture.csv").read_text() == "ID,Kernel Name\n"


@pytest.mark.parametrize("words, code", [("--code 7", 7), ("--kill", 137)])
def test_the_exit_code_is_passed_on(stage, words, code):
    done = capture(stage, f"--tool torch -o out -- train.py {words}")
    assert done.returncode == code and f"failed with exit code {code}" in done.stderr
    assert json.loads((stage / "out" / "provenance.json").read_text())["exit_code"] == code


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--tool nsys -- train.py", "nsys is not on PATH"),
        ("--tool ncu --whole -- -m bench.once logprob", "ncu is not on PATH"),
        ("--tool torch --steps 50:60 -- train.py", "may have ended before step 50"),
        ("--tool torch -- -m bench.run", "written by train.py itself"),
        ("--tool nsys -- -m bench.run", "with --whole"),
        ("--tool torch --whole -- train.py", "--whole records all"),
        ("--tool torch --graph-nodes -- train.py", "--graph-nodes is for nsys"),
        ("--tool torch -- train.py --profile_steps=1:2", "sets profile_steps and profile_trace itself"),
        ("--tool torch", "Name the program after --"),
        ("--tool torch -o full -- train.py", "full already holds something"),
        ("--tool torch -o train.py/a -- train.py", "train.py/a"),
        ("--tool torch -- no-such-launcher train.py", "no-such-launcher"),
    ],
)
def test_what_is_refused(stage, words, sentence):
    (stage / "full").mkdir()
    (stage / "full" / "x").write_text("")
    done = capture(stage, f"-o out {words}")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("No GPU here")]
    assert done.returncode == 2 and sentence in lines[-1] and len(lines) == 1, done.stderr


@pytest.mark.parametrize(
    "tool, more, sentence",
    [
        ("nsys", "", "There is no GPU here, which the window of steps needs; use --whole, or --tool torch."),
        ("ncu", "", "There is no GPU here, which ncu needs; use --tool nsys --whole, or --tool torch."),
        ("ncu", "--whole", "There is no GPU here, which ncu needs; use --tool nsys --whole, or --tool torch."),
    ],
)
def test_without_a_gpu_nothing_is_run(stage, tool, more, sentence):
    add_tool(stage, tool, {"nsys": FAKE_NSYS, "ncu": FAKE_NCU}[tool])
    done = capture(stage, f"--tool {tool} {more} -o out -- train.py")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence + "\n")
    assert not (stage / "out").exists(), "or another try would be refused"


def test_the_list_is_json(stage):
    add_tool(stage, "nsys", FAKE_NSYS)
    add_tool(stage, "QdstrmImporter", FAKE_IMPORTER)
    done = capture(stage, "--list")
    assert json.loads(done.stdout) == {"nsys": str(stage / "bin/nsys"), "ncu": None, "auto": "torch"}
    assert done.returncode == 0
    assert capture(stage, "").returncode == 2


def test_without_nvtx_what_needs_its_ranges_is_refused(stage):
    (stage / "sitecustomize.py").write_text("import sys\nsys.modules['nvtx'] = None\n")
    add_tool(stage, "nsys", FAKE_NSYS)
    add_tool(stage, "ncu", FAKE_NCU)
    for options in ("--tool nsys", "--tool ncu --ranges forward"):
        done = capture(stage, f"{options} -o out -- train.py", PYTHONPATH=stage)
        assert done.returncode == 2 and "package nvtx, which is not installed" in done.stderr
    assert capture(stage, "--tool nsys --whole -o out -- train.py", PYTHONPATH=stage).returncode == 0


def test_provenance_does_without_git_and_takes_the_commit_it_is_told(stage):
    capture(stage, "--tool torch -o a -- train.py", PATH=stage)
    capture(stage, "--tool torch -o b -- train.py", PATH=stage, BENCH_COMMIT="c0ffee")
    a, b = (json.loads((stage / name / "provenance.json").read_text()) for name in "ab")
    assert (a["commit"], a["dirty"], a["driver"], b["commit"]) == ("", False, "none", "c0ffee")


def test_a_torch_capture_of_train_and_its_report(tmp_path):
    """Two captures of a short SFT run, and the report over both: the second without what a bare GPU image lacks."""
    (tmp_path / "bare").mkdir()
    blocked = "import sys\nsys.modules |= dict.fromkeys(('nvtx', 'datasets', 'math_verify'))\n"
    (tmp_path / "bare/sitecustomize.py").write_text(blocked)
    for name, kernels, path in (("a", "eager", ""), ("b", "chunked", tmp_path / "bare")):
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(path)}
        capture = f"profiling/capture.py --tool torch --steps 1:4 -o {tmp_path}/{name} --"
        train = f"train.py --algo sft --schedule cosine --kernels {kernels} --name {name} --out {tmp_path}/runs"
        few = "--device cpu --threads 1 --tensorboard false"
        words = [sys.executable, *f"{capture} {train} {few}".split()]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("nvtx is not installed") == (name == "b")
        assert {p.name for p in (tmp_path / name).iterdir()} == {"provenance.json", "trace.json.gz"}
        assert done.stdout.endswith(
            f"Recorded steps 1 to 3 in {tmp_path}/{name}/trace.json.gz. "
            "A recording keeps no checkpoint and no export.\n"
        )
        folder = tmp_path / "runs" / f"{name}-profile"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        config = load_config(["--algo", "sft", "--schedule", "cosine"])
        rates = [learning_rate(config, step, config.steps) for step in range(4)]
        assert [row["learning_rate"] for row in rows] == rates, "those of all steps, and nothing behind the window"
        assert not {p.name for p in folder.iterdir()} & {"checkpoints", "export", "summary.json", "curves.png"}
    report = f"profiling/report.py {tmp_path}/a {tmp_path}/b -o {tmp_path}/report"
    done = subprocess.run([sys.executable, *report.split()], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| steps of the window | a, b | 1, 2, 3 |" in text
    for verb in ("step", "update", "- forward", "- backward", "- optimizer"):
        assert f"| {verb} | b | " in text
    for path in (tmp_path / "report").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), f"{path.name} names a folder of this machine"


def test_every_rank_records_to_a_file_of_its_own_also_up_to_the_last_step(tmp_path):
    given = f"--algo sft --steps 2 --profile_steps 1:9 --profile_trace {tmp_path}/t.json.gz --out {tmp_path}/runs"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = command("train.py", *given.split(), *SMALL, ranks=2)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Recorded step 1 in {tmp_path}/t.rank0.json.gz." in done.stdout
    for rank in (0, 1):
        with gzip.open(tmp_path / f"t.rank{rank}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"ProfilerStep#1", "train/update"} <= names and "ProfilerStep#0" not in names


def test_a_recording_is_nothing_that_a_resume_finds(tmp_path):
    claim = lambda *words: claim_folder(load_config(["--out", str(tmp_path), *words]))
    recording = ("--profile_steps", "3:6")
    ordinary = tmp_path / "grpo-tiny-seed0"
    for words, base in (((), ordinary), (("--name", "mine"), tmp_path / "mine")):
        for folder in (f"{base}-profile", f"{base}-profile-2"):
            assert claim(*words, *recording) == (Path(folder), None)
            (Path(folder) / "metrics.jsonl").write_text("{}")
        assert claim(*words, "--resume", "auto") == (base, None)
    first = first_run(load_config(["--name", "mine", *recording]))
    assert (str(first.run_dir), first.profile_steps) == ("runs/sft-tiny-seed0", ""), "the start of an ordinary run"


def test_no_command_of_a_visit_leaves_a_run_where_a_resume_looks():
    trained = 0
    for line in (line for part in PARTS for line in part.commands):
        words = words_of(line, "toy", Path("work"))
        if "train.py" in words:
            folder = load_config(words[words.index("train.py") + 1 :]).run_dir
            assert folder.parent != Config().run_dir.parent and folder.parts[0] == "work"
            trained += 1
    assert trained > 4


@pytest.mark.parametrize(
    "step, said",
    [
        (3, "Stopped by a signal before the end of step 3: no step was recorded whole."),
        (4, "Recorded step 3 for the profiler that runs this program, then stopped by a signal."),
        (6, "Recorded steps 3 to 5 for the profiler that runs this program."),
    ],
)
def test_the_last_line_says_what_was_recorded(step, said):
    told = describe_recording(load_config(["--profile_steps", "3:6"]), step)
    assert told == f"{said} A recording keeps no checkpoint and no export."


def test_a_window_without_a_gpu_needs_a_file_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--algo", "sft", "--profile_steps", "1:3"]
    with pytest.raises(UserError, match="needs --profile_trace FILE.json.gz"):
        load_inputs(load_config(words))
    (tmp_path / "mine.json").write_text("mine")
    with pytest.raises(UserError, match="mine.json is there already, and stays as it is"):
        load_inputs(load_config([*words, "--profile_trace", str(tmp_path / "mine.json")]))
