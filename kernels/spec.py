"""What the losses are, and what they report: shared by eager.py, chunked.py and fused.py.

The clipped surrogate, over rows i with weight w_i:  SUM_i w_i * (I_i * policy_i + kl_coef * k3_i - entropy_coef * H_i)
  ratio r = exp(logp - logp_old), and by `form`, with c = clip(r, 1 - clip_low, 1 + clip_high):
    clip (PPO, arXiv 1707.06347)      policy = -min(r A, c A); dual clip (A < 0): at most dual_clip * |A|
    cispo (arXiv 2506.13585 eq. 4)    policy = -c A logp, c a constant for the gradient: no row loses it
    sapo (arXiv 2511.20347 eq. 5, 6)  policy = -4 / tau sigmoid(tau (r - 1)) A, tau = tau_pos for A > 0, else tau_neg
  k3 = exp(d) - d - 1 with d = logp_ref - logp, an estimate of KL(policy || reference) that is never negative
  I = min(k, importance_cap) with k = exp(logp_old - logp_behaviour), but 0 where k is outside [mask_low, mask_high]
  (IcePop, arXiv 2510.18855); a constant for the gradient; 1 without logp_behaviour

Distillation, s_k and t_k the student's and the teacher's log-probability of the k-th of the teacher's top K tokens:
SUM_i w_i * (nll_coef * -logp_i + match_coef * match_i)
  mse: mean_k ((s_k - mean s) - (t_k - mean t))^2, of logits as of log-probabilities: what normalises them cancels
  kl: SUM_k p_k (t_k - s_k) + tail_p log(tail_p / tail_q),  p = exp(t), q = exp(s), each tail = max(1 - SUM, TAIL)
"""

import math
from dataclasses import dataclass

FORMS = ("clip", "cispo", "sapo")
STATS = (
    "tokens",  # rows counted: those of rows_M, else those of nonzero weight
    "clip_low",  # counted rows where the lower clip binds: A < 0 (cispo: any but 0) and ratio < 1 - clip_low
    "clip_high",  # and the upper one: A > 0 (cispo: any but 0) and ratio > 1 + clip_high
    "ratio",  # sum of ratio
    "kl",  # sum of k3 against logp_ref; 0 without one
    "kl_old",  # sum of logp_old - logp
    "entropy",  # sum of entropy in nats; 0 where none was given
    "logp",  # sum of logp
    "rows_skipped",  # rows not counted
    "bad_ids",  # counted rows whose id is outside the vocabulary (their logp is NaN); a CPU raises instead
    "ratio_max",  # largest ratio, 0 when nothing was counted: the one entry that adds by max
)
"""Names of the entries of `stats` [11] fp32. All but the last add up over micro-batches and ranks."""


@dataclass(frozen=True)
class SurrogateSpec:
    """Coefficients of the loss. A ratio exactly on a clip edge keeps its gradient, as torch.clamp does."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # above 1
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    importance_cap: float | None = None
    log_ratio_clamp: float | None = None  # bound on |logp - logp_old| and |logp_ref - logp|; beyond, only cispo learns
    mask_low: float = 0.0  # with mask_high inf: no row is left out
    mask_high: float = float("inf")
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    form: str = "clip"  # of FORMS; sapo clips nothing: with clip_low 1 and clip_high inf

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low must be in [0, 1], for no ratio is below 0; got {self.clip_low}")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high must be >= 0, got {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1 (3 is usual), got {self.dual_clip}")
        if self.form != "clip" and self.dual_clip not in (None, float("inf")):
            raise ValueError(f"dual_clip bounds a loss that is clipped, and {self.form} has none such: leave it out")
        if self.form == "sapo" and (self.clip_low, self.clip_high) != (1, float("inf")):
            raise ValueError(
                f"sapo clips nothing: clip_low must be 1 and clip_high inf, got {self.clip_low} and {self.clip_high}"
            )
        if not 0 <= self.mask_low < self.mask_high:
            raise ValueError(
                f"the mask of importance weights must have 0 <= low < high (0.5 and 5 are usual), got {self.mask_low} "
                f"and {self.mask_high}"
            )
        for name, usual in (("tau_pos", 1), ("tau_neg", 1.05), ("importance_cap", 2), ("log_ratio_clamp", 20)):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0 ({usual} is usual), got {value}")


MATCHES = ("mse", "kl")
TAIL = 2.0**-20
"""The least a tail counts for: the rounding of 1 - SUM would be most of a smaller one. No gradient flows there."""

MATCH_STATS = (
    "tokens",  # rows counted: those of rows_M, else those of nonzero weight
    "nll",  # sum of -logp
    "match",  # sum of match
    "teacher_mass",  # sum of what the teacher's top K have of the teacher's probability
    "student_mass",  # and of the student's
    "agree",  # rows where the same one of the K is the likeliest to both
    "rows_skipped",  # rows not counted
    "bad_ids",  # counted rows with an id outside the vocabulary (their logp is NaN); a CPU raises instead
    "nll_max",  # largest -logp, 0 when nothing was counted: the one entry that adds by max
)
"""Names of the entries of linear_match's `stats` [9] fp32. All but the last add up over micro-batches and ranks."""


@dataclass(frozen=True)
class MatchSpec:
    """What a student is to match of its teacher, and what that and the likelihood of the row's own id weigh."""

    match: str = "mse"  # of MATCHES
    match_coef: float = 1.0
    nll_coef: float = 1.0

    def __post_init__(self):
        if self.match not in MATCHES:
            raise ValueError(f"match must be {' or '.join(MATCHES)}, got {self.match!r}")
        for name in ("match_coef", "nll_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
