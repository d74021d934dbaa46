"""Snapshots of the replay data: versions that are gapless, immutable, and chained by digest.

Snapshot V holds the episodes with `added <= V and (removed is null or removed > V)`; the highest version is the current
one. Every writer goes through `append` inside a catalog transaction, and write transactions are serialised: that is
what makes versions gapless. Every version that is pinned, or at or above the floor of the last garbage collection
(`infra.collect`), reads byte-identical (I4); an older one that lost an object says so instead of reading incomplete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.schema import collections, episodes, quarantine, revocations, robots, snapshot_episodes, snapshots
from infra.crashpoints import crashpoint
from infra.episode import MAX_REASON_CHARS
from infra.errors import ConfigError, CorruptDataError, shown

EMPTY_DIGEST = hashlib.sha256(b"lwd snapshot 0").hexdigest()
_BATCH = 500  # parameters of one IN (...)


@dataclass(frozen=True)
class Snapshot:
    """One version. `episodes` counts its members, `added` and `removed` its difference from the parent."""

    version: int
    parent: int
    digest: str
    episodes: int
    added: int
    removed: int
    reason: str
    created_at: float


@dataclass(frozen=True)
class Member:
    """An episode of a snapshot: where its object is and what it must be."""

    episode_id: str
    key: str
    sha256: str
    size: int
    task: str
    source: str
    outcome: str


@dataclass(frozen=True)
class Difference:
    """What leads from snapshot `after` to snapshot `version`.

    `added` is in order of the version that added it, then of id: a reader that keeps this order, and the order of the
    rest when it removes, holds every version in one order, whichever steps led there.
    """

    after: int
    version: int
    digest: str
    added: tuple[Member, ...]
    removed: tuple[str, ...]


EMPTY = Snapshot(0, -1, EMPTY_DIGEST, 0, 0, 0, "empty", 0.0)


class Snapshots:
    """Reading snapshots, and the two ways besides the coordinator's to make one: withdrawing and revoking."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def latest(self) -> Snapshot:
        """The current snapshot; version 0, empty, before the first."""
        with self._catalog.read() as connection:
            return current(connection)

    def get(self, version: int) -> Snapshot:
        """One version; ConfigError if there is none such."""
        with self._catalog.read() as connection:
            return _get(connection, version)

    def robots(self) -> set[str]:
        """Who is enrolled or has handed in an episode, whatever became of it."""
        with self._catalog.read() as connection:
            return {
                robot
                for column in (robots.c.robot_id, episodes.c.robot_id)
                for robot in connection.execute(sa.select(column).distinct()).scalars()
            }

    def floor(self) -> int:
        """The oldest version that is certainly whole; 0 before the first garbage collection."""
        with self._catalog.read() as connection:
            return floor(connection)

    def episodes(self, version: int) -> list[Member]:
        """The members of one version, in order of id: the same list as long as it is kept.

        Raises:
            ConfigError: there is no such version, or objects of it were collected.
        """
        with self._catalog.read() as connection:
            _get(connection, version)
            held = sa.or_(snapshot_episodes.c.removed.is_(None), snapshot_episodes.c.removed > version)
            members = sa.and_(snapshot_episodes.c.added <= version, held)
            _must_be_kept(connection, version, members)
            return _members(connection, members, episodes.c.episode_id)

    def increment(self, after: int, version: int | None = None) -> Difference:
        """What a reader of snapshot `after` adds and removes to hold `version` (the current one by default).

        Raises:
            ConfigError: `after` is ahead of `version`, there is no such version, or what it adds was collected. From a
                version below the floor to one at or above it there is always a way.
        """
        with self._catalog.read() as connection:
            target = current(connection) if version is None else _get(connection, version)
            if not 0 <= after <= target.version:
                raise ConfigError(
                    f"no way from snapshot {after} to {target.version}: snapshots only go forward",
                    "start the reader at 0, or point it at the catalog that its checkpoint came from",
                )
            added, removed = snapshot_episodes.c.added, snapshot_episodes.c.removed
            new = sa.and_(added > after, added <= target.version, sa.or_(removed.is_(None), removed > target.version))
            gone = sa.select(snapshot_episodes.c.episode_id).where(
                added <= after, removed > after, removed <= target.version
            )
            _must_be_kept(connection, target.version, new)
            return Difference(
                after,
                target.version,
                target.digest,
                tuple(_members(connection, new, added, episodes.c.episode_id)),
                tuple(sorted(connection.execute(gone).scalars())),
            )

    def withdraw(self, episode_ids: Iterable[str], *, reason: str, writer: str, stage: str = "read") -> Snapshot:
        """Quarantine members by a new snapshot: what a reader does with an object that it cannot read.

        Ids that are no current members are left alone; with none left, no snapshot is made. Returns the current one.
        """
        with self._catalog.begin() as connection:
            wanted = sorted(set(episode_ids))
            removed = [
                identifier
                for start in range(0, len(wanted), _BATCH)
                for identifier in connection.execute(
                    sa.select(snapshot_episodes.c.episode_id).where(
                        snapshot_episodes.c.episode_id.in_(wanted[start : start + _BATCH]),
                        snapshot_episodes.c.removed.is_(None),
                    )
                ).scalars()
            ]
            return append(connection, removed=removed, reason=reason, writer=writer, stage=stage)

    def revoke(self, robot_id: str, since: float, until: float, *, reason: str, actor: str) -> Snapshot:
        """Remove what a robot produced, or handed in, between two times, and refuse what still comes of it.

        Args:
            robot_id: whose episodes.
            since, until: seconds since the epoch, inclusive.
            reason: for the audit.
            actor: who decided.
        """
        if not since <= until:
            raise ConfigError(f"revocation of {robot_id}: since {since} is after until {until}", "swap the two times")
        with self._catalog.begin() as connection:
            values = {"robot_id": robot_id, "since": since, "until": until, "reason": reason, "actor": actor}
            connection.execute(revocations.insert().values(**values, created_at=dialect.now(connection)))
            produced, committed = episodes.c.produced_at, episodes.c.committed_at
            query = (
                sa.select(episodes.c.episode_id)
                .join(snapshot_episodes, snapshot_episodes.c.episode_id == episodes.c.episode_id)
                .where(
                    episodes.c.robot_id == robot_id,
                    sa.or_(produced.between(since, until), committed.between(since, until)),
                    snapshot_episodes.c.removed.is_(None),
                )
            )
            removed = list(connection.execute(query).scalars())
            text = f"revoked: {robot_id}: {reason}"
            return append(connection, removed=removed, reason=text, writer=actor, stage="revoked")

    def verify(self) -> int:
        """Recompute the chain of digests from the rows; returns the number of versions.

        Raises:
            CorruptDataError: a version is missing or its members are not those it was made with.
        """
        with self._catalog.read() as connection:
            expected, digest = 1, EMPTY_DIGEST
            for row in connection.execute(sa.select(snapshots).order_by(snapshots.c.version)):
                digest = _digest(digest, row.version, *_changes(connection, row.version))
                if row.version != expected or row.digest != digest:
                    raise CorruptDataError(
                        f"snapshot {row.version} (expected {expected}) does not match its digest",
                        "restore the catalog from its backup: its rows were changed outside this program",
                    )
                expected += 1
            return expected - 1


