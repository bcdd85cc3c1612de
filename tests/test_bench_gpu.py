"""The run on a GPU machine, with parts that stand for the real ones."""

import json
import sys
import tarfile
import time

import pytest
import torch

from bench import gpu

ABOUT = {"kind": "cuda", "device": "A GPU", "driver": "580.1", "commit": "c0ffee", "versions": {"torch": "2.13.0"}}


def part(name, code, minutes=1.0, **more):
    return gpu.Part(name, minutes, ([sys.executable, "-c", code],), **more)


def run(parts, folder, chosen=None, minutes=1.0):
    names = chosen or [one.name for one in parts]
    code = gpu.run(parts, names, folder / "out", folder / "work", minutes, ABOUT)
    summary = json.loads((folder / "out/cuda-summary.json").read_text())
    return code, {row["part"]: row for row in summary["parts"]}


HANGS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import pathlib, time; time.sleep(2); pathlib.Path('{path}').touch()"])
print("begun", flush=True)
time.sleep(60)
"""


def test_a_part_that_fails_or_hangs_loses_nobody_elses_results(tmp_path):
    alive, forks = tmp_path / "alive", HANGS.format(path=tmp_path / "alive")
    table = json.dumps({"provenance": ABOUT, "cases": [{"bench": "logprob"}]})
    writes = f"open({str(tmp_path / 'work/logprob.json')!r}, 'w').write({table!r}); print('3 cases')"
    code, rows = run([
        part("fails", "raise KeyError(7)"), part("hangs", forks, minutes=0.01), part("logprob", writes),
        part("absent", "", needs="a_program_nobody_has"),
    ], tmp_path)  # fmt: skip
    assert code == 1
    assert {name: row["status"] for name, row in rows.items()} == {
        "fails": "failed", "hangs": "timed out", "logprob": "ok", "absent": "absent",
    }  # fmt: skip
    assert rows["fails"]["said"] == "KeyError: 7" and rows["hangs"]["said"] == "begun"
    assert rows["logprob"]["said"] == "3 cases" and rows["hangs"]["seconds"] < 5
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["cuda-logs.tar.gz", "cuda-summary.json", "cuda-summary.md", "cuda.json"]
    assert json.loads((tmp_path / "out/cuda.json").read_text())["cases"] == [{"bench": "logprob"}]
    with tarfile.open(tmp_path / "out/cuda-logs.tar.gz") as tar:
        assert {"gpu/fails.log", "gpu/hangs.log", "gpu/logprob.log"} == set(tar.getnames())
    page = (tmp_path / "out/cuda-summary.md").read_text()
    assert "A GPU" in page and "580.1" in page and "| hangs | timed out |" in page
    time.sleep(2.2)
    assert not alive.exists(), "a process of the part that hung went on"


def test_all_well_is_exit_code_0_and_chosen_parts_keep_the_others(tmp_path):
    parts = [part("one", "print('first')"), part("two", "print('second')")]
    assert run(parts, tmp_path)[0] == 0
    code, rows = run([part("one", "print('again')"), parts[1]], tmp_path, ["one"])
    assert code == 0 and list(rows) == ["one", "two"]
    assert rows["one"]["said"] == "again" and rows["two"]["said"] == "second"


def test_time_that_is_up_is_a_row(tmp_path):
    code, rows = run([part("one", "print('first')")], tmp_path, minutes=0.0)
    assert code == 1 and rows["one"]["status"] == "timed out" and "no time" in rows["one"]["said"]


def test_the_largest_files_stay_out_of_a_full_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ARCHIVE_BYTES", 4096)
    (tmp_path / "capture-a").mkdir()
    (tmp_path / "capture-a/big").write_bytes(torch.randint(256, (1 << 16,), dtype=torch.uint8).numpy().tobytes())
    (tmp_path / "one.log").write_text("said")
    assert gpu.archive(tmp_path, tmp_path / "logs.tar.gz") == ["capture-a/big"]


def test_the_plan_is_printed_and_its_names_are_known(capsys):
    assert gpu.main(["--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert plan.index("tests, at most") < plan.index("logprob, at most") < plan.index("step, at most")
    assert "capture-eager" in plan and "report-kernels" in plan and "ncu-logprob" in plan and "trl" not in plan
    with pytest.raises(SystemExit, match="nearest: 'step'"):
        gpu.main(["--parts", "steps"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_one_sentence_and_exit_code_2(capsys):
    assert gpu.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
