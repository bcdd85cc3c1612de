"""Run: what one training run holds, built once; it resumes, assesses, saves and closes."""

import contextlib
import copy
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine import checkpoint, dist, model
from engine.algos import ALGOS
from engine.batch import Batch
from engine.config import Config, convert, read_yaml, save_config
from engine.data import TASKS, Item, count_shared
from engine.data.stream import Stream
from engine.errors import UserError
from engine.evaluate import check_room, evaluate, make_rollout
from engine.experience import Explorer, Made, Prompts, Traces, check_chats, load_items, sampling_of
from engine.folder import choose_folder
from engine.learner import Learner
from engine.log import Log, plot_curves
from engine.plan import device_memory, out_of_memory_advice, settle
from engine.prefetch import Prefetch
from engine.replica import make_replica
from engine.rewards import judge_of, load_rewards
from engine.rollouts import ROLLOUTS


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""

    step: int = 0
    updates: int = 0
    skipped: int = 0
    empty: int = 0  # steps without anything to learn from
    tokens: int = 0
    wall_seconds: float = 0.0
    best: float = -1.0
    problems: int = 0  # that the accuracies are of
    before: dict = field(default_factory=dict)  # held-out accuracies at step 0
    after: dict = field(default_factory=dict)  # and at the last step


class Run:
    """`batches()` gives a batch per step, `learner.learn(batch, step)` updates the policy, `end_step(step)` does the
    rest: it is what never runs beside a rollout."""

    def __init__(self, config: Config, world: dist.World):
        self.config, self.world, self.progress = config, world, Progress()
        self.landed: Made | None = None  # made for the next step, not learned from yet
        self.algo = algo = ALGOS[config.algo]
        items, self.held_out, self.rewards = load_inputs(config)
        self.origin = items.origin
        self.tokenizer = model.load_tokenizer(config.start, config.today)
        for split in (items, self.held_out):
            check_chats(split, self.tokenizer, config)
        self.folder, found = choose_folder(config, world)
        self.config = config = dataclasses.replace(config, date=self.pick_date(bool(found)))
        self.tokenizer.today = config.today

        settled = settle(config, world.world_size, -dist.all_max([-float(device_memory(world.device))])[0])
        lm = model.load_model(config.start, config.seed, model.compute_dtype(world.device))
        check_room(lm, config)
        if algo.advantage:
            model.remove_dropout(lm)
        self.replica = make_replica(lm, world.device)
        reference = None
        if algo.advantage and config.beta > 0:
            reference = model.shard(model.Policy(copy.deepcopy(lm)), config, world.mesh, frozen=True)
        self.policy = model.shard(model.Policy(lm), settled, world.mesh)
        self.optimizer = model.make_optimizer(self.policy, config)
        self.stream = Stream(len(items), config.seed, *((world.rank, world.world_size) if algo.advantage else (0, 1)))
        other_data = self.restore(found) if found else ""
        if found:
            checkpoint.abandon_after(found.parent, self.progress.step, world)

        ops = model.load_kernels(config, world.device)
        self.log = Log(config, self.folder, self.progress.step, world.rank == 0)
        verb, kernels = "Resuming" if found else "Running", ops.__name__.rpartition(".")[2]
        self.log.say(f"{verb} {self.folder}: {world.world_size} x {world.device.type}, {kernels} kernels")
        if settled != config:
            self.log.say(f"reshard_after_forward {settled.reshard_after_forward}, grad_sync {settled.grad_sync}")
        if world.rank == 0:
            self.say_changes(self.folder / "config.yaml", bool(found))
            save_config(config, self.folder / "config.yaml")
        self.say_data(items, other_data)
        self.prefetch = Prefetch(self.make, config.lag, world.device, self.log.span)
        self.rollout = make_rollout(self.replica, self.tokenizer, config, self.should_stop)
        prompts = Prompts(items, self.tokenizer, config, self.stream)
        if algo.advantage:
            self.rollout.prepare(sampling_of(config))
            self.source = Explorer(config, algo, prompts, self.rollout, self.rewards, world)
        else:
            self.source = Traces(config, prompts, world)
        self.learner = Learner(settled, algo, self.policy, reference, self.optimizer, ops, self.log, world, self.folder)
        self.learner.check = self.prefetch.check
        self.learner.updates, self.learner.skipped = self.progress.updates, self.progress.skipped
        self.wall_before = self.progress.wall_seconds

    def pick_date(self, resuming: bool) -> str:
        """The day that the run's prompts speak of: as set, or as it was, or today. Collective."""
        saved = self.folder / "config.yaml"
        before = read_yaml(saved).get("date") if resuming and saved.exists() else None
        return dist.gather(self.config.date or str(before or datetime.date.today()))[0]

    def say_data(self, items: Sequence[Item], other: str) -> None:
        """What a reader of the accuracies should know: which problems they are of, and who judges. `other`: what of the
        training data is not what the run had so far."""
        if self.world.rank:
            return
        if other:
            self.log.say(f"Going on with other training data: {other}")
        for name, split in (("Training", items), ("Held-out", self.held_out)):
            if files := getattr(split, "origin", {}).get("files"):
                self.log.say(f"{name} data: {', '.join(files)} in {split.origin['path']}")
        [(judge, _, _)] = judge_of(self.rewards)
        if judge != "answer":
            self.log.say(f"Right is an answer that the reward {judge!r} gives more than 0.5.")
        if self.config.eval_size and not self.held_out:
            self.log.say(
                "No accuracy is measured: name held-out problems (or a folder that has a test split) as --test_data."
            )
        elif not TASKS[self.config.task].generated and (shared := count_shared(items, self.held_out)):
            self.log.say(f"{shared} of the {len(self.held_out)} held-out problems stand in the training data too.")

    def say_changes(self, saved: Path, resuming: bool) -> None:
        """On a resume, names the settings that are not what they were."""
        if not resuming or not saved.exists():
            return
        old, new = read_yaml(saved), dataclasses.asdict(self.config)
        changed = {k: (v, new[k]) for k, v in old.items() if k in new and convert(k, v) != new[k]}
        if changed:
            self.log.say("Changed: " + ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items()))

    def should_stop(self) -> bool:
        """Whether a rollout should end at once. One beside an update gets half of the grace to become whole first."""
        flight = self.prefetch.flight  # landed: it is an evaluation that asks
        patience = self.config.grace_seconds / 2 if flight and not flight.done() else 0.0
        return self.prefetch.cancelled.is_set() or dist.stop_requested(patience)

    def make(self, step: int) -> Made | None:
        """This rank's batch; None when a signal interrupted it. Runs beside an update at lag 1: no collective."""
        cursor = self.stream.cursor
        try:
            with guard_memory(self.config, "rollout"):
                return self.source(step)
        except InterruptedError:
            self.stream.cursor = cursor
            return None

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(step, this rank's batch) for each step to go; ends early, saved, after a signal on any rank. Collective."""
        steps = range(self.progress.step, self.config.steps)
        with contextlib.closing(self.prefetch.batches(steps, self.take, self.end_step, self.landed)) as batches:
            self.log.begin_step(self.progress.step)
            for step, made in batches:
                self.log.merge(step, made.tally)
                self.assert_fresh(made.batch, step)
                yield step, made.batch

    def assert_fresh(self, batch: Batch, step: int) -> None:
        """The policy of version `step` learns from samples of at most `lag` versions before."""
        if batch.version_N is not None:
            staleness_N, lag = step - batch.version_N, self.config.lag
            fresh = ((staleness_N >= 0) & (staleness_N <= lag)).all()
            assert fresh, f"step {step} got samples of versions {batch.version_N.unique().tolist()} at lag {lag}"
            self.log.add(staleness_sum=float(staleness_N.sum()))

    def take(self, made: Made | None) -> bool:
        """Accepts a batch for the update, or saves it for later when any rank was asked to stop: True. Collective."""
        stop = self.land(made)
        if stop:
            self.log.forget()
            self.save()
        self.landed = None
        return stop

    def land(self, made: Made | None) -> bool:
        """Holds a batch, unless a rank lacks its part; True when any rank was asked to stop. Collective."""
        missing, stops = dist.all_sum([float(made is None), float(dist.stop_requested())])
        if missing and made is not None:
            self.stream.cursor = made.cursor
        self.landed = None if missing else made
        return stops > 0

    def sync_weights(self, step: int) -> None:
        """The policy's weights to the rollout; `step`: the one that the profiler counts it to. Collective."""
        with self.log.span("weight_sync", step):
            self.replica.refresh(self.policy, self.progress.step)

    def assess(self) -> dict[str, float]:
        """Held-out accuracies, greedy and sampled; nothing without held-out problems or after a signal. Collective."""
        if not self.held_out:
            return {}
        if not self.algo.advantage:  # else every step has done it
            self.sync_weights(self.progress.step)
        rows = []
        for mode, samples in (("greedy", 0), ("sampled", 1)):
            with self.log.span("evaluate", self.progress.step), guard_memory(self.config, "rollout"):
                row = evaluate(
                    self.rollout, self.tokenizer, self.held_out, self.rewards, self.config, self.world, samples=samples
                )
            if not row:
                return {}
            rows.append({"step": self.progress.step, "eval": mode, **row})
        before, self.progress.problems = self.progress.problems, rows[0]["problems"]
        if (dropped := rows[0].get("dropped")) and self.progress.problems != before:
            self.log.say(f"{dropped} of {len(self.held_out)} held-out prompts were too long and are not counted.")
        for row in rows:
            self.log.write(row)
        return {row["eval"]: row["accuracy"] for row in rows}

    def end_step(self, step: int) -> bool:
        """Weights to the rollout, log, accuracies, checkpoint; True when any rank was asked to stop. Collective."""
        config, progress = self.config, self.progress
        progress.step = step + 1
        if self.algo.advantage:
            self.sync_weights(step)
        rate = self.learner.learning_rate(max(self.learner.updates - 1, 0))
        row = self.log.end_step(step, lr=rate)
        if row.get("empty_updates") == config.updates_per_rollout * config.epochs:
            self.progress.empty += 1
            self.log.say(f"Step {step}: no answer is better or worse than its group; nothing to learn from.")
        if row.get("prompts_dropped"):
            self.log.say(f"Step {step}: {row['prompts_dropped']:.0f} prompts or traces were too long and were dropped.")
        progress.updates, progress.skipped = self.learner.updates, self.learner.skipped
        progress.tokens += int(row.get("generated_tokens", row.get("tokens", 0)))
        progress.wall_seconds = self.wall_before + self.log.elapsed()
        last, best = progress.step == config.steps, False
        if last or (config.eval_every and progress.step % config.eval_every == 0):
            after = self.assess()
            progress.after = {} if last else progress.after
            if after:
                progress.after, accuracy = after, after["sampled"]
                best, progress.best = accuracy > progress.best, max(accuracy, progress.best)
        flight = self.prefetch.flight
        stop = self.land(flight.result()) if flight else any_stops()
        if best or last or stop or (config.save_every and progress.step % config.save_every == 0):
            self.save(best)
        self.log.begin_step(progress.step)
        return stop

    @property
    def fingerprint(self) -> dict:
        """What must be equal for a resume to mean something."""
        config = self.config
        return {"algo": config.algo, "task": config.task, "seed": config.seed, "shapes": model.shapes(self.policy)}

    def save(self, best: bool = False) -> None:
        tensors = checkpoint.training_tensors(self.policy, self.optimizer) | checkpoint.rng_tensors()
        tensors["cursor"] = torch.tensor([self.stream.cursor])
        tensors |= self.landed.tensors() if self.landed else {}
        meta = {"fingerprint": self.fingerprint, "data": self.origin, "progress": dataclasses.asdict(self.progress)}
        root = self.folder / "checkpoints"
        checkpoint.save(root, self.progress.step, tensors, meta, self.world, keep=self.config.keep, best=best)

    def restore(self, found: Path) -> str:
        """Goes back to a checkpoint; returns what of the training data is not what it was. Collective."""
        tensors, meta = checkpoint.load(found, self.world, self.fingerprint)
        before = meta.get("data", {})
        both = [(k, v, self.origin.get(k)) for k, v in before.items()]
        changed = ", ".join(f"{k} {was!r} -> {now!r}" for k, was, now in both if was != now)
        if changed and not self.config.new_data:
            raise UserError(
                f"{found} learned from other training data ({changed}): give it the same --train_data, "
                "--train_limit, columns and --system_prompt, or --new_data true to go on with these."
            )
        checkpoint.restore_training_tensors(self.policy, self.optimizer, tensors)
        checkpoint.restore_rng(tensors)
        self.stream.cursor = int(tensors["cursor"])
        self.progress = Progress(**meta["progress"])
        self.landed = Made.from_tensors(tensors)
        staleness = self.landed.staleness(self.progress.step) if self.landed else 0
        if dist.all_max([float(staleness)])[0] > self.config.lag:  # saved with another lag
            self.stream.cursor, self.landed = self.landed.cursor, None
        self.replica.refresh(self.policy, self.progress.step)
        return changed

    def assess_last(self) -> bool:
        """Makes up for the last evaluation where a signal cut it short; False when one does so again. Collective."""
        self.progress.after = self.progress.after or self.assess()
        return bool(self.progress.after) or not self.held_out

    def close(self, finished: bool) -> None:
        """The end of a run: export, summary, curves, one line. Collective."""
        progress, folder = self.progress, self.folder
        line = f"Stopped by a signal after step {progress.step} and saved; go on with --resume auto."
        if finished:
            self.sync_weights(self.progress.step)
            if self.world.rank == 0:
                model.export_model(self.replica.lm, self.tokenizer, folder / "export")
                (folder / "summary.json").write_text(json.dumps(self.summarize(), indent=2) + "\n")
                plot_curves(folder)
            before, after = progress.before, progress.after
            gains = [f"{mode} accuracy {before[mode]:.1%} -> {after[mode]:.1%}" for mode in after if mode in before]
            outcome = ", ".join(gains) or f"{progress.step} steps"
            line = f"Done: {outcome} in {progress.wall_seconds:.0f} s; see {folder}/curves.png"
        self.log.say(line)
        dist.barrier()  # nobody reads the export before it is whole

    def summarize(self) -> dict:
        """What summary.json holds."""
        progress, before, accuracy = self.progress, self.progress.before, self.progress.after
        device, versions = self.world.device, {}
        for name in ("torch", "triton", "transformers", "datasets"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        return {
            "algo": self.config.algo,
            "accuracy_before": before.get("greedy"),
            "accuracy_after": accuracy.get("greedy"),
            "accuracy_before_sampled": before.get("sampled"),
            "accuracy_after_sampled": accuracy.get("sampled"),
            "eval_problems": progress.problems,
            "steps": progress.step,
            "empty_steps": progress.empty,
            "tokens": progress.tokens,
            "wall_seconds": round(progress.wall_seconds, 1),
            "seed": self.config.seed,
            "world_size": self.world.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
            "versions": versions | {"python": platform.python_version()},
        }


def load_inputs(config: Config) -> tuple[Sequence[Item], Sequence[Item], list]:
    """(training items, held-out items, rewards): what can be wrong before any model is loaded."""
    items = load_items(config, "train")
    task = TASKS[config.task]
    has_test = config.test_data or task.source or task.generated
    held_out = load_items(config, "test") if config.eval_size and has_test else []
    if ALGOS[config.algo].advantage is None and items[0].trace is None:
        raise UserError(f"The task {config.task} has no traces to imitate; name their column with trace_column.")
    if config.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed; run `pip install -r requirements-wandb.txt`, or leave --wandb off.")
    sampling_of(config)
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.kernels == "fused" and on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("kernels fused needs a GPU (or TRITON_INTERPRET=1, slowly); use chunked on a CPU.")
    if config.rollout not in ROLLOUTS:
        raise UserError(f"There is no rollout back-end {config.rollout!r}; known: {', '.join(ROLLOUTS)}.")
    return items, held_out, load_rewards(config.rewards or task.rewards)


def any_stops() -> bool:
    """Whether any rank was asked to stop. Collective."""
    return dist.all_sum([float(dist.stop_requested())])[0] > 0


@contextlib.contextmanager
def guard_memory(config: Config, phase: str):
    """Turns running out of memory into the setting to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises a plain RuntimeError
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(out_of_memory_advice(config, phase, dist.world_size())) from error
        raise
