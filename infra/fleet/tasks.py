"""The eight tasks: instruction, time limit, start distribution, goal and scored sub-steps.

Goals are fixed and start poses random: the goal is not in the observation, the instruction alone tells tasks apart.
Positions are metres in the world frame; the drawer slides from 0 (closed) to -0.16 (open), the window from 0 (closed)
to 0.2 (open). Button 0 locks the drawer and button 1 the window: state 0 is locked, 1 unlocked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError

MARK = (0.40, 0.13, 0.02)
DRAWER_OPEN, DRAWER_CLOSED = -0.16, 0.0
WINDOW_OPEN, WINDOW_CLOSED = 0.2, 0.0
LOCKED, UNLOCKED = 0, 1
TOLERANCE = 0.04  # of OGBench's successes: cube, drawer and window

Condition = Literal[
    "drawer_open",
    "drawer_closed",
    "drawer_unlocked",
    "drawer_locked",
    "window_open",
    "window_closed",
    "window_unlocked",
    "window_locked",
    "cube_on_mark",
    "cube_lifted",
    "cube_over_drawer",
    "cube_in_drawer",
]


@dataclass(frozen=True)
class Substep:
    """A scored sub-step: what to do, the condition that achieves it, and whether it must still hold at the end."""

    name: str
    condition: Condition
    lasting: bool = True


@dataclass(frozen=True)
class Goal:
    """The task's goal; None where the task does not care."""

    cube: Literal["mark", "drawer"] | None = None
    drawer: Literal["open", "closed"] | None = None
    window: Literal["open", "closed"] | None = None
    drawer_lock: int | None = None
    window_lock: int | None = None


@dataclass(frozen=True)
class Start:
    """Ranges from which a start is drawn, uniformly; a lock of None is drawn from both."""

    drawer: tuple[float, float] = (-0.01, 0.0)
    window: tuple[float, float] = (0.0, 0.2)
    drawer_lock: int | None = None
    window_lock: int | None = None
    cube_low: tuple[float, float] = (0.30, -0.02)
    cube_high: tuple[float, float] = (0.45, 0.15)  # farther out the window's handle is in the hand's way
    off_mark: float = 0.0  # least distance of the cube from the mark


@dataclass(frozen=True)
class TaskSpec:
    """One task. `limit` is in control steps of 0.05 s."""

    key: str
    instruction: str
    horizon: Literal["short", "long"]
    limit: int
    start: Start
    goal: Goal
    steps: tuple[Substep, ...]

    @property
    def substeps(self) -> tuple[str, ...]:
        """Names of the scored sub-steps, in order."""
        return tuple(step.name for step in self.steps)


_CLOSED, _AJAR = (-0.01, 0.0), (-0.16, -0.15)  # the drawer's start, shut or open
_OPEN_WINDOW, _SHUT_WINDOW = (0.19, 0.2), (0.0, 0.01)
_SHUT = Start(drawer=_CLOSED, window=_SHUT_WINDOW, drawer_lock=LOCKED, window_lock=LOCKED, off_mark=0.08)

