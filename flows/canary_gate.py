"""The canary's gate: HARM, SAFE, CONTINUE or STOP from a candidate's episodes at work, valid however often it is asked.

The same betting tests as the promotion gate's (`flows.gate`), on pairs of one episode of the candidate and one of the
champion of the same task. HARM spends half of alpha on success over all tasks, a quarter on takeovers and a quarter on
the single tasks, so that a candidate which is no worse than the margins is *ever* sent back with probability of at most
alpha. Each of them holds for any mixture and order of the tasks. SAFE is shown on rounds with one pair of each task.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from flows.gate import EpisodesSpec, shown
from flows.spec import Section, read_spec
from lwd_model.statistics import confidence_sequence, wilson

DEFAULT_CANARY = Path(__file__).parent / "gates" / "canary.yaml"
REFUSED = "refused"


class Answer(StrEnum):
    HARM = "HARM"
    SAFE = "SAFE"
    CONTINUE = "CONTINUE"
    STOP = "STOP"


class ReachSpec(Section):
    robots: int = Field(ge=1)


class MarginSpec(Section):
    margin: float = Field(ge=0, lt=1)


class SafetySpec(Section):
    refused: int = Field(0, ge=0)


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
    safety: SafetySpec = SafetySpec()
    automatic: bool = False
    baseline: BaselineSpec | None = None


@dataclass(frozen=True)
class AtWork:
    """One episode at a robot's real work.

    Attributes:
        task: task key.
        success: reached its goal, nobody taking over.
        intervened: somebody took over.
        candidate: ran by the candidate; else by the champion.
    """

    task: str
    success: bool
    intervened: bool
    candidate: bool


@dataclass(frozen=True)
class TrialDecision:
    """An answer and why.

    Attributes:
        answer: HARM, SAFE, CONTINUE or STOP.
        reasons: sentences, the decisive ones first.
        evidence: JSON values for audit and model card.
    """

    answer: Answer
    reasons: tuple[str, ...]
    evidence: dict[str, Any]


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

    rounds = min((column.shape[-1] for column in columns), default=0)
    safe = np.ones(success.shape[:-1])
    if rounds:
        together = np.stack([column[..., :rounds] for column in columns], axis=-1)
        safe = shown(together, -spec.safe.margin, alpha=alpha, planned=each)[..., -1]
    judged = columns if tasks > 1 else []
    single = [last(-column, spec.harm.margin, alpha / (4 * tasks), each) for column in judged]
    return Evidence(
        harm=last(-success, spec.harm.margin, alpha / 2, planned),
        interventions=last(takeover, spec.interventions.margin, alpha / 4, planned),
        single=np.stack(single, axis=-1) if single else np.ones((*success.shape[:-1], 0)),
        safe=safe,
    )


def harmful(spec: CanarySpec, evidence: Evidence) -> np.ndarray:
    """Whether harm of any kind is shown: (...,) booleans."""
    tasks = max(evidence.single.shape[-1], 1)
    return (
        (evidence.harm >= 2 / spec.alpha)
        | (evidence.interventions >= 4 / spec.alpha)
        | (evidence.single >= 4 * tasks / spec.alpha).any(-1)
    )


def decide_trial(spec: CanarySpec, episodes: Sequence[AtWork], tasks: Sequence[str], refused: int = 0) -> TrialDecision:
    """Judge a candidate at work.

    Args:
        spec: thresholds.
        episodes: both policies', in the order in which they came in; later calls only append.
        tasks: those that the champion had run before the trial: fixed, or the answers are not valid together.
        refused: the candidate's episodes that the data contract refused.
    """
    ran = sum(episode.candidate for episode in episodes)
    pairs = _pairs(spec, episodes)
    number = {task: k for k, task in enumerate(tasks)}
    success = np.array([pair[1] for pair in pairs], dtype=np.float64)
    takeover = np.array([pair[2] for pair in pairs], dtype=np.float64)
    task = np.array([number.get(pair[0], -1) for pair in pairs], dtype=np.int64)
    found = weigh(spec, success, takeover, task, len(tasks))
    lost = float(success.mean()) if pairs else 0.0
    rise = float(takeover.mean()) if pairs else 0.0

    harms = [f"safety: {refused} episodes refused by the contract, {spec.safety.refused} allowed"]
    if refused <= spec.safety.refused:
        harms = []
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

    if harms:
        answer, reasons = Answer.HARM, harms
    elif not holds:
        answer = Answer.SAFE
        reasons = [f"success: shown not to be lower by more than {spec.safe.margin:g} (observed {lost:+.2f})"]
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
        "safety": {REFUSED: refused},
    }
    return TrialDecision(answer, tuple(reasons), evidence)


def _pairs(spec: CanarySpec, episodes: Sequence[AtWork]) -> list[tuple[str, float, float]]:
    """(task, difference in success, difference in takeovers), in the order in which both halves were there."""
    pairs: list[tuple[str, float, float]] = []
    if spec.baseline is not None:
        rates, takeovers = spec.baseline.success, spec.baseline.interventions
        for new in episodes:
            if new.candidate and new.task in rates:
                pairs.append((new.task, new.success - rates[new.task], new.intervened - takeovers))
        return pairs
    waiting: dict[tuple[str, bool], deque[AtWork]] = defaultdict(deque)
    for episode in episodes:
        others = waiting[episode.task, not episode.candidate]
        if not others:
            waiting[episode.task, episode.candidate].append(episode)
            continue
        other = others.popleft()
        new, old = (episode, other) if episode.candidate else (other, episode)
        pairs.append((new.task, float(new.success) - old.success, float(new.intervened) - old.intervened))
    return pairs


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
