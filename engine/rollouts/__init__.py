"""Table of rollout back-ends; what one has to do stands in `protocol`."""

from engine.rollouts.native import NativeRollout
from engine.rollouts.protocol import BackEnd

ROLLOUTS: dict[str, BackEnd] = {"native": NativeRollout}
