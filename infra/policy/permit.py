"""The server's side of permissions: which policies each cohort may run, signed again before the permission ends.

Two rows a cohort, renewed in place. What was refused, withdrawn or rolled back is not renewed, and neither is what a
robot refused; its robots return to the champion when the permission ends, whether or not they hear of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from infra.catalog.dialect import now, upsert
from infra.catalog.schema import aliases, announcements, policies, policy_epochs, policy_permissions
from infra.policy.artifact import COHORTS
from infra.policy.keys import Signer, signed_by
from infra.policy.permission import Permission, Permissions, Reset, Role, Validity
from infra.policy.refusals import refusals

RENEW_AT = 3  # a permission is renewed when this part of its time has passed: a third
_BACK_S = 60.0


def permit(
    connection: sa.Connection, signer: Signer, validity: Validity, *, cohorts: Sequence[str] = COHORTS
) -> list[Permission]:
    """Sign what is to be permitted and is not, or will not be for long, within the caller's write transaction.

    Returns the permissions that were signed.
    """
    at, epoch = now(connection), current_epoch(connection)
    known = {(row.cohort, row.role): row for row in connection.execute(sa.select(policy_permissions))}
    number = max((row.number for row in known.values()), default=0)
    signed = []
    champion = _policy(connection, _alias(connection, "champion"))
    for cohort in cohorts:
        wanted: tuple[tuple[Role, Any], ...] = (
            ("current", _current(connection, cohort, epoch)),
            ("champion", champion),
        )
        for role, policy in wanted:
            row = known.get((cohort, role))
            if policy is None:
                if row is not None and row.signature:
                    mine = (policy_permissions.c.cohort == cohort) & (policy_permissions.c.role == role)
                    connection.execute(sa.update(policy_permissions).where(mine).values(signature=""))
                continue
            seconds = validity.seconds(cohort, role)
            if row is not None and not _due(row, policy, epoch, at, seconds, signer):
                continue
            number += 1
            unsigned = Permission(
                number,
                epoch,
                cohort,
                role,
                policy.version,
                policy.manifest_sha256,
                round(at, 6),
                round(at + seconds, 6),
            )
            permission = Permission(**{**vars(unsigned), "signature": signer.sign(unsigned.statement())})
            upsert(connection, policy_permissions, vars(permission))
            signed.append(permission)
    return signed


def permissions_of(connection: sa.Connection, cohort: str) -> Permissions:
    """What a cohort's robots are told. Nothing is believed here: robots verify."""
    table = policy_permissions
    query = sa.select(table).where(table.c.cohort == cohort, table.c.signature != "").order_by(table.c.number)
    found = tuple(Permission(**row) for row in connection.execute(query).mappings())
    row = connection.execute(sa.select(policy_epochs).order_by(policy_epochs.c.epoch.desc()).limit(1)).first()
    return Permissions(found, None if row is None else Reset(row.epoch, row.created_at, row.signature))


def current_epoch(connection: sa.Connection) -> int:
    """Of the announcements that are made now; 0 before any reset."""
    return connection.execute(sa.select(sa.func.max(policy_epochs.c.epoch))).scalar() or 0


def last_announced(connection: sa.Connection, cohort: str) -> Any:
    """The row of a cohort's latest announcement, whatever its epoch; None before the first."""
    table = announcements
    order = (table.c.epoch.desc(), table.c.seq.desc())
    return connection.execute(sa.select(table).where(table.c.cohort == cohort).order_by(*order).limit(1)).first()


def _current(connection: sa.Connection, cohort: str, epoch: int) -> Any:
    """The policy that a cohort was told to run, if it still may."""
    said = last_announced(connection, cohort)
    if said is None or said.epoch != epoch:
        return None
    policy, champion = _policy(connection, said.version), _alias(connection, "champion")
    if policy is None or policy.version == champion:
        return policy
    if policy.status in ("refused", "rolled back") or refusals(connection, policy.version):
        return None
    on_trial = _alias(connection, "canary") == policy.version
    return policy if on_trial or cohort != "canary" else None


def _due(row: Any, policy: Any, epoch: int, at: float, seconds: float, signer: Signer) -> bool:
    same = (row.version, row.manifest_sha256, row.epoch) == (policy.version, policy.manifest_sha256, epoch)
    if not same or not row.signature or signed_by(row.signature) != signer.key_id:
        return True
    # Also where the time was set to more or less, or the clock went back: a permission of the future is not one of now.
    left = row.valid_until - at
    return not seconds * (1 - 1 / RENEW_AT) < left < seconds + 1 or at < row.issued_at - _BACK_S


def _alias(connection: sa.Connection, name: str) -> int | None:
    return connection.execute(sa.select(aliases.c.version).where(aliases.c.name == name)).scalar()


def _policy(connection: sa.Connection, version: int | None) -> Any:
    return connection.execute(sa.select(policies).where(policies.c.version == version)).first()
