"""What a loss needs beside its samples: (learner, samples, step) -> the samples with it. Collective.

Each is asked for by the row of an algorithm, before the first update on a rollout; its forward is a phase of its own.
The frozen model is the reference, or the teacher, whose prompts may be others (Sample.context).
"""

from dataclasses import replace

from engine.algos.loss import LogProbs, TopLogProbs
from engine.config import Config
from engine.samples import Sample, key_of


def logp_old(learner, samples: list[Sample], step: int) -> list[Sample]:
    """Log-probabilities that the ratio is taken against; absent where the policy is its own old one."""
    base = ratio_base(learner.config)
    if base == "sampler":
        return [s.having(logp_old=s.values["logp_behaviour"]) for s in samples]
    if base == "recompute":
        with learner.log.span("logp_old", step):
            return learner.with_logprobs(learner.policy, "logp_old", samples)
    return samples


def ratio_base(config: Config) -> str:
    """on_policy | recompute | sampler, with auto decided."""
    if config.logp_old != "auto":
        return config.logp_old
    if config.sequence_mask:
        return "recompute"
    if config.lag and not config.corrections:
        return "sampler"
    return "on_policy" if config.updates_per_rollout * config.epochs == 1 else "recompute"


def logp_ref(learner, samples: list[Sample], step: int) -> list[Sample]:
    """The frozen reference's log-probabilities; absent where beta is 0, which loads none."""
    if learner.known is not None:
        return [s.having(logp_ref=learner.known[key_of(s)]) for s in samples]
    if learner.frozen is None:
        return samples
    with learner.log.span("reference", step):
        return learner.with_logprobs(learner.frozen, "logp_ref", samples)


def teacher_top(learner, samples: list[Sample], step: int) -> list[Sample]:
    """The teacher's likeliest tokens [A, K], and their log-probabilities under the student's vocabulary."""
    score = TopLogProbs(learner.config, learner.ops, learner.policy.lm.config.vocab_size)
    with learner.log.span("teacher", step):
        return learner.with_values(learner.frozen, score, ("top_ids", "top_logp"), samples, taught=True)


def adv_teacher(learner, samples: list[Sample], step: int) -> list[Sample]:
    """Per token, the teacher's log-probability less the student's: the advantage whose gradient is that of the reverse
    KL; beside it `reward_coef` times that of the rewards."""
    score = LogProbs(learner.config, learner.ops, learner.policy.lm.config.vocab_size)
    with learner.log.span("teacher", step):
        samples = learner.with_values(learner.frozen, score, ("logp_ref",), samples, taught=True)
    own = lambda s: s.values.get("logp_old", s.values["logp_behaviour"])  # noqa: E731
    gains, coef = [s.values["logp_ref"] - own(s) for s in samples], learner.config.reward_coef
    return [replace(s.having(adv=gain), adv=coef * s.adv) for s, gain in zip(samples, gains, strict=True)]
