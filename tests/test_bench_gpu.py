"""A visit to a GPU machine: what it plans, how it ends, what it remembers; with parts that stand for the real ones."""

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import BENCHES, gpu, ledger, parts, records, report, visit
from bench.run import parse, sizes_of
from engine.config import load_config

ABOUT = {
    "kind": "cuda", "device": "A GPU", "driver": "580.1", "commit": "c0ffee", "device_class": "H100",
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
}  # fmt: skip
NAME = "H100-20260101T000000"


def part(name, code, limit_s=60.0, **more):
    return command_part(name, f"python -c {shlex.quote(code)}", limit_s, **more)


def command_part(name, command, limit_s=60.0, **more):
    values = {"worth": 1.0, "sources": ("bench/table.py",)} | more
    return parts.Part(name, "", limit_s, commands=(command.replace("{", "{{").replace("}", "}}"),), **values)


def new_visit(folder, rows=None):
    (folder / "work").mkdir(exist_ok=True)
    return visit.Visit(folder / "out", folder / "work", "real", NAME, ABOUT, rows if rows is not None else {})


def run(some, folder, seconds=60.0, rows=None):
    """-> exit code, row by part, the visit's file."""
    code = new_visit(folder, rows).run([(one, 0, True) for one in some], seconds)
    return code, *left_by(folder)


def left_by(folder):
    file = json.loads((folder / f"out/{NAME}.json").read_text())
    return {row["part"]: row for row in file["parts"]}, file


def table(folder, stem="table", **row):
    """Code that writes a table as bench.run does, of one case."""
    rows = [{"rival": "eager", "status": "ok", "why": ""}, {"rival": "ours fused", "status": "ok", "why": ""} | row]
    text = json.dumps({"provenance": {}, "cases": [{"bench": "logprob", "rows": rows}]})
    return f"open({str(folder / 'work' / stem)!r} + '.json', 'w').write({text!r}); print('1 case', flush=True); "


