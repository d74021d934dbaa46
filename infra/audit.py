"""The audit: what the catalog file, its sequences, its rows and the store say of each other, and where they disagree.

A database file that was damaged can be whole again and shorter: SQLite leaves out, without a word, what follows a
damaged place of its write-ahead log. Only the store then still knows of the episodes that were acknowledged. So the
audit compares both ways, and changes nothing: `infra.recover` brings back what it finds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.accounting import count_unaccounted
from infra.catalog.schema import (
    announcements,
    episodes,
    outbox,
    policies,
    promotions,
    quarantine,
    recoveries,
    snapshot_episodes,
)
from infra.errors import CorruptDataError, UnavailableError
from infra.objects import ObjectInfo, ObjectStore, UnreadableError
from infra.snapshots import Snapshots, floor

_BATCH = 500  # parameters of one IN (...)
_NUMBERED = (outbox, announcements, promotions)  # nothing deletes their rows: SQLite numbers them without a hole


@dataclass
class Audit:
    """What was found.

    Attributes:
        versions: snapshots that match the chain of digests.
        floor: the oldest snapshot that is kept whole.
        episodes: committed.
        objects: listed below `episodes/`.
        unaccounted: committed episodes that are neither in a snapshot nor in quarantine: no damage, work to be done.
        read: objects whose bytes were read and hashed.
        catalog: what is wrong within the catalog, a sentence each.
        unrecorded: objects that the catalog has no row of.
        missing: (episode id, key) of rows whose object is gone, or of another size.
        damaged: the same of objects that hold other bytes.
        unread: the same of objects that the store did not give.
    """

    versions: int = 0
    floor: int = 0
    episodes: int = 0
    objects: int = 0
    unaccounted: int = 0
    read: int = 0
    catalog: list[str] = field(default_factory=list)
    unrecorded: list[ObjectInfo] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)

    def check(self) -> None:
        """Raises:
        CorruptDataError: something is wrong; says how much of what, and what to do.
        UnavailableError: nothing is known to be wrong, but objects could not be read.
        """
        problems, fixes = [*self.catalog], []
        if self.catalog:
            fixes.append("restore the catalog from its backup, or go on with what is left; then `lwd data recover`")
        if self.unrecorded:
            problems.append(f"{len(self.unrecorded)} stored objects have no row in the catalog")
            fixes.append("bring them back with `lwd data recover`")
        if lost := len(self.missing) + len(self.damaged):
            problems.append(f"{lost} objects of committed episodes are damaged or gone")
            fixes.append("restore them from the bucket's backup; else the readers withdraw them by a new snapshot")
        if problems:
            raise CorruptDataError("; ".join(problems), "; ".join(fixes))
        if self.unread:
            raise UnavailableError(f"{len(self.unread)} objects could not be read", "look at the store, then try again")


def audit(catalog: Catalog, objects: ObjectStore, *, read: bool = False, settle_s: float = 1.0) -> Audit:
    """Compare everything. Safe beside running processes.

    Args:
        read: read every object that is still needed and hash it, too.
        settle_s: how long a commit that is under way may take from the object to its row, seconds.

    Raises:
        CorruptDataError: the catalog's file cannot be read as a database at all.
        UnavailableError: catalog or store do not answer.
    """
    found = Audit()
    snapshots = Snapshots(catalog)
    with catalog.read() as connection:
        found.catalog += dialect.damages(connection)
        found.catalog += _sequences(connection)
    try:
        found.versions = snapshots.verify()
    except CorruptDataError as error:
        found.catalog.append(error.problem)
    found.floor = snapshots.floor()
    stored = {item.key: item.size for item in objects.list("episodes")}
    found.objects = len(stored)
    found.unrecorded = list(unrecorded(catalog, objects))
    if found.unrecorded and settle_s:
        time.sleep(settle_s)
        still = _without_row(catalog, found.unrecorded)
        found.unrecorded = [item for item in found.unrecorded if item.key in still]
    with catalog.read() as connection:
        found.unaccounted = count_unaccounted(connection)
        found.episodes = connection.execute(sa.select(sa.func.count()).select_from(episodes)).scalar_one()
    for row in _needed(catalog):
        # What was committed since the store was listed is asked for by itself.
        if stored.get(row.key) != row.size and not (row.key not in stored and objects.exists(row.key)):
            found.missing.append((row.episode_id, row.key))
        elif read:
            _read(objects, row, found)
    return found


def unrecorded(
    catalog: Catalog,
    objects: ObjectStore,
    *,
    before: float | None = None,
    alive: Callable[[], object] = lambda: None,
) -> Iterator[ObjectInfo]:
    """Objects below `episodes/` that the catalog has no row of, in order of key.

    Args:
        before: leave out what was written after this time, seconds since the epoch.
        alive: called between any two looks.
    """
    listing = iter(objects.list("episodes"))
    while batch := list(islice(listing, _BATCH)):
        alive()
        batch = [item for item in batch if before is None or item.modified <= before]
        lacking = _without_row(catalog, batch)
        yield from (item for item in batch if item.key in lacking)


def _without_row(catalog: Catalog, items: list[ObjectInfo]) -> set[str]:
    """The keys that neither an episode nor the quarantine names."""
    lacking = {item.key for item in items}
    for start in range(0, len(items), _BATCH):
        keys = [item.key for item in items[start : start + _BATCH]]
        with catalog.read() as connection:
            for table in (episodes, quarantine):
                lacking -= set(connection.execute(sa.select(table.c.key).where(table.c.key.in_(keys))).scalars())
    return lacking


def _needed(catalog: Catalog) -> Iterator[Any]:
    """Episodes whose object must be there, in order of id: not collected, and not asked for again from its spool."""
    last = ""
    while True:
        with catalog.read() as connection:
            collected = sa.exists().where(
                snapshot_episodes.c.episode_id == episodes.c.episode_id,
                snapshot_episodes.c.removed <= floor(connection),
            )
            wanted = sa.exists().where(
                quarantine.c.episode_id == episodes.c.episode_id,
                quarantine.c.sha256 == episodes.c.sha256,
                quarantine.c.stage == "store",
            )
            query = sa.select(episodes.c.episode_id, episodes.c.key, episodes.c.sha256, episodes.c.size)
            query = query.where(episodes.c.episode_id > last, ~collected, ~wanted)
            rows = connection.execute(query.order_by(episodes.c.episode_id).limit(_BATCH)).all()
        if not rows:
            return
        yield from rows
        last = rows[-1].episode_id


def _read(objects: ObjectStore, row: sa.Row[Any], found: Audit) -> None:
    name = (row.episode_id, row.key)
    try:
        digest = hashlib.sha256(objects.get(row.key)).hexdigest()
    except UnreadableError:  # the store serves, but has lost these bytes
        found.unread.append(name)
        return
    except CorruptDataError:
        found.missing.append(name)
        return
    found.read += 1
    if digest != row.sha256:
        found.damaged.append(name)


def holes(connection: sa.Connection) -> dict[str, int]:
    """By table, how many of the numbers up to its highest no row has; tables without holes are left out."""
    tables = _NUMBERED if connection.dialect.name == "sqlite" else ()  # PostgreSQL skips numbers of undone work
    found = {}
    for column in [*(next(iter(table.primary_key)) for table in tables), policies.c.version]:
        query = sa.select(sa.func.coalesce(sa.func.max(column), 0) - sa.func.count())
        if missing := connection.execute(query.select_from(column.table)).scalar_one():
            found[str(column.table.name)] = int(missing)
    return found


def _sequences(connection: sa.Connection) -> list[str]:
    """Holes that no recovery has recorded, and rows that lack the row that was committed with them."""
    last = connection.execute(sa.select(recoveries.c.holes).order_by(recoveries.c.id.desc()).limit(1)).scalar() or {}
    problems = [
        f"{count - last.get(name, 0)} rows of the table {name} are gone: their numbers are missing"
        for name, count in holes(connection).items()
        if count > last.get(name, 0)
    ]
    named = sa.exists().where(episodes.c.episode_id == outbox.c.episode_id, episodes.c.sha256 == outbox.c.sha256)
    announced = sa.exists().where(outbox.c.episode_id == episodes.c.episode_id)
    for table, there, text in (
        (outbox, named, "announcements name no committed episode"),
        (episodes, announced, "committed episodes were never announced"),
    ):
        count = connection.execute(sa.select(sa.func.count()).select_from(table).where(~there)).scalar_one()
        if count:
            problems.append(f"{count} {text}")
    return problems
