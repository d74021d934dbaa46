"""Kafka as the log. The offsets that count are the catalog's, moved by the transaction that commits the events'
effects; those that Kafka keeps for the group are a copy for dashboards, written later.

One consumer reads in a group of its own name, which it joins at its first poll and not before: who only waits for a
lease takes no partitions. Whatever happens to the group (a rebalance, a pause longer than it allows, a broker that was
away), reading goes on from the catalog's offsets, so that nothing is passed over and what is read twice is known.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from kafka import ConsumerRebalanceListener, KafkaConsumer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import OffsetOutOfRangeError
from kafka.structs import MemberState, OffsetAndMetadata, TopicPartition

from infra.catalog import Catalog, dialect
from infra.catalog.schema import consumer_offsets
from infra.errors import LwdError, UnavailableError
from infra.events import DeadLetter, Event, broker, message, reset_offsets, stored_offsets

log = logging.getLogger(__name__)
WAIT_S = 0.2  # for a record, in one poll
REREAD_S = 1.0  # the same after a rebalance, or after moving back to what was read before
JOIN_S = 3.0  # for the group to agree on who reads what
PROBE_S = 5.0  # without a record, until the broker is asked whether it is there and still has the log
COPY_S = 5.0  # between copies of the catalog's offsets to Kafka
_DEFAULTS = {
    "session_timeout_ms": 6000,  # how long a killed member keeps its partitions: the least that brokers allow
    "heartbeat_interval_ms": 500,  # how soon a member learns of another, who waits for it
    "max_poll_interval_ms": 30_000,
    "fetch_max_wait_ms": 200,  # what a move back waits for
}


class KafkaLog:
    """A topic as the log, read by consumers whose offsets are in the catalog.

    Args:
        catalog: where the offsets are.
        bootstrap: `host:port`, comma-separated.
        topic: of the log; it must exist (`broker.create_topic`).
        options: of kafka-python: TLS, SASL, time-outs.
    """

    def __init__(self, catalog: Catalog, bootstrap: str, topic: str, options: Mapping[str, Any]) -> None:
        self.name = topic
        self._catalog = catalog
        self._bootstrap = bootstrap
        self._options = {**_DEFAULTS, **options}
        self._admin = broker.Admin(bootstrap, self._options)
        self._members: dict[str, _Member] = {}
        self._lock = threading.Lock()

    def poll(self, consumer: str, max_events: int) -> list[Event | DeadLetter]:
        """As EventLog says. Waits up to 0.2 s for a record; while the group changes, up to 3 s.

        Raises:
            ConfigError: there is no such topic, or the broker refuses this client.
            UnavailableError: the broker does not answer, or the catalog.
        """
        with self._lock:
            try:
                if consumer not in self._members:
                    self._members[consumer] = self._join(consumer)
                return self._members[consumer].poll(max_events)
            except LwdError:  # a new member starts from the catalog's offsets, whatever this one believed
                if consumer in self._members:
                    self._members.pop(consumer).close()
                raise

    def lag(self, consumer: str) -> int:
        topic = self._admin.describe(self.name)
        bounds = self._admin.bounds(self.name, topic.partitions)
        with self._catalog.read() as connection:
            stored = stored_offsets(connection, consumer) if _follows(connection, consumer, topic) else {}
        lags = 0
        for partition, (first, end) in bounds.items():
            settled = stored.get(partition, 0)
            lags += end - (settled if first <= settled <= end else first)
        return lags

    def close(self) -> None:
        """Leave the groups at once, so that whoever comes next need not wait for this process's time-out."""
        with self._lock:
            for consumer in list(self._members):
                self._members.pop(consumer).close()
            self._admin.close()

    def _join(self, consumer: str) -> _Member:
        topic = self._admin.describe(self.name)
        _follow(self._catalog, consumer, topic)
        return _Member(self._catalog, self._bootstrap, topic, consumer, self._options, self._admin)


