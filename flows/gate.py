"""The promotion gate: PASS, FAIL or CONTINUE from paired evaluation episodes, valid however often it is asked.

The evidence is a betting test (`lwd_model.statistics`): under "the candidate is not better on average over the
tasks" the probability that *any* of the answers given over time is PASS is at most the trial's level. Too little
evidence is CONTINUE, never PASS. Episodes enter in rounds, one per task, ordered by seed: later batches must use larger
seeds.

Candidates come in a stream, and of many that are no better one has luck. The t-th trial is therefore judged at level

    alpha_t = alpha * t^-d / zeta(d) * (promotions before it + 1)                                            (e-LOND)

at which the expected share of false promotions among all is at most alpha at any time, however the trials depend on
each other (Xu and Ramdas, "Online multiple testing with e-values", AISTATS 2024); while no candidate is better, the
probability that any is ever promoted is at most alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from scipy.special import zeta

from flows.spec import Section, read_spec
from infra.errors import ConfigError
from lwd_model.evaluation import EpisodeResult
from lwd_model.statistics import betting_evidence, confidence_sequence, wilson

DEFAULT_GATE = Path(__file__).parent / "gates" / "default.yaml"


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    CONTINUE = "CONTINUE"


class EpisodesSpec(Section):
    """Episodes: per task in a gate, in all in a canary."""

    min: int = Field(ge=1)
    planned: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> EpisodesSpec:
        if not self.min <= self.planned <= self.max:
            raise ValueError("needs min <= planned <= max")
        return self


class PooledSpec(Section):
    superiority: float = Field(0.0, ge=0, lt=1)


class StreamSpec(Section):
    decay: float = Field(1.2, gt=1, le=4)


class ReferenceSpec(Section):
    margin: float = Field(0.05, ge=0, lt=1)


class PerTaskSpec(Section):
    margin: float = Field(ge=0, lt=1)
    rule: Literal["not_worse", "shown"] = "not_worse"


class GateSpec(Section):
    """A gate's thresholds; `flows/gates/default.yaml` explains each."""

    version: Literal[1]
    alpha: float = Field(gt=0, lt=0.5)
    episodes: EpisodesSpec
    pooled: PooledSpec = PooledSpec()
    per_task: PerTaskSpec
    stream: StreamSpec = StreamSpec()
    reference: ReferenceSpec = ReferenceSpec()
    safety: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """An answer and why.

    Attributes:
        verdict: PASS, FAIL or CONTINUE.
        reasons: sentences, the decisive ones first.
        evidence: JSON values for the model card: spec, counts, differences with anytime-valid intervals, e-values,
            safety counters.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    evidence: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": str(self.verdict), "reasons": list(self.reasons), "evidence": self.evidence}


def load_gate(path: Path = DEFAULT_GATE) -> GateSpec:
    """Read and validate a promotion gate's file; raises as `flows.spec.read_spec`."""
    return read_spec(path, GateSpec, DEFAULT_GATE)


def share_at(spec: GateSpec, position: int) -> float:
    """What the trial that is number `position` of a deployment, from 1, takes of the stream's alpha."""
    return float(spec.alpha * position**-spec.stream.decay / zeta(spec.stream.decay))


def level_at(spec: GateSpec, position: int, promotions: int, spent: float = 0.0) -> float:
    """The level of the trial that is number `position` of a deployment, after so many promotions (e-LOND).

    Args:
        spent: the sum of the shares of the trials before it, which another file may have given them; together they
            never take more than alpha. Without such a change there is always enough left.
    """
    share = min(share_at(spec, position), max(0.0, spec.alpha - spent))
    return min(spec.alpha, share * (promotions + 1))


def episodes_at(spec: GateSpec, level: float) -> EpisodesSpec:
    """Episodes a task at a level: more evidence takes more of them, in proportion to log(1/level)."""
    longer = max(1.0, math.log(1 / level) / math.log(1 / spec.alpha))
    e = spec.episodes
    return EpisodesSpec(min=e.min, planned=math.ceil(e.planned * longer), max=math.ceil(e.max * longer))


