"""The data plane's invariants, asserted on a home from its files and rows alone; and the fixtures that tests share.

I1 every spooled episode ends in exactly one of {snapshot, quarantine}; I2 an id appears at most once in a snapshot;
I3 versions are gapless; I4 a snapshot reads byte-identical forever; I7 nothing acknowledged is lost.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import sqlalchemy as sa

from infra.catalog import Catalog
from infra.catalog.schema import episodes, quarantine, snapshot_episodes
from infra.coordinator import Coordinator
from infra.crashpoints import VARIABLE
from infra.episode import Episode, encode
from infra.events.outbox import OutboxLog
from infra.ingest import Ingest
from infra.judge import Check
from infra.objects import ObjectStore
from infra.plane import open_catalog, open_objects
from infra.settings import load_settings
from infra.snapshots import Snapshots


@dataclass(frozen=True)
class Plane:
    """The data plane of one home, in either profile."""

    home: Path
    catalog: Catalog
    objects: ObjectStore
    ingest: Ingest
    snapshots: Snapshots

    def submit(self, episode: Episode, robot: str | None = None, **meta: object) -> str:
        data = encode(episode)
        robot = robot or episode.robot_id
        return self.ingest.submit(robot, episode.episode_id, data, digest(data), len(data), meta)

    def settle(self, check: Check = lambda episode: [], **options: Any) -> None:
        """Settle what was committed, from the outbox, without a broker; `options` are the coordinator's."""
        coordinator = Coordinator(self.catalog, self.objects, OutboxLog(self.catalog), check, **options)
        while coordinator.step():
            pass
        coordinator.lease.release()


@cache
def _migrated_file() -> bytes:
    """A new catalog's bytes: migrating once and not for each test."""
    with TemporaryDirectory() as folder:
        catalog = Catalog(f"sqlite:///{folder}/catalog.db")
        catalog.migrate()
        catalog.close()
        return (Path(folder) / "catalog.db").read_bytes()


_open: dict[tuple[Path, int], Plane] = {}


def open_plane(home: Path) -> Plane:
    """Open, and where it is new make, the data plane of `home`; each process has its own, also after a fork."""
    place = (home, os.getpid())
    if place not in _open:
        home.mkdir(parents=True, exist_ok=True)
        settings = load_settings(home=home)
        if settings.profile == "local" and not (home / "catalog.db").exists():
            (home / "catalog.db").write_bytes(_migrated_file())
        catalog, objects = open_catalog(settings, migrate=True), open_objects(settings)
        _open[place] = Plane(home, catalog, objects, Ingest(catalog, objects), Snapshots(catalog))
    return _open[place]


def example_episode(number: int, *, robot: str = "r0", steps: int = 4, **changes: object) -> Episode:
    """A small episode that depends on `number` alone; D = 3, A = 5."""
    rng = np.random.default_rng(number)
    rewards = np.zeros(steps, np.float32)
    rewards[-1] = 1
    values: dict[str, object] = {
        "episode_id": f"{number:032x}",
        "robot_id": robot,
        "task": f"S{number % 4 + 1}",
        "instruction": "open the drawer",
        "source": "online",
        "outcome": "success",
        "policy_version": 1,
        "observations": rng.normal(size=(steps + 1, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, 5)).astype(np.float32),
        "rewards": rewards,
        "intervention": np.zeros(steps, bool),
        "timestamps": np.arange(steps + 1) * 0.05,
        "substep_scores": (1.0,),
        "started_at": 1.0e9 + number,
    }
    return Episode(**{**values, **changes})  # type: ignore[arg-type]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- invariants -------------------------------------------------------------------------------------------------------


def assert_i1_accounted_once(home: Path, spooled: Iterable[tuple[str, str]]) -> None:
    """Each spooled (id, sha256), and each committed row, is in exactly one of {current snapshot, quarantine}."""
    plane = open_plane(home)
    members, held = _members(plane), _held(plane)
    with plane.catalog.read() as connection:
        committed = {(row.episode_id, row.sha256) for row in connection.execute(sa.select(episodes))}
    for name in {*spooled, *committed}:
        assert (name in members) + (name in held) == 1, f"I1: {name} snapshot={name in members}, held={name in held}"


