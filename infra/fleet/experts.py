"""Scripted experts: plan sub-goal by sub-goal, act from any state with OGBench's Markov oracles.

The same expert demonstrates, recovers in play and is the simulated operator's hand. Its plan is recomputed from the
state whenever a sub-goal ends, so it repairs what went wrong: a lock is released before its slide is moved and pressed
again only if the goal wants it, and the cube is stowed before the drawer is closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

from infra.fleet.scene import ACTION_DIM, SceneEnv
from infra.fleet.tasks import (
    DRAWER_CLOSED,
    DRAWER_OPEN,
    LOCKED,
    MARK,
    UNLOCKED,
    WINDOW_CLOSED,
    WINDOW_OPEN,
    Facts,
    Goal,
    on_mark,
)

NOISE_CORRELATION = 0.8
_BUDGET = {"button": 60, "drawer": 80, "window": 80, "cube": 140}  # control steps before planning again
_CLEAR = {"button": 0.16, "drawer": 0.18, "window": 0.28, "cube": 0.16}  # metres: a hand this high is free to go on
_STUCK = 6  # control steps without a centimetre of motion before a hand rises and tries again
_TIGHT = 0.012  # metres: the expert moves slides closer to their ends than success asks
_STOW = np.array([0.33, -0.24, 0.066])  # OGBench's centre of the open drawer


@dataclass(frozen=True)
class Subgoal:
    """One thing to do: press button 0 or 1 until it has state `target`, or move a slide or the cube to `target`."""

    kind: Literal["button", "drawer", "window", "cube"]
    target: float | tuple[float, float, float]
    button: int = 0


def plan(goal: Goal, facts: Facts) -> Subgoal | None:
    """The next sub-goal in this state; None when nothing is left to do."""
    if goal.cube == "drawer" and not (facts.cube_in_drawer and facts.cube_released):
        if facts.drawer > DRAWER_OPEN + 2 * _TIGHT:
            return _slide("drawer", DRAWER_OPEN, facts.drawer_lock, 0)
        return Subgoal("cube", tuple(_STOW))
    if goal.cube == "mark" and not on_mark(facts.cube, 0.03):
        return Subgoal("cube", MARK)
    for kind, wanted, lock, at, now, button, ends in (
        ("drawer", goal.drawer, goal.drawer_lock, facts.drawer, facts.drawer_lock, 0, (DRAWER_OPEN, DRAWER_CLOSED)),
        ("window", goal.window, goal.window_lock, facts.window, facts.window_lock, 1, (WINDOW_OPEN, WINDOW_CLOSED)),
    ):
        if wanted is not None:
            end = ends[0] if wanted == "open" else ends[1]
            if abs(at - end) > 2 * _TIGHT:
                return _slide(kind, end, now, button)  # type: ignore[arg-type]
        if lock is not None and now != lock:
            return Subgoal("button", lock, button)
    return None


def _slide(kind: Literal["drawer", "window"], end: float, lock: int, button: int) -> Subgoal:
    return Subgoal("button", UNLOCKED, button) if lock == LOCKED else Subgoal(kind, end)


class Expert:
    """Acts on a `SceneEnv` from any state.

    Args:
        noise: standard deviation of correlated (AR(1), 0.8) noise on the action; actions are clipped to [-1, 1].
    """

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise
        self._oracles: dict[str, Any] = {
            "button": ButtonMarkovOracle(env=None, min_norm=0.4),
            "drawer": DrawerMarkovOracle(env=None, min_norm=0.4),
            "window": WindowMarkovOracle(env=None, min_norm=0.4),
            "cube": CubeMarkovOracle(env=None, min_norm=0.4),
        }
        self._subgoal: Subgoal | None = None

    def reset(self, env: SceneEnv, rng: np.random.Generator) -> None:
        """Begin from the scene's present state; every draw comes from `rng`."""
        self._rng = rng
        self._subgoal = None
        self._noise = rng.normal(size=ACTION_DIM) * self.noise
        self._next(env)

    def act(self, env: SceneEnv) -> npt.NDArray[np.float32]:
        """The action (5,) float32 in [-1, 1] for the scene's present state."""
        if self._finished(env):
            self._next(env)
        self._elapsed += 1
        action = self._clean(env)
        if self.noise:
            drawn = self._rng.normal(size=ACTION_DIM) * self.noise
            self._noise = NOISE_CORRELATION * self._noise + np.sqrt(1 - NOISE_CORRELATION**2) * drawn
            action = action + self._noise
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _next(self, env: SceneEnv) -> None:
        self._subgoal = plan(env.task.goal, env.facts)
        self._elapsed = 0
        self._free = self._rng.uniform(*env.arm_bounds)  # where a hand goes that has nothing to do
        self._free_yaw = float(self._rng.uniform(-np.pi, np.pi))
        self._rising = False
        self._anchor, self._still = env.effector, 0
        subgoal = self._subgoal
        if subgoal is not None:
            low = env.effector[2] < _CLEAR[subgoal.kind]
            self._rising = bool(low and np.linalg.norm(self._place(env, subgoal)[:2] - env.effector[:2]) > 0.08)

    def _finished(self, env: SceneEnv) -> bool:
        subgoal = self._subgoal
        if subgoal is None or self._elapsed >= _BUDGET[subgoal.kind]:
            return True
        return self._reached(env, subgoal) and bool(env.effector[2] > _CLEAR[subgoal.kind])

    def _reached(self, env: SceneEnv, subgoal: Subgoal) -> bool:
        facts = env.facts
        if subgoal.kind == "button":
            return (facts.drawer_lock, facts.window_lock)[subgoal.button] == subgoal.target
        if subgoal.kind == "cube":
            if subgoal.target == MARK:
                return on_mark(facts.cube, 0.03) and facts.cube_released
            return facts.cube_in_drawer and facts.cube_released
        position = facts.drawer if subgoal.kind == "drawer" else facts.window
        assert isinstance(subgoal.target, float)
        return abs(position - subgoal.target) <= _TIGHT

    def _place(self, env: SceneEnv, subgoal: Subgoal) -> npt.NDArray[np.float64]:
        if subgoal.kind == "button":
            return env.button_top(subgoal.button)
        if subgoal.kind == "cube":
            return env.cube
        return np.asarray(env.info[f"privileged/{subgoal.kind}_handle_pos"])

    def _clean(self, env: SceneEnv) -> npt.NDArray[np.float64]:
        subgoal = self._subgoal
        action = np.zeros(ACTION_DIM)
        if subgoal is None:
            action[:3] = 5 * (self._free - env.effector)
            action[4] = -1
            return action
        self._rising = self._rising or self._jammed(env, subgoal)
        if self._rising:
            if env.effector[2] < _CLEAR[subgoal.kind]:
                action[2], action[4] = 1.0, -1.0
                return action
            self._rising = False
        oracle = self._oracles[subgoal.kind]
        oracle._done, oracle._step = False, 0  # stateless but for these: budgets are kept here
        oracle._final_pos, oracle._final_yaw = self._free, self._free_yaw
        return np.asarray(oracle.select_action(None, env.info | self._targets(env, subgoal)), np.float64)

    def _jammed(self, env: SceneEnv, subgoal: Subgoal) -> bool:
        """Whether the fingers rest on top of a handle or the cube instead of around it (oracles press on for ever)."""
        if np.abs(env.effector - self._anchor).max() > 0.01:
            self._anchor, self._still = env.effector, 0
        self._still += 1
        if subgoal.kind == "button" or self._still < _STUCK or self._reached(env, subgoal):
            return False
        if subgoal.kind == "cube" and (env.facts.cube_in_drawer or np.linalg.norm(env.cube - env.effector) < 0.035):
            return False  # at the cube: grasping or letting go takes its time
        self._still = 0
        return True

    def _targets(self, env: SceneEnv, subgoal: Subgoal) -> dict[str, Any]:
        """The `privileged/target_*` entries that OGBench gives its oracles only while it collects data."""
        if subgoal.kind == "button":
            return {
                "privileged/target_button": subgoal.button,
                "privileged/target_button_state": subgoal.target,
                "privileged/target_button_top_pos": env.button_top(subgoal.button),
            }
        if subgoal.kind == "cube":
            cube = env.cube
            # A cube lying in the drawer a little off its centre is stowed: the oracle need only let go of it.
            done = self._reached(env, subgoal) or (
                subgoal.target != MARK and env.facts.cube_in_drawer and cube[2] < 0.09
            )
            return {
                "privileged/target_block": 0,
                "privileged/target_block_pos": cube if done else np.asarray(subgoal.target),
                "privileged/target_block_yaw": np.array([0.0]),
            }
        facts = env.facts
        position, axis = (facts.drawer, 1) if subgoal.kind == "drawer" else (facts.window, 0)
        assert isinstance(subgoal.target, float)
        handle = np.asarray(env.info[f"privileged/{subgoal.kind}_handle_pos"]).copy()
        handle[axis] += (subgoal.target - position) * (-1 if subgoal.kind == "drawer" else 1)
        return {f"privileged/target_{subgoal.kind}_handle_pos": handle}
