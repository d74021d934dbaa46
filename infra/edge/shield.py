"""The shield: the last thing between whoever acts, a policy or an operator, and the actuators.

Whatever is proposed, what leaves is a float32 array of A finite entries within the limits, and no further from the
action before than the limits on change allow. What cannot be executed becomes the hold, a safe action that the limits
define. Everything that was altered is counted by kind; episodes carry the counts and record actions as executed.

Units are those of the embodiment's actions, for example shares of an actuator's limit, radians, or metres. Changes are
per control step. For actions that are positions the first difference is velocity × period and the second acceleration ×
period²; for actions that are displacements or velocities the first difference is acceleration.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError, LwdError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
OffLimits = Literal["clamp", "refuse"]
KINDS = {
    "non_finite": "NaN or infinity proposed: held",
    "malformed": "no array of A numbers proposed: held",
    "fault": "the inference raised: held",
    "late": "no action in time: held",
    "stale": "the chunk is older than allowed: held",
    "off_limits": "beyond the limits, refused: held",
    "clamped": "beyond the limits, moved to the nearest that is within",
    "workspace": "would leave the workspace: moved to its edge, or held where refusal is configured",
    "slowed": "a larger change than allowed, spread over further steps",
}
"""What the shield counts, by control steps."""

_QUIET = functools.partial(np.errstate, all="ignore")  # whatever the process does at a number's overflow
_TOLERANCE = 1e-5  # of a limit: float32 rounding is no event; the contract's rule has the same


class PolicyFaultError(LwdError):
    """A policy gave what cannot be executed, or nothing in time: the one before it is taken again."""

    exit_code = 3


@dataclass(frozen=True)
class Workspace:
    """The box that the position may not leave.

    Attributes:
        low, high: (P,) of the position, metres.
        axes: (P,) entries of the action that move it.
        scale: (P,) metres of one unit of action.
        relative: True where the action is a displacement from the measured position, False where it is the position.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    axes: tuple[int, ...]
    scale: tuple[float, ...]
    relative: bool = True


