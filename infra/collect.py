"""Garbage collection: frees the objects of episodes that snapshots no longer hold, and says which versions stay whole.

The floor is the oldest version that must stay: the oldest one that a live reader has pinned, and the one that was
current `keep_s` ago. Objects of episodes that were removed at or before the floor belong to older versions alone. The
floor is committed *before* the first object goes, so that no version ever claims to be whole and is not:

I4 reads: every version that is pinned, or at or above the floor, reads byte-identical.

A collection that dies is finished by the next one. Rows are never deleted: versions, digests and quarantine stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.schema import collections, episodes, pins, quarantine, snapshot_episodes, snapshots
from infra.crashpoints import crashpoint
from infra.objects import ObjectStore
from infra.snapshots import Snapshots, floor

PIN_S = 600.0
_BATCH = 500  # rows of one look
_UNFINISHED = -1  # in place of the number of objects, until they are deleted


@dataclass(frozen=True)
class Collection:
    """What a collection did.

    Attributes:
        floor: the oldest version that is certainly whole from now on.
        objects, bytes: deleted, those of an earlier collection that died included.
    """

    floor: int
    objects: int
    bytes: int


def pin(connection: sa.Connection, name: str, version: int) -> None:
    """Keep `version` whole for `name` for the next 10 minutes, within a write transaction; replaces its last pin."""
    now = dialect.now(connection)
    values = {"name": name, "version": version, "updated_at": now, "expires_at": now + PIN_S}
    dialect.upsert(connection, pins, values)


def collect(
    catalog: Catalog, objects: ObjectStore, *, keep_s: float, now: float | None = None, actor: str = "operator"
) -> Collection:
    """Delete what no version at or above the floor needs. Safe beside running processes, and to repeat.

    Objects that another episode shares are kept until that one is collected too. A catalog that does not match its own
    digests says nothing of what is needed.

    Args:
        keep_s: versions that were current within this time stay, seconds.
        now: the time to judge ages by; the catalog's clock by default.
        actor: who asked for it.

    Raises:
        CorruptDataError: snapshots do not match their digests; nothing was deleted.
    """
    Snapshots(catalog).verify()
    with catalog.begin() as connection:
        at = dialect.now(connection) if now is None else now
        lowest = max(_floor(connection, at - keep_s, at), floor(connection))
        done = _finished(connection)
        if connection.execute(_removed(done, lowest).limit(1)).first() is None:
            return Collection(floor(connection), 0, 0)
        values = {"floor": lowest, "objects": _UNFINISHED, "bytes": 0, "actor": actor, "created_at": at}
        number = connection.execute(collections.insert().values(values).returning(collections.c.id)).scalar_one()
    crashpoint("collect.floor_recorded")
    count = size = 0
    for rows in _batches(catalog, done, lowest):
        for key, length in rows:
            objects.delete(key)
            crashpoint("collect.object_deleted")
            count, size = count + 1, size + length
    with catalog.begin() as connection:
        values = {"objects": count, "bytes": size}
        connection.execute(collections.update().where(collections.c.id == number).values(values))
    return Collection(lowest, count, size)


def _floor(connection: sa.Connection, before: float, now: float) -> int:
    """The oldest version that is pinned, or was current at the time `before` or after it."""
    old = sa.select(sa.func.max(snapshots.c.version)).where(snapshots.c.created_at <= before)
    pinned = sa.select(sa.func.min(pins.c.version)).where(pins.c.expires_at > now)
    kept, lowest = connection.execute(old).scalar() or 0, connection.execute(pinned).scalar()
    return kept if lowest is None else min(kept, lowest)


def _finished(connection: sa.Connection) -> int:
    """The floor up to which objects are deleted; a collection that died recorded its floor and did not come to this."""
    query = sa.select(sa.func.max(collections.c.floor)).where(collections.c.objects != _UNFINISHED)
    return connection.execute(query).scalar() or 0


def _removed(done: int, lowest: int) -> sa.Select[Any]:
    table = snapshot_episodes
    return sa.select(table.c.episode_id).where(table.c.removed > done, table.c.removed <= lowest)


def _batches(catalog: Catalog, done: int, lowest: int) -> Iterator[Sequence[tuple[str, int]]]:
    """(key, size) of the objects to delete."""
    members, other = snapshot_episodes, episodes.alias()
    # Needed still: by an episode that is no candidate, or by one in quarantine that may be released.
    gone = sa.exists().where(members.c.episode_id == other.c.episode_id, members.c.removed <= lowest)
    shared = sa.exists().where(other.c.key == episodes.c.key, ~gone)
    held = sa.exists().where(quarantine.c.key == episodes.c.key, quarantine.c.version.is_(None))
    key = ""
    while True:
        query = (
            sa.select(episodes.c.key, sa.func.max(episodes.c.size))
            .where(episodes.c.episode_id.in_(_removed(done, lowest)), ~shared, ~held, episodes.c.key > key)
            .group_by(episodes.c.key)
            .order_by(episodes.c.key)
            .limit(_BATCH)
        )
        with catalog.read() as connection:
            rows = [(row[0], row[1]) for row in connection.execute(query)]
        if not rows:
            return
        yield rows
        key = rows[-1][0]
