"""Requests and answers, as OpenAPI shows them. What one episode says is judged apart from what the others say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from infra.edge.server import MAX_BATCH, Heartbeat, Latency, Status
from infra.policy.permission import Role


class _Asked(BaseModel):
    """What a robot sends. Its JSON's numbers are numbers: text that pydantic would take for one, of thousands of digits
    or `nan`, was never seen by `strict_json`."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


_INT = 2**31 - 1
_Version = Annotated[int, Field(ge=1, le=_INT)]
_Word = Annotated[str, StringConstraints(max_length=256)]


class Problem(BaseModel):
    """Why something was not done, and what to do about it."""

    kind: str = Field(description="ConfigError, CorruptDataError, ConflictError, StorageFullError, UnavailableError, …")
    problem: str
    fix: str


class Offered(_Asked):
    """An episode that a robot would hand in."""

    episode_id: _Word
    sha256: _Word
    size: int = Field(description="bytes of the object")


class Offer(_Asked):
    episodes: list[Offered] = Field(min_length=1, max_length=MAX_BATCH)


class Place(BaseModel):
    """Where to PUT an episode: `key` and `url`; or its `status` if it is known; or the `error` that forbids it."""

    key: str | None = None
    url: str | None = Field(
        None,
        description="for one PUT, soon; relative to the service, and then with the token, where the store has none",
    )
    status: Status | None = None
    error: Problem | None = None


class Places(BaseModel):
    episodes: list[Place] = Field(description="in the order of the request")


class Uploaded(Offered):
    """An episode that a robot has uploaded to `key`."""

    key: Annotated[str, StringConstraints(max_length=1024)]
    meta: dict[str, Any] = Field(default_factory=dict, description="schema_version, produced_at, trace_id")


class Commit(_Asked):
    episodes: list[Uploaded] = Field(min_length=1, max_length=MAX_BATCH)


class Outcome(BaseModel):
    """`status`: the episode is durable, whatever dies next. Or the `error` that kept it."""

    status: Status | None = None
    error: Problem | None = None


class Outcomes(BaseModel):
    episodes: list[Outcome] = Field(description="in the order of the request")


class Named(_Asked):
    episode_id: _Word
    sha256: _Word


class Question(_Asked):
    episodes: list[Named] = Field(min_length=1, max_length=MAX_BATCH)


class Statuses(BaseModel):
    statuses: list[Status] = Field(description="in the order of the request")


class Announced(BaseModel):
    """See `infra.policy.announcement.Announcement`; a robot believes its signature alone."""

    seq: int
    cohort: str
    version: int
    kind: Literal["publish", "promote", "rollback"]
    manifest_sha256: str
    created_at: float
    signature: str
    epoch: int = 0


class Announcements(BaseModel):
    announcements: list[Announced] = Field(description="beyond `after`, in order")
    more: bool = Field(description="there are further ones: ask again")


class Permitted(BaseModel):
    """See `infra.policy.permission.Permission`; a robot believes its signature alone."""

    number: int
    epoch: int
    cohort: str
    role: Role
    version: int
    manifest_sha256: str
    issued_at: float
    valid_until: float
    signature: str


class Begun(BaseModel):
    """See `infra.policy.permission.Reset`."""

    epoch: int
    created_at: float
    signature: str


class Permits(BaseModel):
    permissions: list[Permitted] = Field(description="what the token's cohort may run, at most one of each role")
    reset: Begun | None = Field(None, description="the latest; numbers of announcements begin anew with it")


class Refusal(_Asked):
    """A policy that a robot could not run."""

    version: _Version
    reason: Annotated[str, StringConstraints(max_length=300)]


class Details(_Asked):
    """What a robot says of itself; what a newer robot says besides is left out."""

    pid: int | None = None
    tasks: Annotated[list[_Word], Field(max_length=64)] = []
    refused: Annotated[str, StringConstraints(max_length=2000)] | None = None
    spool_bytes: int | None = Field(None, ge=0)
    spool_limit: int | None = Field(None, ge=0)
    spool_episodes: int | None = Field(None, ge=0)
    ended: bool = False
    help: Annotated[str, StringConstraints(max_length=300)] | None = None
    safety: Annotated[dict[_Word, Annotated[int, Field(ge=0, le=_INT)]], Field(max_length=32)] = {}
    hold: bool = False
    permitted_until: float | None = None
    refusals: Annotated[list[Refusal], Field(max_length=32)] = []


class Beat(_Asked):
    active_version: _Version | None = None
    staged_version: _Version | None = None
    episodes: int = Field(ge=0, le=_INT)
    details: Details = Details()

    def heartbeat(self) -> Heartbeat:
        details = self.details.model_dump()
        return Heartbeat(self.active_version, self.staged_version, self.episodes, details)


class Measured(_Asked):
    name: Latency
    version: _Version
    since: float = Field(description="a time of the catalog's clock, seconds since the epoch")


class Health(BaseModel):
    catalog: bool
    store: bool
    descriptors: bool | None = Field(None, description="false while the service is short of file descriptors")
