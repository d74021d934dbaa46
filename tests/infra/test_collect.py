"""Garbage collection frees what no kept version needs and never lets a version read incomplete (row 25)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa
from invariants import KILLED, Plane, digest, example_episode, history, in_process, open_plane
from test_coordinator import coordinator, drain
from test_prefetcher import commit
from test_reader import read_to

from infra.catalog import dialect
from infra.catalog.schema import collections, episodes, snapshot_episodes
from infra.collect import PIN_S, Collection, collect, pin
from infra.crashpoints import registered
from infra.episode import encode
from infra.errors import ConfigError, CorruptDataError
from infra.reader import SnapshotReader
from infra.settings import load_settings

DAY = 86_400.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The catalog's clock, to be set."""
    times = [1.0e9]
    monkeypatch.setattr(dialect, "now", lambda connection: times[0])
    return times


@pytest.fixture
def plane(tmp_path: Path, clock: list[float]) -> Plane:
    """Versions 1 to 4, each adding two episodes, made a day apart."""
    plane = open_plane(tmp_path)
    for first in (0, 2, 4, 6):
        clock[0] += DAY
        commit(plane, range(first, first + 2))
    return plane


def withdraw(plane: Plane, clock: list[float], *numbers: int) -> None:
    """Each by a version of its own, a day after the one before."""
    for number in numbers:
        clock[0] += DAY
        plane.snapshots.withdraw([f"{number:032x}"], reason="test", writer="test")


def run(plane: Plane, keep_days: float) -> Collection:
    return collect(plane.catalog, plane.objects, keep_s=keep_days * DAY)


def stored(plane: Plane) -> set[int]:
    """Numbers of the episodes whose object is there."""
    with plane.catalog.read() as connection:
        rows = list(connection.execute(sa.select(episodes)))
    return {int(row.episode_id, 16) for row in rows if plane.objects.exists(row.key)}


def assert_i4_from_the_floor(plane: Plane, before: dict) -> None:  # type: ignore[type-arg]
    """Every version at or above the floor reads the bytes that it read before; what is below reads whole or says so."""
    for version, (snapshot_digest, content) in before.items():
        assert plane.snapshots.get(version).digest == snapshot_digest
        try:
            members = plane.snapshots.episodes(version)
        except ConfigError:
            assert version < plane.snapshots.floor()
            continue
        assert tuple((m.episode_id, digest(plane.objects.get(m.key))) for m in members) == content


def test_what_was_removed_before_the_floor_goes_and_nothing_else(plane: Plane, clock: list[float]) -> None:
    withdraw(plane, clock, 0, 5)  # by versions 5 and 6
    before = history(plane.home)
    sizes = {m.episode_id: m.size for m in plane.snapshots.episodes(4)}
    assert run(plane, 30) == Collection(0, 0, 0)
    assert run(plane, 0.5) == Collection(5, 1, sizes[f"{0:032x}"])  # version 5 was current until today
    assert stored(plane) == set(range(1, 8))
    assert_i4_from_the_floor(plane, before)
    assert run(plane, 0) == Collection(6, 1, sizes[f"{5:032x}"])
    assert stored(plane) == {1, 2, 3, 4, 6, 7}
    assert_i4_from_the_floor(plane, before)
    assert run(plane, 0) == run(plane, 30) == Collection(6, 0, 0), "a floor does not go back"
    with pytest.raises(ConfigError, match="snapshot 4 was collected; the oldest kept is 6"):
        plane.snapshots.episodes(4)
    assert plane.snapshots.verify() == 6
    assert plane.ingest.status(f"{0:032x}") == "quarantined"


def test_nothing_removed_records_no_floor(plane: Plane, clock: list[float]) -> None:
    assert run(plane, 0) == Collection(0, 0, 0)
    with plane.catalog.read() as connection:
        assert connection.execute(sa.select(collections)).all() == []


def test_a_pinned_version_stays_until_its_pin_ends(plane: Plane, clock: list[float]) -> None:
    withdraw(plane, clock, 0, 5)
    before = history(plane.home)
    with plane.catalog.begin() as connection:
        pin(connection, "slow", 3)
        pin(connection, "fast", 6)
    clock[0] += PIN_S - 1
    assert run(plane, 0) == Collection(0, 0, 0)
    assert history(plane.home) == before
    clock[0] += 2
    later = run(plane, 0)
    assert (later.floor, later.objects) == (6, 2)


