"""The reconciler: what a broker, a store or a crash left different is mended, by one process at a time."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from invariants import Plane, digest, example_episode, in_process, open_plane, start_process
from test_coordinator import coordinator, drain, members
from waiting import wait_until

from infra.catalog import dialect
from infra.catalog.leases import Lease
from infra.catalog.schema import episodes, outbox
from infra.episode import encode
from infra.errors import LeaseLostError, UnavailableError
from infra.objects import ASIDE, episode_key, incoming_key
from infra.reconcile import ROLE, Reconciliation, main, reconcile, run, settled_until

DAY = 86_400.0


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


def test_the_reconciler_announces_what_a_broker_lost(plane: Plane) -> None:
    for number in range(3):
        plane.submit(example_episode(number))
    with plane.catalog.begin() as connection:
        connection.execute(outbox.delete().where(outbox.c.episode_id != f"{1:032x}"))
    drain(coordinator(plane))
    assert members(plane) == {1}
    assert reconcile(plane.catalog, plane.objects) == Reconciliation(0, 0, 0, 0)  # still within its grace
    later = 2.0e10
    assert reconcile(plane.catalog, plane.objects, now=later) == Reconciliation(2, 0, 0, 0)
    drain(coordinator(plane))
    assert members(plane) == {0, 1, 2}
    assert reconcile(plane.catalog, plane.objects, now=later) == Reconciliation(0, 0, 0, 0)


def test_the_reconciler_asks_for_lost_objects_and_keeps_orphans(plane: Plane) -> None:
    plane.submit(example_episode(1))
    plane.submit(example_episode(2))
    drain(coordinator(plane))
    plane.submit(example_episode(3))
    with plane.catalog.read() as connection:
        key = connection.execute(sa.select(episodes.c.key).where(episodes.c.episode_id == f"{3:032x}")).scalar_one()
    plane.objects.delete(key)
    orphan = encode(example_episode(4))
    for key in (upload := incoming_key("r0", f"{4:032x}")), incoming_key("r0", f"{4:032x}"):
        plane.objects.put(key, orphan)
    plane.objects.accept(upload, digest(orphan), len(orphan))
    plane.objects.delete(upload)
    assert reconcile(plane.catalog, plane.objects, now=2.0e10) == Reconciliation(0, 1, 1, 1)
    assert plane.objects.exists(episode_key(digest(orphan)))  # it may be all that is left of an acknowledged episode
    assert plane.ingest.status(f"{3:032x}") == "unknown"
    for number in (3, 4):  # what their spools do
        plane.submit(example_episode(number))
    drain(coordinator(plane))
    assert members(plane) == {1, 2, 3, 4}


def test_a_sweep_looks_at_any_number_of_objects(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.audit._BATCH", 3)
    for number in range(4):
        plane.submit(example_episode(number))
    for number in range(5):
        plane.objects.put(f"episodes/00/{number}.tar", b"x")
    later = 2.0e10
    quiet = reconcile(plane.catalog, plane.objects, now=later, sweep=False)
    assert quiet.orphans == 0
    assert reconcile(plane.catalog, plane.objects, now=later).orphans == 5
    assert len(list(plane.objects.list("episodes"))) == 9


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_ages_go_by_the_catalogs_clock(plane: Plane, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """This machine's clock, a day off, neither announces again at each look nor leaves what was lost."""
    here = time.time
    monkeypatch.setattr("infra.reconcile.time.time", lambda: here() + jump)
    monkeypatch.setattr(dialect, "now", lambda connection: here())
    plane.submit(example_episode(1))
    assert reconcile(plane.catalog, plane.objects).announced_again == 0
    at(plane, 1, here() - 7200)
    forget(plane, 1)
    assert [reconcile(plane.catalog, plane.objects).announced_again for _ in range(3)] == [1, 0, 0]


