"""A visit: runs parts, and keeps four files in a folder up to date, so that whatever ends it finds them written.

    CLASS-TIME.json  {"provenance", "parts", "cases", "results"}: a row per part, the cases of bench.run with the name
                     of their part, and what other JSON the parts left, by its file's name
    ledger.json      the ledger it began with, and this visit's rows
    summary.md       the parts to read, with the ends of the logs of those that went wrong
    logs.tar.gz      logs, curves, captures and their reports; the largest files stay out until it is small enough

A part's status is ok, failed, timed out, absent (a tool or file it needs), left out (no time), or running: of a part
under way, and of one that was when the visit was killed.
"""

import json
import os
import re
import signal
import subprocess
import tarfile
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from time import monotonic

from . import ledger
from .parts import ABSENT, ROOT, SAYS_ABSENT, key_of, words_of
from .report import markdown
from .table import seconds

ARCHIVE_BYTES = 15 << 20
BEAT = 15.0  # seconds after which the files tell more of the part under way
LEAST = 5.0  # seconds below which a part is not begun
TAIL = 30  # lines
NO_SUCH_TEST = (4, 5)  # exit codes of pytest
BAD = ("failed", "timed out", "running")
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
FAILED_TEST = re.compile(r"(?:\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (.+)|(\S.*::.*?) (?:FAILED|ERROR) +\[ *\d+%\])")
say = partial(print, flush=True)


def log_lines(path):
    """What a part said, without JSON and lines without a word."""
    lines = path.read_text(errors="replace").replace(f"{ROOT}/", "").splitlines()
    return [line.rstrip()[:200] for line in lines if re.search(r"\w", line) and not line.startswith("{")]


def failed_tests(lines):
    """The names of tests that failed or could not be set up, from lines of `pytest -v`, with or without xdist."""
    found = [match for line in lines if (match := FAILED_TEST.fullmatch(line))]
    return list(dict.fromkeys(match[1] or match[2] for match in found))


def complaint(lines):
    """The lines that say what went wrong: pytest's own summary where it came to one, else the last."""
    starts = [i for i, line in enumerate(lines) if "short test summary info" in line]
    return lines[starts[-1] :][:TAIL] if starts else [*failed_tests(lines)[:TAIL], *lines[-TAIL:]]


def troubles(cases):
    """-> (what went wrong with any rival, whether it is a failure: of one of ours, or of a whole case)."""
    broken = [(c, row) for c in cases for row in c["rows"] if row["status"] in ("wrong", "error", "out of memory")]
    lines = [f"{c['bench']} {row['rival']}: {row['status']}, {row['why']}" for c, row in broken]
    ours = any(row["rival"].startswith("ours") and row["status"] != "out of memory" for _, row in broken)
    return lines, ours or any(all(row["status"] != "ok" for row in c["rows"]) for c, _ in broken)


def write_aside(path, text):
    aside = path.with_name(path.name + ".new")
    aside.write_text(text)
    os.replace(aside, path)


def archive(work, path, left_out):
    """Tars what is wanted of `work`; the names of files that have to stay out join the set `left_out`."""
    files = {str(file.relative_to(work)): file for file in work.rglob("*") if file.is_file()}
    kept = [name for name in files if wanted(Path(name)) and name not in left_out]
    kept.sort(key=lambda name: files[name].stat().st_size)
    aside = path.with_name(path.name + ".new")
    while True:
        with tarfile.open(aside, "w:gz") as tar:
            for name in kept:
                tar.add(files[name], f"gpu/{name}")
        if aside.stat().st_size <= ARCHIVE_BYTES:
            return os.replace(aside, path)
        left_out.add(kept.pop())


def wanted(path):
    return path.parts[0] == "captures" or path.suffix in (".log", ".xml", ".jsonl", ".png")


