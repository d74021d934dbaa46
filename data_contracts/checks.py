"""One episode against its contract, in plain code: what the coordinator runs on every arrival, well under 1 ms.

A value that is NaN is a matter of the `finite` rules alone; the other rules pass over it. A check returns the message
of a breach, or None. An episode whose fields are not of their types is judged by the schema rules only.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_contracts.contract import Contract, Field, load_contract
from data_contracts.rules import Rule, Severity
from infra.episode import MAX_REASON_CHARS, Episode
from infra.errors import named, shown

Check = Callable[[Rule, Contract, Episode], str | None]


@dataclass(frozen=True)
class Violation:
    """A broken rule: its id, how bad that is, what was found where, who answers for it, and the field (or None)."""

    rule: str
    severity: Severity
    message: str
    owner: str
    field: str | None = None


@dataclass(frozen=True)
class Shape:
    """What a field is and what it should be, in words such as `float32 (13, 7)` or `str`."""

    field: str
    found: str
    wanted: str
    contract: str  # which contract speaks of the field: `episode` or `transition`


def check_episode(contract: Contract, episode: Episode) -> list[Violation]:
    """Every rule that the episode breaks, in the contract's order; empty if it may enter a snapshot."""
    if violations := list(_schema(contract, episode)):
        return violations
    for rule in contract.rules:
        if rule.check not in _BATCH_ONLY and (message := CHECKS[rule.check](rule, contract, episode)) is not None:
            message = shown(message, MAX_REASON_CHARS)
            violations.append(Violation(rule.id, rule.severity, message, rule.owner, rule.field))
    return violations


@functools.cache
def default_contract() -> Contract:
    """The episode contract in force (LWD_CONTRACTS or the packaged one), read once in a process."""
    return load_contract("episode")


def default_check(episode: Episode) -> list[Violation]:
    """`check_episode` with the contract in force: `--check data_contracts.checks:default_check`."""
    return check_episode(default_contract(), episode)


def shapes(contract: Contract, episode: Episode) -> list[Shape]:
    """Type and shape of every field of the contract, as found and as wanted. T is the number of rows of `actions`."""
    actions = episode.actions
    # an episode has at least one step; `actions` itself only says how many
    steps = max(1, actions.shape[0]) if isinstance(actions, np.ndarray) and actions.ndim == 2 else 1
    return [_shape(contract, field, getattr(episode, field.name, None), steps) for field in contract.fields]


def _shape(contract: Contract, field: Field, value: Any, steps: int) -> Shape:
    if field.rows:
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        sizes: tuple[int, ...] = (steps + 1 if field.rows == "T+1" else steps,)
        if field.name == "actions":
            sizes = (*sizes, contract.action_dim)
        elif field.name == "observations":
            free = value.shape[1] if isinstance(value, np.ndarray) and value.ndim == 2 else 1
            sizes = (*sizes, contract.observation_dim or max(1, free))
        return Shape(field.name, found, f"{field.dtype} {sizes}", "transition")
    found = type(value).__name__
    fits = {
        "string": isinstance(value, str),
        "integer": isinstance(value, int) and _is_number(value),
        "number": _is_number(value),
        "boolean": isinstance(value, bool),
        "array": isinstance(value, tuple | list) and all(_is_number(one) for one in value),
        "object": isinstance(value, dict),
    }[field.kind]
    if value is None and not field.required:
        fits = True
    if field.kind == "array" and isinstance(value, tuple | list) and not fits:
        found = f"{found} of {', '.join(sorted({type(one).__name__ for one in value}))}"
    if isinstance(value, int) and not isinstance(value, bool) and not _is_number(value):
        found = "int beyond 64 bits"
    wanted = {"string": "str", "integer": "int", "array": "tuple of numbers"}.get(field.kind, field.kind)
    return Shape(field.name, found, found if fits else wanted, "episode")