def test_what_was_committed_by_a_clock_that_was_put_back_is_not_left(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = time.time
    monkeypatch.setattr(dialect, "now", lambda connection: here() + DAY)
    for number in (1, 2):
        plane.submit(example_episode(number))
    monkeypatch.setattr(dialect, "now", lambda connection: here())
    forget(plane, 1)
    since = settled_until(plane.catalog, 0.0, here() - 3600)
    found = [reconcile(plane.catalog, plane.objects, since=since).announced_again for _ in range(3)]
    assert found == [2, 0, 0], "both once: a time that is to come says nothing of an age"
    plane.settle()
    assert members(plane) == {1, 2}


def test_a_sweep_removes_writes_that_never_ended(plane: Plane) -> None:
    """Files that a killed process left half written; a young one may be at work still, and objects stay."""
    plane.submit(example_episode(1))
    aside = plane.home / "objects" / ASIDE
    for name, age in (("old", 90_000.0), ("day", 80_000.0), ("young", 0.0)):
        (aside / name).write_bytes(b"half")
        os.utime(aside / name, (time.time() - age,) * 2)
    assert reconcile(plane.catalog, plane.objects, sweep=False).unfinished_deleted == 0
    assert reconcile(plane.catalog, plane.objects).unfinished_deleted == 1
    assert {path.name for path in aside.iterdir()} == {"day", "young"}
    found = reconcile(plane.catalog, plane.objects, grace_s=3600.0, unfinished_s=60.0)
    assert found.unfinished_deleted == 1, "not younger than the grace"
    assert reconcile(plane.catalog, plane.objects, grace_s=0.0, unfinished_s=0.0).unfinished_deleted == 1
    assert len(list(plane.objects.list("episodes"))) == 1
    shutil.rmtree(aside)
    assert reconcile(plane.catalog, plane.objects).unfinished_deleted == 0
    plane.submit(example_episode(2))


def test_a_look_begins_at_the_oldest_unsettled_episode(plane: Plane) -> None:
    for number in range(4):
        plane.submit(example_episode(number))
        at(plane, number, 100.0 + number)
    forget(plane, 2)
    drain(coordinator(plane))
    assert settled_until(plane.catalog, 0.0, 1000.0) == 102.0
    assert settled_until(plane.catalog, 102.0, 1000.0) == 102.0  # itself included
    assert settled_until(plane.catalog, 102.5, 1000.0) == 1000.0
    assert settled_until(plane.catalog, 0.0, 101.0) == 101.0  # younger ones are not judged
    assert settled_until(plane.catalog, 500.0, 101.0) == 101.0  # of a clock that was put back
    later = 2.0e10
    assert reconcile(plane.catalog, plane.objects, now=later, since=102.5).announced_again == 0
    assert reconcile(plane.catalog, plane.objects, now=later, since=102.0).announced_again == 1
    drain(coordinator(plane))
    assert settled_until(plane.catalog, 102.0, 1000.0) == 1000.0
    assert members(plane) == {0, 1, 2, 3}


def test_a_look_reads_the_new_episodes_alone(plane: Plane) -> None:
    asked: list[tuple[str, Any]] = []
    sa.event.listen(
        plane.catalog.engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, parameters, *_: asked.append((statement, parameters)),
    )
    since = settled_until(plane.catalog, 0.0, 1000.0)
    reconcile(plane.catalog, plane.objects, since=since, sweep=False)
    looks = [(statement, parameters) for statement, parameters in asked if "FROM episodes" in statement]
    assert len(looks) == 2
    with plane.catalog.read() as connection:
        for statement, parameters in looks:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            assert any("episodes USING INDEX ix_episodes_committed_at (committed_at>" in str(step) for step in plan)


# --- the process ------------------------------------------------------------------------------------------------------


def announcements(plane: Plane) -> int:
    with plane.catalog.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(outbox)).scalar_one())


def at(plane: Plane, number: int, time_s: float) -> None:
    """As if this episode had been committed then."""
    with plane.catalog.begin() as connection:
        connection.execute(
            episodes.update().where(episodes.c.episode_id == f"{number:032x}").values(committed_at=time_s)
        )


