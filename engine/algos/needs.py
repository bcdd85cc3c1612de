"""What a loss needs beside its samples: (learner, samples, step) -> the samples with it. Collective.

Each is asked for by the row of an algorithm, before the first update on a rollout; its forward is a phase of its own.
"""

from engine.config import Config
from engine.samples import Sample


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
    if learner.reference is None:
        return samples
    with learner.log.span("reference", step):
        return learner.with_logprobs(learner.reference, "logp_ref", samples)
