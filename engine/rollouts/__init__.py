"""Table of rollout back-ends: prompts in, completions with their log-probabilities out."""

from engine.rollouts.native import NativeRollout

ROLLOUTS = {"native": NativeRollout}
