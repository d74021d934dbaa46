"""What the server does for a robot, whichever way it asks: statuses, commits, announcements, signs of life.

The ingest service calls this for the robot that a token names; `infra.fleet.embedded` for the robot that it is part of.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.accounting import standings
from infra.catalog.schema import measurements, policies, robots
from infra.edge.server import LATENCIES, Heartbeat, Status
from infra.errors import ConfigError, CorruptDataError, LwdError
from infra.ingest import Claim, Ingest, status_of
from infra.objects import ObjectStore
from infra.policy.announcement import Announcement, base_key, bundle_prefix
from infra.policy.artifact import BASE
from infra.policy.channel import CatalogPolicySource
from infra.policy.permission import Permissions
from infra.policy.refusals import record_refusals
from infra.telemetry import milestones

PAGE = 1000  # announcements in one answer
_DIGEST = re.compile(r"^[0-9a-f]{64}$")
_FILE = re.compile(r"^[a-z0-9_]{1,64}\.(safetensors|json|sig)$")
_MAX_LATENCY_S = 30 * 86400.0
_MEASURED_MAX = 8  # of one name, robot and policy: a policy may be announced again


class Backend:
    """Serves robots from the catalog and the store. Safe for threads.

    Args:
        catalog, objects: of the deployment.
    """

    def __init__(self, catalog: Catalog, objects: ObjectStore) -> None:
        self.catalog = catalog
        self.objects = objects
        self._ingest = Ingest(catalog, objects)
        self._policies = CatalogPolicySource(catalog, objects)
        self._published: set[str] = set()  # manifest digests that were seen in the catalog

    def statuses(self, asked: Sequence[tuple[str, str]]) -> list[Status]:
        """`Ingest.status` of several (id, sha256), in one transaction."""
        with self.catalog.read() as connection:
            found = standings(connection, asked)
        return [status_of(found[name]) for name in asked]

    def known(self, claims: Sequence[Claim]) -> list[Status | None]:
        """`Ingest.known` of several, in one transaction."""
        with self.catalog.read() as connection:
            standing = standings(connection, [(claim.episode_id, claim.sha256) for claim in claims])
        found: list[Status | None] = []
        for claim in claims:
            known = standing[claim.episode_id, claim.sha256]
            status = status_of(known)
            found.append(None if status == "unknown" or known.robot_id != claim.robot_id else status)
        return found

    def commit(self, uploads: Sequence[tuple[Claim, str]]) -> list[Status | LwdError]:
        """Verify and commit what was uploaded to each key; a commit that is repeated gives the status it had given.

        Raises:
            UnavailableError, StorageFullError: the catalog did not commit; none was acknowledged.
        """
        began = time.time()
        known = self.known([claim for claim, _ in uploads])
        outcomes: list[Status | LwdError] = [status or "unknown" for status in known]
        fresh = [number for number, status in enumerate(known) if status is None]
        for number, (_, key) in enumerate(uploads):
            if known[number] is not None:
                with contextlib.suppress(LwdError):  # else a sweep removes it
                    self.objects.delete(key)
        for number, outcome in zip(fresh, self._ingest.commit_many([uploads[n] for n in fresh]), strict=True):
            outcomes[number] = outcome
        # The same commit, still at work for an answer that the robot did not wait for, took the upload away.
        gone = [number for number in fresh if isinstance(outcomes[number], CorruptDataError)]
        for number, status in zip(gone, self.known([uploads[n][0] for n in gone]), strict=True):
            if status is not None:
                outcomes[number] = status
        for (claim, _), outcome, before in zip(uploads, outcomes, known, strict=True):
            milestones.handed_in(claim, outcome, before is not None, claim.produced_at, began)
        return outcomes

    def announcements(self, cohort: str, after: int) -> tuple[list[Announcement], bool]:
        """The first `PAGE` of the cohort's announcements beyond position `after`, in order; whether there are more."""
        found = self._policies.announcements(cohort, after)
        return list(found[:PAGE]), len(found) > PAGE

    def permissions(self, cohort: str) -> Permissions:
        """Until when the cohort may run what, and the latest reset."""
        return self._policies.permissions(cohort)

    def policy_key(self, digest: str, name: str) -> str:
        """The store's key of a published policy's file.

        Raises:
            CorruptDataError: there is no such policy, or the name is not one of a policy's file.
        """
        if not _DIGEST.fullmatch(digest) or not _FILE.fullmatch(name) or not self._is_published(digest):
            raise CorruptDataError("there is no such object of a policy", "follow the announcements")
        return f"{bundle_prefix(digest)}/{name}"

    def base_key(self, sha256: str) -> str:
        """The store's key of a base; only a signed manifest tells its digest.

        Raises:
            CorruptDataError: that is no sha256.
        """
        if not _DIGEST.fullmatch(sha256):
            raise CorruptDataError(f"there is no such {BASE}", "ask for the digest that the policy's manifest names")
        return base_key(sha256)

    def heartbeat(self, robot_id: str, cohort: str, beat: Heartbeat) -> None:
        """Record a robot's sign of life, and the policies that it refuses."""
        with self.catalog.begin() as connection:
            row = {
                "robot_id": robot_id,
                "cohort": cohort,
                "active_version": beat.active_version,
                "staged_version": beat.staged_version,
                "last_seen": dialect.now(connection),
                "episodes": beat.episodes,
                "details": dict(beat.details),
            }
            dialect.upsert(connection, robots, row)
            record_refusals(connection, robot_id, beat.details.get("refusals"))

    def measure(self, robot_id: str, name: str, version: int, since: float) -> None:
        """Record how long ago `since` was; of one robot and policy no more than a few times, so that rows are bounded.

        Raises:
            ConfigError: an unknown name or policy, or no time of the catalog's clock.
        """
        with self.catalog.begin() as connection:
            at = dialect.now(connection)
            if name not in LATENCIES or not math.isfinite(since) or abs(at - since) > _MAX_LATENCY_S:
                raise ConfigError(
                    f"measurement {name!r} since {since!r}", f"send one of {', '.join(LATENCIES)} and a catalog's time"
                )
            if connection.execute(sa.select(policies.c.version).where(policies.c.version == version)).first() is None:
                raise ConfigError(f"there is no policy {version}", "measure what was announced")
            mine = (measurements.c.subject == robot_id, measurements.c.version == version, measurements.c.name == name)
            count = sa.select(sa.func.count()).select_from(measurements).where(*mine)
            if connection.execute(count).scalar_one() >= _MEASURED_MAX:
                return
            row = {"name": name, "subject": robot_id, "version": version, "value": at - since, "at": at}
            connection.execute(sa.insert(measurements).values(row))

    def health(self) -> dict[str, bool]:
        """Whether catalog and store answer."""

        def answers(work: Any) -> bool:
            try:
                work()
            except LwdError:
                return False
            return True

        return {"catalog": answers(self._look), "store": answers(lambda: self.objects.exists("incoming/health"))}

    def _look(self) -> None:
        with self.catalog.read() as connection:
            connection.execute(sa.select(1)).scalar_one()

    def _is_published(self, digest: str) -> bool:
        if digest not in self._published:
            with self.catalog.read() as connection:
                query = sa.select(policies.c.version).where(policies.c.manifest_sha256 == digest).limit(1)
                if connection.execute(query).first() is None:
                    return False
            self._published.add(digest)
        return True
