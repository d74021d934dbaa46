"""Ingest: repeated calls are one, what the store does not hold is not committed, conflicts are kept and named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import sqlalchemy as sa
from invariants import (
    KILLED,
    Plane,
    assert_i7_kept,
    digest,
    example_episode,
    in_process,
    open_plane,
)

from infra.catalog.schema import episodes, outbox, quarantine
from infra.crashpoints import registered
from infra.episode import encode
from infra.errors import ConfigError, ConflictError, CorruptDataError, StorageFullError
from infra.ingest import Claim, Ingest
from infra.objects.directory import DirectoryStore

EPISODE = example_episode(1)
DATA = encode(EPISODE)
SHA = digest(DATA)
ID = EPISODE.episode_id


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


def rows(plane: Plane, table: sa.Table) -> int:
    with plane.catalog.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def stored(plane: Plane) -> list[str]:
    return [item.key for prefix in ("episodes", "incoming") for item in plane.objects.list(prefix)]


def test_a_hundred_submissions_are_one_episode(plane: Plane) -> None:
    assert plane.ingest.status(ID) == "unknown"
    for _ in range(100):
        assert plane.submit(EPISODE) == "committed"
    assert (rows(plane, episodes), rows(plane, outbox), rows(plane, quarantine)) == (1, 1, 0)
    assert stored(plane) == [f"episodes/{SHA[:2]}/{SHA}.tar"]
    assert plane.ingest.status(ID) == "committed"


def test_a_file_and_its_times_are_taken(plane: Plane, tmp_path: Path) -> None:
    (tmp_path / "e.tar").write_bytes(DATA)
    meta = {"produced_at": 12.5, "trace_id": "t", "schema_version": 1}
    assert plane.ingest.submit("r0", ID, tmp_path / "e.tar", SHA, len(DATA), meta) == "committed"
    with plane.catalog.read() as connection:
        row = connection.execute(sa.select(episodes)).one()
    assert (row.produced_at, row.trace_id, row.robot_id, row.size) == (12.5, "t", "r0", len(DATA))
    assert row.committed_at > row.produced_at


@pytest.mark.parametrize(("sha", "size"), [(digest(b"other"), len(DATA)), (SHA, len(DATA) + 1)])
def test_what_the_store_does_not_hold_is_not_committed(plane: Plane, sha: str, size: int) -> None:
    with pytest.raises(CorruptDataError, match=f"{ID} of r0: "):
        plane.ingest.submit("r0", ID, DATA, sha, size)
    assert (rows(plane, episodes), stored(plane)) == (0, [])
    assert plane.ingest.status(ID) == "unknown"


class Forgetful(DirectoryStore):
    """A store that acknowledges the first upload and loses it (fault 5), or keeps only half of it (3)."""

    def __init__(self, root: Path, kept: int) -> None:
        super().__init__(root)
        self.kept, self.uploads = kept, 0

    def put(self, key: str, data: bytes | Path) -> None:
        super().put(key, data)
        self.uploads += 1
        if self.uploads == 1:
            if self.kept:
                super().put(key, self.get(key)[: self.kept])
            else:
                self.delete(key)


@pytest.mark.parametrize("kept", [0, 100])
def test_an_acknowledged_upload_that_vanished_is_uploaded_again(plane: Plane, kept: int) -> None:
    ingest = Ingest(plane.catalog, Forgetful(plane.objects.root, kept))
    with pytest.raises(CorruptDataError):
        ingest.submit("r0", ID, DATA, SHA, len(DATA))
    assert rows(plane, episodes) == 0
    assert ingest.submit("r0", ID, DATA, SHA, len(DATA)) == "committed"
    assert_i7_kept(plane.home, [(ID, SHA)])


def test_the_same_id_with_other_bytes_is_kept_in_quarantine_and_refused(plane: Plane) -> None:
    plane.submit(EPISODE)
    other = example_episode(1, task="L4")
    sha = digest(encode(other))
    for _ in range(2):  # repeated: still one row
        with pytest.raises(ConflictError, match=f"{ID}[\\s\\S]*{SHA}[\\s\\S]*{sha}"):
            plane.submit(other)
    assert plane.ingest.status(ID) == plane.ingest.status(ID, SHA) == "committed"
    assert plane.ingest.status(ID, sha) == "quarantined"
    assert (rows(plane, episodes), rows(plane, outbox), rows(plane, quarantine)) == (1, 1, 1)
    with plane.catalog.read() as connection:
        held = connection.execute(sa.select(quarantine)).one()
    assert held.stage == "conflict" and SHA in held.reasons[0]["message"]
    assert plane.objects.get(held.key) == encode(other)
    assert plane.submit(EPISODE) == "committed"


def test_a_robot_cannot_claim_another_robots_episode(plane: Plane) -> None:
    plane.submit(EPISODE)
    with pytest.raises(ConflictError, match="belongs to robot r0, not to r1"):
        plane.submit(EPISODE, robot="r1")
    assert (rows(plane, episodes), rows(plane, quarantine)) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"robot": "../r0"}, "robot id"),
        ({"episode": "x" * 32}, "episode id"),
        ({"sha": SHA.upper()}, "sha256"),
        ({"meta": {"schema_version": "1"}}, "schema_version"),
        ({"meta": {"schema_version": True}}, "schema_version"),
        ({"meta": {"produced_at": float("nan")}}, "produced_at"),
        ({"meta": {"trace_id": "x" * 65}}, "trace_id"),
        ({"meta": {"trace_id": "a\0b"}}, "trace_id"),
        ({"meta": {"trace_id": "\ud800"}}, "trace_id"),
        ({"meta": {"produced": 1.0}}, "produced"),
    ],
)
def test_a_malformed_announcement_is_named_and_stores_nothing(plane: Plane, changes: dict, named: str) -> None:
    values = {"robot": "r0", "episode": ID, "sha": SHA, "meta": {}, **changes}
    with pytest.raises(ConfigError, match=named):
        plane.ingest.submit(values["robot"], values["episode"], DATA, values["sha"], len(DATA), values["meta"])
    assert (rows(plane, episodes), stored(plane)) == (0, [])


def test_a_full_store_acknowledges_nothing_and_recovers(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageFullError, match="nothing was kept"):
            plane.submit(EPISODE)
    assert (rows(plane, episodes), rows(plane, outbox), stored(plane)) == (0, 0, [])
    assert plane.submit(EPISODE) == "committed"


def _submit(home: Path) -> None:
    open_plane(home).submit(EPISODE)


@pytest.mark.parametrize("point", registered("ingest.py"))
def test_killed_at_a_crash_point_and_sent_again_it_is_one_episode(plane: Plane, point: str) -> None:
    assert in_process(_submit, plane.home, crash=point) == KILLED
    assert plane.ingest.status(ID) == ("committed" if point == "ingest.committed" else "unknown")
    assert plane.submit(EPISODE) == "committed"
    assert (rows(plane, episodes), rows(plane, outbox), rows(plane, quarantine)) == (1, 1, 0)
    assert_i7_kept(plane.home, [(ID, SHA)])


def test_what_was_never_refused_cannot_be_released(plane: Plane) -> None:
    plane.submit(EPISODE)
    with pytest.raises(ConfigError, match=ID):
        plane.ingest.release(ID, SHA)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("produced_at", float("nan")), ("produced_at", 1e300), ("produced_at", 10**400), ("produced_at", -1.0),
        ("produced_at", True), ("produced_at", "now"), ("schema_version", 2**31), ("schema_version", True),
        ("schema_version", 10**5000), ("trace_id", "a\x00b"), ("trace_id", "\ud800"), ("trace_id", "x" * 65),
        ("trace_id", 7), ("colour", "red"), (7, 1),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_claim_of_odd_values_is_refused_with_a_short_message(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Claim.read("r0", "a" * 32, "b" * 64, 1, {field: value})
    assert len(caught.value.problem) < 200


@pytest.mark.parametrize("changes", [{"robot_id": 5}, {"episode_id": None}, {"sha256": "b" * 10**6}, {"size": 1.5}])
def test_a_claim_whose_names_are_not_text_is_refused(changes: dict[str, object]) -> None:
    values: dict[str, object] = {"robot_id": "r0", "episode_id": "a" * 32, "sha256": "b" * 64, "size": 1}
    with pytest.raises(ConfigError):
        Claim.read(**(values | changes), meta={})  # type: ignore[arg-type]
