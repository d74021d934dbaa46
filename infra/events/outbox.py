"""The catalog's outbox table as the log itself: the log of the local profile, nothing to install and nothing to run."""

from __future__ import annotations

import sqlalchemy as sa

from infra.catalog import Catalog
from infra.catalog.schema import outbox
from infra.events import DeadLetter, Event, stored_offsets


class OutboxLog:
    """The catalog's outbox table as the log itself: written by ingest's transaction, read with stored offsets."""

    name = "outbox"

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def poll(self, consumer: str, max_events: int) -> list[Event | DeadLetter]:
        with self._catalog.read() as connection:
            position = stored_offsets(connection, consumer).get(0, 0)
            query = sa.select(outbox).where(outbox.c.seq > position).order_by(outbox.c.seq).limit(max_events)
            return [_event(row) for row in connection.execute(query)]

    def lag(self, consumer: str) -> int:
        with self._catalog.read() as connection:
            position = stored_offsets(connection, consumer).get(0, 0)
            query = sa.select(sa.func.count()).select_from(outbox).where(outbox.c.seq > position)
            return int(connection.execute(query).scalar_one())

    def close(self) -> None:
        """Nothing to close: the catalog is its owner's."""


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
