"""GRPO steps of train.py beside those of TRL's GRPOTrainer, end to end on a CPU, in turns.

Both start from the same export, draw the same prompts in the same order, sample at temperature 1 up to the same limit
and the end of turn, score with the same reward functions and take one AdamW step in fp32; a learning rate too small to
change the policy keeps every step alike. A turn is a fresh process: its first steps are not counted. Before that, TRL's
first batch goes through both sides' loss and backward, and the gradient norms must agree.
  seconds    from the end of a step to the end of the next; median over the steps of all turns
  step rate  ours over TRL's: of each round the ratio of the two turns' medians, then the median over the rounds, with
             the least and the most; a load that comes and goes on a shared machine spoils one round, not the ratio
  rollout    prompts to ids, decoding;  update: the rest of the step without the rewards
  memory     the most resident bytes of the whole process, libraries included (ru_maxrss)
`alternate` is equal work: no group is without a spread, so nobody may leave rows out. `task` is the task's own reward.
The exports are bench.learning's, found in $BENCH_RUNS or runs/learning, and made first where they are missing.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch

from . import step
from .harness import LIMITS, Experiment, Wrong, outcome, summarize, take_turns
from .memory import ROOT
from .table import megabytes, remarks, seconds, share, shown, spread

WARMUP, COUNTED = 3, 8  # steps of a turn
LR = 1e-6
FORWARD = 64  # sequences a forward of TRL: its fastest of 16, 32, 64 and 128
MICRO_TOKENS = 2048  # a forward of ours
REWARDS = {"alternate": ["bench/alternate.py:alternate"], "task": ["answer", "format:0.2"]}
CLIP_HIGH = {"grpo": 0.2, "dapo": 0.28}
TRL_SETTINGS = {
    "bf16": False, "beta": 0.0, "num_iterations": 1, "scale_rewards": "group", "use_vllm": False, "temperature": 1.0,
    "gradient_checkpointing": False, "optim": "adamw_torch_fused", "adam_beta1": 0.9, "adam_beta2": 0.95,
    "max_grad_norm": 1.0, "learning_rate": LR, "lr_scheduler_type": "constant", "shuffle_dataset": False, "seed": 0,
    "dataloader_num_workers": 0, "dataloader_pin_memory": False, "log_completions": False, "logging_strategy": "no",
    "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip
OUR_SETTINGS = {
    "beta": 0, "lr": LR, "schedule": "constant", "warmup_steps": 0, "eval_size": 0, "tensorboard": False, "seed": 0,
    "num_samples": 0, "dynamic_sampling": False, "overlong_penalty": False, "device": "cpu", "name": "ours",
}  # fmt: skip


class Size(NamedTuple):
    """The loss, the reward, the policy (`sft`, or `grpo`: after RL), prompts a step, answers to each, tokens of one."""

    loss: str
    reward: str
    start: str
    prompts: int = 16
    answers: int = 8
    limit: int = 40


def find_export(start, threads):
    """The export of bench.learning's run from seed 0, made as train.py makes it when it is not there."""
    from engine.folder import have_run

    out = Path(os.environ.get("BENCH_RUNS", ROOT / "runs" / "learning"))
    name = {"sft": "sft-tiny-seed0", "grpo": "grpo-seed0"}[start]
    settings = {"algo": start, "seed": 0, "out": out, "name": name, "threads": threads, "tensorboard": False}
    have_run(out / name, lambda: spawn(["train.py", *options(settings), "--resume", "auto"], threads))
    return (out / name / "export").resolve()


def options(settings):
    listed = {key: value if isinstance(value, list) else [value] for key, value in settings.items()}
    return [word for key, values in listed.items() for word in (f"--{key}", *map(str, values))]


