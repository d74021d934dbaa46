"""Snapshots against a model: whatever is added, withdrawn and revoked, old versions stay and increments compose."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import (
    KILLED,
    Plane,
    assert_invariants,
    digest,
    example_episode,
    history,
    in_process,
    open_plane,
    start_process,
)

from infra.catalog.schema import collections, quarantine
from infra.coordinator import Coordinator
from infra.crashpoints import registered
from infra.episode import MAX_REASON_CHARS, encode
from infra.errors import ConfigError, CorruptDataError
from infra.events.outbox import OutboxLog

SHAS: dict[int, str] = {}


def episode_id(number: int) -> str:
    return f"{number:032x}"


def sha(number: int, robot: str = "r0") -> str:
    if number not in SHAS:
        SHAS[number] = digest(encode(example_episode(number, robot=robot)))
    return SHAS[number]


def add(plane: Plane, *numbers: int) -> None:
    """Commit the episodes as one snapshot; episode `n` is of robot r<n % 2>, produced at time n."""
    for number in numbers:
        plane.submit(example_episode(number, robot=f"r{number % 2}"), produced_at=float(number))
    coordinator = Coordinator(
        plane.catalog, plane.objects, OutboxLog(plane.catalog), lambda episode: [], micro_batch=100
    )
    coordinator.step()
    coordinator.lease.release()


def ids(plane: Plane, version: int) -> set[int]:
    return {int(member.episode_id, 16) for member in plane.snapshots.episodes(version)}


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 15), min_size=1, max_size=4)),
        st.tuples(st.just("withdraw"), st.lists(st.integers(0, 15), min_size=1, max_size=3)),
        st.tuples(st.just("revoke"), st.tuples(st.integers(0, 1), st.integers(0, 15), st.integers(0, 15))),
    ),
    max_size=8,
)


@given(ACTIONS)
@settings(max_examples=10, deadline=None)
def test_snapshots_follow_the_model(tmp_path_factory: pytest.TempPathFactory, actions) -> None:  # type: ignore[no-untyped-def]
    plane = open_plane(tmp_path_factory.mktemp("snapshots"))
    model: list[set[int]] = [set()]
    submitted: set[int] = set()
    rules: list[tuple[int, int, int]] = []
    for action, argument in actions:
        before, now = history(plane.home), set(model[-1])
        if action == "add":
            fresh = set(argument) - submitted
            submitted |= fresh
            add(plane, *argument)
            now |= {n for n in fresh if not any(n % 2 == r and a <= n <= b for r, a, b in rules)}
        elif action == "withdraw":
            plane.snapshots.withdraw([episode_id(n) for n in argument], reason="unreadable", writer="reader")
            now -= set(argument)
        else:
            robot, first, last = argument[0], min(argument[1:]), max(argument[1:])
            plane.snapshots.revoke(f"r{robot}", first, last, reason="bad gripper", actor="steward")
            rules.append((robot, first, last))
            now -= {n for n in now if n % 2 == robot and first <= n <= last}
        if now != model[-1]:
            model.append(now)
        assert plane.snapshots.latest().version == len(model) - 1
        spooled = {episode_id(n): digest(encode(example_episode(n, robot=f"r{n % 2}"))) for n in submitted}
        assert_invariants(plane.home, spooled, before)
    assert [ids(plane, version) for version in range(len(model))] == model
    for after in range(len(model)):
        for version in range(after, len(model)):
            step = plane.snapshots.increment(after, version)
            added, removed = {int(m.episode_id, 16) for m in step.added}, {int(i, 16) for i in step.removed}
            assert (model[after] | added) - removed == model[version]
            assert not added & model[after] and removed <= model[after]
            assert step.digest == plane.snapshots.get(version).digest
    plane.catalog.close()


def test_before_the_first_snapshot_there_is_the_empty_one(tmp_path: Path) -> None:
    snapshots = open_plane(tmp_path).snapshots
    assert (snapshots.latest().version, snapshots.latest().episodes) == (0, 0)
    assert snapshots.episodes(0) == []
    assert snapshots.increment(0).added == ()


def test_versions_that_are_not_there_are_named(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    add(plane, 1)
    with pytest.raises(ConfigError, match="no snapshot 7; the latest is 1"):
        plane.snapshots.episodes(7)
    with pytest.raises(ConfigError, match="from snapshot 5 to 1"):
        plane.snapshots.increment(5)
    with pytest.raises(ConfigError, match="since"):
        plane.snapshots.revoke("r0", 2.0, 1.0, reason="", actor="steward")


def test_nothing_to_withdraw_makes_no_version(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    add(plane, 1)
    assert plane.snapshots.withdraw([episode_id(9)], reason="", writer="reader").version == 1


def test_the_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    planes = [open_plane(tmp_path / name) for name in "ab"]
    for plane, order in zip(planes, ((1, 2, 3), (3, 1, 2)), strict=True):
        add(plane, *order)
    assert planes[0].snapshots.latest().digest == planes[1].snapshots.latest().digest
    add(planes[0], 4)
    add(planes[1], 5)
    assert planes[0].snapshots.latest().digest != planes[1].snapshots.latest().digest


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE snapshot_episodes SET removed = 2 WHERE added = 1",
        "UPDATE snapshot_episodes SET added = 2 WHERE added = 1",
        "UPDATE episodes SET sha256 = 'x'",
    ],
)
def test_rows_changed_behind_its_back_break_the_chain(tmp_path: Path, tampering: str) -> None:
    plane = open_plane(tmp_path)
    add(plane, 1, 2)
    add(plane, 3)
    assert plane.snapshots.verify() == 2
    with plane.catalog.begin() as connection:
        connection.exec_driver_sql(tampering)
    with pytest.raises(CorruptDataError, match="does not match its digest"):
        plane.snapshots.verify()


def test_withdrawn_episodes_are_in_quarantine_with_their_version(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    add(plane, 1, 2)
    made = plane.snapshots.withdraw([episode_id(2)], reason="sha256 differs", writer="reader-0")
    assert (made.version, made.episodes, made.removed) == (2, 1, 1)
    with plane.catalog.read() as connection:
        row = connection.execute(sa.select(quarantine)).one()
    assert (row.episode_id, row.version, row.stage) == (episode_id(2), 2, "read")
    assert row.reasons[0]["message"] == "sha256 differs"
    assert plane.ingest.status(episode_id(2)) == "quarantined"
    assert ids(plane, 1) == {1, 2} and ids(plane, 2) == {1}


def test_a_reason_may_repeat_what_an_episode_says(tmp_path: Path) -> None:
    """A reader that names what it could not take must not fail for the name."""
    plane = open_plane(tmp_path)
    add(plane, 1, 2)
    made = plane.snapshots.withdraw([episode_id(2)], reason="\x00\ud800\x1b[2J" + "x" * 10**6, writer="reader-0")
    assert made.reason.startswith("\\x00\\ud800\\x1b[2Jx") and len(made.reason) <= MAX_REASON_CHARS
    with plane.catalog.read() as connection:
        assert connection.execute(sa.select(quarantine.c.reasons)).scalar_one()[0]["message"] == made.reason


def test_below_the_floor_only_what_lost_nothing_reads(tmp_path: Path) -> None:
    """`collect` records the floor; what it took is answered with the oldest version kept, never with a part."""
    plane = open_plane(tmp_path)
    add(plane, 1)  # 1
    add(plane, 2)  # 2
    add(plane, 3)  # 3
    plane.snapshots.withdraw([episode_id(2)], reason="", writer="reader")  # 4
    add(plane, 4)  # 5
    before = [ids(plane, version) for version in range(6)]
    assert plane.snapshots.floor() == 0
    with plane.catalog.begin() as connection:
        values = {"floor": 5, "objects": 1, "bytes": 1, "actor": "test", "created_at": 1.0}
        connection.execute(collections.insert().values(values))
    assert plane.snapshots.floor() == 5
    for version in (2, 3):
        for read in (plane.snapshots.episodes, lambda v: plane.snapshots.increment(1, v)):
            with pytest.raises(ConfigError, match=f"snapshot {version} was collected; the oldest kept is 5"):
                read(version)
    for version in (0, 1, 4, 5):
        assert ids(plane, version) == before[version]
    for after in range(5):
        step = plane.snapshots.increment(after, 5)
        added, removed = {int(m.episode_id, 16) for m in step.added}, {int(i, 16) for i in step.removed}
        assert (before[after] | added) - removed == before[5]
    assert plane.snapshots.increment(2, 3).added[0].episode_id == episode_id(3)
    assert plane.snapshots.verify() == 5


def test_an_increment_adds_in_order_of_version_then_id(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    for numbers in ((7, 5), (6, 2), (9, 1)):
        add(plane, *numbers)
    assert [int(m.episode_id, 16) for m in plane.snapshots.increment(0).added] == [5, 7, 2, 6, 1, 9]
    assert [int(m.episode_id, 16) for m in plane.snapshots.episodes(3)] == [1, 2, 5, 6, 7, 9]


def _withdraw(home: Path, *numbers: int) -> None:
    plane = open_plane(home)
    for number in numbers:
        plane.snapshots.withdraw([episode_id(number)], reason="unreadable", writer="reader")


def test_readers_that_withdraw_at_once_make_gapless_versions(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    add(plane, *range(12))
    before = history(tmp_path)
    processes = [start_process(_withdraw, tmp_path, *range(first, first + 6)) for first in (0, 3, 6)]
    for process in processes:
        process.join(60)
    assert {process.exitcode for process in processes} == {0}
    assert plane.snapshots.latest().version == 13  # each episode once, whoever was first
    assert_invariants(
        tmp_path, {episode_id(n): digest(encode(example_episode(n, robot=f"r{n % 2}"))) for n in range(12)}, before
    )


@pytest.mark.parametrize("point", registered("snapshots.py"))
def test_killed_while_withdrawing(tmp_path: Path, point: str) -> None:
    plane = open_plane(tmp_path)
    add(plane, 1, 2)
    before = history(tmp_path)
    assert in_process(_withdraw, tmp_path, 2, crash=point) == KILLED
    assert history(tmp_path) == before
    _withdraw(tmp_path, 2)
    spooled = {episode_id(n): digest(encode(example_episode(n, robot=f"r{n % 2}"))) for n in (1, 2)}
    assert_invariants(tmp_path, spooled, before)
