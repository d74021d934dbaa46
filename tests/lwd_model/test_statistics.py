"""Intervals cover, and the anytime-valid ones keep their promise under the harshest stopping rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from infra.errors import ConfigError
from lwd_model.statistics import betting_evidence, bootstrap, confidence_sequence, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 10), (7, 10), (10, 10), (43, 50), (1, 200)])
def test_wilson_equals_scipy(k: int, n: int) -> None:
    ours, theirs = wilson(k, n), binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (ours.mean, ours.low, ours.high) == pytest.approx((k / n, theirs.low, theirs.high), abs=1e-12)


def test_wilson_without_trials_claims_nothing() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


def test_bootstrap_matches_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    values = {task: rng.normal(i, 1.0, 400) for i, task in enumerate(("S1", "S2"))}
    interval = bootstrap([values])
    assert interval.mean == pytest.approx(np.mean([v.mean() for v in values.values()]))
    half = 1.96 * np.sqrt(2 / 400) / 2  # average of two means of unit variance
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.12)


def test_bootstrap_sees_the_seeds_spread() -> None:
    """Seeds that disagree widen the interval, however many episodes each has."""
    runs = [{"S1": np.full(500, value)} for value in (0.2, 0.5, 0.8)]
    interval = bootstrap(runs)
    assert interval.mean == pytest.approx(0.5)
    assert interval.high - interval.low > 0.4
    assert bootstrap(runs) == interval  # the same input, the same answer


def test_bootstrap_weighs_tasks_not_episodes() -> None:
    assert bootstrap([{"S1": np.ones(10), "S2": np.zeros(1000)}]).mean == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("champion", "candidate"),
    [
        ((0.5, 0.5), (0.5, 0.5)),
        ((0.9, 0.9), (0.9, 0.9)),
        ((0.3, 0.8), (0.7, 0.4)),  # better on one task, worse on the other: no better on average
    ],
)
def test_ever_rejecting_a_true_null_is_rarer_than_alpha(
    champion: tuple[float, float], candidate: tuple[float, float]
) -> None:
    """Ville's inequality, with a look after every one of 160 rounds."""
    rng, alpha, sims = np.random.default_rng(1), 0.1, 3000
    shape = (sims, 160, 2)
    x = (rng.random(shape) < candidate).astype(float) - (rng.random(shape) < champion)
    ever = (betting_evidence(x, 0.0, alpha=alpha, planned=40).max(axis=1) >= 1 / alpha).mean()
    assert ever <= alpha + 2.5 * np.sqrt(alpha * (1 - alpha) / sims)
    assert ever > alpha / 5  # and the level is used, not wasted


def test_wealth_is_a_martingale_at_the_null() -> None:
    rng = np.random.default_rng(2)
    x = rng.choice([-1.0, 0.0, 1.0], p=[0.2, 0.6, 0.2], size=(40_000, 12, 2))
    wealth = betting_evidence(x, 0.0, alpha=0.05, planned=12)
    assert wealth.min() > 0
    for r in (0, 5, 11):
        error = wealth[:, r].std() / np.sqrt(len(x))
        assert abs(wealth[:, r].mean() - 1) < 4 * error


def test_power_is_close_to_the_fixed_sample_test() -> None:
    """A gain of 0.1 over 0.75 on 4 x 50 pairs: the z-test at a single look has power 0.81."""
    rng, sims = np.random.default_rng(3), 1500
    shape = (sims, 50, 4)
    x = (rng.random(shape) < 0.85).astype(float) - (rng.random(shape) < 0.75)
    power = (betting_evidence(x, 0.0, alpha=0.05, planned=50).max(axis=1) >= 20).mean()
    assert 0.66 < power < 0.81


def test_evidence_does_not_foresee() -> None:
    """What comes later does not change the evidence before it."""
    rng = np.random.default_rng(4)
    x = rng.choice([-1.0, 0.0, 1.0], size=(60, 3))
    long = betting_evidence(x, 0.0, alpha=0.05, planned=20)
    for n in (1, 19, 20, 21, 45):
        np.testing.assert_array_equal(betting_evidence(x[:n], 0.0, alpha=0.05, planned=20), long[:n])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=2, max_size=2), min_size=1, max_size=60),
    st.floats(-0.9, 0.9),
)
def test_wealth_stays_positive_and_finite(rows: list[list[float]], null: float) -> None:
    wealth = betting_evidence(np.array(rows), null, alpha=0.05, planned=10)
    assert np.isfinite(wealth).all() and (wealth > 0).all()


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize(("null", "alpha"), [(0.0, 0.05), (0.9, 1e-9), (-0.99, 1e-12)])
def test_a_fortune_lost_or_won_many_times_over_raises_no_warning(value: float, null: float, alpha: float) -> None:
    values = np.full((2, 4000, 3), value)
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        for aim in (True, False):
            wealth = betting_evidence(values, null, alpha=alpha, planned=20, aim=aim)
            assert np.isfinite(wealth).all() and (wealth >= 0).all()
            if value <= null:
                assert (wealth[:, -1] <= 1).all()
            elif aim or null < 0.9:
                assert (wealth[:, -1] >= 1 / alpha).all()


def test_confidence_sequence_covers_at_all_times() -> None:
    rng, level, misses = np.random.default_rng(5), 0.9, 0
    for _ in range(120):
        x = (rng.random((60, 1)) < 0.8).astype(float)
        for n in (10, 25, 40, 60):
            interval = confidence_sequence(x[:n], level=level, planned=40, bounds=(0, 1), grid=101)
            if not interval.low <= 0.8 <= interval.high:
                misses += 1
                break
    assert misses / 120 <= 1 - level + 0.05


def test_confidence_sequence_narrows_and_holds_the_mean() -> None:
    x = np.tile([[1.0], [1.0], [1.0], [0.0]], (50, 1))
    early, late = (confidence_sequence(x[:n], bounds=(0, 1), planned=100) for n in (20, 200))
    assert early.low <= early.mean <= early.high
    assert late.high - late.low < early.high - early.low < 0.8
    assert 0.62 < late.low < 0.75 < late.high < 0.88
    empty = confidence_sequence(np.empty((0, 1)), bounds=(0, 1))
    assert (empty.low, empty.high) == (0, 1)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="11 successes of 10"):
        wilson(11, 10)
    with pytest.raises(ConfigError, match="level is 95"):
        wilson(1, 10, level=95)
    with pytest.raises(ConfigError, match="nothing to resample"):
        bootstrap([])
    with pytest.raises(ConfigError, match="disagree"):
        bootstrap([{"S1": [1.0]}, {"S2": [1.0]}])
    with pytest.raises(ConfigError, match="S1 has no episode"):
        bootstrap([{"S1": []}])
    with pytest.raises(ConfigError, match="outside"):
        betting_evidence([[2.0]], 0.0, alpha=0.05, planned=5)
    with pytest.raises(ConfigError, match="not finite"):
        betting_evidence([[np.nan]], 0.0, alpha=0.05, planned=5)
    with pytest.raises(ConfigError, match="planned=0"):
        betting_evidence([[1.0]], 0.0, alpha=0.05, planned=0)
