"""The log of committed episodes. An event is a claim check: where the object is and what it must be; not its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.schema import consumer_offsets, outbox


@dataclass(frozen=True)
class Event:
    """One committed episode, announced.

    Attributes:
        offset: place in its partition; increases, with holes.
        partition: 0 where the log has one.
    """

    offset: int
    episode_id: str
    robot_id: str
    key: str
    sha256: str
    size: int
    schema_version: int
    trace_id: str
    partition: int = 0


class EventLog(Protocol):
    """An ordered log read at least once; Kafka comes as another class with this method."""

    def poll(self, consumer: str, max_events: int) -> list[Event]:
        """Up to `max_events` events after the consumer's stored offsets, in order within each partition.

        Reading moves nothing: `store_offsets` does, in the transaction that commits the events' effects.
        """


class OutboxLog:
    """The catalog's outbox table as the log itself: written by ingest's transaction, read with stored offsets."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def poll(self, consumer: str, max_events: int) -> list[Event]:
        with self._catalog.read() as connection:
            position = stored_offsets(connection, consumer).get(0, 0)
            query = sa.select(outbox).where(outbox.c.seq > position).order_by(outbox.c.seq).limit(max_events)
            return [_event(row) for row in connection.execute(query)]


def announce(
    connection: sa.Connection,
    *,
    episode_id: str,
    robot_id: str,
    key: str,
    sha256: str,
    size: int,
    schema_version: int,
    trace_id: str,
) -> None:
    """Append to the outbox, in the transaction that commits the episode."""
    connection.execute(
        outbox.insert().values(
            episode_id=episode_id,
            robot_id=robot_id,
            key=key,
            sha256=sha256,
            size=size,
            schema_version=schema_version,
            trace_id=trace_id,
            created_at=dialect.now(connection),
        )
    )


def stored_offsets(connection: sa.Connection, consumer: str) -> dict[int, int]:
    """Per partition, the last offset whose effects are committed."""
    rows = connection.execute(sa.select(consumer_offsets).where(consumer_offsets.c.consumer == consumer))
    return {row.partition: row.position for row in rows}


def store_offsets(connection: sa.Connection, consumer: str, positions: Mapping[int, int]) -> None:
    """Advance the consumer's offsets; one that would go back stays."""
    current = stored_offsets(connection, consumer)
    for partition, position in positions.items():
        if position > current.get(partition, 0):
            values = {"consumer": consumer, "partition": partition, "position": position}
            dialect.upsert(connection, consumer_offsets, values)


def _event(row: sa.Row[tuple[object, ...]]) -> Event:
    return Event(
        offset=row.seq,
        episode_id=row.episode_id,
        robot_id=row.robot_id,
        key=row.key,
        sha256=row.sha256,
        size=row.size,
        schema_version=row.schema_version,
        trace_id=row.trace_id,
    )
