"""The fault proxy: what it passes on is what was sent, and each fault does what its name says."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from waiting import wait_until

from infra.servers.proxy import FaultProxy


class Echo:
    """A server that sends back what it is sent, and keeps it."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.heard = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._echo, args=(self._listening.accept()[0],), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while data := connection.recv(2**16):
                self.heard += data
                connection.sendall(data)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", echo.port) as running:
        yield running


def connect(proxy: FaultProxy, timeout_s: float = 20.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout_s)


def received(connection: socket.socket, most: int = 2**30) -> bytes:
    """What comes until the end of the stream, or until so many bytes."""
    found = b""
    while len(found) < most and (data := connection.recv(2**16)):
        found += data
    return found


def asked(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return received(connection, len(data))


def assert_reset(connection: socket.socket) -> bytes:
    """The connection ends by RST; what came before it."""
    found = b""
    try:
        while data := connection.recv(2**16):
            found += data
    except ConnectionResetError:
        return found
    raise AssertionError(f"an orderly end after {len(found)} bytes")


@pytest.mark.parametrize(
    "faults", [{}, {"delay_s": 0.02}, {"rate_bytes_s": 2e7}, {"delay_s": 0.01, "rate_bytes_s": 2e7}], ids=str
)
def test_what_was_sent_arrives_in_order_both_ways(proxy: FaultProxy, faults: dict[str, float]) -> None:
    proxy.set(**faults)
    data = random.Random(0).randbytes(2**20 + 1)
    with connect(proxy) as connection:
        sender = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
        sender.start()
        assert received(connection) == data  # to the end: half-closed here, closed there
        sender.join()
    wait_until(lambda: proxy.counts()["open"] == 0, proxy.counts)
    assert {name: proxy.counts()[name] for name in ("accepted", "up", "down")} == {
        "accepted": 1,
        "up": len(data),
        "down": len(data),
    }


def test_a_delay_is_added_to_each_direction(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        assert asked(connection, b"a") == b"a"
        proxy.delay_s = 0.1
        begun = time.monotonic()
        assert asked(connection, b"b") == b"b"
        assert time.monotonic() - begun >= 0.2
    assert proxy.delay_s == 0.1


def test_a_limit_is_shared_by_the_connections(proxy: FaultProxy) -> None:
    proxy.rate_bytes_s = 1e6
    with connect(proxy) as one, connect(proxy) as other:
        begun = time.monotonic()
        for connection in (one, other):
            connection.sendall(bytes(100_000))
        for connection in (one, other):
            assert received(connection, 100_000) == bytes(100_000)
        assert time.monotonic() - begun >= 0.19  # 200 kB at 1 MB/s, less the burst


@pytest.mark.parametrize("length", [0, 1, 1000])
def test_a_cut_passes_no_more_than_its_bytes_of_the_answer(proxy: FaultProxy, echo: Echo, length: int) -> None:
    proxy.set(cut_after_bytes=length, cut_times=1)
    with connect(proxy) as connection:
        connection.sendall(b"x" * 1500)
        assert assert_reset(connection) == b"x" * length
    assert echo.heard == b"x" * 1500
    with connect(proxy) as connection:
        assert asked(connection, b"y" * 1500) == b"y" * 1500  # once is over
    assert proxy.counts()["cut"] == 1
    assert proxy.cut_times == 0


def test_a_gentle_cut_is_an_end_of_the_stream(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        assert asked(connection, b"x" * 100) == b"x" * 100
        proxy.set(cut_after_bytes=100, cut_gently=True)  # counted from now
        assert asked(connection, b"y" * 100) == b"y" * 100
        connection.sendall(b"z")
        assert received(connection) == b""


def test_a_reset_ends_what_is_open_and_nothing_else(proxy: FaultProxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        for connection in (one, other):
            assert asked(connection, b"a") == b"a"
        assert proxy.reset() == 2
        for connection in (one, other):
            assert assert_reset(connection) == b""
    with connect(proxy) as connection:
        assert asked(connection, b"b") == b"b"
    assert proxy.reset() <= 1
    assert proxy.counts()["reset"] >= 2


def test_refused_connections_are_closed_at_once_and_open_ones_left(proxy: FaultProxy) -> None:
    with connect(proxy) as open_before:
        assert asked(open_before, b"a") == b"a"
        proxy.refuse = True
        with connect(proxy) as connection:
            assert received(connection) == b""
        assert asked(open_before, b"b") == b"b"
        proxy.refuse = False
        with connect(proxy) as connection:
            assert asked(connection, b"c") == b"c"
    assert proxy.counts()["refused"] == 1


def test_a_blackhole_swallows_on_open_and_new_connections(proxy: FaultProxy, echo: Echo) -> None:
    with connect(proxy, 0.2) as before:
        assert asked(before, b"a") == b"a"
        proxy.blackhole = True
        with connect(proxy, 0.2) as during:
            for connection in (before, during):
                connection.sendall(b"lost")
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            proxy.clear()
            before.sendall(b"late")  # a stream with a hole in it is not carried on
            with pytest.raises(TimeoutError):
                before.recv(1)
    with connect(proxy) as after:
        assert asked(after, b"b") == b"b"
    assert echo.heard == b"ab"
    wait_until(lambda: proxy.counts()["open"] == 0, proxy.counts)


def test_without_a_server_the_connection_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with FaultProxy("127.0.0.1", port) as proxy:
        with pytest.raises(ConnectionResetError):
            connect(proxy).recv(1)
        with echo_once_on(port), connect(proxy) as connection:  # and it is found once it is there
            assert asked(connection, b"a") == b"a"


@contextlib.contextmanager
def echo_once_on(port: int) -> Iterator[None]:
    def serve() -> None:
        with listening.accept()[0] as peer:
            peer.sendall(peer.recv(1))

    with socket.create_server(("127.0.0.1", port)) as listening:
        server = threading.Thread(target=serve)
        server.start()
        yield
        server.join()


# --- HTTP -------------------------------------------------------------------------------------------------------------


class Web(BaseHTTPRequestHandler):
    """Answers a POST with its body, on connections that are kept."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[FaultProxy]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with FaultProxy("127.0.0.1", server.server_port) as running:
            yield running
        server.shutdown()


def post(connection: http.client.HTTPConnection, body: object) -> tuple[int, bytes]:
    connection.request("POST", "/", body)  # type: ignore[arg-type]
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.parametrize("size", [0, 10, 3_000_000])
def test_a_status_answers_so_many_requests_and_then_the_server_does(web: FaultProxy, size: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=20)
    body = bytes(size)
    assert post(connection, body) == (200, body)
    web.set(status=503, status_requests=2)  # on the connection that is open
    for left in (1, 0):
        status, answer = post(connection, body)
        assert status == 503 and b"InjectedFault" in answer
        assert web.status_requests == left
    assert post(connection, body) == (200, body)
    assert web.counts()["answered"] == 2
    connection.close()


def test_a_status_answers_a_request_in_chunks(web: FaultProxy) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=20)
    web.set(status=429, status_requests=1)
    assert post(connection, iter([b"0" * 100_000, b"0\r\n", b"end"]))[0] == 429
    connection.close()


# --- the process ------------------------------------------------------------------------------------------------------


def test_a_fault_that_does_not_exist_is_refused(proxy: FaultProxy) -> None:
    with pytest.raises(TypeError, match="delay_ms"):
        proxy.set(delay_ms=5)


def test_it_does_not_outlive_the_process_that_started_it() -> None:
    code = (
        "from infra.servers.proxy import FaultProxy\np = FaultProxy('127.0.0.1', 9); print(p.port, flush=True); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    port = int(parent.stdout.readline())
    socket.create_connection(("127.0.0.1", port)).close()
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    for _ in range(1000):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:  # just ending
            pass
        time.sleep(0.01)
    raise AssertionError("the proxy lives on")
