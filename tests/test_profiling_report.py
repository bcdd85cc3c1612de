"""profiling/report.py: its files, gates, refusals and exit codes."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys

import page
import pytest
import report as reporting
import sections
import timeline
from summary import summarize
from traces import Range, Trace, Work

from tests.captures import ROOT, event, kineto, ncu_csv, nsys, span, two_steps


def report(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "profiling/report.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_report_end_to_end(tmp_path):
    for name, scale in (("eager", 3), ("fused", 1)):
        (tmp_path / name).mkdir()
        nsys(tmp_path / name / "capture.sqlite", two_steps(scale))
        command = "python train.py --out=/home/someone/runs --init_from /home/someone/models/x"
        provenance = {"tool_version": "nsys 9", "commit": "abc", "dirty": True, "command": command}
        (tmp_path / name / "provenance.json").write_text(json.dumps(provenance))
    (tmp_path / "counters").mkdir()
    ncu_csv(tmp_path / "counters" / "capture.csv")
    (tmp_path / "counters" / "bytes.json").write_text(json.dumps({"gemm": 1_000_000_000}))
    inputs = [tmp_path / name for name in ("eager", "fused", "counters")]
    done = report(*inputs, "--labels", "eager,fused,fused", "-o", tmp_path / "out", "--min-speedup", "forward=2")
    assert done.returncode == 0, done.stderr
    files = {p.name: p for p in (tmp_path / "out").iterdir()}
    assert set(files) == {"report.md", "report.html", "verdict.json", "trace.json", "timeline.png", "provenance.json"}
    text = files["report.md"].read_text()
    assert text.startswith("Device: NVIDIA H100.\n")
    assert "| - forward | fused | 1 | 40 ns ± 0 | 30 ns | 20 ns | 0 | 2 | 2 | 3.00x faster |" in text
    assert "1.50x of 1 GB" in text and "No change between fused and eager" in text
    page_ = files["report.html"].read_text()
    assert page_.count("<svg") == 2 and "3.00x faster" in page_ and "http" not in page_ and "src=" not in page_
    for path in files.values():
        assert b"/home/" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes(), path
    verdict = json.loads(files["verdict.json"].read_text())
    assert verdict["gates"][0]["passed"] and verdict["gates"][0]["got"] == 3
    trace = json.loads(files["trace.json"].read_text())["traceEvents"]
    named = {e["args"]["name"] for e in trace if e["name"] == "process_name"}
    first = {e["pid"]: min(x["ts"] for x in trace if x["pid"] == e["pid"] and x["ph"] == "X") for e in trace}
    assert named == {"eager", "fused"} and first == {0: 0.0, 1: 0.0}, "aligned at the first step"


def test_a_capture_that_knows_no_peak_memory_says_so(tmp_path):
    events = [span("train/rollout", 0, 100), event("cpu_op", "aten::mm", 10, 40)]
    for name, known in (("nsys", "{}"), ("torch", '{"peak_resident_bytes": 35000000}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "provenance.json").write_text(known)
    nsys(tmp_path / "nsys" / "capture.sqlite", two_steps())
    kineto(tmp_path / "torch" / "trace.json", events)
    done = report(tmp_path / "nsys", tmp_path / "torch", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "\n| nsys | n/a | n/a |\n" in text
    assert "| torch | process, resident, whole run with the profiler | 35 MB |" in text


def test_three_captures_from_a_cpu(tmp_path):
    inputs = []
    for name in ("grpo", "dr_grpo", "dapo"):
        events = [span("train/rollout", 0, 100), event("cpu_op", "aten::mm", 10, 40)]
        inputs.append(kineto(tmp_path / f"{name}.json", events))
    done = report(*inputs, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No GPU took part" in text.splitlines()[0]
    assert "hold no steps" in text and text.count("| rollout |") >= 3 and "| no change |" in text


def test_a_report_does_not_take_the_place_of_a_capture(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("trace.json", "provenance.json"):
        (tmp_path / "a" / name).write_text("{}")
    done = report(tmp_path / "a", tmp_path / "b", "-o", tmp_path / "a")
    assert done.returncode == 2 and "holds something and no report, so it stays as it is" in done.stderr
    assert {path.read_text() for path in (tmp_path / "a").iterdir()} == {"{}"}


def test_gates(tmp_path):
    a, b = nsys(tmp_path / "a.sqlite", two_steps(3)), nsys(tmp_path / "b.sqlite", two_steps(1))
    noisy = nsys(tmp_path / "noisy.sqlite", two_steps(1, late=300))
    run = lambda *args: report(*args, "-o", tmp_path / "out")
    assert run(a, b, "--min-speedup", "forward=2.9", "--min-speedup", "rollout=1").returncode == 0
    done = run(a, b, "--min-speedup", "forward=3.1")
    assert done.returncode == 1 and "FAILED: b at forward: 3.00x faster; asked: 3.1x faster.\n" in done.stdout
    assert run(a, noisy, "--min-speedup", "update=1.01").returncode == 1, "within the spread: not shown to be faster"
    done = run(b, a, "--min-speedup", "forward=0.4", "--min-speedup", "forward=0.25", "--min-speedup", "rollout=1")
    assert [line for line in done.stdout.splitlines() if "asked" in line] == [
        "FAILED: a at forward: 3.00x slower; asked: at most 2.5x slower.",
        "Passed: a at forward: 3.00x slower; asked: at most 4x slower.",
        "Passed: a at rollout: no change; asked: no slower.",
    ]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--min-speedup", "forwards=2"], "share no range 'forwards'; they share step, rollout"),
        (["--min-speedup", "forward"], "must read RANGE=NUMBER"),
        (["--min-speedup", "forward=nan"], "must read RANGE=NUMBER"),
        (["--labels", "a"], "1 labels for 2 captures"),
        (["--labels", "a,a"], "two captures with different labels"),
        (["missing.sqlite"], "There is no capture missing.sqlite."),
        (["README.md"], "is of no known kind"),
        (["configs"], "holds no capture"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, change, sentence):
    a, b = nsys(tmp_path / "a.sqlite", two_steps(3)), nsys(tmp_path / "b.sqlite", two_steps(1))
    done = report(a, b, *change, "-o", tmp_path / "out")
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.fixture
def run_report(monkeypatch, tmp_path, capsys):
    """-> run(*args): (exit code, stdout, stderr) of the program, in this process and without the picture."""

    def run(*args, main=reporting.main):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args), "-o", str(tmp_path / "out")])
        monkeypatch.setattr(timeline, "png", lambda *_: None)
        code = main()
        return code, *capsys.readouterr()

    return run


SHOWN = {
    "weight_sync": "weight_sync",
    "1.21x faster": "1.21x faster",
    "FSDP::pre_forward (lm.model.layers.1)": "FSDP::pre_forward (lm.model.layers.1)",
    "**x** and *y*": r"\*\*x\*\* and \*y\*",
    "__x__ _y_": r"\_\_x\_\_ \_y\_",
    "[a](http://evil)": r"\[a\](http:\//evil)",
    "![a](b) www.evil.com": r"!\[a\](b) www\.evil.com",
    "void k<float*, 2>(int&)": r"void k\<float\*, 2\>(int\&)",
    "<script>&lt;</script>": r"\<script\>\&lt;\</script\>",
    "a|b\\|c\\": r"a\|b\\\|c\\",
    "`code` ~~gone~~ $x$": r"\`code\` \~\~gone\~\~ \$x\$",
    "# heading #": r"\# heading \#",
    "> quoted": r"\> quoted",
    "- item": r"\- item",
    "+ item": r"\+ item",
    "* item": r"\* item",
    "12. item": r"12\. item",
    "3) item": r"3\) item",
    "---": r"\---",
    "===": r"\===",
    "```": r"\`\`\`",
    "two\n\n# lines\u2028- x": r"two \# lines - x",
    "    code": "code",
    "[a]: http://evil": r"\[a\]: http:\//evil",
}


@pytest.mark.parametrize("text", SHOWN)
def test_markdown_shows_what_was_written(text):
    assert page.literal(text) == SHOWN[text]


def read_markdown(text: str) -> list[tuple[str, str]]:
    """(the element it stands in, its text) of all that an independent implementation finds in a document."""
    markdown_it = pytest.importorskip("markdown_it", reason="the package markdown-it-py is not installed")
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    found = []
    for opened, token in zip(tokens, tokens[1:]):
        if token.type == "inline":
            assert {child.type for child in token.children} <= {"text", "softbreak"}, token.content
            lines = "".join(child.content if child.type == "text" else "\n" for child in token.children).split("\n")
            found += [(opened.tag, line) for line in lines]
    elements = {token.tag for token in tokens} - {""}
    assert elements <= set("h1 h2 p ul li table thead tbody tr th td".split()), elements
    return found


def test_what_is_not_ours_is_no_markup_in_a_report():
    """Labels, a title, kernels, ranges, notes and provenance that are markup stand there as they were written."""
    variants = []
    for label, others in (("# *a*|b\n- c", list(SHOWN)), ("1. [a](http://evil)", list(SHOWN)[:2])):
        ranges = [Range("update", 0, 100, (1, 1), 0)]
        ranges += [Range(name, i + 10, i + 11, (1, 1), 0) for i, name in enumerate(others)]
        works = [Work(name, 1, 2, "CPU", "t", "op", 1, (1, 1), (1, 2), (1, name)) for name in others[:5]]
        trace = Trace("torch", ranges, works, {0: (0, 100)}, stepper=(1, 1), notes=others, label=label)
        trace.provenance = {"command": "`x`\n# y **z**", "versions": {"<b>": "_1_"}}
        variants.append(sections.Variant(label, [trace], [summarize(trace)]))
    found = read_markdown(page.markdown("# ![t](u)\n<x>", variants, ["- > gate"]))
    texts = {text for _, text in found}
    plain = lambda text: " ".join(text.split())
    a, b = (plain(v.label) for v in variants)
    assert ("h1", "# ![t](u) <x>") in found and ("p", "- > gate") in found
    assert any(tag == "p" and text.startswith(f"No change between {b} and {a}: ") for tag, text in found)
    assert {plain(f"{a}: {sections.scrub(note)}") for note in SHOWN} <= texts
    assert {f"- {plain(name)}" for name in [*SHOWN][:12]} <= texts and {plain(name) for name in [*SHOWN][:5]} <= texts
    assert {a, b, f"{a}, {b}", "`x` # y **z**", "<b> _1_"} <= texts
    assert [text for tag, text in found if tag == "h2"] == [t.title for t in sections.tables(variants)] + [
        "What the words mean", "Notes"
    ]  # fmt: skip


def test_only_a_missed_gate_ends_with_1(tmp_path, run_report, monkeypatch):
    good = nsys(tmp_path / "good.sqlite", two_steps())
    cases = dict.fromkeys("empty.sqlite empty.json empty.json.gz empty.csv".split(), b"")
    cases |= {"cut.sqlite": good.read_bytes()[:1000], "text.sqlite": b"no database"}
    cases |= {"cut.json": b"[{", "bytes.csv": bytes(range(256))}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        code, out, err = run_report(good, tmp_path / name)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and name in err, err
    for name, content in {"provenance.json": "[1]", "bytes.json": "{"}.items():
        (tmp_path / "beside").mkdir(exist_ok=True)
        shutil.copy(good, tmp_path / "beside/capture.sqlite")
        (tmp_path / "beside" / name).write_text(content)
        code, out, err = run_report(good, tmp_path / "beside")
        assert (code, len(err.splitlines())) == (2, 1) and name in err
        (tmp_path / "beside" / name).unlink()
    odd = '{"peak_resident_bytes": "much", "device": [1], "versions": [], "command": null}'
    (tmp_path / "beside/provenance.json").write_text(odd)
    (tmp_path / "beside/bytes.json").write_text('{"gemm": null}')
    assert run_report(good, tmp_path / "beside")[0] == 0
    assert run_report(good, tmp_path / "beside", "--min-speedup", "update=2")[0] == 1
    monkeypatch.setattr(page, "markdown", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        run_report(
            good, tmp_path / "beside", main=lambda: runpy.run_path(ROOT / "profiling/report.py", run_name="__main__")
        )
    assert ended.value.code == 3


def test_profiling_watches_from_outside():
    """It imports nothing of ours, and none of its modules hides one of the standard library."""
    files = sorted((ROOT / "profiling").glob("*.py"))
    assert files and not (ROOT / "profiling" / "__init__.py").exists()
    for path in files:
        assert path.stem not in sys.stdlib_module_names
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"kernels", "engine", "bench", "tests", "torch"}, path


def test_a_program_without_the_loops_verbs_is_shown_by_its_own_ranges(tmp_path):
    events = [span("load", 0, 40), span("read", 10, 30), event("cpu_op", "aten::mm", 12, 20)]
    a, b = (kineto(tmp_path / f"{name}.json", events) for name in "ab")
    assert report(a, b, "-o", tmp_path / "out").returncode == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| - rest of load | b | 1 | 20 ns | n/a | n/a | n/a | 0 | no change |" in text
    assert "## Other ranges" not in text
    assert "| read | aten::mm | 8 ns, 1 | 8 ns, 1 |" in text