def assert_i2_at_most_once(home: Path) -> None:
    """No version lists an id twice, and no id is a member under two digests."""
    snapshots = open_plane(home).snapshots
    for version in range(1, snapshots.latest().version + 1):
        repeated = [i for i, n in Counter(m.episode_id for m in snapshots.episodes(version)).items() if n > 1]
        assert not repeated, f"I2: snapshot {version} repeats {repeated}"


def assert_i3_gapless(home: Path) -> None:
    """Versions run 1, 2, 3, … each the child of the one before, with the digest chained and the count right."""
    snapshots = open_plane(home).snapshots
    last = snapshots.latest().version
    assert snapshots.verify() == last
    for version in range(1, last + 1):
        found = snapshots.get(version)
        assert found.parent == version - 1, "I3"
        assert found.episodes == len(snapshots.episodes(version)), "I3"


History = dict[int, tuple[str, tuple[tuple[str, str], ...]]]


def history(home: Path) -> History:
    """What every version reads as now: digest and (id, sha256 of the bytes read)."""
    plane = open_plane(home)
    read = cache(lambda key: digest(plane.objects.get(key)))  # a hundred versions share most of their objects
    return {
        version: (
            plane.snapshots.get(version).digest,
            tuple((m.episode_id, read(m.key)) for m in plane.snapshots.episodes(version)),
        )
        for version in range(1, plane.snapshots.latest().version + 1)
    }


def assert_i4_immutable(home: Path, before: History) -> None:
    """Every version seen before reads the same bytes; and all bytes are those of their digests."""
    now = history(home)
    for version, content in before.items():
        assert now[version] == content, f"I4: snapshot {version} changed"
    plane = open_plane(home)
    for version, (_, content) in now.items():
        assert content == tuple((m.episode_id, m.sha256) for m in plane.snapshots.episodes(version)), "I4: bytes"


def assert_i7_kept(home: Path, acknowledged: Iterable[tuple[str, str]]) -> None:
    """Every acknowledged (id, sha256) has its row and its bytes, unless it is asked for again from the spool."""
    plane = open_plane(home)
    with plane.catalog.read() as connection:
        keys = {(row.episode_id, row.sha256): row.key for row in connection.execute(sa.select(episodes))}
    for name in acknowledged:
        assert name in keys, f"I7: {name} has no row"
        assert digest(plane.objects.get(keys[name])) == name[1], f"I7: {name} has other bytes"


def assert_invariants(home: Path, spooled: Mapping[str, str], before: History | None = None) -> None:
    """I1-I4 and I7 for a home whose spool has been emptied: `spooled` maps ids to digests."""
    assert_i1_accounted_once(home, spooled.items())
    assert_i2_at_most_once(home)
    assert_i3_gapless(home)
    assert_i4_immutable(home, before or {})
    assert_i7_kept(home, spooled.items())


def _members(plane: Plane) -> set[tuple[str, str]]:
    query = (
        sa.select(episodes.c.episode_id, episodes.c.sha256)
        .join(snapshot_episodes, snapshot_episodes.c.episode_id == episodes.c.episode_id)
        .where(snapshot_episodes.c.removed.is_(None))
    )
    with plane.catalog.read() as connection:
        return {(row.episode_id, row.sha256) for row in connection.execute(query)}


def _held(plane: Plane) -> set[tuple[str, str]]:
    with plane.catalog.read() as connection:
        return {(row.episode_id, row.sha256) for row in connection.execute(sa.select(quarantine))}


# --- real processes ---------------------------------------------------------------------------------------------------


def in_process(work: Callable[..., object], *arguments: object, crash: str | None = None) -> int:
    """Run `work` in a forked process, to its end or to its crash point; the exit code, -9 for SIGKILL."""
    process = start_process(work, *arguments, crash=crash)
    process.join(60)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{work.__name__} did not end")
    assert process.exitcode is not None
    return process.exitcode


def start_process(work: Callable[..., object], *arguments: object, crash: str | None = None):  # type: ignore[no-untyped-def]
    """The same, without waiting."""

    def body() -> None:
        if crash is not None:
            os.environ[VARIABLE] = crash
        code: object = 1
        try:
            code = work(*arguments)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)  # skip what the test runner registered for its own end

    process = get_context("fork").Process(target=body)
    process.start()
    return process


KILLED = -signal.SIGKILL
