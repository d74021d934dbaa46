"""One connection of the service: uvicorn's, behind a head that was judged, a body that is counted, and deadlines.

The HTTP library sees one request at a time, and of its body the announced bytes and no more, when the application asks
for them. A request that is refused, or answered before its body was read, ends its connection: the answer is sent, what
still comes is thrown away for a moment, so that the other side can read it, and nothing is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from infra.edge.server import to_wire
from infra.errors import ConfigError, LwdError
from infra.service.door import MIN_BYTES_PER_S, Door, Guest
from infra.service.head import END, MAX_HEAD_BYTES, HeadError, read_head
from infra.telemetry import metrics

_LINGER_BYTES = 2**22


class _Transport:
    """The connection's transport, which counts what is written, and lingers where it is closed in mid-request."""

    def __init__(self, real: asyncio.Transport, connection: Connection) -> None:
        self._real = real
        self._connection = connection
        self.written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._real.write(data)

    def close(self) -> None:
        if self._connection.is_lingering or self._real.is_closing():
            return
        if self._connection.is_unfinished:
            self._connection.linger()
        else:
            self._real.close()

    def is_closing(self) -> bool:
        return self._connection.is_lingering or self._real.is_closing()


class Connection(H11Protocol):
    """See above. `scope["state"]["connection"]` is the request's.

    Args:
        config, server_state, app_state: as uvicorn's own.
        door, guest: who counts it, and as whom.
    """

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], door: Door, guest: Guest
    ) -> None:
        super().__init__(config, server_state, {**app_state, "connection": self})
        self.door, self.guest = door, guest
        self._head = bytearray()
        self._left = 0  # bytes of the request's body that have not come
        self._more = False  # something came after the request, before it was answered
        self._thrown_away = 0
        self._drained_before = 0

    # Of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._real, self._out = transport, _Transport(transport, self)
        super().connection_made(self._out)  # type: ignore[arg-type]
        self.guest.abort = transport.abort
        self.guest.enter("head")
        if self.guest.gone:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.door.leave(self.guest)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_lingering:
            self._thrown_away += len(data)
            if self._thrown_away > _LINGER_BYTES:
                self._real.abort()
        elif self.guest.stage in ("head", "idle"):
            self._take_head(data)
        else:
            self._take_body(data)

    # Of the request

    @property
    def is_lingering(self) -> bool:
        return self.guest.stage == "linger"

    @property
    def is_unfinished(self) -> bool:
        """Whether what the other side sends has not been read to its end."""
        return self._left > 0 or self._more

    def linger(self) -> None:
        """Say no more, and throw away what still comes, for a moment."""
        self.guest.enter("linger")
        if self._real.can_write_eof():
            self._real.write_eof()
        if self.flow is not None and self.flow.read_paused:
            self.flow.resume_reading()

    def shutdown(self) -> None:
        with contextlib.suppress(h11.LocalProtocolError):  # it is ended already
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """What the HTTP library finds malformed."""
        self._refuse(400, ConfigError("the request is malformed", "speak HTTP/1.1"))

    def on_response_complete(self) -> None:
        self._head.clear()
        if self.is_unfinished:
            self._out.close()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # the door has that deadline
        if not self._out.is_closing():
            self.guest.enter("idle")

    def look(self, seconds: float) -> None:
        """Count the time in which the other side could have sent or read more; every so many `seconds`.

        Who is ahead of the least rate begins anew: a burst buys no silence afterwards.
        """
        guest = self.guest
        if guest.stage == "body" and not self.flow.read_paused:
            guest.owed_s += seconds
            if guest.received >= guest.owed_s * MIN_BYTES_PER_S:
                guest.owed_s = guest.received = 0.0
        waiting = self._real.get_write_buffer_size()
        guest.unread_s += seconds
        guest.drained = self._out.written - waiting - self._drained_before
        if not waiting or guest.drained >= guest.unread_s * MIN_BYTES_PER_S:
            guest.unread_s, guest.drained, self._drained_before = 0.0, 0.0, self._out.written - waiting

    def _take_head(self, data: bytes) -> None:
        if not self._head and self.guest.stage == "idle":
            self.guest.enter("head")
        start = max(0, len(self._head) - 2)
        self._head += data
        found = END.search(self._head, start)
        if found is None and len(self._head) <= MAX_HEAD_BYTES:
            return
        end = len(self._head) if found is None else found.end()
        try:
            head = read_head(bytes(self._head[:end]))
        except HeadError as error:
            self._refuse(error.status, error)
            return
        body = bytes(self._head[end : end + head.length])
        self._more = len(self._head) > end + len(body)
        raw = bytes(self._head[:end])
        self._head.clear()
        self._left = head.length - len(body)
        self.guest.enter("body" if self._left else "answer")
        self.guest.received = len(body)
        self.flow.pause_reading()  # until the application asks for the body
        super().data_received(raw + body)
        self._end_if_more()

    def _take_body(self, data: bytes) -> None:
        body = data[: self._left]
        self._left -= len(body)
        self._more = self._more or len(data) > len(body)
        self.guest.received += len(body)
        if body:
            if not self._left:
                self.guest.enter("answer")
            super().data_received(body)
        self._end_if_more()

    def _end_if_more(self) -> None:
        """A second request before the first was answered is never read: the connection ends with the first."""
        if self._more and self.cycle is not None:
            self.cycle.keep_alive = False
            self.flow.pause_reading()

    def _refuse(self, status: int, error: LwdError) -> None:
        body = json.dumps(to_wire(error)).encode()
        head = (
            f"HTTP/1.1 {status} {STATUS_PHRASES[status].decode()}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        metrics.HTTP_REQUESTS.inc(route="none", status=str(status))
        self._more = True
        if self.conn.our_state is not h11.ERROR and not self._out.is_closing():
            self._out.write(head.encode() + body)
        self._out.close()
