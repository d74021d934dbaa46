"""The coordinator: from the log of committed episodes to snapshots and quarantine, each exactly once.

One process holds the lease. In one transaction it inserts the accepted episodes into the next snapshot, puts the
refused ones into quarantine, advances the stored offsets and proves its lease: after a crash anywhere the same events
are read again and nothing happens twice. What is accepted is decided by `infra.examine`, by revocations, and by the
share of a snapshot that one robot may make up.

    python -m infra.coordinator --home runs/local --check data_contracts.checks:default_check
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.leases import Lease
from infra.catalog.schema import dead_letters, episodes, quarantine, revocations, snapshot_episodes
from infra.crashpoints import crashpoint
from infra.errors import LeaseLostError, LwdError
from infra.events import DeadLetter, Event, EventLog, store_offsets
from infra.events.outbox import OutboxLog
from infra.examine import BatchCheck, Check, Examiner, Verdict
from infra.objects import ObjectStore
from infra.plane import open_catalog, open_events, open_objects
from infra.process import backoff, load_callable, log_to, patiently, process_arguments, run_process
from infra.settings import load_settings
from infra.snapshots import Snapshot, append, current
from infra.telemetry import metrics, milestones, tracing
from infra.telemetry.catalog_metrics import CatalogMetrics, times_of

log = logging.getLogger(__name__)
CONSUMER = "coordinator"
INFLUENCE_FROM = 100  # episodes of a snapshot from which on one robot's share is limited


class Coordinator:
    """Turns events into snapshots.

    Args:
        catalog, objects, events: the data plane.
        check: the data contract for one episode.
        batch_check: for the accepted episodes of one micro-batch together: violations by episode id.
        micro_batch: most events in one snapshot.
        lease_s: how long another coordinator waits for this one after its last sign of life, seconds.
        fetch_retries: tries to read an object before it is asked for again from its spool.
        influence_max: largest share of a snapshot that one robot may make up, once it has 100 episodes; an episode
            above it goes to quarantine, from where it can be released later. 1: no limit.
        influence_robots: robots in a snapshot from which on that counts: of a few, one may well do most of the work.
        sleep: replaced in tests.
    """

    def __init__(
        self,
        catalog: Catalog,
        objects: ObjectStore,
        events: EventLog,
        check: Check,
        *,
        batch_check: BatchCheck | None = None,
        micro_batch: int = 8,
        lease_s: float = 10.0,
        fetch_retries: int = 5,
        influence_max: float = 1.0,
        influence_robots: int = 1,
        holder: str | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._catalog = catalog
        self._events = events
        self._examiner = Examiner(objects, check, batch_check=batch_check, fetch_retries=fetch_retries, sleep=sleep)
        self._micro_batch = micro_batch
        self._influence_max, self._influence_robots = influence_max, influence_robots
        self._members: tuple[Snapshot, dict[str, int]] | None = None  # of that snapshot, by robot
        self._counted: dict[str, int] = {}
        self.lease = Lease(catalog, CONSUMER, lease_s, holder)
        self._renew_at = 0.0
        self._gauges = CatalogMetrics(catalog, relayed=events.name != OutboxLog.name, lag=lambda: events.lag(CONSUMER))

    def step(self) -> int:
        """Handle one micro-batch; returns the number of events it settled, 0 when there were none.

        Raises:
            LeaseLostError: another coordinator is at work; nothing was written.
            UnavailableError, StorageFullError: nothing was written; call again later.
        """
        if time.monotonic() >= self._renew_at:
            self.lease.acquire()
            self._renew_at = time.monotonic() + self.lease.seconds / 3
        records = self._events.poll(CONSUMER, self._micro_batch)
        if not records:
            return 0
        began = time.time()
        events = [record for record in records if isinstance(record, Event)]
        dead = [record for record in records if isinstance(record, DeadLetter)]
        settled = self._settled(events)
        fresh = {event.episode_id: event for event in events if _name(event) not in settled}  # each once
        verdicts = self._examiner.examine(list(fresh.values()))
        crashpoint("coordinator.examined")
        with self._catalog.begin() as connection:
            self.lease.guard(connection)
            self._bury(connection, dead)
            snapshot = self._commit(connection, verdicts)
            crashpoint("coordinator.episodes_settled")
            store_offsets(connection, CONSUMER, _last(records))
            crashpoint("coordinator.offsets_stored")
        crashpoint("coordinator.committed")
        self._renew_at = time.monotonic() + self.lease.seconds / 3
        fields = {"snapshot": snapshot.version, "episodes": snapshot.episodes, "events": len(events)}
        log.info("committed", extra={"fields": fields})
        self._show(events, verdicts, snapshot, began)
        return len(records)

    def _show(self, events: Sequence[Event], verdicts: Sequence[Verdict], snapshot: Snapshot, began: float) -> None:
        """The micro-batch, as metrics and traces."""
        if milestones.on():
            times, _ = times_of(self._catalog, [verdict.event.episode_id for verdict in verdicts])
            milestones.settled(verdicts, len(events) - len(verdicts), times, snapshot.version, began)

    def run(self, stop: threading.Event, poll_s: float = 0.2) -> None:
        """Step until `stop` is set, then give the lease back. Waits out servers that are away.

        Raises:
            LeaseLostError: another coordinator took over.
        """
        failures = 0
        try:
            while not stop.is_set():
                try:
                    handled = self.step()
                    self._gauges.refresh()
                    failures = 0
                except LeaseLostError:
                    raise
                except LwdError as error:
                    failures += 1
                    metrics.COORDINATOR_RETRIES.inc()
                    log.warning("will try again: %s", error.problem)
                    stop.wait(backoff(failures))
                    continue
                if handled == 0:
                    stop.wait(poll_s)
        finally:
            self._events.close()  # whoever has the lease next needs the log's partitions
            self._gauges.stand_down()
            try:
                self.lease.release()
            except LwdError as error:
                log.warning("the lease was not released: %s", error.problem)

    def _settled(self, events: Sequence[Event]) -> set[tuple[str, str]]:
        """(id, sha256) of the events that need no look: accepted or refused before, or announced in error."""
        ids = sorted({event.episode_id for event in events})
        with self._catalog.read() as connection:
            known = connection.execute(sa.select(episodes).where(episodes.c.episode_id.in_(ids)))
            committed = {(row.episode_id, row.sha256) for row in known}
            seen = connection.execute(
                sa.select(snapshot_episodes.c.episode_id, episodes.c.sha256)
                .join(episodes, episodes.c.episode_id == snapshot_episodes.c.episode_id)
                .where(snapshot_episodes.c.episode_id.in_(ids))
            )
            done = {(row.episode_id, row.sha256) for row in seen}
            held = connection.execute(sa.select(quarantine).where(quarantine.c.episode_id.in_(ids)))
            done |= {(row.episode_id, row.sha256) for row in held}
        return {_name(event) for event in events if _name(event) in done or _name(event) not in committed}

    def _bury(self, connection: sa.Connection, letters: Sequence[DeadLetter]) -> None:
        for letter in letters:
            log.error("dead letter %s/%d@%d: %s", self._events.name, letter.partition, letter.offset, letter.reason)
            values = {
                "log": self._events.name,
                "partition": letter.partition,
                "position": letter.offset,
                "payload": letter.payload,
                "reason": letter.reason,
                "created_at": dialect.now(connection),
            }
            dialect.insert_if_absent(connection, dead_letters, values)

    def _commit(self, connection: sa.Connection, verdicts: Sequence[Verdict]) -> Snapshot:
        self._refuse_revoked(connection, verdicts)
        self._refuse_influence(connection, verdicts)
        for verdict in verdicts:
            if not verdict.accepted:
                event = verdict.event
                values = {
                    "episode_id": event.episode_id,
                    "sha256": event.sha256,
                    "robot_id": event.robot_id,
                    "key": event.key,
                    "stage": verdict.stage,
                    "reasons": verdict.reasons,
                    "created_at": dialect.now(connection),
                }
                dialect.insert_if_absent(connection, quarantine, values)
                log.warning("quarantined %s: %s", event.episode_id, verdict.reasons)
        crashpoint("coordinator.quarantined")
        added = [verdict.row() for verdict in verdicts if verdict.accepted]
        made = append(connection, added=added, reason="episodes", writer=f"{self.lease.holder}#{self.lease.token}")
        self._members = (made, self._counted)  # counted again where this is not what becomes the current snapshot
        return made

    def _refuse_revoked(self, connection: sa.Connection, verdicts: Sequence[Verdict]) -> None:
        rules = list(connection.execute(sa.select(revocations)))
        if not rules:
            return
        for verdict in verdicts:
            query = sa.select(episodes).where(episodes.c.episode_id == verdict.event.episode_id)
            row = connection.execute(query).one()
            for rule in rules:
                times = (row.produced_at, row.committed_at)
                if rule.robot_id == row.robot_id and any(rule.since <= at <= rule.until for at in times):
                    verdict.refuse("revoked", "revocation", f"{rule.robot_id} was revoked: {rule.reason}")

    def _refuse_influence(self, connection: sa.Connection, verdicts: Sequence[Verdict]) -> None:
        if self._influence_max >= 1.0:
            return
        snapshot = current(connection)
        if self._members is None or self._members[0] != snapshot:
            self._members = (snapshot, _members_of(connection))
        total, of_robot = snapshot.episodes, dict(self._members[1])
        self._counted = of_robot  # becomes `_members` with the snapshot that this batch makes
        few = len(of_robot.keys() | {verdict.event.robot_id for verdict in verdicts}) < self._influence_robots
        for verdict in verdicts:
            if not verdict.accepted:
                continue
            robot = verdict.event.robot_id
            mine = of_robot.get(robot, 0) + 1
            if total >= INFLUENCE_FROM and not few and mine > self._influence_max * (total + 1):
                share = f"{mine} of {total + 1} episodes"
                verdict.refuse("influence", "share", f"{robot} would make up {share}, above {self._influence_max:.0%}")
            else:
                of_robot[robot], total = mine, total + 1


def _members_of(connection: sa.Connection) -> dict[str, int]:
    """How many episodes of the current snapshot are each robot's. Looks at all of them."""
    query = (
        sa.select(episodes.c.robot_id, sa.func.count())
        .join(snapshot_episodes, snapshot_episodes.c.episode_id == episodes.c.episode_id)
        .where(snapshot_episodes.c.removed.is_(None))
        .group_by(episodes.c.robot_id)
    )
    return {robot: int(count) for robot, count in connection.execute(query)}


