"""The reader: increments in order, once, whole; a killed prefetcher process is replaced (row 26)."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from invariants import Plane, open_plane
from test_prefetcher import commit, prefetcher
from waiting import wait_until

from infra.catalog import schema
from infra.crashpoints import VARIABLE
from infra.errors import ConfigError, UnavailableError
from infra.prefetcher import Cache
from infra.reader import Increment, SnapshotReader
from infra.settings import Settings, load_settings
from infra.snapshots import Snapshot, Snapshots


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


@pytest.fixture
def deployment(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path, poll_s=0.02)


def read_to(reader: SnapshotReader, version: int) -> list[Increment]:
    """Increments until `version`, without waiting for ever."""
    found = []
    while reader.version < version:
        increment = reader.wait(20)
        assert increment is not None, f"stuck at {reader.version} of {version}"
        found.append(increment)
    return found


def held(increments: list[Increment]) -> set[str]:
    """Ids that a learner holds after these increments."""
    ids: set[str] = set()
    for increment in increments:
        ids |= {episode.episode_id for episode in increment.added}
        ids -= set(increment.removed)
    return ids


def test_increments_come_in_order_and_once(plane: Plane, deployment: Settings) -> None:
    commit(plane, range(5))
    with SnapshotReader(deployment) as reader:
        found = read_to(reader, 3)
        assert [(i.after, i.version) for i in found] == [(0, 1), (1, 2), (2, 3)]
        assert [len(i.added) for i in found] == [2, 2, 1]
        assert reader.poll() is None and reader.lag() == 0
        commit(plane, range(5, 7))
        gone = plane.snapshots.episodes(4)[0].episode_id
        read_to(reader, 4)
        plane.snapshots.withdraw([gone], reason="test", writer="test")
        (last,) = read_to(reader, 5)
        assert last.added == () and last.removed == (gone,)
        assert (reader.version, reader.digest) == (5, plane.snapshots.get(5).digest)
    with plane.catalog.read() as connection:
        rows = connection.execute(sa.select(schema.loads.c.version).order_by(schema.loads.c.version)).scalars().all()
    assert rows == [1, 2, 3, 4, 5]


def test_a_reader_goes_on_from_a_version(plane: Plane, deployment: Settings) -> None:
    commit(plane, range(6))
    with SnapshotReader(deployment, after=2) as reader:
        (only,) = read_to(reader, 3)
    assert (only.after, only.version) == (2, 3)
    assert held([only]) == {m.episode_id for m in plane.snapshots.increment(2).added}
    with pytest.raises(ConfigError, match="no snapshot 9"):
        SnapshotReader(deployment, after=9)


def test_row_26_a_killed_prefetcher_is_replaced(
    plane: Plane, deployment: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by SIGKILL in the middle of an increment, again and again; nothing is lost, nothing comes twice."""
    commit(plane, range(9), micro_batch=3)
    monkeypatch.setenv(VARIABLE, "prefetcher.fetched:2")
    found = []
    with SnapshotReader(deployment) as reader:
        while reader.respawns < 2:
            if (increment := reader.poll()) is not None:
                found.append(increment)
            time.sleep(0.02)
        monkeypatch.delenv(VARIABLE)
        if reader.prefetcher_pid is not None:
            os.kill(reader.prefetcher_pid, signal.SIGKILL)
        found += read_to(reader, 3)
        assert reader.respawns >= 2
    ids = [episode.episode_id for increment in found for episode in increment.added]
    assert len(ids) == len(set(ids)) == 9
    assert held(found) == {m.episode_id for m in plane.snapshots.episodes(3)}


