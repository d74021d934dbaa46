"""A trial as the catalog knows it: what is compared with what, the episodes of both, the robots that take part.

What counts is told by data snapshots, never by time: the registry writes with each decision which one was current.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flows.canary_gate import AtWork
from infra.catalog import schema
from infra.catalog.dialect import now
from infra.snapshots import current

_CHECK_FAILED = {"check", "batch_check"}  # rules of the quarantine that say: the check itself is broken


@dataclass(frozen=True)
class Trial:
    """What is on trial, against what.

    Attributes:
        version, champion: the two policies.
        since: data snapshot after which the candidate's episodes count, from its first trial against this champion on;
            `started_at`, the same by the catalog's clock.
        before: data snapshot that was current when the champion became it.
    """

    version: int
    champion: int
    since: int
    started_at: float
    before: int


def find_trial(connection: sa.Connection, version: int, champion: int) -> Trial:
    """The trial of `version` against `champion`, as it is or would be if it began now."""
    table = schema.promotions
    first = connection.execute(
        sa.select(table)
        .where(table.c.version == version, table.c.decision == "canary", table.c.from_version == champion)
        .order_by(table.c.id)
        .limit(1)
    ).first()
    promoted = connection.execute(
        sa.select(table)
        .where(table.c.version == champion, table.c.decision.in_(("promote", "rollback")))
        .order_by(table.c.id.desc())
        .limit(1)
    ).first()
    return Trial(
        version,
        champion,
        since=current(connection).version if first is None else int(first.evidence.get("at_snapshot", 0)),
        started_at=now(connection) if first is None else float(first.created_at),
        before=0 if promoted is None else int(promoted.evidence.get("at_snapshot", 0)),
    )


def episodes_of(connection: sa.Connection, trial: Trial, most: int) -> tuple[list[AtWork], list[AtWork]]:
    """The champion's newest `most` episodes from before the trial, and both policies' since, as they came in.

    Robots of the learning cohort follow every candidate and have operators at hand: theirs do not count.
    """
    added, identifier = schema.snapshot_episodes.c.added, schema.snapshot_episodes.c.episode_id
    policy = schema.snapshot_episodes.c.policy_version
    champion = sa.and_(policy == trial.champion, added > trial.before)
    earlier = _at_work(champion, added <= trial.since).order_by(added.desc(), identifier.desc()).limit(most)
    during = _at_work(added > trial.since, sa.or_(champion, policy == trial.version)).order_by(added, identifier)
    return (
        [_episode(row, trial) for row in reversed(list(connection.execute(earlier)))],
        [_episode(row, trial) for row in connection.execute(during)],
    )


def canary_robots(connection: sa.Connection) -> list[str]:
    """The robots of the canary cohort: those that say so, and those enrolled for it that were not heard of yet.

    A robot that has tokens is where its valid ones say; with none that is valid it gets no policy.
    """
    seen, tokens = schema.robots, schema.robot_tokens
    enrolled: dict[str, set[str]] = defaultdict(set)
    at = now(connection)
    for row in connection.execute(sa.select(tokens)):
        enrolled[row.robot_id] |= {row.cohort} if row.revoked_at is None and row.expires_at > at else set()
    said = connection.execute(sa.select(seen.c.robot_id).where(seen.c.cohort == "canary")).scalars()
    free = {robot for robot in said if robot not in enrolled}
    return sorted(free | {robot for robot, cohorts in enrolled.items() if "canary" in cohorts})


def refused_of(connection: sa.Connection, trial: Trial, robots: Sequence[str]) -> list[tuple[int, str]]:
    """(id, key) of what these robots brought since the trial began and the data contract refused."""
    table = schema.quarantine
    rows = connection.execute(
        sa.select(table.c.id, table.c.key, table.c.reasons).where(
            table.c.stage == "contract", table.c.robot_id.in_(robots), table.c.created_at >= trial.started_at
        )
    )
    return [(row.id, row.key) for row in rows if not {reason["rule"] for reason in row.reasons} & _CHECK_FAILED]


def _at_work(*conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    member, episode, robot = schema.snapshot_episodes, schema.episodes, schema.robots
    return (
        sa.select(member.c.task, member.c.outcome, member.c.interventions, member.c.policy_version)
        .join(episode, episode.c.episode_id == member.c.episode_id)
        .join(robot, robot.c.robot_id == episode.c.robot_id)
        .where(
            member.c.removed.is_(None), member.c.source == "online", robot.c.cohort.in_(("canary", "production")),
            *conditions,
        )
    )  # fmt: skip


def _episode(row: Any, trial: Trial) -> AtWork:
    return AtWork(
        task=row.task,
        success=row.outcome == "success" and row.interventions == 0,
        intervened=row.interventions > 0,
        candidate=row.policy_version == trial.version,
    )
