"""What a commit costs as the catalog grows: synthetic rows, then the real code's own transactions, on PostgreSQL.

Timed are the two write transactions of ten episodes: the one in which ingest commits and announces them, and the one
in which the coordinator takes them into the next snapshot with its offsets and its lease. Beside them, what a reader, a
robot and the reconciler ask of the same catalog.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from bench.actors import made
from data_contracts.checks import default_check
from infra.catalog import Catalog
from infra.catalog.schema import episodes, outbox, snapshots
from infra.coordinator import CONSUMER, Coordinator
from infra.edge.server import MAX_BATCH
from infra.episode import encode
from infra.events import store_offsets
from infra.events.outbox import OutboxLog
from infra.ingest import Claim, Ingest
from infra.objects import incoming_key
from infra.objects.directory import DirectoryStore
from infra.reconcile import reconcile
from infra.servers import Servers
from infra.service.backend import Backend
from infra.snapshots import Snapshots

BATCH = 10
_TURNS = 40
_PER_SNAPSHOT = 64
_EPOCH = 1.7e9  # when the first synthetic episode was committed; one a second since

# Of episode i: id md5(i), sha256 sha256(i), in hex digits. The rows are those that ingest, relay and coordinator leave.
_FILL = (
    "SET LOCAL session_replication_role = replica",  # foreign keys hold by construction
    "SET LOCAL synchronous_commit = off",
    """INSERT INTO episodes (episode_id, robot_id, key, sha256, size, schema_version, trace_id, produced_at,
                             committed_at)
       SELECT md5(i::text), 'a' || i % 64, 'episodes/' || left(sha, 2) || '/' || sha || '.tar', sha, 20480, 1,
              md5('t' || i), :epoch + i, :epoch + i
       FROM (SELECT i, encode(sha256(i::text::bytea), 'hex') AS sha
             FROM generate_series(CAST(:first AS int), CAST(:last AS int)) i) made""",
    """INSERT INTO outbox (episode_id, robot_id, key, sha256, size, schema_version, trace_id, created_at, sent_at)
       SELECT episode_id, robot_id, key, sha256, size, schema_version, trace_id, committed_at, committed_at
       FROM episodes WHERE committed_at BETWEEN :epoch + :first AND :epoch + :last ORDER BY committed_at""",
    """INSERT INTO snapshot_episodes (episode_id, added, task, source, outcome, policy_version, steps, interventions,
                                      warnings)
       SELECT md5(i::text), :version + 1 + (i - :first) / :each, 'S1', 'online', 'success', 1, 24, 0, '[]'
       FROM generate_series(CAST(:first AS int), CAST(:last AS int)) i""",
)


class TimedCatalog(Catalog):
    """A catalog that keeps how long each write transaction took, from asking for it until it was durable, seconds."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.took: list[float] = []

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        began = time.perf_counter()
        with super().begin() as connection:
            yield connection
        self.took.append(time.perf_counter() - began)


def commit_costs(sizes: Sequence[int]) -> dict[str, Any]:
    """Milliseconds, medians of 40 turns, by catalogue size: `commit_ms_by_catalogue_size` is both transactions."""
    data = Path(tempfile.mkdtemp(prefix="lwd-commit-"))
    data.chmod(0o755)  # PostgreSQL may run as another user
    postgres = Servers(data).postgres
    costs: dict[str, dict[str, float]] = {}
    try:
        postgres.start()
        catalog = TimedCatalog(postgres.url("lwd"))
        catalog.migrate()
        bench, filled = _Turns(catalog, data / "objects"), 0
        for size in sizes:
            fill(catalog, filled, size)
            filled = size
            costs[str(size)] = bench.run()
        catalog.close()
    finally:
        postgres.kill()
        shutil.rmtree(data, ignore_errors=True)
    names = next(iter(costs.values()))
    both = {size: round(found["ingest"] + found["coordinator"], 2) for size, found in costs.items()}
    parts = {name: {size: found[name] for size, found in costs.items()} for name in names}
    return {"commit_ms_by_catalogue_size": both, "catalogue_ms_by_size": parts}


