"""The service as a process, against who means harm: refused in time, in flat memory, and honest robots stay served."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hostile_sockets import (
    close,
    closed_within,
    connect,
    flood,
    head,
    memory_mib,
    said,
    self_signed,
    silent,
    size_of,
    status,
)
from invariants import digest
from serving import Process, serving
from waiting import wait_until

from infra.edge.server import Upload
from infra.service.head import MAX_JSON_BYTES

WRONG = "0" * 16 + "." + "S" * 43


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path / "home", LWD_ROBOT_EPISODES_PER_MIN="6000")
    process.start()
    yield process
    process.kill()


def pid(service: Process) -> int:
    assert service.process is not None
    return service.process.pid


def honest_works(service: Process, number: int) -> None:
    """A robot with a token hands in an episode."""
    data = np.random.default_rng(number).bytes(2000)
    upload = Upload(f"{number:032x}", digest(data), len(data), data)
    assert service.served.robot("honest").submit(upload) == "committed"


def permit(service: Process, token: str, data: bytes, number: int) -> dict[str, Any]:
    """An upload's place for `data`, with what the commit names."""
    named = {"episode_id": f"{number:032x}", "sha256": digest(data), "size": len(data)}
    code, answer, _ = service.served.ask("POST", "/v1/uploads", token, {"episodes": [named]})
    assert code == 200, answer
    return {**named, **answer["episodes"][0]}


# --- framing ----------------------------------------------------------------------------------------------------------

BODY = json.dumps({"episodes": 1}).encode()
AMBIGUOUS = {
    "both": (["Content-Length: 10", "Transfer-Encoding: chunked"], 400),
    "both, other order": (["Transfer-Encoding: chunked", "Content-Length: 10"], 400),
    "chunked": (["Transfer-Encoding: chunked"], 411),
    "capital": (["Content-Length: 10", "Transfer-Encoding: Chunked"], 400),
    "list": (["Transfer-Encoding: chunked, identity"], 411),
    "identity": (["Content-Length: 10", "Transfer-Encoding: identity"], 400),
    "unknown coding": (["Content-Length: 10", "Transfer-Encoding: xchunked"], 400),
    "folded coding": (["Content-Length: 10", "Transfer-Encoding:", " chunked"], 400),
    "space before the colon": (["Content-Length: 10", "Transfer-Encoding : chunked"], 400),
    "folded length": (["Content-Length: 1", " 0"], 400),
    "twice the same": (["Content-Length: 10", "Content-Length: 10"], 400),
    "twice": (["Content-Length: 10", "content-length: 11"], 400),
    "list of lengths": (["Content-Length: 10, 10"], 400),
    "plus": (["Content-Length: +10"], 400),
    "hexadecimal": (["Content-Length: 0x10"], 400),
    "negative": (["Content-Length: -1"], 400),
    "underscore": (["Content-Length: 1_0"], 400),
    "empty": (["Content-Length:"], 400),
    "other digits": (["Content-Length: \xb2"], 400),
    "huge": (["Content-Length: " + "9" * 30], 413),
    "too long": ([f"Content-Length: {MAX_JSON_BYTES + 1}"], 413),
    "none": ([], 411),
    "compressed": (["Content-Length: 10", "Content-Encoding: gzip"], 415),
    "websocket": (["Content-Length: 0", "Connection: Upgrade", "Upgrade: websocket"], 400),
    "two tokens": (["Content-Length: 10", f"Authorization: Bearer {WRONG}", f"Authorization: Bearer {WRONG}"], 400),
    "many headers": ([f"X-{n}: y" for n in range(1000)], 431),
    "huge header": (["X: " + "y" * 100_000], 431),
}


@pytest.mark.parametrize("known", [False, True], ids=["stranger", "robot"])
def test_a_head_that_two_could_read_differently_is_refused_before_the_body(service: Process, known: bool) -> None:
    token = service.served.enrol() if known else None
    for path in ("/v1/heartbeat", "/v1/nowhere", "/nowhere", "/v1/episodes"):
        for name, (lines, expected) in AMBIGUOUS.items():
            own = token if name != "two tokens" else None
            answer = said(service.served.url, head("POST", path, *lines, token=own) + b"a\r\n0123456789\r\n0\r\n\r\n")
            assert status(answer) == expected, (name, path, answer[:200])
            assert answer.count(b"HTTP/1.1 ") == 1, name
    honest_works(service, 1)


