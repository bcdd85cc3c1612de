"""Metrics: every number that a step reports, what it is, and how its parts and its ranks are put together.

Kept as sums with their counts, and maxima; only `reduce` divides, after one all-reduce. A number under a name that the
table does not know is refused where it is added. `python -m engine.metrics` prints the table.
"""

import contextlib
import importlib
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.profiler import record_function

from engine import dist

NVTX = importlib.import_module("nvtx") if importlib.util.find_spec("nvtx") else None
UNTRACED = contextlib.nullcontext()


@dataclass(frozen=True)
class Metric:
    """`group`: where TensorBoard shows it. A mean is the sum `of` over the count `per`; without `per` a sum is shown
    as it is, where it is not 0, and `top` is the largest value."""

    group: str
    meaning: str
    of: str = ""
    per: str = ""
    top: bool = False


def mean(group: str, per: str, of: str, meaning: str) -> Metric:
    return Metric(group, meaning, of, per)


METRICS = {
    "reward": mean("reward", "graded", "reward_sum", "what advantages are made of: the rewards by their shares"),
    "rewards/*": mean("reward", "graded", "rewards/*", "one of the rewards alone, before its share"),
    "accuracy": mean("reward", "graded", "correct", "share of answers that are right"),
    "length": mean("rollout", "sequences", "length_sum", "tokens of an answer"),
    "at_limit": mean("rollout", "sequences", "at_limit_count", "share of answers cut at max_new_tokens"),
    "accepted": mean("rollout", "groups_drawn", "groups_kept", "share of groups kept by dynamic_sampling"),
    "staleness": mean("rollout", "batch_sequences", "staleness_sum", "versions the weights are ahead of a sample's"),
    "kl": mean(
        "policy",
        "tokens",
        "kl",
        "KL of the policy to the reference (opd: teacher), k3 estimate: e^d - d - 1, d = ref - logp",
    ),
    "approx_kl": mean("policy", "tokens", "kl_old", "KL of the old policy to the policy: mean of logp_old - logp"),
    "entropy": mean("policy", "tokens", "entropy", "entropy of the next token's distribution, nats"),
    "ratio": mean("policy", "tokens", "ratio", "policy's probability of a token over the old policy's"),
    "ratio_max": Metric("policy", "the largest ratio", top=True),
    "clipped_low": mean("policy", "tokens", "clip_low", "share of tokens clipped at 1 - clip_low"),
    "clipped_high": mean("policy", "tokens", "clip_high", "share of tokens clipped at 1 + clip_high"),
    "mismatch": mean("policy", "mismatch_tokens", "mismatch", "|log-probability by the trainer - by the sampler|"),
    "off_ratio": mean("policy", "mismatch_tokens", "off_ratio", "share of tokens with policy / sampler not 0.9 to 1.1"),
    "cap_hits": mean("policy", "mismatch_tokens", "cap_hits", "share of tokens beyond importance_cap"),
    "masked": mean("policy", "mismatch_tokens", "masked", "share of tokens outside importance_mask"),
    "effective_samples": Metric("policy", "(sum w)^2 / (n sum w^2), w: policy over sampler; 1 where they are one"),
    "nll": mean("loss", "tokens", "nll", "negative log-likelihood of a trained token, nats"),
    "nll_max": Metric("loss", "the largest of a token", top=True),
    "teacher_gap": mean("loss", "tokens", "match", "how far a token's logits are from the teacher's, by `match`"),
    "teacher_mass": mean("loss", "tokens", "teacher_mass", "probability that the teacher gives its likeliest tokens"),
    "student_mass": mean("loss", "tokens", "student_mass", "probability that the student gives these"),
    "agree": mean("loss", "tokens", "agree", "share of tokens whose likeliest one of these is the same for both"),
    "chosen_reward": mean("preference", "pairs", "chosen_reward", "beta log(policy / reference) of the chosen answer"),
    "rejected_reward": mean("preference", "pairs", "rejected_reward", "that of the rejected one"),
    "margin": mean("preference", "pairs", "margin", "the first less the second"),
    "preferred": mean("preference", "pairs", "preferred", "share of pairs with a margin above 0, half of those at 0"),
    "chosen_logp": mean("preference", "pairs", "chosen_logp", "log-probability of the chosen answer, nats"),
    "rejected_logp": mean("preference", "pairs", "rejected_logp", "that of the rejected one"),
    "chosen_length": mean("preference", "pairs", "chosen_length", "tokens of the chosen answer"),
    "rejected_length": mean("preference", "pairs", "rejected_length", "those of the rejected one"),
    "loss": mean("loss", "updates", "loss", "the loss of an update, all ranks together"),
    "grad_norm": mean("loss", "updates", "grad_norm", "norm of an update's gradient, before clipping"),
    "learning_rate": Metric("loss", "learning rate of the step's last update"),
    "removed": mean(
        "loss", "batch_sequences", "removed_sequences", "sequences left out: without a gradient, or by the mask"
    ),
    "empty_updates": Metric("loss", "updates that no rank had anything for", of="empty_updates"),
    "skipped_steps": Metric("loss", "updates left out, their loss or gradient not being finite", of="skipped_steps"),
    "generated_tokens": Metric("rollout", "tokens drawn", of="generated_tokens"),
    "tokens": Metric("loss", "tokens trained, once for each update", of="tokens"),
    "prompts_dropped": Metric("rollout", "prompts or traces that were too long", of="prompts_dropped"),
    "reward_errors": Metric("reward", "rewards that failed, taken for 0", of="reward_errors"),
    "reward_timeouts": Metric("reward", "rewards that took too long, taken for 0", of="reward_timeouts"),
    "peak_device_gib": Metric("cost", "device memory at its highest so far, the fullest rank's", top=True),
    "peak_host_gib": Metric("cost", "resident memory at its highest so far, the fullest rank's", top=True),
    "tokens_per_second": Metric("cost", "tokens drawn (else trained) over seconds/step"),
    "seconds/*": Metric("cost", "seconds of a phase on the first rank; phases may lie in or beside each other"),
    "wall_seconds": Metric("cost", "seconds since the run began, without those between its launches"),
}
SUMS = {name for m in METRICS.values() for name in (m.of, m.per) if name}
SUMS |= {"importance", "importance_squares", "bad_ids"}  # of which no metric is a plain mean
TOPS = {name for name, m in METRICS.items() if m.top}