def spawn(arguments, threads):
    """Runs python at the root -> (its stdout, its most resident bytes); RuntimeError: the last line of a failed one."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **quiet}, stdout=out, stderr=err
        )  # fmt: skip
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if child.returncode:
            raise RuntimeError(([line for line in err.read().splitlines() if line.strip()] or ["no message"])[-1])
        return out.read(), usage.ru_maxrss * 1024


def train_steps(settings, threads):
    """Runs train.py -> (the metrics of its steps, the most bytes on its GPU, or resident without one)."""
    with tempfile.TemporaryDirectory() as folder:
        _, resident = spawn(["train.py", *options({**settings, "threads": threads, "out": folder})], threads)
        lines = (Path(folder) / settings["name"] / "metrics.jsonl").read_text().splitlines()
        summary = json.loads((Path(folder) / settings["name"] / "summary.json").read_text())
    peak = summary.get("peak_memory_bytes") or resident
    return [row for row in map(json.loads, lines) if "eval" not in row], peak


def our_turn(size, export, threads):
    """-> (a dict per step, resident bytes, settings)."""
    settings = {
        **OUR_SETTINGS, "algo": size.loss, "init_from": export, "rewards": REWARDS[size.reward],
        "steps": WARMUP + COUNTED, "prompts_per_step": size.prompts, "group_size": size.answers,
        "max_new_tokens": size.limit, "clip_high": CLIP_HIGH[size.loss], "micro_tokens": MICRO_TOKENS,
    }  # fmt: skip
    rows, peak = train_steps(settings, threads)
    steps = [  # rewards run beside the rollout
        {"seconds": row["wall_seconds"] - before["wall_seconds"], "rollout": row["seconds/rollout"],
         "reward": 0.0, "tokens": row["generated_tokens"], "zero_advantage": row["removed"]}
        for before, row in zip(rows, rows[1:])
    ]  # fmt: skip
    return steps, peak, {**settings, "threads": threads, "init_from": size.start}


def trl_turn(size, export, threads):
    out, peak = spawn(["-m", "bench.trl", "turn", json.dumps(size), str(export), str(threads)], threads)
    found = json.loads(out.splitlines()[-1])
    return found["steps"], peak, found["settings"]


SIDES = {"TRL": trl_turn, "ours": our_turn}


def turn(row, size, export, threads):
    """Seconds of the counted steps of one turn, whose other figures go into the row."""
    steps, peak, row["settings"] = SIDES[row["rival"]](size, export, threads)
    steps = steps[-COUNTED:]
    row["steps"] = row.get("steps", []) + steps
    row["turns"] = [*row.get("turns", []), median(step["seconds"] for step in steps)]
    row["peak_bytes"] = max(peak, row.get("peak_bytes", 0))
    if size.reward == "alternate" and any(step["zero_advantage"] for step in steps):
        raise Wrong("a group without a spread, where work is to be equal")
    return [step["seconds"] for step in steps]


def describe(row):
    """Medians over the counted steps, and the share of sequences in groups without a spread."""
    steps = row.pop("steps", [])
    if row["status"] != "ok" or not steps:
        return
    row["rollout"] = median(step["rollout"] for step in steps)
    row["update"] = median(step["seconds"] - step["rollout"] - step["reward"] for step in steps)
    row["tokens_per_second"] = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    row["zero_advantage"] = sum(step["zero_advantage"] for step in steps) / len(steps)
    row["num_steps"] = len(steps)


def compare_turns(ours, theirs):
    """The ratios of the step rates, a round each, into our row; the first of both sides' turns is the first round."""
    rates = [b / a for a, b in zip(ours.get("turns", []), theirs.get("turns", []))]
    if rates:
        ours["rate"], ours["rates"] = median(rates), rates


def rate(row):
    if "rate" not in row:
        return "-"
    return f"{row['rate']:.2f}x ({min(row['rates']):.2f} - {max(row['rates']):.2f})"


