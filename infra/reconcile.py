"""The reconciler: compares rows and objects, and mends what a broker, a store or a crash left different.

It deletes what is in transit (`incoming/`, unfinished writes) and was left there, since its robot sends it again. It
never deletes an object of `episodes/`: one that the catalog lacks may be all that is left of an acknowledged episode.
Such orphans are counted; `lwd data recover` brings them back.

    python -m infra.reconcile --home /srv/lwd --every 60

goes on for ever, and holds a lease so that no two announce the same again. Each look begins at the oldest episode that
the last one left unsettled, so that it costs the same in a catalog of any size; once an hour all rows are looked at,
and the whole store is listed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from infra.audit import unrecorded
from infra.catalog import Catalog, dialect
from infra.catalog.accounting import unaccounted
from infra.catalog.leases import Lease
from infra.catalog.schema import episodes, outbox, quarantine
from infra.crashpoints import crashpoint
from infra.errors import LeaseLostError, LwdError
from infra.events import announce
from infra.objects import ObjectStore
from infra.plane import open_catalog, open_objects
from infra.process import backoff, log_to, patiently, process_arguments, run_process
from infra.settings import load_settings
from infra.telemetry import metrics

log = logging.getLogger(__name__)
ROLE = "reconciler"
GRACE_S = 3600.0
SWEEP_S = 3600.0
UNFINISHED_S = 86_400.0
_SLACK_S = 60.0  # clocks that are kept in step differ by less
_CLAIM = ("episode_id", "robot_id", "key", "sha256", "size", "schema_version", "trace_id")


@dataclass(frozen=True)
class Reconciliation:
    """What was found and mended: counts.

    Attributes:
        announced_again: episodes whose announcement was lost.
        objects_lost: episodes whose object is gone; asked for again.
        orphans: objects that the catalog has no row of; left as they are.
        incoming_deleted: uploads that were never committed.
        unfinished_deleted: writes that were begun in the store and never ended.
    """

    announced_again: int
    objects_lost: int
    orphans: int
    incoming_deleted: int
    unfinished_deleted: int = 0


def reconcile(
    catalog: Catalog,
    objects: ObjectStore,
    *,
    grace_s: float = GRACE_S,
    now: float | None = None,
    since: float = 0.0,
    sweep: bool = True,
    unfinished_s: float = UNFINISHED_S,
    alive: Callable[[], object] = lambda: None,
) -> Reconciliation:
    """Mend what has differed for longer than `grace_s`. Safe beside running processes, and to repeat.

    - Committed, but in no snapshot and not in quarantine: announced again (a broker lost it); duplicates are absorbed.
    - The same, but the object is gone: quarantined at stage `store`, for which the spool sends it again.
    - Stored under `episodes/`, but not in the catalog: counted; `infra.recover` brings it back.
    - Left in `incoming/`: deleted; the spool that sent it sends it again.
    - Begun in the store and never ended: deleted.

    Ages are judged by the catalog's clock, which wrote the times of its rows. When it jumps, things look old: what is
    in transit is then deleted too early and sent again, an episode announced twice is absorbed. What bears a time that
    is still to come was written before the clock was put back, and is not waited for.

    Args:
        grace_s: how long a running process may take between two of its steps, seconds.
        now: the time to judge ages by; the catalog's by default.
        since: episodes that were committed before are known to be settled (`settled_until`).
        sweep: list the whole store too, for what the catalog lacks and for writes that never ended.
        unfinished_s: age from which on a write that did not end is taken for dead, seconds; at least the grace.
        alive: called between any two steps; what it raises ends the work, which may be taken up again.
    """
    now = clock(catalog) if now is None else now
    before = now - grace_s
    forgotten = _forgotten(since, before, now)
    with catalog.read() as connection:
        waiting = list(connection.execute(forgotten))
    announced = lost = 0
    for row in waiting:
        alive()
        there = objects.exists(row.key)
        with catalog.begin() as connection:
            still = forgotten.where(episodes.c.episode_id == row.episode_id)
            if connection.execute(still).first() is None:
                continue  # settled meanwhile
            if there:
                announce(connection, **{name: getattr(row, name) for name in _CLAIM})
                announced += 1
            else:
                _want_again(connection, row)
                lost += 1
        crashpoint("reconcile.row_mended")
    orphans = unfinished = incoming = 0
    if sweep:
        orphans = sum(1 for _ in unrecorded(catalog, objects, alive=alive, before=before))
        unfinished = objects.sweep_unfinished(max(unfinished_s, grace_s))
    crashpoint("reconcile.store_swept")
    for item in list(objects.list("incoming")):
        alive()
        if item.modified <= before:
            objects.delete(item.key)
            incoming += 1
    return Reconciliation(announced, lost, orphans, incoming, unfinished)


def clock(catalog: Catalog) -> float:
    """The catalog's time, seconds since the epoch."""
    with catalog.read() as connection:
        return dialect.now(connection)


def settled_until(catalog: Catalog, since: float, before: float) -> float:
    """Up to when every episode is in a snapshot or in quarantine: the oldest other one's commit, at most `before`.

    Args:
        since: an earlier answer; what was committed before it is not looked at.
    """
    oldest = sa.select(sa.func.min(episodes.c.committed_at)).where(_unsettled(since, before))
    with catalog.read() as connection:
        found = connection.execute(oldest).scalar_one()
    return before if found is None else float(found)


