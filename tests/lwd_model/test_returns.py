"""n-step fields against a slow reference written from equations 2 and 19 (acceptance test 9)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from lwd_model.returns import Fields, discounted_return, nstep_fields


def slow(
    rewards: list[float],
    intervention: list[bool],
    outcome: str,
    horizon: int,
    n: int,
    gamma: float,
    time_limit: str,
    takeover: str,
) -> list[tuple[float, float, int]]:
    """The formula, start by start and step by step."""
    length = len(rewards)
    rows = []
    for t in range(length):
        total, end, stopped = 0.0, t, None
        for u in range(t, min(t + n * horizon, length)):
            if takeover != "continue" and u > t and intervention[u] and not intervention[u - 1]:
                stopped = takeover
                break
            total += gamma ** (u - t) * rewards[u]
            end = u + 1
        if (
            stopped is None
            and takeover != "continue"
            and end < length
            and intervention[end]
            and not intervention[end - 1]
        ):
            stopped = takeover
        if stopped == "failure":
            discount = 0.0
        elif stopped == "cut" or end < length:
            discount = gamma ** (end - t)
        else:
            discount = gamma ** (end - t) if outcome == "time_limit" and time_limit == "bootstrap" else 0.0
        rows.append((total, discount, end))
    return rows


@st.composite
def episodes(draw: st.DrawFn) -> dict[str, Any]:
    length = draw(st.integers(1, 40))
    outcome = draw(st.sampled_from(["success", "failure", "time_limit"]))
    if draw(st.booleans()):
        rewards = [0.0] * (length - 1) + [float(outcome == "success")]
    else:
        rewards = draw(st.lists(st.floats(-1, 1, width=32), min_size=length, max_size=length))
    runs: list[bool] = []
    while len(runs) < length:
        runs += [draw(st.booleans())] * draw(st.integers(1, 10))
    return {
        "rewards": rewards,
        "intervention": runs[:length],
        "outcome": outcome,
        "horizon": draw(st.integers(1, 7)),
        "n": draw(st.integers(1, 6)),
        "gamma": draw(st.sampled_from([1.0, 0.9999, 0.99, 0.5])),
        "time_limit": draw(st.sampled_from(["failure", "bootstrap"])),
        "takeover": draw(st.sampled_from(["continue", "cut", "failure"])),
    }


@given(episodes())
@settings(max_examples=300, deadline=None)
def test_09_fields_equal_the_formula(episode: dict[str, Any]) -> None:
    expected = slow(**episode)
    found = nstep_fields(
        **episode | {"rewards": np.array(episode["rewards"]), "intervention": np.array(episode["intervention"])}
    )
    np.testing.assert_allclose(found.reward, [row[0] for row in expected], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.discount, [row[1] for row in expected], rtol=1e-12, atol=0)
    assert found.bootstrap_index.tolist() == [row[2] for row in expected]


def fields(length: int, *, outcome: str = "success", operated: slice | None = None, **options: Any) -> Fields:
    rewards: npt.NDArray[np.float32] = np.zeros(length, np.float32)
    rewards[-1] = float(outcome == "success")
    intervention = np.zeros(length, bool)
    if operated is not None:
        intervention[operated] = True
    return nstep_fields(rewards, intervention, outcome, **{"horizon": 3, "n": 2, "gamma": 0.9} | options)


def test_09_success_in_the_window_is_discounted_once() -> None:
    found = fields(10)
    expected = [0.9 ** (9 - t) if t + 6 >= 10 else 0.0 for t in range(10)]
    np.testing.assert_array_equal(found.reward, expected)
    np.testing.assert_array_equal(found.discount, [0.9**6] * 4 + [0.0] * 6)
    assert found.bootstrap_index.tolist() == [6, 7, 8, 9, 10, 10, 10, 10, 10, 10]


def test_09_a_window_that_ends_with_the_episode_is_terminal() -> None:
    found = fields(6)  # t = 0: t + nH = T
    assert found.discount[0] == 0.0 and found.reward[0] == pytest.approx(0.9**5)
    assert fields(7).discount[0] == pytest.approx(0.9**6)


def test_09_failure_bootstraps_nothing_and_earns_nothing() -> None:
    found = fields(10, outcome="failure", time_limit="bootstrap")
    assert not found.reward.any()
    assert found.discount[4:].tolist() == [0.0] * 6


def test_09_time_limit_in_both_modes() -> None:
    assert not fields(10, outcome="time_limit").discount[4:].any()
    found = fields(10, outcome="time_limit", time_limit="bootstrap")
    np.testing.assert_allclose(found.discount[4:], 0.9 ** np.arange(6, 0, -1.0))
    assert (found.bootstrap_index[4:] == 10).all()
    assert not found.reward.any()


def test_takeover_continue_credits_the_robot_with_the_operators_success() -> None:
    found = fields(8, operated=slice(5, 8), takeover="continue")
    np.testing.assert_array_equal(found.reward[2:], 0.9 ** np.arange(5, -1, -1.0))


def test_takeover_cut_bootstraps_at_the_boundary() -> None:
    found = fields(8, operated=slice(5, 8), takeover="cut")
    assert not found.reward[:5].any()
    np.testing.assert_allclose(found.discount[:5], 0.9 ** np.arange(5, 0, -1.0))
    assert found.bootstrap_index.tolist() == [5] * 5 + [8] * 3
    np.testing.assert_array_equal(found.reward[5:], 0.9 ** np.arange(2, -1, -1.0))  # the operator's own windows


def test_takeover_failure_ends_the_autonomous_part() -> None:
    found = fields(12, operated=slice(7, 12), takeover="failure")
    assert found.discount[0] == pytest.approx(0.9**6)  # its window ends before the boundary
    assert not found.discount[1:7].any()  # t = 1 ends exactly at the boundary: it has met it
    assert not found.reward[:7].any()
    assert found.reward[7] == pytest.approx(0.9**4)


def test_an_operator_from_the_start_is_no_boundary() -> None:
    plain = fields(10)
    for takeover in ("cut", "failure"):
        for operated in (slice(0, 10), slice(0, 4)):  # all of it, or handed back to the policy
            assert [a.tolist() for a in fields(10, operated=operated, takeover=takeover)] == [a.tolist() for a in plain]


def test_long_episodes_lose_no_precision() -> None:
    found = fields(100_000, gamma=0.99, horizon=30, n=10)
    assert found.reward[-300] == pytest.approx(0.99**299, rel=1e-12)
    assert found.reward[-301] == 0.0


def test_monte_carlo_return() -> None:
    np.testing.assert_allclose(discounted_return(np.array([1.0, 0.0, 2.0]), 0.5), [1.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": np.zeros(0)}, "0 rewards"),
        ({"intervention": np.zeros(2, bool)}, "2 intervention flags"),
        ({"time_limit": "none"}, "time_limit='none'"),
        ({"takeover": "ignore"}, "takeover='ignore'"),
        ({"n": 0}, "n=0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "rewards": np.zeros(3), "intervention": np.zeros(3, bool), "outcome": "failure",
        "horizon": 2, "n": 1, "gamma": 0.9,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=words):
        nstep_fields(**arguments | change)
