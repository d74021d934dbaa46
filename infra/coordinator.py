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
from dataclasses import replace
from functools import partial

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.accounting import standings
from infra.catalog.leases import Lease
from infra.catalog.schema import dead_letters, episodes, quarantine, revocations, snapshot_episodes
from infra.crashpoints import crashpoint
from infra.errors import LeaseLostError, LwdError
from infra.events import DeadLetter, Event, EventLog, store_offsets
from infra.events.outbox import OutboxLog
from infra.examination import Examination, OwnProcess
from infra.examine import Examiner, Verdict
from infra.judge import BatchCheck, Check
from infra.objects import ObjectStore
from infra.plane import open_catalog, open_events, open_objects
from infra.process import backoff, log_to, patiently, process_arguments, run_process
from infra.settings import load_settings
from infra.snapshots import Snapshot, append, current
from infra.telemetry import metrics, milestones, tracing
from infra.telemetry.catalog_metrics import CatalogMetrics, times_of

log = logging.getLogger(__name__)
CONSUMER = "coordinator"
_CLAIM = ("robot_id", "key", "size", "schema_version", "trace_id")  # of an event, beside its name
INFLUENCE_FROM = 100  # episodes of a snapshot from which on one robot's share is limited


class Coordinator:
    """Turns events into snapshots.

    Args:
        catalog, objects, events: the data plane.
        check: the data contract for one episode; or who judges the bytes, in a process of its own.
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
        check: Check | Examination,
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
        fresh = self._fresh(events)
        with self.lease.kept():
            verdicts = self._examiner.examine(fresh)
        crashpoint("coordinator.examined")
        try:
            snapshot = self._settle(records, dead, verdicts)
        except LwdError:
            raise
        except Exception as error:  # a value that the database does not take: its episode's trouble, not the others'
            if not self._put_aside(verdicts, error):
                raise
            snapshot = self._settle(records, dead, verdicts)
        crashpoint("coordinator.committed")
        self._renew_at = time.monotonic() + self.lease.seconds / 3
        fields = {"snapshot": snapshot.version, "episodes": snapshot.episodes, "events": len(events)}
        log.info("committed", extra={"fields": fields})
        self._show(events, verdicts, snapshot, began)
        return len(records)

    def _settle(
        self, records: Sequence[Event | DeadLetter], dead: Sequence[DeadLetter], verdicts: Sequence[Verdict]
    ) -> Snapshot:
        """All effects of a micro-batch, in one transaction."""
        with self._catalog.begin() as connection:
            self.lease.guard(connection)
            self._bury(connection, dead)
            snapshot = self._commit(connection, verdicts)
            crashpoint("coordinator.episodes_settled")
            store_offsets(connection, CONSUMER, _last(records))
            crashpoint("coordinator.offsets_stored")
        return snapshot

    def _put_aside(self, verdicts: Sequence[Verdict], error: Exception) -> bool:
        """Refuse the episodes whose rows the database does not take, each tried alone; whether there were any."""
        log.error("a micro-batch was not written: %s", error)
        found = False
        for verdict in verdicts:
            if verdict.accepted and (wrong := self._trial(partial(self._append, accepted=[verdict]))):
                verdict.refuse("contract", "row", f"the catalog cannot keep it: {wrong}")
                found = True
            if not verdict.accepted and (wrong := self._trial(partial(_quarantine, verdict=verdict))):
                verdict.reasons = []
                verdict.refuse(verdict.stage, "reasons", f"the catalog cannot keep the reasons: {wrong}")
                found = True
        return found

    def _trial(self, work: Callable[[sa.Connection], object]) -> str | None:
        """What the database says against `work`, which is undone; None if nothing."""
        try:
            with self._catalog.begin() as connection:
                work(connection)
                raise _UndoneError
        except _UndoneError:
            return None
        except LwdError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _show(self, events: Sequence[Event], verdicts: Sequence[Verdict], snapshot: Snapshot, began: float) -> None:
        """The micro-batch, as metrics and traces; what they make of odd values must not stop the work."""
        try:
            if milestones.on():
                times, _ = times_of(self._catalog, [verdict.event.episode_id for verdict in verdicts])
                milestones.settled(verdicts, len(events) - len(verdicts), times, snapshot.version, began)
        except LwdError:
            raise
        except Exception:
            log.exception("metrics of snapshot %d", snapshot.version)

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
            self._examiner.close()
            self._events.close()  # whoever has the lease next needs the log's partitions
            self._gauges.stand_down()
            try:
                self.lease.release()
            except LwdError as error:
                log.warning("the lease was not released: %s", error.problem)

    def _fresh(self, events: Sequence[Event]) -> list[Event]:
        """The events that need a look, each once: neither accepted or refused before, nor announced in error.

        Of an event its name alone is believed. The rest is what was committed: whoever can write to the log could else
        have an honest episode refused, for a robot or a version that it is not of.
        """
        asked = {_name(event): event for event in events}
        with self._catalog.read() as connection:
            found = standings(connection, asked)
            fresh = {
                event.episode_id: event
                for name, event in asked.items()
                if found[name].committed and not found[name].accounted
            }
            rows = connection.execute(sa.select(episodes).where(episodes.c.episode_id.in_(fresh))).all()
        claims = {row.episode_id: {name: getattr(row, name) for name in _CLAIM} for row in rows}
        return [replace(event, **claims[episode_id]) for episode_id, event in fresh.items()]

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
                _quarantine(connection, verdict)
                log.warning("quarantined %s: %s", verdict.event.episode_id, verdict.reasons)
        crashpoint("coordinator.quarantined")
        made = self._append(connection, [verdict for verdict in verdicts if verdict.accepted])
        self._members = (made, self._counted)  # counted again where this is not what becomes the current snapshot
        return made

    def _append(self, connection: sa.Connection, accepted: Sequence[Verdict]) -> Snapshot:
        writer = f"{self.lease.holder}#{self.lease.token}"
        return append(connection, added=[verdict.row() for verdict in accepted], reason="episodes", writer=writer)

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


class _UndoneError(Exception):
    """Ends a trial's transaction without its effects."""


def _quarantine(connection: sa.Connection, verdict: Verdict) -> None:
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
    objects = patiently(lambda: open_objects(settings), stop)
    examination = OwnProcess(
        options.check, options.batch_check, seconds=settings.examine_s, memory_mib=settings.examine_mib
    )
    patiently(examination.start, stop)
    with closing(patiently(lambda: open_events(settings, catalog), stop)) as events:
        coordinator = Coordinator(
            catalog,
            objects,
            events,
            examination,
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