def test_other_malformed_requests_are_refused_plainly(service: Process) -> None:
    url = service.served.url
    for data, expected in (
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200 + b"\n\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /v1/announcements?after=" + b"1" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (head("GET", "/healthz", "Content-Length: 10") + b"0123456789", 400),
        (head("HEAD", "/v1/announcements", "Content-Length: 10") + b"0123456789", 400),
        (head("DELETE", "/v1/episodes", "Content-Length: 10") + b"0123456789", 400),
        (head("POST", "/v1/heartbeat", "Content-Length: 10", "Expect: 200-ok"), 417),
    ):
        answer = said(url, data)
        assert status(answer) == expected, (data[:60], answer[:200])
    honest_works(service, 1)


def test_a_second_request_before_the_answer_is_never_read(service: Process) -> None:
    token = service.served.enrol()
    one = head("GET", "/v1/announcements", token=token)
    answer = said(
        service.served.url, one + head("POST", "/v1/heartbeat", "Content-Length: 15", token=token) + b'{"episodes": 1}'
    )
    assert answer.count(b"HTTP/1.1 200") == 1 and answer.count(b"HTTP/1.1 ") == 1


# --- bodies -----------------------------------------------------------------------------------------------------------


def test_endless_bodies_end_their_connection_in_flat_memory(service: Process) -> None:
    url, token, block = service.served.url, service.served.enrol(), b"x" * 2**20
    honest_works(service, 1)
    before = memory_mib(pid(service))
    chunked = ["Content-Length: 10", "Transfer-Encoding: chunked"]
    for start in (
        head("POST", "/v1/uploads", *chunked),
        head("POST", "/v1/uploads", *chunked, token=token),
        head("POST", "/v1/uploads", "Content-Length: 10", token=token),  # more than was announced
        head("POST", "/v1/uploads", "Content-Length: 262144"),  # no token
        head("PUT", "/v1/objects/incoming/r0/x", "Content-Length: 500000000"),  # no token
        head("PUT", "/v1/objects/incoming/r0/x", "Content-Length: 500000000", token=token),  # no permit
        head("POST", "/nowhere", "Content-Length: 262144"),
        head("PUT", "/healthz", "Content-Length: 262144"),
        head("GET", "/healthz", "Content-Length: 500000000"),
        b"x" * 2**20,  # a head without an end
    ):
        sent, answer = flood(url, start, block, 200)
        assert sent < 32 * 2**20, start[:80]
        assert 400 <= status(answer) < 500 or not answer, (start[:80], answer[:100])
    assert memory_mib(pid(service)) < before + 60
    honest_works(service, 2)


def test_no_byte_of_a_strangers_body_is_asked_for(service: Process) -> None:
    ask = ["Content-Length: 10", "Expect: 100-continue"]
    answer = said(service.served.url, head("POST", "/v1/uploads", *ask))
    assert status(answer) == 401 and b"100 Continue" not in answer and b"connection: close" in answer.lower()
    with connect(service.served.url) as sock:
        sock.sendall(head("POST", "/v1/heartbeat", "Content-Length: 15", "Content-Type: application/json",
                          "Expect: 100-continue", token=service.served.enrol()))  # fmt: skip
        assert status(sock.recv(1000)) == 100
        sock.sendall(b'{"episodes": 1}')
        assert status(sock.recv(1000)) == 204


# --- silence ----------------------------------------------------------------------------------------------------------


def test_robots_stay_served_beside_1100_silent_sockets(service: Process) -> None:
    kinds = (b"", b"GET /healthz HTT", head("POST", "/v1/uploads", "Content-Length: 100"),
             head("GET", "/healthz") * 2)  # fmt: skip
    kept = [sock for kind in kinds for sock in silent(service.served.url, 275, kind)]
    honest_works(service, 1)
    robot = service.served.robot("r1")
    for _ in range(10):
        assert robot.announcements("learning", 0) == []
        kept += silent(service.served.url, 30)
    assert service.served.ask("GET", "/healthz")[0] == 200
    close(kept)
    honest_works(service, 2)


