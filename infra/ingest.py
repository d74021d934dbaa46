"""Committing an episode: upload, verify from the store itself, move to its content address, commit and announce.

Embedded here; a service wraps the same class for robots elsewhere. Every call may be repeated after a crash or a lost
answer: one object, one row, one event.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.accounting import Standing, standings
from infra.catalog.cohorts import cohort_now
from infra.catalog.schema import episodes, outbox, quarantine
from infra.crashpoints import crashpoint
from infra.episode import SCHEMA_VERSION
from infra.errors import ConfigError, ConflictError, CorruptDataError, LwdError, named
from infra.events import announce
from infra.objects import ObjectStore, episode_key, incoming_key

Status = Literal["unknown", "committed", "snapshot", "quarantined"]
MAX_OBJECT_BYTES = 2 * 2**30
LATEST_CLOCK = 4102444800.0  # 2100-01-01, seconds since the epoch


@dataclass(frozen=True)
class Claim:
    """What a robot says of an episode that it hands in; made by `read`, which checks every value.

    Attributes:
        robot_id: who ran it; must be what the episode says.
        episode_id: 32 hex digits.
        sha256, size: of the object, as the robot computed them.
        schema_version: of the episode format.
        produced_at: the robot's clock when the episode was closed, seconds since the epoch; None if it does not say.
        trace_id: W3C traceparent, or any text of up to 64 characters.
    """

    robot_id: str
    episode_id: str
    sha256: str
    size: int
    schema_version: int
    produced_at: float | None
    trace_id: str

    @classmethod
    def read(cls, robot_id: str, episode_id: str, sha256: str, size: int, meta: Mapping[str, object]) -> Claim:
        """Check and build a claim.

        Args:
            meta: `schema_version`, `produced_at`, `trace_id`; each optional.

        Raises:
            ConfigError: a value is malformed; the message names it.
        """
        for name, value in (("robot_id", robot_id), ("episode_id", episode_id), ("sha256", sha256)):
            if not isinstance(value, str) or len(value) > 64:
                raise ConfigError(f"{name} is {named(value)}", "send text of up to 64 characters")
        incoming_key(robot_id, episode_id)
        episode_key(sha256)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_OBJECT_BYTES:
            raise ConfigError(f"episode {episode_id} of {named(size)} bytes", f"send at most {MAX_OBJECT_BYTES} bytes")
        fix = (
            "send schema_version (int), produced_at (seconds since the epoch), trace_id (up to 64 printable characters)"
        )
        if unknown := meta.keys() - {"schema_version", "produced_at", "trace_id"}:
            raise ConfigError(f"unknown meta field {named(min(unknown, key=str))}", fix)
        version, produced, trace = meta.get("schema_version"), meta.get("produced_at"), meta.get("trace_id")
        if version is None:
            version = SCHEMA_VERSION
        if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version < 2**31:
            raise ConfigError(f"meta field 'schema_version' is {named(version)}", fix)
        if produced is not None and not is_time(produced):
            raise ConfigError(f"meta field 'produced_at' is {named(produced)}", fix)
        if trace is not None and not (isinstance(trace, str) and 0 < len(trace) <= 64 and trace.isprintable()):
            raise ConfigError(f"meta field 'trace_id' is {named(trace)}", fix)
        at = None if produced is None else float(produced)
        return cls(robot_id, episode_id, sha256, size, version, at, trace or uuid.uuid4().hex)

    def row(self) -> dict[str, Any]:
        """The columns that the tables `episodes` and `outbox` share."""
        names = ("episode_id", "robot_id", "sha256", "size", "schema_version", "trace_id")
        return {name: getattr(self, name) for name in names} | {"key": episode_key(self.sha256)}


def is_time(value: object) -> TypeGuard[int | float]:
    """A wall clock's time between 1970 and 2100: beyond it, nothing that computes with times can be relied on."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LATEST_CLOCK