def decide(
    spec: GateSpec,
    candidate: Sequence[EpisodeResult],
    champion: Sequence[EpisodeResult],
    *,
    level: float | None = None,
    reference: Sequence[EpisodeResult] | None = None,
) -> Decision:
    """Judge a candidate against the champion, and against the reference where that is another policy.

    Args:
        spec: thresholds.
        candidate: its evaluation episodes so far; may be fewer than the champion's.
        champion: the champion's. Episodes of one task are paired by seed; where no seed is shared they are paired
            in the order of their seeds, which is valid but tells less.
        level: of this trial in the stream of candidates; the gate's own alpha if it stands alone.
        reference: the best champion's so far: the candidate must not look worse than it in any task.

    Raises:
        ConfigError: the two were evaluated on different tasks, or a policy ran one (task, seed) twice.
    """
    rounds, tasks, paired = _pair(candidate, champion)
    alpha, margin = spec.alpha, spec.per_task.margin
    level = alpha if level is None else level
    episodes = episodes_at(spec, level)
    n, interval = rounds.shape[0], 1 - 2 * alpha
    gain = spec.pooled.superiority
    history = trace(spec, rounds, level)
    e_better, e_worse = (float(e[-1]) if n else 1.0 for e in (history.better, history.not_better))
    pooled = {
        "difference": confidence_sequence(rounds, level=interval, planned=episodes.planned).as_dict(),
        "e_better": e_better,
        "e_not_better": e_worse,
        "needed": 1 / level,
    }

    fails, counters = _unsafe(spec, candidate)
    holds: list[str] = []
    per_task: dict[str, Any] = {}
    for index, task in enumerate(tasks):
        values = rounds[:, index : index + 1]
        mean = float(values.mean()) if n else 0.0
        e_inferior = float(history.inferior[-1, index]) if n else 1.0
        e_non_inferior = float(history.non_inferior[-1, index]) if n else 1.0
        if e_inferior >= len(tasks) / alpha:
            fails.append(f"{task}: shown worse than the champion by more than {margin:g} (observed {mean:+.2f})")
        elif spec.per_task.rule == "shown" and e_non_inferior < 1 / alpha:
            holds.append(f"{task}: not yet shown to be within {margin:g} of the champion (observed {mean:+.2f})")
        elif spec.per_task.rule == "not_worse" and mean < -margin:
            holds.append(f"{task}: looks worse than the champion by more than {margin:g} (observed {mean:+.2f})")
        per_task[task] = {
            "difference": confidence_sequence(values, level=interval, planned=episodes.planned).as_dict(),
            "e_inferior": e_inferior,
            "e_non_inferior": e_non_inferior,
            "candidate": _rate(candidate, task),
            "champion": _rate(champion, task),
        }

    observed = float(rounds.mean()) if n else 0.0
    if e_worse >= 1 / alpha:
        fails.append(f"pooled: shown not to be better than the champion by {gain:g} (observed {observed:+.3f})")
    if n < episodes.min:
        holds.insert(0, f"{n} paired episodes a task, at least {episodes.min} are needed")
    shown_better = f"(observed {observed:+.3f}, evidence {e_better:.3g} of {1 / level:.3g})"
    if e_better < 1 / level:
        holds.append(f"pooled: not yet shown better {shown_better}")
    against_reference: dict[str, Any] | None = None
    if reference is not None:
        against_reference, worse, waits = _hold_to_reference(spec, candidate, reference)
        fails, holds = fails + worse, holds + waits

    if fails:
        verdict, reasons = Verdict.FAIL, fails + holds
    elif not holds:
        verdict = Verdict.PASS
        reasons = [f"pooled: shown better {shown_better}"]
        each = ", ".join(f"{task} {entry['difference']['mean']:+.2f}" for task, entry in per_task.items())
        how = "shown to be within" if spec.per_task.rule == "shown" else "observed to lose more than"
        reasons.append(f"per task: {'each' if spec.per_task.rule == 'shown' else 'none'} {how} {margin:g} ({each})")
        if reference is not None:
            reasons.append(f"reference: no task observed to lose more than {spec.reference.margin:g} against it")
        reasons.append("safety: no event beyond what is allowed")
    elif n >= episodes.max:
        verdict, reasons = Verdict.FAIL, [f"the budget of {episodes.max} episodes a task is spent", *holds]
    else:
        verdict, reasons = Verdict.CONTINUE, holds
    evidence = {
        "spec": spec.model_dump(),
        "level": level,
        "paired_by_seed": paired,
        "episodes_per_task": n,
        "interval_level": interval,
        "pooled": pooled,
        "per_task": per_task,
        "reference": against_reference,
        "safety": counters,
    }
    return Decision(verdict, tuple(reasons), evidence)


