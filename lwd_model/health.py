"""Whether a learner is healthy: nothing that is not finite, and no loss or value beyond its limits."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from infra.errors import DivergedError
from lwd_model.networks import FlatNetwork

# Compared with their running median. The policy's loss and its gradient grow with the critic's slope in good health.
_RELATIVE = ("divl/critic_loss", "divl/value_loss", "clone/loss")


@dataclass(frozen=True)
class HealthLimits:
    """When a learner has diverged.

    Attributes:
        loss: any loss above this. Returns lie in [0, 1]: a healthy critic's loss is below 0.1, the value's below 6.
        value: any mean of Q above this, either sign.
        gradient: any gradient's norm before clipping above this.
        ratio, floor: critic's, value's or clone's loss above `ratio` times its running median, and above `floor`.
    """

    loss: float = 1_000.0
    value: float = 10.0
    gradient: float = 1e6
    ratio: float = 50.0
    floor: float = 1.0


class Health:
    """Judges one update after another.

    Args:
        limits: see `HealthLimits`. window: updates that the median is taken of; it is used once half of them are there.
    """

    def __init__(self, limits: HealthLimits | None = None, window: int = 100) -> None:
        self.limits = limits or HealthLimits()
        self._past: dict[str, deque[float]] = {name: deque(maxlen=window) for name in _RELATIVE}
        self._needed = window // 2

    def forget(self) -> None:
        """After a return to an earlier state."""
        for past in self._past.values():
            past.clear()

    def judge(self, metrics: Mapping[str, float]) -> str | None:
        """What is wrong, naming the quantity; None if healthy."""
        for name, value in metrics.items():
            if (problem := self._judge(name, value)) is not None:
                return problem
        for name, past in self._past.items():
            if name in metrics:
                past.append(metrics[name])
        return None

    def _judge(self, name: str, value: float) -> str | None:
        limits = self.limits
        if not math.isfinite(value):
            return f"{name} is {value}"
        limit = (
            limits.loss
            if name.endswith("loss")
            else limits.gradient
            if name.startswith("gradient/")
            else limits.value
            if name in ("divl/q", "qam/q")
            else math.inf
        )
        if abs(value) > limit:
            return f"{name} is {value:.4g}, beyond {limit:g}"
        past = self._past.get(name, ())
        if len(past) >= self._needed and value > limits.floor:
            usual = statistics.median(past)
            if value > limits.ratio * usual:
                return f"{name} is {value:.4g}, {value / max(usual, 1e-12):.0f} times its median"
        return None


def weights_problem(networks: Iterable[tuple[str, FlatNetwork]]) -> str | None:
    """The first network with a weight that is not finite, targets and EMAs included; None if there is none."""
    for name, network in networks:
        if not bool(torch.isfinite(network.flat).all()):
            return f"weights of {name} are not finite"
    return None


def stop_unless_finite(metrics: Mapping[str, float], update: int, hint: str) -> None:
    """End a training stage whose numbers are not finite.

    Raises:
        DivergedError: names the quantity and the update.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise DivergedError(f"{name} is {value} at update {update}", hint)
