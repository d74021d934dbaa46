"""What the service does with a robot's uploads: permit, receive, commit. Robot and cohort are those of its token."""

from __future__ import annotations

import asyncio
import errno
import re
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from infra.crashpoints import crashpoint
from infra.edge.server import Status
from infra.errors import ConfigError, LwdError, StorageFullError, UnavailableError
from infra.ingest import Claim
from infra.objects import OpeningStore, PresigningStore, permitted_key
from infra.service.answers import said
from infra.service.auth import Identity
from infra.service.backend import Backend
from infra.service.incoming import PERMIT_S, Incoming
from infra.service.limits import Backpressure, LaterError, RobotLimits, over_rate
from infra.service.models import Offered, Outcome, Place, Problem, Uploaded
from infra.telemetry import metrics

_NO_ROOM_S = 30.0  # for a robot that has uploaded too much and committed nothing
_EPISODE_ID = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Desk:
    """Handles uploads. Safe for threads.

    Args:
        backend: the catalog and the store.
        limits: what one robot may.
        backpressure: what all may.
        incoming: the permits.
        folder: where an upload through the service waits until it is whole; emptied here.
    """

    def __init__(
        self, backend: Backend, limits: RobotLimits, backpressure: Backpressure, incoming: Incoming, folder: Path
    ) -> None:
        self._backend = backend
        self._incoming = incoming
        self._limits = limits
        self._backpressure = backpressure
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob("*.part"):
            leftover.unlink()
        self._presigning = hasattr(backend.objects, "presign_put")

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
            self._incoming.look(robot.robot_id)
        waits = []
        for number in wanted:
            wait = self._limits.upload(robot.robot_id, claims[number].size)
            key = self._grant(claims[number]) if not wait else None
            if key is None:
                waits.append(wait or _NO_ROOM_S)
                metrics.THROTTLED.inc(robot=robot.robot_id, kind="quota" if wait else "incoming")
                places[number].error = problem(over_rate(f"episodes of robot {robot.robot_id}", waits[-1]))
            else:
                places[number].key, places[number].url = key, self._url(key, claims[number].size)
        if wanted and len(waits) == len(wanted):
            raise over_rate(f"episodes of robot {robot.robot_id}", waits[0])
        return places

    def commit(self, robot: Identity, uploaded: Sequence[Uploaded]) -> list[Outcome]:
        """Verify and commit what was uploaded; see `Backend.commit`."""
        outcomes: list[Status | LwdError] = ["unknown"] * len(uploaded)
        claims: dict[int, tuple[Claim, str]] = {}
        for number, item in enumerate(uploaded):
            try:
                claim = _claim(robot, item, item.meta)
                if item.key != permitted_key(claim.robot_id, claim.episode_id, claim.sha256):
                    raise _foreign(robot, item.key)
                claims[number] = (claim, item.key)
            except ConfigError as error:
                outcomes[number] = error
        for number, outcome in zip(claims, self._backend.commit(list(claims.values())), strict=True):
            outcomes[number] = outcome
            if isinstance(outcome, UnavailableError | StorageFullError):
                self._backpressure.store_failed()
            else:
                self._incoming.done(claims[number][0])
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
            LaterError: it was uploaded before, and once more is over the robot's rate.
        """
        if not re.fullmatch(rf"incoming/{re.escape(robot.robot_id)}/[0-9a-f]{{32}}-[0-9a-f]{{8}}\.tar", key):
            raise _foreign(robot, key)
        permit = self._incoming.permit(robot.robot_id, key)
        if permit is None or self._presigning:
            raise UnavailableError(f"no upload to {key} is permitted now", "ask for another place and send it there")
        if permit.claim.size != length:
            raise ConfigError(
                f"the upload to {key} has {length} bytes, announced were {permit.claim.size}",
                "announce what you send",
            )
        if not self._incoming.begin(robot.robot_id, key) and (wait := self._limits.upload(robot.robot_id, length)):
            metrics.THROTTLED.inc(robot=robot.robot_id, kind="quota")
            raise over_rate(f"uploads of robot {robot.robot_id}", wait)

    async def receive(
        self, stream: AsyncIterable[bytes], length: int, store: Callable[[Path], Awaitable[object]]
    ) -> None:
        """Write a body of `length` bytes to a file, and hand that to `store`.

        Raises:
            ConfigError: it has other bytes.
            StorageFullError: no room for it.
            UnavailableError: it did not come whole in time, or no file can be opened.
        """
        part = self._folder / f"{uuid.uuid4().hex}.part"
        try:
            async with asyncio.timeout(PERMIT_S):
                with part.open("wb") as handle:
                    left = length
                    async for block in stream:
                        left -= len(block)
                        if left < 0:
                            break
                        handle.write(block)
            if left:
                raise ConfigError(f"the upload has other than {length} bytes", "announce what you send")
            await store(part)
        except TimeoutError as error:
            raise UnavailableError("the upload took too long", "send it again") from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise UnavailableError("the service is short of file descriptors", "send it again") from error
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

    def download(self, key: str) -> str | BinaryIO:
        """A URL for `key`, where the store gives URLs; else the object, open. CorruptDataError if there is none."""
        if self._presigning:
            return cast(PresigningStore, self._backend.objects).presign_get(key, PERMIT_S)
        return cast(OpeningStore, self._backend.objects).open(key)

    def _grant(self, claim: Claim) -> str | None:
        """The key of a permit. Where there is no room, permits that were used at another service make some."""
        key = self._incoming.grant(claim)
        if key is None:
            claims = self._incoming.open(claim.robot_id)
            for other, status in zip(claims, self._backend.known(claims), strict=True):
                if status is not None:
                    self._incoming.done(other)
            key = self._incoming.grant(claim)
        return key

    def _url(self, key: str, size: int) -> str:
        if self._presigning:
            return cast(PresigningStore, self._backend.objects).presign_put(key, size, PERMIT_S)
        return f"/v1/objects/{key}"


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


def _foreign(robot: Identity, key: str) -> ConfigError:
    return ConfigError(
        f"the key {key[:120]!r} is not robot {robot.robot_id}'s own for that episode",
        "upload to the place that the service names, and send its key",
    )