HANGS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import pathlib, time; time.sleep(1); pathlib.Path('{path}').touch()"])
print("begun", flush=True)
time.sleep(60)
"""


class TestEnds:
    def test_a_part_that_fails_or_hangs_loses_nobody_elses_results(self, tmp_path, capsys):
        hangs = table(tmp_path, "partly") + HANGS.format(path=tmp_path / "alive")
        code, rows, file = run([
            part("fails", "print('before'); raise KeyError(7)"), part("hangs", hangs, limit_s=0.6),
            part("logprob", table(tmp_path)),
            command_part("absent", f"python profiling/capture.py --tool torch -o {tmp_path / 'none'}"),
            command_part("misspelt", f"python profiling/capture.py --tol torch -o {tmp_path / 'none'}"),
        ], tmp_path)  # fmt: skip
        assert code == 1
        assert {name: row["status"] for name, row in rows.items()} == {
            "fails": "failed", "hangs": "timed out", "logprob": "ok", "absent": "absent", "misspelt": "failed",
        }  # fmt: skip
        assert rows["fails"]["said"] == "KeyError: 7" and rows["hangs"]["said"] == "begun"
        assert rows["absent"]["said"].startswith("Name the program") and rows["hangs"]["seconds"] < 5
        assert [case["part"] for case in file["cases"]] == ["hangs", "logprob"]
        said = capsys.readouterr().out
        assert said.index("    before") < said.index("    KeyError: 7") < said.index("hangs: at most")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            f"{NAME}.json", "ledger.json", "logs.tar.gz", "summary.md",
        ]  # fmt: skip
        page = (tmp_path / "out/summary.md").read_text()
        assert "A GPU" in page and "580.1" in page and "| hangs | timed out |" in page and "KeyError: 7\n```" in page
        with tarfile.open(tmp_path / "out/logs.tar.gz") as tar:
            assert {"gpu/fails.log", "gpu/hangs.log", "gpu/logprob.log"} < set(tar.getnames())
        time.sleep(0.8)
        assert not (tmp_path / "alive").exists(), "a process of the part that hung went on"

    def test_all_well_is_exit_code_0(self, tmp_path):
        writes = f"import json; json.dump({{'found': 7}}, open({str(tmp_path / 'work/x.json')!r}, 'w'))"
        code, rows, file = run([part("one", writes)], tmp_path)
        assert code == 0 and rows["one"]["status"] == "ok"
        assert file["provenance"] == ABOUT and file["results"] == {"x": {"found": 7}}

    def test_after_a_command_that_failed_only_a_part_that_goes_on_does(self, tmp_path):
        two = ("python -c 'raise KeyError(7)'", "python -c 'print(8)'")
        stops, goes_on = (dataclasses.replace(part(name, ""), commands=two) for name in ("stops", "goes on"))
        _, rows, _ = run([stops, dataclasses.replace(goes_on, goes_on=True)], tmp_path)
        assert {name: (row["status"], row["said"]) for name, row in rows.items()} == {
            "stops": ("failed", "KeyError: 7"), "goes on": ("failed", "8"),
        }  # fmt: skip
        assert parts.PARTS[1].name == "tests" and parts.PARTS[1].goes_on

    def test_a_rival_of_ours_that_is_wrong_is_a_failure_and_a_peer_that_is_is_told_of(self, tmp_path, capsys):
        peer, ours = table(tmp_path, "a", rival="peer", status="wrong"), table(tmp_path, "b", status="wrong")
        code, rows, _ = run([part("peer", peer), part("ours", ours)], tmp_path)
        assert code == 1 and rows["peer"]["status"] == "ok" and rows["ours"]["status"] == "failed"
        assert "logprob peer: wrong" in capsys.readouterr().out

    def test_what_there_is_no_time_for_is_left_out(self, tmp_path):
        code, rows, _ = run([part("one", "print('first')")], tmp_path, seconds=visit.LEAST / 2)
        assert code == 0 and rows["one"]["status"] == "left out"
        assert json.loads((tmp_path / "out/ledger.json").read_text()) == {}

    def test_time_that_others_leave_goes_to_what_it_holds(self, tmp_path):
        queue = [(part("early", ""), 50, True), (part("fits", ""), 20, False), (part("dear", ""), 70, False)]
        assert new_visit(tmp_path).run(queue, 60.0) == 0
        rows, _ = left_by(tmp_path)
        assert {name: row["status"] for name, row in rows.items()} == {"early": "ok", "fits": "ok"}

    def test_tests_that_failed_are_named_printed_and_remembered(self, tmp_path, capsys):
        tests = "def test_good(): pass\ndef test_bad(): assert 1 == 2, 'no'\n"
        (tmp_path / "test_x.py").write_text(tests)
        row, some = {}, command_part("tests", f"python -m pytest {tmp_path / 'test_x.py'} -v -p no:cacheprovider")
        _, rows, _ = run([some], tmp_path, rows=row)
        (name,) = rows["tests"]["failed"]
        assert name.endswith("test_x.py::test_bad") and row["tests"]["H100"]["failed"] == [name]
        assert "    FAILED" in (said := capsys.readouterr().out) and "no" in said
        again = gpu.with_failed_first(some, {"failed": ["tests/test_x.py::test_bad[a {b}]"]})
        words = parts.words_of(again.again[0], "real", tmp_path)
        assert "tests/test_x.py::test_bad[a {b}]" in words

    def test_a_test_that_is_no_longer_there_does_not_keep_the_others_from_running(self, tmp_path):
        gone = gpu.with_failed_first(part("tests", "print('others')"), {"failed": ["tests/test_none.py::test_x"]})
        _, rows, _ = run([gone], tmp_path)
        assert rows["tests"]["status"] == "ok" and rows["tests"]["said"] == "others"

    def test_tests_that_failed_beside_others_are_found_before_any_summary(self):
        lines = ["[gw0] [ 50%] PASSED tests/test_x.py::test_a ", "[gw11] [100%] FAILED tests/test_x.py::test_b[1 2]"]
        assert visit.failed_tests(lines) == ["tests/test_x.py::test_b[1 2]"]
        assert visit.complaint([*lines, "hung"]) == ["tests/test_x.py::test_b[1 2]", *lines, "hung"]

    def test_the_largest_files_stay_out_of_a_full_archive(self, tmp_path, monkeypatch):
        monkeypatch.setattr(visit, "ARCHIVE_BYTES", 4096)
        (tmp_path / "captures/a").mkdir(parents=True)
        (tmp_path / "captures/a/big").write_bytes(os.urandom(1 << 16))
        (tmp_path / "one.log").write_text("said")
        visit.archive(tmp_path, tmp_path / "logs.tar.gz", left_out := set())
        assert left_out == {"captures/a/big"}
        with tarfile.open(tmp_path / "logs.tar.gz") as tar:
            assert tar.getnames() == ["gpu/one.log"]


class TestKilled:
    @pytest.fixture
    def begun(self, tmp_path, monkeypatch):
        """A visit in a process of its own, in the middle of a part that has written a table, after one that ended."""
        monkeypatch.setattr(visit, "BEAT", 0.1)
        sleeps = table(tmp_path) + f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
        some = [part("one", "print('done')"), part("two", sleeps + "time.sleep(60)"), part("three", "")]
        child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(run(some, tmp_path)[0]))
        child.start()
        file, end = tmp_path / f"out/{NAME}.json", time.monotonic() + 20
        while not (file.exists() and json.loads(file.read_text())["cases"]):
            assert time.monotonic() < end, "the second part has not begun"
            time.sleep(0.05)
        yield child, int((tmp_path / "pid").read_text())
        child.kill()
        child.join()

    def test_by_sigkill_it_has_written_what_ended_and_what_the_part_under_way_had_saved(self, begun, tmp_path):
        child, part_pid = begun
        child.kill()
        child.join()
        os.kill(part_pid, signal.SIGKILL)
        rows, file = left_by(tmp_path)
        assert {name: row["status"] for name, row in rows.items()} == {"one": "ok", "two": "running"}
        assert file["cases"][0]["part"] == "two"
        rows = json.loads((tmp_path / "out/ledger.json").read_text())
        assert rows["one"]["H100"]["status"] == "ok" and "two" not in rows
        with tarfile.open(tmp_path / "out/logs.tar.gz") as tar:
            assert "gpu/one.log" in tar.getnames()

    def test_by_sigterm_it_ends_the_part_and_writes_it_as_timed_out(self, begun, tmp_path):
        child, part_pid = begun
        child.terminate()
        child.join(10)
        rows, file = left_by(tmp_path)
        assert child.exitcode == 1 and not Path(f"/proc/{part_pid}").exists()
        assert [row["status"] for row in rows.values()] == ["ok", "timed out", "left out"]
        assert json.loads((tmp_path / "out/ledger.json").read_text())["two"]["H100"]["status"] == "timed out"
        assert file["cases"][0]["part"] == "two"


class TestLedger:
    @pytest.mark.parametrize(
        ("old", "new", "kept"),
        [
            (("a", "ok"), ("a", "ok"), "new"), (("a", "failed"), ("a", "failed"), "new"),
            (("a", "failed"), ("a", "ok"), "new"), (("a", "ok"), ("a", "timed out"), "old"),
            (("a", "ok"), ("b", "failed"), "new"), (("a", "ok"), ("b", "ok"), "new"),
        ],
    )  # fmt: skip
    def test_the_newest_row_counts_but_a_failure_leaves_a_good_one_of_its_key(self, old, new, kept):
        rows = {}
        for which, (key, status) in (("old", old), ("new", new)):
            ledger.record(rows, "part", "H100", {"key": key, "status": status, "which": which})
        assert rows["part"]["H100"]["which"] == kept
        ledger.record(rows, "part", "H200", {"key": "b", "status": "failed", "which": "other"})
        assert rows["part"]["H100"]["which"] == kept and ledger.find(rows, "part", "H200")["which"] == "other"

    def test_a_visit_goes_on_from_it_and_says_what_each_row_is_of(self, tmp_path):
        rows = {"other": {"H200": {"key": "k", "status": "ok"}}}
        run([one := part("one", "print('done')")], tmp_path, rows=rows)
        left = json.loads((tmp_path / "out/ledger.json").read_text())
        assert left["other"] == rows["other"]
        row = left["one"]["H100"]
        assert row.pop("seconds") < 10
        assert row == {
            "key": parts.key_of(one), "status": "ok", "file": f"{NAME}.json", "torch": "2.11.0", "triton": "3.6.0",
            "commit": "c0ffee",
        }  # fmt: skip

    def test_a_key_is_of_the_commands_and_of_the_names_and_contents_of_the_sources(self, tmp_path, monkeypatch):
        monkeypatch.setattr(parts, "ROOT", tmp_path)
        (tmp_path / "a.py").write_text("1")
        some = part("one", "", sources=("*.py",))
        before = parts.key_of(some)
        assert parts.key_of(dataclasses.replace(some, limit_s=1.0, worth=9.0, again=("x",))) == before
        assert parts.key_of(dataclasses.replace(some, commands=("x",))) != before
        (tmp_path / "b.txt").write_text("not a source")
        assert parts.key_of(some) == before
        (tmp_path / "a.py").write_text("2")
        assert parts.key_of(some) != before
        (tmp_path / "a.py").write_text("1")
        assert parts.key_of(some) == before
        (tmp_path / "a.py").rename(tmp_path / "b.py")
        assert parts.key_of(some) != before


def planned(arguments, some, rows, folder, capsys):
    """-> what is printed of a plan: (names of what runs, lines)."""
    (folder / "ledger.json").write_text(json.dumps(rows))
    assert gpu.main(["--plan", "--device-class", "H100", *arguments], some, folder / "ledger.json") == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.split(":")[0] for line in lines if ": about " in line and not line.startswith(" ")], lines


def row_of(one, status="ok", seconds=10.0, **more):
    return {"H100": {"key": parts.key_of(one), "status": status, "seconds": seconds, "file": "x.json", **more}}


class TestPlan:
    dear = part("dear", "1", 100, worth=50)
    cheap, first = part("cheap", "2", 10, worth=10), part("first", "3", first=True)

    def test_what_is_missing_goes_by_worth_per_second_and_fills_the_minutes(self, tmp_path, capsys):
        some = [self.dear, self.cheap, self.first]
        rows = {"first": row_of(self.first)}
        names, lines = planned(["--missing"], some, rows, tmp_path, capsys)
        assert names == ["cheap", "dear"] and "left out: first (known: x.json)" in lines
        names, lines = planned(["--missing", "--minutes", "1.7"], some, rows, tmp_path, capsys)
        assert names == ["cheap"] and "if time is left: dear, about 100 s" in lines

    def test_seconds_of_an_older_source_are_a_better_estimate_than_the_limit(self, tmp_path, capsys):
        rows = {"dear": {"H100": {"key": "older", "status": "ok", "seconds": 5.0, "file": "x.json"}}}
        names, lines = planned(["--missing", "--minutes", "0.3"], [self.cheap, self.dear], rows, tmp_path, capsys)
        assert names == ["dear", "cheap"]
        assert "what is missing on H100: 2 parts, about 15 s of 18 s, at most 110 s" in lines

    def test_what_failed_comes_first_with_its_tests_once_it_has_changed_and_last_before(self, tmp_path, capsys):
        rows = {"cheap": row_of(self.cheap, "failed"), "dear": row_of(self.dear, "failed", failed=["tests/x.py::y"])}
        some = [self.cheap, self.dear, self.first]
        assert planned(["--missing"], some, rows, tmp_path, capsys)[0] == ["first", "dear", "cheap"]
        rows["dear"]["H100"]["key"] = "before the mend"
        names, lines = planned(["--missing"], some, rows, tmp_path, capsys)
        assert names == ["dear", "first", "cheap"] and "    python -m pytest tests/x.py::y -v" in lines[1]

    def test_a_part_waits_for_others_and_for_what_it_needs(self, tmp_path, capsys):
        last = part("last", "4", after=("cheap",), needs=("bench", "no/such/folder"))
        names, lines = planned(["--missing"], [self.cheap, last], {}, tmp_path, capsys)
        assert names == ["cheap"] and "left out: last (waits for cheap)" in lines
        _, lines = planned(["--missing"], [self.cheap, last], {"cheap": row_of(self.cheap)}, tmp_path, capsys)
        assert "left out: last (needs no/such/folder)" in lines

    def test_without_a_wish_a_new_class_of_device_gets_the_first_visit(self, tmp_path, capsys):
        some = [self.cheap, self.first]
        other = {"cheap": {"H200": {"key": "k", "status": "ok", "seconds": 1.0}}}
        names, lines = planned([], some, other, tmp_path, capsys)
        assert names == ["first"] and lines[-1].startswith("a first visit to H100: 1 parts")
        assert planned([], some, {"first": row_of(self.first)}, tmp_path, capsys)[0] == ["cheap"]
        assert planned(["--first"], some, {"first": row_of(self.first)}, tmp_path, capsys)[0] == ["first"]
        assert planned(["--parts", "cheap"], some, {}, tmp_path, capsys)[0] == ["cheap"]
        with pytest.raises(SystemExit, match="nearest: 'cheap'"):
            gpu.main(["--plan", "--parts", "cheep"], some)


def test_with_nothing_to_run_nothing_is_written(tmp_path):
    one = part("one", "")
    (tmp_path / "ledger.json").write_text(json.dumps({"one": {"toy": row_of(one)["H100"]}}))
    argv = ["--toy", "--missing", "-o", str(tmp_path / "out")]
    assert gpu.main(argv, [one], tmp_path / "ledger.json", tmp_path / "work") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_one_sentence_and_exit_code_2(capsys):
    assert gpu.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_classes_of_devices():
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA GeForce RTX 4090"]
    assert [gpu.device_class(name) for name in names] == ["H100", "H200", "A100", "L40S", "GeForceRTX4090"]


def commands(scale):
    return {one.name: [parts.words_of(c, scale, "w")[1:] for c in one.commands] for one in parts.PARTS}


class TestTable:
    def test_the_first_visit_fits_its_minutes_with_every_limit_used_up(self, tmp_path, capsys):
        names, _ = planned(["--first"], parts.PARTS, {}, tmp_path, capsys)
        assert names == ["env", "tests", "attention", "decode_step", "head", "step", "smoke"]

    def test_every_source_is_there(self):
        missing = {glob for one in parts.PARTS for glob in one.sources if not list(parts.ROOT.glob(glob))}
        assert not missing

    def test_the_tests_are_those_that_hold_some_for_a_gpu(self):
        found = parts.gpu_tests()
        assert {f"tests/test_{x}.py" for x in ("fused", "decode_attention", "gpu_rollouts", "eager")} <= set(found)
        assert not {f"tests/test_{x}.py" for x in ("bench_gpu", "config", "train")} & set(found)

    def test_a_toy_run_differs_from_a_real_one_in_its_sizes_and_its_device_alone(self):
        real, toy = commands("real"), commands("toy")
        assert set(parts.SCALES["toy"]) == set(parts.SCALES["real"])
        options = lambda words: [word for word in words if word.startswith("--")]
        for name in set(real) - {"gsm8k"}:
            assert list(map(options, real[name])) == list(map(options, toy[name])), name
            assert not any("cuda" in words for words in toy[name]) and not any("cpu" in words for words in real[name])

    @pytest.mark.parametrize("scale", parts.SCALES)
    def test_every_table_is_one_that_bench_run_makes(self, scale):
        for words in (words for some in commands(scale).values() for words in some if words[1] == "bench.run"):
            args = parse(words[2:])
            for name in args.names:
                assert sizes_of(BENCHES[name], args.sizes, args.device), words

    def test_a_table_of_kernels_has_all_sizes(self):
        for one in parts.TABLES:
            (words,) = commands("real")[one.name]
            args = parse(words[2:])
            assert sizes_of(BENCHES[one.name], args.sizes, "cuda") == BENCHES[one.name].sizes["cuda"]

    @pytest.mark.parametrize("scale", parts.SCALES)
    def test_every_setting_is_one_that_the_trainer_takes(self, scale):
        found = [words[words.index("train.py") + 1 :] for some in commands(scale).values() for words in some
                 if "train.py" in words]  # fmt: skip
        assert len(found) == 12
        for words in found:
            load_config(words)


def in_this_process(self, words, log, deadline, beat):
    """In place of Runner.run, for `python -m MODULE ...`: a process of its own imports for longer than it works."""
    program, m, module, *arguments = words
    assert (program, m) == (sys.executable, "-m")
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        return importlib.import_module(module).main(arguments) or 0


def test_a_dry_visit_at_toy_size_ends_in_the_readme(tmp_path, monkeypatch, capsys):
    """The parts of a first visit that measure; smoke is what test_train does, the tests are those around."""
    monkeypatch.setattr(visit.Runner, "run", in_this_process)
    names = ["env", "attention", "decode_step", "head", "step"]
    out, work = tmp_path / "out", tmp_path / "work"
    code = gpu.main(["--toy", "--parts", *names, "-o", str(out)], path=tmp_path / "none", work=work)
    assert code == 0, capsys.readouterr().out
    (path,) = out.glob("toy-*.json")
    left = json.loads(path.read_text())
    assert left["provenance"]["kind"] == "cpu" and left["provenance"]["device_class"] == "toy"
    assert {row["part"]: row["status"] for row in left["parts"]} == dict.fromkeys(names, "ok")
    assert left["results"]["env"]["roofs"]["bf16"]["copy"] > 1e6
    assert {case["bench"] for case in left["cases"]} == {
        "attention", "decode_step", "linear_clipped_surrogate", "logprob", "step",
    }  # fmt: skip
    gpu.main(["--toy", "--missing", "--plan"], path=out / "ledger.json", work=work)
    said = capsys.readouterr().out
    assert all(f"left out: {name} (known" in said for name in names), said
    committed = tmp_path / "results"
    (committed / "gpu").mkdir(parents=True)
    left["provenance"] |= {"kind": "cuda", "device": "A GPU"}
    (committed / "gpu" / path.name).write_text(json.dumps(left))
    page = report.write_regions("<!-- bench:decode_step-cuda -->\n<!-- end -->", records.Results(committed))
    assert "A GPU" in page and "sampler" in page and "Not measured" not in page
