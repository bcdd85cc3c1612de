"""Does it learn with real weights? Accuracy on GSM8K before and after some minutes of GRPO.

    python -m bench.gsm8k [--minutes 9] [--model DIR] [--data DIR] [-o DIR] [--json FILE] [--toy] [-- SETTINGS]

--minutes is for all of it: what two starts of train.py and two evaluations leave is trained. SIGTERM ends the training
at a step boundary, and a second start goes on from there: it evaluates the same problems again, exports, and draws
curves.png. The folder after -o (runs/gsm8k) gets train.py's own, grpo, and gsm8k.json, which is written anew every few
seconds with all that is known, the curve of the training included, so that a kill loses nothing. Where they are not
named, the model and the data (train.jsonl, test.jsonl) are runs/gsm8k/model and data. --toy is the same with the
embedded model, untrained, on problems made here, and stops after a step. SETTINGS go to train.py behind ours. Exit code
2 where the model or the data is not there.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine.config import parse_args
from engine.errors import UserError
from engine.folder import holds_run
from engine.log import read_rows

from .run import provenance
from .table import remarks, render, seconds, share, shown
from .weights import ORIGIN

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "gsm8k"
TRAIN = (sys.executable, "train.py")
LOOK_SECONDS, SAVE_SECONDS = 0.2, 5.0
AGAIN, SPARE_SECONDS = 1.2, 20.0
"""Kept for the end: so many times what the first start and evaluation took, and for step, checkpoint and export."""
TARGET = 0.10

SETTINGS = {
    "algo": "grpo",
    "task": "gsm8k",
    # what Qwen2.5 was tuned with; of a tagged answer it knows nothing, and would spend its steps on the tags
    "system_prompt": r"Please reason step by step, and put your final answer within \boxed{}.",
    "rewards": "answer",
    "eval_size": 512,  # a standard error of about 2 points
    "max_prompt_tokens": 256,  # the longest has 240
    "max_new_tokens": 384,  # at 256 half of the untrained model's answers are cut
    # 256 answers a step: a step takes a few seconds, 8 minutes hold about a hundred. 16 to a prompt: right one time in
    # six, the model has something to compare in more groups of 16 than of 8
    "prompts_per_step": 16,
    "group_size": 16,
    "rollout_batch": 256,
    # public recipes for GSM8K have 1e-6 (verl) to 1.7e-5 (AReaL); Adam moves a weight by about lr an update, and there
    # are but a hundred of them
    "lr": 4e-6,
    "warmup_steps": 5,
    "beta": 0.0,  # a hundred steps do not lead far; without a reference equal groups cost nothing
    "lag": 0,  # until a GPU has shown what lag 1 gains
    # at most ten forwards a step; at half of it their launches take the host longer than a GPU computes
    "micro_tokens": 16384,
    "share_prompts": "false",  # until a GPU has shown what sharing gains
    "steps": 10_000,  # the clock ends it
    "grace_seconds": 60,  # 6 GB of checkpoint
    "num_samples": 4,
    "tensorboard": "false",
}
TOY = {
    "system_prompt": "",
    "rewards": "bench/alternate.py:alternate",
    "eval_size": 8,
    "max_prompt_tokens": 64,
    "max_new_tokens": 8,
    "prompts_per_step": 2,
    "group_size": 4,
    "rollout_batch": 16,
    "micro_tokens": 512,
    "threads": 1,
}
CURVE = """
    step accuracy reward length at_limit entropy grad_norm mismatch tokens_per_second
    seconds/rollout seconds/update seconds/step
