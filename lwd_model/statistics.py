"""Intervals: Wilson, bootstrap over seeds and episodes, and anytime-valid confidence sequences by betting.

A gate is asked again after every batch of episodes, and stops as soon as it likes the answer. A fixed-sample interval
does not survive that; a *test martingale* does. Under the null hypothesis the wealth of a gambler who bets on the
next episode is a non-negative supermartingale that starts at 1, so by Ville's inequality the probability that it
*ever* reaches 1/alpha is at most alpha, whatever the stopping rule (Waudby-Smith and Ramdas, "Estimating means of
bounded random variables by betting", JRSS B 2024). How much is bet changes the power, never the validity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from infra.errors import ConfigError

Array = npt.NDArray[np.float64]

# Share of the capital that never aims at the planned end: it keeps the test alive when more episodes are needed.
_RESERVE = 0.2
# Largest share of the capital that one pair may cost. Below 1: wealth stays positive, logarithms finite.
_MAX_STAKE = 0.9
# Prior of the variance: three tenths of the squared half-range, worth this many pairs.
_PRIOR_PAIRS = 4.0
# Wealth is kept below this, and counts as this little at least in a logarithm: no overflow, no infinity.
_LARGEST, _SMALLEST = 1e200, 1e-300


@dataclass(frozen=True)
class Interval:
    """An estimate with a lower and an upper limit."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def wilson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; honest at 0 and 1, where the normal interval has no width.

    Args:
        successes: k, 0 <= k <= trials.
        trials: n >= 0; no trial gives the interval (0, 1) around 0.5, which claims nothing.
        level: coverage, 0.95 for 95 %.

    Raises:
        ConfigError: the counts or the level make no sense.
    """
    if not 0 <= successes <= trials:
        raise ConfigError(f"{successes} successes of {trials} trials", "count successes among the trials")
    _check_level("level", level)
    if trials == 0:
        return Interval(0.5, 0.0, 1.0)
    z = float(norm.ppf(0.5 + level / 2))
    p = successes / trials
    centre = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * float(np.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2)))
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))


def bootstrap(
    runs: Sequence[Mapping[str, npt.ArrayLike]], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a task-average over training seeds and episodes.

    The estimate is the mean over seeds of the mean over tasks of the mean over episodes. Each resample draws seeds
    with replacement (when there are several), then, within each seed and task, episodes with replacement; tasks are
    fixed, because the suite is.

    Args:
        runs: one mapping {task: (n,) values} per training seed; all with the same tasks.
        level: coverage.
        resamples: bootstrap samples.
        seed: of the resampling; equal inputs give equal intervals.

    Raises:
        ConfigError: no run, an empty task, or runs that disagree about the tasks.
    """
    _check_level("level", level)
    if not runs or not runs[0]:
        raise ConfigError("nothing to resample", "give at least one run with at least one task")
    tasks = sorted(runs[0])
    rng = np.random.default_rng(seed)
    means: list[float] = []
    drawn: list[Array] = []
    for run in runs:
        if sorted(run) != tasks:
            raise ConfigError(f"runs disagree about the tasks: {tasks} and {sorted(run)}", "evaluate the same tasks")
        columns = []
        for task in tasks:
            values = np.asarray(run[task], dtype=np.float64)
            if values.size == 0:
                raise ConfigError(f"task {task} has no episode", "evaluate every task")
            columns.append(values[rng.integers(values.size, size=(resamples, values.size))].mean(axis=1))
        means.append(float(np.mean([np.mean(np.asarray(run[task], dtype=np.float64)) for task in tasks])))
        drawn.append(np.mean(columns, axis=0))
    per_seed = np.stack(drawn, axis=1)  # (resamples, seeds)
    if len(runs) > 1:
        chosen = rng.integers(len(runs), size=per_seed.shape)
        per_seed = np.take_along_axis(per_seed, chosen, axis=1)
    low, high = np.quantile(per_seed.mean(axis=1), [0.5 - level / 2, 0.5 + level / 2])
    mean = float(np.mean(means))
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))


