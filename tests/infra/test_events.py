"""The outbox as a log: order, offsets that only their transaction moves, and at-least-once reading."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import example_episode, open_plane

from infra.events import OutboxLog, store_offsets, stored_offsets


def test_events_come_in_the_order_of_their_commits_and_carry_the_claim(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    for number in range(5):
        plane.submit(example_episode(number), trace_id=f"trace-{number}")
    log = OutboxLog(plane.catalog)
    events = log.poll("c", 10)
    assert [event.episode_id for event in events] == [f"{number:032x}" for number in range(5)]
    assert [event.trace_id for event in events] == [f"trace-{number}" for number in range(5)]
    assert [event.offset for event in events] == sorted({event.offset for event in events})
    for event in events:
        assert plane.objects.verify(event.key) == (event.size, event.sha256)
    assert log.poll("c", 2) == events[:2]


def test_polling_moves_nothing_and_consumers_are_apart(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    for number in range(3):
        plane.submit(example_episode(number))
    log = OutboxLog(plane.catalog)
    first = log.poll("a", 10)
    assert log.poll("a", 10) == first
    with plane.catalog.begin() as connection:
        store_offsets(connection, "a", {0: first[1].offset})
    assert log.poll("a", 10) == first[2:]
    assert log.poll("b", 10) == first


def test_offsets_follow_their_transaction(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)

    def fail() -> None:
        with plane.catalog.begin() as connection:
            store_offsets(connection, "a", {0: 7})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with plane.catalog.read() as connection:
        assert stored_offsets(connection, "a") == {}


@given(st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 50), max_size=3), max_size=8))
@settings(max_examples=8, deadline=None)
def test_offsets_never_go_back(tmp_path_factory: pytest.TempPathFactory, updates: list[dict[int, int]]) -> None:
    plane = open_plane(tmp_path_factory.mktemp("offsets"))
    expected: dict[int, int] = {}
    for update in updates:
        with plane.catalog.begin() as connection:
            store_offsets(connection, "a", update)
        expected = {p: max(expected.get(p, 0), update.get(p, 0)) for p in expected.keys() | update.keys()}
    with plane.catalog.read() as connection:
        assert stored_offsets(connection, "a") == expected
    plane.catalog.close()