def test_who_is_silent_or_drips_is_sent_away(service: Process) -> None:
    url, token = service.served.url, service.served.enrol()
    waiting = silent(url, 1) + silent(url, 1, b"GET /healthz HTTP/1.1\r\nHost")
    body = silent(url, 1, head("POST", "/v1/heartbeat", "Content-Length: 100000", token=token) + b"{")
    assert all(closed_within(sock, 15) for sock in waiting)
    assert closed_within(body[0], 25)
    close(waiting + body)


def test_robots_that_do_not_read_fill_no_memory_and_are_sent_away(service: Process) -> None:
    token, name = service.served.enrol("deaf"), "a" * 64
    service.plane.objects.put(f"policies/bases/{name}/base.safetensors", bytes(2**26))
    ask = head("GET", f"/v1/policies/bases/{name}", token=token)
    before, kept = memory_mib(pid(service)), []
    for _ in range(10):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", service.port))
        sock.sendall(ask)
        kept.append(sock)
    honest_works(service, 1)
    assert service.served.ask("GET", f"/v1/policies/bases/{name}", service.served.enrol("r1"))[1] == bytes(2**26)
    assert memory_mib(pid(service)) < before + 60
    wait_until(lambda: _held(service) <= 2, seconds=40)
    close(kept)


def test_greetings_that_never_end_make_room_for_robots(tmp_path: Path) -> None:
    """TLS: a connection is counted, and has its deadline, from its first packet on."""
    pem = self_signed(tmp_path)
    with serving(tmp_path / "home", ingest_cert=pem, ingest_key=pem, ingest_connections=40) as served:
        kept = silent(served.url, 200) + silent(served.url, 50, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        robot = served.robot("r0", ca=pem)
        assert robot.announcements("learning", 0) == []
        kept += silent(served.url, 100)
        assert robot.announcements("learning", 0) == []
        assert all(closed_within(sock, 20) for sock in kept[-3:])
        close(kept)


def _held(service: Process) -> int:
    """Connections that the service holds."""
    found = psutil.Process(pid(service)).net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED for one in found)


def test_64_robots_of_one_address_are_served(service: Process) -> None:
    robots = [service.served.robot(f"r{number}") for number in range(64)]
    for _ in range(2):
        assert all(robot.announcements("learning", 0) == [] for robot in robots)


def test_one_robot_cannot_take_all_connections(service: Process) -> None:
    token = service.served.enrol("greedy")
    kept = silent(service.served.url, 100, head("GET", "/v1/announcements", token=token))
    honest_works(service, 1)
    assert sum(not closed_within(sock, 0.1) for sock in kept) <= 16
    close(kept)
    honest_works(service, 2)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_guessing_tokens_costs_ever_longer_pauses_and_robots_notice_nothing(service: Process) -> None:
    robot = service.served.robot("honest")
    robot.announcements("learning", 0)
    codes = [service.served.ask("GET", "/v1/announcements", f"{n:016x}." + "S" * 43)[0] for n in range(40)]
    assert codes[:16] == [401] * 16 and codes.count(429) > 16
    assert robot.announcements("learning", 0) == []
    honest_works(service, 1)


# --- descriptors and logs ---------------------------------------------------------------------------------------------


def test_with_few_descriptors_the_log_stays_small_and_it_recovers(tmp_path: Path) -> None:
    process = Process(tmp_path / "home")
    process.start()
    try:
        now = len(list(Path(f"/proc/{pid(process)}/fd").iterdir()))
        resource.prlimit(pid(process), resource.RLIMIT_NOFILE, (now + 6, 4096))
        logs = process.home / "logs"
        before = size_of(logs)
        kept = silent(process.served.url, 200)
        wait_until(lambda: "no file descriptor is left" in (logs / "service.jsonl").read_text())
        said(process.served.url, head("GET", "/healthz"), timeout=3.0)
        assert size_of(logs) - before < 100_000
        resource.prlimit(pid(process), resource.RLIMIT_NOFILE, (4096, 4096))
        wait_until(lambda: process.served.ask("GET", "/healthz")[0] == 200)
        close(kept)
        honest_works(process, 1)
    finally:
        process.kill()


def test_a_service_with_a_small_limit_serves(tmp_path: Path) -> None:
    process = Process(tmp_path / "home")
    process.limit = 64
    process.start()
    try:
        kept = silent(process.served.url, 500)
        honest_works(process, 1)
        assert process.served.ask("GET", "/healthz")[0] == 200
        close(kept)
        assert size_of(process.home / "logs") < 100_000
    finally:
        process.kill()
