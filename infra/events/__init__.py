"""The log of committed episodes. An event is a claim check: where the object is and what it must be; not its bytes.

Ingest's transaction writes events to the `outbox` table. In the local profile that table is itself the log (`outbox`);
in a fleet a relay (`relay`) publishes it to Kafka (`kafka`). Consumers keep their offsets in the catalog, in the
transaction that commits the events' effects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import sqlalchemy as sa

from infra.catalog import dialect, schema
from infra.catalog.schema import consumer_offsets


@dataclass(frozen=True)
class Event:
    """One committed episode, announced.

    Attributes:
        offset: place in its partition, from 1; increases, with holes.
        partition: 0 where the log has one.
        trace_id: W3C traceparent of the episode's way, or any text of up to 64 characters.
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


@dataclass(frozen=True)
class DeadLetter:
    """A record of the log that is no event: kept with its reason, so that the partition advances past it.

    Attributes:
        offset, partition: its place.
        payload: what it held, cut to 4 KiB, undecodable bytes escaped.
        reason: what is wrong with it.
    """

    offset: int
    partition: int
    payload: str
    reason: str


class EventLog(Protocol):
    """An ordered log read at least once."""

    name: str  # of the log, as recorded with its dead letters

    def poll(self, consumer: str, max_events: int) -> list[Event | DeadLetter]:
        """Up to `max_events` records after the consumer's stored offsets, in order within each partition.

        Reading moves nothing: `store_offsets` does, in the transaction that commits the events' effects.
        """

    def lag(self, consumer: str) -> int:
        """How many records the consumer has not settled yet."""

    def close(self) -> None: ...


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
        schema.outbox.insert().values(
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


def reset_offsets(connection: sa.Connection, consumer: str, partition: int) -> None:
    """Read a partition from its beginning again, after its log was lost; what is known already is absorbed."""
    key = (consumer_offsets.c.consumer == consumer) & (consumer_offsets.c.partition == partition)
    connection.execute(consumer_offsets.delete().where(key))
