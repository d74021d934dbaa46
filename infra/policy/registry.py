"""Which policy is the champion: aliases, promotion, refusal, rollback. One transaction each, announcement included.

Aliases: `champion` is what production robots run, `canary` the candidate on trial, `previous` what a rollback goes
back to. Every decision is a row of the append-only `promotions` table; `at_snapshot` in its evidence is the data
snapshot that was current then, so that what came after it is told by version and not by time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from infra.catalog import Catalog, schema
from infra.catalog.dialect import now, upsert
from infra.crashpoints import crashpoint
from infra.errors import ConfigError, UntrustedPolicyError
from infra.policy.announcement import Kind
from infra.policy.approval import Approval, evidence_digest, verify_approval
from infra.policy.artifact import COHORTS
from infra.policy.card import ModelCard
from infra.policy.channel import CONTENT, announce
from infra.policy.keys import Signer
from infra.policy.permission import Reset, Validity
from infra.policy.permit import current_epoch, last_announced, permit
from infra.policy.refusals import overrule, refuse_if_refused
from infra.snapshots import current

Alias = Literal["champion", "canary", "previous"]
_FOLLOWERS = ("production", "canary")  # cohorts that run the champion; `canary` runs a candidate while there is one


@dataclass(frozen=True)
class Proposal:
    """A candidate that waits for a person: what was shown, and against which champion."""

    version: int
    artifact_sha256: str
    evidence: dict[str, Any]
    against: int | None
    proposer: str

    def approval(self, approver: str = "") -> Approval:
        """The approval of just this, unsigned."""
        return Approval(approver, self.version, self.artifact_sha256, evidence_digest(self.evidence), self.against)


class Registry:
    """The policies of one deployment.

    Args:
        catalog: where they are recorded.
        signer: signs the announcements, with a key that may promote; None on a machine that has none: it can look.
        approval: promotion needs the signed approval of a person other than the proposer.
        cards: folder for the model cards; None keeps them in the catalog only.
        keys_dir: where the people are enrolled who may approve.
        validity: how long what is announced may be run without a renewal.
    """

    def __init__(
        self,
        catalog: Catalog,
        signer: Signer | None,
        *,
        approval: bool = False,
        cards: Path | None = None,
        keys_dir: Path | None = None,
        validity: Validity | None = None,
    ) -> None:
        self._validity = validity or Validity()
        self._catalog = catalog
        self._signer = signer
        self._approval = approval
        self._cards = cards
        self._keys_dir = keys_dir

    @property
    def needs_approval(self) -> bool:
        """Whether a promotion needs a person's approval."""
        return self._approval

    def alias(self, name: Alias) -> int | None:
        """The version that an alias points at."""
        with self._catalog.read() as connection:
            return _alias(connection, name)

    def policies(self) -> list[dict[str, Any]]:
        """Every policy, newest first, with `aliases` (list of names) beside the columns of the table."""
        with self._catalog.read() as connection:
            aliases = connection.execute(sa.select(schema.aliases.c.name, schema.aliases.c.version)).all()
            rows = connection.execute(sa.select(schema.policies).order_by(schema.policies.c.version.desc())).mappings()
            return [dict(row) | {"aliases": [name for name, version in aliases if version == row["version"]]}
                    for row in rows]  # fmt: skip

    def history(self) -> list[dict[str, Any]]:
        """Every decision, oldest first."""
        with self._catalog.read() as connection:
            rows = connection.execute(sa.select(schema.promotions).order_by(schema.promotions.c.id)).mappings()
            return [dict(row) for row in rows]

    def require_promotable(self, version: int) -> None:
        """Raise ConfigError where a policy could not be promoted whatever is shown of it.

        There is no such policy, it was refused, also by a robot, or it is not newer than the champion.
        """
        with self._catalog.read() as connection:
            self._promotable(connection, version)

    def register_candidate(self, version: int, *, proposer: str) -> None:
        """Put a published policy on trial: alias `canary`, announced to the canary cohort. Repeated, it does nothing.

        Raises:
            ConfigError: there is no such policy, it was refused, also by a robot, it is not newer than the champion, or
                another one is on trial.
        """
        with self._catalog.begin() as connection:
            policy = self._promotable(connection, version)
            on_trial = _alias(connection, "canary")
            if on_trial == version:
                return
            if on_trial is not None:
                raise ConfigError(f"policy {on_trial} is on trial", "end it first: `lwd canary --stop`")
            _point(connection, "canary", version)
            self._record(connection, "canary", policy, _alias(connection, "champion"), {}, proposer, None)
            crashpoint("registry.candidate_registered")
            self._announce(connection, ("canary",), policy, "publish")

    def end_trial(
        self,
        version: int,
        evidence: Mapping[str, Any],
        *,
        decision: Literal["refuse", "withdraw"],
        proposer: str = "canary",
    ) -> bool:
        """Send the canary robots back to the champion; False if `version` is not on trial (any more).

        Args:
            decision: `refuse` is for good; `withdraw` leaves the policy a candidate.
        """
        with self._catalog.begin() as connection:
            if _alias(connection, "canary") != version:
                return False
            if decision == "refuse":
                _set_status(connection, version, "refused")
            policy, champion = _policy(connection, version), _alias(connection, "champion")
            self._record(connection, decision, policy, champion, dict(evidence), proposer, None)
            self._recall(connection, champion)
        return True

    def pass_trial(self, version: int, evidence: Mapping[str, Any], *, proposer: str = "canary") -> bool:
        """Record that a trial went well, once; the policy stays on trial until it is promoted or refused.

        False if `version` is not on trial.
        """
        table = schema.promotions
        with self._catalog.begin() as connection:
            if _alias(connection, "canary") != version:
                return False
            last = sa.select(table.c.decision).where(table.c.version == version).order_by(table.c.id.desc()).limit(1)
            if connection.execute(last).scalar() != "safe":
                champion = _alias(connection, "champion")
                self._record(connection, "safe", _policy(connection, version), champion, dict(evidence), proposer, None)
        return True

    def promote(
        self,
        version: int,
        evidence: Mapping[str, Any],
        *,
        proposer: str = "gate",
        against: int | None = None,
        approval: Approval | None = None,
        known_failures: Sequence[str] = (),
        on_trial: bool = False,
    ) -> ModelCard:
        """Make a policy the champion and announce it to production.

        Args:
            version: the candidate.
            evidence: JSON values of the gate's decision; `per_task` goes into the card's table.
            proposer: who asks.
            against: the champion that the evidence compares with, if with any: evidence against an earlier one is none.
            approval: of a person; required where the deployment asks for it.
            known_failures: sentences for the card.
            on_trial: only if it is the policy on trial.

        Raises:
            ConfigError: no such policy, refused by the gate or by a robot, not newer than the champion, no longer on
                trial, compared with another champion than today's, or the approval is missing or the proposer's own.
            UntrustedPolicyError: the approval is nobody's, or of another artifact, evidence or champion.
        """
        with self._catalog.begin() as connection:
            policy = self._promotable(connection, version)
            champion = _alias(connection, "champion")
            if against is not None and against != champion:
                raise ConfigError(
                    f"the evidence compares policy {version} with policy {against}; the champion is {champion} now",
                    "compare it with today's champion: `lwd promote`",
                )
            self._check_approval(policy, evidence, champion, proposer, approval)
            if on_trial and _alias(connection, "canary") != version:
                raise ConfigError(f"policy {version} is not on trial", "its trial was ended; see `lwd policies`")
            card = ModelCard(
                version=version,
                artifact_sha256=policy.manifest_sha256,
                parent=policy.parent,
                snapshot_version=policy.snapshot_version,
                snapshot_digest=_snapshot_digest(connection, policy.snapshot_version),
                evidence=dict(evidence),
                proposer=proposer,
                approver=approval.approver if approval else None,
                rollback_target=champion,
                promoted_at=now(connection),
                known_failures=tuple(known_failures),
            )
            if champion is not None:
                _point(connection, "previous", champion)
                _set_status(connection, champion, "retired")
            _point(connection, "champion", version)
            _drop(connection, "canary")
            _set_status(connection, version, "champion")
            said = {"card": card.as_dict()} | ({"approval": asdict(approval)} if approval else {})
            self._record(connection, "promote", policy, champion, said, proposer, card.approver)
            crashpoint("registry.promoted")
            self._announce(connection, _FOLLOWERS, policy, "promote")
            permit(connection, self._key(), self._validity)
        crashpoint("registry.promotion_announced")
        if self._cards is not None:
            card.write(self._cards)
        return card

    def propose(self, version: int, evidence: Mapping[str, Any], *, against: int | None, proposer: str = "gate") -> str:
        """Record that a candidate may be promoted once a person approves; the evidence's digest. Repeated, it is one.

        Args:
            against: the champion that the evidence compares with.

        Raises:
            ConfigError: no such policy, refused, or not newer than the champion.
        """
        digest = evidence_digest(evidence)
        with self._catalog.begin() as connection:
            policy = self._promotable(connection, version)
            known = _proposal(connection, version)
            if known is None or known.approval().evidence_sha256 != digest or known.against != against:
                self._record(connection, "propose", policy, against, {"evidence": dict(evidence)}, proposer, None)
        return digest

    def proposal(self, version: int) -> Proposal:
        """What was proposed of a policy last.

        Raises:
            ConfigError: nothing was, or it is no candidate any more.
        """
        with self._catalog.read() as connection:
            self._promotable(connection, version)
            found = _proposal(connection, version)
        if found is None:
            raise ConfigError(f"nobody proposed policy {version}", "ask the gate first: `lwd promote`")
        return found

    def refuse(self, version: int, evidence: Mapping[str, Any], *, proposer: str = "gate") -> None:
        """Refuse a candidate for good; canary robots that ran it are sent back to the champion.

        Raises:
            ConfigError: no such policy, or it is the champion (roll back instead).
        """
        with self._catalog.begin() as connection:
            policy = _policy(connection, version)
            champion = _alias(connection, "champion")
            if version == champion:
                raise ConfigError(f"policy {version} is the champion", "take it back with `lwd rollback`")
            _set_status(connection, version, "refused")
            self._record(connection, "refuse", policy, champion, dict(evidence), proposer, None)
            if _alias(connection, "canary") == version:
                self._recall(connection, champion)
            permit(connection, self._key(), self._validity)

    def overrule_refusals(self, version: int, *, actor: str, reason: str) -> list[str]:
        """Let a policy be promoted although robots refused it; the robots. Recorded in the audit.

        Raises:
            ConfigError: no such policy, or no robot refuses it.
        """
        with self._catalog.begin() as connection:
            policy = _policy(connection, version)
            robots = overrule(connection, version, actor)
            evidence = {"reason": reason, "robots": robots}
            self._record(connection, "overrule", policy, _alias(connection, "champion"), evidence, actor, None)
            permit(connection, self._key(), self._validity)
        return robots

    def reset(self, *, actor: str, reason: str) -> int:
        """Begin the announcements' numbers anew, by a signed reset; the new epoch.

        Robots that follow it take nothing that was signed before, and what each cohort is to run is announced again.
        """
        with self._catalog.begin() as connection:
            champion = _alias(connection, "champion")
            wanted = {cohort: self._still_wanted(connection, cohort, champion) for cohort in COHORTS}
            at = round(now(connection), 6)
            unsigned = Reset(current_epoch(connection) + 1, at)
            signature = self._key().sign(unsigned.statement())
            row = {"epoch": unsigned.epoch, "created_at": at, "signature": signature, "actor": actor, "reason": reason}
            connection.execute(sa.insert(schema.policy_epochs).values(row))
            for cohort, version in wanted.items():
                if version is not None:
                    self._announce(connection, (cohort,), _policy(connection, version), "rollback")
            permit(connection, self._key(), self._validity)
        return unsigned.epoch

    def _still_wanted(self, connection: sa.Connection, cohort: str, champion: int | None) -> int | None:
        said = last_announced(connection, cohort)
        if said is None or cohort == "production":
            return champion
        status = _policy(connection, said.version).status
        withdrawn = cohort == "canary" and said.version not in (champion, _alias(connection, "canary"))
        return champion if withdrawn or status in ("refused", "rolled back") else int(said.version)

    def rollback(self, *, actor: str, reason: str) -> int:
        """Make the previous champion the champion again, by signed rollback; returns its version.

        The alias `previous` then points at the champion before that one, or is gone.

        Raises:
            ConfigError: there is nothing to go back to.
        """
        with self._catalog.begin() as connection:
            champion, target = _alias(connection, "champion"), _alias(connection, "previous")
            if champion is None or target is None:
                raise ConfigError("there is no previous champion to roll back to", "promote another policy instead")
            policy = _policy(connection, target)
            earlier = connection.execute(
                sa.select(schema.promotions.c.from_version)
                .where(schema.promotions.c.version == target, schema.promotions.c.decision == "promote")
                .order_by(schema.promotions.c.id.desc())
                .limit(1)
            ).scalar()
            _point(connection, "champion", target)
            _set_status(connection, champion, "rolled back")
            _set_status(connection, target, "champion")
            if earlier is None:
                _drop(connection, "previous")
            else:
                _point(connection, "previous", earlier)
            _drop(connection, "canary")
            self._record(connection, "rollback", policy, champion, {"reason": reason}, actor, None)
            crashpoint("registry.rolled_back")
            self._announce(connection, _FOLLOWERS, policy, "rollback")
            permit(connection, self._key(), self._validity)
        return target

    def _check_approval(
        self, policy: Any, evidence: Mapping[str, Any], champion: int | None, proposer: str, approval: Approval | None
    ) -> None:
        if approval is None:
            if self._approval:
                raise ConfigError(
                    f"policy {policy.version} needs a person's approval",
                    f"an enrolled person other than {proposer} runs `lwd approve {policy.version}`",
                )
            return
        if self._keys_dir is None:
            raise ConfigError("nobody is enrolled who may approve", "enrol a person: `lwd keys enrol-person NAME FILE`")
        if approval.approver.casefold() == proposer.strip().casefold():
            raise ConfigError(f"{proposer} proposed policy {policy.version} and cannot approve it", "ask someone else")
        verify_approval(self._keys_dir, approval)
        wanted = Approval(
            approval.approver, policy.version, policy.manifest_sha256, evidence_digest(evidence), champion
        ).statement()
        for name, value in approval.statement().items():
            if value != wanted[name]:
                raise UntrustedPolicyError(
                    f"the approval of policy {policy.version} is of {name} {value!s:.16}, it is {wanted[name]!s:.16}",
                    "look at the policy and its evidence again, and approve what is there now",
                )

    def _promotable(self, connection: sa.Connection, version: int) -> Any:
        policy = _policy(connection, version)
        champion = _alias(connection, "champion")
        if policy.status in ("refused", "rolled back"):
            raise ConfigError(f"policy {version} was {policy.status}", "publish a new one")
        if (same := _refused_before(connection, policy)) is not None:
            raise ConfigError(
                f"policy {version} has the bytes of policy {same.version}, which was {same.status}",
                "publish one that was trained on",
            )
        refuse_if_refused(connection, version)
        if champion is not None and version <= champion:
            raise ConfigError(
                f"policy {version} is not newer than the champion, {champion}",
                "use `lwd rollback` to go back; robots refuse a lower version otherwise",
            )
        return policy

    def _recall(self, connection: sa.Connection, champion: int | None) -> None:
        """End the trial: the canary cohort runs the champion again, by signed rollback."""
        _drop(connection, "canary")
        crashpoint("registry.trial_ended")
        if champion is not None:
            self._announce(connection, ("canary",), _policy(connection, champion), "rollback")
        permit(connection, self._key(), self._validity)

    def _key(self) -> Signer:
        if self._signer is None:
            raise ConfigError(
                "this machine has no key that may promote", "decide where the deployment's keys/signing.pem is"
            )
        return self._signer

    def _announce(self, connection: sa.Connection, cohorts: Sequence[str], policy: Any, kind: Kind) -> None:
        for cohort in cohorts:
            if kind == "promote" and cohort == "canary" and _last_announced(connection, cohort) > policy.version:
                kind = "rollback"  # a newer candidate was on trial there: going back to the champion must be allowed
            announce(
                connection,
                self._key(),
                cohort=cohort,
                version=policy.version,
                kind=kind,
                manifest_sha256=policy.manifest_sha256,
                validity=self._validity,
            )

    def _record(
        self,
        connection: sa.Connection,
        decision: str,
        policy: Any,
        from_version: int | None,
        evidence: dict[str, Any],
        proposer: str,
        approver: str | None,
    ) -> None:
        connection.execute(
            sa.insert(schema.promotions).values(
                version=policy.version,
                from_version=from_version,
                decision=decision,
                evidence=evidence | {"at_snapshot": current(connection).version},
                proposer=proposer,
                approver=approver,
                artifact_sha256=policy.manifest_sha256,
                created_at=now(connection),
            )
        )


