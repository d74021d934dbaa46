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
from infra.reconcile import reconcile, settled_until
from infra.servers import Servers
from infra.service.backend import Backend
from infra.snapshots import Snapshots

BATCH = 10
_TURNS = 40
_MINUTE_S = 60.0
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
             FROM generate_series(0, CAST(:last AS int)) i) made""",
    """INSERT INTO outbox (episode_id, robot_id, key, sha256, size, schema_version, trace_id, created_at, sent_at)
       SELECT episode_id, robot_id, key, sha256, size, schema_version, trace_id, committed_at, committed_at
       FROM episodes ORDER BY committed_at""",
    """INSERT INTO snapshot_episodes (episode_id, added, task, source, outcome, policy_version, steps, interventions,
                                      warnings)
       SELECT md5(i::text), 1 + i / :each, 'S1', 'online', 'success', 1, 24, 0, '[]'
       FROM generate_series(0, CAST(:last AS int)) i""",
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
    """Milliseconds, medians of 40 turns, by catalogue size: `commit_ms_by_catalogue_size` is both transactions.

    Each size is a database of one server, and the sizes take turns, so that the machine's moods meet all of them.
    """
    data = Path(tempfile.mkdtemp(prefix="lwd-commit-"))
    data.chmod(0o755)  # PostgreSQL may run as another user
    postgres = Servers(data).postgres
    benches: dict[str, _Bench] = {}
    try:
        postgres.start()
        for size in sizes:
            postgres.create_database(name := f"episodes_{size}")
            catalog = TimedCatalog(postgres.url(name))
            catalog.migrate()
            fill(catalog, size)
            benches[str(size)] = _Bench(catalog, data / name)
        for turn in range(_TURNS + 1):
            for bench in list(benches.values())[:: 1 if turn % 2 else -1]:
                bench.turn(kept=turn > 0)  # the first finds cold caches
        costs = {size: bench.medians() for size, bench in benches.items()}
        for bench in benches.values():
            bench.catalog.close()
    finally:
        postgres.kill()
        shutil.rmtree(data, ignore_errors=True)
    names = next(iter(costs.values()))
    both = {size: round(found["ingest"] + found["coordinator"], 2) for size, found in costs.items()}
    parts = {name: {size: found[name] for size, found in costs.items()} for name in names}
    return {"commit_ms_by_catalogue_size": both, "catalogue_ms_by_size": parts}


def fill(catalog: Catalog, size: int) -> None:
    """Put synthetic episodes, 0 to `size` - 1, into an empty catalog: snapshots of 64 with their chain of digests."""
    rows: list[dict[str, Any]] = []
    digest, held = Snapshots(catalog).latest().digest, 0
    for start in range(0, size, _PER_SNAPSHOT):
        members = range(start, min(start + _PER_SNAPSHOT, size))
        version, held = 1 + len(rows), held + len(members)
        lines = sorted(
            f"+{hashlib.md5(b'%d' % i).hexdigest()} {hashlib.sha256(b'%d' % i).hexdigest()}" for i in members
        )
        digest = hashlib.sha256("\n".join([digest, str(version), *lines]).encode()).hexdigest()
        rows.append({
            "version": version, "parent": version - 1, "digest": digest, "episodes": held, "added": len(members),
            "removed": 0, "reason": "episodes", "writer": "benchmark", "created_at": _EPOCH + members[-1],
        })  # fmt: skip
    values = {"last": size - 1, "epoch": _EPOCH, "each": _PER_SNAPSHOT}
    with catalog.begin() as connection:
        for statement in _FILL:
            clause = sa.text(statement)
            connection.execute(clause, {name: values[name] for name in clause.compile().params})
        connection.execute(snapshots.insert(), rows)
        store_offsets(connection, CONSUMER, {0: connection.execute(sa.select(sa.func.max(outbox.c.seq))).scalar_one()})
    with catalog.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE"))
        connection.execute(sa.text("CHECKPOINT"))


class _Bench:
    """Commits and snapshots of ten small episodes in one catalog, their objects in a folder."""

    def __init__(self, catalog: TimedCatalog, objects: Path) -> None:
        self.catalog = catalog
        self._objects = DirectoryStore(objects)
        self._ingest = Ingest(catalog, self._objects)
        self._coordinator = Coordinator(catalog, self._objects, OutboxLog(catalog), default_check, micro_batch=BATCH)
        self._snapshots, self._backend = Snapshots(catalog), Backend(catalog, self._objects)
        self._rng = np.random.default_rng(0)
        self._took: dict[str, list[float]] = {}
        with catalog.read() as connection:
            some = sa.select(episodes.c.episode_id, episodes.c.sha256).limit(MAX_BATCH)
            self._asked = [(row.episode_id, row.sha256) for row in connection.execute(some)]

    def turn(self, *, kept: bool) -> None:
        """Ten episodes through ingest and coordinator, and what others ask of the catalog then."""
        uploads = [self._upload() for _ in range(BATCH)]
        before = self._snapshots.latest().version
        self._ingest.commit_many(uploads)
        took = {"ingest": self.catalog.took[-1]}
        settled = self._coordinator.step()
        assert settled == BATCH and self._snapshots.latest().version == before + 1
        took["coordinator"] = self.catalog.took[-1]
        took["increment of a reader"] = _seconds(partial(self._snapshots.increment, before))
        took["status of 64"] = _seconds(partial(self._backend.statuses, self._asked))
        took["reconciler's look, each minute"] = _seconds(partial(self._look, time.time() - _MINUTE_S))
        took["reconciler's look at all, each hour"] = _seconds(partial(self._look, 0.0))
        if kept:
            for name, seconds in took.items():
                self._took.setdefault(name, []).append(1000 * seconds)

    def medians(self) -> dict[str, float]:
        """Milliseconds of each part."""
        return {name: round(statistics.median(values), 2) for name, values in self._took.items()}

    def _look(self, since: float) -> None:
        """Without grace: at every episode committed since."""
        until = settled_until(self.catalog, since, time.time())
        reconcile(self.catalog, self._objects, grace_s=0.0, since=until, sweep=False)

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
