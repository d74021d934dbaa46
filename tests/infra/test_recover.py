"""What the store has and the catalog lost comes back; nothing else is touched (audit and recovery)."""

from __future__ import annotations

import os
import signal
import sqlite3
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
    in_process,
    open_plane,
)

from infra.audit import audit
from infra.catalog.schema import consumer_offsets, episodes, leases, outbox, quarantine, recoveries
from infra.crashpoints import registered
from infra.episode import encode
from infra.errors import ConfigError, CorruptDataError
from infra.objects import episode_key
from infra.reconcile import reconcile
from infra.recover import discard, recover

LATER = 2.0e10


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


def check(plane: Plane, **options: object) -> None:
    audit(plane.catalog, plane.objects, settle_s=0, **options).check()  # type: ignore[arg-type]


def forget_rows(plane: Plane, *numbers: int) -> None:
    """As a catalog that was cut back to before these were committed."""
    ids = [f"{number:032x}" for number in numbers]
    with plane.catalog.begin() as connection:
        connection.execute(outbox.delete().where(outbox.c.episode_id.in_(ids)))
        connection.execute(episodes.delete().where(episodes.c.episode_id.in_(ids)))


def store(plane: Plane, data: bytes, key: str | None = None) -> str:
    key = key or episode_key(digest(data))
    plane.objects.put(key, data)
    return key


def test_lost_rows_are_found_and_brought_back(plane: Plane) -> None:
    spooled = {}
    for number in range(6):
        episode = example_episode(number, robot=f"r{number % 2}")
        plane.submit(episode)
        spooled[episode.episode_id] = digest(encode(episode))
    plane.settle()
    check(plane, read=True)
    for number in range(6, 9):
        episode = example_episode(number, robot="r1")
        plane.submit(episode)
        spooled[episode.episode_id] = digest(encode(episode))
    forget_rows(plane, 6, 7, 8)
    with pytest.raises(CorruptDataError, match="3 stored objects have no row in the catalog") as caught:
        check(plane)
    assert "lwd data recover" in caught.value.fix
    assert reconcile(plane.catalog, plane.objects, now=LATER, grace_s=0).orphans == 3
    done = recover(plane.catalog, plane.objects)
    assert (done.by_robot, done.conflicts, done.left) == ({"r1": 3}, [], [])
    assert plane.ingest.status(f"{6:032x}", spooled[f"{6:032x}"]) == "committed"
    check(plane, read=True)
    plane.settle()
    assert plane.ingest.status(f"{6:032x}", spooled[f"{6:032x}"]) == "snapshot"
    assert recover(plane.catalog, plane.objects).episodes == 0, "once is enough"
    plane.submit(example_episode(7, robot="r1"))  # what its spool still has is known
    assert_invariants(plane.home, spooled)


def test_a_lost_catalog_is_built_again_from_the_store(tmp_path: Path) -> None:
    first = open_plane(tmp_path / "before")
    for number in range(5):
        first.submit(example_episode(number))
    first.settle()
    second = open_plane(tmp_path / "after")
    (tmp_path / "before" / "objects").rename(tmp_path / "moved")
    (tmp_path / "after" / "objects").rename(tmp_path / "empty")
    (tmp_path / "moved").rename(tmp_path / "after" / "objects")
    assert recover(second.catalog, second.objects).episodes == 5
    second.settle()
    assert_invariants(tmp_path / "after", {f"{n:032x}": digest(encode(example_episode(n))) for n in range(5)})


@pytest.mark.parametrize("at", [-1e5, -62135596800.0, 253402300799.0, 1e300, 10**18, "noon"], ids=str)
def test_an_episode_of_a_robot_whose_clock_is_wrong_is_brought_back(plane: Plane, at: object) -> None:
    """The contract warns of it and lets it pass: it was acknowledged."""
    plane.submit(example_episode(1, started_at=at))
    forget_rows(plane, 1)
    done = recover(plane.catalog, plane.objects)
    assert (dict(done.by_robot), done.left) == ({"r0": 1}, [])
    check(plane)


