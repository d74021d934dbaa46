"""A simulated human who watches a robot and takes over when it will not make it alone.

The paper's operators intervene when a rollout stalls or is about to fail, and keep control until the episode ends.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from infra.fleet.experts import Expert
from infra.fleet.scene import SceneEnv

_DITHER = 0.06  # metres: a hand that stays within this gets nowhere (an idle arm sags by 3 cm a second)
_STILL = 0.01  # metres: an object that moved less has not moved


class Operator(Protocol):
    """Watches one episode at a time; once it has taken over it acts until the end."""

    def reset(self, env: SceneEnv, rng: np.random.Generator) -> None: ...

    def observe(self, env: SceneEnv, t: int) -> bool:
        """Whether the operator is in control from step `t` on."""

    def act(self, env: SceneEnv) -> npt.NDArray[np.float32]:
        """The operator's action (5,)."""


class _Handover:
    """Shared by the operators: the expert is planned afresh at the moment control is taken."""

    def __init__(self, noise: float = 0.15) -> None:
        self._expert = Expert(noise)
        self._in_control = False

    def reset(self, env: SceneEnv, rng: np.random.Generator) -> None:
        """Begin an episode; all of the operator's draws come from `rng`."""
        self._rng = rng
        self._in_control = False

    def observe(self, env: SceneEnv, t: int) -> bool:
        """Whether the operator is in control from step `t` on."""
        if not self._in_control and self._should_take_over(env, t):
            self._in_control = True
            self._expert.reset(env, self._rng)
        return self._in_control

    def act(self, env: SceneEnv) -> npt.NDArray[np.float32]:
        """The operator's action (5,) float32."""
        return self._expert.act(env)

    def _should_take_over(self, env: SceneEnv, t: int) -> bool:
        raise NotImplementedError


class TakeoverOperator(_Handover):
    """The fleet's operator: takes over a stalled rollout, or one that is running out of time.

    Args:
        presence: probability that the operator attends an episode at all (drawn from the episode's generator).
        out_of_time: takes over when this share of the task's limit has passed without success.
        stall: takes over when for this many control steps the hand stayed within 6 cm, neither cube, drawer nor window
            moved 1 cm and no sub-step was achieved.
        noise: of the expert's hand.
    """

    def __init__(self, presence: float = 1.0, out_of_time: float = 0.5, stall: int = 30, noise: float = 0.15) -> None:
        super().__init__(noise)
        self.presence, self.out_of_time, self.stall = presence, out_of_time, stall

    def reset(self, env: SceneEnv, rng: np.random.Generator) -> None:
        super().reset(env, rng)
        self._present = bool(rng.uniform() < self.presence)
        self._anchor = self._pose(env)
        self._moved_at, self._progress = 0, env.progress

    def _pose(self, env: SceneEnv) -> npt.NDArray[np.float64]:
        facts = env.facts
        return np.concatenate([env.effector, facts.cube, [facts.drawer, facts.window]])

    def _should_take_over(self, env: SceneEnv, t: int) -> bool:
        if not self._present:
            return False
        pose = self._pose(env)
        moved = np.abs(pose - self._anchor)
        if env.progress != self._progress or moved[:3].max() > _DITHER or moved[3:].max() > _STILL:
            self._anchor, self._moved_at, self._progress = pose, t, env.progress
        return t >= self.out_of_time * env.task.limit or t - self._moved_at >= self.stall


class PlayOperator(_Handover):
    """The operator of the play source: lets the policy go off the road until a random moment, then recovers.

    Args:
        low, high: the takeover comes after a share of the task's limit drawn uniformly from here.
        noise: of the expert's hand.
    """

    def __init__(self, low: float = 0.15, high: float = 0.5, noise: float = 0.15) -> None:
        super().__init__(noise)
        self.low, self.high = low, high

    def reset(self, env: SceneEnv, rng: np.random.Generator) -> None:
        super().reset(env, rng)
        self._at = float(rng.uniform(self.low, self.high)) * env.task.limit

    def _should_take_over(self, env: SceneEnv, t: int) -> bool:
        return t >= self._at


class ExpertOperator(_Handover):
    """In control from the first step: how demonstrations are made."""

    def _should_take_over(self, env: SceneEnv, t: int) -> bool:
        return True
