"""The reconciler: compares rows and objects, and mends what a broker, a store or a crash left different."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.schema import episodes, outbox, quarantine, snapshot_episodes
from infra.crashpoints import crashpoint
from infra.events import announce
from infra.objects import ObjectStore

_CLAIM = ("episode_id", "robot_id", "key", "sha256", "size", "schema_version", "trace_id")


@dataclass(frozen=True)
class Reconciliation:
    """What was found and mended: counts."""

    announced_again: int
    objects_lost: int
    orphans_deleted: int
    incoming_deleted: int


def reconcile(
    catalog: Catalog, objects: ObjectStore, *, grace_s: float = 3600.0, now: float | None = None
) -> Reconciliation:
    """Mend what has differed for longer than `grace_s`. Safe beside running processes, and to repeat.

    - Committed, but in no snapshot and not in quarantine: announced again (a broker lost it); duplicates are absorbed.
    - The same, but the object is gone: quarantined at stage `store`, for which the spool sends it again.
    - Stored under `episodes/`, but never committed: deleted; the spool that sent it sends it again.
    - Left in `incoming/`: deleted.

    Args:
        grace_s: how long a running process may take between two of its steps, seconds.
        now: the time to judge ages by; the clock's by default.
    """
    before = (time.time() if now is None else now) - grace_s
    with catalog.read() as connection:
        waiting = list(connection.execute(_unsettled(before)))
    announced = lost = 0
    for row in waiting:
        there = objects.exists(row.key)
        with catalog.begin() as connection:
            if connection.execute(_unsettled(before).where(episodes.c.episode_id == row.episode_id)).first() is None:
                continue  # settled meanwhile
            if there:
                announce(connection, **{name: getattr(row, name) for name in _CLAIM})
                announced += 1
            else:
                _want_again(connection, row)
                lost += 1
        crashpoint("reconcile.row_mended")
    orphans = incoming = 0
    for item in list(objects.list("episodes")):
        if item.modified <= before and not _referenced(catalog, item.key):
            objects.delete(item.key)
            orphans += 1
    crashpoint("reconcile.orphans_deleted")
    for item in list(objects.list("incoming")):
        if item.modified <= before:
            objects.delete(item.key)
            incoming += 1
    return Reconciliation(announced, lost, orphans, incoming)


def _want_again(connection: sa.Connection, row: sa.Row[Any]) -> None:
    values = {
        "episode_id": row.episode_id,
        "sha256": row.sha256,
        "robot_id": row.robot_id,
        "key": row.key,
        "stage": "store",
        "reasons": [{"rule": "object", "severity": "block", "message": f"object {row.key} is gone"}],
        "created_at": dialect.now(connection),
    }
    dialect.insert_if_absent(connection, quarantine, values)


def _referenced(catalog: Catalog, key: str) -> bool:
    """Whether a row needs the object. Should a commit race with the deletion, the coordinator asks for it again."""
    with catalog.read() as connection:
        return any(
            connection.execute(sa.select(table.c.key).where(table.c.key == key).limit(1)).first() is not None
            for table in (episodes, quarantine)
        )


def _unsettled(before: float) -> sa.Select[Any]:
    """Episodes committed before a time, in no snapshot and not in quarantine, and last announced before it too."""
    recent = sa.exists().where(outbox.c.episode_id == episodes.c.episode_id, outbox.c.created_at > before)
    held = sa.exists().where(quarantine.c.episode_id == episodes.c.episode_id, quarantine.c.sha256 == episodes.c.sha256)
    member = sa.exists().where(snapshot_episodes.c.episode_id == episodes.c.episode_id)
    return sa.select(episodes).where(episodes.c.committed_at <= before, ~recent, ~held, ~member)