def test_what_is_no_whole_episode_is_named_and_stays(plane: Plane) -> None:
    whole = encode(example_episode(1))
    store(plane, whole)
    left = {
        store(plane, b"no tar at all"),
        store(plane, whole[: len(whole) // 2]),
        store(plane, b""),
        store(plane, encode(example_episode(2)), key=f"episodes/00/{'0' * 64}.tar"),
        store(plane, encode(example_episode(3)), key="episodes/odd/name.txt"),
        store(plane, encode(example_episode(4, robot="../etc"))),
        store(plane, encode(example_episode(5, robot="x" * 65))),
    }
    done = recover(plane.catalog, plane.objects)
    assert done.episodes == 1 and {key for key, _ in done.left} == left
    assert all(plane.objects.exists(key) for key in left)
    assert reconcile(plane.catalog, plane.objects, now=LATER, grace_s=0).orphans == len(left)
    with pytest.raises(CorruptDataError, match=f"{len(left)} stored objects have no row"):
        check(plane)
    with pytest.raises(ConfigError, match="is not an object that the catalog lacks"):
        discard(plane.catalog, plane.objects, [*left, episode_key(digest(whole))])
    assert all(plane.objects.exists(key) for key in left)
    assert discard(plane.catalog, plane.objects, sorted(left)) == len(left)
    assert [item.key for item in plane.objects.list("episodes")] == [episode_key(digest(whole))]
    check(plane)


@given(st.binary(max_size=600) | st.integers(0, 4000).map(lambda at: at.to_bytes(2, "big")), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_bytes_stop_a_recovery(tmp_path_factory: pytest.TempPathFactory, noise: bytes, within: bool) -> None:
    plane = open_plane(tmp_path_factory.mktemp("noise"))
    whole = encode(example_episode(1))
    at = int.from_bytes(noise[:2].ljust(2, b"\0"), "big") % len(whole)
    data = whole[:at] + noise + whole[at + len(noise) :] if within else noise
    key = store(plane, data)
    store(plane, encode(example_episode(2)))
    recover(plane.catalog, plane.objects)
    assert plane.ingest.status(f"{2:032x}") == "committed"
    assert plane.objects.exists(key)


def test_of_two_under_one_id_the_older_is_the_episode(plane: Plane) -> None:
    older = store(plane, encode(example_episode(1)))
    younger = store(plane, encode(example_episode(1, task="S9")))
    os.utime(plane.home / "objects" / older, (1.0e9, 1.0e9))
    done = recover(plane.catalog, plane.objects)
    assert (done.episodes, done.conflicts) == (1, [younger])
    with plane.catalog.read() as connection:
        assert connection.execute(sa.select(episodes.c.key)).scalars().all() == [older]
        assert connection.execute(sa.select(quarantine.c.key, quarantine.c.stage)).all() == [(younger, "conflict")]
    check(plane)
    assert recover(plane.catalog, plane.objects).conflicts == []


@pytest.mark.parametrize("crash", [p for p in registered() if p.startswith("recover.")] or ["recover.committed"])
def test_killed_while_recovering(plane: Plane, monkeypatch: pytest.MonkeyPatch, crash: str) -> None:
    monkeypatch.setattr("infra.recover._AT_ONCE", 2)
    for number in range(5):
        store(plane, encode(example_episode(number)))
    home = plane.home

    def work() -> None:
        own = open_plane(home)
        recover(own.catalog, own.objects)

    assert in_process(work, crash=crash) == KILLED
    assert recover(plane.catalog, plane.objects).episodes == 3
    plane.settle()
    assert_invariants(home, {f"{n:032x}": digest(encode(example_episode(n))) for n in range(5)})


def _commit_and_die(home: Path) -> None:
    plane = open_plane(home)
    for number in range(20):
        plane.submit(example_episode(number))
        if number % 3 == 2:
            plane.settle()
    os.kill(os.getpid(), signal.SIGKILL)  # what was acknowledged is in the write-ahead log


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_noise_in_the_write_ahead_log(tmp_path: Path, part: float) -> None:
    """SQLite drops what follows a damaged frame without a word; what was acknowledged comes back from the store."""
    home = tmp_path / "home"
    assert in_process(_commit_and_die, home) == KILLED
    log = home / "catalog.db-wal"
    data = bytearray(log.read_bytes())
    at = int(len(data) * part)
    data[at : at + 64] = b"\xa5" * 64
    log.write_bytes(data)
    plane = open_plane(home)
    with plane.catalog.read() as connection:
        left = connection.execute(sa.select(sa.func.count()).select_from(episodes)).scalar_one()
    assert left < 20
    assert reconcile(plane.catalog, plane.objects, grace_s=0, now=LATER).orphans == 20 - left
    with pytest.raises(CorruptDataError, match=f"{20 - left} stored objects have no row"):
        check(plane)
    assert recover(plane.catalog, plane.objects).episodes == 20 - left
    with plane.catalog.begin() as connection:
        connection.execute(leases.delete())  # it was given back in what was lost: it would be waited for
    plane.settle()
    check(plane, read=True)
    assert_invariants(home, {f"{n:032x}": digest(encode(example_episode(n))) for n in range(20)})


# --- what else the audit finds ----------------------------------------------------------------------------------------


def test_holes_in_what_is_numbered(plane: Plane) -> None:
    for number in range(4):
        plane.submit(example_episode(number))
    check(plane)
    with plane.catalog.begin() as connection:
        connection.execute(outbox.delete().where(outbox.c.seq == 2))
    with pytest.raises(CorruptDataError) as caught:
        check(plane)
    assert "1 rows of the table outbox are gone" in caught.value.problem
    assert "1 committed episodes were never announced" in caught.value.problem
    assert recover(plane.catalog, plane.objects, actor="anna").episodes == 0
    check(plane)
    plane.settle()
    assert plane.snapshots.latest().episodes == 4
    with plane.catalog.begin() as connection:
        connection.execute(outbox.delete().where(outbox.c.seq == 3))
        assert connection.execute(sa.select(recoveries.c.actor, recoveries.c.holes)).one() == ("anna", {"outbox": 1})
    with pytest.raises(CorruptDataError, match="1 rows of the table outbox are gone"):
        check(plane)  # a second loss is a new one


def test_rows_without_their_object(plane: Plane) -> None:
    for number in range(4):
        plane.submit(example_episode(number))
    plane.settle()
    members = plane.snapshots.episodes(1)
    plane.objects.delete(members[0].key)
    plane.objects.put(members[1].key, b"short")
    plane.objects.put(members[2].key, bytes(members[2].size))
    found = audit(plane.catalog, plane.objects, settle_s=0)
    assert {key for _, key in found.missing} == {members[0].key, members[1].key} and not found.damaged
    found = audit(plane.catalog, plane.objects, read=True, settle_s=0)
    assert [key for _, key in found.damaged] == [members[2].key] and found.read == 2
    with pytest.raises(CorruptDataError, match="3 objects of committed episodes are damaged or gone"):
        found.check()


def test_what_was_collected_or_asked_for_again_is_not_missed(plane: Plane) -> None:
    from infra.collect import collect

    for number in range(3):
        plane.submit(example_episode(number))
    plane.settle()
    plane.snapshots.withdraw([f"{0:032x}"], reason="x", writer="t")
    assert collect(plane.catalog, plane.objects, keep_s=0, now=LATER).objects == 1
    plane.submit(example_episode(5))
    plane.objects.delete(episode_key(digest(encode(example_episode(5)))))
    reconcile(plane.catalog, plane.objects, grace_s=0, now=LATER)
    check(plane, read=True)


def test_a_damaged_page_of_the_catalog(tmp_path: Path) -> None:
    """Whatever SQLite notices first, verify ends in an error that names the catalog."""
    home = tmp_path / "home"
    plane = open_plane(home)
    for number in range(30):
        plane.submit(example_episode(number))
    plane.settle()
    plane.catalog.close()
    with sqlite3.connect(home / "catalog.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        roots = [r[0] for r in connection.execute("SELECT rootpage FROM sqlite_master WHERE tbl_name = 'episodes'")]
    connection.close()
    data = bytearray((home / "catalog.db").read_bytes())
    for page in roots:
        data[(page - 1) * 4096 + 100 : page * 4096] = os.urandom(4096 - 100)
    (home / "catalog.db").write_bytes(data)
    with pytest.raises(CorruptDataError, match="catalog"):
        check(plane)


def test_offsets_stay(plane: Plane) -> None:
    """A recovered episode has a new announcement, after all that was settled."""
    for number in range(2):
        plane.submit(example_episode(number))
    plane.settle()
    store(plane, encode(example_episode(2)))
    recover(plane.catalog, plane.objects)
    with plane.catalog.read() as connection:
        position = connection.execute(sa.select(consumer_offsets.c.position)).scalar_one()
        assert connection.execute(sa.select(sa.func.max(outbox.c.seq))).scalar_one() == position + 1


@pytest.mark.parametrize("where", ["schema", "text"])
def test_bytes_of_the_catalog_that_are_no_text_are_named_as_damage(tmp_path: Path, where: str) -> None:
    """SQLite quotes a damaged schema in its own message, and gives back texts that cannot be decoded."""
    plane = open_plane(tmp_path)
    plane.submit(example_episode(1, robot="robot-of-the-lab"))
    plane.settle()
    plane.catalog.close()
    path = tmp_path / "catalog.db"
    data = path.read_bytes()
    if where == "schema":
        damaged = data.replace(b"CREATE INDEX ix_episodes_committed_at", b"CREATE INDEY ix_episodes_committed_at")
        damaged = damaged.replace(b"ix_episodes_committed_at", b"ix_\x84\x94pisodes_committed")
    else:
        damaged = data.replace(b"robot-of-the-lab", b"robot-of-\xffhe-lab")
    assert damaged != data
    path.write_bytes(damaged)
    with pytest.raises(CorruptDataError, match="its file is damaged"), plane.catalog.read() as connection:
        connection.execute(sa.select(episodes)).all()


def test_an_error_of_the_caller_is_not_taken_for_damage(plane: Plane) -> None:
    with pytest.raises(UnicodeDecodeError), plane.catalog.read():
        b"\xff".decode()
