"""The reconciler: compares rows and objects, and mends what a broker, a store or a crash left different.

    python -m infra.reconcile --home /srv/lwd --every 60

goes on for ever, and holds a lease so that no two announce the same again. Rows are looked at every time, by an index;
the whole store is listed only once an hour.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.leases import Lease
from infra.catalog.schema import episodes, outbox, quarantine, snapshot_episodes
from infra.crashpoints import crashpoint
from infra.errors import LeaseLostError, LwdError
from infra.events import announce
from infra.objects import ObjectInfo, ObjectStore
from infra.plane import open_catalog, open_objects
from infra.process import backoff, log_to, patiently, process_arguments, run_process
from infra.settings import load_settings
from infra.telemetry import metrics

log = logging.getLogger(__name__)
ROLE = "reconciler"
_BATCH = 500  # parameters of one IN (...)
_CLAIM = ("episode_id", "robot_id", "key", "sha256", "size", "schema_version", "trace_id")


@dataclass(frozen=True)
class Reconciliation:
    """What was found and mended: counts."""

    announced_again: int
    objects_lost: int
    orphans_deleted: int
    incoming_deleted: int


def reconcile(
    catalog: Catalog,
    objects: ObjectStore,
    *,
    grace_s: float = 3600.0,
    now: float | None = None,
    sweep: bool = True,
    alive: Callable[[], object] = lambda: None,
) -> Reconciliation:
    """Mend what has differed for longer than `grace_s`. Safe beside running processes, and to repeat.

    - Committed, but in no snapshot and not in quarantine: announced again (a broker lost it); duplicates are absorbed.
    - The same, but the object is gone: quarantined at stage `store`, for which the spool sends it again.
    - Stored under `episodes/`, but never committed: deleted; the spool that sent it sends it again.
    - Left in `incoming/`: deleted.

    Args:
        grace_s: how long a running process may take between two of its steps, seconds.
        now: the time to judge ages by; the clock's by default.
        sweep: list the whole store too, for what was never committed.
        alive: called between any two steps; what it raises ends the work, which may be taken up again.
    """
    before = (time.time() if now is None else now) - grace_s
    with catalog.read() as connection:
        waiting = list(connection.execute(_unsettled(before)))
    announced = lost = 0
    for row in waiting:
        alive()
        there = objects.exists(row.key)
        with catalog.begin() as connection:
            if connection.execute(_unsettled(before).where(episodes.c.episode_id == row.episode_id)).first() is None:
                continue  # settled meanwhile
            if there:
                announce(connection, **{name: getattr(row, name) for name in _CLAIM})
                announced += 1
            else:
                _want_again(connection, row)
                lost += 1
        crashpoint("reconcile.row_mended")
    orphans = _delete_orphans(catalog, objects, before, alive) if sweep else 0
    crashpoint("reconcile.orphans_deleted")
    incoming = 0
    for item in list(objects.list("incoming")):
        alive()
        if item.modified <= before:
            objects.delete(item.key)
            incoming += 1
    return Reconciliation(announced, lost, orphans, incoming)


def run(
    catalog: Catalog,
    objects: ObjectStore,
    stop: threading.Event,
    *,
    every_s: float,
    grace_s: float,
    sweep_s: float = 3600.0,
    lease_s: float = 10.0,
) -> None:
    """Reconcile every `every_s` seconds until `stop`, while this process holds the lease; waits out servers.

    Args:
        sweep_s: time between two listings of the whole store, seconds.
        lease_s: how long another waits for this one after a missed round, seconds.
    """
    lease = Lease(catalog, ROLE, every_s + lease_s)
    renew_at, sweep_at, failures = 0.0, 0.0, 0

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
                found = reconcile(catalog, objects, grace_s=grace_s, sweep=sweep, alive=alive)
            _show(found)
            failures = 0
            sweep_at = time.monotonic() + sweep_s if sweep else sweep_at
            if found != Reconciliation(0, 0, 0, 0):
                log.info("mended", extra={"fields": vars(found)})
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


def _show(found: Reconciliation) -> None:
    """As metrics."""
    metrics.RECONCILE_FINISHED.set(time.time())
    for kind, count in vars(found).items():
        metrics.RECONCILED.inc(count, kind=kind)


def _delete_orphans(catalog: Catalog, objects: ObjectStore, before: float, alive: Callable[[], object]) -> int:
    """Should a commit race with the deletion, the coordinator asks for the object again."""
    deleted, listing = 0, iter(objects.list("episodes"))
    while batch := list(islice(listing, _BATCH)):
        alive()
        for key in _unreferenced(catalog, [item for item in batch if item.modified <= before]):
            objects.delete(key)
            deleted += 1
    return deleted


def _unreferenced(catalog: Catalog, items: Sequence[ObjectInfo]) -> Iterator[str]:
    """The keys that no row needs."""
    keys = [item.key for item in items]
    if not keys:
        return
    with catalog.read() as connection:
        known = {
            key
            for table in (episodes, quarantine)
            for key in connection.execute(sa.select(table.c.key).where(table.c.key.in_(keys))).scalars()
        }
    yield from (key for key in keys if key not in known)


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


def _unsettled(before: float) -> sa.Select[Any]:
    """Episodes committed before a time, in no snapshot and not in quarantine, and last announced before it too."""
    recent = sa.exists().where(outbox.c.episode_id == episodes.c.episode_id, outbox.c.created_at > before)
    held = sa.exists().where(quarantine.c.episode_id == episodes.c.episode_id, quarantine.c.sha256 == episodes.c.sha256)
    member = sa.exists().where(snapshot_episodes.c.episode_id == episodes.c.episode_id)
    return sa.select(episodes).where(episodes.c.committed_at <= before, ~recent, ~held, ~member)


def _serve(options: argparse.Namespace, stop: threading.Event) -> None:
    settings = load_settings(home=options.home)
    log_to(settings.logs_dir, ROLE)
    metrics.serve(settings, ROLE)
    catalog = open_catalog(settings, migrate=True, stop=stop)
    objects = patiently(lambda: open_objects(settings), stop)
    run(catalog, objects, stop, every_s=options.every, grace_s=options.grace, lease_s=settings.lease_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m infra.reconcile`: run until SIGTERM; exit code of the error otherwise."""
    parser = process_arguments("infra.reconcile", "Mend what servers and crashes lost.")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two looks")
    parser.add_argument("--grace", type=float, default=3600.0, help="age of a difference that is mended, seconds")
    options = parser.parse_args(arguments)
    return run_process(options, lambda stop: _serve(options, stop))


if __name__ == "__main__":
    sys.exit(main())
