"""Learning rate as a function of the update count alone: nothing to save, nothing to drift on resume."""

from __future__ import annotations

import math

from lwd_model.config import LearnerConfig

WARMUP = 20  # updates of linear warm-up: Adam's first steps have no second moment to trust


def learning_rate(base: float, step: int, config: LearnerConfig) -> float:
    """Rate of update `step` (from 0): warm-up, then constant or cosine decay to 0 at `config.updates`."""
    warm = min(1.0, (step + 1) / WARMUP)
    if config.decay == "constant":
        return base * warm
    return base * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / config.updates)))
