"""The service's routes. Blocking work runs in threads; errors are answered as {kind, problem, fix}."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response, Security
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from infra.catalog import Catalog
from infra.edge.server import RefusedError
from infra.errors import CorruptDataError
from infra.objects import ObjectStore
from infra.service import observe
from infra.service.answers import ForeignError, answer, install
from infra.service.auth import TOKEN, EndedError, Identity, Tokens
from infra.service.backend import Backend
from infra.service.desk import Desk
from infra.service.gate import Gate
from infra.service.incoming import Incoming
from infra.service.limits import Backpressure, LaterError, RobotLimits, Strangers
from infra.service.models import (
    Announced,
    Announcements,
    Beat,
    Commit,
    Health,
    Measured,
    Offer,
    Outcomes,
    Permits,
    Places,
    Problem,
    Question,
    Statuses,
    Uploaded,
)
from infra.service.wire import Connection
from infra.settings import MIB, Settings
from infra.telemetry import metrics

UNSETTLED_MAX = 2000
_VERIFIERS = 4  # commits at work; each reads its episodes back from the store
_BLOCK = 2**17
_COMMITS_MAX = 64  # commits at work or waiting for one
_log = logging.getLogger("lwd.service")


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings, catalog: Catalog, objects: ObjectStore, unsettled_max: int) -> None:
        self.backend = Backend(catalog, objects)
        self._tokens = Tokens(catalog)
        self._strangers = Strangers()
        self.limits = RobotLimits(settings.robot_episodes_per_min, settings.robot_mib_per_min)
        backpressure = Backpressure(catalog, unsettled_max)
        incoming = Incoming(objects, settings.robot_incoming_mib * MIB)
        self.desk = Desk(self.backend, self.limits, backpressure, incoming, settings.home / "service")
        self.verifiers = ThreadPoolExecutor(_VERIFIERS, "verify")
        self.commits = 0
        self._asking = threading.Lock()
        self._health: tuple[float, dict[str, bool]] = (float("-inf"), {})

    def health(self) -> dict[str, bool]:
        """As of now or a second ago, or while another asks, longer: who asks needs no token."""
        at, found = self._health
        if time.monotonic() - at > 1.0 and self._asking.acquire(blocking=not found):
            try:
                found = self.backend.health()
                self._health = (time.monotonic(), found)
            finally:
                self._asking.release()
        return found

    def remembers(self, headers: Headers) -> bool:
        """See `infra.service.gate.Doorkeeper`."""
        try:
            token = _token(headers)
            return not token or not TOKEN.fullmatch(token) or self._tokens.remembered(token) is not None
        except RefusedError:
            return True

    def look_again(self, age_s: float) -> None:
        """See `infra.service.gate.Doorkeeper`."""
        self._tokens.look_again(age_s)

    def identify(self, headers: Headers, address: str) -> Identity:
        """The robot that the token names; what it calls itself counts only as a check of its configuration.

        Raises:
            RefusedError, ForeignError, LaterError: it has no valid token, another's, or asks too much.
        """
        token = _token(headers)
        try:
            identity = self._tokens.verify(token, lambda: self._strangers.check(address))
        except LaterError:
            metrics.TOKENS_REFUSED.inc(kind="throttled")
            raise
        except RefusedError as error:
            ended = isinstance(error, EndedError)
            metrics.TOKENS_REFUSED.inc(kind="ended" if ended else "unknown" if token else "none")
            if token and not ended:
                self._strangers.failed(address)
            _log.warning("refused: %s", error.problem, extra={"fields": {"client": address}})
            raise
        said = (("LWD-Robot", identity.robot_id, "robot"), ("LWD-Cohort", identity.cohort, "cohort"))
        for name, own, what in said:
            if headers.get(name, own) != own:
                raise ForeignError(
                    f"the token is of {what} {own}, the request says {what} {headers[name][:64]!r}",
                    f"give each robot its own token, enrolled for its {what}",
                )
        self.limits.request(identity.robot_id)
        return identity


def _token(headers: Headers) -> str | None:
    """What the request shows as its token."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


_bearer = HTTPBearer(auto_error=False, description="a robot's token, from `lwd robots enrol`")


