"""Candidates that must not be promoted, and how often they are: by the rule before, and by the gate as it is.

*Before*, for comparison only: every candidate is judged at the gate's own alpha, however many came before it, and on
episodes that are kept: the champion's run once for all candidates, the candidate's those that it was picked by. *After*
is `flows.gate` with the levels of the stream (`level_at`), candidate and champion on episodes of their own trial.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from flows.gate import GateSpec, Verdict, episodes_at, level_at, shown, trace, verdicts

# Champion's success on four tasks, spread like an SFT policy's: hard, middling, easy.
CHAMPION = np.array((0.55, 0.70, 0.75, 0.85))
PICKED_ON = 50  # episodes a task by which the best of several candidates is picked
_BATCH = 1000  # trials at once: some 200 MB


def wins(rates: npt.ArrayLike, trials: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """(trials, rounds, K) outcomes, 0 or 1, of a policy with (K,) success rates."""
    table = np.asarray(rates)
    return (rng.random((trials, rounds, len(table)), dtype=np.float32) < table).astype(np.float64)


def simulate(
    spec: GateSpec,
    champion: npt.ArrayLike,
    candidate: npt.ArrayLike,
    simulations: int,
    rng: np.random.Generator,
    level: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """First terminal answer of the gate, asked after every round, and the episodes a task that it took.

    Args:
        spec: the gate.
        champion: (K,) success rates.
        candidate: (K,) success rates.
        simulations: repetitions S.
        rng: of the outcomes.
        level: of the trial; the gate's own alpha if not given.

    Returns:
        verdict (S,) of PASS or FAIL, and rounds (S,): episodes per task when it was given. The gate always ends,
        with FAIL, at its maximum.
    """
    level = spec.alpha if level is None else level
    most = episodes_at(spec, level).max
    given, when = [], []
    for size in _batches(simulations):
        differences = wins(candidate, size, most, rng) - wins(champion, size, most, rng)
        answers = verdicts(spec, trace(spec, differences, level), level)
        first = np.argmax(answers != Verdict.CONTINUE.value, axis=1)
        given.append(answers[np.arange(size), first])
        when.append(first + 1)
    return np.concatenate(given), np.concatenate(when)


def promoted(spec: GateSpec, differences: np.ndarray, level: float) -> np.ndarray:
    """Whether the gate, asked after every round, ends with PASS: (S,) for (S, R, K), R at least the level's maximum.

    PASS needs the pooled evidence; the rest is worked out only where that is reached.
    """
    episodes = episodes_at(spec, level)
    differences = differences[:, : episodes.max]
    better = shown(differences, spec.pooled.superiority, alpha=level, planned=episodes.planned)
    passes = better[:, -1] >= 1 / level
    if passes.any():
        answers = verdicts(spec, trace(spec, differences[passes], level), level)
        first = np.argmax(answers != Verdict.CONTINUE.value, axis=1)
        passes[passes] = answers[np.arange(len(answers)), first] == Verdict.PASS.value
    return passes


def best_of(spec: GateSpec, candidates: int, simulations: int, rng: np.random.Generator, *, fresh: bool) -> np.ndarray:
    """Whether the best of several equal candidates, picked by `PICKED_ON` episodes a task, is promoted: (S,).

    Args:
        fresh: judged on new episodes in the first trial of the stream; or, as before, on those that picked it and,
            where these do not decide, on more.
    """
    level = level_at(spec, 1, 0) if fresh else spec.alpha
    most = episodes_at(spec, level).max
    found = []
    for size in _batches(simulations):
        # The best is known by its number of successes on each task: only this is drawn for all the candidates.
        counts = rng.binomial(PICKED_ON, CHAMPION, size=(size, candidates, len(CHAMPION)))
        best = counts[np.arange(size), counts.sum(-1).argmax(-1)]
        new = wins(CHAMPION, size, most, rng)
        if not fresh:
            order = rng.random((size, PICKED_ON, len(CHAMPION))).argsort(axis=1)
            new[:, :PICKED_ON] = order < best[:, None, :]
        found.append(promoted(spec, new - wins(CHAMPION, size, most, rng), level))
    return np.concatenate(found)


def other_environment(
    spec: GateSpec, harder: float, simulations: int, rng: np.random.Generator, *, interleaved: bool
) -> np.ndarray:
    """Whether an equal candidate is promoted when the environment has become easier by `harder` since the champion's
    kept run (before), or both run in the easier one (interleaved): (S,)."""
    level = level_at(spec, 1, 0) if interleaved else spec.alpha
    most = episodes_at(spec, level).max
    champion = CHAMPION if interleaved else CHAMPION - harder
    found = [
        promoted(spec, wins(CHAMPION, size, most, rng) - wins(champion, size, most, rng), level)
        for size in _batches(simulations)
    ]
    return np.concatenate(found)


def stream_before(
    spec: GateSpec,
    candidate: npt.ArrayLike,
    candidates: int,
    years: int,
    rng: np.random.Generator,
    *,
    kept: bool = True,
) -> np.ndarray:
    """Promotions of like candidates in sequence, each judged at alpha: (years, candidates) booleans.

    Args:
        candidate: (K,) success rates of each.
        kept: the champion's one run serves all of them; else it runs again for each.
    """
    most = spec.episodes.max
    table = np.zeros((years, candidates), dtype=bool)
    for rows in _rows(years):
        size = rows.stop - rows.start
        champion = wins(CHAMPION, size, most, rng)
        for t in range(candidates):
            old = champion if kept else wins(CHAMPION, size, most, rng)
            table[rows, t] = promoted(spec, wins(candidate, size, most, rng) - old, spec.alpha)
    return table


def stream_after(
    spec: GateSpec, special: np.ndarray, candidate: npt.ArrayLike, rng: np.random.Generator, *, controlled: bool = True
) -> np.ndarray:
    """Promotions in a stream of trials with fresh episodes: (years, candidates) booleans.

    Args:
        special: (years, candidates), which candidates have the rates `candidate`; the others equal the champion. When
            one is promoted, those after it differ from the new champion as they would have from the old one.
        candidate: (K,) success rates of these.
        controlled: at the levels of the stream; else each at alpha.
    """
    table = np.zeros(special.shape, dtype=bool)
    for t in range(special.shape[1]):
        before = table.sum(axis=1)
        for count in np.unique(before):
            level = level_at(spec, t + 1, int(count)) if controlled else spec.alpha
            most = episodes_at(spec, level).max
            here = np.flatnonzero(before == count)
            for part in _rows(len(here)):
                rows = here[part]
                rates = np.where(special[rows, t, None], candidate, CHAMPION)[:, None, :]
                new = rng.random((len(rows), most, len(CHAMPION)), dtype=np.float32) < rates
                table[rows, t] = promoted(spec, new - wins(CHAMPION, len(rows), most, rng), level)
    return table


def _batches(simulations: int) -> Iterator[int]:
    for part in _rows(simulations):
        yield part.stop - part.start


def _rows(count: int) -> Iterator[slice]:
    for done in range(0, count, _BATCH):
        yield slice(done, min(done + _BATCH, count))
