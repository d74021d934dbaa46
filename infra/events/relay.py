"""The relay: from the outbox to Kafka, each entry at least once, one robot's entries in the order of their commits.

An entry is marked as sent after every broker that must have it has acknowledged it, in the transaction that kept other
relays from it. Killed between the two it is sent twice, which the coordinator absorbs; a broker that is away leaves the
outbox growing, which drains when it is back.

    python -m infra.events.relay --home runs/fleet
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from kafka import KafkaProducer

from infra.catalog import Catalog, dialect
from infra.catalog.schema import outbox
from infra.crashpoints import crashpoint
from infra.errors import ConfigError, LwdError
from infra.events import broker, message
from infra.plane import open_catalog
from infra.process import backoff, log_to, process_arguments, run_process
from infra.settings import load_settings
from infra.telemetry import metrics, milestones, tracing

log = logging.getLogger(__name__)
IDLE_S = 0.05  # longest pause between looks at an empty outbox: what an episode waits for here, at most
DELIVERY_MS = broker.ANSWER_MS + 1000
_RETRY_S = 2.0


class Relay:
    """Publishes outbox entries. Any number may run at once; only a single one keeps each robot's order.

    Args:
        catalog: whose outbox.
        bootstrap: `host:port`, comma-separated.
        topic: of the log; it must exist.
        options: of kafka-python: TLS, SASL, time-outs.
        batch: most entries in one transaction.
    """

    def __init__(
        self, catalog: Catalog, bootstrap: str, topic: str, options: Mapping[str, Any], *, batch: int = 200
    ) -> None:
        self._catalog = catalog
        self._bootstrap = bootstrap
        self._topic = topic
        self._options = options
        self._batch = batch
        self._producer: Any = None

    def step(self) -> int:
        """Publish and mark one batch; returns how many entries it held, 0 when there were none.

        Raises:
            ConfigError: there is no such topic, or the broker refuses this client.
            UnavailableError: broker or catalog do not answer; nothing was marked, call again later.
        """
        producer = self._connected()
        unsent = sa.select(outbox).where(outbox.c.sent_at.is_(None)).order_by(outbox.c.seq).limit(self._batch)
        began = time.time()
        with self._catalog.begin_rows() as connection:
            rows = connection.execute(unsent.with_for_update(skip_locked=True)).all()
            if not rows:
                return 0
            self._publish(producer, rows)
            crashpoint("relay.produced")
            sent = outbox.c.seq.in_([row.seq for row in rows])
            connection.execute(outbox.update().where(sent).values(sent_at=dialect.now(connection)))
            crashpoint("relay.marked")
        crashpoint("relay.committed")
        milestones.relayed(rows, [row.created_at for row in rows], began)
        log.info("published", extra={"fields": {"entries": len(rows), "last": rows[-1].seq}})
        return len(rows)

    def run(self, stop: threading.Event, poll_s: float = IDLE_S) -> None:
        """Step until `stop` is set. Waits out servers that are away, and says so once per outage."""
        failures, said = 0, ""
        while not stop.is_set():
            try:
                handled = self.step()
            except LwdError as error:
                failures += 1
                metrics.RELAY_FAILURES.inc()
                if type(error).__name__ != said:
                    log.warning("will try again: %s", error.problem)
                    said = type(error).__name__
                stop.wait(backoff(failures, cap_s=_RETRY_S))
                continue
            if failures:
                log.warning("goes on after %d failed tries", failures)
                failures, said = 0, ""
            if handled == 0:
                stop.wait(min(poll_s, IDLE_S))
        self.close()

    def close(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(Exception):
                producer.close(timeout=1)

    def _connected(self) -> Any:
        if self._producer is None:
            admin = broker.Admin(self._bootstrap, self._options)
            try:
                admin.describe(self._topic)  # a producer would wait for a topic that is not there
            finally:
                admin.close()
            self._producer = broker.connect(
                KafkaProducer,
                self._bootstrap,
                self._options,
                acks="all",
                enable_idempotence=True,
                allow_auto_create_topics=False,
                key_serializer=None,
                value_serializer=None,
                linger_ms=5,  # for the batch's records to share requests; flush() ends it
                max_block_ms=broker.ANSWER_MS,
                delivery_timeout_ms=DELIVERY_MS,
            )
        return self._producer

    def _publish(self, producer: Any, rows: Sequence[sa.Row[Any]]) -> None:
        """Send the entries and wait until each is acknowledged."""
        try:
            with broker.explained(self._bootstrap, self._topic):
                pending = []
                for row in rows:
                    value, headers = message.encode(row)
                    key = row.robot_id.encode()  # one robot, one partition: its episodes keep their order
                    pending.append(producer.send(self._topic, key=key, value=value, headers=headers))
                producer.flush(timeout=DELIVERY_MS / 1000 + 1)
                for acknowledged in pending:
                    acknowledged.get(timeout=1)
        except LwdError:
            self.close()  # what it still holds is sent again from the outbox, by another
            raise
        broker.answered()


def _serve(options: argparse.Namespace, stop: threading.Event) -> None:
    settings = load_settings(home=options.home)
    log_to(settings.logs_dir, "relay")
    metrics.serve(settings, "relay")
    tracing.start("relay")
    if settings.profile == "local" or settings.kafka_bootstrap is None:
        raise ConfigError(
            f"the outbox of {settings.home} is itself the log: there is nothing to relay",
            "set profile to fleet and kafka_bootstrap, or start no relay",
        )
    catalog = open_catalog(settings, stop=stop)
    relay = Relay(catalog, settings.kafka_bootstrap, settings.kafka_topic, settings.kafka_options)
    relay.run(stop, settings.poll_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m infra.events.relay`: run until SIGTERM; exit code of the error otherwise."""
    parser = process_arguments("infra.events.relay", "Publish the outbox to Kafka.")
    options = parser.parse_args(arguments)
    return run_process(options, lambda stop: _serve(options, stop))


if __name__ == "__main__":
    sys.exit(main())
