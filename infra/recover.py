"""Bringing back what the store has and the catalog lost: every stored, whole, readable episode is committed again.

The episode itself says whose it is and what its id is; its key says its digest, which is computed anew. It is
announced like any other, so that the coordinator gives its verdict; a spool that asks gets the status that it would
have had. What does not read as an episode is named and left where it is.

The robot's id is the episode's own word here, where the ingest service compared it with the robot's token: look at the
number for each robot.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass, field

import sqlalchemy as sa

from infra.audit import holes, unrecorded
from infra.catalog import Catalog, dialect
from infra.catalog.schema import episodes, outbox, recoveries
from infra.crashpoints import crashpoint
from infra.episode import Episode, decode
from infra.errors import ConfigError, CorruptDataError, LwdError
from infra.events import announce
from infra.ingest import MAX_OBJECT_BYTES, Claim, Ingest, is_time
from infra.objects import ObjectInfo, ObjectStore, UnreadableError, episode_key

log = logging.getLogger(__name__)
_AT_ONCE = 32  # episodes in one transaction


@dataclass
class Recovery:
    """What was done.

    Attributes:
        by_robot: how many episodes of each were committed again.
        conflicts: keys of objects whose id belongs to other bytes by now; they are in quarantine.
        left: (key, reason) of objects that are no whole episode; they stay.
    """

    by_robot: Counter[str] = field(default_factory=Counter)
    conflicts: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    @property
    def episodes(self) -> int:
        return self.by_robot.total()


def recover(catalog: Catalog, objects: ObjectStore, *, actor: str = "operator") -> Recovery:
    """Commit again what the catalog lacks, and record it. Safe beside running processes, and to repeat after a crash.

    Committed episodes that were never announced are announced. What is lost for ever, rows whose numbers are missing,
    is recorded: the audit speaks of it no more.

    Args:
        actor: who asked for it.

    Raises:
        UnavailableError, StorageFullError: catalog or store do not answer; what was done stays done.
    """
    done, ingest = Recovery(), Ingest(catalog, objects)
    # The oldest first: of two under one id, the first to be stored was the one that was committed.
    items = sorted(unrecorded(catalog, objects), key=lambda item: (item.modified, item.key))
    claims: list[Claim] = []
    for item in items:
        claim = _claim(objects, item, done)
        if claim is not None:
            claims.append(claim)
        if len(claims) >= _AT_ONCE:
            _commit(ingest, claims, done)
            claims = []
    if claims:
        _commit(ingest, claims, done)
    with catalog.begin() as connection:
        _announce_forgotten(connection)
        values = {"episodes": done.episodes, "conflicts": len(done.conflicts), "left": len(done.left), "actor": actor}
        values |= {"holes": holes(connection), "created_at": dialect.now(connection)}
        connection.execute(recoveries.insert().values(values))
    return done


def _announce_forgotten(connection: sa.Connection) -> None:
    announced = sa.exists().where(outbox.c.episode_id == episodes.c.episode_id)
    columns = [column for column in episodes.c if column.name in outbox.c]
    for row in connection.execute(sa.select(*columns).where(~announced)).all():
        announce(connection, **row._mapping)


def discard(catalog: Catalog, objects: ObjectStore, keys: list[str]) -> int:
    """Delete stored objects that the catalog has no row of; returns how many.

    Raises:
        ConfigError: one of them has a row, or is no object of an episode; nothing was deleted.
    """
    lacking = {item.key for item in unrecorded(catalog, objects)}
    if wrong := sorted(set(keys) - lacking):
        raise ConfigError(
            f"{wrong[0]} is not an object that the catalog lacks", "name keys that `lwd data recover` has left"
        )
    for key in set(keys):
        objects.delete(key)
    return len(set(keys))


def _commit(ingest: Ingest, claims: list[Claim], done: Recovery) -> None:
    for claim, conflict in zip(claims, ingest.record(claims), strict=True):
        if conflict is None:
            done.by_robot[claim.robot_id] += 1
        else:
            done.conflicts.append(episode_key(claim.sha256))
            log.warning("%s", conflict.problem)
    crashpoint("recover.committed")


def _claim(objects: ObjectStore, item: ObjectInfo, done: Recovery) -> Claim | None:
    """What the object says of itself; None, and the reason in `done`, where it is no whole episode."""
    try:
        if item.size > MAX_OBJECT_BYTES:
            raise CorruptDataError(f"{item.size} bytes are more than an episode may have", "look at it")
        data = objects.get(item.key)
        sha256 = hashlib.sha256(data).hexdigest()
        if item.key != episode_key(sha256):
            raise CorruptDataError(f"holds other bytes than its name says: sha256 {sha256}", "look at it")
        episode = _decoded(data, item.key)
        meta = {"schema_version": episode.schema_version, "produced_at": _produced_at(episode)}
        return Claim.read(episode.robot_id, episode.episode_id, sha256, len(data), meta)
    except (CorruptDataError, ConfigError, UnreadableError) as error:
        done.left.append((item.key, error.problem))
        return None


def _decoded(data: bytes, key: str) -> Episode:
    try:
        return decode(data, name=key)
    except LwdError:
        raise
    except Exception as error:  # whatever bytes can do to a reader: one object must not stop the others
        raise CorruptDataError(
            f"cannot be read as an episode: {type(error).__name__}: {error}", "look at it"
        ) from error


def _produced_at(episode: Episode) -> float | None:
    """When the episode ended, by its robot's clock, where it says a time that a claim may have."""
    try:
        at = float(episode.started_at) + float(episode.timestamps[-1])
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return at if is_time(at) else None
