"""Fifteen minutes on a GPU, remembered: tests, tables and captures by what is not known yet.

    python -m bench.gpu [-o DIR] [--minutes 7] [--first | --missing | --parts NAME ...] [--plan] [--toy]

--first runs the parts of a first visit in their order. --missing runs those without a good result for this class of
device and the sources as they are: first what failed and has changed since, then by worth per second, as many as the
minutes hold. Neither: --first on a class of device that the ledger does not know, else --missing. --parts runs the
named ones. --plan prints what would run and runs nothing. --toy runs the same commands at a toy size on a CPU.
bench/parts.py is the table of parts, bench/visit.py says what DIR gets, bench/README.md how to spend a visit. Without a
git checkout, BENCH_COMMIT names the commit. Exit code: 1 when a part failed or ran out of time, 2 without a GPU.
"""

import argparse
import dataclasses
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from . import ledger
from .parts import PARTS, ROOT, key_of, pytest_command, words_of
from .run import known, provenance
from .visit import Visit, say

WORK = Path("runs/gpu")  # from the root
AGAIN = 20  # failed tests that are run again by name
TOY = "toy"
PATIENCE = 5  # how many times the seconds of a GPU a toy run may take


@dataclass
class Plan:
    """What runs and why, in its order: (part, its likely seconds, whether the minutes hold it even if all before it
    take theirs). Another one runs if by its turn they do. And what does not run, with the reason."""

    why: str
    queue: list = field(default_factory=list)
    left_out: list = field(default_factory=list)

    def fill(self, parts, rows, minutes):
        left = 60 * minutes
        for part in parts:
            about = ledger.estimate(part, rows[part.name])
            self.queue.append((part, about, about <= left))
            left -= about * (about <= left)
        return self


def device_class(name):
    """H100 of "NVIDIA H100 80GB HBM3": what timings are kept apart by."""
    model = re.search(r"\b[A-Z]+\d+[A-Z]*\b", name)
    return model[0] if model else re.sub(r"[^A-Za-z0-9]", "", name.removeprefix("NVIDIA"))


def with_failed_first(part, row):
    """The part, with the tests that failed last time before all others."""
    names = [shlex.quote(name).replace("{", "{{").replace("}", "}}") for name in row.get("failed", [])[:AGAIN]]
    return dataclasses.replace(part, again=(pytest_command(names),)) if names else part


def plan_first(parts, rows, minutes, kind):
    return Plan(f"a first visit to {kind}").fill([part for part in parts if part.first], rows, minutes)


def plan_missing(parts, rows, minutes, kind):
    plan, open_parts = Plan(f"what is missing on {kind}"), []
    keys = {part.name: key_of(part) for part in parts}
    known_good = {name for name, key in keys.items() if ledger.good(rows[name], key)}
    for part in parts:
        if part.name in known_good:
            plan.left_out.append((part, f"known: {rows[part.name]['file']}"))
        elif waits := [name for name in part.after if name not in known_good]:
            plan.left_out.append((part, f"waits for {', '.join(waits)}"))
        elif needs := [folder for folder in part.needs if not (ROOT / folder).is_dir()]:
            plan.left_out.append((part, f"needs {', '.join(needs)}"))
        else:
            open_parts.append(with_failed_first(part, rows[part.name]))

    def order(part):
        row = rows[part.name]
        unchanged = row.get("key") == keys[part.name]  # it was tried as it is, and is not good
        return unchanged, not row.get("failed"), -part.worth / ledger.estimate(part, row)

    return plan.fill(sorted(open_parts, key=order), rows, minutes)


def make_plan(args, kind, parts, record):
    """ValueError: a part that is not there."""
    rows = {part.name: ledger.find(record, part.name, kind) for part in parts}
    if args.parts:
        names = [known("part", name, list(rows)) for name in args.parts]
        chosen = [(part, ledger.estimate(part, rows[part.name]), True) for part in parts if part.name in names]
        return Plan("the parts named", chosen)
    first = args.first or not (args.missing or ledger.seen(record, kind))
    return (plan_first if first else plan_missing)(parts, rows, args.minutes, kind)


def commands_of(part, scale, work):
    lists = [words_of(command, scale, work) for command in (*part.again, *part.commands)]
    return [shlex.join("python" if word == sys.executable else word for word in words) for words in lists]


def describe(plan, minutes, commands):
    """The plan to read; commands(part) -> lines."""
    sure = [(part, about) for part, about, sure in plan.queue if sure]
    lines, most = [], sum(part.limit_s for part, _ in sure)
    for part, about in sure:
        lines.append(f"{part.name}: about {about:.0f} s, at most {part.limit_s:.0f} s: {part.learns}")
        lines += [f"    {command}" for command in commands(part)]
    total = sum(about for _, about in sure)
    lines.append(f"{plan.why}: {len(sure)} parts, about {total:.0f} s of {60 * minutes:.0f} s, at most {most:.0f} s")
    lines += [f"if time is left: {part.name}, about {about:.0f} s" for part, about, sure in plan.queue if not sure]
    return "\n".join([*lines, *[f"left out: {part.name} ({reason})" for part, reason in plan.left_out]])


def begin(args, kind, record, work, argv):
    """-> the visit, its folder of work empty."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    about = provenance("cpu" if kind == TOY else "cuda", None, argv, "bench.gpu") | {"device_class": kind}
    if not about["commit"]:
        say("The commit is not known here: name it in BENCH_COMMIT, or the results will not say what they are of.")
    return Visit(args.out, work, args.scale, f"{kind}-{datetime.now(UTC):%Y%m%dT%H%M%S}", about, record)


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "runs" / "gpu-results")
    parser.add_argument("--minutes", type=float, default=7.0)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--first", action="store_true", help="the parts of a first visit")
    which.add_argument("--missing", action="store_true", help="the parts without a good result")
    which.add_argument("--parts", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--plan", action="store_true", help="print what would run")
    parser.add_argument("--device-class", metavar="NAME", help="plan for this one, as H100, without one here")
    toy = dict(dest="scale", action="store_const", const=TOY, default="real", help="at a toy size on the CPU")
    parser.add_argument("--toy", **toy)
    args = parser.parse_args(argv)
    if args.device_class and not args.plan:
        parser.error("--device-class is for --plan")
    return args


def kind_of_device(args):
    """The class of device to plan or run for; None: there is none to run on."""
    if args.scale == TOY:
        return TOY
    if args.device_class:
        return args.device_class
    if torch.cuda.is_available():
        return device_class(torch.cuda.get_device_name(0))
    return "H100" if args.plan else None


def main(argv, parts=PARTS, path=ledger.LEDGER, work=WORK):
    sys.stdout.reconfigure(line_buffering=True)
    args, record = parse(argv), ledger.read(path)
    kind = kind_of_device(args)
    if not kind:
        print("error: there is no CUDA device here; --plan prints what would be run, --toy tries it.", file=sys.stderr)
        return 2
    if kind == TOY:
        args.minutes *= PATIENCE
        parts = [dataclasses.replace(part, limit_s=PATIENCE * part.limit_s) for part in parts]
    try:
        plan = make_plan(args, kind, parts, record)
    except ValueError as error:
        sys.exit(f"error: {error}")
    say(describe(plan, args.minutes, lambda part: commands_of(part, args.scale, work) if args.plan else []))
    if args.plan or not plan.queue:
        return 0
    return begin(args, kind, record, work, argv).run(plan.queue, 60 * args.minutes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
