"""What each request passes before a route sees it: the token, then the body; of a stranger's, nothing is read."""

from __future__ import annotations

import asyncio
from typing import Protocol

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.errors import LwdError
from infra.service import strict_json
from infra.service.answers import explain
from infra.service.auth import Identity
from infra.service.limits import LaterError, ThrottledError
from infra.service.wire import Connection

PRIVATE = "/v1/"  # below it nothing is answered without a token
OBJECTS = "/v1/objects/"  # whose bodies are no JSON
GUESS_S = 0.5


class Doorkeeper(Protocol):
    """Who knows the robots."""

    def remembers(self, headers: Headers) -> bool:
        """Whether `identify` answers at once, from memory."""

    def identify(self, headers: Headers, address: str) -> Identity:
        """The robot whose token the request has; raises an LwdError for the answer that it gets instead."""

    def look_again(self, age_s: float) -> None:
        """See `infra.service.auth.Tokens.look_again`."""


class Gate:
    """Authenticates, reads and judges bodies of JSON, and ends connections on which a body was not read.

    Args:
        app: what lies behind. keeper: who knows the robots.
    """

    def __init__(self, app: ASGIApp, keeper: Doorkeeper) -> None:
        self._app = app
        self._keeper = keeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        try:
            if scope["path"].startswith(PRIVATE):
                scope["state"]["robot"] = await self._identify(scope)
                if exchange.expects_body and not scope["path"].startswith(OBJECTS):
                    body = await exchange.read()
                    if body is None:
                        return  # it went
                    strict_json.check(body)
        except LwdError as error:
            exchange.is_last = True
            await explain(Request(scope), error)(scope, receive, exchange.send)
            return
        await self._app(scope, exchange.receive, exchange.send)

    async def _identify(self, scope: Scope) -> Identity:
        headers, client = Headers(scope=scope), HTTPConnection(scope).client
        address = client.host if client is not None else "?"
        connection: Connection | None = scope["state"].get("connection")
        try:
            if self._keeper.remembers(headers):
                robot = self._keeper.identify(headers, address)
            else:
                robot = await self._ask(headers, address)
        except LwdError as error:
            if connection is not None and not isinstance(error, LaterError):
                connection.door.identify(connection.guest, None)
            raise
        if connection is not None and not connection.door.identify(connection.guest, robot.robot_id):
            problem = f"robot {robot.robot_id} has too many requests at work"
            raise LaterError(problem, "wait for the answers; give each robot its own token", 429, 1.0)
        return robot

    async def _ask(self, headers: Headers, address: str) -> Identity:
        """Where too many guess, each waits, until one look at the catalog has told the new robots from all of them."""
        try:
            return await run_in_threadpool(self._keeper.identify, headers, address)
        except ThrottledError:
            await asyncio.sleep(GUESS_S)
            await run_in_threadpool(self._keeper.look_again, GUESS_S)
            return await run_in_threadpool(self._keeper.identify, headers, address)


class _Exchange:
    """One request and its answer: whether the body was read whole, and the body again for who comes next."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._body: bytes | None = None
        said = Headers(scope=scope).get("content-length", "0")
        self.expects_body = said.isdigit() and int(said) > 0
        self._unread = self.expects_body
        self.is_last = False  # the connection ends with the answer

    async def read(self) -> bytes | None:
        """The whole body, of which the head has said that it is short; None if the other side went."""
        blocks: list[bytes] = []
        while self._unread:
            message = await self.receive()
            if message["type"] != "http.request":
                return None
            blocks.append(message.get("body", b""))
        self._body = b"".join(blocks)
        return self._body

    async def receive(self) -> Message:
        """As ASGI's."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        """As ASGI's; an answer to a request that was not read whole is the connection's last."""
        if message["type"] == "http.response.start" and (self._unread or self.is_last):
            message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        await self._send(message)