def current(connection: sa.Connection) -> Snapshot:
    """The current snapshot as this transaction sees it."""
    row = connection.execute(sa.select(snapshots).order_by(snapshots.c.version.desc()).limit(1)).first()
    return EMPTY if row is None else _snapshot(row)


def floor(connection: sa.Connection) -> int:
    """As `Snapshots.floor`, in this transaction."""
    return connection.execute(sa.select(sa.func.max(collections.c.floor))).scalar() or 0


def append(
    connection: sa.Connection,
    *,
    added: Sequence[dict[str, Any]] = (),
    removed: Sequence[str] = (),
    reason: str,
    writer: str,
    stage: str = "read",
) -> Snapshot:
    """Make the next snapshot within a write transaction; the current one is returned when nothing changes.

    Args:
        added: rows of `snapshot_episodes` without `added`; an id that was ever in a snapshot is left as it is (I2).
        removed: ids of current members; they go to quarantine with `reason` and `stage` (I1).
        reason: kept in a form that every database takes; it may repeat what an episode says.
    """
    reason = shown(reason, MAX_REASON_CHARS)
    parent = current(connection)
    version = parent.version + 1
    fresh = [row for row in added if dialect.insert_if_absent(connection, snapshot_episodes, {**row, "added": version})]
    crashpoint("snapshots.members_inserted")
    for identifier in removed:
        _remove(connection, identifier, version, reason, stage)
    if not fresh and not removed:
        return parent
    crashpoint("snapshots.members_removed")
    row: dict[str, Any] = {
        "version": version,
        "parent": parent.version,
        "digest": _digest(parent.digest, version, *_changes(connection, version)),
        "episodes": parent.episodes + len(fresh) - len(removed),
        "added": len(fresh),
        "removed": len(removed),
        "reason": reason,
        "writer": writer,
        "created_at": dialect.now(connection),
    }
    connection.execute(snapshots.insert().values(row))
    crashpoint("snapshots.version_inserted")
    del row["writer"]
    return Snapshot(**row)