@dataclass(frozen=True)
class Limits:
    """What the actuators may be told. A is the action's dimension.

    Attributes:
        low, high: (A,) the action's limits.
        change: (A,) largest first difference, per control step; None for no limit.
        second_change: (A,) largest second difference, per control step squared; None for no limit. It gives way where
            the other limits ask for a harder stop.
        hold: the safe action: `zero` (a displacement or velocity of nothing), `repeat` (the last one: an absolute
            position is kept), or (A,) numbers. It is approached as fast as `change` allows.
        off_limits: what happens to an action beyond the limits or the workspace.
        workspace: box of the position; None for none.
        period_s: seconds of a control step; an inference that takes longer is late.
        late_events: late control steps of one episode after which the policy before is taken again.
        chunk_age_s: an action planned from an observation older than this is not executed; None for no limit.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    change: tuple[float, ...] | None = None
    second_change: tuple[float, ...] | None = None
    hold: Literal["zero", "repeat"] | tuple[float, ...] = "zero"
    off_limits: OffLimits = "clamp"
    workspace: Workspace | None = None
    period_s: float = 0.05
    late_events: int = 3
    chunk_age_s: float | None = None

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.low)

    def __post_init__(self) -> None:
        dim = len(self.low)
        _require(dim > 0 and len(self.high) == dim, "low, high", "have the action's dimension each")
        _require(all(map(math.isfinite, self.low + self.high)), "low, high", "be finite")
        ordered = bool((_up(np.asarray(self.low)) <= _down(np.asarray(self.high))).all())
        _require(ordered, "low, high", "leave room between them")
        for name in ("change", "second_change"):
            given = getattr(self, name)
            fits = given is None or (len(given) == dim and all(math.isfinite(one) and one > 0 for one in given))
            _require(fits, name, f"be {dim} positive numbers")
        held = self.hold if isinstance(self.hold, tuple) else (0.0,) * dim
        _require(len(held) == dim, "hold", f"be zero, repeat or {dim} numbers")
        if self.hold != "repeat":
            within = all(low <= one <= high for low, one, high in zip(self.low, held, self.high, strict=True))
            _require(within, "hold", "lie within the limits")
        _require(self.off_limits in ("clamp", "refuse"), "off_limits", "be clamp or refuse")
        _require(0 < self.period_s < math.inf, "period_s", "be a positive number of seconds")
        _require(
            type(self.late_events) is int and self.late_events > 0, "late_events", "be a whole number of at least 1"
        )
        _require(self.chunk_age_s is None or 0 < self.chunk_age_s < math.inf, "chunk_age_s", "be positive")
        if (box := self.workspace) is not None:
            sizes = {len(box.low), len(box.high), len(box.axes), len(box.scale)}
            _require(len(sizes) == 1 and len(box.axes) > 0, "workspace", "have low, high, axes and scale of one length")
            _require(all(math.isfinite(one) for one in box.low + box.high), "workspace", "be finite")
            _require(
                all(low < high for low, high in zip(box.low, box.high, strict=True)), "workspace", "have low < high"
            )
            known = all(type(axis) is int and 0 <= axis < dim for axis in box.axes)
            _require(known, "workspace.axes", f"be entries of a {dim}-D action")
            _require(len(set(box.axes)) == len(box.axes), "workspace.axes", "name no entry twice")
            _require(all(math.isfinite(one) and one > 0 for one in box.scale), "workspace.scale", "be positive")
            if not box.relative:
                edges = [
                    (box.axes[i], box.low[i] / box.scale[i], box.high[i] / box.scale[i]) for i in range(len(box.axes))
                ]
                meets = all(max(low, self.low[axis]) <= min(high, self.high[axis]) for axis, low, high in edges)
                _require(meets, "workspace", "have positions that the action's limits allow")
                inside = self.hold == "repeat" or all(low <= held[axis] <= high for axis, low, high in edges)
                _require(inside, "hold", "lie within the workspace")

    @classmethod
    def box(cls, action_dim: int, low: float = -1.0, high: float = 1.0) -> Limits:
        """Only the action's limits, the same for every entry; the hold is no motion."""
        return cls((low,) * action_dim, (high,) * action_dim)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Limits:
        """From plain values, as `data_contracts.shield:default_shield` gives them.

        Args:
            document: `action_dim` and fields of this class; a number stands for A equal ones, and `workspace` is a
                mapping of the fields of `Workspace`.

        Raises:
            ConfigError: a field is unknown, missing, of a wrong type or size, or out of range.
        """
        if not isinstance(document, Mapping):
            raise ConfigError(f"shield: {document!r:.80} is no mapping", "give the fields of its limits")
        _known(document, {"action_dim", *cls.__dataclass_fields__}, "shield")
        dim = document.get("action_dim")
        _require(type(dim) is int and 0 < dim <= 1024, "action_dim", "be a whole number in 1..1024")
        assert isinstance(dim, int)
        taken: dict[str, Any] = {key: value for key, value in document.items() if key != "action_dim"}
        for name in ("low", "high"):
            taken[name] = _numbers(taken.get(name), dim, name)
        for name in ("change", "second_change"):
            taken[name] = None if taken.get(name) is None else _numbers(taken[name], dim, name)
        if taken.get("hold", "zero") not in ("zero", "repeat"):
            taken["hold"] = _numbers(taken["hold"], dim, "hold")
        for name in ("period_s", "chunk_age_s"):
            if taken.get(name) is not None:
                taken[name] = _numbers(taken[name], 1, name)[0]
        if taken.get("workspace") is not None:
            taken["workspace"] = _workspace(taken["workspace"])
        return cls(**taken)