def metric_of(name: str) -> Metric:
    """Its row; KeyError for a name that is not in the table."""
    head, slash, _ = name.partition("/")
    return METRICS[f"{head}/*" if slash else name]


class Tally:
    """Sums, maxima, seconds and samples of one part of a step, kept apart from what runs beside it."""

    tracing = False  # whether a torch.profiler recording is to be told of phases

    def __init__(self, num_samples: int = 0):
        self.sums: dict[str, float] = {}
        self.tops: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.samples: list[dict] = []
        self.num_samples = num_samples

    def add(self, sums: dict[str, float] | None = None, **more: float) -> None:
        """Adds host numbers to the sums."""
        for key, value in ((sums or {}) | more).items():
            assert key in SUMS or "/" in key and metric_of(key), f"no metric is made of {key}"
            self.sums[key] = self.sums.get(key, 0.0) + float(value)

    def top(self, **values: float) -> None:
        """Keeps the largest."""
        for key, value in values.items():
            assert metric_of(key).top, f"{key} is no maximum"
            self.tops[key] = max(self.tops.get(key, float(value)), float(value))

    def sample(self, **row) -> None:
        """Keeps a completion for samples.jsonl: the first `num_samples`."""
        if len(self.samples) < self.num_samples:
            self.samples.append(row)

    @contextlib.contextmanager
    def span(self, verb: str, step: int):
        """Times a phase and shows it to the profiler as an NVTX range with the step as payload."""
        if NVTX:
            NVTX.push_range(verb, domain="train", payload=step)
        start = time.perf_counter()
        try:
            with record_function(f"train/{verb}") if Tally.tracing else UNTRACED:
                yield
        finally:
            self.seconds[verb] = self.seconds.get(verb, 0.0) + time.perf_counter() - start
            if NVTX:
                NVTX.pop_range(domain="train")


class DeviceStats:
    """A loss's statistics of a step, summed on the device, which is waited for once, at the step's end."""

    def __init__(self):
        self.held: dict[tuple, torch.Tensor] = {}

    def add(self, names: tuple[str | None, ...], stats: torch.Tensor) -> None:
        """`stats` [len(names)]: sums, and maxima under the names of such; under None what is not reported."""
        held = self.held.get(names)
        if held is not None:
            total = held + stats
            for i in (i for i, name in enumerate(names) if name in TOPS):
                total[i] = torch.maximum(held[i], stats[i])
            stats = total
        self.held[names] = stats

    def read(self, tally: Tally) -> None:
        """Into a tally, and forgets."""
        for names, stats in self.held.items():
            values = {name: x for name, x in zip(names, stats.tolist(), strict=True) if name}
            tally.add({name: x for name, x in values.items() if name not in TOPS})
            tally.top(**{name: x for name, x in values.items() if name in TOPS})
        self.held = {}


def reduce(sums: dict[str, float], tops: dict[str, float]) -> dict[str, float]:
    """The metrics of a step from this rank's sums and maxima and the others', whatever names they have. Collective."""
    names = dist.gather([sorted(sums), sorted(tops)])
    of_sums, of_tops = (sorted({name for part in names for name in part[i]}) for i in (0, 1))
    total = dict(zip(of_sums, dist.all_sum([sums.get(k, 0.0) for k in of_sums]), strict=True))
    if total.get("bad_ids"):
        raise RuntimeError(f"{total['bad_ids']:.0f} token ids lie outside the vocabulary: model and tokenizer differ.")
    row = {}
    for name, metric in _summed(total):
        if metric.per and total.get(metric.per):
            row[name] = total[metric.of] / total[metric.per]
        elif not metric.per and total[metric.of]:
            row[name] = total[metric.of]
    if squares := total.get("importance_squares"):
        row["effective_samples"] = total["importance"] ** 2 / squares / total["mismatch_tokens"]
    return row | dict(zip(of_tops, dist.all_max([tops.get(k, float("-inf")) for k in of_tops]), strict=True))


def _summed(total: dict[str, float]) -> Iterator[tuple[str, Metric]]:
    """The metrics that these sums make, in the table's order."""
    for name, metric in METRICS.items():
        if name.endswith("/*"):
            yield from ((k, replace(metric, of=k)) for k in total if k.startswith(name[:-1]))
        elif metric.of in total:
            yield name, metric


def main() -> None:
    print("The metrics of a step by the group that TensorBoard shows them in; metrics.jsonl has the names alone.")
    for group in dict.fromkeys(metric.group for metric in METRICS.values()):
        print(f"\n{group}")
        rows = [(name, metric.meaning) for name, metric in METRICS.items() if metric.group == group]
        print("\n".join(f"  {name:<20}{meaning}" for name, meaning in rows))


if __name__ == "__main__":
    main()
