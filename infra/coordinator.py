"""The coordinator: from the log of committed episodes to snapshots and quarantine, each exactly once.

One process holds the lease. In one transaction it inserts the accepted episodes into the next snapshot, puts the
refused ones into quarantine, advances the stored offsets and proves its lease: after a crash anywhere the same events
are read again and nothing happens twice.

    python -m infra.coordinator --home runs/local --check data_contracts.checks:default_check
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.leases import Lease
from infra.catalog.schema import episodes, quarantine, revocations, snapshot_episodes
from infra.crashpoints import crashpoint
from infra.episode import SCHEMA_VERSION, Episode, decode
from infra.errors import CorruptDataError, LeaseLostError, LwdError
from infra.events import Event, EventLog, OutboxLog, store_offsets
from infra.objects import DirectoryStore, ObjectStore
from infra.process import backoff, die_with_parent, load_callable, log_to, stop_on_signal
from infra.settings import load_settings
from infra.snapshots import Snapshot, append

log = logging.getLogger(__name__)
CONSUMER = "coordinator"


class Violation(Protocol):
    """A broken rule of the data contract; `block` refuses the episode, `warn` is recorded with it."""

    @property
    def rule(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def message(self) -> str: ...


Check = Callable[[Episode], Sequence[Violation]]
BatchCheck = Callable[[Sequence[Episode]], Mapping[str, Sequence[Violation]]]


@dataclass
class _Verdict:
    """What becomes of one event: accepted with `episode`, or refused at `stage`."""

    event: Event
    episode: Episode | None = None
    stage: str = ""
    reasons: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, stage: str, rule: str, message: str) -> _Verdict:
        self.episode, self.stage = None, stage
        self.reasons.append({"rule": rule, "severity": "block", "message": message})
        return self

    def judge(self, violations: Iterable[Violation]) -> None:
        self.reasons += [
            {"rule": str(v.rule), "severity": str(v.severity), "message": str(v.message)} for v in violations
        ]
        if any(reason["severity"] != "warn" for reason in self.reasons):
            self.episode, self.stage = None, "contract"


class Coordinator:
    """Turns events into snapshots.

    Args:
        catalog, objects, events: the data plane.
        check: the data contract for one episode.
        batch_check: for the accepted episodes of one micro-batch together: violations by episode id.
        micro_batch: most events in one snapshot.
        lease_s: how long another coordinator waits for this one after its last sign of life, seconds.
        fetch_retries: tries to read an object before it is asked for again from its spool.
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
        holder: str | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._catalog = catalog
        self._objects = objects
        self._events = events
        self._check = check
        self._batch_check = batch_check
        self._micro_batch = micro_batch
        self._fetch_retries = fetch_retries
        self._sleep = sleep
        self.lease = Lease(catalog, CONSUMER, lease_s, holder)
        self._renew_at = 0.0

    def step(self) -> int:
        """Handle one micro-batch; returns the number of events it settled, 0 when there were none.

        Raises:
            LeaseLostError: another coordinator is at work; nothing was written.
            UnavailableError, StorageFullError: nothing was written; call again later.
        """
        if time.monotonic() >= self._renew_at:
            self.lease.acquire()
            self._renew_at = time.monotonic() + self.lease.seconds / 3
        events = self._events.poll(CONSUMER, self._micro_batch)
        if not events:
            return 0
        settled = self._settled(events)
        verdicts = {event.episode_id: self._examine(event) for event in events if _name(event) not in settled}
        self._examine_together([verdict for verdict in verdicts.values() if verdict.episode is not None])
        crashpoint("coordinator.examined")
        with self._catalog.begin() as connection:
            self.lease.guard(connection)
            snapshot = self._commit(connection, list(verdicts.values()))
            crashpoint("coordinator.episodes_settled")
            store_offsets(connection, CONSUMER, _last(events))
            crashpoint("coordinator.offsets_stored")
        crashpoint("coordinator.committed")
        self._renew_at = time.monotonic() + self.lease.seconds / 3
        fields = {"snapshot": snapshot.version, "episodes": snapshot.episodes, "events": len(events)}
        log.info("committed", extra={"fields": fields})
        return len(events)

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
                    failures = 0
                except LeaseLostError:
                    raise
                except LwdError as error:
                    failures += 1
                    log.warning("will try again: %s", error.problem)
                    stop.wait(backoff(failures))
                    continue
                if handled == 0:
                    stop.wait(poll_s)
        finally:
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

    def _examine(self, event: Event) -> _Verdict:
        verdict = _Verdict(event)
        if event.schema_version != SCHEMA_VERSION:
            message = f"schema version {event.schema_version}, this server reads {SCHEMA_VERSION}"
            return verdict.refuse("schema", "schema_version", message)
        try:
            data = self._fetch(event)
        except CorruptDataError as error:
            return verdict.refuse("store", "object", error.problem)
        try:
            episode = decode(data, name=event.key)
        except CorruptDataError as error:
            return verdict.refuse("decode", "format", error.problem)
        except Exception as error:  # whatever crafted bytes provoke: the next event must still be read
            return verdict.refuse("decode", "format", f"{type(error).__name__}: {error}")
        for name in ("episode_id", "robot_id", "schema_version"):
            announced, found = getattr(event, name), getattr(episode, name)
            if announced != found:
                return verdict.refuse("identity", name, f"announced as {announced!r}, the object says {found!r}")
        verdict.episode = episode
        try:
            verdict.judge(self._check(episode))
        except Exception as error:  # a check that breaks accepts nothing; Ingest.release() tries again
            log.exception("check failed on %s", event.episode_id)
            verdict.refuse("contract", "check", f"the check itself failed: {type(error).__name__}: {error}")
        return verdict

    def _examine_together(self, verdicts: Sequence[_Verdict]) -> None:
        if self._batch_check is None or not verdicts:
            return
        accepted = [verdict.episode for verdict in verdicts if verdict.episode is not None]
        try:
            found = self._batch_check(accepted)
        except Exception as error:
            log.exception("batch check failed")
            for verdict in verdicts:
                verdict.refuse("contract", "batch_check", f"the check itself failed: {type(error).__name__}: {error}")
            return
        for verdict in verdicts:
            verdict.judge(found.get(verdict.event.episode_id, ()))

    def _fetch(self, event: Event) -> bytes:
        """The object's bytes; CorruptDataError when after all tries they are not there or not those announced."""
        for attempt in range(self._fetch_retries):
            if attempt:
                self._sleep(backoff(attempt - 1))
            try:
                data = self._objects.get(event.key)
            except CorruptDataError as error:
                last = error
                continue
            digest = hashlib.sha256(data).hexdigest()
            if digest == event.sha256:
                return data
            last = CorruptDataError(f"object {event.key} has {len(data)} bytes, sha256 {digest}", "send it again")
        raise last

    def _commit(self, connection: sa.Connection, verdicts: Sequence[_Verdict]) -> Snapshot:
        self._refuse_revoked(connection, verdicts)
        for verdict in verdicts:
            if verdict.episode is None:
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
        added = [_row(verdict.episode, verdict.reasons) for verdict in verdicts if verdict.episode is not None]
        return append(connection, added=added, reason="episodes", writer=f"{self.lease.holder}#{self.lease.token}")

    def _refuse_revoked(self, connection: sa.Connection, verdicts: Sequence[_Verdict]) -> None:
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