def _proposal(connection: sa.Connection, version: int) -> Proposal | None:
    table = schema.promotions
    row = connection.execute(
        sa.select(table)
        .where(table.c.version == version, table.c.decision == "propose")
        .order_by(table.c.id.desc())
        .limit(1)
    ).first()
    if row is None:
        return None
    return Proposal(version, row.artifact_sha256, dict(row.evidence["evidence"]), row.from_version, row.proposer)


def _policy(connection: sa.Connection, version: int) -> Any:
    row = connection.execute(sa.select(schema.policies).where(schema.policies.c.version == version)).first()
    if row is None:
        raise ConfigError(f"there is no policy {version}", "list them with `lwd policies`")
    return row


def _refused_before(connection: sa.Connection, policy: Any) -> Any | None:
    """The row of a policy with the same bytes that was refused or rolled back."""
    table, content = schema.policies, (policy.details or {}).get(CONTENT)
    gone = sa.select(table.c.version, table.c.status, table.c.details).where(
        table.c.status.in_(("refused", "rolled back")), table.c.version != policy.version
    )
    rows = connection.execute(gone.order_by(table.c.version))
    return next((row for row in rows if content is not None and (row.details or {}).get(CONTENT) == content), None)


def _alias(connection: sa.Connection, name: str) -> int | None:
    return connection.execute(sa.select(schema.aliases.c.version).where(schema.aliases.c.name == name)).scalar()


def _last_announced(connection: sa.Connection, cohort: str) -> int:
    said = last_announced(connection, cohort)
    return 0 if said is None else int(said.version)


def _point(connection: sa.Connection, name: str, version: int) -> None:
    upsert(connection, schema.aliases, {"name": name, "version": version, "updated_at": now(connection)})


def _drop(connection: sa.Connection, name: str) -> None:
    connection.execute(sa.delete(schema.aliases).where(schema.aliases.c.name == name))


def _set_status(connection: sa.Connection, version: int, status: str) -> None:
    connection.execute(sa.update(schema.policies).where(schema.policies.c.version == version).values(status=status))


def _snapshot_digest(connection: sa.Connection, version: int) -> str | None:
    return connection.execute(
        sa.select(schema.snapshots.c.digest).where(schema.snapshots.c.version == version)
    ).scalar()