def _unsafe(spec: GateSpec, candidate: Sequence[EpisodeResult]) -> tuple[list[str], dict[str, int]]:
    """Reasons to fail for unsafe events, and the counters."""
    counters: dict[str, int] = dict.fromkeys(spec.safety, 0)
    for result in candidate:
        for name, count in result.safety.items():
            counters[name] = counters.get(name, 0) + count
    fails = [
        f"safety: {count} {name} events, {spec.safety.get(name, 0)} allowed"
        for name, count in counters.items()
        if count > spec.safety.get(name, 0)
    ]
    return fails, counters


def _hold_to_reference(
    spec: GateSpec, candidate: Sequence[EpisodeResult], reference: Sequence[EpisodeResult]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Evidence by task, reasons to fail and reasons to wait, of the comparison with the reference."""
    rounds, tasks, _ = _pair(candidate, reference)
    margin, needed = spec.reference.margin, len(tasks) / spec.alpha
    found: dict[str, Any] = {}
    fails, holds = [], []
    for index, task in enumerate(tasks):
        values = rounds[:, index : index + 1]
        mean = float(values.mean()) if len(values) else 0.0
        e_inferior = 1.0
        if len(values):
            against = shown(-values, margin, alpha=spec.alpha / len(tasks), planned=spec.episodes.planned)
            e_inferior = float(against[-1])
        if e_inferior >= needed:
            fails.append(f"{task}: shown worse than the reference by more than {margin:g} (observed {mean:+.2f})")
        elif mean < -margin:
            holds.append(f"{task}: looks worse than the reference by more than {margin:g} (observed {mean:+.2f})")
        found[task] = {"difference": mean, "e_inferior": e_inferior, "reference": _rate(reference, task)}
    return found, fails, holds


@dataclass(frozen=True)
class Trace:
    """Evidence after each round; every e-value is the largest so far, so that what was shown stays shown.

    Attributes:
        better: (..., R) against "the task-averaged difference is at most the superiority asked for".
        not_better: (..., R) against "it is at least that".
        inferior: (..., R, K) against "this task's difference is at least -margin".
        non_inferior: (..., R, K) against "it is at most -margin".
        difference: (..., R, K) each task's mean difference so far.
    """

    better: np.ndarray
    not_better: np.ndarray
    inferior: np.ndarray
    non_inferior: np.ndarray
    difference: np.ndarray


def trace(spec: GateSpec, rounds: np.ndarray, level: float | None = None) -> Trace:
    """The evidence over time of (..., R, K) differences in success: candidate minus champion, K tasks a round.

    Args:
        level: at which "better" is judged; the gate's own alpha if not given.
    """
    alpha, margin, gain = spec.alpha, spec.per_task.margin, spec.pooled.superiority
    n, tasks = rounds.shape[-2:]
    level = alpha if level is None else level
    planned = episodes_at(spec, level).planned

    def largest(values: np.ndarray, null: float, judged_at: float) -> np.ndarray:
        return shown(values, null, alpha=judged_at, planned=planned)

    single = np.moveaxis(rounds, -1, 0)[..., None]  # (K, ..., R, 1)
    return Trace(
        better=largest(rounds, gain, level),
        not_better=largest(-rounds, -gain, alpha),
        # A false FAIL of any task: at most alpha over all of them. A false "shown" lets one task through: alpha each.
        inferior=np.moveaxis(largest(-single, margin, alpha / tasks), 0, -1),
        non_inferior=np.moveaxis(largest(single, -margin, alpha), 0, -1),
        difference=np.cumsum(rounds, axis=-2) / np.arange(1, n + 1)[:, None],
    )


def shown(values: np.ndarray, null: float, *, alpha: float, planned: int) -> np.ndarray:
    """Evidence against "the mean is at most `null`" so far, (..., R) for (..., R, K) values in [-1, 1].

    The largest so far and at least 1: it is shown at level alpha once this reaches 1/alpha, and stays shown.
    """
    wealth = betting_evidence(values, null, alpha=alpha, planned=planned)
    return np.maximum(np.maximum.accumulate(wealth, axis=-1), 1.0)


def verdicts(spec: GateSpec, history: Trace, level: float | None = None) -> np.ndarray:
    """What `decide` answers after each round when neither safety counters nor a reference object: (..., R) of PASS,
    FAIL, CONTINUE."""
    level = spec.alpha if level is None else level
    episodes = episodes_at(spec, level)
    tasks = history.difference.shape[-1]
    n = np.arange(1, history.better.shape[-1] + 1)
    fails = (history.not_better >= 1 / spec.alpha) | (history.inferior >= tasks / spec.alpha).any(-1)
    if spec.per_task.rule == "shown":
        holds = (history.non_inferior < 1 / spec.alpha).any(-1)
    else:
        holds = (history.difference < -spec.per_task.margin).any(-1)
    holds |= (n < episodes.min) | (history.better < 1 / level)
    fails |= holds & (n >= episodes.max)
    return np.where(fails, Verdict.FAIL.value, np.where(holds, Verdict.CONTINUE.value, Verdict.PASS.value))


def _pair(candidate: Sequence[EpisodeResult], champion: Sequence[EpisodeResult]) -> tuple[np.ndarray, list[str], bool]:
    """Differences in success, (R, K): R complete rounds over K tasks; the tasks; whether all pairs share a seed."""
    theirs, ours = _by_task(champion, "champion"), _by_task(candidate, "candidate")
    tasks = sorted(theirs)
    # The candidate may have begun with some of the tasks only; it may not know others than the champion.
    if not theirs or set(ours) - set(theirs):
        raise ConfigError(
            f"candidate evaluated on {sorted(ours)}, champion on {tasks}",
            "evaluate both policies on the same tasks",
        )
    shared = {task: sorted(ours.get(task, {}).keys() & theirs[task].keys()) for task in tasks}
    paired = any(shared.values()) or not ours
    columns: list[list[int]] = []
    for task in tasks:
        mine = ours.get(task, {})
        if paired:
            pairs = [(mine[seed], theirs[task][seed]) for seed in shared[task]]
        else:
            ranked = ([side[seed] for seed in sorted(side)] for side in (mine, theirs[task]))
            pairs = list(zip(*ranked, strict=False))  # one side may be ahead
        columns.append([int(a) - int(b) for a, b in pairs])
    n = min(len(column) for column in columns)
    rounds = np.array([column[:n] for column in columns], dtype=np.float64).reshape(len(tasks), n).T
    return rounds, tasks, paired


def _by_task(results: Sequence[EpisodeResult], who: str) -> dict[str, dict[int, bool]]:
    table: dict[str, dict[int, bool]] = {}
    for result in results:
        column = table.setdefault(result.task, {})
        if result.seed in column:
            raise ConfigError(
                f"{who}: task {result.task}, seed {result.seed} was evaluated twice",
                "an episode counts once: use new seeds for more episodes",
            )
        column[result.seed] = result.success
    return table


def _rate(results: Sequence[EpisodeResult], task: str) -> dict[str, Any]:
    chosen = [result.success for result in results if result.task == task]
    return {"k": sum(chosen), "n": len(chosen), "success": wilson(sum(chosen), len(chosen)).as_dict()}
