"""Rows 21 to 29, 6 and 7, on real PostgreSQL, S3 and Kafka: coordinators that die, stop or compete; readers whose data
are collected, damaged or cut off on the way; ranks that agree whatever each of them meets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from invariants import (
    KILLED,
    Plane,
    assert_invariants,
    digest,
    example_episode,
    history,
    open_plane,
    start_process,
)
from log_tools import drain, relay_all
from waiting import wait_until

from infra.catalog.schema import loads, snapshot_episodes, snapshots
from infra.collect import collect
from infra.crashpoints import VARIABLE, registered
from infra.episode import Episode, encode
from infra.errors import LeaseLostError, UnavailableError
from infra.reader import Increment, SnapshotReader
from infra.servers import Servers, write_settings
from infra.servers.proxy import FaultProxy
from infra.settings import load_settings
from lwd_model.ranks import AgreedReader, Ranks
from tests.lwd_model.rank_processes import result, started, together

LEASE_S = 1.0
BIG = 400  # steps; an object of more than Garage keeps within its metadata


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWD_LEASE_S", str(LEASE_S))
    monkeypatch.setenv("LWD_MICRO_BATCH", "2")
    monkeypatch.setenv("LWD_FETCH_RETRIES", "2")
    monkeypatch.setenv("LWD_S3_TIMEOUT_S", "3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def episode(number: int) -> Episode:
    return example_episode(number, robot=f"r{number % 2}", steps=BIG)


def spooled(numbers: Sequence[int]) -> dict[str, str]:
    return {f"{number:032x}": digest(encode(episode(number))) for number in numbers}


def commit(home: Path, numbers: Sequence[int]) -> Plane:
    """Episodes, committed and announced."""
    plane = open_plane(home)
    for number in numbers:
        plane.submit(episode(number))
    relay_all(home)
    return plane


def snapshot(home: Path, numbers: Sequence[int], micro_batch: int = 2) -> Plane:
    """Episodes in snapshots of `micro_batch` each."""
    plane = commit(home, numbers)
    drain(home, micro_batch=micro_batch)
    return plane


# --- coordinators -----------------------------------------------------------------------------------------------------


def accept(episode: Episode) -> Sequence[object]:
    return []


def pause_on_the_first(episode: Episode) -> Sequence[object]:
    """The check of a coordinator that is to be stopped in the middle: it says that it is there, and takes long."""
    place = Path(os.environ["ROWS_PAUSED"])
    if not place.exists():
        place.touch()
        time.sleep(1.0)
    return []


@contextmanager
def coordinators(home: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`start(*options, check=…, **variables)`: real processes, whose messages go to `<home>/said`; those that still run
    at the end are killed."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*options: str, check: str = "accept", **variables: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "infra.coordinator", "--home", str(home), *options]
        command += ["--check", f"{Path(__file__).stem}:{check}"]
        with (home / "said").open("ab") as said:
            running.append(subprocess.Popen(command, env=os.environ | variables, stderr=said))
        return running[-1]

    try:
        yield start
    finally:
        for process in running:
            process.kill()
            process.wait()


def writers(plane: Plane) -> list[int]:
    """Process ids of those that made the versions, in order."""
    with plane.catalog.read() as connection:
        rows = connection.execute(sa.select(snapshots.c.writer).order_by(snapshots.c.version)).scalars()
        return [int(writer.split(":")[1]) for writer in rows]


def settled(plane: Plane, count: int) -> Callable[[], bool]:
    return lambda: plane.snapshots.latest().episodes == count


POINTS = [*registered("coordinator.py"), *registered("snapshots.py")]


@pytest.mark.parametrize(
    "point",
    [p if p in ("coordinator.committed", "snapshots.version_inserted") else pytest.param(p, marks=pytest.mark.slow)
     for p in POINTS],
)  # fmt: skip
def test_row_21_kill_coordinator_at_every_commit_step(fleet_home: Path, point: str) -> None:
    """I3, I4: the next one goes on; the same events are read again and nothing happens twice."""
    plane = commit(fleet_home, range(6))
    count = 1 if point == "coordinator.started" else 2
    with coordinators(fleet_home) as start:
        assert start(**{VARIABLE: f"{point}:{count}"}).wait(240) == KILLED
        before = history(fleet_home)
        assert len(before) == count - 1 + (point == "coordinator.committed")
        start("--standby")
        wait_until(settled(plane, 6), f"stuck after a kill at {point}")
    assert_invariants(fleet_home, spooled(range(6)), before)


def test_row_22_two_coordinators(fleet_home: Path) -> None:
    """One works; the other is refused, or stands by and takes over when the first is killed in the middle."""
    plane = commit(fleet_home, range(4))
    with coordinators(fleet_home) as start:
        first = start()
        wait_until(settled(plane, 4), "the first does not work")
        refused = start()
        assert refused.wait(240) == LeaseLostError.exit_code
        assert f"held by {os.uname().nodename}:{first.pid}:" in (fleet_home / "said").read_text()
        second = start("--standby")
        commit(fleet_home, range(4, 8))
        wait_until(settled(plane, 8), "the first stopped")
        assert set(writers(plane)) == {first.pid}
        commit(fleet_home, range(8, 30))
        wait_until(lambda: plane.snapshots.latest().episodes > 8, "the first stopped")
        first.kill()
        before = history(fleet_home)
        wait_until(settled(plane, 30), "the second did not take over")
        made = writers(plane)
    assert set(made) == {first.pid, second.pid}
    assert made == sorted(made, key=[first.pid, second.pid].index), "the killed one wrote after its successor"
    assert_invariants(fleet_home, spooled(range(30)), before)


def test_row_23_coordinator_stopped_past_its_lease(fleet_home: Path, tmp_path: Path) -> None:
    """It wakes with a batch half done, while another has taken the lease: what it would write is refused."""
    plane = commit(fleet_home, range(4))
    mark = tmp_path / "paused"
    with coordinators(fleet_home) as start:
        stale = start(check="pause_on_the_first", ROWS_PAUSED=str(mark))
        wait_until(mark.exists, "the first does not work")
        stale.send_signal(signal.SIGSTOP)
        other = start("--standby")
        wait_until(settled(plane, 4), "the second did not take over")
        stale.send_signal(signal.SIGCONT)
        assert stale.wait(240) == LeaseLostError.exit_code
        assert f"held by {os.uname().nodename}:{other.pid}:" in (fleet_home / "said").read_text()
        commit(fleet_home, range(4, 6))
        wait_until(settled(plane, 6), "the second stopped")
        assert set(writers(plane)) == {other.pid}
    assert_invariants(fleet_home, spooled(range(6)))


def test_row_24_clock_skew(fleet_home: Path) -> None:
    """Robots' clocks an hour ahead and behind: the order is that of versions; revocation goes by both clocks."""
    plane = open_plane(fleet_home)
    for number in range(6):
        plane.submit(episode(number), produced_at=time.time() + (3600.0 if number % 2 else -3600.0))
    relay_all(fleet_home)
    drain(fleet_home, micro_batch=1)
    with plane.catalog.read() as connection:
        query = sa.select(snapshot_episodes.c.episode_id).order_by(snapshot_episodes.c.added)
        order = list(connection.execute(query).scalars())
    with SnapshotReader(load_settings(home=fleet_home), name="skewed") as reader:
        found = read_to(reader, 6)
    assert [e.episode_id for increment in found for e in increment.added] == order
    assert [plane.snapshots.get(version).episodes for version in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    now = time.time()
    made = plane.snapshots.revoke("r1", now + 1800, now + 7200, reason="clock", actor="steward")
    assert (made.removed, made.episodes) == (3, 3), "what its own clock says counts, too"
    assert_invariants(fleet_home, spooled(range(6)))


# --- readers ----------------------------------------------------------------------------------------------------------


def read_to(reader: SnapshotReader, version: int) -> list[Increment]:
    found = []
    while reader.version < version:
        increment = reader.wait(120)
        assert increment is not None, f"stuck at {reader.version} of {version}"
        found.append(increment)
    return found


def held(increments: Sequence[Increment]) -> list[str]:
    """What a learner holds, in its order, with the bytes that it got."""
    order: list[str] = []
    for increment in increments:
        order = [name for name in order if name.split()[0] not in increment.removed]
        order += [f"{e.episode_id} {digest(encode(e))}" for e in increment.added]
    return order


def contents(plane: Plane, version: int) -> set[str]:
    return {f"{m.episode_id} {m.sha256}" for m in plane.snapshots.episodes(version)}


def blocks(servers: Servers) -> set[Path]:
    """Garage's files of data."""
    return {path for path in (servers.garage.data / "data").rglob("*") if path.is_file()}


def flip_a_bit(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("found_by", ["store", "reader"])
def test_row_06_bit_flip_at_rest(fleet_home: Path, servers: Servers, found_by: str) -> None:
    """Found by the store's own check when it reads, or else by the reader's sha256: a quarantine version."""
    plane = snapshot(fleet_home, range(3), micro_batch=3)
    number = {"store": 601, "reader": 602}[found_by]  # no other test's: Garage keeps equal blocks once
    bad, before = f"{number:032x}", blocks(servers)
    snapshot(fleet_home, [number])
    if found_by == "store":
        written = blocks(servers) - before
        assert written
        for block in written:
            block.write_bytes(flip_a_bit(block.read_bytes()))
    else:
        key = next(m.key for m in plane.snapshots.episodes(2) if m.episode_id == bad)
        plane.objects.put(key, flip_a_bit(plane.objects.get(key)))
    with SnapshotReader(load_settings(home=fleet_home)) as reader:
        found = read_to(reader, 3)
    assert set(held(found)) == contents(plane, 3)
    latest = plane.snapshots.latest()
    assert (latest.removed, latest.episodes) == (1, 3) and "gave up after 2 tries" in latest.reason
    assert plane.ingest.status(bad) == "quarantined"


def test_row_07_truncated_get(fleet_home: Path) -> None:
    """Cut in the middle, with FIN and with RST: asked again, and no part of an episode is ever used."""
    plane = snapshot(fleet_home, range(4), micro_batch=4)
    url = urlsplit(str(load_settings(home=fleet_home).s3_endpoint))
    with FaultProxy(str(url.hostname), int(url.port or 0)) as proxy:
        write_settings(fleet_home, {"s3_endpoint": f"http://127.0.0.1:{proxy.port}"})
        for gently in (True, False):
            proxy.set(cut_after_bytes=5000, cut_times=6, cut_gently=gently)
            with SnapshotReader(load_settings(home=fleet_home), name=f"cut-{gently}") as reader:
                found = read_to(reader, 1)
            assert set(held(found)) == contents(plane, 1)
        assert proxy.counts()["cut"] == 12
        # All answers cut, for longer than the tries of an object last: nothing is withdrawn for it.
        proxy.set(cut_after_bytes=5000, cut_times=None)
        with SnapshotReader(load_settings(home=fleet_home), name="cut-all") as reader:
            before = proxy.counts()["cut"]
            wait_until(lambda: reader.poll() is None and proxy.counts()["cut"] > before + 60, "no tries")
            proxy.clear()
            assert set(held(read_to(reader, 1))) == contents(plane, 1)
    assert plane.snapshots.latest().version == 1


def test_row_25_garbage_collection_against_a_lagging_reader(fleet_home: Path) -> None:
    """I4: what is pinned, and all above it, reads byte-identical; the reader goes on to the latest version."""
    plane = snapshot(fleet_home, range(8))
    settings = load_settings(home=fleet_home)
    with SnapshotReader(settings, name="slow") as reader:
        found = read_to(reader, 2)
        os.kill(reader.prefetcher_pid or 0, signal.SIGSTOP)  # it lags from here on
        for number in (0, 2, 5):
            plane.snapshots.withdraw([f"{number:032x}"], reason="test", writer="test")
        before = history(fleet_home)
        collect(plane.catalog, plane.objects, keep_s=0.0)
        assert plane.snapshots.floor() <= reader.version
        assert {v: c for v, c in history(fleet_home).items() if v >= 2} == {v: c for v, c in before.items() if v >= 2}
        os.kill(reader.prefetcher_pid or 0, signal.SIGCONT)
        found += read_to(reader, 7)
        assert set(held(found)) == contents(plane, 7)
        done = collect(plane.catalog, plane.objects, keep_s=0.0)
        assert (done.floor, done.objects) == (7, 3)
    assert len(list(plane.objects.list("episodes"))) == 5
    with SnapshotReader(settings, name="new") as reader:
        assert held(read_to(reader, 7)) == held(found), "one order, whichever way was taken"


def test_row_26_kill_prefetcher(fleet_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again in the middle of an increment: another is started, nothing hangs, comes twice or is left out."""
    plane = snapshot(fleet_home, range(12), micro_batch=4)
    monkeypatch.setenv(VARIABLE, "prefetcher.fetched:3")
    found: list[Increment] = []
    with SnapshotReader(load_settings(home=fleet_home)) as reader:
        while reader.respawns < 2:
            found += [increment] if (increment := reader.poll()) else []
            time.sleep(0.02)
        monkeypatch.delenv(VARIABLE)
        found += read_to(reader, 3)
        assert reader.respawns >= 2
    assert set(held(found)) == contents(plane, 3)
    assert len(held(found)) == 12
    with plane.catalog.read() as connection:
        assert sorted(connection.execute(sa.select(loads.c.version)).scalars()) == [1, 2, 3]


# --- ranks ------------------------------------------------------------------------------------------------------------


def read_agreed(ranks: Ranks, home: str, target: int, slow: int | None, die_at: int | None) -> dict[str, Any]:
    """What each step of this rank held; rank `slow` is let have an increment seldom, rank 1 dies at `die_at`."""
    checkpoint = Path(home) / f"rank-{ranks.rank}"
    resume = int(checkpoint.read_text()) if checkpoint.exists() else 0
    calls = 0
    with SnapshotReader(load_settings(home=Path(home)), name=f"rank-{ranks.rank}") as reader:

        def poll() -> Increment | None:
            nonlocal calls
            calls += 1
            return None if ranks.rank == slow and calls % 40 else reader.poll()

        agreed = AgreedReader(poll, ranks, version=reader.version, digest=reader.digest, ahead=2)
        steps, increments, staleness = [], [], 0
        while agreed.version < resume:
            increments += agreed.advance(resume)
        resumed_on = agreed.version
        deadline = time.monotonic() + 200
        while agreed.version < target:
            assert time.monotonic() < deadline, f"stuck at {agreed.version} of {target}"
            if ranks.rank == 1 and die_at is not None and agreed.version >= die_at:
                os.kill(reader.prefetcher_pid or 0, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            increments += agreed.advance()
            checkpoint.write_text(str(agreed.version))
            steps.append((agreed.version, agreed.digest))
            staleness = max(staleness, agreed.staleness)
            time.sleep(0.03)
    return {"resumed": resumed_on, "steps": steps, "held": held(increments), "staleness": staleness}


def assert_i5(found: list[dict[str, Any]]) -> None:
    """All ranks trained on the same (V, digest) at every step, and hold the same episodes in the same order."""
    assert all(rank["steps"] == found[0]["steps"] and rank["held"] == found[0]["held"] for rank in found)


def test_row_27_retries_exhausted_for_one_object_and_the_ranks_agree(fleet_home: Path) -> None:
    """One rank has it in its cache already, the others find it gone: all drop it at the same version."""
    plane = snapshot(fleet_home, range(4))
    with SnapshotReader(load_settings(home=fleet_home), name="rank-0") as reader:
        read_to(reader, 2)  # into rank 0's cache
    gone = plane.snapshots.episodes(1)[0]
    plane.objects.delete(gone.key)
    found = together(read_agreed, 3, str(fleet_home), 3, None, None)
    assert_i5(found)
    latest = plane.snapshots.latest()
    assert (latest.version, latest.removed) == (3, 1) and "gave up after 2 tries" in latest.reason
    assert set(found[0]["held"]) == contents(plane, 3)
    assert plane.ingest.status(gone.episode_id) == "quarantined"


def feed(home: Path, numbers: Sequence[int]) -> None:
    for number in numbers:
        snapshot(home, [number])


def test_row_28_slow_rank(fleet_home: Path) -> None:
    """While snapshots come, one of three ranks lags: the others wait at its version, and the metric shows it."""
    plane = snapshot(fleet_home, range(4))
    feeder = start_process(feed, fleet_home, range(4, 12))
    found = together(read_agreed, 3, str(fleet_home), 10, 2, None)
    feeder.join(60)
    assert feeder.exitcode == 0
    assert_i5(found)
    assert found[0]["staleness"] >= 2
    assert set(found[0]["held"]) == contents(plane, 10)


def test_row_29_rank_dies_in_the_barrier(fleet_home: Path) -> None:
    """The others name it within T; started again, all resume on the version of their checkpoints."""
    plane = snapshot(fleet_home, range(8), micro_batch=1)
    limit = 5.0
    with started(read_agreed, 3, str(fleet_home), 8, None, 3, timeout_s=limit) as running:
        answers = {rank: result(pipe) for rank, (_, pipe) in running.items()}
        assert running[1][0].exitcode in (None, KILLED) and answers[1] is None
    for rank in (0, 2):
        assert isinstance(answers[rank], UnavailableError), answers[rank]
        assert answers[rank].problem == f"rank 1 of 3 did not answer rank {rank} within {limit:g} s"
    versions = {(fleet_home / f"rank-{rank}").read_text() for rank in range(3)}
    assert len(versions) == 1
    snapshot(fleet_home, [8, 9])  # meanwhile
    found = together(read_agreed, 3, str(fleet_home), 9, None, None)
    assert_i5(found)
    assert {str(rank["resumed"]) for rank in found} == versions
    assert set(found[0]["held"]) == contents(plane, 9)
