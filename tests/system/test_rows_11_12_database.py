"""Rows 11 and 12 of the fault matrix: the database goes away in the middle of a transaction, or has no room for it."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from invariants import Plane, assert_invariants, digest, example_episode, open_plane
from log_tools import coordinator, members, open_log, open_relay, unsent

from infra import crashpoints
from infra.catalog import Catalog, schema
from infra.coordinator import Coordinator
from infra.episode import Episode, encode
from infra.errors import LwdError, StorageFullError, UnavailableError
from infra.events.outbox import OutboxLog
from infra.ingest import Ingest
from infra.objects.directory import DirectoryStore
from infra.servers import Servers
from infra.servers.postgres import Postgres
from infra.snapshots import Snapshots

# Those inside a transaction; in which module they are passed.
POINTS = {
    "ingest.episode_inserted": "infra.ingest",
    "ingest.announced": "infra.ingest",
    "relay.produced": "infra.events.relay",
    "relay.marked": "infra.events.relay",
    "coordinator.quarantined": "infra.coordinator",
    "snapshots.members_inserted": "infra.snapshots",
    "coordinator.offsets_stored": "infra.coordinator",
}
SHORT = ("ingest.announced", "relay.marked", "coordinator.offsets_stored")


class Refusal:
    rule, severity, message = "short", "block", "too short"


def check(episode: Episode) -> list[Any]:
    return [Refusal()] if episode.task == "S4" else []


def spooled(count: int) -> dict[str, str]:
    return {f"{number:032x}": digest(encode(example_episode(number))) for number in range(count)}


def again_until_it_works(work: Callable[[], object], failures: list[LwdError]) -> None:
    while True:
        try:
            work()
            return
        except UnavailableError as error:
            failures.append(error)
            assert len(failures) < 200
            time.sleep(0.1)


# --- 11: restarted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point", [point if point in SHORT else pytest.param(point, marks=pytest.mark.slow) for point in POINTS]
)
def test_row_11_database_restarted_mid_transaction(
    fleet_home: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """At each step within a transaction; every second time by SIGKILL. What was under way is undone and done again."""
    plane = open_plane(fleet_home)
    passed: list[str] = []

    def restart_here(name: str) -> None:
        if name == point:
            passed.append(name)
            if len(passed) <= 2:
                (servers.postgres.kill if len(passed) == 2 else servers.postgres.stop)()
                servers.postgres.start()

    monkeypatch.setattr(f"{POINTS[point]}.crashpoint", restart_here)
    assert point in crashpoints.registered()
    failures: list[LwdError] = []
    for number in range(6):
        again_until_it_works(lambda n=number: plane.submit(example_episode(n)), failures)
    relay, log = open_relay(fleet_home, batch=4), open_log(fleet_home)
    worker = coordinator(fleet_home, log, check, micro_batch=4, lease_s=60.0)
    again_until_it_works(lambda: exhaust(relay.step), failures)
    assert unsent(plane) == 0
    while log.lag("coordinator"):
        again_until_it_works(worker.step, failures)
    relay.close()
    log.close()
    assert len(passed) > 2 and len(failures) == 2, f"{point}: passed {len(passed)}, failed {len(failures)} times"
    assert_invariants(fleet_home, spooled(6))
    assert members(plane) == {0, 1, 2, 4, 5}


def exhaust(step: Callable[[], int]) -> None:
    while step():
        pass


@pytest.mark.slow
def test_row_11_database_restarted_while_everything_runs(fleet_home: Path, servers: Servers) -> None:
    plane = open_plane(fleet_home)
    stop, rng = threading.Event(), random.Random(11)
    log, relay = open_log(fleet_home), open_relay(fleet_home)
    worker = coordinator(fleet_home, log, check, micro_batch=2, lease_s=60.0)
    failures: list[LwdError] = []

    def submit() -> None:
        for number in range(60):
            again_until_it_works(lambda n=number: plane.submit(example_episode(n)), failures)
            time.sleep(0.05)

    jobs = [(worker.run, (stop, 0.05)), (relay.run, (stop,)), (submit, ())]
    threads = [threading.Thread(target=target, args=arguments) for target, arguments in jobs]
    for thread in threads:
        thread.start()
    try:
        for number in range(4):
            time.sleep(rng.uniform(0.2, 1.5))
            (servers.postgres.kill if number % 2 else servers.postgres.stop)()
            servers.postgres.start()
        threads[2].join()
        while plane.snapshots.latest().episodes < 45:  # the test's own time limit ends it
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        log.close()
    assert failures
    assert_invariants(fleet_home, spooled(60))


# --- 12: full ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of so many MiB; skips where this cannot be done."""
    mounted: list[Path] = []

    def mount(mebibytes: int) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="lwd-disk-"))  # not below pytest's: PostgreSQL runs as another user
        program = shutil.which("mount")
        command = [program or "mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=755", "tmpfs", str(folder)]
        if os.geteuid() != 0 or not program or subprocess.run(command, check=False).returncode:
            folder.rmdir()
            pytest.skip("row 12, a full disk of the database: mounting a small tmpfs needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)
        folder.rmdir()


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    filler = folder / "filler"
    free = shutil.disk_usage(folder).free
    with filler.open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, max(free - leave, 1))
    return filler