class Ingest:
    """Takes finished episodes from robots.

    Args:
        catalog: where they are committed.
        objects: where their bytes go.
    """

    def __init__(self, catalog: Catalog, objects: ObjectStore) -> None:
        self._catalog = catalog
        self._objects = objects

    def submit(
        self,
        robot_id: str,
        episode_id: str,
        data: bytes | Path,
        sha256: str,
        size: int,
        meta: Mapping[str, object] | None = None,
    ) -> Status:
        """Store and commit one episode; on return it is durable, whatever dies next.

        Args:
            data: the object's bytes, or the file that holds them.
            robot_id, episode_id, sha256, size, meta: see `Claim`.

        Returns:
            Its status now: `committed`, or further if it was known already.

        Raises:
            ConfigError: an id, digest or meta value is malformed; nothing was stored.
            CorruptDataError: what the store holds is not what was announced; submit again.
            ConflictError: the id belongs to other bytes, or to another robot. Other bytes are kept in quarantine.
            StorageFullError, UnavailableError: nothing was acknowledged; submit again later.
        """
        claim = Claim.read(robot_id, episode_id, sha256, size, meta or {})
        if (known := self.known(claim)) is not None:
            return known
        incoming = incoming_key(robot_id, episode_id)
        self._objects.put(incoming, data)
        crashpoint("ingest.uploaded")
        return self.commit(claim, incoming)

    def known(self, claim: Claim) -> Status | None:
        """The claim's status if the server has the same robot's same bytes already, else None: upload them."""
        with self._catalog.read() as connection:
            standing = standings(connection, [(claim.episode_id, claim.sha256)])[claim.episode_id, claim.sha256]
        found = status_of(standing)
        return None if found == "unknown" or standing.robot_id != claim.robot_id else found

    def commit(self, claim: Claim, incoming: str) -> Status:
        """Verify what was uploaded to `incoming`, move it to its content address, and commit it.

        Returns and raises as `submit`. The upload is gone afterwards, unless the store did not answer.
        """
        outcome = self.commit_many([(claim, incoming)])[0]
        if isinstance(outcome, LwdError):
            raise outcome
        return outcome

    def commit_many(self, uploads: Sequence[tuple[Claim, str]]) -> list[Status | LwdError]:
        """The same for several, in one transaction; each one's status, or the error that `submit` would raise.

        Raises:
            UnavailableError, StorageFullError: the catalog did not commit; none was acknowledged.
        """
        outcomes: list[Status | LwdError] = [
            self._accept(claim, incoming) or "committed" for claim, incoming in uploads
        ]
        crashpoint("ingest.stored")
        stored = [number for number, outcome in enumerate(outcomes) if not isinstance(outcome, LwdError)]
        if not stored:
            return outcomes
        with self._catalog.begin() as connection:
            cohorts = _cohorts(connection, [uploads[number][0] for number in stored])
            for number in stored:
                claim = uploads[number][0]
                conflict = self._insert(connection, claim, cohorts)
                outcomes[number] = conflict or _status(connection, claim.episode_id, claim.sha256)
        crashpoint("ingest.committed")
        return outcomes

    def record(self, claims: Sequence[Claim]) -> list[ConflictError | None]:
        """Commit and announce, in one transaction, episodes that lie verified at their content addresses already.

        Returns the conflict of each one whose id belongs to other bytes or to another robot, else None.
        """
        with self._catalog.begin() as connection:
            cohorts = _cohorts(connection, claims)
            return [self._insert(connection, claim, cohorts) for claim in claims]

    def status(self, episode_id: str, sha256: str | None = None) -> Status:
        """How far an episode is. A spool may delete it at `snapshot` or `quarantined`, and sends it again at `unknown`.

        Args:
            episode_id: which.
            sha256: of the spool's own copy: tells it from another robot's, or an altered, copy under the same id.
        """
        with self._catalog.read() as connection:
            return _status(connection, episode_id, sha256)

    def release(self, episode_id: str, sha256: str) -> None:
        """Send an episode from quarantine through the checks again, after a contract or a check was mended.

        Raises:
            ConfigError: it is not in quarantine, or was removed from a snapshot (that is for good).
        """
        with self._catalog.begin() as connection:
            held = connection.execute(
                sa.select(quarantine.c.version).where(
                    quarantine.c.episode_id == episode_id, quarantine.c.sha256 == sha256
                )
            ).first()
            query = sa.select(episodes).where(episodes.c.episode_id == episode_id, episodes.c.sha256 == sha256)
            episode = connection.execute(query).first()
            if held is None or held.version is not None or episode is None:
                raise ConfigError(
                    f"episode {episode_id} ({sha256[:8]}…) cannot be released from quarantine",
                    "release only what the coordinator refused; collect anew what was in a snapshot or in conflict",
                )
            _clear(connection, episode_id, sha256)
            row = {name: value for name, value in episode._mapping.items() if name in outbox.c}
            announce(connection, **row)

    def _accept(self, claim: Claim, incoming: str) -> LwdError | None:
        """Bring the upload to its content address; the error if it cannot be."""
        try:
            self._objects.accept(incoming, claim.sha256, claim.size)
            crashpoint("ingest.accepted")
            self._objects.delete(incoming)
        except CorruptDataError as error:
            self._objects.delete(incoming)
            return CorruptDataError(f"episode {claim.episode_id} of {claim.robot_id}: {error.problem}", error.fix)
        except LwdError as error:
            return error
        return None

    def _insert(
        self, connection: sa.Connection, claim: Claim, cohorts: Mapping[str, str | None]
    ) -> ConflictError | None:
        """Within a write transaction: the episode's row and its announcement, or the conflict that forbids them."""
        at = dialect.now(connection)
        row = claim.row()
        produced = at if claim.produced_at is None else claim.produced_at
        told = {"produced_at": produced, "committed_at": at, "cohort": cohorts[claim.robot_id]}
        new = dialect.insert_if_absent(connection, episodes, row | told)
        crashpoint("ingest.episode_inserted")
        conflict = None if new else self._known(connection, row)
        if new or (conflict is None and _wanted_again(connection, claim.episode_id, claim.sha256)):
            announce(connection, **row)
        crashpoint("ingest.announced")
        return conflict

    def _known(self, connection: sa.Connection, row: dict[str, Any]) -> ConflictError | None:
        """The conflict between `row` and the episode that has its id, recorded in quarantine."""
        owner = connection.execute(sa.select(episodes).where(episodes.c.episode_id == row["episode_id"])).one()
        if owner.sha256 == row["sha256"]:
            if owner.robot_id == row["robot_id"]:
                return None
            return ConflictError(
                f"episode {row['episode_id']} belongs to robot {owner.robot_id}, not to {row['robot_id']}",
                "give each robot its own spool; ids are random and never shared",
            )
        message = f"the id was committed with sha256 {owner.sha256} by {owner.robot_id}"
        values = {
            **{name: row[name] for name in ("episode_id", "sha256", "robot_id", "key")},
            "stage": "conflict",
            "reasons": [{"rule": "one digest per id", "severity": "block", "message": message}],
            "created_at": dialect.now(connection),
        }
        dialect.insert_if_absent(connection, quarantine, values)
        return ConflictError(
            f"episode {row['episode_id']}: {message}; the copy with {row['sha256']} is in quarantine",
            "never change an episode after it is closed: record a new one with an id of its own",
        )