def _name(event: Event) -> tuple[str, str]:
    return event.episode_id, event.sha256


def _last(events: Iterable[Event | DeadLetter]) -> dict[int, int]:
    positions: dict[int, int] = {}
    for event in events:
        positions[event.partition] = max(event.offset, positions.get(event.partition, 0))
    return positions


def _serve(options: argparse.Namespace, stop: threading.Event) -> None:
    settings = load_settings(home=options.home)
    log_to(settings.logs_dir, "coordinator")
    metrics.serve(settings, "coordinator")
    tracing.start("coordinator")
    catalog = open_catalog(settings, migrate=True, stop=stop)
    crashpoint("coordinator.started")
    check, objects = load_callable(options.check), patiently(lambda: open_objects(settings), stop)
    with closing(patiently(lambda: open_events(settings, catalog), stop)) as events:
        coordinator = Coordinator(
            catalog,
            objects,
            events,
            check,
            batch_check=load_callable(options.batch_check) if options.batch_check else None,
            micro_batch=settings.micro_batch,
            lease_s=settings.lease_s,
            fetch_retries=settings.fetch_retries,
            influence_max=settings.influence_max,
            influence_robots=settings.influence_robots,
        )
        while not stop.is_set():
            try:
                coordinator.run(stop, settings.poll_s)
            except LeaseLostError:
                if not options.standby:
                    raise
                stop.wait(settings.lease_s / 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m infra.coordinator`: run until SIGTERM; exit code of the error otherwise."""
    parser = process_arguments("infra.coordinator", "Commit episodes to snapshots.")
    parser.add_argument("--check", required=True, help="module:function, the data contract for one episode")
    parser.add_argument("--batch-check", help="module:function, for the accepted episodes of a micro-batch")
    parser.add_argument("--standby", action="store_true", help="wait for the lease instead of ending")
    options = parser.parse_args(arguments)
    return run_process(options, lambda stop: _serve(options, stop))


if __name__ == "__main__":
    sys.exit(main())
