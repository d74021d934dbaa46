"""What the service does with a robot's uploads: permit, receive, commit. Robot and cohort are those of its token."""

from __future__ import annotations

import asyncio
import re
import threading
import time
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from infra.crashpoints import crashpoint
from infra.edge.server import Status
from infra.errors import ConfigError, LwdError, StorageFullError, UnavailableError
from infra.ingest import Claim
from infra.objects import PresigningStore, incoming_key
from infra.service.answers import said
from infra.service.auth import Identity
from infra.service.backend import Backend
from infra.service.limits import Backpressure, LaterError, RobotLimits, over_rate
from infra.service.models import Offered, Outcome, Place, Problem, Uploaded
from infra.telemetry import metrics

PERMIT_S = 300.0  # how long an upload may take to begin, and a policy's download
_EPISODE_ID = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class _Permit:
    """That a robot may PUT so many bytes through the service, until a time of the monotonic clock."""

    size: int
    until: float


class Desk:
    """Handles uploads. Safe for threads.

    Args:
        backend: the catalog and the store.
        limits: what one robot may.
        backpressure: what all may.
        folder: where an upload through the service waits until it is whole; emptied here.
    """

    def __init__(self, backend: Backend, limits: RobotLimits, backpressure: Backpressure, folder: Path) -> None:
        self._backend = backend
        self._limits = limits
        self._backpressure = backpressure
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob("*.part"):
            leftover.unlink()
        self._presigning = hasattr(backend.objects, "presign_put")
        self._permits: dict[str, _Permit] = {}
        self._lock = threading.Lock()

    def offer(self, robot: Identity, offered: Sequence[Offered]) -> list[Place]:
        """Where each episode may be uploaded to.

        Raises:
            LaterError: the deployment is behind, or the robot over its rate.
        """
        places, claims = [Place() for _ in offered], dict[int, Claim]()
        for number, item in enumerate(offered):
            try:
                claims[number] = _claim(robot, item, {})
            except ConfigError as error:
                places[number].error = problem(error)
        wanted = []
        for number, status in zip(claims, self._backend.known(list(claims.values())), strict=True):
            places[number].status = status
            if status is None:
                wanted.append(number)
        if wanted:
            try:
                self._backpressure.check()
            except LaterError:
                metrics.THROTTLED.inc(robot=robot.robot_id, kind="backpressure")
                raise
        waits = []
        for number in wanted:
            wait = self._limits.upload(robot.robot_id, claims[number].size)
            if wait:
                waits.append(wait)
                metrics.THROTTLED.inc(robot=robot.robot_id, kind="quota")
                places[number].error = problem(over_rate(f"episodes of robot {robot.robot_id}", wait))
            else:
                places[number].key, places[number].url = self._permit(robot, claims[number])
        if wanted and len(waits) == len(wanted):
            raise over_rate(f"episodes of robot {robot.robot_id}", waits[0])
        return places

    def commit(self, robot: Identity, uploaded: Sequence[Uploaded]) -> list[Outcome]:
        """Verify and commit what was uploaded; see `Backend.commit`."""
        outcomes: list[Status | LwdError] = ["unknown"] * len(uploaded)
        claims: dict[int, tuple[Claim, str]] = {}
        for number, item in enumerate(uploaded):
            try:
                claims[number] = (_claim(robot, item, item.meta), _own_key(robot, item.episode_id, item.key))
            except ConfigError as error:
                outcomes[number] = error
        for number, outcome in zip(claims, self._backend.commit(list(claims.values())), strict=True):
            outcomes[number] = outcome
            if isinstance(outcome, UnavailableError | StorageFullError):
                self._backpressure.store_failed()
        crashpoint("service.committed")
        return [
            Outcome(error=problem(outcome)) if isinstance(outcome, LwdError) else Outcome(status=outcome)
            for outcome in outcomes
        ]

    def check_put(self, robot: Identity, key: str, length: int) -> None:
        """Whether a robot may PUT so many bytes to `key`, through the service.

        Raises:
            ConfigError: the key is not one of the robot's own, or not as many bytes were announced.
            UnavailableError: it was not permitted, or too long ago.
        """
        _own_key(robot, None, key)
        with self._lock:
            permit = self._permits.get(key)
        if permit is None or permit.until < time.monotonic():
            raise UnavailableError(f"no upload to {key} is permitted now", "ask for another place and send it there")
        if permit.size != length:
            raise ConfigError(
                f"the upload to {key} has {length} bytes, announced were {permit.size}", "announce what you send"
            )

    async def receive(self, stream: AsyncIterable[bytes], store: Callable[[Path], Awaitable[object]]) -> None:
        """Write a body, whose length the HTTP server sees to, to a file, and hand that to `store`.

        Raises:
            StorageFullError: no room for it.
            UnavailableError: it did not come whole in time.
        """
        part = self._folder / f"{uuid.uuid4().hex}.part"
        try:
            async with asyncio.timeout(PERMIT_S):
                with part.open("wb") as handle:
                    async for block in stream:
                        handle.write(block)
            await store(part)
        except TimeoutError as error:
            raise UnavailableError("the upload took too long", "send it again") from error
        except OSError as error:
            raise StorageFullError(f"no room for an upload ({error.strerror})", "free space on the service") from error
        finally:
            part.unlink(missing_ok=True)

    def put(self, key: str, path: Path) -> None:
        """Store a whole body. Raises as `ObjectStore.put`."""
        try:
            self._backend.objects.put(key, path)
        except (UnavailableError, StorageFullError):
            self._backpressure.store_failed()
            raise
        crashpoint("service.uploaded")

    def download(self, key: str) -> str | bytes:
        """A URL for `key`, where the store gives URLs; else its bytes. CorruptDataError if there is none."""
        if self._presigning:
            return cast(PresigningStore, self._backend.objects).presign_get(key, PERMIT_S)
        return self._backend.objects.get(key)

    def _permit(self, robot: Identity, claim: Claim) -> tuple[str, str]:
        key = incoming_key(robot.robot_id, claim.episode_id)
        if self._presigning:
            return key, cast(PresigningStore, self._backend.objects).presign_put(key, claim.size, PERMIT_S)
        now = time.monotonic()
        with self._lock:
            if len(self._permits) > 1024:
                self._permits = {name: permit for name, permit in self._permits.items() if permit.until >= now}
            self._permits[key] = _Permit(claim.size, now + PERMIT_S)
        return key, f"/v1/objects/{key}"