TASKS: dict[str, TaskSpec] = {
    spec.key: spec
    for spec in (
        TaskSpec(
            "S1",
            "open the drawer",
            "short",
            80,
            Start(drawer=_CLOSED, drawer_lock=UNLOCKED),
            Goal(drawer="open"),
            (Substep("open the drawer", "drawer_open"),),
        ),
        TaskSpec(
            "S2",
            "close the window",
            "short",
            80,
            Start(window=_OPEN_WINDOW, window_lock=UNLOCKED),
            Goal(window="closed"),
            (Substep("close the window", "window_closed"),),
        ),
        TaskSpec(
            "S3",
            "put the cube on the mark",
            "short",
            120,
            Start(off_mark=0.08),
            Goal(cube="mark"),
            (Substep("put the cube on the mark", "cube_on_mark"),),
        ),
        TaskSpec(
            "S4",
            "unlock and open the window",
            "short",
            120,
            Start(window=_SHUT_WINDOW, window_lock=LOCKED),
            Goal(window="open"),
            (Substep("unlock the window", "window_unlocked"), Substep("open the window", "window_open")),
        ),
        TaskSpec(
            "L1",
            "close and lock the drawer and the window",
            "long",
            400,
            Start(drawer=_AJAR, window=_OPEN_WINDOW, drawer_lock=LOCKED, window_lock=LOCKED),
            Goal(drawer="closed", window="closed", drawer_lock=LOCKED, window_lock=LOCKED),
            (
                Substep("unlock the drawer", "drawer_unlocked", lasting=False),
                Substep("close the drawer", "drawer_closed"),
                Substep("lock the drawer", "drawer_locked"),
                Substep("unlock the window", "window_unlocked", lasting=False),
                Substep("close the window", "window_closed"),
                Substep("lock the window", "window_locked"),
            ),
        ),
        TaskSpec(
            "L2",
            "stow the cube in the drawer and lock it",
            "long",
            350,
            _SHUT,
            Goal(cube="drawer", drawer="closed", drawer_lock=LOCKED),
            (
                Substep("unlock the drawer", "drawer_unlocked", lasting=False),
                Substep("open the drawer", "drawer_open", lasting=False),
                Substep("put the cube in the drawer", "cube_in_drawer"),
                Substep("close the drawer", "drawer_closed"),
                Substep("lock the drawer", "drawer_locked"),
            ),
        ),
        TaskSpec(
            "L3",
            "put the cube on the mark, open the drawer, close the window and lock it",
            "long",
            450,
            Start(window=_OPEN_WINDOW, drawer_lock=LOCKED, window_lock=LOCKED, off_mark=0.08),
            Goal(cube="mark", drawer="open", window="closed", window_lock=LOCKED),
            (
                Substep("put the cube on the mark", "cube_on_mark"),
                Substep("unlock the drawer", "drawer_unlocked"),
                Substep("open the drawer", "drawer_open"),
                Substep("unlock the window", "window_unlocked", lasting=False),
                Substep("close the window", "window_closed"),
                Substep("lock the window", "window_locked"),
            ),
        ),
        TaskSpec(
            "L4",
            "stow the cube, close the drawer, unlock and open the window",
            "long",
            450,
            _SHUT,
            Goal(cube="drawer", drawer="closed", window="open"),
            (
                Substep("unlock the drawer", "drawer_unlocked", lasting=False),
                Substep("open the drawer", "drawer_open", lasting=False),
                Substep("lift the cube", "cube_lifted", lasting=False),
                Substep("carry the cube over the drawer", "cube_over_drawer", lasting=False),
                Substep("put the cube in the drawer", "cube_in_drawer"),
                Substep("close the drawer", "drawer_closed"),
                Substep("unlock the window", "window_unlocked"),
                Substep("open the window", "window_open"),
            ),
        ),
    )
}
SHORT = tuple(key for key, spec in TASKS.items() if spec.horizon == "short")
LONG = tuple(key for key, spec in TASKS.items() if spec.horizon == "long")


def task(key: str) -> TaskSpec:
    """The task of this key.

    Raises:
        ConfigError: no such task.
    """
    if key not in TASKS:
        raise ConfigError(f"unknown task {key!r}", f"use one of {', '.join(TASKS)}")
    return TASKS[key]


@dataclass(frozen=True)
class Facts:
    """What sub-steps and goals are judged by; lengths in metres, locks as button states."""

    cube: npt.NDArray[np.float64]
    drawer: float
    window: float
    drawer_lock: int
    window_lock: int
    cube_in_drawer: bool
    cube_over_drawer: bool
    cube_released: bool


def on_mark(cube: npt.NDArray[np.float64], tolerance: float = TOLERANCE) -> bool:
    """Whether the cube's centre is within `tolerance` metres of the mark."""
    return bool(np.linalg.norm(cube - np.asarray(MARK)) <= tolerance)