def fill(catalog: Catalog, first: int, end: int) -> None:
    """Add the synthetic episodes `first` to `end` - 1, in snapshots of 64 with their chain of digests."""
    before = Snapshots(catalog).latest()
    rows: list[dict[str, Any]] = []
    digest, held = before.digest, before.episodes
    for start in range(first, end, _PER_SNAPSHOT):
        members = range(start, min(start + _PER_SNAPSHOT, end))
        version, held = before.version + 1 + len(rows), held + len(members)
        lines = sorted(
            f"+{hashlib.md5(b'%d' % i).hexdigest()} {hashlib.sha256(b'%d' % i).hexdigest()}" for i in members
        )
        digest = hashlib.sha256("\n".join([digest, str(version), *lines]).encode()).hexdigest()
        rows.append({
            "version": version, "parent": version - 1, "digest": digest, "episodes": held, "added": len(members),
            "removed": 0, "reason": "episodes", "writer": "benchmark", "created_at": _EPOCH + members[-1],
        })  # fmt: skip
    values = {"first": first, "last": end - 1, "epoch": _EPOCH, "version": before.version, "each": _PER_SNAPSHOT}
    with catalog.begin() as connection:
        for statement in _FILL:
            clause = sa.text(statement)
            connection.execute(clause, {name: values[name] for name in clause.compile().params})
        connection.execute(snapshots.insert(), rows)
        store_offsets(connection, CONSUMER, {0: connection.execute(sa.select(sa.func.max(outbox.c.seq))).scalar_one()})
    with catalog.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE"))
        connection.execute(sa.text("CHECKPOINT"))


class _Turns:
    """Commits and snapshots of ten small episodes, their objects in a folder."""

    def __init__(self, catalog: TimedCatalog, objects: Path) -> None:
        self._catalog = catalog
        self._objects = DirectoryStore(objects)
        self._ingest = Ingest(catalog, self._objects)
        self._coordinator = Coordinator(catalog, self._objects, OutboxLog(catalog), default_check, micro_batch=BATCH)
        self._rng = np.random.default_rng(0)

    def run(self) -> dict[str, float]:
        """Median milliseconds of each part."""
        took: dict[str, list[float]] = {}

        def note(name: str, seconds: float) -> None:
            took.setdefault(name, []).append(1000 * seconds)

        snapshots, backend = Snapshots(self._catalog), Backend(self._catalog, self._objects)
        with self._catalog.read() as connection:
            some = sa.select(episodes.c.episode_id, episodes.c.sha256).limit(MAX_BATCH)
            asked = [(row.episode_id, row.sha256) for row in connection.execute(some)]
        for turn in range(_TURNS + 1):
            uploads = [self._upload() for _ in range(BATCH)]
            before = snapshots.latest().version
            self._ingest.commit_many(uploads)
            ingest = self._catalog.took[-1]
            settled = self._coordinator.step()
            assert settled == BATCH and snapshots.latest().version == before + 1
            if turn:  # the first finds cold caches
                note("ingest", ingest)
                note("coordinator", self._catalog.took[-1])
                note("increment of a reader", _seconds(partial(snapshots.increment, before)))
                note("status of 64", _seconds(partial(backend.statuses, asked)))
        note("reconciler's look", _seconds(partial(reconcile, self._catalog, self._objects, sweep=False)))
        return {name: round(statistics.median(values), 2) for name, values in took.items()}

    def _upload(self) -> tuple[Claim, str]:
        episode = made(self._rng, "a0")
        data = encode(episode)
        key = incoming_key("a0", episode.episode_id)
        self._objects.put(key, data)
        return Claim.read("a0", episode.episode_id, hashlib.sha256(data).hexdigest(), len(data), {}), key


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