def betting_evidence(
    values: npt.ArrayLike,
    null: npt.ArrayLike,
    *,
    alpha: float,
    planned: int,
    bounds: tuple[float, float] = (-1.0, 1.0),
    aim: bool = True,
) -> Array:
    """Evidence against "the mean is at most `null`" after each round: the gambler's wealth so far.

    Before round r the gambler fixes a stake lambda from the rounds seen, then multiplies the wealth by
    prod_k (1 + lambda * (x_rk - null)). The K values of a round (one per task) are independent given the past and
    lambda is common to them, so E[prod] = prod(1 + lambda * (mu_k - null)) <= (1 + lambda * (mean_k mu_k - null))^K
    by the inequality of arithmetic and geometric means: a supermartingale under the *task-averaged* null, however
    much the tasks differ among themselves.

    The stake aims at the planned end: sqrt(2 log(target / wealth) / (variance * pairs left)), recomputed as wealth
    and time change (Voracek and Orabona, "STaR-Bets", 2025); a fifth of the capital is bet with a fixed, smaller
    stake, so that a test which misses its plan can go on to a second plan of twice the length.

    Args:
        values: (..., R, K) with K tasks; leading axes are independent repetitions.
        null: scalar or broadcastable to the leading axes of `values`.
        alpha: level at which the wealth will be judged; it shapes the stakes only.
        planned: rounds at which most of the power is wanted.
        bounds: smallest and largest possible value.
        aim: False bets all the capital with the fixed stake and never stops: less power at the plan, but the wealth
            goes on following the mean after the target was reached.

    Returns:
        (..., R) wealth after each round. Reject once its running maximum reaches 1/alpha.

    Raises:
        ConfigError: alpha, planned or bounds make no sense, or a value lies outside the bounds.
    """
    _check_level("alpha", alpha)
    low, high = bounds
    x = np.asarray(values, dtype=np.float64)
    if planned < 1 or low >= high or x.ndim < 2:
        raise ConfigError(
            f"betting on shape {x.shape} with planned={planned}, bounds={bounds}",
            "give (..., rounds, tasks) values, planned >= 1 and low < high",
        )
    if x.size and not (np.min(x) >= low and np.max(x) <= high):
        raise ConfigError(f"a value lies outside {bounds} or is not finite", "give bounds that hold for every value")
    mean0 = np.asarray(null, dtype=np.float64)
    lead = np.broadcast_shapes(x.shape[:-2], mean0.shape)
    rounds, tasks = x.shape[-2:]
    mean0 = np.broadcast_to(mean0, lead)
    x = np.broadcast_to(x, (*lead, rounds, tasks))
    cap = _MAX_STAKE / np.maximum(mean0 - low, 1e-9)

    prior = 0.3 * ((high - low) / 2) ** 2
    total, squares, count = np.zeros(lead), np.zeros(lead), 0
    aiming, reserve = np.ones(lead), np.ones(lead)
    target = 1.0 / alpha
    kept = _RESERVE if aim else 1.0
    caution = 0.6 if aim else 1.0  # the reserve is for a longer run: smaller stakes
    wealth = np.empty((*lead, rounds))
    end = planned
    for r in range(rounds):
        if r >= end:
            end *= 2
        seen = count + _PRIOR_PAIRS
        variance = np.maximum((squares + prior * _PRIOR_PAIRS) / seen - (total / seen) ** 2, 0.05 * prior)
        wanted = np.maximum((target - _RESERVE * reserve) / (1 - _RESERVE), 1e-12)
        # 0 once the target is reached: stop betting. A lost wealth underflows to 0, hence the floor in the logarithm.
        shortfall = np.maximum(np.log(wanted) - np.log(np.maximum(aiming, _SMALLEST)), 0.0)
        stake = np.minimum(np.sqrt(2 * shortfall / (variance * (end - r) * tasks)), cap)
        steady = np.minimum(caution * np.sqrt(2 * np.log(target) / (variance * planned * tasks)), cap)
        gain = x[..., r, :] - mean0[..., None]
        with np.errstate(over="ignore"):  # cut just below: a smaller wealth is as valid
            aiming = np.minimum(aiming * np.prod(1 + stake[..., None] * gain, axis=-1), _LARGEST)
            reserve = np.minimum(reserve * np.prod(1 + steady[..., None] * gain, axis=-1), _LARGEST)
        wealth[..., r] = (1 - kept) * aiming + kept * reserve
        # Centred on the middle of the range so that the variance is computed without cancellation.
        centred = x[..., r, :] - (low + high) / 2
        total, squares, count = total + centred.sum(-1), squares + (centred**2).sum(-1), count + tasks
    return wealth


def confidence_sequence(
    values: npt.ArrayLike,
    *,
    level: float = 0.95,
    planned: int = 50,
    bounds: tuple[float, float] = (-1.0, 1.0),
    grid: int = 401,
) -> Interval:
    """Anytime-valid interval of the task-averaged mean: all means that the betting does not refute.

    It holds at all times at once with probability `level`: look as often as you like. Each side spends half. It bets
    without aiming, so that it follows the mean; `betting_evidence` against one null decides earlier than this does.

    Args:
        values: (R, K) values, K tasks a round; for a Bernoulli rate use K = 1 and bounds (0, 1).
        level: coverage.
        planned: rounds at which it should be tightest.
        bounds: smallest and largest possible value.
        grid: means tried between the bounds; the interval is rounded outwards to it.
    """
    _check_level("level", level)
    x = np.asarray(values, dtype=np.float64)
    low, high = bounds
    if x.shape[0] == 0:
        return Interval((low + high) / 2, low, high)
    alpha = (1 - level) / 2
    nulls = np.linspace(low, high, grid)
    above = betting_evidence(x, nulls, alpha=alpha, planned=planned, bounds=bounds, aim=False)[..., -1]
    below = betting_evidence(-x, -nulls, alpha=alpha, planned=planned, bounds=(-high, -low), aim=False)[..., -1]
    mean = float(x.mean())
    step = (high - low) / (grid - 1)
    # The interval spans the means whose own bets do not refute them now, one grid step outwards.
    left = nulls[(above < 1 / alpha) & (nulls <= mean)]
    right = nulls[(below < 1 / alpha) & (nulls >= mean)]
    lower = max(low, float(left.min(initial=mean)) - step)
    upper = min(high, float(right.max(initial=mean)) + step)
    return Interval(mean, min(mean, lower), max(mean, upper))


def _check_level(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name} is {value}", f"give {name} between 0 and 1, for example 0.05 or 0.95")
