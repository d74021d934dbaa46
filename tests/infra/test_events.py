"""The outbox as a log: the contract of every log, and offsets that only their transaction moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import open_plane
from log_contract import LogContract, Rig

from infra.events import store_offsets, stored_offsets
from infra.events.outbox import OutboxLog


class TestOutboxLog(LogContract):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> Rig:
        plane = open_plane(tmp_path)
        return Rig(plane, OutboxLog(plane.catalog), lambda: OutboxLog(plane.catalog), lambda: None)

    def test_all_events_come_in_the_order_of_their_commits(self, rig: Rig) -> None:
        rig.submit(*range(7))
        assert [int(event.episode_id, 16) for event in rig.log.poll("c", 10)] == list(range(7))


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