class Runner:
    """Runs commands at the root, one at a time; of its process group nothing stays. A SIGTERM or a SIGINT ends the one
    under way, and none is begun after it."""

    def __init__(self):
        self.child, self.stopped = None, False

    @contextmanager
    def listening(self):
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, number, frame):
        self.stopped = True
        self.kill()

    def kill(self):
        with suppress(ProcessLookupError, AttributeError):
            os.killpg(self.child.pid, signal.SIGKILL)

    def run(self, words, log, deadline, beat):
        """-> its exit code, or None when the deadline or a signal came; calls beat() now and then."""
        env = {**QUIET, **os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self.child = subprocess.Popen(words, cwd=ROOT, env=env, process_group=0, **streams)
        try:
            while not self.stopped and (left := deadline - monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    code = self.child.wait(min(left, BEAT))
                    return None if self.stopped else code
                beat()
            return None
        finally:
            self.kill()
            self.child.wait()


class Visit:
    """`work`: an empty folder for all that the parts make; `about`: the provenance, with "device_class"; `record`: the
    ledger to go on from."""

    def __init__(self, out, work, scale, name, about, record):
        self.out, self.work, self.scale, self.name, self.about, self.ledger = out, work, scale, name, about, record
        self.rows, self.tails, self.found, self.left_out = [], {}, {}, set()
        self.runner = Runner()
        out.mkdir(parents=True, exist_ok=True)

    def run(self, queue, most_seconds):
        """queue: (part, its likely seconds, whether it runs where there is less time, too) -> 1 when a part failed or
        timed out, else 0."""
        end = monotonic() + most_seconds
        with self.runner.listening():
            for part, about, sure in queue:
                row = {"part": part.name, "status": "left out", "seconds": 0.0, "said": "", "key": key_of(part)}
                left = end - monotonic()
                runs = left >= (LEAST if sure else about) and not self.runner.stopped
                if runs or sure:
                    self.rows.append(row)
                if runs:
                    say(f"{part.name}: at most {min(part.limit_s, left):.0f} s")
                    self.run_part(part, row, min(part.limit_s, left))
            self.write()
        say(self.table())
        return int(self.runner.stopped or any(row["status"] in BAD for row in self.rows))

    def run_part(self, part, row, most_seconds):
        """Fills in its row, keeps it, and prints what went wrong."""
        start, row["status"] = monotonic(), "running"

        def beat():
            self.look(row, start)
            self.write()

        status = self.run_commands(part, start + most_seconds, beat)
        self.look(row, start)
        self.judge(row, status)
        self.keep(row)
        self.write()
        archive(self.work, self.out / "logs.tar.gz", self.left_out)
        say(f"{part.name}: {row['status']}, {row['seconds']:.0f} s, {row['said']}")
        for line in self.tails.get(part.name, []):
            say(f"    {line}")

    def run_commands(self, part, deadline, beat):
        """-> a status. What they print goes into the part's log."""
        status = "ok"
        with (self.work / f"{part.name}.log").open("w") as log:
            for command in (*part.again, *part.commands):
                words = words_of(command, self.scale, self.work)
                code = self.runner.run(words, log, deadline, beat)
                if code is None:
                    return "timed out"
                if code == ABSENT and any(word in SAYS_ABSENT for word in words[1:3]):
                    return "absent"
                if code and not (command in part.again and code in NO_SUCH_TEST):
                    status = "failed"
                    if not part.goes_on:
                        break
        return status

    def look(self, row, start):
        """What is known of the part under way: its time, its log, its JSON files."""
        lines = log_lines(self.work / f"{row['part']}.log")
        row["seconds"] = round(monotonic() - start, 1)
        row["said"] = " ".join(lines[-1].strip(" =").split())[:160] if lines else ""
        if failed := failed_tests(lines):
            row["failed"] = failed
        self.tails[row["part"]] = complaint(lines)
        for path in sorted(self.work.glob("*.json")):
            with suppress(ValueError):  # just being written: as it was
                owner = self.found.get(path.stem, (row["part"],))[0]
                self.found[path.stem] = owner, json.loads(path.read_text())

    def judge(self, row, status):
        """Beyond exit codes: rivals that went wrong are told of, and are a failure where they are ours."""
        lines, fatal = troubles([case for case in self.cases() if case["part"] == row["part"]])
        if status == "absent" and re.match(r"\S+: error: ", row["said"]):  # argparse leaves with the same code
            status = "failed"
        row["status"] = "failed" if status == "ok" and fatal else status
        self.tails[row["part"]] = lines[:TAIL] + self.tails[row["part"]] * (status in BAD)

    def keep(self, row):
        """Its row in the ledger."""
        versions = {name: self.about["versions"].get(name) for name in ("torch", "triton")}
        kept = {name: row[name] for name in ("key", "seconds", "status", "failed") if name in row}
        kept |= {"file": f"{self.name}.json", **versions, "commit": self.about["commit"]}
        ledger.record(self.ledger, row["part"], self.about["device_class"], kept)

    def cases(self):
        return [{"part": part, **case} for part, file in self.found.values() for case in file.get("cases", [])]

    def write(self):
        """All but the archive."""
        results = {stem: file for stem, (_, file) in self.found.items() if "cases" not in file}
        visit = {"provenance": self.about, "parts": self.rows, "cases": self.cases(), "results": results}
        write_aside(self.out / f"{self.name}.json", json.dumps(visit, indent=1) + "\n")
        write_aside(self.out / "ledger.json", json.dumps(self.ledger, indent=1, sort_keys=True) + "\n")
        write_aside(self.out / "summary.md", self.summary())

    def table(self):
        lines = [[row["part"], row["status"], seconds(row["seconds"]), row["said"]] for row in self.rows]
        return markdown(["part", "outcome", "time", "last line"], lines)

    def summary(self):
        about = self.about | {"versions": ", ".join(f"{name} {x}" for name, x in self.about["versions"].items() if x)}
        known = "\n".join(f"- {name}: {value}" for name, value in about.items() if value)
        ends = [
            f"## {row['part']}: {row['status']}\n\n```\n" + "\n".join(tail) + "\n```"
            for row in self.rows
            if (tail := self.tails.get(row["part"]))
        ]
        return "\n\n".join([f"# {self.name}", known, self.table(), *ends]) + "\n"