def _cohorts(connection: sa.Connection, claims: Sequence[Claim]) -> dict[str, str | None]:
    """Whose the claims are, and what each robot's episodes count for: asked once for each robot, not each episode."""
    return {robot: cohort_now(connection, robot) for robot in {claim.robot_id for claim in claims}}


def status_of(standing: Standing) -> Status:
    """What a spool is told of an episode. One whose object the store lost is wanted again: unknown."""
    if standing.stage is not None:
        return "unknown" if standing.stage == "store" else "quarantined"
    if not standing.committed:
        return "unknown"
    return "snapshot" if standing.member else "committed"


def _status(connection: sa.Connection, episode_id: str, sha256: str | None) -> Status:
    if sha256 is None:
        sha256 = connection.execute(sa.select(episodes.c.sha256).where(episodes.c.episode_id == episode_id)).scalar()
    if sha256 is None:
        return "unknown"
    return status_of(standings(connection, [(episode_id, sha256)])[episode_id, sha256])


def _wanted_again(connection: sa.Connection, episode_id: str, sha256: str) -> bool:
    """Whether the object had been lost from the store; it is back now, so the quarantine row goes."""
    stage = connection.execute(
        sa.select(quarantine.c.stage).where(quarantine.c.episode_id == episode_id, quarantine.c.sha256 == sha256)
    ).scalar()
    if stage != "store":
        return False
    _clear(connection, episode_id, sha256)
    return True


def _clear(connection: sa.Connection, episode_id: str, sha256: str) -> None:
    connection.execute(quarantine.delete().where(quarantine.c.episode_id == episode_id, quarantine.c.sha256 == sha256))