class Shield:
    """Makes executable actions of proposed ones, for one robot; `reset` at the beginning of each episode.

    Attributes:
        counts: altered control steps of the episode by kind, those of `KINDS`: of the policy's actions.
        operator_counts: the same of the operator's, who passes the same shield.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._low, self._high = _up(np.asarray(limits.low)), _down(np.asarray(limits.high))
        change = None if limits.change is None else np.asarray(limits.change)
        with _QUIET():  # a limit that the action's own limits imply costs nothing
            self._change = None if change is None or (change >= self._high - self._low).all() else change
        size = np.maximum(np.abs(self._low), np.abs(self._high)).astype(np.float64)
        self._tolerance = _TOLERANCE * np.where(size > 0, size, 1.0)
        self._box = None if limits.workspace is None else _Box(limits.workspace, self._change)
        self.counts: Counter[str] = Counter()
        self.operator_counts: Counter[str] = Counter()
        self.reset()

    def reset(self, pose: npt.ArrayLike | None = None) -> None:
        """An episode begins.

        Args:
            pose: (A,) the action that keeps the robot where it is now, from which changes are measured. Without it the
                first change is measured from nothing where the hold is `zero`, and not limited elsewhere.
        """
        self.counts, self.operator_counts = Counter(), Counter()
        self._velocity: Doubles | None = None
        self._previous: Floats | None = None
        if pose is not None:
            at = np.asarray(pose, np.float32).reshape(-1)
            if at.shape != self._low.shape or not np.isfinite(at).all():
                raise ConfigError(f"the shield's pose is {at[:16]}", f"give {self.limits.action_dim} finite numbers")
            self._previous = np.clip(at, self._low, self._high)
        elif self.limits.hold == "zero":
            self._previous = np.zeros(self.limits.action_dim, np.float32)

    def hold(self, kind: str, *, position: npt.ArrayLike | None = None) -> Floats:
        """The safe action (A,), counted as `kind`; `position` as in `apply`."""
        self.counts[kind] += 1
        with _QUIET():
            return self._leave(self._held(), position)

    def apply(
        self, proposed: Any, *, position: npt.ArrayLike | None = None, age_s: float = 0.0, operator: bool = False
    ) -> Floats:
        """The action (A,) float32 to execute. Never raises, whatever is proposed.

        Args:
            proposed: (A,) numbers.
            position: (P,) metres, as measured now; needed by a workspace whose actions are displacements: a robot that
                does not know where it is does not move.
            age_s: seconds since the observation that it was planned from.
            operator: an operator proposes it: counted apart.
        """
        counts = self.operator_counts if operator else self.counts
        with _QUIET():
            target, kinds = self._judge(proposed, position, age_s)
            for kind in kinds:
                counts[kind] += 1
            if target is None:
                return self._leave(self._held(), position)
            left = self._leave(target, position)
            if (np.abs(left - target) > self._tolerance).any():
                counts["slowed"] += 1
            return left

    def plan(self, chunk: Any, horizon: int) -> Floats:
        """A policy's whole chunk (H, A) float32, if all of it could be executed.

        Raises:
            PolicyFaultError: another shape or type, or not finite; counted, and nothing was executed.
        """
        wanted = (horizon, self.limits.action_dim)
        with _QUIET():
            array = _array(chunk)
        if array is None or array.shape != wanted:
            self.counts["malformed"] += 1
            found = type(chunk).__name__ if array is None else f"an array {array.shape}"
            raise PolicyFaultError(f"the policy gave {found}, not actions {wanted}", "train or export it again")
        if not np.isfinite(array).all():
            self.counts["non_finite"] += 1
            raise PolicyFaultError("the policy gave actions that are not finite", "look at its training")
        with _QUIET():
            return np.clip(array, -_BIG, _BIG).astype(np.float32)

    def _judge(
        self, proposed: Any, position: npt.ArrayLike | None, age_s: float
    ) -> tuple[Doubles | None, tuple[str, ...]]:
        """Where to go, None for the hold, and what is counted."""
        limits = self.limits
        array = _array(proposed)
        if array is None or array.shape != self._low.shape:
            return None, ("malformed",)
        if not np.isfinite(array).all():
            return None, ("non_finite",)
        if limits.chunk_age_s is not None and not _at_most(age_s, limits.chunk_age_s):
            return None, ("stale",)
        kinds: tuple[str, ...] = ()
        target = np.clip(array, self._low, self._high)
        if (np.abs(target - array) > self._tolerance).any():
            if limits.off_limits == "refuse":
                return None, ("off_limits",)
            kinds = ("clamped",)
        if self._box is None:
            return target, kinds
        edges = self._box.edges(position)
        if edges is None:
            return None, (*kinds, "workspace")
        inside = target.copy()
        inside[self._box.axes] = np.clip(target[self._box.axes], *edges)
        if (np.abs(inside - target) > self._tolerance).any():
            return (None if limits.off_limits == "refuse" else inside), (*kinds, "workspace")
        return target, kinds

    def _held(self) -> Doubles:
        hold = self.limits.hold
        if hold == "repeat":
            held = self._previous if self._previous is not None else np.clip(0.0, self._low, self._high)
            return np.asarray(held, np.float64)
        return np.zeros(self.limits.action_dim) if hold == "zero" else np.asarray(hold, np.float64)

    def _leave(self, target: Doubles, position: npt.ArrayLike | None) -> Floats:
        """The point nearest to `target` that the limits let the robot reach in one control step.

        Each limit leaves what it can to the next: the action's and the change's, the workspace, the second change.
        """
        low, high = self._low, self._high
        at = None if self._previous is None else self._previous.astype(np.float64)
        if at is not None and self._change is not None:
            low, high = np.maximum(low, _up(at - self._change)), np.minimum(high, _down(at + self._change))
        if self._box is not None:
            axes, edges = self._box.axes, self._box.edges(position)
            least, most = edges or (np.zeros(len(axes)),) * 2  # who does not know where it is does not move
            low, high = low.copy(), high.copy()
            low[axes], high[axes] = (
                np.clip(_up(least), low[axes], high[axes]),
                np.clip(_down(most), low[axes], high[axes]),
            )
        if at is not None and self.limits.second_change is not None:
            bend = np.asarray(self.limits.second_change)
            moving = at if self._velocity is None else at + self._velocity
            # Nearest to the second limit where the first ones leave no room for it: a harder stop is the safer one.
            low, high = np.clip(_up(moving - bend), low, high), np.clip(_down(moving + bend), low, high)
        action: Floats = np.clip(np.asarray(target).astype(np.float32), low, high).astype(np.float32)
        if self._previous is not None:
            self._velocity = action.astype(np.float64) - self._previous
        self._previous = action
        return action.copy()


_BIG = float(np.finfo(np.float32).max)
_MOST_STEPS = 1e9


def _array(proposed: Any) -> Doubles | None:
    """Numbers as float64, a masked one as NaN; None for anything else."""
    try:
        array = np.asanyarray(proposed)
        if array.dtype.kind not in "fiub":
            return None
        return np.asarray(np.ma.filled(array.astype(np.float64), np.nan))
    except Exception:  # a ragged list, a foreign object
        return None


def _at_most(value: Any, limit: float) -> bool:
    """Whether it is a number, and no larger."""
    try:
        return bool(float(value) <= limit)
    except Exception:
        return False


class _Box:
    """A workspace as arrays.

    Attributes:
        axes: entries of the action that move the position.

    Args:
        change: (A,) largest change of the action, if that is limited: whoever cannot stop at once brakes in time.
    """

    def __init__(self, workspace: Workspace, change: Doubles | None) -> None:
        self._low, self._high, self._scale = map(np.asarray, (workspace.low, workspace.high, workspace.scale))
        self.axes, self._relative = list(workspace.axes), workspace.relative
        self._change = None if change is None else change[self.axes]

    def edges(self, position: npt.ArrayLike | None) -> tuple[Doubles, Doubles] | None:
        """The least and the largest action of each axis that end in the box, and can be stopped within it; None where
        that is not known."""
        if not self._relative:
            return self._low / self._scale, self._high / self._scale
        measured = _array(position) if position is not None else None
        if measured is None or measured.shape != self._low.shape or not np.isfinite(measured).all():
            return None
        # Already outside: towards the box or nowhere, but not by force.
        below, above = np.minimum((self._low - measured) / self._scale, 0.0), (self._high - measured) / self._scale
        return -self._brake(-below), self._brake(np.maximum(above, 0.0))

    def _brake(self, room: Doubles) -> Doubles:
        """The largest v with v + (v - c) + (v - 2c) + … <= room, as far as the terms are positive; c is the change."""
        if self._change is None:
            return room
        room = np.minimum(room, _BIG) * (1 - 1e-6)  # actions are rounded to float32
        # That braking takes after this one; of any other number the result would be larger.
        steps = np.minimum(np.floor((np.sqrt(1 + 8 * (room / self._change)) - 1) / 2), _MOST_STEPS)
        return np.asarray(room / (steps + 1) + self._change * (steps / 2))


def _up(values: Doubles) -> Floats:
    """The least float32 that is not below."""
    with _QUIET():
        near = np.asarray(values, np.float64).astype(np.float32)
        beyond = np.nextafter(near, np.float32(np.inf))
        return np.where(near.astype(np.float64) < values, beyond, near).astype(np.float32)


def _down(values: Doubles) -> Floats:
    """The largest float32 that is not above."""
    with _QUIET():
        near = np.asarray(values, np.float64).astype(np.float32)
        beyond = np.nextafter(near, np.float32(-np.inf))
        return np.where(near.astype(np.float64) > values, beyond, near).astype(np.float32)


def _workspace(document: Any) -> Workspace:
    if not isinstance(document, Mapping):
        raise ConfigError(f"shield: workspace is {document!r:.80}", "give low, high, axes, scale")
    _known(document, set(Workspace.__dataclass_fields__), "shield: workspace")
    axes = document.get("axes")
    _require(isinstance(axes, list | tuple) and all(type(axis) is int for axis in axes), "workspace.axes", "be a list")
    assert isinstance(axes, list | tuple)
    low, high, scale = (_numbers(document.get(one), len(axes), f"workspace.{one}") for one in ("low", "high", "scale"))
    relative = document.get("relative", True)
    _require(isinstance(relative, bool), "workspace.relative", "be true or false")
    return Workspace(low, high, tuple(axes), scale, relative)


def _numbers(value: Any, size: int, name: str) -> tuple[float, ...]:
    """`size` numbers; one stands for all."""
    listed = list(value) if isinstance(value, list | tuple) else [value] * size
    right = len(listed) == size and all(isinstance(one, int | float) and not isinstance(one, bool) for one in listed)
    _require(right, name, f"be a number, or {size} of them")
    try:
        return tuple(float(one) for one in listed)
    except OverflowError:
        raise ConfigError(f"shield: {name} is beyond a float", "correct it in the transition contract") from None


def _known(document: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(str(key) for key in document if key not in known):
        raise ConfigError(f"{where}: unknown field {unknown[0][:80]!r}", f"known here: {', '.join(sorted(known))}")


def _require(holds: bool, name: str, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"shield: {name} must {wanted}", "correct it in the transition contract")
