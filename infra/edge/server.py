"""What a robot may ask of the server: one port for its episodes, its policies and its signs of life.

`infra.edge.remote` speaks to the ingest service; `infra.fleet.embedded` has catalog and store at hand. Both act for one
robot, whose name and cohort the robot cannot choose call by call, and every call may be repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args

from infra.errors import (
    ConfigError,
    ConflictError,
    CorruptDataError,
    LwdError,
    StorageFullError,
    UnavailableError,
    UntrustedPolicyError,
)
from infra.policy.announcement import Announcement
from infra.policy.permission import Permissions

Status = Literal["unknown", "committed", "snapshot", "quarantined"]
Latency = Literal["publish_to_staged_s", "publish_to_active_s"]
STATUSES: tuple[str, ...] = get_args(Status)
LATENCIES: tuple[str, ...] = get_args(Latency)
MAX_BATCH = 64  # episodes in one call
MAX_TEXT = 1000  # characters of an error that the other end tells


class RefusedError(UnavailableError):
    """The server does not accept this robot's credential: to the robot it is as if it were away."""


@dataclass(frozen=True)
class Upload:
    """A finished episode to hand in.

    Attributes:
        episode_id, sha256, size: of the object, as the robot computed them.
        data: its bytes, or the file that holds them.
        meta: `schema_version`, `produced_at`, `trace_id`; see `infra.ingest.Claim`.
    """

    episode_id: str
    sha256: str
    size: int
    data: bytes | Path
    meta: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Heartbeat:
    """What a robot says of itself.

    Attributes:
        active_version, staged_version: of its policies, where it has one.
        episodes: closed in all its lives.
        details: `pid`, `tasks`, `refused` (why it takes no policy), `spool_bytes`, `spool_limit`, `spool_episodes`,
            `ended` (its last word), `hold` (it may run no policy), `permitted_until`, `refusals` (policies that it
            found unfit: {version, reason}), `help` (why a person should look at it), `safety` (what its shield
            counted, by kind); each optional.
    """

    active_version: int | None
    staged_version: int | None
    episodes: int
    details: Mapping[str, object] = field(default_factory=dict)


class RobotServer(Protocol):
    """The port. Every method raises UnavailableError when the server does not answer or refuses the credential."""

    def statuses(self, episodes: Sequence[tuple[str, str]]) -> list[Status]:
        """Where the server holds the episodes with these (id, sha256); at most `MAX_BATCH`."""

    def submit_many(self, uploads: Sequence[Upload]) -> list[Status | LwdError]:
        """Hand in at most `MAX_BATCH` episodes; each one's status, or the error that kept it, the others unaffected.

        A status means that the episode is committed: durable, whatever dies next. Errors as `infra.ingest.Ingest`.
        """

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        """The cohort's announcements beyond position `after`, in order.

        Raises:
            ConfigError: it is not the cohort that this robot belongs to.
        """

    def permissions(self, cohort: str) -> Permissions:
        """Until when the cohort may run which policies, and the latest reset.

        Raises:
            ConfigError: it is not the cohort that this robot belongs to.
        """

    def fetch(self, key: str) -> bytes:
        """The bytes of a policy's object; CorruptDataError if there is none."""

    def heartbeat(self, beat: Heartbeat) -> None:
        """Tell that this robot lives."""

    def measure(self, name: Latency, version: int, since: float) -> None:
        """Record how long ago `since` was, by the catalog's clock, when a policy was staged or activated."""

    def close(self) -> None:
        """Give connections back."""

    def status(self, episode_id: str, sha256: str) -> Status:
        """`statuses` of one."""
        return self.statuses([(episode_id, sha256)])[0]

    def submit(self, upload: Upload) -> Status:
        """`submit_many` of one; raises its error."""
        outcome = self.submit_many([upload])[0]
        if isinstance(outcome, LwdError):
            raise outcome
        return outcome


# --- errors between the two ends --------------------------------------------------------------------------------------

_KINDS: dict[str, type[LwdError]] = {
    cls.__name__: cls
    for cls in (
        LwdError,
        ConfigError,
        CorruptDataError,
        ConflictError,
        StorageFullError,
        UntrustedPolicyError,
        UnavailableError,
        RefusedError,
    )
}


def to_wire(error: LwdError) -> dict[str, str]:
    """An error as {kind, problem, fix}; its kind is the nearest class that both ends know."""
    kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _KINDS)
    return {"kind": kind, "problem": error.problem, "fix": error.fix}


def from_wire(document: object) -> LwdError | None:
    """The error that `to_wire` described; None where the document is no such thing."""
    if not isinstance(document, dict):
        return None
    kind, problem, fix = (document.get(name) for name in ("kind", "problem", "fix"))
    if not isinstance(kind, str) or not isinstance(problem, str) or not isinstance(fix, str):
        return None
    return _KINDS.get(kind, LwdError)(problem[:MAX_TEXT], fix[:MAX_TEXT])
