"""Whatever is proposed, what leaves the shield is finite, within the limits, and no larger a change than allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_contracts.shield import default_shield
from infra.edge.shield import KINDS, Limits, PolicyFaultError, Shield, Workspace
from infra.errors import ConfigError

A = 3
FLOATS = hnp.arrays(np.float32, A, elements=st.floats(width=32, allow_nan=True, allow_infinity=True))
ORDINARY = hnp.arrays(np.float32, A, elements=st.floats(-2, 2, width=32))
ANYTHING = (
    FLOATS | ORDINARY | hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
    | st.lists(st.floats() | st.integers() | st.text(max_size=3), max_size=5) | st.none() | st.text() | st.binary()
    | st.integers() | st.dictionaries(st.text(max_size=2), st.floats(), max_size=2) | st.builds(object)
)  # fmt: skip


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    low = draw(st.lists(st.floats(-5, -0.01), min_size=A, max_size=A))
    high = draw(st.lists(st.floats(0.01, 5), min_size=A, max_size=A))
    positive = st.none() | st.lists(st.floats(0.001, 3), min_size=A, max_size=A).map(tuple)
    box = Workspace((-1.0, -1.0), (1.0, 0.5), (0, 2), (0.5, 0.1), draw(st.booleans()))
    return Limits(
        tuple(low), tuple(high), draw(positive), draw(positive), draw(st.sampled_from(["zero", "repeat", (0.0,) * A])),
        draw(st.sampled_from(["clamp", "refuse"])), draw(st.none() | st.just(box)), chunk_age_s=1.0,
    )  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(allowed=limits(), proposals=st.lists(ANYTHING, min_size=1, max_size=8), data=st.data())
def test_what_leaves_the_shield_can_be_executed(allowed: Limits, proposals: list[Any], data: st.DataObject) -> None:
    shield, before = Shield(allowed), None
    if data.draw(st.booleans()):
        shield.reset(np.zeros(A))
        before = np.zeros(A)
    elif allowed.hold == "zero":
        before = np.zeros(A)
    for proposed in proposals:
        position = data.draw(st.none() | hnp.arrays(np.float32, 2) | st.just(np.zeros(2)) | st.just("here"))
        age = data.draw(st.sampled_from([0.0, 0.5, 2.0, float("nan")]))
        action = shield.apply(proposed, position=position, age_s=age, operator=data.draw(st.booleans()))
        assert action.dtype == np.float32 and action.shape == (A,) and np.isfinite(action).all()
        exact = action.astype(np.float64)
        assert (exact >= allowed.low).all() and (exact <= allowed.high).all()
        if allowed.change is not None and before is not None:
            assert (np.abs(exact - before) <= allowed.change).all()
        before = exact
    assert set(shield.counts) | set(shield.operator_counts) <= KINDS.keys()
    assert sum((shield.counts + shield.operator_counts).values()) <= 3 * len(proposals)


@settings(max_examples=100, deadline=None)
@given(proposals=st.lists(ORDINARY, min_size=2, max_size=20))
def test_the_second_difference_is_bounded_away_from_the_limits(proposals: list[np.ndarray]) -> None:
    shield = Shield(Limits((-100.0,) * A, (100.0,) * A, None, (0.25,) * A))
    left = np.array([np.zeros(A), *(shield.apply(proposed) for proposed in proposals)], np.float64)
    assert (np.abs(np.diff(left, 2, axis=0)) <= 0.25 + 1e-5).all()


@settings(max_examples=100, deadline=None)
@given(proposals=st.lists(ORDINARY, min_size=1, max_size=30), relative=st.booleans())
def test_the_position_stays_in_the_workspace(proposals: list[np.ndarray], relative: bool) -> None:
    box = Workspace((-0.3, -0.2, 0.0), (0.3, 0.2, 0.5), (0, 1, 2), (0.1, 0.1, 0.1), relative)
    shield, position = Shield(Limits((-2.0,) * A, (2.0,) * A, workspace=box)), np.array([0.0, 0.0, 0.25])
    for proposed in proposals:
        moved = 0.1 * shield.apply(proposed, position=position).astype(np.float64)
        position = position + moved if relative else moved
        assert (position >= np.array(box.low) - 1e-6).all() and (position <= np.array(box.high) + 1e-6).all()


@settings(max_examples=150, deadline=None)
@given(
    proposals=st.lists(ORDINARY | st.just(np.full(A, np.nan)) | st.just("held"), min_size=5, max_size=60),
    change=st.sampled_from([None, 0.05, 0.1, 0.7]), second=st.sampled_from([None, 0.03]), relative=st.booleans(),
    hold=st.sampled_from(["zero", "repeat", (0.2, 0.0, 0.1)]), refuse=st.booleans(),
)  # fmt: skip
def test_the_workspace_and_the_change_hold_together(
    proposals: list[Any], change: float | None, second: float | None, relative: bool, hold: Any, refuse: bool
) -> None:
    """Who may not stop at once brakes in time; a hold stays inside as well."""
    box = Workspace((-0.3, -0.2, 0.0), (0.3, 0.2, 0.5), (0, 1, 2), (0.1, 0.1, 0.1), relative)
    allowed = Limits(
        (-2.0,) * A, (2.0,) * A, None if change is None else (change,) * A, None if second is None else (second,) * A,
        hold, "refuse" if refuse else "clamp", box,
    )  # fmt: skip
    shield, position, before = Shield(allowed), np.array([0.0, 0.0, 0.25]), np.array([0.0, 0.0, 2.0])
    shield.reset(np.zeros(A) if relative else before)
    before = np.zeros(A) if relative else before
    for proposed in [*proposals, *[np.full(A, 2.0)] * 40]:
        if isinstance(proposed, str):
            left = shield.hold("late", position=position).astype(np.float64)
        else:
            left = shield.apply(proposed, position=position).astype(np.float64)
        position = position + 0.1 * left if relative else 0.1 * left
        assert (position >= np.array(box.low) - 1e-9).all() and (position <= np.array(box.high) + 1e-9).all()
        assert change is None or (np.abs(left - before) <= change).all()
        before = left


SIZES = [5e-324, 1e-310, 1e-30, 1.0, 1e30, 1e300, 1.7e308]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_size_of_a_limit_or_a_position_makes_an_action_of_what_is_no_number(data: st.DataObject) -> None:
    size, signed = st.sampled_from(SIZES), st.sampled_from([*SIZES, *(-one for one in SIZES), 0.0, -0.0])
    low, high = data.draw(size.map(lambda one: -one)), data.draw(size)
    box = Workspace((data.draw(size) * -1,), (data.draw(size),), (0,), (data.draw(size),), data.draw(st.booleans()))
    change, second = (data.draw(st.none() | size.map(lambda one: (one,))) for _ in range(2))
    try:
        allowed = Limits((low,), (high,), change, second, data.draw(st.sampled_from(["zero", "repeat"])),
                         data.draw(st.sampled_from(["clamp", "refuse"])), box)  # fmt: skip
    except ConfigError:
        return
    with np.errstate(all="raise"):
        shield = Shield(allowed)
    for _ in range(4):
        proposed, position = data.draw(signed), data.draw(signed)
        with np.errstate(all="raise"):
            action = shield.apply([proposed], position=[position])
            shield.hold("late", position=[position])
            shield.plan([[proposed]], 1)
        assert np.isfinite(action).all() and low <= float(action[0]) <= high


def test_ordinary_actions_pass_unaltered_and_uncounted() -> None:
    shield = Shield(Limits.of(default_shield()))
    rng = np.random.default_rng(0)
    for _ in range(200):
        action = rng.uniform(-1, 1, 5).astype(np.float32)
        np.testing.assert_array_equal(shield.apply(action, position=np.array([0.4, 0.0, 0.2])), action)
    assert not shield.counts


@pytest.mark.parametrize(
    ("proposed", "options", "kind"),
    [
        ([np.nan, 0, 0], {}, "non_finite"),
        ([0, np.inf, 0], {}, "non_finite"),
        ([0, 0], {}, "malformed"),
        (None, {}, "malformed"),
        (["a", "b", "c"], {}, "malformed"),
        ([0.5, 0, 0], {"age_s": 1.5}, "stale"),
        ([0.5, 0, 0], {"age_s": None}, "stale"),
        (np.ma.array([0.5, 0, 0], mask=[0, 1, 0]), {}, "non_finite"),
        ([3, 0, 0], {}, "off_limits"),
    ],
)
def test_what_cannot_be_executed_is_held_and_counted(proposed: Any, options: dict[str, float], kind: str) -> None:
    shield = Shield(Limits((-1.0,) * A, (1.0,) * A, off_limits="refuse", chunk_age_s=1.0))
    assert shield.apply(proposed, **options).tolist() == [0, 0, 0]
    assert shield.counts == {kind: 1} and not shield.operator_counts
    shield.apply(proposed, operator=True, **options)
    assert shield.operator_counts == {kind: 1} and shield.counts == {kind: 1}


def test_clamping_and_slowing_are_counted() -> None:
    shield = Shield(Limits((-1.0,) * A, (1.0,) * A, change=(0.5,) * A))
    assert shield.apply([2, -0.2, 0]).tolist() == [0.5, np.float32(-0.2), 0]
    assert shield.counts == {"clamped": 1, "slowed": 1}


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rounding_is_no_event_and_ten_times_a_limit_is_one_whatever_its_unit(size: float) -> None:
    shield = Shield(Limits((-size * 1.0000001,) * A, (size * 1.0000001,) * A, off_limits="refuse"))
    assert shield.apply(np.full(A, size * 1.0000001, np.float32)).any() and not shield.counts
    assert not shield.apply(np.full(A, 10 * size)).any() and shield.counts == {"off_limits": 1}


def test_the_hold_of_absolute_positions_is_the_last_one() -> None:
    shield = Shield(Limits((-3.0,) * A, (3.0,) * A, change=(0.1,) * A, hold="repeat"))
    shield.reset(pose=[1, 2, -1])
    at = shield.apply([1.05, 2.05, -1])
    np.testing.assert_array_equal(shield.apply([np.nan] * 3), at)
    np.testing.assert_array_equal(shield.hold("late"), at)


def test_a_hold_is_approached_no_faster_than_allowed() -> None:
    shield = Shield(Limits((-1.0,) * A, (1.0,) * A, change=(0.5,) * A))
    for _ in range(2):
        shield.apply([1, 1, 1])
    assert [shield.hold("late")[0] for _ in range(3)] == [0.5, 0, 0]


def test_a_robot_that_does_not_know_where_it_is_does_not_move() -> None:
    shield = Shield(Limits.of(default_shield()))
    assert not shield.apply(np.ones(5)).any() and shield.counts == {"workspace": 1}


@pytest.mark.parametrize("chunk", [None, "x", [1, 2], np.zeros((2, A)), np.zeros((4, A + 1)), np.full((4, A), np.nan),
                                   np.zeros((4, A), object), np.zeros((4, A), complex)])  # fmt: skip
def test_a_chunk_that_cannot_be_executed_is_the_policys_fault(chunk: Any) -> None:
    shield = Shield(Limits.box(A))
    with pytest.raises(PolicyFaultError):
        shield.plan(chunk, 4)
    assert sum(shield.counts.values()) == 1
    assert shield.plan(np.full((4, A), 1e300), 4).dtype == np.float32


GOOD: dict[str, Any] = {"action_dim": 2, "low": -1, "high": [1, 2]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"low": None}, "low"), ({"low": [1, 2, 3]}, "low"), ({"low": "x"}, "low"), ({"low": True}, "low"),
        ({"low": 5}, "low, high"), ({"high": float("nan")}, "finite"), ({"high": 10**400}, "high"),
        ({"action_dim": 0}, "action_dim"), ({"action_dim": "2"}, "action_dim"), ({"change": 0}, "change"),
        ({"change": [1]}, "change"), ({"second_change": -1}, "second_change"), ({"hold": "freeze"}, "hold"),
        ({"hold": [5, 5]}, "hold"), ({"off_limits": "ignore"}, "off_limits"), ({"period_s": 0}, "period_s"),
        ({"late_events": 0}, "late_events"), ({"late_events": 1.5}, "late_events"),
        ({"chunk_age_s": -1}, "chunk_age_s"),
        ({"speed": 3}, "speed"), ({"workspace": 3}, "workspace"), ({"workspace": {"axes": [0], "size": 2}}, "size"),
        ({"workspace": {"axes": [2], "low": 0, "high": 1, "scale": 1}}, "axes"),
        ({"workspace": {"axes": [0], "low": 1, "high": 0, "scale": 1}}, "low < high"),
        ({"workspace": {"axes": [0], "low": 0, "high": 1, "scale": 0}}, "scale"),
        ({"workspace": {"axes": "xy", "low": 0, "high": 1, "scale": 1}}, "axes"),
        ({"workspace": {"axes": [0, 0], "low": 0, "high": 1, "scale": 1}}, "axes"),
        ({"workspace": {"axes": [0], "low": 2, "high": 3, "scale": 1, "relative": False}}, "workspace"),
        ({"workspace": {"axes": [0], "low": 0.5, "high": 3, "scale": 1, "relative": False}}, "hold"),
    ],
)  # fmt: skip
def test_limits_that_cannot_be_kept_are_named(change: dict[str, Any], named: str) -> None:
    assert Limits.of(GOOD).action_dim == 2
    with pytest.raises(ConfigError, match=named):
        Limits.of(GOOD | change)
