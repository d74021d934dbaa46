"""The canary's nulls: a chain of candidates that each lose a little, and work that becomes harder during the trial.

*Before*, for comparison only: what is SAFE is promoted, and the candidate's episodes are compared with the champion's
from before the trial. *After*: promoted by itself is only what is also shown better at the level of its place in the
stream, and both halves of a pair ran at the same hours. Nobody takes over in these simulations.
"""

from __future__ import annotations

import numpy as np

from bench.gate_nulls import wins
from flows.canary_gate import CanarySpec, harmful, weigh
from flows.gate import GateSpec, episodes_at, level_at, shown

CHAMPION_AT_WORK = np.array((0.65, 0.75, 0.80, 0.90))  # success on four tasks


_ASKED_EVERY = 4  # rounds; what is shown stays shown, so asking seldom only shortens the work


def safe_and_harmful(spec: CanarySpec, differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The canary's SAFE and HARM each time that it is asked, after `asked` rounds of one pair a task: two (S, A) of
    booleans for (S, R, K) differences."""
    trials, rounds, tasks = differences.shape
    success = differences.reshape(trials, rounds * tasks)
    task = np.tile(np.arange(tasks), rounds)
    times = asked(rounds)
    safe, harm = (np.zeros((trials, len(times)), dtype=bool) for _ in range(2))
    for k, done in enumerate(times):
        pairs = int(done) * tasks
        found = weigh(spec, success[:, :pairs], np.zeros((trials, pairs)), task[:pairs], tasks)
        harm[:, k] = harmful(spec, found)
        safe[:, k] = (found.safe >= 1 / spec.alpha) & (pairs >= spec.episodes.min)
    return safe, harm


def asked(rounds: int) -> np.ndarray:
    """(A,) rounds after which the canary is asked, the last one always."""
    return np.unique([*range(_ASKED_EVERY, rounds + 1, _ASKED_EVERY), rounds])


def chain(
    spec: CanarySpec,
    gate: GateSpec,
    candidates: int,
    loss: float,
    simulations: int,
    rng: np.random.Generator,
    *,
    shown_better: bool,
) -> np.ndarray:
    """Mean success at the end of a chain of candidates, each worse than the champion of its day by `loss`: (S,)."""
    tasks = len(CHAMPION_AT_WORK)
    rounds = spec.episodes.max // tasks
    champion = np.tile(CHAMPION_AT_WORK, (simulations, 1))
    promotions = np.zeros(simulations, dtype=int)
    stream = gate.model_copy(update={"episodes": spec.episodes})
    for position in range(1, candidates + 1):
        candidate = np.maximum(champion - loss, 0.0)
        shape = (simulations, rounds, tasks)
        new, old = (rng.random(shape) < rates[:, None, :] for rates in (candidate, champion))
        differences = new.astype(np.float64) - old
        safe, harm = safe_and_harmful(spec, differences)
        accepted = safe
        if shown_better:
            accepted = np.zeros_like(safe)
            for count in np.unique(promotions):
                rows = promotions == count
                level = level_at(stream, position, int(count))
                planned = max(1, episodes_at(stream, level).planned // tasks)
                better = shown(differences[rows], 0.0, alpha=level, planned=planned) >= 1 / level
                accepted[rows] = safe[rows] & better[:, asked(rounds) - 1]
        taken = _first(accepted) < _first(harm)
        champion[taken] = candidate[taken]
        promotions += taken
    return champion.mean(axis=1)


def harm_by_drift(
    spec: CanarySpec, drift: float, simulations: int, rng: np.random.Generator, *, sudden: bool, concurrent: bool
) -> np.ndarray:
    """Whether an equal candidate is sent back as harmful while the work becomes harder by `drift` in all: (S,).

    Args:
        sudden: as the trial begins; else evenly over the trial's bound of episodes.
        concurrent: each pair's halves ran at the same time; else the champion's ran before the trial.
    """
    rounds = spec.episodes.max // len(CHAMPION_AT_WORK)
    now = CHAMPION_AT_WORK - drift * (np.ones(rounds) if sudden else np.linspace(0, 1, rounds))[:, None]
    new = (rng.random((simulations, rounds, len(CHAMPION_AT_WORK))) < now).astype(np.float64)
    if concurrent:
        old = (rng.random(new.shape) < now).astype(np.float64)
    else:
        old = wins(CHAMPION_AT_WORK, simulations, rounds, rng)
    _, harm = safe_and_harmful(spec, new - old)
    return harm.any(axis=1)  # the watch goes on after SAFE


def _first(answers: np.ndarray) -> np.ndarray:
    """(S,) index of the first True in (S, R); R where there is none."""
    return np.where(answers.any(axis=1), answers.argmax(axis=1), answers.shape[1])
