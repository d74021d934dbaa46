"""Policies that robots could not run: told with their heartbeats, kept once for each robot, in the way of promotion.

One robot is enough to stop a promotion until somebody has looked: a policy that ends one robot's control loop may end
them all. A robot that lies is overruled by an operator, by name and with a reason in the audit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from infra.catalog.dialect import insert_if_absent, now
from infra.catalog.schema import policies, policy_refusals
from infra.errors import ConfigError, shown

MAX_REASON = 300  # characters
MAX_REFUSALS = 32  # in one heartbeat
_MAX_OF_ROBOT = 1000


def record_refusals(connection: sa.Connection, robot_id: str, told: object) -> int:
    """Keep what a robot refuses, within the caller's write transaction; how many were new.

    Args:
        told: `[{"version": int, "reason": str}, …]`, as the robot says it: what is no such thing is left out.
    """
    kept = 0
    for version, reason in _readable(told):
        known = connection.execute(
            sa.select(policy_refusals.c.version).where(
                policy_refusals.c.version == version, policy_refusals.c.robot_id == robot_id
            )
        ).first()
        if known is not None or not _published(connection, version) or _count(connection, robot_id) >= _MAX_OF_ROBOT:
            continue
        row = {"version": version, "robot_id": robot_id, "reason": reason, "created_at": now(connection)}
        kept += insert_if_absent(connection, policy_refusals, row)
    return kept


def refusals(connection: sa.Connection, version: int) -> dict[str, str]:
    """The reasons of the robots that refuse a policy, by robot; without those that were overruled."""
    table = policy_refusals
    query = sa.select(table.c.robot_id, table.c.reason).where(
        table.c.version == version, table.c.overruled_by.is_(None)
    )
    return {
        row.robot_id: row.reason for row in connection.execute(query.order_by(table.c.created_at, table.c.robot_id))
    }


def refuse_if_refused(connection: sa.Connection, version: int) -> None:
    """Raise ConfigError where a robot refuses the policy."""
    found = refusals(connection, version)
    if found:
        robot, reason = next(iter(found.items()))
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ConfigError(
            f"policy {version} was refused by robot {robot}{others}: {reason}",
            f"publish another one; if the robot is wrong: `lwd overrule {version} --actor YOU --reason WHY`",
        )


def overrule(connection: sa.Connection, version: int, actor: str) -> list[str]:
    """Mark the refusals of a policy as of no account; the robots that had refused it.

    Raises:
        ConfigError: no robot refuses it.
    """
    found = sorted(refusals(connection, version))
    if not found:
        raise ConfigError(f"no robot refuses policy {version}", "see the column `refused by` of `lwd policies`")
    table = policy_refusals
    open_ones = (table.c.version == version) & table.c.overruled_by.is_(None)
    connection.execute(sa.update(table).where(open_ones).values(overruled_by=actor[:64]))
    return found


def _readable(told: object) -> Iterable[tuple[int, str]]:
    for item in told[:MAX_REFUSALS] if isinstance(told, list | tuple) else ():
        if not isinstance(item, Mapping):
            continue
        version, reason = item.get("version"), item.get("reason")
        if type(version) is int and 0 < version < 2**31 and isinstance(reason, str):
            yield version, shown(reason, MAX_REASON)


def _published(connection: sa.Connection, version: int) -> bool:
    return connection.execute(sa.select(policies.c.version).where(policies.c.version == version)).first() is not None


def _count(connection: sa.Connection, robot_id: str) -> Any:
    query = sa.select(sa.func.count()).select_from(policy_refusals).where(policy_refusals.c.robot_id == robot_id)
    return connection.execute(query).scalar_one()