def achieved(goal: Goal, facts: Facts) -> bool:
    """Whether the whole goal holds, with OGBench's tolerances."""
    drawer = {"open": DRAWER_OPEN, "closed": DRAWER_CLOSED}
    window = {"open": WINDOW_OPEN, "closed": WINDOW_CLOSED}
    return (
        (goal.drawer is None or abs(facts.drawer - drawer[goal.drawer]) <= TOLERANCE)
        and (goal.window is None or abs(facts.window - window[goal.window]) <= TOLERANCE)
        and (goal.drawer_lock is None or facts.drawer_lock == goal.drawer_lock)
        and (goal.window_lock is None or facts.window_lock == goal.window_lock)
        and (goal.cube != "mark" or on_mark(facts.cube))
        and (goal.cube != "drawer" or (facts.cube_in_drawer and facts.cube_released))
    )


def _holds(condition: Condition, facts: Facts, slack: float) -> bool:
    match condition:
        case "drawer_open":
            return facts.drawer <= DRAWER_OPEN + TOLERANCE + slack
        case "drawer_closed":
            return facts.drawer >= DRAWER_CLOSED - TOLERANCE - slack
        case "drawer_unlocked":
            return facts.drawer_lock == UNLOCKED
        case "drawer_locked":
            return facts.drawer_lock == LOCKED and _holds("drawer_closed", facts, slack)
        case "window_open":
            return facts.window >= WINDOW_OPEN - TOLERANCE - slack
        case "window_closed":
            return facts.window <= WINDOW_CLOSED + TOLERANCE + slack
        case "window_unlocked":
            return facts.window_lock == UNLOCKED
        case "window_locked":
            return facts.window_lock == LOCKED and _holds("window_closed", facts, slack)
        case "cube_on_mark":
            return on_mark(facts.cube, TOLERANCE + slack)
        case "cube_lifted":
            return bool(facts.cube[2] >= 0.08 - slack)
        case "cube_over_drawer":
            return facts.cube_over_drawer
        case "cube_in_drawer":
            return facts.cube_in_drawer and (facts.cube_released or slack > 0)


class Scorer:
    """Step-wise scores as in the paper: 1 for a sub-step achieved at the first attempt, 0.5 after a retry, else 0.

    A retry is a second onset of the sub-step's condition (undone and done again, a button pressed once too often) or,
    for cube sub-steps, a second lift (the cube was dropped on the way). A lasting sub-step that does not hold at the
    end scores 0, and so does one whose condition held from the start and was never achieved. A condition ends only 2 cm
    outside the tolerance that begins it, so that a shaking hand is no retry.
    """

    SLACK = 0.02

    def __init__(self, spec: TaskSpec, facts: Facts) -> None:
        self._steps = spec.steps
        self._goal = spec.goal
        self._on = [_holds(step.condition, facts, 0.0) for step in spec.steps]
        self._onsets = [0] * len(spec.steps)
        self._lifted, self._lifts = False, 0
        self._lifts_before: list[int] = [0] * len(spec.steps)
        self.progress = 0

    def update(self, facts: Facts) -> None:
        """Take one control step's facts into account; `progress` counts every onset."""
        lifted = _holds("cube_lifted", facts, self.SLACK if self._lifted else 0.0)
        self._lifts += lifted and not self._lifted
        self._lifted = lifted
        for i, step in enumerate(self._steps):
            on = _holds(step.condition, facts, self.SLACK if self._on[i] else 0.0)
            if on and not self._on[i]:
                self._onsets[i] += 1
                self.progress += 1
                if self._onsets[i] == 1:
                    self._lifts_before[i] = self._lifts
            self._on[i] = on

    @property
    def scores(self) -> tuple[float, ...]:
        """One of 1, 0.5, 0 for each sub-step."""
        return tuple(map(self._score, range(len(self._steps))))

    def _score(self, i: int) -> float:
        if not self._onsets[i] or (self._steps[i].lasting and not self._on[i]):
            return 0.0
        dropped = self._steps[i].condition.startswith("cube_") and self._lifts_before[i] > 1
        return 0.5 if self._onsets[i] > 1 or dropped else 1.0
