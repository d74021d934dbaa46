"""The canary's gate: HARM, SAFE, CONTINUE or STOP from a candidate's episodes at work, valid however often it is asked.

The same betting tests as the promotion gate's (`flows.gate`), on concurrent pairs (`flows.canary_pairs`).

HARM spends half of alpha on success over all tasks, a quarter on takeovers and a quarter on the single tasks, so that a
candidate which is no worse than the margins is *ever* sent back with probability of at most alpha. Each of them holds
for any mixture and order of the tasks. SAFE is shown on rounds with one pair of each task; so is "better", at the level
of the trial in the deployment's stream of candidates: many that are SAFE may each lose a little; they are not better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from flows.canary_pairs import AtWork, Pair, concurrent_pairs, pairs_with_rates
from flows.gate import EpisodesSpec, GateSpec, episodes_at, shown
from flows.spec import Section, read_spec
from lwd_model.statistics import confidence_sequence, wilson

DEFAULT_CANARY = Path(__file__).parent / "gates" / "canary.yaml"
REFUSED = "refused"
HOUR_S = 3600.0
_MAX_KINDS = 100  # of safety events in the evidence, the most frequent ones
_MAX_NAMED = 10  # kinds of safety events in the reasons


class Answer(StrEnum):
    HARM = "HARM"
    SAFE = "SAFE"
    CONTINUE = "CONTINUE"
    STOP = "STOP"


class ReachSpec(Section):
    robots: int = Field(ge=1)


class MarginSpec(Section):
    margin: float = Field(ge=0, lt=1)


class HoursSpec(Section):
    max: float = Field(24.0, gt=0)


class BaselineSpec(Section):
    success: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1)
    interventions: float = Field(0.0, ge=0, le=1)


class CanarySpec(Section):
    """A canary's thresholds; `flows/gates/canary.yaml` explains each."""

    version: Literal[1]
    alpha: float = Field(gt=0, lt=0.5)
    reach: ReachSpec
    episodes: EpisodesSpec
    harm: MarginSpec
    interventions: MarginSpec
    safe: MarginSpec
    safety: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    window_hours: float = Field(1.0, gt=0)
    hours: HoursSpec = HoursSpec()
    automatic: bool = False
    baseline: BaselineSpec | None = None


@dataclass(frozen=True)
class Standing:
    """A trial's place in the stream of candidates.

    Attributes:
        level: at which the candidate must be shown better to be promoted by itself.
        planned: pairs of all tasks at which most of the power is wanted.
        opened_at: pairs with a half committed before do not count, the catalog's clock.
    """

    level: float
    planned: int
    opened_at: float

    @classmethod
    def of(cls, spec: GateSpec, level: float, opened_at: float) -> Standing:
        """From the stream's spec, with the canary's numbers of episodes."""
        return cls(level, episodes_at(spec, level).planned, opened_at)


@dataclass(frozen=True)
class TrialDecision:
    """An answer and why.

    Attributes:
        answer: HARM, SAFE, CONTINUE or STOP.
        reasons: sentences, the decisive ones first.
        evidence: JSON values for audit and model card.
        better: whether it is also shown to be better than the champion, at the level of its trial.
    """

    answer: Answer
    reasons: tuple[str, ...]
    evidence: dict[str, Any]
    better: bool = False


@dataclass(frozen=True)
class Evidence:
    """What was shown so far; each is the largest so far, so that it stays shown.

    Attributes:
        harm: (...,) against "the candidate loses at most `harm.margin` of success"; needs 2/alpha.
        interventions: (...,) against "takeovers rise by at most `interventions.margin`"; needs 4/alpha.
        single: (..., K) against "this task loses at most `harm.margin`"; needs 4K/alpha; K = 0 for a single task.
        safe: (...,) against "the task-averaged success is lower by `safe.margin` or more"; needs 1/alpha.
    """

    harm: np.ndarray
    interventions: np.ndarray
    single: np.ndarray
    safe: np.ndarray


def load_canary(path: Path = DEFAULT_CANARY) -> CanarySpec:
    """Read and validate a canary's file; raises as `flows.spec.read_spec`."""
    return read_spec(path, CanarySpec, DEFAULT_CANARY)


