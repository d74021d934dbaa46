"""What the catalog knows, as metrics: by the coordinator that holds the lease, every few seconds, at a flat cost.

No query counts the episodes. Each looks at the end of an index, at a small table, or at what came since the last look:
every committed episode has a row in the outbox, in order of commit, so that an episode is judged when its row is first
seen and again only while it is unaccounted. What is sent through the checks again has a new row.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.accounting import standings, unaccounted
from infra.catalog.schema import (
    aliases,
    dead_letters,
    episodes,
    measurements,
    outbox,
    policies,
    policy_permissions,
    policy_refusals,
    promotions,
    quarantine,
    robot_tokens,
    robots,
    snapshot_episodes,
    snapshots,
)
from infra.errors import LwdError
from infra.snapshots import current
from infra.telemetry import metrics
from infra.telemetry.milestones import Times

log = logging.getLogger(__name__)
STAGES = ("conflict", "schema", "decode", "identity", "contract", "influence", "store", "read", "revoked")
DECISIONS = ("canary", "safe", "withdraw", "refuse", "promote", "rollback", "overrule")
_EVERY_S, _SLOW_EVERY_S, _CATCH_UP_S = 5.0, 60.0, 0.5
_SCAN = 5_000  # outbox rows judged in one look: there may be a million after a start, and the coordinator has work
_UNSENT_MAX = 100_000
_FORGET_ROBOT_S = 86_400.0
_BATCH = 500  # parameters of one IN (...)
_LATENCIES = {
    "publish_to_staged_s": metrics.PUBLISH_TO_STAGED,
    "publish_to_active_s": metrics.PUBLISH_TO_ACTIVE,
}
_OF_LEADER = (
    metrics.CONSUMER_LAG,
    metrics.UNACCOUNTED,
    metrics.UNACCOUNTED_OLDEST,
    metrics.OUTBOX_UNSENT,
    metrics.OUTBOX_OLDEST,
    metrics.QUARANTINE,
    metrics.DEAD_LETTERS,
    metrics.SNAPSHOT_VERSION,
    metrics.SNAPSHOT_EPISODES,
    metrics.SNAPSHOT_CREATED,
    metrics.ROBOT_SEEN,
    metrics.ROBOT_EPISODES,
    metrics.ROBOT_POLICY,
    metrics.ROBOT_REFUSES,
    metrics.ROBOT_SAFETY,
    metrics.ROBOT_HELP,
    metrics.ROBOT_HOLD,
    metrics.ROBOT_SPOOL,
    metrics.ROBOT_SPOOL_LIMIT,
    metrics.ROBOT_PENDING,
    metrics.TOKEN_EXPIRES,
    metrics.POLICY_VERSION,
    metrics.POLICY_CREATED,
    metrics.POLICY_PERMISSION,
    metrics.POLICY_REFUSALS,
    metrics.POLICY_DECISIONS,
)


class CatalogMetrics:
    """Keeps the catalog's gauges up to date. One per deployment: two would show every number twice.

    Args:
        catalog: to look at.
        relayed: the outbox is sent to a broker (the fleet profile), so that rows not sent are worth a number.
        lag: how many events the coordinator has not settled.
    """

    def __init__(self, catalog: Catalog, *, relayed: bool, lag: Callable[[], int] | None = None) -> None:
        self._catalog = catalog
        self._relayed = relayed
        self._lag = lag
        self._due = self._slow_due = 0.0
        self._seen = 0  # the last outbox row that was judged
        self._judged_all = False
        self._open: dict[tuple[str, str], float] = {}  # unaccounted (id, sha256): when announced
        self._measured: int | None = None  # the last measurement that was counted

    def refresh(self) -> bool:
        """Look, if it is time and metrics are on; whether it did. What cannot be shown is logged: who settles episodes
        goes on.

        Raises:
            UnavailableError: catalog or broker did not answer.
        """
        if not metrics.enabled() or time.monotonic() < self._due:
            return False
        try:
            self.collect()
            if self._lag is not None:
                metrics.CONSUMER_LAG.set(self._lag())
        except LwdError:
            raise
        except Exception:
            log.exception("metrics of the catalog")
        metrics.LEASE_HELD.set(1)
        self._due = time.monotonic() + (_EVERY_S if self._judged_all else _CATCH_UP_S)
        return True

    def collect(self) -> None:
        """Look now."""
        with metrics.COLLECT_SECONDS.time(), self._catalog.read() as connection:
            now = dialect.now(connection)
            self._unaccounted(connection, now)
            if self._relayed:
                _outbox(connection, now)
            snapshot = current(connection)
            metrics.SNAPSHOT_VERSION.set(snapshot.version)
            metrics.SNAPSHOT_EPISODES.set(snapshot.episodes)
            if snapshot.version:
                metrics.SNAPSHOT_CREATED.set(snapshot.created_at)
            _robots(connection, now)
            _policies(connection)
            _permissions(connection, now)
            self._latencies(connection)
            if time.monotonic() >= self._slow_due:
                self._slow_due = time.monotonic() + _SLOW_EVERY_S
                _slow(connection)

    def stand_down(self) -> None:
        """Show nothing any more: another coordinator holds the lease, and shows it."""
        metrics.LEASE_HELD.set(0)
        for gauge in _OF_LEADER:
            gauge.forget()
        self._due = self._slow_due = 0.0

    def _unaccounted(self, connection: sa.Connection, now: float) -> None:
        for name, standing in standings(connection, self._open).items():
            if standing.accounted:
                del self._open[name]
        last = connection.execute(sa.select(sa.func.max(outbox.c.seq))).scalar() or 0
        until = min(last, self._seen + _SCAN)
        for row in connection.execute(_unsettled(self._seen, until)):
            self._open.setdefault((row.episode_id, row.sha256), row.created_at)
        self._seen = until
        if until == last:  # else there is more to judge: no number is better than one that is too low
            metrics.UNACCOUNTED.set(len(self._open))
            metrics.UNACCOUNTED_OLDEST.set(max((now - at for at in self._open.values()), default=0.0))
        self._judged_all = until == last

    def _latencies(self, connection: sa.Connection) -> None:
        table = measurements
        if self._measured is None:
            self._measured = connection.execute(sa.select(sa.func.max(table.c.id))).scalar() or 0
        query = sa.select(table.c.id, table.c.name, table.c.value).where(table.c.id > self._measured)
        for row in connection.execute(query.order_by(table.c.id).limit(_SCAN)):
            self._measured = row.id
            if (histogram := _LATENCIES.get(row.name)) is not None:
                histogram.observe(row.value)


def times_of(catalog: Catalog, episode_ids: Iterable[str]) -> tuple[list[Times], float]:
    """When these episodes passed their stages, and the time now, by the catalog's clock."""
    columns = (episodes.c.trace_id, episodes.c.produced_at, episodes.c.committed_at, snapshots.c.created_at)
    table = episodes.outerjoin(snapshot_episodes, snapshot_episodes.c.episode_id == episodes.c.episode_id).outerjoin(
        snapshots, snapshots.c.version == snapshot_episodes.c.added
    )
    ids, found = sorted(set(episode_ids)), []
    with catalog.read() as connection:
        for start in range(0, len(ids), _BATCH):
            query = sa.select(*columns).select_from(table).where(episodes.c.episode_id.in_(ids[start : start + _BATCH]))
            found += [Times(*row) for row in connection.execute(query)]
        return found, dialect.now(connection)


