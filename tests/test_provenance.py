"""What a run says of itself: the line it was started with, and the code and packages it ran."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import provenance

ROOT = Path(__file__).resolve().parents[1]
SAY = r"import sys; from engine import provenance; sys.stdout.write(provenance.{} + '\n')"  # whole, beside other ranks


def test_programs_that_are_missing_or_fail_say_nothing():
    assert provenance.shell("a_program_nobody_has") is None
    assert provenance.shell(sys.executable, "-c", "raise SystemExit(1)") is None
    assert provenance.shell(sys.executable, "-c", "print(7)") == "7"


def test_packages_have_the_versions_that_run():
    about = json.loads(json.dumps(provenance.describe(["torch", "a-package-nobody-has"])))
    assert about["versions"] == {"torch": torch.__version__, "a-package-nobody-has": None}
    assert about["python"] == sys.version.split()[0] and about["command"] == provenance.command_line()


@pytest.mark.parametrize(
    "given", [["--name", "it's", "--stop", "\n"], ["--resume", "auto"], ["--resume", "auto", "--x"]]
)
def test_the_line_of_a_program_starts_it_again(tmp_path, given):
    (tmp_path / "p.py").write_text(SAY.format("resume_line()"))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(tmp_path / "p.py"), *given]
    line = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout[:-1]
    assert shlex.split(line) == ["python", *words[1:], *([] if "auto" in given else ["--resume", "auto"])]


def test_torchruns_ranks_name_torchrun(tmp_path):
    (tmp_path / "p.py").write_text(SAY.format("resume_line('a b')"))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, "p.py", "--x"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["torchrun --nproc_per_node=2 p.py --x --resume 'a b'"] * 2


def test_the_commit_is_that_of_a_checkout_which_holds_this_code(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    copy = tmp_path / "engine" / "provenance.py"
    copy.parent.mkdir()
    shutil.copy(provenance.HERE, copy)
    monkeypatch.setattr(provenance, "HERE", copy)
    nothing = {"commit": None, "uncommitted": False}
    assert provenance.describe_checkout() == nothing
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "not of this code")
    assert provenance.describe_checkout() == nothing
    git("add", ".")
    git("commit", "-q", "-m", "of this code")
    assert provenance.describe_checkout() == {"commit": git("rev-parse", "HEAD"), "uncommitted": False}
    copy.write_text("changed")
    assert provenance.describe_checkout() == {"commit": git("rev-parse", "HEAD"), "uncommitted": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.describe_checkout() == nothing