def _is_number(value: Any) -> bool:
    """A JSON number that a table can hold: no truth value, no integer beyond 64 bits."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _schema(contract: Contract, episode: Episode) -> Iterable[Violation]:
    wrong = [shape for shape in shapes(contract, episode) if shape.found != shape.wanted]
    if not wrong:
        return
    for rule in contract.rules:
        if rule.check == "schema":
            for shape in wrong:
                if shape.contract == rule.contract:
                    message = f"{shape.field} is {shape.found}, not {shape.wanted}"
                    yield Violation(rule.id, rule.severity, message, rule.owner, shape.field)


def bounds(rule: Rule) -> tuple[float | None, float | None]:
    """Lowest and highest value of a `range`, `period` or `starts_at_zero` rule, tolerance included; None: no bound."""
    given = rule.parameters
    if rule.check == "starts_at_zero":
        return -given.get("tolerance", 0), given.get("tolerance", 0)
    if rule.check == "period":
        return given["nominal"] - given["tolerance"], given["nominal"] + given["tolerance"]
    tolerance = given.get("tolerance", 0)
    low, high = given.get("min"), given.get("max")
    return None if low is None else low - tolerance, None if high is None else high + tolerance


def control_periods(episode: Episode) -> npt.NDArray[np.float64]:
    """(T,) seconds from each step to the next; NaN where a timestamp is."""
    with np.errstate(invalid="ignore"):
        return np.diff(episode.timestamps)


def mean_period(episode: Episode) -> float:
    """Seconds a step took on average over the episode."""
    with np.errstate(invalid="ignore"):
        return float((episode.timestamps[-1] - episode.timestamps[0]) / episode.steps)


def changes(values: npt.NDArray[Any]) -> bool:
    """Whether any row differs from the first; NaN differs from all, and is the `finite` rules' matter."""
    return bool((values != values[0]).any())


def _values(rule: Rule, episode: Episode) -> npt.NDArray[Any] | None:
    """The field in float64, whether it is one value or many; None if the episode has none."""
    value = getattr(episode, str(rule.field))
    return None if value is None else np.asarray(value, np.float64)


def _where(field: str | None, bad: npt.NDArray[np.bool_], values: npt.NDArray[Any]) -> str:
    """`actions[17, 3] = 1.7 (4 such)`: the first offender and how many there are."""
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    index = f"[{', '.join(map(str, first))}]" if first else ""
    count = int(np.count_nonzero(bad))
    return f"{field}{index} = {values[first]:.6g}" + (f" ({count} such values)" if count > 1 else "")


def outside(low: float | None, high: float | None) -> str:
    """What is wrong with a value beyond these bounds, in words."""
    if low is None or high is None:
        return f"above {high:g}" if low is None else f"below {low:g}"
    return f"outside [{low:g}, {high:g}]"


