"""Which cohort a robot is of: what its valid tokens say, or its own word where it has no token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import sqlalchemy as sa

from infra.catalog.dialect import now
from infra.catalog.schema import robot_tokens, robots


def cohorts(connection: sa.Connection, robot_id: str | None = None) -> dict[str, set[str]]:
    """The cohorts of each robot, or of one: none where no token of its is valid, several where it has such tokens."""
    seen, tokens = sa.select(robots.c.robot_id, robots.c.cohort), sa.select(robot_tokens)
    if robot_id is not None:
        seen, tokens = seen.where(robots.c.robot_id == robot_id), tokens.where(robot_tokens.c.robot_id == robot_id)
    enrolled: dict[str, set[str]] = defaultdict(set)
    at = now(connection)
    for row in connection.execute(tokens):
        enrolled[row.robot_id] |= {row.cohort} if row.revoked_at is None and row.expires_at > at else set()
    said = {str(row.robot_id): {str(row.cohort)} for row in connection.execute(seen)}
    return said | enrolled


def counts_for(found: Collection[str]) -> str:
    """The one cohort that a robot's episodes count for: `canary` if it is in that; '' of none or several others."""
    return "canary" if "canary" in found else next(iter(found)) if len(found) == 1 else ""


def cohort_now(connection: sa.Connection, robot_id: str) -> str | None:
    """`counts_for` of a robot; None while nothing is known of it."""
    found = cohorts(connection, robot_id).get(robot_id)
    return None if found is None else counts_for(found)
