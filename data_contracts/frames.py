"""Many episodes as tables, for rules that are checked over a micro-batch, a snapshot or the whole buffer.

    structure   a row per episode and field: type and shape as found and as wanted
    episodes    a row per episode: its fields, sums of its steps, and what the contract agrees on for its task
    steps       a row per time: least and greatest of each array, how many are not finite, seconds since the last row
    substeps    a row per sub-step score

The tables hold measures, never verdicts: the bounds stay in the contract. An episode of a wrong structure appears in
`structure` alone, as its other values cannot be read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from data_contracts.checks import changes, control_periods, mean_period, shapes
from data_contracts.contract import Contract
from infra.episode import Episode

UNKNOWN_TASK = "(unknown task)"


@dataclass(frozen=True)
class Frames:
    """The tables of some episodes; strings are Python objects, so that patterns mean what they mean in plain code."""

    structure: pd.DataFrame
    episodes: pd.DataFrame
    steps: pd.DataFrame
    substeps: pd.DataFrame


STRUCTURE_COLUMNS = ("episode_id", "contract", "field", "found", "wanted")
EPISODE_COLUMNS = (
    "episode_id", "robot_id", "task", "instruction", "source", "outcome", "policy_version", "started_at",
    "schema_version", "started_at_not_finite", "instruction_wanted", "steps", "max_steps", "substeps",
    "substeps_wanted", "interventions", "last_reward", "mean_period",
    "timestamps_first", "observations_changes", "actions_changes",
)  # fmt: skip
_ARRAYS = ("observations", "actions", "rewards", "timestamps")
STEP_COLUMNS = (
    "episode_id", "step", "before_last", "period",
    *(f"{name}_{measure}" for name in _ARRAYS for measure in ("min", "max", "not_finite")),
)  # fmt: skip
SUBSTEP_COLUMNS = ("episode_id", "substep_scores", "substep_scores_not_finite")


def frames(contract: Contract, episodes: Sequence[Episode]) -> Frames:
    """The tables of the episodes under the contract. An episode that is twice in the batch is twice in the tables."""
    structure: list[tuple[str, ...]] = []
    rows: list[dict[str, Any]] = []
    steps: list[pd.DataFrame] = []
    substeps: list[tuple[str, float, int]] = []
    for position, episode in enumerate(episodes):
        label = episode.episode_id if isinstance(episode.episode_id, str) else f"(number {position})"
        found = shapes(contract, episode)
        structure += [(label, one.contract, one.field, one.found, one.wanted) for one in found]
        if all(one.found == one.wanted for one in found):
            rows.append(_episode_row(contract, episode))
            steps.append(_step_rows(episode))
            substeps += [(label, float(one), int(not math.isfinite(one))) for one in episode.substep_scores]
    return Frames(
        structure=pd.DataFrame(structure, columns=list(STRUCTURE_COLUMNS), dtype=object),
        episodes=_typed(pd.DataFrame(rows, columns=list(EPISODE_COLUMNS), dtype=object)),
        steps=pd.concat(steps, ignore_index=True) if steps else pd.DataFrame(columns=list(STEP_COLUMNS), dtype=float),
        substeps=pd.DataFrame(substeps, columns=list(SUBSTEP_COLUMNS)).astype({"episode_id": object}),
    )


_FLOATS = (
    "started_at", "schema_version", "started_at_not_finite", "steps", "max_steps", "substeps", "substeps_wanted",
    "interventions", "last_reward", "mean_period", "policy_version", "timestamps_first",
    "observations_changes", "actions_changes",
)  # fmt: skip


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype(dict.fromkeys(_FLOATS, float))


def _episode_row(contract: Contract, episode: Episode) -> dict[str, Any]:
    terms = contract.tasks.get(episode.task)
    return {
        **{name: getattr(episode, name) for name in EPISODE_COLUMNS[:9]},
        "started_at_not_finite": int(not math.isfinite(episode.started_at)),
        "instruction_wanted": terms.instruction if terms else UNKNOWN_TASK,
        "steps": episode.steps,
        "max_steps": terms.max_steps if terms else None,
        "substeps": len(episode.substep_scores),
        "substeps_wanted": terms.substeps if terms else None,
        "interventions": int(episode.intervention.sum()),
        "last_reward": float(episode.rewards[-1]),
        "mean_period": mean_period(episode),
        "timestamps_first": float(episode.timestamps[0]),
        "observations_changes": int(changes(episode.observations)),
        "actions_changes": int(changes(episode.actions)),
    }


def _step_rows(episode: Episode) -> pd.DataFrame:
    """T+1 rows; actions and rewards have none at the last time, the period none at the first."""
    times = episode.steps + 1
    columns: dict[str, Any] = {
        "episode_id": np.full(times, episode.episode_id, object),
        "step": np.arange(times),
        "before_last": np.arange(times) < episode.steps - 1,
        "period": np.concatenate([[np.nan], control_periods(episode)]),
    }
    for name in _ARRAYS:
        values = np.asarray(getattr(episode, name), np.float64).reshape(len(getattr(episode, name)), -1)
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # a row of NaN alone has neither a least nor a greatest
            measures = {
                "min": np.nanmin(values, axis=1),
                "max": np.nanmax(values, axis=1),
                "not_finite": np.count_nonzero(~np.isfinite(values), axis=1).astype(np.float64),
            }
        for measure, value in measures.items():
            columns[f"{name}_{measure}"] = np.pad(value, (0, times - len(value)), constant_values=np.nan)
    return pd.DataFrame(columns)


def composition(episodes: Sequence[Episode]) -> pd.DataFrame:
    """What the offline buffer's rules count: a row per episode with its id, task, source and outcome."""
    rows = [(one.episode_id, one.task, one.source, one.outcome) for one in episodes]
    return pd.DataFrame(rows, columns=["episode_id", "task", "source", "outcome"], dtype=object)
