"""The log of a fleet home in tests: writing to it what nobody should, reading what it holds, draining it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from invariants import Plane, open_plane
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.structs import TopicPartition

from infra.catalog.schema import dead_letters, outbox, quarantine
from infra.coordinator import Coordinator
from infra.episode import Episode
from infra.events import EventLog, stored_offsets
from infra.events.kafka import KafkaLog
from infra.events.relay import Relay
from infra.settings import load_settings

PARTITIONS = range(4)  # of the topic that `fleet_home` makes


def accept(episode: Episode) -> Sequence[Any]:
    return []


def open_log(home: Path, **options: object) -> KafkaLog:
    settings = load_settings(home=home)
    return KafkaLog(open_plane(home).catalog, settings.kafka_bootstrap or "", settings.kafka_topic, options)


def open_relay(home: Path, **options: Any) -> Relay:
    settings = load_settings(home=home)
    return Relay(open_plane(home).catalog, settings.kafka_bootstrap or "", settings.kafka_topic, {}, **options)


@contextmanager
def closing(*things: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for thing in things:
            thing.close()


def relay_all(home: Path) -> int:
    """Publish the whole outbox; how many entries that were."""
    relay, count = open_relay(home), 0
    with closing(relay):
        while handled := relay.step():
            count += handled
    return count


def coordinator(
    home: Path, log: EventLog, check: Callable[[Episode], Sequence[Any]] = accept, **options: Any
) -> Coordinator:
    plane = open_plane(home)
    return Coordinator(plane.catalog, plane.objects, log, check, **{"holder": f"test:{os.getpid()}", **options})


def drain(home: Path, check: Callable[[Episode], Sequence[Any]] = accept, **options: Any) -> int:
    """Settle everything that the log holds; the number of records."""
    log, count = open_log(home), 0
    worker = coordinator(home, log, check, **options)
    with closing(log):
        while log.lag("coordinator"):
            count += worker.step()
    worker.lease.release()
    return count


@contextmanager
def producing(home: Path) -> Iterator[Callable[..., None]]:
    """A function that appends a record: `(value, partition, key=…)`."""
    settings = load_settings(home=home)
    producer = KafkaProducer(bootstrap_servers=settings.kafka_bootstrap, acks="all")
    pending = []

    def send(value: bytes | None, partition: int | None = None, key: bytes | None = b"k") -> None:
        pending.append(producer.send(settings.kafka_topic, value=value, key=key, partition=partition))

    try:
        yield send
        producer.flush(30)
        for future in pending:
            future.get(30)
    finally:
        producer.close(5)


def records(home: Path) -> list[Any]:
    """Every record of the topic."""
    settings = load_settings(home=home)
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap, auto_offset_reset="earliest")
    try:
        places = [TopicPartition(settings.kafka_topic, partition) for partition in PARTITIONS]
        consumer.assign(places)
        wanted = sum(consumer.end_offsets(places).values()) - sum(consumer.beginning_offsets(places).values())
        found: list[Any] = []
        while len(found) < wanted:
            found += [record for batch in consumer.poll(1000).values() for record in batch]
        return found
    finally:
        consumer.close()


@contextmanager
def admin(home: Path) -> Iterator[Any]:
    client = KafkaAdminClient(bootstrap_servers=load_settings(home=home).kafka_bootstrap)
    try:
        yield client
    finally:
        client.close()


def outbox_rows(plane: Plane) -> list[sa.Row[Any]]:
    with plane.catalog.read() as connection:
        return list(connection.execute(sa.select(outbox).order_by(outbox.c.seq)))


def unsent(plane: Plane) -> int:
    return sum(row.sent_at is None for row in outbox_rows(plane))


def letters(plane: Plane) -> list[sa.Row[Any]]:
    with plane.catalog.read() as connection:
        return list(connection.execute(sa.select(dead_letters)))


def held(plane: Plane) -> dict[str, list[tuple[str, str]]]:
    """id -> (sha256, stage) of what is in quarantine."""
    with plane.catalog.read() as connection:
        rows = list(connection.execute(sa.select(quarantine)))
    return {row.episode_id: [(r.sha256, r.stage) for r in rows if r.episode_id == row.episode_id] for row in rows}


def members(plane: Plane) -> set[int]:
    return {int(m.episode_id, 16) for m in plane.snapshots.episodes(plane.snapshots.latest().version)}


def positions(plane: Plane, consumer: str = "coordinator") -> dict[int, int]:
    with plane.catalog.read() as connection:
        return stored_offsets(connection, consumer)