def test_an_object_that_another_episode_needs_stays(plane: Plane, clock: list[float]) -> None:
    """Two episodes of the same bytes cannot come about by themselves: the id is in them. A restored catalog may."""
    withdraw(plane, clock, 0, 5)
    with plane.catalog.begin() as connection:
        key = connection.execute(sa.select(episodes.c.key).where(episodes.c.episode_id == f"{0:032x}")).scalar_one()
        row = dict(connection.execute(sa.select(episodes).where(episodes.c.episode_id == f"{6:032x}")).one()._mapping)
        connection.execute(episodes.update().where(episodes.c.episode_id == f"{6:032x}").values(key=key))
    assert run(plane, 0).objects == 1
    assert plane.objects.exists(key)
    with plane.catalog.begin() as connection:
        connection.execute(episodes.update().where(episodes.c.episode_id == f"{6:032x}").values(key=row["key"]))


def test_what_the_coordinator_refused_stays_for_its_release(plane: Plane, clock: list[float]) -> None:
    plane.submit(example_episode(9))
    drain(coordinator(plane, lambda episode: 1 / 0))
    withdraw(plane, clock, 0)
    run(plane, 0)
    plane.ingest.release(f"{9:032x}", digest(encode(example_episode(9))))
    drain(coordinator(plane))
    assert plane.ingest.status(f"{9:032x}") == "snapshot"


def _collect(home: Path) -> None:
    run(open_plane(home), 0)


@pytest.mark.parametrize("crash", ["collect.floor_recorded", "collect.object_deleted", "collect.object_deleted:2"])
def test_killed_while_collecting(plane: Plane, clock: list[float], crash: str) -> None:
    """What the killed one left is deleted by the next; at no moment does a version read incomplete."""
    assert set(registered("collect.py")) == {"collect.floor_recorded", "collect.object_deleted"}
    withdraw(plane, clock, 0, 5)
    before = history(plane.home)
    assert in_process(_collect, plane.home, crash=crash) == KILLED
    assert_i4_from_the_floor(plane, before)
    assert plane.snapshots.floor() == 6
    run(plane, 0)
    assert stored(plane) == {1, 2, 3, 4, 6, 7}
    assert_i4_from_the_floor(plane, before)
    assert run(plane, 0) == Collection(6, 0, 0)


def test_row_25_a_lagging_reader_goes_on_while_garbage_is_collected(plane: Plane, clock: list[float]) -> None:
    """It holds an old version, pinned; what it needs to go on is there, whatever is collected above it."""
    settings = load_settings(home=plane.home, poll_s=0.02)
    with SnapshotReader(settings, name="slow") as reader:
        found = read_to(reader, 2)
        os.kill(reader.prefetcher_pid or 0, signal.SIGSTOP)  # lags from here on
        for number in (0, 2, 5):  # of versions 1, 2 and 3
            plane.snapshots.withdraw([f"{number:032x}"], reason="test", writer="test")
        before = history(plane.home)
        done = run(plane, 0)
        assert (done.floor, done.objects) == (0, 0) and plane.snapshots.floor() <= reader.version
        assert history(plane.home) == before, "I4: the pinned version and all above it"
        os.kill(reader.prefetcher_pid or 0, signal.SIGCONT)
        found += read_to(reader, plane.snapshots.latest().version)
        held: list[str] = []
        for increment in found:
            held = [i for i in held if i not in increment.removed] + [e.episode_id for e in increment.added]
        assert sorted(held) == [m.episode_id for m in plane.snapshots.episodes(reader.version)]
        assert run(plane, 0).objects == 3
    assert stored(plane) == {1, 3, 4, 6, 7}


def test_a_new_reader_begins_below_the_floor(plane: Plane, clock: list[float]) -> None:
    """Its first step reaches over what was collected."""
    withdraw(plane, clock, 0, 5)
    run(plane, 0)
    with SnapshotReader(load_settings(home=plane.home, poll_s=0.02)) as reader:
        found = read_to(reader, 6)
    assert (found[0].after, found[0].version) == (0, 6)
    assert len(found[0].added) == 6


def test_a_catalog_that_was_changed_by_hand_frees_nothing(plane: Plane, clock: list[float]) -> None:
    withdraw(plane, clock, 0, 5)
    before = len(list(plane.objects.list("episodes")))
    with plane.catalog.begin() as connection:
        connection.execute(snapshot_episodes.update().where(snapshot_episodes.c.added == 2).values(removed=3))
    with pytest.raises(CorruptDataError, match="does not match its digest"):
        collect(plane.catalog, plane.objects, keep_s=0.0)
    assert len(list(plane.objects.list("episodes"))) == before
