"""A robot's server in the robot's own process: catalog and store at hand, the local profile."""

from __future__ import annotations

from collections.abc import Sequence

from infra.catalog import Catalog
from infra.edge.server import Heartbeat, Latency, RobotServer, Status, Upload
from infra.errors import ConfigError, LwdError
from infra.ingest import Claim
from infra.objects import ObjectStore, incoming_key
from infra.plane import open_catalog, open_objects
from infra.policy.announcement import Announcement
from infra.policy.channel import CatalogPolicySource
from infra.policy.permission import Permissions
from infra.service.backend import Backend
from infra.settings import Settings


class EmbeddedServer(RobotServer):
    """The port for one robot, without a service between.

    Args:
        catalog, objects: of the deployment.
        robot_id, cohort: whom it serves.
    """

    def __init__(self, catalog: Catalog, objects: ObjectStore, robot_id: str, cohort: str = "learning") -> None:
        self._robot_id = robot_id
        self._cohort = cohort
        self._backend = Backend(catalog, objects)
        self._policies = CatalogPolicySource(catalog, objects)

    @classmethod
    def open(cls, settings: Settings, robot_id: str, cohort: str) -> EmbeddedServer:
        """With the catalog and the store of the settings.

        Raises:
            ConfigError: the catalog is not of this version. UnavailableError: it does not answer.
        """
        return cls(open_catalog(settings), open_objects(settings), robot_id, cohort)

    def statuses(self, episodes: Sequence[tuple[str, str]]) -> list[Status]:
        return self._backend.statuses(episodes)

    def submit_many(self, uploads: Sequence[Upload]) -> list[Status | LwdError]:
        outcomes: list[Status | LwdError | None] = [None] * len(uploads)
        claims: dict[int, Claim] = {}
        for number, upload in enumerate(uploads):
            try:
                claims[number] = Claim.read(self._robot_id, upload.episode_id, upload.sha256, upload.size, upload.meta)
            except ConfigError as error:
                outcomes[number] = error
        placed: list[tuple[int, str]] = []
        for number, status in zip(claims, self._backend.known(list(claims.values())), strict=True):
            if status is not None:
                outcomes[number] = status
                continue
            key = incoming_key(self._robot_id, claims[number].episode_id)
            try:
                self._backend.objects.put(key, uploads[number].data)
            except LwdError as error:
                outcomes[number] = error
                continue
            placed.append((number, key))
        done = self._backend.commit([(claims[number], key) for number, key in placed])
        for (number, _), outcome in zip(placed, done, strict=True):
            outcomes[number] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        self._own(cohort)
        return self._policies.announcements(cohort, after)

    def permissions(self, cohort: str) -> Permissions:
        self._own(cohort)
        return self._policies.permissions(cohort)

    def fetch(self, key: str) -> bytes:
        return self._policies.fetch(key)

    def heartbeat(self, beat: Heartbeat) -> None:
        self._backend.heartbeat(self._robot_id, self._cohort, beat)

    def measure(self, name: Latency, version: int, since: float) -> None:
        self._backend.measure(self._robot_id, name, version, since)

    def close(self) -> None:
        self._backend.catalog.close()

    def _own(self, cohort: str) -> None:
        if cohort != self._cohort:
            raise ConfigError(f"robot {self._robot_id} is of cohort {self._cohort}, not {cohort}", "ask for its own")
