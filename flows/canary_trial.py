"""A trial as the catalog knows it: what is compared with what, the episodes of both, the robots that take part.

Where a trial begins is told by data snapshots, never by time: the registry writes with each decision which one was
current. Whose an episode is, is told by cohorts: the candidate's are those of canary robots that say its version, the
champion's those of production robots that say the champion's. What else says one of the two counts for neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flows.canary_pairs import AtWork
from infra.catalog import schema
from infra.catalog.cohorts import cohorts, counts_for
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
        restarted: data snapshot that was current when it was put on trial last; `restarted_at`, when that was;
            `safe_at`, when it was found SAFE since, if it was.
        at: when this was read, by the catalog's clock as all of these.
    """

    version: int
    champion: int
    since: int
    started_at: float
    before: int
    restarted: int
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
        restarted=current(connection).version if last is None else int(last.evidence.get("at_snapshot", 0)),
        restarted_at=at if last is None else float(last.created_at),
        safe_at=None if safe is None else float(safe.created_at),
        at=at,
    )


def episodes_taken_in(connection: sa.Connection, trial: Trial) -> list[sa.Row[Any]]:
    """Both policies' episodes that were ever accepted since the trial began, as rows, in the order in which they came
    in: each by a robot of the cohort that its policy is judged by."""
    member, episode = schema.snapshot_episodes, schema.episodes
    query = (
        sa.select(member, episode.c.robot_id, episode.c.committed_at, episode.c.cohort)
        .join(episode, episode.c.episode_id == member.c.episode_id)
        .where(
            member.c.source == "online", member.c.added > trial.since,
            member.c.policy_version.in_((trial.version, trial.champion)),
        )
        .order_by(member.c.added, episode.c.committed_at, member.c.episode_id)
    )  # fmt: skip
    arms, cohort = {trial.version: "canary", trial.champion: "production"}, _cohort_at_commit(connection)
    return [row for row in connection.execute(query) if cohort(row) == arms[row.policy_version]]


def episodes_of(taken_in: Sequence[sa.Row[Any]], trial: Trial) -> list[AtWork]:
    """Of the rows of `episodes_taken_in`, those that are still in the data."""
    return [
        AtWork(
            task=row.task,
            success=row.outcome == "success" and row.interventions == 0,
            intervened=row.interventions > 0,
            candidate=row.policy_version == trial.version,
            at=row.committed_at,
            safety=row.safety or {},
        )
        for row in taken_in
        if row.removed is None
    ]


def withdrawn_of(taken_in: Sequence[sa.Row[Any]], trial: Trial) -> tuple[int, int]:
    """Episodes of the trial that were accepted and then withdrawn: the candidate's since the trial began, and those of
    both policies since it was put on trial last.

    What is withdrawn is seen by no comparison any more: nobody could tell harm from what is left.
    """
    gone = [row for row in taken_in if row.removed is not None]
    ran = sum(row.policy_version == trial.version for row in gone)
    return ran, sum(row.removed > trial.restarted for row in gone)


def _cohort_at_commit(connection: sa.Connection) -> Callable[[Any], str]:
    """The cohort that an episode's robot had when it was committed, of its row; today's where that was not known.

    A robot that is moved to another cohort takes none of its episodes with it: what counted goes on to count.
    """
    today = {robot: counts_for(found) for robot, found in cohorts(connection).items()}
    return lambda row: today.get(row.robot_id, "") if row.cohort is None else row.cohort


def worked_before(connection: sa.Connection, trial: Trial, most: int) -> tuple[int, list[str]]:
    """How many of the champion's newest `most` episodes from before the trial there are, by production and canary
    robots, and the tasks of the production robots among them. No outcome of theirs is looked at."""
    member, episode, robot = schema.snapshot_episodes, schema.episodes, schema.robots
    then = sa.func.coalesce(episode.c.cohort, robot.c.cohort)
    query = (
        sa.select(member.c.task, episode.c.robot_id, episode.c.cohort)
        .join(episode, episode.c.episode_id == member.c.episode_id)
        .outerjoin(robot, robot.c.robot_id == episode.c.robot_id)
        .where(
            member.c.removed.is_(None), member.c.source == "online", then.in_(("canary", "production")),
            member.c.policy_version == trial.champion, member.c.added > trial.before, member.c.added <= trial.since,
        )
        .order_by(member.c.added.desc(), member.c.episode_id.desc())
        .limit(most)
    )  # fmt: skip
    rows, cohort = connection.execute(query).all(), _cohort_at_commit(connection)
    return len(rows), sorted({row.task for row in rows if cohort(row) == "production"})


def canary_robots(connection: sa.Connection) -> list[str]:
    """The robots of the canary cohort: those that say so, and those enrolled for it that were not heard of yet.

    A robot that has tokens is where its valid ones say; with none that is valid it gets no policy.
    """
    return sorted(robot for robot, found in cohorts(connection).items() if "canary" in found)


def production_robots(connection: sa.Connection, since: float | None = None) -> list[str]:
    """The robots of the production cohort and of no other.

    Args:
        since: only those that were heard of since then, by the catalog's clock.
    """
    found = {robot for robot, said in cohorts(connection).items() if said == {"production"}}
    if since is not None:
        seen = schema.robots
        found &= set(connection.execute(sa.select(seen.c.robot_id).where(seen.c.last_seen >= since)).scalars())
    return sorted(found)


def refused_of(connection: sa.Connection, trial: Trial) -> list[tuple[int, str]]:
    """(id, key) of what canary robots brought since the trial began and the data contract refused."""
    table, episode, cohort = schema.quarantine, schema.episodes, _cohort_at_commit(connection)
    same = (episode.c.episode_id == table.c.episode_id) & (episode.c.sha256 == table.c.sha256)
    rows = connection.execute(
        sa.select(table.c.id, table.c.key, table.c.reasons, table.c.robot_id, episode.c.cohort)
        .outerjoin(episode, same)
        .where(table.c.stage == "contract", table.c.created_at >= trial.started_at)
    )
    return [
        (row.id, row.key)
        for row in rows
        if cohort(row) == "canary" and not {reason["rule"] for reason in row.reasons} & _CHECK_FAILED
    ]