def _caller(
    request: Request,
    _token: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    _robot: Annotated[str | None, Header(alias="LWD-Robot", description="if given, must be the token's robot")] = None,
    _cohort: Annotated[
        str | None, Header(alias="LWD-Cohort", description="if given, must be the token's cohort")
    ] = None,
) -> Identity:
    """The robot that the token names, as the gate has found it before the body was read."""
    identity: Identity = request.state.robot
    return identity


Robot = Annotated[Identity, Depends(_caller)]
Shared = Annotated[Service, Depends(_service)]


_problems: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        401: "the token is missing, unknown, expired or revoked",
        403: "the token is another robot's or cohort's",
        413: "the body is too large",
        422: "the request is malformed",
        429: "over the robot's rate; see Retry-After",
        503: "catalog, store or coordinator are behind; see Retry-After",
    }.items()
}
v1 = APIRouter(prefix="/v1", responses=_problems)


@v1.post("/uploads", response_model_exclude_none=True)
def uploads(body: Offer, robot: Robot, service: Shared) -> Places:
    """Ask where finished episodes may be uploaded to. Those that are known already need no upload."""
    service.limits.named(robot.robot_id, len(body.episodes))
    began = time.monotonic()
    places = service.desk.offer(robot, body.episodes)
    granted, known = sum(place.url is not None for place in places), sum(place.status is not None for place in places)
    _say("uploads", robot, began, episodes=len(places), granted=granted, known=known)
    return Places(episodes=places)


@v1.put("/objects/{key:path}", status_code=201, response_class=Response)
async def put_object(key: str, request: Request, robot: Robot, service: Shared) -> Response:
    """Upload one episode, where the store gives no URLs of its own. Content-Length must be what was announced."""
    began, length = time.monotonic(), int(request.headers["content-length"])
    service.desk.check_put(robot, key, length)
    try:
        await service.desk.receive(
            request.stream(), length, lambda path: run_in_threadpool(service.desk.put, key, path)
        )
    except ClientDisconnect:
        return Response(status_code=400)
    _say("put", robot, began, bytes=length)
    return Response(status_code=201)


@v1.post("/episodes", response_model_exclude_none=True)
async def commit(body: Commit, robot: Robot, service: Shared) -> Outcomes:
    """Commit uploaded episodes. The service verifies them from the store itself; each one's answer is its own."""
    service.limits.named(robot.robot_id, len(body.episodes))
    if service.commits >= _COMMITS_MAX:
        raise LaterError("too many commits wait for the store", "try again", 503, 1.0)
    began = time.monotonic()
    service.commits += 1
    try:
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(service.verifiers, service.desk.commit, robot, body.episodes)
    finally:
        service.commits -= 1
    refused = [outcome.error.kind for outcome in outcomes if outcome.error is not None]
    _say("commit", robot, began, episodes=len(outcomes), bytes=_bytes(body.episodes), refused=refused)
    return Outcomes(episodes=outcomes)


@v1.post("/episodes/status")
def statuses(body: Question, robot: Robot, service: Shared) -> Statuses:
    """Where episodes with these bytes are. A spool may delete one at `snapshot` or `quarantined`."""
    service.limits.named(robot.robot_id, len(body.episodes))
    return Statuses(statuses=service.backend.statuses([(item.episode_id, item.sha256) for item in body.episodes]))


@v1.get("/announcements")
def announcements(robot: Robot, service: Shared, after: Annotated[int, Query(ge=0, lt=2**62)] = 0) -> Announcements:
    """What was announced to the token's cohort beyond position `after`, in order."""
    found, more = service.backend.announcements(robot.cohort, after)
    return Announcements(announcements=[Announced(**asdict(said)) for said in found], more=more)


@v1.get("/permissions")
def permissions(robot: Robot, service: Shared) -> Permits:
    """Until when the token's cohort may run which policies, and the latest reset of the announcements' numbers."""
    return Permits(**service.backend.permissions(robot.cohort).document())


_bytes_or_url: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "the object"},
    307: {"description": "a URL for it, soon; without the token"},
    404: {"model": Problem, "description": "there is no such object"},
}


