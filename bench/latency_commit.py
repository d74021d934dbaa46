"""What a commit costs as the catalog grows: synthetic episodes, real transactions, on PostgreSQL."""

from __future__ import annotations

import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from infra.catalog import Catalog
from infra.events import store_offsets
from infra.ingest import Claim, Ingest
from infra.objects import incoming_key
from infra.objects.directory import DirectoryStore
from infra.servers import Servers
from infra.snapshots import append, current

_BATCH = 10
_TIMES = 40
_PER_SNAPSHOT = 10


def commit_costs(sizes: Sequence[int]) -> dict[str, Any]:
    """Milliseconds, median of 40: ingest's transaction for ten episodes, and the coordinator's that takes them into the
    next snapshot, in catalogs of growing size. Every row that the real processes would have written is there."""
    data = Path(tempfile.mkdtemp(prefix="lwd-commit-"))
    data.chmod(0o755)
    postgres = Servers(data).postgres
    try:
        postgres.start()
        catalog = Catalog(postgres.url("lwd"))
        catalog.migrate()
        objects = DirectoryStore(data / "objects")
        ingest_ms, snapshot_ms, filled = {}, {}, 0
        for size in sizes:
            _fill(catalog, filled, size)
            filled = size
            ingest_ms[str(size)], snapshot_ms[str(size)] = _time(catalog, objects, size)
        catalog.close()
    finally:
        postgres.kill()
        shutil.rmtree(data, ignore_errors=True)
    both = {size: round(ingest_ms[size] + snapshot_ms[size], 2) for size in ingest_ms}
    return {"commit_ms_by_catalogue_size": both, "ingest_ms": ingest_ms, "snapshot_ms": snapshot_ms}


def _fill(catalog: Catalog, start: int, end: int) -> None:
    """Episodes `start` to `end`, committed, sent, in snapshots of ten. The digests of these are not chained: nothing that
    is timed here reads them."""
    with catalog.begin() as connection:
        values = {"a": start, "b": end - 1, "n": _PER_SNAPSHOT}
        for statement in (
            """INSERT INTO episodes SELECT lpad(to_hex(i), 32, '0'), 'r' || i % 64, 'episodes/' || md5(i::text),
               md5(i::text) || md5((i + 1)::text), 20480, 1, 't', i, i FROM generate_series(:a, :b) i""",
            """INSERT INTO outbox (episode_id, robot_id, key, sha256, size, schema_version, trace_id, created_at, sent_at)
               SELECT episode_id, robot_id, key, sha256, size, 1, 't', committed_at, committed_at FROM episodes
               WHERE committed_at BETWEEN :a AND :b AND trace_id = 't'""",
            """INSERT INTO snapshots SELECT v, v - 1, md5(v::text) || md5(v::text), v * :n, :n, 0, 'episodes', 'w', v
               FROM generate_series(:a / :n + 1, (:b + 1) / :n) v
               WHERE v > (SELECT coalesce(max(version), 0) FROM snapshots)""",
            """INSERT INTO snapshot_episodes SELECT lpad(to_hex(i), 32, '0'), i / :n + 1, NULL, 'S1', 'online', 'success',
               1, 40, 0, '[]' FROM generate_series(:a, :b) i""",
        ):
            connection.execute(sa.text(statement), values)
        last = connection.execute(sa.text("SELECT count(*) FROM snapshot_episodes")).scalar_one()
        connection.execute(sa.text("UPDATE snapshots SET episodes = :n WHERE version = :v"),
                           {"n": last, "v": current(connection).version})  # fmt: skip
    with catalog.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE"))


def _time(catalog: Catalog, objects: DirectoryStore, size: int) -> tuple[float, float]:
    ingest = Ingest(catalog, objects)
    first, second = [], []
    for turn in range(_TIMES):
        uploads = []
        for number in range(_BATCH):
            data = f"{size} {turn} {number}".encode()
            sha256 = hashlib.sha256(data).hexdigest()
            claim = Claim.read("r1", sha256[:32], sha256, len(data), {})
            key = incoming_key("r1", sha256[:32])
            objects.put(key, data)
            objects.accept(key, sha256, len(data))
            uploads.append((claim, key))
        began = time.perf_counter()
        with catalog.begin() as connection:
            for claim, _ in uploads:
                ingest.insert(connection, claim)
        middle = time.perf_counter()
        with catalog.begin() as connection:
            rows = [
                {"episode_id": claim.episode_id, "task": "S1", "source": "online", "outcome": "success",
                 "policy_version": 1, "steps": 40, "interventions": 0, "warnings": []}
                for claim, _ in uploads
            ]  # fmt: skip
            append(connection, added=rows, reason="episodes", writer="benchmark")
            store_offsets(connection, "coordinator", {0: size + turn + 1})
        first.append((middle - began) * 1000)
        second.append((time.perf_counter() - middle) * 1000)
    return round(statistics.median(first), 2), round(statistics.median(second), 2)