""".split()
COLUMNS = (
    ("", shown("rival")),
    ("greedy", shown("greedy", share)),
    ("sampled", shown("sampled", share)),
    ("problems", shown("problems")),
    ("tokens", shown("length", "{:.0f}".format)),
    ("at limit", shown("at_limit", share)),
    ("steps", shown("steps")),
    ("time", shown("seconds", seconds)),
    ("gain", shown("gain", "{:+.1%}".format)),
    ("", remarks),
)


def make_toy(folder):
    """A model and data of the same form as the real ones, in a new folder."""
    from engine import model
    from engine.data import load_task

    (folder / "data").mkdir(parents=True)
    model.export_model(model.load_model("tiny", 0, torch.float32), model.load_tokenizer("tiny"), folder / "model")
    for split in ("train", "test"):
        items = load_task("arithmetic", split, system_prompt="", limit=32)
        rows = [{"question": item.row["question"], "answer": f"{item.trace}\n#### {item.answer}"} for item in items]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def launch(settings, end, folder, save):
    """Runs train.py and asks it to stop when what is left until `end` is for the rest -> its exit code."""
    words = [*TRAIN, *(word for key, value in settings.items() for word in words_of(key, value))]
    start = saved = time.monotonic()
    child, asked, ready = subprocess.Popen(words, cwd=ROOT), False, 0.0
    try:
        while child.poll() is None:
            time.sleep(LOOK_SECONDS)
            now, (exams, steps) = time.monotonic(), read_progress(folder)
            ready = ready or (now - start if exams else 0.0)
            if steps and not asked and now > end - AGAIN * ready - SPARE_SECONDS:
                child.send_signal(signal.SIGTERM)
                asked = True
            if now > saved + SAVE_SECONDS:
                save()
                saved = now
    finally:
        child.kill()
        child.wait()
    return child.returncode


def words_of(key, value):
    return [f"--{key}", *map(str, value if isinstance(value, list) else [value])]


def read_progress(folder):
    """(evaluations, steps) that train.py has written down."""
    rows = read_rows(folder / "metrics.jsonl")
    return [row for row in rows if "eval" in row], [row for row in rows if "eval" not in row]


def exam_row(rival, step, exams, steps, why):
    """What the evaluation before `step` found; without one the row says why."""
    found = {row["eval"]: row for row in exams if row["step"] == step}
    row = {"rival": rival, "note": "", "status": "ok", "why": ""}
    if len(found) < 2:
        return row | {"status": "error", "why": why}
    greedy, sampled = found["greedy"], found["sampled"]
    return row | {
        "greedy": greedy["accuracy"],
        "sampled": sampled["accuracy"],
        "problems": greedy["problems"],
        "length": greedy["length"],
        "at_limit": greedy["at_limit"],
        "steps": step,
        "seconds": sum(row["seconds/step"] for row in steps if row["step"] < step),
    }


def add_gain(before, after):
    """Greedy accuracy won, with the standard error of a difference of two shares."""
    if before["status"] == after["status"] == "ok":
        after["gain"] = after["greedy"] - before["greedy"]
        shares = [(row["greedy"], row["problems"]) for row in (before, after)]
        after["gain_error"] = math.sqrt(sum(p * (1 - p) / n for p, n in shares))
        reached = "reached" if after["gain"] >= TARGET else "missed"
        after["note"] = f"standard error {after['gain_error']:.1%}, target {TARGET:+.0%} {reached}"


def case_of(settings, minutes, folder, why):
    """The case as bench.report reads them, with the settings and the curve besides."""
    exams, steps = read_progress(folder)
    last = max((row["step"] for row in exams), default=0)
    before = exam_row("before", 0, exams, steps, why)
    after = exam_row("after", last, exams if last else [], steps, f"{why}, {len(steps)} steps")
    name, before["note"] = origin_of(settings["model"])
    add_gain(before, after)
    return {
        "bench": "gsm8k",
        "size": {"model": name, "problems": int(settings["eval_size"]), "minutes": minutes},
        "dtype": "bf16" if kind() == "cuda" else "fp32",
        "rows": [before, after],
        "settings": {key: value for key, value in settings.items() if not isinstance(value, Path)},
        "curve": [{key: row[key] for key in CURVE if key in row} for row in steps],
    }


def origin_of(model):
    """(name of the weights, what to say of them)."""
    path = model / ORIGIN
    if not path.exists():
        return model.name, ""
    origin = json.loads(path.read_text())
    kinds = ", ".join(f"{count} {kind}" for kind, count in origin["tensors"].items())
    return Path(origin["file"]).stem, f"weights were quantised and expanded again (tensors: {kinds})"


def run(settings, minutes, folder, save):
    """Trains in `folder` and evaluates; save(case) as it goes -> train.py's exit code."""
    end = time.monotonic() + 60 * minutes
    note = lambda why: save(case_of(settings, minutes, folder, why))
    code = launch(settings, end, folder, lambda: note("still training"))
    _, steps = read_progress(folder)
    if code == 0 and steps and not (folder / "summary.json").exists():
        rest = settings | {"resume": "auto", "steps": steps[-1]["step"] + 1}
        code = launch(rest, math.inf, folder, lambda: note("not evaluated again yet"))
    note(f"train.py ended with code {code}")
    return code


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m bench.gsm8k", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="for all of it; 9, or 0 with --toy")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; runs/gsm8k/model")
    parser.add_argument("--data", type=Path, help="a folder with train.jsonl and test.jsonl; runs/gsm8k/data")
    parser.add_argument("-o", "--out", type=Path, default=RUN)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="SETTINGS", help="behind --, for train.py")
    return parser.parse_args(argv)


def settings_of(args, folder, made):
    """All that train.py is told; `made` holds the model and data where none are named."""
    model, data = args.model or made / "model", args.data or made / "data"
    files = {"model": model, "train_data": data / "train.jsonl", "test_data": data / "test.jsonl"}
    for path in (model / "config.json", files["train_data"], files["test_data"]):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}; bench/README.md says how it is made")
    _, own = parse_args(args.settings)
    return SETTINGS | (TOY if args.toy else {}) | own | files | {"out": folder.parent, "name": folder.name}


def main(argv):
    args = parse(argv)
    folder = args.out / ("toy" if args.toy else "grpo")
    made = args.out / "toy-start" if args.toy else RUN
    if holds_run(folder) or args.toy and made.exists():
        sys.exit(f"error: {args.out} holds a run already; choose another -o.")
    if args.toy:
        make_toy(made)
    try:
        settings = settings_of(args, folder, made)
    except FileNotFoundError as error:
        print(f"error: {error}.", file=sys.stderr)
        return 2
    except UserError as error:
        sys.exit(f"error: {error}")
    minutes = (0.0 if args.toy else 9.0) if args.minutes is None else args.minutes
    file = args.json or args.out / "gsm8k.json"
    results = {"provenance": provenance(kind(), None, argv, "bench.gsm8k"), "cases": []}

    def save(case):
        results["cases"] = [case]
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.partial")
        aside.write_text(json.dumps(results, indent=1) + "\n")
        aside.rename(file)

    code = run(settings, minutes, folder, save)
    (case,) = results["cases"]
    print(render("gsm8k " + " ".join(map(str, case["size"].values())), case["rows"], COLUMNS))
    print(json.dumps(results))
    return int(code != 0 or any(row["status"] != "ok" for row in case["rows"]))


def kind():
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped by a signal"))  # train.py is not left behind
    sys.exit(main(sys.argv[1:]))
