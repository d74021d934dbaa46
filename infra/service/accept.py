"""Takes in connections, by hand: asyncio's own loop neither counts them before TLS, nor bears few descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import resource
import socket
import ssl
from collections.abc import Callable

from infra.service.door import HEAD_S, Door, Guest
from infra.service.wire import Connection

SWEEP_S = 0.5
_PAUSE_S = 0.2  # after there was no descriptor
_TLS_GOODBYE_S = 2.0
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_KEPT_MIN, _KEPT_MAX = 48, 256  # descriptors for files and for the connections to catalog and store


def connections_that_fit(wanted: int) -> int:
    """How many connections this process has descriptors for, at most `wanted`, after its limit was raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # an unlimited hard limit is not allowed everywhere
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - min(_KEPT_MAX, max(_KEPT_MIN, soft // 2))))


class Acceptor:
    """What `asyncio.Server` is to uvicorn: accepts on a socket until it is closed.

    Args:
        taken: the listening socket.
        door: who may come in.
        tls: the service's, where it has one.
        make: a connection for a guest.
    """

    def __init__(
        self, taken: socket.socket, door: Door, tls: ssl.SSLContext | None, make: Callable[[Guest], Connection]
    ) -> None:
        self._socket, self._door, self._tls, self._make = taken, door, tls, make
        self._greetings: set[asyncio.Task[None]] = set()
        self._connections: dict[Guest, Connection] = {}
        taken.setblocking(False)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._accept()), loop.create_task(self._sweep())]

    def close(self) -> None:
        """Accept no more; greetings that are not done are ended."""
        for task in (*self._tasks, *self._greetings):
            task.cancel()

    async def wait_closed(self) -> None:
        """Until all of it has ended."""
        await asyncio.gather(*self._tasks, *self._greetings, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                came, address = await loop.sock_accept(self._socket)
            except OSError as error:
                if error.errno in _SHORT:
                    self._door.ran_short()
                    await asyncio.sleep(_PAUSE_S)
                continue  # else it went before it was accepted
            with contextlib.suppress(OSError):
                came.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            guest = self._door.admit(_place(address[0]), came.close)
            if guest is None:
                came.close()
                continue
            task = loop.create_task(self._greet(came, guest))
            guest.abort = task.cancel
            self._greetings.add(task)
            task.add_done_callback(self._greetings.discard)
            await asyncio.sleep(0)  # sock_accept does not yield while there is a queue, and what was ended must end

    async def _greet(self, came: socket.socket, guest: Guest) -> None:
        connection = self._make(guest)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, came, ssl=self._tls,
                ssl_handshake_timeout=HEAD_S if self._tls else None,
                ssl_shutdown_timeout=_TLS_GOODBYE_S if self._tls else None,
            )  # fmt: skip
            self._connections[guest] = connection
        except (OSError, asyncio.CancelledError):  # ssl.SSLError is one, too
            came.close()
            self._door.leave(guest)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for guest, connection in list(self._connections.items()):
                if guest.gone:
                    del self._connections[guest]
                else:
                    connection.look(SWEEP_S)
            self._door.sweep()


def _place(host: str) -> str:
    """An address as one neighbour's: of IPv6 the network that one household has."""
    address = ipaddress.ip_address(host.split("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