def test_a_prefetcher_that_cannot_live_is_reported(
    plane: Plane, deployment: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.reader.sys.executable", "/bin/false")
    monkeypatch.setattr("infra.reader._MAX_QUICK_DEATHS", 2)
    with SnapshotReader(deployment) as reader, pytest.raises(UnavailableError, match="does not stay alive"):
        reader.wait(20)


def follow_by_hand(
    plane: Plane, deployment: Settings, budget: int = 2**24, between: Callable[[], None] = lambda: None
) -> list[Increment]:
    """Reader and prefetcher in turn in this process, to the latest snapshot."""
    found, stop = [], threading.Event()
    with SnapshotReader(deployment, name="cache", follow=False) as reader:
        fetcher = prefetcher(plane, budget)
        # `prefetcher` uses <home>/cache; this reader's own folder is one below.
        fetcher._cache = Cache(deployment.cache_dir / "cache")
        for _ in range(60):
            fetcher.step(stop)
            between()
            if (increment := reader.poll()) is not None:
                found.append(increment)
        assert reader.lag() == 0
    return found


def test_a_budget_smaller_than_an_increment_is_no_deadlock(plane: Plane, deployment: Settings) -> None:
    commit(plane, range(8), micro_batch=8)
    size = plane.snapshots.episodes(1)[0].size
    (only,) = follow_by_hand(plane, deployment, budget=2 * size + 100)
    assert len(only.added) == 8
    assert Cache(deployment.cache_dir / "cache").used() <= 2 * size + 100


def test_bytes_damaged_in_the_cache_are_not_used(plane: Plane, deployment: Settings) -> None:
    commit(plane, range(2))
    with SnapshotReader(deployment) as reader:
        target = deployment.cache_dir / "learner" / "new"
        while len(list(target.glob("*.tar"))) < 2:
            time.sleep(0.02)
        for path in target.glob("*.tar"):
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        (increment,) = read_to(reader, 1)
    assert len(increment.added) == 2 and plane.snapshots.latest().version == 1


def test_an_object_withdrawn_after_it_was_fetched_does_not_hold_its_room(plane: Plane, deployment: Settings) -> None:
    commit(plane, range(4), micro_batch=4)
    size = plane.snapshots.episodes(1)[0].size
    victim, done = plane.snapshots.episodes(1)[0], []

    def withdraw() -> None:
        if not done:
            done.append(plane.snapshots.withdraw([victim.episode_id], reason="test", writer="test"))

    (only,) = follow_by_hand(plane, deployment, budget=size + 100, between=withdraw)
    assert (only.after, only.version) == (0, 2) and len(only.added) == 3


def test_what_is_fetched_while_the_reader_looks_stays(
    plane: Plane, deployment: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that comes, and is fetched, between the reader's question for the newest and its look at the cache."""
    commit(plane, range(2))
    reader = SnapshotReader(deployment, name="cache", follow=False)
    new, asked = deployment.cache_dir / "cache" / "new", Snapshots.latest

    def latest(snapshots: Snapshots) -> Snapshot:
        found = asked(snapshots)
        if not any(new.iterdir()):
            commit(plane, range(2, 3))
            (member,) = plane.snapshots.increment(found.version).added
            (new / f"{member.sha256}.tar").write_bytes(plane.objects.get(member.key))
        return found

    monkeypatch.setattr(Snapshots, "latest", latest)
    reader._sweep()
    assert len(list(new.iterdir())) == 1
    reader.close()


# --- the pin ----------------------------------------------------------------------------------------------------------


def pinned(plane: Plane) -> dict[str, tuple[int, float]]:
    """name -> (version, seconds that it holds from its last renewal on)."""
    with plane.catalog.read() as connection:
        rows = connection.execute(sa.select(schema.pins)).all()
    return {row.name: (row.version, round(row.expires_at - row.updated_at, 3)) for row in rows}


def test_a_reader_pins_the_version_that_it_holds(
    plane: Plane, deployment: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(plane, range(4))
    with SnapshotReader(deployment, name="a") as a, SnapshotReader(deployment, name="b", after=1, follow=False):
        assert pinned(plane) == {"a": (0, 600.0), "b": (1, 600.0)}
        read_to(a, 2)
        assert pinned(plane)["a"] == (2, 600.0)
        clock = time.monotonic
        with plane.catalog.begin() as connection:
            connection.execute(schema.pins.update().values(expires_at=0.0))
        a.poll()
        assert pinned(plane)["a"][1] < 0, "renewed at every poll"
        monkeypatch.setattr("infra.reader.time.monotonic", lambda: clock() + 61.0)
        a.poll()
        assert pinned(plane)["a"] == (2, 600.0)
    assert pinned(plane)["a"] == (2, 600.0), "a reader that is started again must find its version"


def test_increments_lead_to_one_order_whichever_way_was_taken(plane: Plane, deployment: Settings) -> None:
    """Of two readers one reads over a version whose episode was withdrawn: the same episodes in the same order."""
    for number in (9, 8, 2, 1, 6, 5):  # a version each, in another order than that of ids
        commit(plane, range(number, number + 1))
    early = list[str]()
    with SnapshotReader(deployment, name="early") as reader:
        for increment in read_to(reader, 2):
            early += [episode.episode_id for episode in increment.added]
        gone = plane.snapshots.episodes(1)[0].episode_id
        plane.snapshots.withdraw([gone], reason="test", writer="test")
        for increment in read_to(reader, plane.snapshots.latest().version):
            early = [i for i in early if i not in increment.removed]
            early += [episode.episode_id for episode in increment.added]
    with SnapshotReader(deployment, name="late") as reader:
        steps = read_to(reader, plane.snapshots.latest().version)
        late = [episode.episode_id for increment in steps for episode in increment.added]
    assert len(steps) == 1 and early == late and gone not in late
    assert late != sorted(late)


# --- a cache that is emptied, altered or taken away -------------------------------------------------------------------


def replace_by_folders(folder: Path) -> None:
    for path in folder.glob("new/*.tar"):
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)


def alter(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        for path in folder.glob("new/*.tar"):
            path.write_bytes(change(path.read_bytes()))

    return work


HARM: dict[str, Callable[[Path], None]] = {
    "cache deleted": lambda folder: shutil.rmtree(folder.parent, ignore_errors=True),
    "new deleted": lambda folder: shutil.rmtree(folder / "new", ignore_errors=True),
    "kept deleted": lambda folder: shutil.rmtree(folder / "kept", ignore_errors=True),
    "mark deleted": lambda folder: (folder / "fetched").unlink(missing_ok=True),
    "altered": alter(lambda data: bytes(len(data))),
    "folders in place of files": replace_by_folders,
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_a_cache_that_is_harmed_is_fetched_again(
    plane: Plane, deployment: Settings, harm: Callable[[Path], None]
) -> None:
    """With a live prefetcher: before anything was taken, and with nothing left to do."""
    commit(plane, range(6), micro_batch=2)
    folder = deployment.cache_dir / "learner"
    with SnapshotReader(deployment) as reader:
        wait_until(lambda: Cache(folder).marked() == 3, "nothing was fetched")
        harm(folder)
        found = read_to(reader, 3)
        harm(folder)
        assert reader.poll() is None
        commit(plane, range(6, 8))
        found += read_to(reader, 4)
    assert held(found) == {f"{number:032x}" for number in range(8)}
    assert sum(len(increment.added) for increment in found) == 8 and plane.snapshots.latest().version == 4


def test_a_cache_that_is_harmed_again_and_again_is_no_stall(plane: Plane, deployment: Settings) -> None:
    commit(plane, range(12), micro_batch=3)
    rng, found, end = random.Random(5), [], time.monotonic() + 200
    folder = deployment.cache_dir / "learner"
    with SnapshotReader(deployment) as reader:
        for _ in range(12):
            time.sleep(0.15)
            if (folder / "new").is_dir():
                rng.choice([*HARM.values()])(folder)
            if (increment := reader.poll()) is not None:
                found.append(increment)
        while reader.version < 4 and time.monotonic() < end:
            if (increment := reader.wait(5)) is not None:
                found.append(increment)
    assert held(found) == {f"{number:032x}" for number in range(12)}


def test_a_cache_that_cannot_be_used_is_an_error_until_it_can(plane: Plane, deployment: Settings) -> None:
    commit(plane, range(2))
    folder = deployment.cache_dir / "learner"
    with SnapshotReader(deployment) as reader:
        read_to(reader, 1)
        shutil.rmtree(folder)
        folder.write_text("no folder")
        commit(plane, range(2, 4))
        with pytest.raises(UnavailableError, match=f"the cache {folder} of learner cannot be used"):
            reader.wait(20)
        with pytest.raises(UnavailableError, match="cannot be used"):
            SnapshotReader(deployment)
        folder.unlink()
        (last,) = read_to(reader, 2)
    assert len(last.added) == 2
