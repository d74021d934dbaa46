"""What an evaluation says: per-episode results, and the record of one method with its intervals.

Three figures as in section V-A: success within the time limit, the step-wise score (each annotated sub-step 1, 0.5
or 0), and the cycle time over successes and failures, failures counted at the task's time limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from infra.episode import Episode
from infra.errors import ConfigError, CorruptDataError
from lwd_model.statistics import Interval, bootstrap, wilson

GROUPS: dict[str, str] = {"short": "S", "long": "L"}
"""The suite's groups, by the first letter of a task's key."""

ACTION_TOLERANCE = 1e-4
_MOST_EVENTS = 10**9


@dataclass(frozen=True)
class EpisodeResult:
    """One evaluation episode, reduced to what the statistics need.

    Attributes:
        task: task key.
        seed: of the start state; the same for both policies of a paired comparison.
        success: reached the goal within the limit.
        score: step-wise score in [0, 1].
        cycle_time_s: seconds until success, or the task's limit.
        steps: control steps taken.
        safety: counters of unsafe events; absent or 0 is clean.
    """

    task: str
    seed: int
    success: bool
    score: float
    cycle_time_s: float
    steps: int
    safety: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> EpisodeResult:
        """Inverse of `as_dict`.

        Raises:
            CorruptDataError: a field is missing or unknown.
        """
        names = {item.name for item in fields(cls)}
        if set(raw) - names or (names - {"safety"}) - set(raw):
            raise CorruptDataError(
                f"evaluation record with the fields {sorted(raw)}, not {sorted(names)}", "evaluate again"
            )
        return cls(**raw)


def safety_counters(episode: Episode) -> dict[str, int]:
    """Unsafe events of an episode: steps with non-finite values or actions beyond the limits, and the robot's own.

    The robot's own counters (of its shield, emergency stops, collisions, ...) are `episode.extra["safety"]`: {name:
    count}. They can only add: what is no count of events there is counted as `unreadable_safety`.
    """
    finite = np.isfinite(episode.actions).all(axis=1)
    within = (np.abs(np.where(np.isfinite(episode.actions), episode.actions, 0.0)) <= 1 + ACTION_TOLERANCE).all(axis=1)
    counts = Counter(
        non_finite=int((~finite).sum() + (~np.isfinite(episode.observations)).any(axis=1).sum()),
        action_limit=int((~within).sum()),
    )
    reported = episode.extra.get("safety", {})
    for name, count in reported.items() if isinstance(reported, dict) else [("", None)]:
        if isinstance(name, str) and len(name) <= 64 and type(count) is int and 0 <= count <= _MOST_EVENTS:
            counts[name] += count
        else:
            counts["unreadable_safety"] += 1
    return {name: count for name, count in sorted(counts.items()) if count}


def result_of(episode: Episode, *, seed: int | None = None, limit_s: float | None = None) -> EpisodeResult:
    """Reduce an episode.

    Args:
        episode: a finished evaluation episode.
        seed: of its start state; `episode.extra["seed"]` when not given.
        limit_s: the task's time limit in seconds; a failure counts at it, even when it was stopped early. Without
            it a failure counts at its own length.

    Raises:
        ConfigError: no seed is known: the episode cannot be paired.
    """
    if seed is None:
        if "seed" not in episode.extra:
            raise ConfigError(
                f"evaluation episode {episode.episode_id} of task {episode.task} has no seed",
                'pass seed=, or record extra["seed"] when the episode is run',
            )
        seed = int(episode.extra["seed"])
    seconds = float(episode.timestamps[-1] - episode.timestamps[0])
    if limit_s is not None:
        seconds = min(seconds, limit_s) if episode.success else limit_s
    return EpisodeResult(
        task=episode.task,
        seed=seed,
        success=episode.success,
        score=episode.score,
        cycle_time_s=seconds,
        steps=episode.steps,
        safety=safety_counters(episode),
    )


def method_record(
    runs: Sequence[Sequence[EpisodeResult]],
    *,
    updates: int | None = None,
    env_steps: int | None = None,
    level: float = 0.95,
) -> dict[str, Any]:
    """The record of one method: averages over tasks with intervals, and each task.

    Intervals: a hierarchical bootstrap over training seeds and episodes (`statistics.bootstrap`). A success rate's
    interval is never narrower than Wilson's on the pooled episodes, which stays honest at 0 and 1.

    Args:
        runs: per training seed, the evaluation episodes of its policy.
        updates: learner updates that the policy has had, if known.
        env_steps: control steps of data collected online for it, if known.
        level: coverage.

    Returns:
        {"success", "short", "long", "score", "cycle_time_s": {"mean", "low", "high"} (None where no task of the group
        was run), "per_task": {task: {"n", "k", "score", "success", "cycle_time_s"}}, "env_steps", "updates"}; "n"
        and "k" are summed over seeds.

    Raises:
        ConfigError: no episode, or seeds evaluated on different tasks.
    """
    if not runs or not all(runs):
        raise ConfigError("an evaluation without episodes", "evaluate before making the record")
    tasks = sorted({result.task for run in runs for result in run}, key=_suite_order)
    per_task: dict[str, Any] = {}
    for task in tasks:
        chosen = [result for run in runs for result in run if result.task == task]
        k = sum(result.success for result in chosen)
        per_task[task] = {
            "n": len(chosen),
            "k": k,
            "score": float(np.mean([result.score for result in chosen])),
            "cycle_time_s": float(np.mean([result.cycle_time_s for result in chosen])),
            "success": wilson(k, len(chosen), level).as_dict(),
        }
    record: dict[str, Any] = {"success": _success(runs, tasks, level).as_dict()}
    for group, letter in GROUPS.items():
        members = [task for task in tasks if task.startswith(letter)]
        record[group] = _success(runs, members, level).as_dict() if members else None
    record["score"] = bootstrap(_columns(runs, tasks, "score"), level=level).as_dict()
    record["cycle_time_s"] = bootstrap(_columns(runs, tasks, "cycle_time_s"), level=level).as_dict()
    return record | {"per_task": per_task, "env_steps": env_steps, "updates": updates}


def _success(runs: Sequence[Sequence[EpisodeResult]], tasks: Sequence[str], level: float) -> Interval:
    resampled = bootstrap(_columns(runs, tasks, "success"), level=level)
    pooled = [result.success for run in runs for result in run if result.task in tasks]
    floor = wilson(sum(pooled), len(pooled), level)
    # Wilson's interval is moved onto the task-average, from which unequal episode counts may part it.
    shift = resampled.mean - floor.mean
    low, high = min(resampled.low, floor.low + shift), max(resampled.high, floor.high + shift)
    return Interval(resampled.mean, max(0.0, low), min(1.0, high))


def _columns(runs: Sequence[Sequence[EpisodeResult]], tasks: Sequence[str], name: str) -> list[dict[str, Any]]:
    return [{task: [float(getattr(r, name)) for r in run if r.task == task] for task in tasks} for run in runs]


def _suite_order(task: str) -> tuple[bool, str]:
    return (not task.startswith("S"), task)
