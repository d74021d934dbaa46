"""Where an episode stands: the one place that says what "neither in a snapshot nor in quarantine" means.

An episode is named by (id, sha256): other bytes that were handed in under its id are a second thing, which may be in
quarantine while the episode itself is not settled. Invariant I1: once all is settled, nothing is unaccounted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from infra.catalog.schema import episodes, quarantine, snapshot_episodes

_BATCH = 500  # parameters of one IN (...)


@dataclass(frozen=True)
class Standing:
    """What the catalog knows of one (id, sha256).

    Attributes:
        committed: it has its row.
        member: it is, or was, in a snapshot.
        stage: of the quarantine that holds it, if one does.
        robot_id: whose it is; None unless it is committed.
    """

    committed: bool = False
    member: bool = False
    stage: str | None = None
    robot_id: str | None = None

    @property
    def accounted(self) -> bool:
        return self.member or self.stage is not None


def accounted(of: sa.FromClause) -> sa.ColumnElement[bool]:
    """In a snapshot, now or once, or in quarantine: of rows with the columns `episode_id` and `sha256`."""
    member = snapshot_episodes.c.episode_id == of.c.episode_id
    if of is not episodes:  # the snapshot's row has the id alone: its digest is the episode's
        same = episodes.alias()
        member &= (same.c.episode_id == of.c.episode_id) & (same.c.sha256 == of.c.sha256)
    held = (quarantine.c.episode_id == of.c.episode_id) & (quarantine.c.sha256 == of.c.sha256)
    return sa.or_(sa.exists().where(member), sa.exists().where(held))


def unaccounted(of: sa.FromClause) -> sa.ColumnElement[bool]:
    """Committed, and neither in a snapshot nor in quarantine: of rows with the columns `episode_id` and `sha256`."""
    if of is episodes:
        return ~accounted(of)
    same = episodes.alias()
    committed = sa.exists().where(same.c.episode_id == of.c.episode_id, same.c.sha256 == of.c.sha256)
    return sa.and_(committed, ~accounted(of))


def count_unaccounted(connection: sa.Connection) -> int:
    """How many committed episodes are neither in a snapshot nor in quarantine; looks at all of them."""
    query = sa.select(sa.func.count()).select_from(episodes).where(unaccounted(episodes))
    return int(connection.execute(query).scalar_one())


def standings(connection: sa.Connection, names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Standing]:
    """Of each (id, sha256) asked for, in two look-ups for every 500."""
    asked = sorted(set(names))
    found = dict.fromkeys(asked, Standing())
    ids = sorted({identifier for identifier, _ in asked})
    for start in range(0, len(ids), _BATCH):
        some = ids[start : start + _BATCH]
        rows = sa.select(
            episodes.c.episode_id, episodes.c.sha256, episodes.c.robot_id, snapshot_episodes.c.added
        ).outerjoin(snapshot_episodes, snapshot_episodes.c.episode_id == episodes.c.episode_id)
        committed = {
            (row.episode_id, row.sha256): row for row in connection.execute(rows.where(episodes.c.episode_id.in_(some)))
        }
        held = sa.select(quarantine.c.episode_id, quarantine.c.sha256, quarantine.c.stage)
        stages = {
            (row.episode_id, row.sha256): row.stage
            for row in connection.execute(held.where(quarantine.c.episode_id.in_(some)))
        }
        for name in committed.keys() | stages.keys():
            if name in found:
                row = committed.get(name)
                member = row is not None and row.added is not None
                robot = None if row is None else row.robot_id
                found[name] = Standing(row is not None, member, stages.get(name), robot)
    return found