def forget(plane: Plane, number: int) -> None:
    """Lose the announcement of one episode."""
    with plane.catalog.begin() as connection:
        connection.execute(outbox.delete().where(outbox.c.episode_id == f"{number:032x}"))


def lose(plane: Plane, *numbers: int) -> None:
    """Commit episodes whose announcement is lost, long ago."""
    for number in numbers:
        plane.submit(example_episode(number))
    with plane.catalog.begin() as connection:
        connection.execute(outbox.delete())
        connection.execute(episodes.update().values(committed_at=1.0))


def test_two_reconcilers_announce_once_and_one_takes_over(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWD_LEASE_S", "0.3")
    lose(plane, 1, 2)
    arguments = ["--home", str(plane.home), "--every", "0.1", "--grace", "60"]
    workers = [start_process(main, arguments) for _ in range(2)]
    try:
        wait_until(lambda: announcements(plane) == 2, "nothing was announced")
        with plane.catalog.read() as connection:
            holder = str(connection.execute(sa.text("select holder from leases")).scalar_one())
        first, second = sorted(workers, key=lambda worker: f":{worker.pid}:" not in holder)
        first.kill()
        first.join()
        with plane.catalog.begin() as connection:
            connection.execute(outbox.update().values(created_at=1.0))
        wait_until(lambda: announcements(plane) == 4, "the second did not take over")
        second.terminate()
        second.join(60)
        assert second.exitcode == 0
        Lease(plane.catalog, ROLE, 1.0).acquire()  # given back
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    drain(coordinator(plane))
    assert members(plane) == {1, 2}


def test_a_server_that_is_away_is_waited_for(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    lose(plane, 1)
    stop, failures = threading.Event(), [UnavailableError("the store answers 503", "wait")] * 3
    whole = plane.objects.exists

    def exists(key: str) -> bool:
        if failures:
            raise failures.pop()
        stop.set()
        return whole(key)

    monkeypatch.setattr(plane.objects, "exists", exists)
    monkeypatch.setattr("infra.reconcile.backoff", lambda attempt: 0.001)
    run(plane.catalog, plane.objects, stop, every_s=0.01, grace_s=60.0)
    assert announcements(plane) == 1


@pytest.mark.parametrize(("sweep_s", "sweeps"), [(3600.0, [True, False, False]), (0.0, [True, True, True])])
def test_everything_is_looked_at_first_and_in_sweeps(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, sweep_s: float, sweeps: list[bool]
) -> None:
    stop, looks = threading.Event(), []

    def look(*_: object, since: float, now: float, sweep: bool, **__: object) -> Reconciliation:
        looks.append((now - 60.0 - since, sweep))
        if len(looks) == 1:
            lose(plane, 1)  # committed long ago: settled already, as far as the next look knows
        if len(looks) == 3:
            stop.set()
        return Reconciliation(0, 0, 0, 0)

    monkeypatch.setattr("infra.reconcile.reconcile", look)
    run(plane.catalog, plane.objects, stop, every_s=0.01, grace_s=60.0, sweep_s=sweep_s)
    assert [sweep for _, sweep in looks] == sweeps
    assert [age > 60.0 for age, _ in looks] == [False, *sweeps[1:]]  # the lost one is found by a sweep


def test_work_ends_when_another_took_the_lease(plane: Plane) -> None:
    lose(plane, 1, 2, 3)
    asked = []

    def alive() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise LeaseLostError("taken", "wait")

    with pytest.raises(LeaseLostError):
        reconcile(plane.catalog, plane.objects, alive=alive)
    assert announcements(plane) == 1


def test_a_wrong_home_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.yaml").write_text("profile: flet\n")
    assert in_process(main, ["--home", str(tmp_path)]) == 2
    assert "profile" in capfd.readouterr().err
