"""A server that answers what it likes, byte by byte, for as long as it likes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

Behaviour = Callable[[socket.socket, str], None]


class Hostile:
    """Listens at `url`; `behave` is given each request's connection and path.

    Attributes:
        paths: that were asked for. tokens: that were shown.
    """

    def __init__(self) -> None:
        self.behave: Behaviour = lambda connection, path: None
        self.paths: list[str] = []
        self.tokens: list[str] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(10)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            request = b""
            while b"\r\n\r\n" not in request:
                if not (block := connection.recv(65536)):
                    return
                request += block
            lines = request.decode("latin-1").split("\r\n")
            path = lines[0].split(" ")[1]
            self.paths.append(path)
            self.tokens += [line for line in lines if line.lower().startswith("authorization")]
            self.behave(connection, path)

    def drip(self, connection: socket.socket, data: bytes, pause_s: float = 0.05) -> None:
        """Send byte after byte, then begin again, until somebody hangs up."""
        while not self._closed.is_set():
            for number in range(len(data)):
                connection.sendall(data[number : number + 1])
                if self._closed.wait(pause_s):
                    return


def answer(connection: socket.socket, body: object, status: int = 200, **headers: str) -> None:
    """A whole answer: bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"Content-Length": str(len(data)), "Connection": "close"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    connection.sendall(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode("latin-1") + data)


@contextlib.contextmanager
def hostile() -> Iterator[Hostile]:
    server = Hostile()
    try:
        yield server
    finally:
        server.close()
