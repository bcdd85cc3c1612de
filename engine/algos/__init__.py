"""ALGOS: an algorithm is a row: where its samples come from, how their tokens are weighted, the loss, what that needs
beside the samples, and what advantages still lack. GRPO, Dr. GRPO, DAPO, RLOO and REINFORCE share one loss; what else
differs, and the paper of each, is in configs/<name>.yaml."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.algos.advantage import as_they_are, batch_center, group_center, group_leave_one_out, group_zscore, reward
from engine.algos.loss import NLL, Match, SequenceSurrogate, Surrogate
from engine.algos.needs import adv_teacher, logp_old, logp_ref, teacher_top
from engine.algos.preference import Preference
from engine.algos.weight import per_answer, per_budget, per_pair, per_sequence, per_token
from engine.config import Config
from engine.errors import UserError
from engine.sources import Source
from engine.sources.answers import Answers
from engine.sources.pairs import Pairs
from engine.sources.traces import Traces


@dataclass(frozen=True)
class Algo:
    source: Source
    weight: Callable  # engine.algos.weight
    loss: Callable  # engine.algos.loss, built once from the settings
    needs: tuple[Callable, ...] = ()  # engine.algos.needs
    baseline: Callable = as_they_are  # engine.algos.advantage: what a source, which does no collective, cannot take off

    def beside(self, config: Config) -> str:
        """The frozen model that is computed with, a folder or hub id: a teacher, or the reference; "" for none."""
        if {teacher_top, adv_teacher}.intersection(self.needs):
            return config.teacher or config.start
        compares = logp_ref in self.needs and config.beta > 0 and config.reference != "precomputed"
        return config.start if compares else ""


ALGOS = {
    "sft": Algo(Traces(), per_token, NLL),
    "grpo": Algo(Answers(group_zscore), per_sequence, Surrogate, needs=(logp_old, logp_ref)),
    "dr_grpo": Algo(Answers(group_center), per_budget, Surrogate, needs=(logp_old, logp_ref)),
    "dapo": Algo(Answers(group_zscore), per_token, Surrogate, needs=(logp_old, logp_ref)),
    "rloo": Algo(Answers(group_leave_one_out), per_answer, Surrogate, needs=(logp_old, logp_ref)),
    "reinforce": Algo(Answers(reward), per_answer, Surrogate, needs=(logp_old, logp_ref), baseline=batch_center),
    "cispo": Algo(Answers(group_zscore), per_token, partial(Surrogate, form="cispo"), needs=(logp_old, logp_ref)),
    "gspo": Algo(Answers(group_zscore), per_sequence, SequenceSurrogate, needs=(logp_old, logp_ref)),
    "sapo": Algo(Answers(group_zscore), per_sequence, partial(Surrogate, form="sapo"), needs=(logp_old, logp_ref)),
    "dpo": Algo(Pairs(), per_pair, Preference, needs=(logp_ref,)),
    "distill": Algo(Traces(), per_token, Match, needs=(teacher_top,)),
    "opd": Algo(Answers(group_center), per_token, Surrogate, needs=(logp_old, adv_teacher)),
}


def algo_of(config: Config) -> Algo:
    """UserError for an algorithm that has its YAML and no row yet."""
    if config.algo not in ALGOS:
        raise UserError(
            f"The algorithm {config.algo!r} has settings in configs/, but no row in engine/algos/__init__.py."
        )
    return ALGOS[config.algo]