def local_plane(home: Path, url: str) -> Plane:
    catalog, objects = Catalog(url), DirectoryStore(home / "objects")
    catalog.migrate()
    return Plane(home, catalog, objects, Ingest(catalog, objects), Snapshots(catalog))


def submit_until_it_is_refused(plane: Plane, first: int) -> tuple[int, LwdError]:
    """The number of the first episode that was not acknowledged, and why."""
    for number in range(first, first + 5000):
        try:
            plane.submit(example_episode(number))
        except LwdError as error:
            return number, error
    raise AssertionError("the disk does not fill up")


def committed(plane: Plane) -> set[int]:
    with plane.catalog.read() as connection:
        return {int(name, 16) for name in connection.execute(sa.select(schema.episodes.c.episode_id)).scalars()}


def test_row_12_disk_of_the_tables_full(
    servers: Servers, small_disk: Callable[[int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server lives on; writers are refused by name, readers read, and with room again all goes on."""
    disk = small_disk(48)
    owner = servers.postgres.user()
    shutil.chown(disk, owner)
    name = f"small_{secrets.token_hex(4)}"
    administer(servers, f"CREATE TABLESPACE {name} LOCATION '{disk}'", f"CREATE DATABASE {name} TABLESPACE {name}")
    try:
        plane = local_plane(tmp_path, servers.postgres.url(name))
        plane.submit(example_episode(0))
        worker = coordinator_of(plane)
        assert worker.step() == 1
        filler = fill(disk, leave=0)
        refused, error = submit_until_it_is_refused(plane, 1)
        assert isinstance(error, StorageFullError) and "is full; nothing was committed" in error.problem
        assert servers.postgres.password not in str(error)
        assert committed(plane) == set(range(refused))
        with suppress(StorageFullError):  # what fits in the pages that are there still does
            exhaust(worker.step)
        assert plane.snapshots.verify() == plane.snapshots.latest().version >= 1
        filler.unlink()
        assert plane.submit(example_episode(refused)) == "committed"
        exhaust(worker.step)
        assert plane.snapshots.latest().episodes == refused + 1
        assert plane.snapshots.verify() == plane.snapshots.latest().version
        plane.catalog.close()
    finally:
        administer(servers, f"DROP DATABASE {name} WITH (FORCE)", f"DROP TABLESPACE {name}")


def administer(servers: Servers, *statements: str) -> None:
    engine = sa.create_engine(servers.postgres.url("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def coordinator_of(plane: Plane) -> Any:
    return Coordinator(plane.catalog, plane.objects, OutboxLog(plane.catalog), lambda episode: [], lease_s=60.0)


@pytest.mark.slow
def test_row_12_disk_of_the_whole_server_full(
    servers: Servers, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """Tables and log on one full disk: whether PostgreSQL refuses or ends itself, what it acknowledged is not lost."""
    disk = small_disk(128)
    server = Postgres(servers.postgres.programs, disk / "postgres")
    server.start()
    try:
        server.create_database("full")
        plane = local_plane(tmp_path, server.url("full"))
        plane.submit(example_episode(0))
        filler = fill(disk, leave=0)
        refused, error = submit_until_it_is_refused(plane, 1)
        assert isinstance(error, StorageFullError | UnavailableError)
        for _ in range(3):
            with pytest.raises((StorageFullError, UnavailableError)):
                plane.submit(example_episode(refused))
        filler.unlink()
        server.kill()
        server.start()
        plane.catalog.close()
        assert set(range(refused)) <= committed(plane) <= set(range(refused + 1))
        assert plane.submit(example_episode(refused)) == "committed"
        worker = coordinator_of(plane)
        exhaust(worker.step)
        assert plane.snapshots.latest().episodes == refused + 1
        assert plane.snapshots.verify() == plane.snapshots.latest().version
        plane.catalog.close()
    finally:
        server.kill()
