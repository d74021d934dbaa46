"""The process of a `FaultProxy` (`proxy.py`): `proxy_process.py TARGET_HOST TARGET_PORT PORT`, port 0 for any.

Writes the port as a line of JSON; then answers each line of JSON on stdin with one, until stdin ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import struct
import sys
import time
from dataclasses import asdict
from typing import Any

from infra.servers.proxy import Faults

_CHUNK = 2**18
_SHAPED_CHUNK = 2**14  # of a link with a limit: short, so that connections share it evenly
_BURST_S = 0.01  # by which a limited link may be ahead of its rate: timers are no finer
_DELAYED = 256  # chunks of one direction of one connection that wait for their delay at a time
_KERNEL = 2**17  # bytes that the system holds of a connection (twice that): a link is no faster for its buffers
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST


_Timed = tuple[float, bytes]  # when to send it, on the monotonic clock; empty bytes for the end of the stream


class _Cut(Exception):
    """End this connection now; its argument says whether by RST."""


class _Link:
    """One direction of the link that all connections share."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._free_at = 0.0

    @property
    def chunk(self) -> int:
        return _CHUNK if self._faults.rate_bytes_s is None else _SHAPED_CHUNK

    async def carry(self, size: int) -> float:
        """Wait until the link has taken so many bytes; when they come out of it, on the monotonic clock."""
        now = time.monotonic()
        if self._faults.rate_bytes_s is not None:
            self._free_at = max(now - _BURST_S, self._free_at) + size / self._faults.rate_bytes_s
            if self._free_at > now:
                await asyncio.sleep(self._free_at - now)
                now = self._free_at
        return now + self._faults.delay_s


class _Connection:
    """One client's connection, and ours to the target for it."""

    def __init__(self, proxy: _Proxy, client: socket.socket) -> None:
        self.proxy, self.client = proxy, client
        self.server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL)
        self.loop = asyncio.get_running_loop()
        self.answered = 0  # bytes, since the cut was set
        self.swallowed = False
        self.quiet = True  # nothing from the client since the last byte of answer: what comes next begins a request
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        rst = False
        try:
            for end in (self.client, self.server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self.loop.sock_connect(self.server, self.proxy.target)
            up, down = asyncio.Queue[_Timed](_DELAYED), asyncio.Queue[_Timed](_DELAYED)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read_client(up))
                group.create_task(self._send(up, self.server, "up"))
                group.create_task(self._read_server(down))
                group.create_task(self._send(down, self.client, "down"))
        except* _Cut as cut:
            rst = any(error.args[0] for error in cut.exceptions)
        except* (OSError, asyncio.CancelledError):
            rst = True  # as the other side did, or as we were told
        finally:
            for end in (self.client, self.server):
                if rst:
                    with contextlib.suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.close()

    async def _read_client(self, queue: asyncio.Queue[_Timed]) -> None:
        faults, link = self.proxy.faults, self.proxy.up
        while data := await self.loop.sock_recv(self.client, link.chunk):
            if self._swallows():
                continue
            if self.quiet and faults.status_requests > 0:
                faults.status_requests -= 1
                await self._answer_here(data)
            self.quiet = False
            await queue.put((await link.carry(len(data)), data))
        if self.swallowed:
            raise _Cut(True)
        await queue.put((0.0, b""))

    async def _read_server(self, queue: asyncio.Queue[_Timed]) -> None:
        link = self.proxy.down
        while data := await self.loop.sock_recv(self.server, link.chunk):
            if not self._swallows():
                await queue.put((await link.carry(len(data)), data))
        if not self.swallowed:  # else the client hears nothing, not even that the server has ended
            await queue.put((0.0, b""))

    async def _send(self, queue: asyncio.Queue[_Timed], target: socket.socket, way: str) -> None:
        """Send on what was read, each when its time has come."""
        while True:
            due, data = await queue.get()
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            if not data:
                with contextlib.suppress(OSError):  # it has ended both ways by itself
                    target.shutdown(socket.SHUT_WR)
                return
            if target is self.client:
                self.quiet = True
                await self._cut_if_due(data)
            await self.loop.sock_sendall(target, data)
            self.proxy.counts[way] += len(data)

    def _swallows(self) -> bool:
        self.swallowed |= self.proxy.faults.blackhole
        return self.swallowed

    async def _cut_if_due(self, data: bytes) -> None:
        faults = self.proxy.faults
        self.answered += len(data)
        if faults.cut_after_bytes is None or faults.cut_times == 0 or self.answered <= faults.cut_after_bytes:
            return
        if faults.cut_times is not None:
            faults.cut_times -= 1
        self.proxy.counts["cut"] += 1
        await self.loop.sock_sendall(self.client, data[: faults.cut_after_bytes - self.answered])
        raise _Cut(not faults.cut_gently)

    async def _answer_here(self, data: bytes) -> None:
        """Read the HTTP request that begins with `data` to its end, and answer it with the status of the fault."""
        status = self.proxy.faults.status
        while b"\r\n\r\n" not in data:
            data += await self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
        headers = {name.strip(): value.strip() for name, _, value in lines}
        if headers.get(b"transfer-encoding") == b"chunked":
            while not body.endswith(b"0\r\n\r\n"):
                body = body[-8:] + await self._more()
        else:
            missing = int(headers.get(b"content-length", 0)) - len(body)
            while missing > 0:
                missing -= len(await self._more())
        answer = b"<Error><Code>InjectedFault</Code><Message>answered by the fault proxy</Message></Error>"  # as of S3
        said = f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(answer)}\r\n"
        self.proxy.counts["answered"] += 1
        await self.loop.sock_sendall(self.client, said.encode() + b"Connection: close\r\n\r\n" + answer)
        self.client.shutdown(socket.SHUT_WR)
        raise _Cut(False)

    async def _more(self) -> bytes:
        found = await self.loop.sock_recv(self.client, _CHUNK)
        if not found:
            raise _Cut(False)
        return found