def problem(error: LwdError) -> Problem:
    """An error as an answer."""
    return Problem(**said(error))


def _claim(robot: Identity, item: Offered, meta: dict[str, object]) -> Claim:
    """What the robot says of an episode; ConfigError if it could lead out of the robot's area."""
    for name, pattern in (("episode_id", _EPISODE_ID), ("sha256", _SHA256)):
        value = getattr(item, name)
        if not pattern.fullmatch(value):
            digits = pattern.pattern.partition("{")[2].rstrip("}")
            raise ConfigError(f"{name} {value[:80]!r} is malformed", f"send {digits} lower-case hex digits")
    return Claim.read(robot.robot_id, item.episode_id, item.sha256, item.size, meta)


def _own_key(robot: Identity, episode_id: str | None, key: str) -> str:
    """`key`, if it is one that this robot was given, for this episode; ConfigError otherwise."""
    name = "[0-9a-f]{32}" if episode_id is None else re.escape(episode_id)
    if not re.fullmatch(rf"incoming/{re.escape(robot.robot_id)}/{name}-[0-9a-f]{{8}}\.tar", key):
        raise ConfigError(
            f"the key {key[:120]!r} is not robot {robot.robot_id}'s own for that episode",
            "upload to the place that the service names, and send its key",
        )
    return key