def _row(episode: Episode, warnings: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "episode_id": episode.episode_id,
        "task": episode.task,
        "source": episode.source,
        "outcome": episode.outcome,
        "policy_version": episode.policy_version,
        "steps": episode.steps,
        "interventions": int(episode.intervention.sum()),
        "warnings": warnings,
    }


def _name(event: Event) -> tuple[str, str]:
    return event.episode_id, event.sha256


def _last(events: Iterable[Event]) -> dict[int, int]:
    positions: dict[int, int] = {}
    for event in events:
        positions[event.partition] = max(event.offset, positions.get(event.partition, 0))
    return positions


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m infra.coordinator`: run until SIGTERM; exit code of the error otherwise."""
    parser = argparse.ArgumentParser(prog="python -m infra.coordinator", description="Commit episodes to snapshots.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--check", required=True, help="module:function, the data contract for one episode")
    parser.add_argument("--batch-check", help="module:function, for the accepted episodes of a micro-batch")
    parser.add_argument("--standby", action="store_true", help="wait for the lease instead of ending")
    parser.add_argument("--parent", type=int, help="stop when this process, which started this one, ends")
    options = parser.parse_args(arguments)
    if options.parent:
        die_with_parent(options.parent)
    stop = stop_on_signal()
    try:
        settings = load_settings(home=options.home)
        log_to(settings.logs_dir, "coordinator")
        catalog = Catalog(settings.catalog_url)
        catalog.migrate()
        crashpoint("coordinator.started")
        coordinator = Coordinator(
            catalog,
            DirectoryStore(settings.objects_dir),
            OutboxLog(catalog),
            load_callable(options.check),
            batch_check=load_callable(options.batch_check) if options.batch_check else None,
            micro_batch=settings.micro_batch,
            lease_s=settings.lease_s,
            fetch_retries=settings.fetch_retries,
        )
        while not stop.is_set():
            try:
                coordinator.run(stop, settings.poll_s)
            except LeaseLostError:
                if not options.standby:
                    raise
                stop.wait(settings.lease_s / 3)
    except LwdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