def weigh(spec: CanarySpec, success: np.ndarray, takeover: np.ndarray, task: np.ndarray, tasks: int) -> Evidence:
    """The evidence of pairs: candidate minus champion.

    Args:
        spec: margins and alpha.
        success, takeover: (..., P) differences in [-1, 1], pairs in the order in which they became complete.
        task: (P,) number of each pair's task; -1 for one that is not among the K judged one by one.
        tasks: K, fixed before the trial.
    """
    alpha, planned = spec.alpha, spec.episodes.planned
    each = max(1, planned // max(tasks, 1))
    columns = [success[..., task == k] for k in range(tasks)]

    def last(values: np.ndarray, null: float, level: float, aim: int) -> np.ndarray:
        """Against "the mean is at most `null`" after the last of (..., P) values."""
        if values.shape[-1] == 0:
            return np.ones(values.shape[:-1])
        return shown(values[..., None], null, alpha=level, planned=aim)[..., -1]

    judged = columns if tasks > 1 else []
    single = [last(-column, spec.harm.margin, alpha / (4 * tasks), each) for column in judged]
    return Evidence(
        harm=last(-success, spec.harm.margin, alpha / 2, planned),
        interventions=last(takeover, spec.interventions.margin, alpha / 4, planned),
        single=np.stack(single, axis=-1) if single else np.ones((*success.shape[:-1], 0)),
        safe=_in_rounds(columns, -spec.safe.margin, alpha, each, success.shape[:-1]),
    )


def weigh_better(standing: Standing, success: np.ndarray, task: np.ndarray, tasks: int) -> np.ndarray:
    """Evidence against "the task-averaged success is at most the champion's"; needs 1/level: (...,).

    Args:
        standing: the trial's place in the stream.
        success, task, tasks: as `weigh` has them, of the pairs since the trial was opened.
    """
    columns = [success[..., task == k] for k in range(tasks)]
    each = max(1, standing.planned // max(tasks, 1))
    return _in_rounds(columns, 0.0, standing.level, each, success.shape[:-1])


def _in_rounds(
    columns: Sequence[np.ndarray], null: float, alpha: float, planned: int, lead: tuple[int, ...]
) -> np.ndarray:
    """Evidence against "the task-averaged mean is at most `null`" from whole rounds: one pair of each task."""
    rounds = min((column.shape[-1] for column in columns), default=0)
    if not rounds:
        return np.ones(lead)
    together = np.stack([column[..., :rounds] for column in columns], axis=-1)
    return shown(together, null, alpha=alpha, planned=planned)[..., -1]


def harmful(spec: CanarySpec, evidence: Evidence) -> np.ndarray:
    """Whether harm of any kind is shown: (...,) booleans."""
    tasks = max(evidence.single.shape[-1], 1)
    return (
        (evidence.harm >= 2 / spec.alpha)
        | (evidence.interventions >= 4 / spec.alpha)
        | (evidence.single >= 4 * tasks / spec.alpha).any(-1)
    )


def decide_trial(
    spec: CanarySpec,
    episodes: Sequence[AtWork],
    tasks: Sequence[str],
    refused: int = 0,
    withdrawn: int = 0,
    *,
    standing: Standing | None = None,
) -> TrialDecision:
    """Judge a candidate at work.

    Args:
        spec: thresholds.
        episodes: both policies' since the trial began, in the order in which they came in; later calls only append.
        tasks: those that the champion had run before the trial: fixed, or the answers are not valid together.
        refused: the candidate's episodes that the data contract refused.
        withdrawn: its episodes that were accepted and then withdrawn: they count in the bound alone.
        standing: of a trial that may promote by itself.
    """
    ran = sum(episode.candidate for episode in episodes) + withdrawn
    pairs = _pairs(spec, episodes)
    number = {task: k for k, task in enumerate(tasks)}
    success = np.array([pair.success for pair in pairs], dtype=np.float64)
    takeover = np.array([pair.takeover for pair in pairs], dtype=np.float64)
    task = np.array([number.get(pair.task, -1) for pair in pairs], dtype=np.int64)
    found = weigh(spec, success, takeover, task, len(tasks))
    lost = float(success.mean()) if pairs else 0.0
    rise = float(takeover.mean()) if pairs else 0.0

    counted = _events(episodes, refused)
    harms = _unsafe(spec, counted)
    if found.harm >= 2 / spec.alpha:
        harms.append(f"success: shown to be lower by more than {spec.harm.margin:g} (observed {lost:+.2f})")
    if found.interventions >= 4 / spec.alpha:
        harms.append(f"takeovers: shown to rise by more than {spec.interventions.margin:g} (observed {rise:+.2f})")
    for k in range(found.single.shape[-1]):
        if found.single[k] >= 4 * len(tasks) / spec.alpha:
            seen = float(success[task == k].mean())
            harms.append(f"{tasks[k]}: shown to be lower by more than {spec.harm.margin:g} (observed {seen:+.2f})")

    holds: list[str] = []
    if len(pairs) < spec.episodes.min:
        holds.append(f"{len(pairs)} pairs of episodes, at least {spec.episodes.min} are needed")
    if absent := [name for name, k in number.items() if not (task == k).any()]:
        holds.append(f"no pair of episodes yet of {', '.join(absent)}")
    if found.safe < 1 / spec.alpha:
        holds.append(
            f"not yet shown to be within {spec.safe.margin:g} of the champion (observed {lost:+.2f}, "
            f"evidence {float(found.safe):.3g} of {1 / spec.alpha:.3g})"
        )
    if rise > spec.interventions.margin:
        holds.append(f"takeovers look more frequent by more than {spec.interventions.margin:g} (observed {rise:+.2f})")

    e_better, wanted, better = 1.0, 0.0, False
    if standing is not None:
        since = np.array([pair.since >= standing.opened_at for pair in pairs], dtype=bool)
        e_better, wanted = float(weigh_better(standing, success[since], task[since], len(tasks))), 1 / standing.level
        better = e_better >= wanted

    if harms:
        answer, reasons = Answer.HARM, harms
    elif not holds:
        answer = Answer.SAFE
        reasons = [f"success: shown not to be lower by more than {spec.safe.margin:g} (observed {lost:+.2f})"]
        if standing is not None:
            said = "also shown" if better else "not yet shown"
            reasons.append(f"{said} to be better than the champion (evidence {e_better:.3g} of {wanted:.3g})")
    elif ran >= spec.episodes.max:
        answer, reasons = Answer.STOP, [f"the bound of {spec.episodes.max} episodes is reached", *holds]
    else:
        answer, reasons = Answer.CONTINUE, holds
    evidence = {
        "spec": spec.model_dump(),
        "episodes": ran,
        "pairs": len(pairs),
        "success": _difference(spec, success),
        "interventions": _difference(spec, takeover),
        "e_harm": float(found.harm),
        "e_interventions": float(found.interventions),
        "e_safe": float(found.safe),
        "per_task": _per_task(spec, episodes),
        "safety": counted,
        "better": None if standing is None else {"evidence": e_better, "needed": wanted, "level": standing.level},
    }
    return TrialDecision(answer, tuple(reasons), evidence, better)


def _pairs(spec: CanarySpec, episodes: Sequence[AtWork]) -> list[Pair]:
    if spec.baseline is not None:
        return pairs_with_rates(episodes, spec.baseline.success, spec.baseline.interventions)
    return concurrent_pairs(episodes, spec.window_hours * HOUR_S)


def _events(episodes: Sequence[AtWork], refused: int) -> dict[str, int]:
    """The candidate's safety events by kind, and its episodes that the contract refused."""
    counts = Counter({REFUSED: refused})
    for episode in episodes:
        if episode.candidate:
            counts.update(episode.safety)
    return dict(counts.most_common(_MAX_KINDS))


def _unsafe(spec: CanarySpec, counted: dict[str, int]) -> list[str]:
    beyond = [(kind, count) for kind, count in counted.items() if count > spec.safety.get(kind, 0)]
    harms = [
        f"safety: {count} {'episodes refused by the contract' if kind == REFUSED else f'{kind} events'}, "
        f"{spec.safety.get(kind, 0)} allowed"
        for kind, count in beyond[:_MAX_NAMED]
    ]
    return [*harms, f"safety: {len(beyond) - _MAX_NAMED} more kinds of events"] if len(beyond) > _MAX_NAMED else harms


def _difference(spec: CanarySpec, values: np.ndarray) -> dict[str, float]:
    level = 1 - 2 * spec.alpha
    return confidence_sequence(values[:, None], level=level, planned=spec.episodes.planned).as_dict()


def _per_task(spec: CanarySpec, episodes: Sequence[AtWork]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for task in sorted({episode.task for episode in episodes}):
        row: dict[str, Any] = {}
        for who, candidate in (("candidate", True), ("champion", False)):
            chosen = [e for e in episodes if e.task == task and e.candidate == candidate]
            k, n = sum(e.success for e in chosen), len(chosen)
            row[who] = {"k": k, "n": n, "success": wilson(k, n).as_dict()}
            row[f"{who}_takeovers"] = sum(e.intervened for e in chosen)
        if spec.baseline is not None:
            row["baseline"] = spec.baseline.success.get(task)
        table[task] = row
    return table
