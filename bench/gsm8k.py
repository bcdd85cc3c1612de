"""Does it learn with real weights? Accuracy on GSM8K before and after some minutes of GRPO.

    python -m bench.gsm8k [--minutes 9] [--model DIR] [--data DIR] [-o DIR] [--json FILE] [--toy] [-- SETTINGS]

--minutes is for all of it: what two starts of train.py and two evaluations leave is trained. SIGTERM ends the training
at a step boundary, and a second start goes on from there: it evaluates the same problems again, exports, and draws
curves.png. DIR (runs/gsm8k) gets train.py's folder, grpo/; FILE (gsm8k.json there) is written anew every few seconds
with all that is known, the curve of the training included, so that a kill loses nothing. --data holds train.jsonl and
test.jsonl. --toy is the same on problems made here with the embedded model, untrained, and stops after a step.
SETTINGS go to train.py behind ours. Exit code 2 where the model or the data is not there.
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

from engine.log import read_rows

from .run import provenance
from .table import remarks, render, seconds, share, shown
from .weights import ORIGIN

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "gsm8k"
TRAIN = (sys.executable, "train.py")
NAME = "grpo"
LOOK_SECONDS, SAVE_SECONDS = 0.2, 5.0
SPARE_SECONDS = 20.0  # for the step under way, the checkpoint and the export
TARGET = 0.10

SETTINGS = {
    "algo": "grpo",
    "task": "gsm8k",
    # what Qwen2.5 was tuned with; of a tagged answer it knows nothing, and would spend its steps on the tags
    "system_prompt": r"Please reason step by step, and put your final answer within \boxed{}.",
    "rewards": "answer",
    "eval_size": 512,  # a standard error of about 2 points
    "max_prompt_tokens": 256,  # the longest has 240
    "max_new_tokens": 320,
    # 256 answers a step, so that a step takes a few seconds and 8 minutes about a hundred; 16 to a prompt, since the
    # model is right one time in six: of 16 answers one or more are right for most prompts, of 8 for half of them
    "prompts_per_step": 16,
    "group_size": 16,
    "rollout_batch": 256,
    # Adam moves a weight by about lr an update: published runs gain 20 points in some 400 updates at 1e-6
    "lr": 4e-6,
    "warmup_steps": 5,
    "beta": 0.0,  # a hundred steps do not lead far; without a reference equal groups cost nothing
    "lag": 0,  # until a GPU has shown what lag 1 gains
    "micro_batch": 64,  # four forwards a step, whose launches take the host longer than a GPU computes at 16
    "grad_sync": "last",
    "share_prompts": "false",  # a prompt is a quarter of a row; the mask would cost the attention its fast kernel
    "steps": 10_000,  # the clock ends it
    "grace_seconds": 60,  # 6 GB of checkpoint
    "num_samples": 4,
    "tensorboard": "false",
}
TOY = {
    "system_prompt": "", "rewards": "bench/alternate.py:alternate", "eval_size": 16, "max_prompt_tokens": 64,
    "max_new_tokens": 16, "prompts_per_step": 2, "group_size": 4, "rollout_batch": 16, "micro_batch": 8, "threads": 1,
}  # fmt: skip
CURVE = ("step", "accuracy", "reward", "length", "at_limit", "entropy", "grad_norm", "mismatch", "tokens_per_second",
         "seconds/rollout", "seconds/update", "seconds/step")  # fmt: skip
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
    """(a model, the data) of the same form as the real ones."""
    from engine import model
    from engine.data import load_task

    folder.mkdir(parents=True, exist_ok=True)
    lm = model.load_model("tiny", 0, torch.float32)
    model.export_model(lm, model.load_tokenizer("tiny"), folder / "model")
    for split in ("train", "test"):
        items = load_task("arithmetic", split, system_prompt="", limit=32)
        rows = [{"question": item.row["question"], "answer": f"{item.trace}\n#### {item.answer}"} for item in items]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", folder


def launch(settings, more, end, folder, save):
    """Runs train.py and asks it to stop when what is left until `end` is for the rest -> its exit code."""
    words = [*TRAIN, *(f"--{key}={value}" for key, value in settings.items()), *more]
    start = saved = time.monotonic()
    child, asked, ready = subprocess.Popen(words, cwd=ROOT), False, 0.0
    try:
        while child.poll() is None:
            time.sleep(LOOK_SECONDS)
            now, (exams, steps) = time.monotonic(), read_progress(folder)
            ready = ready or (now - start if exams else 0.0)
            if steps and not asked and now > end - 1.2 * ready - SPARE_SECONDS:
                child.send_signal(signal.SIGTERM)
                asked = True
            if now > saved + SAVE_SECONDS:
                save()
                saved = now
    finally:
        child.kill()
        child.wait()
    return child.returncode


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
        "greedy": greedy["accuracy"], "sampled": sampled["accuracy"], "problems": greedy["problems"],
        "length": greedy["length"], "at_limit": greedy["at_limit"], "steps": step,
        "seconds": sum(row["seconds/step"] for row in steps if row["step"] < step),
    }  # fmt: skip


def add_gain(before, after):
    """Greedy accuracy won, with the standard error of a difference of two shares."""
    if before["status"] == after["status"] == "ok":
        after["gain"] = after["greedy"] - before["greedy"]
        shares = [(row["greedy"], row["problems"]) for row in (before, after)]
        after["gain_error"] = math.sqrt(sum(p * (1 - p) / n for p, n in shares))
        reached = "reached" if after["gain"] >= TARGET else "missed"
        after["note"] = f"standard error {after['gain_error']:.1%}, target {TARGET:+.0%} {reached}"


def case_of(model, settings, minutes, folder, why):
    """The case as bench.report reads them, with the settings and the curve besides."""
    exams, steps = read_progress(folder)
    last = max((row["step"] for row in exams), default=0)
    before = exam_row("before", 0, exams, steps, why)
    after = exam_row("after", last, exams if last else [], steps, f"{why}, {len(steps)} steps")
    name, before["note"] = origin_of(model)
    add_gain(before, after)
    return {
        "bench": "gsm8k",
        "size": {"model": name, "problems": settings["eval_size"], "minutes": minutes},
        "dtype": "bf16" if torch.cuda.is_available() else "fp32",
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


def run(model, data, out, minutes, settings, more, save):
    """Trains and evaluates; save(case) as it goes -> the case."""
    end, folder = time.monotonic() + 60 * minutes, out / NAME
    files = {"train_data": data / "train.jsonl", "test_data": data / "test.jsonl"}
    settings = settings | {"model": model, "out": out, "name": NAME} | files

    def note(why):
        case = case_of(model, settings, minutes, folder, why)
        save(case)
        return case

    code = launch(settings, more, end, folder, lambda: note("still training"))
    _, steps = read_progress(folder)
    if code == 0 and steps and not (folder / "summary.json").exists():
        rest = [*more, "--resume=auto", f"--steps={steps[-1]['step'] + 1}"]
        code = launch(settings, rest, math.inf, folder, lambda: note("not evaluated again yet"))
    return note(f"train.py ended with code {code}")


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


def main(argv):
    args = parse(argv)
    made = make_toy(args.out / "toy") if args.toy else (RUN / "model", RUN / "data")
    model, data = args.model or made[0], args.data or made[1]
    for path in (model / "config.json", data / "train.jsonl", data / "test.jsonl"):
        if not path.exists():
            print(f"error: there is no {path}; bench/README.md says how it is made.", file=sys.stderr)
            return 2
    minutes = (0.0 if args.toy else 9.0) if args.minutes is None else args.minutes
    file = args.json or args.out / "gsm8k.json"
    about = provenance("cuda" if torch.cuda.is_available() else "cpu", None, argv, "bench.gsm8k")

    def save(case):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".partial")
        aside.write_text(json.dumps({"provenance": about, "cases": [case]}, indent=1) + "\n")
        aside.rename(file)

    case = run(model, data, args.out, minutes, SETTINGS | (TOY if args.toy else {}), args.settings, save)
    print(render("gsm8k " + " ".join(map(str, case["size"].values())), case["rows"], COLUMNS))
    print(json.dumps({"provenance": about, "cases": [case]}))
    return int(any(row["status"] != "ok" for row in case["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
