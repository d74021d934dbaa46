"""Hostile robots against the real servers, beside an honest one: all of its episodes arrive, whatever they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import urllib3
from hostile_sockets import close, flood, head, memory_mib, said, silent, status
from invariants import assert_invariants, digest
from serving import Process
from waiting import wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "edge"))
from recording import record_episode

from infra.catalog.schema import measurements, robots
from infra.edge.client import EdgeClient
from infra.edge.spool import Spool


class Honest:
    """A robot that records and sends while others do harm."""

    def __init__(self, service: Process, spool: Path) -> None:
        self._service = service
        self._client = EdgeClient("honest", Spool(spool, max_bytes=2**27), service.served.robot("honest"), poll_s=0.02)
        self._client.start()
        self.spooled: dict[str, str] = {}

    def works(self) -> None:
        """It hands in another episode, which is committed in time."""
        known = {closed.episode_id for closed in self._client.spool.pending()}
        record_episode(self._client)
        new = {c.episode_id: c.sha256 for c in self._client.spool.pending() if c.episode_id not in known}
        self.spooled |= new
        backend = self._service.served.robot("honest")
        wait_until(lambda: backend.statuses(list(new.items())) != ["unknown"], seconds=30)

    def all_arrived(self) -> None:
        """Everything it ever made is in a snapshot, once."""
        self._service.served.plane.settle()
        self._client.stop()
        assert_invariants(self._service.home, self.spooled)


class TestHostileDoor:
    """The ingest service: framing, floods, silence, guesses, permits, nonsense."""

    @pytest.fixture
    def service(self, fleet_home: Path) -> Iterator[Process]:
        process = Process(fleet_home, LWD_ROBOT_EPISODES_PER_MIN="6000", LWD_ROBOT_INCOMING_MIB="8")
        process.start()
        yield process
        process.kill()

    @pytest.fixture
    def honest(self, service: Process, tmp_path: Path) -> Iterator[Honest]:
        robot = Honest(service, tmp_path / "honest")
        robot.works()
        yield robot
        robot.works()
        robot.all_arrived()

    def test_ambiguous_and_endless_bodies(self, service: Process, honest: Honest) -> None:
        assert service.process is not None
        url, token, block = service.served.url, service.served.enrol("bad"), b"x" * 2**20
        before = memory_mib(service.process.pid)
        chunked = ["Content-Length: 10", "Transfer-Encoding: chunked"]
        for own in (None, token):
            for path in ("/v1/uploads", "/v1/heartbeat", "/nowhere", "/v1/objects/incoming/bad/x"):
                method = "PUT" if "objects" in path else "POST"
                sent, answer = flood(url, head(method, path, *chunked, token=own), block, 200)
                assert sent < 32 * 2**20 and (status(answer) == 400 or not answer)
        sent, answer = flood(url, head("GET", "/healthz", "Content-Length: 9999999"), block, 200)
        assert sent < 32 * 2**20 and (status(answer) == 400 or not answer)
        assert memory_mib(service.process.pid) < before + 60
        honest.works()

    def test_silence_guesses_and_nonsense(self, service: Process, honest: Honest) -> None:
        url, token = service.served.url, service.served.enrol("bad")
        kept = silent(url, 600) + silent(url, 500, b"POST /v1/uploads HTTP/1.1\r\nHost: x\r\n")
        honest.works()
        for number in range(30):
            guess = f"{number:016x}." + "S" * 43
            assert status(said(url, head("GET", "/v1/announcements", token=guess))) in (401, 429)
        honest.works()
        close(kept)
        for path in ("uploads", "episodes", "episodes/status", "heartbeat", "measurements"):
            for body in (b"[" * 50_000, b'{"episodes": 1e400}', b'{"episodes": 1, "episodes": 2}', b"\xff", b"null",
                         b'{"episodes": [{"episode_id": "\\u0000", "sha256": "\\ud800"}]}',
                         b'{"episodes": 9223372036854775808, "details": {"pid": 1e999}}'):  # fmt: skip
                code, answer, _ = service.served.ask(
                    "POST", f"/v1/{path}", token, body, **{"Content-Type": "application/json"}
                )
                assert (code, answer["kind"]) == (422, "ConfigError"), (path, body[:50], answer)
        beat = {"episodes": 1, "details": {"pid": 2**62, "tasks": ["\x1b[31m"] * 64, "refused": "x" * 2000}}
        assert service.served.ask("POST", "/v1/heartbeat", token, beat)[0] == 204
        for version in (1, 2**31 - 1):
            measured = {"name": "publish_to_active_s", "version": version, "since": time.time()}
            assert service.served.ask("POST", "/v1/measurements", token, measured)[0] == 422
        with service.plane.catalog.read() as connection:
            assert connection.execute(sa.select(measurements)).all() == []
            assert {row.robot_id for row in connection.execute(sa.select(robots))} == {"bad"}

    def test_a_permit_stores_one_object_and_a_robot_so_many_bytes(self, service: Process, honest: Honest) -> None:
        token, store = service.served.enrol("bad"), service.plane.objects

        def offer(number: int, size: int) -> tuple[int, Any]:
            named = {"episode_id": f"{number:032x}", "sha256": digest(bytes(size)), "size": size}
            return service.served.ask("POST", "/v1/uploads", token, {"episodes": [named]})[:2]

        places = [offer(1, 100)[1]["episodes"][0] for _ in range(200)]
        assert len({place["key"] for place in places}) == 1
        for place in places[:20]:
            assert _put(place["url"], bytes(100)) == 200
        assert _put(places[0]["url"], bytes(101)) in (400, 403)
        assert len([item for item in store.list("incoming/bad")]) == 1
        codes = [offer(number, 2**20)[0] for number in range(2, 14)]
        assert codes.count(200) == 7 and codes[-5:] == [429] * 5  # of 8 MiB
        key = {"episode_id": f"{1:032x}", "sha256": digest(bytes(100)), "size": 100, "key": places[0]["key"]}
        answer = service.served.ask("POST", "/v1/episodes", token, {"episodes": [key]})[1]
        assert answer["episodes"] == [{"status": "committed"}]  # what it holds is judged later
        assert list(store.list("incoming/bad")) == []
        other = key | {"key": f"incoming/bad/{1:032x}-00000000.tar", "episode_id": f"{2:032x}"}
        answer = service.served.ask("POST", "/v1/episodes", token, {"episodes": [other]})[1]
        assert answer["episodes"][0]["error"]["kind"] == "ConfigError"

    def test_two_hostile_robots_in_a_loop(self, service: Process, honest: Honest, tmp_path: Path) -> None:
        tokens = tmp_path / "tokens.json"
        tokens.write_text(json.dumps({name: service.served.enrol(name) for name in ("h0", "h1")}))
        deeds = ["lying_length", "oversize", "silent", "dripping", "deaf", "guesses", "permits", "nonsense"]
        command = [sys.executable, "-m", "bench.hostile", "--home", str(tmp_path / "h"), "--tokens", str(tokens),
                   "--url", service.served.url, "--count", "2", "--only", *deeds]  # fmt: skip
        root = Path(__file__).parents[2]
        hostile = subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
        log = tmp_path / "h" / "hostile" / "0.jsonl"

        def deeds_done() -> int:
            return len(log.read_text().splitlines()) if log.exists() else 0

        try:
            wait_until(lambda: deeds_done() >= 1)
            while deeds_done() < 15:
                honest.works()
        finally:
            hostile.terminate()
            hostile.wait(30)


def _put(url: str, body: bytes) -> int:
    return urllib3.request("PUT", url, body=body, headers={"Connection": "close"}, retries=False).status
