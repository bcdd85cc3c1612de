"""Run: one training run: where it stands, and what is done between its updates."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine import adapters, checkpoint, dist, known, model, provenance, record
from engine.config import Config, save_config, write_whole
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.folder import LAUNCH_LOG, choose_folder
from engine.inputs import Inputs
from engine.log import Log, append_line, plot_curves, table_of
from engine.parts import build, load
from engine.plan import guard_memory
from engine.policy import shapes
from engine.prefetch import Prefetch
from engine.samples import Batch
from engine.sources import Prompts
from engine.sources.context import Context
from engine.sources.pairs import read_pairs, share_of


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
    before: dict = field(default_factory=dict)  # held-out accuracies at step 0
    after: dict = field(default_factory=dict)  # and at the last step
    exam_before: dict = field(default_factory=dict)  # what `before` is of: number of problems, where they are from
    exam: dict = field(default_factory=dict)  # and `after`


class Run:
    """What the loop in train.py calls: `ahead` makes batches, `learner` learns from them, the rest is here, and never
    runs beside a rollout."""

    def __init__(self, config: Config, world: dist.World, inputs: Inputs):
        self.world, self.inputs, self.progress, self.stopped = world, inputs, Progress(), False
        self.folder, found = choose_folder(config, world)
        self.config = config = dataclasses.replace(config, date=record.pick_date(config, self.folder, bool(found)))
        inputs.tokenizer.today = config.today
        lm = load(config, world)
        self.base = adapters.fingerprint(lm) if config.lora_rank is not None else None
        start = adapters.fingerprint(lm, whole=True) if config.reference == "precomputed" else None
        self.parts = parts = build(config, world, lm, inputs)
        torch.manual_seed(config.seed * world.world_size + world.rank)  # of dropout, which each rank draws for itself
        self.stream = parts.algo.source.stream(len(inputs.items), config, world)
        landed, other_data = self.restore(found) if found else (None, "")
        pairs = read_pairs(inputs.held_out, inputs.tokenizer, config) if parts.algo.source.pairs else []
        self.held_out_pairs = [s for pair in pairs for s in pair]
        self.known = None if start is None else self.look_up_reference(start)
        self.log = Log(config, self.folder, self.progress.step, world.rank == 0, self.progress.wall_seconds)
        self.say_start(bool(found), other_data)
        prompts = Prompts(inputs.items, inputs.tokenizer, config, self.stream)
        asker = functools.partial(parts.asker, self.progress.step)
        self.source = parts.algo.source.open(config, prompts, asker, world)
        self.ahead = Prefetch(self.make, config.lag, config.steps, world.device, self.log.span)
        self.ahead.ready = landed
        parts.stop, parts.show = self.should_stop, self.log.show
        self.learner = parts.learner(self.log, self.folder)
        self.learner.check = self.ahead.check
        self.learner.updates, self.learner.skipped = self.progress.updates, self.progress.skipped

    def say_start(self, resuming: bool, other_data: str) -> None:
        config, settled, log, saved = self.config, self.parts.config, self.log, self.folder / "config.yaml"
        verb, kernels = "Resuming" if resuming else "Running", self.parts.ops.__name__.rpartition(".")[2]
        log.say(f"{verb} {self.folder}: {self.world.world_size} x {self.world.device.type}, {kernels} kernels")
        if settled != config:
            log.say(f"reshard_after_forward {settled.reshard_after_forward}, grad_sync {settled.grad_sync}")
        if self.base:
            log.say(record.describe_adapters(self.parts.policy))
        if not config.profile_steps:
            log.say(f"To go on after an interruption: {provenance.resume_line()}")
        if self.world.rank == 0:
            if resuming and (changed := record.describe_changes(config, saved)):
                log.say(f"Changed: {changed}")
            save_config(config, saved)
            append_line(self.folder / LAUNCH_LOG, {"step": self.progress.step, **provenance.describe()})
            if other_data:
                log.say(f"Going on with other training data: {other_data}")
            for line in record.describe_data(config, self.inputs):
                log.say(line)

    def begin(self) -> None:
        """What a run knows before its first step. Collective."""
        of, pairs = len(self.inputs.held_out), len(self.held_out_pairs) // 2
        if self.parts.algo.source.pairs and pairs < of:
            self.log.say(f"{of - pairs} of {of} held-out pairs are too long and are not counted.")
        if self.known:
            self.log.say(f"What the start says of all pairs is kept in {self.known.path}.")
            self.known.ask(self.learner)
            self.learner.known = self.known.found
        if self.progress.step == 0 and not self.progress.before:
            self.progress.before = before = self.assess()
            self.progress.exam_before = self.progress.exam
            if "in_context" in before:
                shown, alone = before["in_context"], before["greedy"]
                self.log.say(f"Behind {self.config.shots} examples {shown:.1%} right, without {alone:.1%} (greedy).")

    def look_up_reference(self, weights: str) -> known.Known:
        """What the start says of all pairs, as far as it was asked. Collective."""
        source, items, config = self.parts.algo.source, self.inputs.items, self.config
        prompts = Prompts(items, self.inputs.tokenizer, config, source.stream(len(items), config, self.world))
        samples = [*known.samples_of(source, config, prompts, self.world), *self.held_out_pairs]
        return known.look_up(samples, weights, self.folder, self.progress.step)

    def steps_to_go(self) -> Iterator[int]:
        """Until the last, the end of a recording, or until a signal has stopped the run."""
        self.log.begin_step(self.progress.step)
        while self.progress.step < self.config.window[1] and not self.stopped:
            yield self.progress.step

    def should_stop(self) -> bool:
        """Whether a rollout should end at once. One beside an update gets half of the grace to become whole first."""
        patience = self.config.grace_seconds / 2 if self.ahead.flying() else 0.0
        return self.ahead.cancelled.is_set() or dist.stop_requested(patience)

    def make(self, step: int) -> Batch | None:
        """This rank's batch; None when a signal interrupted it. Runs beside an update at lag 1: no collective."""
        cursor = self.stream.cursor
        try:
            with guard_memory(self.config, "rollout"):
                return self.source(step)
        except InterruptedError:
            self.stream.cursor = cursor
            return None

    def stops(self, batch: Batch | None) -> bool:
        """Whether any rank was asked to stop: then all is saved, with this batch. Else it is begun. Collective."""
        self.ahead.ready = batch
        if self.hold():
            self.stopped = True
            self.log.forget()
            self.save()
            return True
        self.ahead.ready = None
        step, staleness = self.progress.step, [self.progress.step - s.version for s in batch.samples if s.version >= 0]
        assert all(0 <= n <= self.config.lag for n in staleness), f"step {step} got samples of {staleness} steps before"
        self.log.merge(step, batch.tally)
        if staleness:
            self.log.add(staleness_sum=sum(staleness))
        return False

    def hold(self) -> bool:
        """Keeps what is made for the next step, unless a rank lacks its part; True when any rank was asked to stop.
        Collective."""
        made = self.ahead.ready
        missing, stops = dist.all_sum([float(made is None), float(dist.stop_requested())])
        if missing and made is not None:
            self.stream.cursor, self.ahead.ready = made.cursor, None
        return stops > 0

    def publish(self, step: int) -> None:
        """The weights of the update of `step` to the rollout, if the source asks it. Collective."""
        self.progress.step = step + 1
        if self.parts.algo.source.rolls_out:
            self.sync_weights(step)

    def sync_weights(self, step: int) -> None:
        """The policy's weights to the rollout, unless it has them; the profiler counts it to `step`. Collective."""
        if self.parts.replica.version != self.progress.step:
            with self.log.span("weight_sync", step):
                self.parts.publish(self.progress.step)

    def end_step(self, step: int) -> None:
        """Log, accuracies, checkpoint. Collective."""
        progress = self.progress
        self.count(self.log.end_step(step, learning_rate=self.learner.learning_rate(max(self.learner.updates - 1, 0))))
        last = progress.step == self.config.steps
        best = self.examine(last) if last or _every(self.config.eval_every, progress.step) else False
        self.stopped = self.hold()
        if best or last or self.stopped or _every(self.config.save_every, progress.step):
            self.save(best)
        self.log.begin_step(progress.step)

    def count(self, row: dict[str, float]) -> None:
        progress, config = self.progress, self.config
        if row.get("empty_updates") == config.updates_per_rollout * config.epochs:
            progress.empty += 1
            self.log.say(f"Step {row['step']}: no answer is better or worse than its group; nothing to learn from.")
        if dropped := row.get("prompts_dropped"):
            self.log.say(f"Step {row['step']}: {dropped:.0f} prompts or traces were too long and were dropped.")
        progress.updates, progress.skipped = self.learner.updates, self.learner.skipped
        progress.tokens += int(row.get("generated_tokens", row.get("tokens", 0)))
        progress.wall_seconds = self.log.elapsed()

    def examine(self, last: bool) -> bool:
        """Takes the accuracies; whether they are the best so far. Collective."""
        progress, exam = self.progress, self.progress.exam
        after = self.assess()
        if last or after:
            progress.after = after
        accuracy = after.get("sampled", after.get("pairs", -1.0))
        least = progress.best if exam in ({}, progress.exam) else -1.0
        progress.best = max(accuracy, least)
        return accuracy > least

    def assess(self) -> dict[str, float]:
        """Held-out accuracies by the name of the exam; none after a signal. Collective."""
        step, rows = self.progress.step, []
        for name, take in self.exams():
            with self.log.span("evaluate", step):
                if not (row := take(functools.partial(self.log.show, f"evaluate, {name}"))):
                    return {}
            rows.append({"step": step, "eval": name, **row})
        if not rows:
            return {}
        exam = {"problems": rows[0]["problems"], "data": getattr(self.inputs.held_out, "origin", {})}
        before, self.progress.exam = self.progress.exam, exam
        if (dropped := rows[0].get("dropped")) and exam != before:
            of = len(self.inputs.held_out)
            self.log.say(f"{dropped} of {of} held-out prompts were too long and are not counted.")
        for row in rows:
            self.log.write(row)
        return {row["eval"]: row["accuracy"] for row in rows}

    @property
    def has_answers(self) -> bool:
        """Whether what is right is known of the held-out problems."""
        return bool(self.inputs.held_out and self.inputs.held_out[0].answer)

    def exams(self) -> Iterator[tuple[str, Callable]]:
        """What there is to measure on held-out data, by name: (progress) -> a row, nothing after a signal."""
        items, config = self.inputs.held_out, self.config
        if self.has_answers:
            self.sync_weights(self.progress.step)
            yield "greedy", functools.partial(self.answer, items, config, 0)
            yield "sampled", functools.partial(self.answer, items, config, 1)
        if self.has_answers and config.own_context and self.progress.step == 0:
            extend = Context(self.inputs.items, self.inputs.tokenizer, config).extend
            shown = [dataclasses.replace(x, prompt=extend(x.prompt, x.row["row_index"])) for x in items]
            longer = dataclasses.replace(config, max_prompt_tokens=config.longest_prompt)
            yield "in_context", functools.partial(self.answer, shown, longer, 0)
        if self.held_out_pairs:
            yield "pairs", self.prefer

    def answer(self, items: Sequence, config: Config, samples: int, progress: Callable) -> dict:
        """Accuracy of answers. Collective."""
        inputs, rollout = self.inputs, self.parts.rollout
        with guard_memory(config, "rollout"):
            return evaluate(
                rollout, inputs.tokenizer, items, inputs.rewards, config, self.world, samples=samples, progress=progress
            )

    def prefer(self, progress: Callable) -> dict:
        """How the policy ranks held-out pairs. Collective."""
        if dist.all_max([float(dist.stop_requested())])[0]:
            return {}
        row = self.learner.measure(share_of(self.held_out_pairs, self.world), self.progress.step)
        return {"accuracy": row["preferred"], "problems": len(self.held_out_pairs) // 2, **row}

    @property
    def fingerprint(self) -> dict:
        """What must be equal for a resume to mean something."""
        config = self.config
        own = {"algo": config.title, "task": config.task, "seed": config.seed, "shapes": shapes(self.parts.policy)}
        lora = {"rank": config.lora_rank, "scale": config.lora_scale} if config.lora_rank is not None else None
        return own | {"adapters": lora, "base": self.base}

    def save(self, best: bool = False) -> None:
        if self.config.profile_steps:
            return
        tensors = checkpoint.training_tensors(self.parts.policy, self.parts.optimizer) | checkpoint.rng_tensors()
        tensors["cursor"] = torch.tensor([self.stream.cursor])
        tensors |= self.ahead.ready.tensors() if self.ahead.ready else {}
        progress = dataclasses.asdict(self.progress)
        meta = {"fingerprint": self.fingerprint, "data": self.inputs.items.origin, "progress": progress}
        root = self.folder / "checkpoints"
        checkpoint.save(root, self.progress.step, tensors, meta, self.world, keep=self.config.keep, best=best)

    def restore(self, found: Path) -> tuple[Batch | None, str]:
        """Goes back to a checkpoint -> what had landed for the next step, and what of the training data is not what it
        was. Collective."""
        tensors, meta = checkpoint.load(found, self.world, self.fingerprint)
        origin = self.inputs.items.origin
        both = [(k, v, origin.get(k)) for k, v in meta.get("data", {}).items()]
        changed = ", ".join(f"{k} {was!r} -> {now!r}" for k, was, now in both if was != now)
        if changed and not self.config.new_data:
            raise UserError(
                f"{found} learned from other training data ({changed}): give it the same --train_data, "
                "--train_limit, columns and --system_prompt, or --new_data true to go on with these."
            )
        checkpoint.restore_training_tensors(self.parts.policy, self.parts.optimizer, tensors)
        checkpoint.restore_rng(tensors)
        self.stream.cursor = int(tensors["cursor"])
        known = Progress.__dataclass_fields__.keys() & meta["progress"].keys()
        self.progress = Progress(**{name: meta["progress"][name] for name in known})
        landed = Batch.from_tensors(tensors)
        staleness = landed.staleness(self.progress.step) if landed else 0
        if dist.all_max([float(staleness)])[0] > self.config.lag:  # saved with another lag
            self.stream.cursor, landed = landed.cursor, None
        checkpoint.abandon_after(found.parent, self.progress.step, self.world)
        return landed, changed

    def export(self, folder: Path) -> None:
        """The model, or its adapter, for others. Collective."""
        tokenizer, writes = self.inputs.tokenizer, self.world.rank == 0
        if self.base is None:
            self.sync_weights(self.progress.step)
            if writes:
                model.export_model(self.parts.replica.lm, tokenizer, folder)
            return
        adapter = adapters.gather(self.parts.policy.lm, self.config, self.base)
        if writes:
            adapters.export(adapter, self.config, model.compute_dtype(self.world.device), tokenizer, folder)

    def close(self) -> bool:
        """Export, summary, curves, one line; False where the run goes on another time. Collective."""
        progress, folder = self.progress, self.folder
        self.log.profile(sys.maxsize)  # closes a window that a signal left open
        if self.config.profile_steps:
            self.log.say(record.describe_recording(self.config, progress.step))
            return not self.stopped
        if progress.step >= self.config.steps:  # a signal during the last step has stopped nothing
            progress.after = progress.after or self.assess()
            self.stopped = bool(self.has_answers or self.held_out_pairs) and not progress.after
        line = f"Stopped by a signal after step {progress.step} and saved; go on with --resume auto."
        if not self.stopped:
            self.export(folder / "export")
            if self.world.rank == 0:
                summary = record.summarize(self.config, self.world, progress)
                write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
                plot_curves(folder)
            outcome = record.describe_gains(progress) or f"{progress.step} steps"
            line = f"Done: {outcome} in {progress.wall_seconds:.0f} s; see {folder}/curves.png"
        if self.log.latest:
            self.log.say(table_of(self.log.latest, 80))
        self.log.say(line)
        dist.barrier()  # nobody reads the export before it is whole
        return not self.stopped


def _every(steps: int, step: int) -> bool:
    return bool(steps) and step % steps == 0