def _unsettled(after: int, until: int) -> sa.Select[Any]:
    """Outbox rows of a range whose episodes are unaccounted."""
    columns = (outbox.c.episode_id, outbox.c.sha256, outbox.c.created_at)
    return sa.select(*columns).where(outbox.c.seq > after, outbox.c.seq <= until, unaccounted(outbox))


def _outbox(connection: sa.Connection, now: float) -> None:
    unsent = sa.select(outbox.c.seq).where(outbox.c.sent_at.is_(None)).limit(_UNSENT_MAX).subquery()
    metrics.OUTBOX_UNSENT.set(connection.execute(sa.select(sa.func.count()).select_from(unsent)).scalar_one())
    first = sa.select(outbox.c.created_at).where(outbox.c.sent_at.is_(None)).order_by(outbox.c.seq).limit(1)
    oldest = connection.execute(first).scalar()
    metrics.OUTBOX_OLDEST.set(0.0 if oldest is None else now - oldest)


def _robots(connection: sa.Connection, now: float) -> None:
    rows = connection.execute(sa.select(robots).where(robots.c.last_seen > now - _FORGET_ROBOT_S)).all()
    said: dict[str, Mapping[str, Any]] = {row.robot_id: row.details or {} for row in rows}
    here = [row for row in rows if not said[row.robot_id].get("ended")]
    metrics.ROBOT_SEEN.set_all({(row.robot_id, row.cohort): row.last_seen for row in here})
    metrics.ROBOT_EPISODES.set_all({(row.robot_id,): row.episodes for row in rows})
    metrics.ROBOT_POLICY.set_all(
        {(row.robot_id,): row.active_version for row in rows if row.active_version is not None}
    )
    metrics.ROBOT_REFUSES.set_all({(row.robot_id,): float(bool(said[row.robot_id].get("refused"))) for row in here})
    helpless = {row.robot_id: said[row.robot_id]["help"] for row in here if "help" in said[row.robot_id]}
    metrics.ROBOT_HELP.set_all({(robot,): float(bool(why)) for robot, why in helpless.items()})
    counted = {robot: details.get("safety") for robot, details in said.items()}
    metrics.ROBOT_SAFETY.set_all({
        (robot, str(kind)): float(count)
        for robot, counts in counted.items() if isinstance(counts, Mapping)
        for kind, count in counts.items() if _is_number(count)
    })  # fmt: skip
    metrics.ROBOT_HOLD.set_all({(row.robot_id,): float(bool(said[row.robot_id].get("hold"))) for row in here})
    for name, gauge in (
        ("spool_bytes", metrics.ROBOT_SPOOL),
        ("spool_limit", metrics.ROBOT_SPOOL_LIMIT),
        ("spool_episodes", metrics.ROBOT_PENDING),
    ):
        numbers = {(robot,): details.get(name) for robot, details in said.items()}
        gauge.set_all({key: float(value) for key, value in numbers.items() if _is_number(value)})


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that a gauge can show: what a robot said of itself may be anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _policies(connection: sa.Connection) -> None:
    newest = connection.execute(
        sa.select(policies.c.version, policies.c.created_at).order_by(policies.c.version.desc()).limit(1)
    ).first()
    versions: dict[tuple[str, ...], float] = {}
    versions |= {(row.name,): float(row.version) for row in connection.execute(sa.select(aliases))}
    if newest is not None:
        metrics.POLICY_CREATED.set(newest.created_at)
        versions |= {("newest",): float(newest.version)}
    metrics.POLICY_VERSION.set_all(versions)


