"""What the catalog keeps of an episode's safety events, whatever the robot wrote there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from invariants import example_episode, open_plane

from infra.catalog.schema import snapshot_episodes
from infra.episode import encode
from infra.judge import UNREADABLE, judge, safety_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=70), inner, max_size=40),
    max_leaves=50,
)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({"clamped": 3, "late": 0}, {"clamped": 3}),
        ({}, {}),
        (None, {UNREADABLE: 1}),
        ([["clamped", 3]], {UNREADABLE: 1}),
        ("clamped", {UNREADABLE: 1}),
        ({"late": 2, "clamped": -3}, {"late": 2, UNREADABLE: 1}),
        ({"late": True}, {UNREADABLE: 1}),
        ({"late": 2.0}, {UNREADABLE: 1}),
        ({"late": 2**31 - 1}, {"late": 2**31 - 1}),
        ({"late": 2**31}, {UNREADABLE: 1}),
        ({"x" * 65: 1}, {UNREADABLE: 1}),
        ({"a\0b": 1, "\ud800": 1, "\x1b[2J": 1}, {UNREADABLE: 3}),
        ({UNREADABLE: 2**31 - 1, "late": None}, {UNREADABLE: 2**31 - 1}),
    ],
)
def test_events_are_counts_or_unreadable(said: Any, kept: dict[str, int]) -> None:
    assert safety_of({"safety": said}) == kept


def test_many_kinds_are_bounded_and_do_not_go_unnoticed() -> None:
    kept = safety_of({"safety": {f"kind {number:03d}": 1 for number in range(200)}})
    assert len(kept) == 33 and kept[UNREADABLE] == 168


@given(JSON)
def test_whatever_a_robot_says_is_bounded_and_never_an_error(said: Any) -> None:
    kept = safety_of({"safety": said})
    assert len(kept) <= 33 and all(0 < count < 2**31 and len(kind) <= 64 for kind, count in kept.items())
    json.dumps(kept).encode()


def test_an_episode_s_events_reach_the_catalog(tmp_path: Path) -> None:
    plane = open_plane(tmp_path / "home")
    plane.submit(example_episode(0, extra={"safety": {"clamped": 2}}))
    plane.submit(example_episode(1))
    plane.settle()
    with plane.catalog.read() as connection:
        table = snapshot_episodes
        found = connection.execute(sa.select(table.c.safety).order_by(table.c.episode_id)).scalars().all()
    assert found == [{"clamped": 2}, None]


def test_an_episode_without_events_tells_of_none() -> None:
    episode = example_episode(2)
    event = SimpleNamespace(
        episode_id=episode.episode_id, robot_id="r0", schema_version=episode.schema_version, key="k"
    )
    assert "safety" not in judge(encode(episode), event, lambda episode: []).told