def _finite(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    values = _values(rule, episode)
    if values is None or (finite := np.isfinite(values)).all():
        return None
    return f"{_where(rule.field, ~finite, values)} is not finite"


def _range(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    values = _values(rule, episode)
    if values is None or not values.size:
        return None
    low, high = bounds(rule)
    bad = np.zeros(values.shape, bool)
    if low is not None:
        bad |= values < low
    if high is not None:
        bad |= values > high
    return f"{_where(rule.field, bad, values)} is {outside(low, high)}" if bad.any() else None


def _allowed(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    value, allowed = getattr(episode, str(rule.field)), rule.parameters["values"]
    if isinstance(value, str | None):
        return None if value is None or value in allowed else f"{rule.field} is {named(value)}, not one of {allowed}"
    values = np.asarray(value, np.float64)
    bad = ~np.isin(values, allowed) & ~np.isnan(values)
    return f"{_where(rule.field, bad, values)} is not one of {allowed}" if bad.any() else None


def _pattern(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    value, pattern = getattr(episode, str(rule.field)), rule.parameters["pattern"]
    if value is None or re.search(pattern, value):
        return None
    return f"{rule.field} {named(value)} does not match {pattern}"


def _increasing(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    bad = control_periods(episode) <= 0
    if not bad.any():
        return None
    at = int(np.argmax(bad))
    return f"{rule.field} goes from {episode.timestamps[at]:.6g} to {episode.timestamps[at + 1]:.6g} s at step {at}"


def _starts_at_zero(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    low, high = bounds(rule)
    assert low is not None and high is not None  # it has both
    first = float(getattr(episode, str(rule.field))[0])
    return f"{rule.field}[0] = {first:.6g} is {outside(low, high)}" if first < low or first > high else None


def _changes(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    values = getattr(episode, str(rule.field))
    return None if changes(values) else f"all {len(values)} rows of {rule.field} are the same"


def _period(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    low, high = bounds(rule)
    assert low is not None and high is not None  # a period rule has both
    if rule.parameters["of"] == "mean":
        mean = mean_period(episode)
        return f"steps take {mean:.4g} s on average, {outside(low, high)}" if mean < low or mean > high else None
    periods = control_periods(episode)
    bad = (periods < low) | (periods > high)
    return f"{_where('period', bad, periods)} s is {outside(low, high)}" if bad.any() else None


def _reward_at_end(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    early = episode.rewards[:-1]
    bad = (early != 0) & ~np.isnan(early)
    return f"{_where('rewards', bad, early)} before the last step" if bad.any() else None


def _intervention_by_source(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    if episode.source not in rule.parameters["never"] or not episode.intervention.any():
        return None
    return f"an episode of source {episode.source} has {int(episode.intervention.sum())} steps of intervention"


def _instruction_of_task(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    terms = contract.tasks.get(episode.task)
    if terms is None:
        return f"task {named(episode.task)} is unknown; the contract has {', '.join(contract.tasks)}"
    if episode.instruction != terms.instruction:
        return f"instruction {named(episode.instruction)} is not task {episode.task}'s {terms.instruction!r}"
    return None


def _steps_of_task(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    terms = contract.tasks.get(episode.task)
    if terms is None or episode.steps <= terms.max_steps:
        return None
    return f"{episode.steps} steps are more than task {episode.task}'s {terms.max_steps}"


def _substeps_of_task(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    terms = contract.tasks.get(episode.task)
    if terms is None or len(episode.substep_scores) == terms.substeps:
        return None
    return f"{len(episode.substep_scores)} sub-step scores, but task {episode.task} has {terms.substeps} sub-steps"


def _outcome_by_source(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    outcomes = rule.parameters["outcomes"].get(episode.source)
    if outcomes is None or episode.outcome in outcomes:
        return None
    return f"an episode of source {episode.source} ended in {named(episode.outcome)}, not in {' or '.join(outcomes)}"


def _outcome_reward(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    last = float(episode.rewards[-1])
    if np.isnan(last) or (last == 1) == (episode.outcome == "success"):
        return None
    return f"the outcome is {named(episode.outcome)} and the last reward {last:g}"


def _policy_version_by_source(rule: Rule, contract: Contract, episode: Episode) -> str | None:
    if episode.policy_version is None and episode.source in rule.parameters.get("required", ()):
        return f"an episode of source {episode.source} has no policy_version"
    if episode.policy_version is not None and episode.source in rule.parameters.get("forbidden", ()):
        return f"an episode of source {episode.source} has policy_version {episode.policy_version}"
    return None


_BATCH_ONLY = {"schema", "unique"}  # the schema goes before all; uniqueness is of a batch, and of the catalog's key
CHECKS: dict[str, Check] = {
    "finite": _finite,
    "range": _range,
    "allowed": _allowed,
    "pattern": _pattern,
    "increasing": _increasing,
    "starts_at_zero": _starts_at_zero,
    "changes": _changes,
    "period": _period,
    "reward_at_end": _reward_at_end,
    "intervention_by_source": _intervention_by_source,
    "instruction_of_task": _instruction_of_task,
    "steps_of_task": _steps_of_task,
    "substeps_of_task": _substeps_of_task,
    "outcome_by_source": _outcome_by_source,
    "outcome_reward": _outcome_reward,
    "policy_version_by_source": _policy_version_by_source,
}