def run(rows, device, size, rounds, threads, tick):
    missing = [name for name in ("trl", "accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if size in SIZES["small"]:
        for row in rows.values():
            row["status"], row["why"] = "skipped", "starts processes that train"
        return
    export = find_export(size.start, threads)
    if missing:
        rows["TRL"]["status"], rows["TRL"]["why"] = "absent", f"not installed: {', '.join(missing)}"
    else:
        tick("check")
        with outcome(rows["TRL"]):
            out, _ = spawn(["-m", "bench.trl", "check", json.dumps(size), str(export), str(threads)], threads)
            rows["TRL"]["off"] = json.loads(out.splitlines()[-1])["off"]
    calls = {name: row for name, row in rows.items() if row["status"] == "ok"}
    take_turns(calls, rows, rounds, lambda row: turn(row, size, export, threads), tick)
    compare_turns(rows["ours"], rows["TRL"])
    for row in rows.values():
        describe(row)
    summarize(rows, {}, base="TRL")


def make_trainer(size, export, steps, threads, folder, callbacks=()):
    """TRL's trainer on the prompts that train.py draws, in its order."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from engine.data import load_task
    from engine.data.stream import Stream
    from engine.model import NO_CODE
    from engine.rewards import grade, load_rewards

    torch.set_num_threads(threads)
    items = load_task("arithmetic", "train", seed=0)
    stream, rewards = Stream(len(items), 0), load_rewards(REWARDS[size.reward])
    drawn = [items[stream.draw()[1]] for _ in range(size.prompts * steps)]

    def reward(completions, place, **columns):
        return grade(rewards, [answer[0]["content"] for answer in completions], [drawn[i] for i in place]).totals

    sequences = size.prompts * size.answers
    config = GRPOConfig(
        output_dir=folder, max_steps=steps, loss_type=size.loss, epsilon_high=CLIP_HIGH[size.loss],
        num_generations=size.answers, max_completion_length=size.limit, per_device_train_batch_size=FORWARD,
        gradient_accumulation_steps=sequences // FORWARD, **TRL_SETTINGS,
    )  # fmt: skip
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(export, **NO_CODE, dtype=torch.float32, attn_implementation="sdpa"),
        reward, args=config, processing_class=AutoTokenizer.from_pretrained(export, **NO_CODE),
        callbacks=list(callbacks),
        train_dataset=Dataset.from_list([{"prompt": item.prompt, "place": i} for i, item in enumerate(drawn)]),
    ), drawn  # fmt: skip


def timed_steps(trainer):
    """-> [a dict per step], filled in as the trainer trains: a clock around its rollout and its rewards."""
    from transformers import TrainerCallback

    steps, now = [], {"rollout": 0.0, "reward": 0.0}

    def clocked(name, verb, note):
        call = getattr(trainer, name)

        def run(*arguments):
            start = perf_counter()
            out = call(*arguments)
            now[verb] += perf_counter() - start
            note(out)
            return out

        setattr(trainer, name, run)

    def note_rewards(rewards_NR):
        totals_PG = rewards_NR.sum(1).view(-1, trainer.num_generations)
        now["zero_advantage"] = (totals_PG == totals_PG[:, :1]).all(1).double().mean().item()

    clocked("_generate", "rollout", lambda out: now.update(tokens=sum(map(len, out[1]))))
    clocked("_calculate_rewards", "reward", note_rewards)

    class Steps(TrainerCallback):
        def on_train_begin(self, *arguments, **more):
            self.end = perf_counter()

        def on_step_end(self, *arguments, **more):
            start, self.end = self.end, perf_counter()
            steps.append({"seconds": self.end - start, **now})
            now.update(rollout=0.0, reward=0.0)

    trainer.add_callback(Steps())
    return steps


def train_turn(size, export, threads):
    """One turn of TRL, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make_trainer(size, export, WARMUP + COUNTED, threads, folder)
        steps = timed_steps(trainer)
        trainer.train()
        names = ("loss_type", "epsilon_high", "num_generations", "max_completion_length", "steps_per_generation",
                 "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps")  # fmt: skip
        settings = {**TRL_SETTINGS, **{name: getattr(trainer.args, name) for name in names}, "threads": threads}
        attention = trainer.model.config._attn_implementation
    return {"steps": steps, "settings": settings | {"attn_implementation": attention}}


def compare(size, export, threads):
    """TRL's first batch through both losses -> how far loss and gradient norm are apart; Wrong beyond rounding."""
    from trl.trainer.utils import split_tensor_dict

    from engine import model

    with tempfile.TemporaryDirectory() as folder, step.one_rank("cpu") as world:
        trainer, drawn = make_trainer(size, export, 1, threads, folder)
        tokenizer, parts = trainer.processing_class, trainer.args.steps_per_generation
        trainer.model.train()
        inputs = [{"prompt": item.prompt, "place": i} for i, item in enumerate(drawn) for _ in range(size.answers)]
        found = trainer._generate_and_score_completions(inputs)
        samples = as_samples(found)
        for item, ids in zip(drawn, unpadded(found, "prompt")[:: size.answers]):
            if model.encode_prompt(tokenizer, item.prompt) != ids:
                raise Wrong("the two sides' prompts differ")
        trainer.current_gradient_accumulation_steps, loss = parts, 0.0
        for part in split_tensor_dict(found, parts):
            part_loss = trainer.compute_loss(trainer.model, part)
            part_loss.backward()
            loss += part_loss.item()
        theirs = {"loss": loss, "grad_norm": torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0).item()}
        settings = {"algo": size.loss, "micro_tokens": MICRO_TOKENS, "max_new_tokens": size.limit, "threads": threads}
        lm = model.load_model(str(export), 0, torch.float32)
        row = step.update(step.make_learners(lm, settings, world, Path(folder))("chunked"), samples)
        step.check(row, theirs, LIMITS[torch.float32])
    return row


def unpadded(found, part):
    pairs = zip(found[f"{part}_ids"], found[f"{part}_mask"].bool())
    return [ids[mask].tolist() for ids, mask in pairs]


def as_samples(found):
    """TRL's scored completions as Samples."""
    from engine.samples import Sample

    prompts, answers = unpadded(found, "prompt"), unpadded(found, "completion")
    return [
        Sample(prompt, answer, adv, values={"logp_behaviour": torch.zeros(len(answer))})
        for prompt, answer, adv in zip(prompts, answers, found["advantages"].tolist())
    ]


NOTES = {"TRL": "generate of transformers, no vLLM", "ours": "train.py"}
SIZES = {
    "small": [Size("grpo", "alternate", "sft", prompts=1)],
    "cpu": [
        Size("grpo", "alternate", "sft"), Size("dapo", "alternate", "sft"), Size("grpo", "task", "sft"),
        Size("grpo", "task", "grpo"),
    ],
    "cuda": [],
}  # fmt: skip
BENCH = Experiment(
    SIZES, run, NOTES,
    (
        ("side", shown("rival")), ("step", shown("median", seconds)), ("p20-p80", spread),
        ("step rate", rate), ("rollout", shown("rollout", seconds)),
        ("update", shown("update", seconds)), ("tokens/s", shown("tokens_per_second", "{:.0f}".format)),
        ("memory", shown("peak_bytes", megabytes)), ("zero advantage", shown("zero_advantage", share)), ("", remarks),
    ),
)  # fmt: skip


if __name__ == "__main__":
    task, size, export, threads = sys.argv[1:]
    print(json.dumps({"turn": train_turn, "check": compare}[task](Size(*json.loads(size)), export, int(threads))))
