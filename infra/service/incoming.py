"""What robots may upload and have not committed: one permit for one digest and size, and a bounded sum for each robot.

An upload's key follows from robot, episode and digest, so that a permit that is used again overwrites its one object.
What a robot really holds is seen by listing its area of the store every now and then: a presigned URL may be used by
anybody who has it, as often as wanted, until it ends. What lies there without a permit, older than any URL, is deleted.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from infra.errors import LwdError
from infra.ingest import Claim
from infra.objects import ObjectStore, permitted_key

PERMIT_S = 300.0  # how long an upload may take to begin, and a policy's download
PERMITS_MAX = 256  # of one robot at a time
_LOOK_S = 30.0  # between two listings of one robot's area
_AREAS = 4096  # robots whose areas are kept in mind


@dataclass(frozen=True)
class Permit:
    """That a robot may upload one episode's bytes, until a time of the monotonic clock."""

    claim: Claim
    until: float
    begun: bool = False  # an upload


@dataclass
class _Area:
    permits: dict[str, Permit] = field(default_factory=dict)  # by key
    held: dict[str, int] = field(default_factory=dict)  # bytes by key, when it was last listed
    looked_at: float = float("-inf")

    def used(self, key: str) -> int:
        """Bytes that the robot holds, or may come to hold, beside those at `key`."""
        sizes = self.held | {name: permit.claim.size for name, permit in self.permits.items()}
        return sum(size for name, size in sizes.items() if name != key)


class Incoming:
    """The permits that this service has given. Safe for threads.

    Args:
        objects: the store.
        most_bytes: that one robot may hold there; a single larger episode passes where it holds nothing else.
    """

    def __init__(self, objects: ObjectStore, most_bytes: float) -> None:
        self._objects = objects
        self._most_bytes = most_bytes
        self._areas: OrderedDict[str, _Area] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, robot_id: str) -> None:
        """See what the robot's area holds, if it is time, and delete what nobody may commit any more."""
        with self._lock:
            area = self._area(robot_id)
            if time.monotonic() - area.looked_at < _LOOK_S:
                return
            area.looked_at = time.monotonic()
        with suppress(LwdError):  # a store that is away is told of elsewhere
            found = list(self._objects.list(f"incoming/{robot_id}"))
            with self._lock:
                permitted = set(area.permits)
            old = time.time() - 2 * PERMIT_S
            left = {item.key for item in found if item.modified < old and item.key not in permitted}
            for key in left:
                self._objects.delete(key)
            with self._lock:
                area.held = {item.key: item.size for item in found if item.key not in left}

    def grant(self, claim: Claim) -> str | None:
        """A permit for an episode, or its renewal; the key to upload to, None where the robot has no room."""
        key, now = permitted_key(claim.robot_id, claim.episode_id, claim.sha256), time.monotonic()
        with self._lock:
            area = self._area(claim.robot_id)
            area.permits = {name: permit for name, permit in area.permits.items() if permit.until >= now}
            others = area.used(key)
            full = len(area.permits | area.held) >= PERMITS_MAX and key not in area.permits
            if full or (others and others + claim.size > self._most_bytes):
                return None
            area.permits[key] = Permit(claim, now + PERMIT_S)
        return key

    def permit(self, robot_id: str, key: str) -> Permit | None:
        """The permit for an upload to `key`, while it lasts."""
        with self._lock:
            permit = self._areas.get(robot_id, _Area()).permits.get(key)
        return permit if permit is not None and permit.until >= time.monotonic() else None

    def begin(self, robot_id: str, key: str) -> bool:
        """An upload to a permitted key begins; whether it is the first: what the permit was asked for with."""
        with self._lock:
            permits = self._areas.get(robot_id, _Area()).permits
            permit = permits.get(key)
            if permit is not None:
                permits[key] = replace(permit, begun=True)
        return permit is not None and not permit.begun

    def open(self, robot_id: str) -> Sequence[Claim]:
        """The episodes for which the robot has permits."""
        with self._lock:
            return (
                [permit.claim for permit in self._areas[robot_id].permits.values()] if robot_id in self._areas else []
            )

    def done(self, claim: Claim) -> None:
        """The episode was committed or refused: its permit is used up, and its upload is gone."""
        key = permitted_key(claim.robot_id, claim.episode_id, claim.sha256)
        with self._lock:
            if (area := self._areas.get(claim.robot_id)) is not None:
                area.permits.pop(key, None)
                area.held.pop(key, None)

    def _area(self, robot_id: str) -> _Area:
        area = self._areas.setdefault(robot_id, _Area())
        self._areas.move_to_end(robot_id)
        while len(self._areas) > _AREAS:
            self._areas.popitem(last=False)
        return area