def run(
    catalog: Catalog,
    objects: ObjectStore,
    stop: threading.Event,
    *,
    every_s: float,
    grace_s: float,
    sweep_s: float = SWEEP_S,
    unfinished_s: float = UNFINISHED_S,
    lease_s: float = 10.0,
) -> None:
    """Reconcile every `every_s` seconds until `stop`, while this process holds the lease; waits out servers.

    Args:
        sweep_s: time between two looks at all rows and the whole store, seconds. These find what was settled and came
            undone: an episode that was released from quarantine or sent again, and whose announcement was lost then.
        lease_s: how long another waits for this one after a missed round, seconds.
    """
    lease = Lease(catalog, ROLE, every_s + lease_s)
    renew_at, sweep_at, since, failures = 0.0, 0.0, 0.0, 0

    def alive() -> None:
        nonlocal renew_at
        if time.monotonic() >= renew_at:
            lease.acquire()
            renew_at = time.monotonic() + lease_s / 3

    while not stop.is_set():
        pause, sweep = every_s, time.monotonic() >= sweep_at
        try:
            renew_at = 0.0
            alive()
            with metrics.RECONCILE_SECONDS.time():
                now = clock(catalog)
                since = settled_until(catalog, 0.0 if sweep else since, now - grace_s)
                found = reconcile(
                    catalog,
                    objects,
                    grace_s=grace_s,
                    now=now,
                    since=since,
                    sweep=sweep,
                    unfinished_s=unfinished_s,
                    alive=alive,
                )
            _show(found, sweep)
            failures = 0
            sweep_at = time.monotonic() + sweep_s if sweep else sweep_at
            if found != Reconciliation(0, 0, 0, 0):
                log.info("mended", extra={"fields": vars(found)})
            if found.orphans:
                log.warning("%d objects of episodes have no row in the catalog: see `lwd data verify`", found.orphans)
        except LeaseLostError as error:
            log.debug("waiting: %s", error.problem)
            pause = min(every_s, lease_s / 3)
        except LwdError as error:
            failures += 1
            log.warning("will try again: %s", error.problem)
            pause = backoff(failures)
        stop.wait(pause)
    try:
        lease.release()
    except LwdError as error:
        log.warning("the lease was not released: %s", error.problem)


def _show(found: Reconciliation, swept: bool) -> None:
    """As metrics."""
    metrics.RECONCILE_FINISHED.set(time.time())
    for kind, count in vars(found).items():
        if kind != "orphans":
            metrics.RECONCILED.inc(count, kind=kind)
    if swept:
        metrics.ORPHANS.set(found.orphans)


def _want_again(connection: sa.Connection, row: sa.Row[Any]) -> None:
    values = {
        "episode_id": row.episode_id,
        "sha256": row.sha256,
        "robot_id": row.robot_id,
        "key": row.key,
        "stage": "store",
        "reasons": [{"rule": "object", "severity": "block", "message": f"object {row.key} is gone"}],
        "created_at": dialect.now(connection),
    }
    dialect.insert_if_absent(connection, quarantine, values)


def _unsettled(since: float, before: float) -> sa.ColumnElement[bool]:
    """Committed within these times (both included), but in no snapshot and not in quarantine."""
    return sa.and_(episodes.c.committed_at.between(since, before), unaccounted(episodes))


def _forgotten(since: float, before: float, now: float) -> sa.Select[Any]:
    """Unsettled episodes whose last announcement is not after `before` either; times to come count as long ago."""
    to_come = now + _SLACK_S
    old = sa.or_(_unsettled(since, before), sa.and_(episodes.c.committed_at > to_come, unaccounted(episodes)))
    recent = sa.exists().where(
        outbox.c.episode_id == episodes.c.episode_id, outbox.c.created_at > before, outbox.c.created_at <= to_come
    )
    return sa.select(episodes).where(old, ~recent)


def _serve(options: argparse.Namespace, stop: threading.Event) -> None:
    settings = load_settings(home=options.home)
    log_to(settings.logs_dir, ROLE)
    metrics.serve(settings, ROLE)
    catalog = open_catalog(settings, migrate=True, stop=stop)
    objects = patiently(lambda: open_objects(settings), stop)
    run(
        catalog,
        objects,
        stop,
        every_s=options.every,
        grace_s=options.grace,
        sweep_s=options.sweep,
        unfinished_s=options.unfinished,
        lease_s=settings.lease_s,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m infra.reconcile`: run until SIGTERM; exit code of the error otherwise."""
    parser = process_arguments("infra.reconcile", "Mend what servers and crashes lost.")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two looks")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="age of a difference that is mended, seconds")
    parser.add_argument("--sweep", type=float, default=SWEEP_S, help="seconds between two looks at everything")
    parser.add_argument(
        "--unfinished", type=float, default=UNFINISHED_S, help="age of an unfinished write that is removed, seconds"
    )
    options = parser.parse_args(arguments)
    return run_process(options, lambda stop: _serve(options, stop))


if __name__ == "__main__":
    sys.exit(main())