class _Proxy:
    """All connections, and the faults that they look at."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.faults = Faults()
        self.up, self.down = _Link(self.faults), _Link(self.faults)
        self.counts = dict.fromkeys(("accepted", "refused", "cut", "reset", "answered", "up", "down"), 0)
        self.open: set[_Connection] = set()

    async def serve(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listening)
            except OSError:  # gone again, or no descriptor is free
                await asyncio.sleep(0.01)
                continue
            if self.faults.refuse:
                self.counts["refused"] += 1
                client.close()
                continue
            self.counts["accepted"] += 1
            connection = _Connection(self, client)
            self.open.add(connection)
            connection.task = loop.create_task(connection.run())
            connection.task.add_done_callback(functools.partial(self._forget, connection))

    def _forget(self, connection: _Connection, _: object) -> None:
        self.open.discard(connection)

    async def obey(self) -> None:
        """Do what each line on stdin says, until it ends: then the process that started this one has ended."""
        commands = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(commands)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        while line := await commands.readline():
            print(json.dumps(await self._do(json.loads(line))), flush=True)

    async def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        for name, value in request.get("set", {}).items():
            setattr(self.faults, name, value)
            for connection in self.open if name == "cut_after_bytes" else ():
                connection.answered = 0
        if "reset" in request:
            tasks = [connection.task for connection in self.open if connection.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.counts["reset"] += len(tasks)
            return {"reset": len(tasks)}
        return {"faults": asdict(self.faults), "counts": {**self.counts, "open": len(self.open)}}


async def _main(target: tuple[str, int], port: int) -> None:
    proxy = _Proxy(target)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL)  # inherited by what it accepts
        listening.bind(("127.0.0.1", port))
        listening.listen(1024)
        listening.setblocking(False)
        serving = asyncio.create_task(proxy.serve(listening))
        print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
        await proxy.obey()
        serving.cancel()
    os._exit(0)  # whatever is open


if __name__ == "__main__":
    asyncio.run(_main((sys.argv[1], int(sys.argv[2])), int(sys.argv[3])))