def _permissions(connection: sa.Connection, now: float) -> None:
    rows = connection.execute(sa.select(policy_permissions).where(policy_permissions.c.signature != "")).all()
    metrics.POLICY_PERMISSION.set_all(
        {(row.cohort, row.role): (row.valid_until - now) / (row.valid_until - row.issued_at) for row in rows}
    )
    told = sa.select(policy_permissions.c.version)
    refusing = sa.select(sa.func.count()).where(
        policy_refusals.c.version.in_(told), policy_refusals.c.overruled_by.is_(None)
    )
    metrics.POLICY_REFUSALS.set(connection.execute(refusing).scalar_one())


def _slow(connection: sa.Connection) -> None:
    """What is counted over a whole, small table: once a minute is enough."""
    by_stage = sa.select(quarantine.c.stage, sa.func.count()).group_by(quarantine.c.stage)
    held: dict[tuple[str, ...], float] = {(stage,): 0.0 for stage in STAGES}
    metrics.QUARANTINE.set_all(held | {(row[0],): float(row[1]) for row in connection.execute(by_stage)})
    letters = connection.execute(sa.select(sa.func.count()).select_from(dead_letters)).scalar_one()
    metrics.DEAD_LETTERS.set(letters)
    decisions = sa.select(promotions.c.decision, sa.func.count()).group_by(promotions.c.decision)
    decided: dict[tuple[str, ...], float] = {(kind,): 0.0 for kind in DECISIONS}
    metrics.POLICY_DECISIONS.set_all(decided | {(row[0],): float(row[1]) for row in connection.execute(decisions)})
    ends = (
        sa.select(robot_tokens.c.robot_id, sa.func.max(robot_tokens.c.expires_at))
        .where(robot_tokens.c.revoked_at.is_(None))
        .group_by(robot_tokens.c.robot_id)
    )
    metrics.TOKEN_EXPIRES.set_all({(row[0],): float(row[1]) for row in connection.execute(ends)})