@v1.get("/policies/objects/{digest}/{name}", response_class=Response, responses=_bytes_or_url)
def policy_object(digest: str, name: str, robot: Robot, service: Shared) -> Response:
    """A file of a published policy, by its manifest's digest."""
    began = time.monotonic()
    answer = _download(service, lambda: service.backend.policy_key(digest, name))
    _say("policy", robot, began, digest=digest[:16], file=name)
    return answer


@v1.get("/policies/bases/{sha256}", response_class=Response, responses=_bytes_or_url)
def policy_base(sha256: str, robot: Robot, service: Shared) -> Response:
    """The base that policies are bound to, by its digest."""
    began = time.monotonic()
    answer = _download(service, lambda: service.backend.base_key(sha256))
    _say("base", robot, began, digest=sha256[:16])
    return answer


@v1.post("/heartbeat", status_code=204)
def heartbeat(body: Beat, robot: Robot, service: Shared) -> None:
    """Tell that this robot lives."""
    service.limits.request(robot.robot_id, "heartbeats")
    service.backend.heartbeat(robot.robot_id, robot.cohort, body.heartbeat())


@v1.post("/measurements", status_code=204)
def measurements(body: Measured, robot: Robot, service: Shared) -> None:
    """Record how long ago a policy was announced that this robot has staged or activated now."""
    service.limits.request(robot.robot_id, "notes")
    service.backend.measure(robot.robot_id, body.name, body.version, body.since)


_health_router = APIRouter()


@_health_router.get(
    "/healthz",
    response_model_exclude_none=True,
    responses={503: {"model": Health, "description": "one does not answer, or descriptors are short"}},
)
def healthz(request: Request, service: Shared) -> Health:
    """Whether catalog and store answer. Needs no token."""
    connection: Connection | None = getattr(request.state, "connection", None)
    is_short = connection is not None and connection.door.is_short()
    found = Health(**service.health(), descriptors=False if is_short else None)
    if not (found.catalog and found.store) or is_short:
        return JSONResponse(found.model_dump(exclude_none=True), status_code=503)  # type: ignore[return-value]
    return found


def make_app(
    settings: Settings, catalog: Catalog, objects: ObjectStore, *, unsettled_max: int = UNSETTLED_MAX
) -> FastAPI:
    """The service.

    Args:
        settings: rates, and the home, where uploads wait.
        catalog, objects: of the deployment.
        unsettled_max: committed episodes that may wait for the coordinator before new ones are sent away.
    """
    service = Service(settings, catalog, objects, unsettled_max)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.verifiers.shutdown(wait=True)

    app = FastAPI(
        title="LWD ingest service", version="1", docs_url=None, redoc_url=None, lifespan=lifespan,
        redirect_slashes=False,  # to wherever the request's Host says
        description="Robots hand in episodes, follow policies and say that they live. Every call may be repeated.",
    )  # fmt: skip
    app.state.service = service
    app.include_router(v1)
    app.include_router(_health_router)
    install(app)
    app.add_middleware(Gate, keeper=service)
    observe.install(app, settings)
    return app


def _download(service: Service, key: Any) -> Response:
    try:
        found = service.desk.download(key())
    except CorruptDataError as error:
        return answer(404, error)
    headers = {"Cache-Control": "no-store"}
    if isinstance(found, str):
        return RedirectResponse(found, 307, headers)
    headers["Content-Length"] = str(os.fstat(found.fileno()).st_size)
    return StreamingResponse(_blocks(found), media_type="application/octet-stream", headers=headers)


def _blocks(source: BinaryIO) -> Iterator[bytes]:
    """The file's bytes, a block in memory at a time, whoever reads how slowly."""
    with source:
        while block := source.read(_BLOCK):
            yield block


def _bytes(episodes: list[Uploaded]) -> int:
    return sum(item.size for item in episodes)


def _say(message: str, robot: Identity, began: float, **fields: Any) -> None:
    milliseconds = round(1000 * (time.monotonic() - began), 1)
    _log.info(message, extra={"fields": {"robot": robot.robot_id, **fields, "ms": milliseconds}})