class _Member(ConsumerRebalanceListener):
    """One consumer's place in its group."""

    def __init__(
        self,
        catalog: Catalog,
        bootstrap: str,
        topic: broker.Topic,
        consumer: str,
        options: Mapping[str, Any],
        admin: broker.Admin,
    ) -> None:
        self._catalog = catalog
        self._bootstrap = bootstrap
        self._topic = topic
        self._consumer = consumer
        self._admin = admin
        self._stored: dict[int, int] = {}
        self._floor: dict[int, int] = {}  # the first offset that the broker still has, where it deleted what is older
        self._next: dict[int, int] = {}  # per partition of this member, the offset that Kafka's client returns next
        self._rebalanced = False
        self._heard_at = time.monotonic()
        self._copied: dict[int, int] = {}
        self._copied_at = time.monotonic()
        self._kafka = broker.connect(
            KafkaConsumer,
            bootstrap,
            options,
            group_id=f"lwd-{topic.name}-{consumer}",
            enable_auto_commit=False,
            auto_offset_reset="none",  # an offset that the log does not have is an error, never a silent jump
            allow_auto_create_topics=False,
            key_deserializer=None,
            value_deserializer=None,
            partition_assignment_strategy=(CooperativeStickyAssignor,),
        )
        self._kafka.subscribe([topic.name], listener=self)

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Called by the client library inside poll(), on its I/O thread: nothing here may wait."""
        self._rebalanced = True
        for place in assigned:
            self._seek(place.partition)

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """As above; also when they were lost by a pause."""
        for place in revoked:
            self._next.pop(place.partition, None)

    def poll(self, max_events: int) -> list[Event | DeadLetter]:
        with self._catalog.read() as connection:
            self._stored = stored_offsets(connection, self._consumer)
        with broker.explained(self._bootstrap, self._topic.name):
            self._copy_offsets()
            behind = [partition for partition, at in self._next.items() if at != self._start(partition)]
            for partition in behind:
                self._seek(partition)
            try:
                found = self._read(max_events, REREAD_S if behind else WAIT_S)
            except OffsetOutOfRangeError:
                found = {}
                self._probe()
            if self._rebalanced or (not found and time.monotonic() > self._heard_at + PROBE_S):
                self._rebalanced = False
                if self._probe():
                    found = {}  # of a place that is not the one to read from
        events: list[Event | DeadLetter] = []
        for place, records in found.items():
            if place.partition in self._next:  # still this member's
                self._next[place.partition] = records[-1].offset + 1
                events += [message.read(record.value, record.offset + 1, place.partition) for record in records]
        if events:
            self._heard_at = time.monotonic()
        return events

    def close(self) -> None:
        with suppress(Exception):
            self._copy_offsets(wait=True)
        with suppress(Exception):
            self._kafka.close(autocommit=False, timeout_ms=1000)

    def _read(self, max_events: int, wait_s: float) -> dict[TopicPartition, list[Any]]:
        found: dict[TopicPartition, list[Any]] = {}
        until = time.monotonic() + JOIN_S
        while not found and self._kafka.group_metadata().state != MemberState.STABLE and time.monotonic() < until:
            # The client library forgets a rebalance that ends between two calls and asks for another: wait for it here.
            found = self._kafka.poll(timeout_ms=int(REREAD_S * 1000), max_records=max_events)
        return found or self._kafka.poll(timeout_ms=int(wait_s * 1000), max_records=max_events)

    def _start(self, partition: int) -> int:
        """The offset to read from. Positions count from 1: that of the last one settled is Kafka's next."""
        return max(self._stored.get(partition, 0), self._floor.get(partition, 0))

    def _seek(self, partition: int) -> None:
        self._next[partition] = self._start(partition)
        self._kafka.seek(TopicPartition(self._topic.name, partition), self._next[partition])

    def _probe(self) -> bool:
        """Ask the broker what it has, and move to where reading can go on; whether anything moved.

        Raises:
            UnavailableError: the broker does not answer, or has another topic of that name.
        """
        name = self._topic.name
        if self._admin.describe(name).identity != self._topic.identity:
            raise UnavailableError(f"topic {name} was made anew", "nothing to do: it is read from its beginning")
        moved = False
        for partition, (first, end) in self._admin.bounds(name, list(self._next)).items():
            stored = self._stored.get(partition, 0)
            if stored > end:
                log.warning(
                    "%s/%d was settled up to %d, but has %d records: the broker lost its log; read from the beginning",
                    name, partition, stored, end,
                )  # fmt: skip
                with self._catalog.begin() as connection:
                    reset_offsets(connection, self._consumer, partition)
                self._stored.pop(partition)
                self._floor[partition] = first
            elif first > self._start(partition):
                log.warning("%s/%d: the broker deleted up to %d, settled are %d", name, partition, first, stored)
                self._floor[partition] = first
            if not self._start(partition) <= self._next[partition] <= end:
                self._seek(partition)
                moved = True
        self._heard_at = time.monotonic()
        return moved

    def _copy_offsets(self, wait: bool = False) -> None:
        """Tell Kafka, for its own tools, what the catalog says."""
        mine = {partition: self._stored[partition] for partition in self._next if partition in self._stored}
        if not mine or mine == self._copied or (not wait and time.monotonic() < self._copied_at + COPY_S):
            return
        self._copied, self._copied_at = mine, time.monotonic()
        places = {TopicPartition(self._topic.name, p): OffsetAndMetadata(at, "", -1) for p, at in mine.items()}
        if wait:
            self._kafka.commit(places, timeout_ms=1000)
        else:
            self._kafka.commit_async(places)


def _follow(catalog: Catalog, consumer: str, topic: broker.Topic) -> None:
    """Bind the consumer's offsets to this topic; those that it had in another one of the name are forgotten."""
    with catalog.read() as connection:
        if _follows(connection, consumer, topic):
            return
    with catalog.begin() as connection:
        if _follows(connection, consumer, topic):
            return
        for partition, position in stored_offsets(connection, consumer).items():
            log.warning(
                "%s/%d is not the log that was settled up to %d; read from the beginning",
                topic.name, partition, position,
            )  # fmt: skip
            reset_offsets(connection, consumer, partition)
        values = {"consumer": _binding(consumer), "partition": 0, "position": _number(topic)}
        dialect.upsert(connection, consumer_offsets, values)


def _follows(connection: sa.Connection, consumer: str, topic: broker.Topic) -> bool:
    """Whether the consumer's offsets are of this topic.

    By the offsets alone, a log that was lost and has grown past them since would look like the one that they are of. So
    the topic's identity is kept beside them, as the position of a consumer of its own.
    """
    return stored_offsets(connection, _binding(consumer)).get(0) == _number(topic)


def _binding(consumer: str) -> str:
    return f"{consumer}@topic"


def _number(topic: broker.Topic) -> int:
    return topic.identity.int >> 65  # the 63 bits that a position has