def _remove(connection: sa.Connection, identifier: str, version: int, reason: str, stage: str) -> None:
    table = snapshot_episodes
    connection.execute(
        table.update().where(table.c.episode_id == identifier, table.c.removed.is_(None)).values(removed=version)
    )
    episode = connection.execute(sa.select(episodes).where(episodes.c.episode_id == identifier)).one()
    values = {
        "episode_id": identifier,
        "sha256": episode.sha256,
        "robot_id": episode.robot_id,
        "key": episode.key,
        "stage": stage,
        "reasons": [{"rule": stage, "severity": "block", "message": reason}],
        "version": version,
        "created_at": dialect.now(connection),
    }
    connection.execute(quarantine.insert().values(values))


def _changes(connection: sa.Connection, version: int) -> tuple[list[tuple[str, str]], list[str]]:
    """((id, sha256) added, ids removed) by one version."""
    table = snapshot_episodes
    added = connection.execute(
        sa.select(table.c.episode_id, episodes.c.sha256)
        .join(episodes, episodes.c.episode_id == table.c.episode_id)
        .where(table.c.added == version)
    )
    removed = connection.execute(sa.select(table.c.episode_id).where(table.c.removed == version))
    return [(row.episode_id, row.sha256) for row in added], list(removed.scalars())


def _digest(parent: str, version: int, added: Iterable[tuple[str, str]], removed: Iterable[str]) -> str:
    lines = [parent, str(version), *(f"+{i} {sha}" for i, sha in sorted(added)), *(f"-{i}" for i in sorted(removed))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _must_be_kept(connection: sa.Connection, version: int, condition: sa.ColumnElement[bool]) -> None:
    """ConfigError if a garbage collection may have taken an object of the members that `condition` names."""
    lowest = floor(connection)
    if version >= lowest:
        return
    gone = sa.select(snapshot_episodes.c.episode_id).where(condition, snapshot_episodes.c.removed <= lowest).limit(1)
    if connection.execute(gone).first() is not None:
        raise ConfigError(
            f"snapshot {version} was collected; the oldest kept is {lowest}",
            "ask for that one or a later one; a longer `lwd data collect --keep-days` keeps more from now on",
        )


def _members(
    connection: sa.Connection, condition: sa.ColumnElement[bool], *order: sa.ColumnElement[Any]
) -> list[Member]:
    query = (
        sa.select(
            episodes.c.episode_id,
            episodes.c.key,
            episodes.c.sha256,
            episodes.c.size,
            snapshot_episodes.c.task,
            snapshot_episodes.c.source,
            snapshot_episodes.c.outcome,
        )
        .join(episodes, episodes.c.episode_id == snapshot_episodes.c.episode_id)
        .where(condition)
        .order_by(*order)
    )
    return [Member(*row) for row in connection.execute(query)]


def _get(connection: sa.Connection, version: int) -> Snapshot:
    if version == 0:
        return EMPTY
    row = connection.execute(sa.select(snapshots).where(snapshots.c.version == version)).first()
    if row is None:
        raise ConfigError(
            f"there is no snapshot {version}; the latest is {current(connection).version}", "ask for one that exists"
        )
    return _snapshot(row)


def _snapshot(row: sa.Row[tuple[object, ...]]) -> Snapshot:
    return Snapshot(
        row.version, row.parent, row.digest, row.episodes, row.added, row.removed, row.reason, row.created_at
    )
