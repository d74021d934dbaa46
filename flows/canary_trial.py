"""A trial as the catalog knows it: what is compared with what, the episodes of both, the robots that take part.

Where a trial begins is told by data snapshots, never by time: the registry writes with each decision which one was
current. Whose an episode is, is told by cohorts: the candidate's are those of canary robots that say its version, the
champion's those of production robots that say the champion's. What else says one of the two counts for neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from flows.canary_pairs import AtWork
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
        restarted_at: when it was put on trial last; `safe_at`, when it was found SAFE since, if it was.
        at: when this was read, by the catalog's clock as all of these.
    """

    version: int
    champion: int
    since: int
    started_at: float
    before: int
    restarted_at: float
    safe_at: float | None
    at: float


def find_trial(connection: sa.Connection, version: int, champion: int) -> Trial:
    """The trial of `version` against `champion`, as it is or would be if it began now."""
    table, at = schema.promotions, now(connection)
    mine = sa.select(table).where(table.c.version == version, table.c.from_version == champion)
    begun = connection.execute(mine.where(table.c.decision == "canary").order_by(table.c.id)).all()
    first, last = (begun[0], begun[-1]) if begun else (None, None)
    safe = None
    if last is not None:
        found = mine.where(table.c.decision == "safe", table.c.id > last.id).order_by(table.c.id).limit(1)
        safe = connection.execute(found).first()
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
        started_at=at if first is None else float(first.created_at),
        before=0 if promoted is None else int(promoted.evidence.get("at_snapshot", 0)),
        restarted_at=at if last is None else float(last.created_at),
        safe_at=None if safe is None else float(safe.created_at),
        at=at,
    )


def episodes_of(connection: sa.Connection, trial: Trial) -> list[AtWork]:
    """Both policies' episodes since the trial began, in the order in which they came in."""
    member, episode = schema.snapshot_episodes, schema.episodes
    query = (
        sa.select(member, episode.c.robot_id, episode.c.committed_at)
        .join(episode, episode.c.episode_id == member.c.episode_id)
        .where(
            member.c.removed.is_(None), member.c.source == "online", member.c.added > trial.since,
            member.c.policy_version.in_((trial.version, trial.champion)),
        )
        .order_by(member.c.added, episode.c.committed_at, member.c.episode_id)
    )  # fmt: skip
    arms = {trial.version: canary_robots(connection), trial.champion: production_robots(connection)}
    robots = {version: set(found) for version, found in arms.items()}
    return [
        AtWork(
            task=row.task,
            success=row.outcome == "success" and row.interventions == 0,
            intervened=row.interventions > 0,
            candidate=row.policy_version == trial.version,
            at=row.committed_at,
            safety=row.safety or {},
        )
        for row in connection.execute(query)
        if row.robot_id in robots[row.policy_version]
    ]


def worked_before(connection: sa.Connection, trial: Trial, most: int) -> tuple[int, list[str]]:
    """How many of the champion's newest `most` episodes from before the trial there are, by production and canary
    robots, and the tasks of the production robots among them. No outcome of theirs is looked at."""
    member, episode, robot = schema.snapshot_episodes, schema.episodes, schema.robots
    query = (
        sa.select(member.c.task, episode.c.robot_id)
        .join(episode, episode.c.episode_id == member.c.episode_id)
        .join(robot, robot.c.robot_id == episode.c.robot_id)
        .where(
            member.c.removed.is_(None), member.c.source == "online", robot.c.cohort.in_(("canary", "production")),
            member.c.policy_version == trial.champion, member.c.added > trial.before, member.c.added <= trial.since,
        )
        .order_by(member.c.added.desc(), member.c.episode_id.desc())
        .limit(most)
    )  # fmt: skip
    rows, production = connection.execute(query).all(), set(production_robots(connection))
    return len(rows), sorted({row.task for row in rows if row.robot_id in production})


def canary_robots(connection: sa.Connection) -> list[str]:
    """The robots of the canary cohort: those that say so, and those enrolled for it that were not heard of yet.

    A robot that has tokens is where its valid ones say; with none that is valid it gets no policy.
    """
    return sorted(robot for robot, found in _cohorts(connection).items() if "canary" in found)


def production_robots(connection: sa.Connection, since: float | None = None) -> list[str]:
    """The robots of the production cohort and of no other.

    Args:
        since: only those that were heard of since then, by the catalog's clock.
    """
    found = {robot for robot, cohorts in _cohorts(connection).items() if cohorts == {"production"}}
    if since is not None:
        seen = schema.robots
        found &= set(connection.execute(sa.select(seen.c.robot_id).where(seen.c.last_seen >= since)).scalars())
    return sorted(found)


def _cohorts(connection: sa.Connection) -> dict[str, Collection[str]]:
    """The cohorts of each robot."""
    seen, tokens = schema.robots, schema.robot_tokens
    enrolled: dict[str, set[str]] = defaultdict(set)
    at = now(connection)
    for row in connection.execute(sa.select(tokens)):
        enrolled[row.robot_id] |= {row.cohort} if row.revoked_at is None and row.expires_at > at else set()
    said = connection.execute(sa.select(seen.c.robot_id, seen.c.cohort))
    return {row.robot_id: {row.cohort} for row in said} | enrolled


def refused_of(connection: sa.Connection, trial: Trial, robots: Sequence[str]) -> list[tuple[int, str]]:
    """(id, key) of what these robots brought since the trial began and the data contract refused."""
    table = schema.quarantine
    rows = connection.execute(
        sa.select(table.c.id, table.c.key, table.c.reasons).where(
            table.c.stage == "contract", table.c.robot_id.in_(robots), table.c.created_at >= trial.started_at
        )
    )
    return [(row.id, row.key) for row in rows if not {reason["rule"] for reason in row.reasons} & _CHECK_FAILED]
