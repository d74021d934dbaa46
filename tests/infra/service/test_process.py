"""The service as a process: killed at any point it acknowledges nothing that is lost; it says why it will not start."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
import urllib3
from invariants import assert_i7_kept, in_process
from serving import Process
from waiting import wait_until

from infra.catalog.schema import episodes, outbox
from infra.crashpoints import registered
from infra.edge.client import EdgeClient
from infra.edge.framelog import Frame
from infra.edge.spool import Spool
from infra.errors import ConfigError
from infra.reconcile import reconcile
from infra.service.__main__ import main
from infra.service.listen import Listener
from infra.settings import load_settings


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path / "home")
    yield process
    process.kill()


def record(client: EdgeClient, number: int) -> None:
    rng = np.random.default_rng(number)
    client.begin("S1", "open the drawer", source="online", policy_version=1)
    for t in range(3):
        observation, action = rng.normal(size=7).astype(np.float32), rng.uniform(-1, 1, 5).astype(np.float32)
        client.record(Frame(observation, action, float(t == 2), False, 0.05 * t))
    client.close(rng.normal(size=7).astype(np.float32), 0.15, "success", (1.0,))


@pytest.mark.parametrize("point", registered("service/"))
def test_killed_at_a_crash_point_it_has_lost_and_doubled_nothing(service: Process, tmp_path: Path, point: str) -> None:
    service.start(crash=point)
    server = service.served.robot("r0")
    client = EdgeClient("r0", Spool(tmp_path / "spool", max_bytes=2**24), server)
    for number in range(2):
        record(client, number)
    spooled = {(closed.episode_id, closed.sha256) for closed in client.spool.pending()}
    assert client.sync().failed == 2
    assert service.wait() == -9, f"nothing passes the crash point {point}"
    service.start()
    wait_until(lambda: client.sync().waiting == 2)
    with service.plane.catalog.read() as connection:
        found = {(row.episode_id, row.sha256) for row in connection.execute(sa.select(episodes))}
        assert found == spooled and len(connection.execute(sa.select(outbox)).all()) == 2
    assert_i7_kept(service.home, spooled)
    reconcile(service.plane.catalog, service.plane.objects, now=2.0e10)
    assert list(service.plane.objects.list("incoming")) == []


def test_sigterm_ends_it_and_secrets_are_in_no_log(service: Process, tmp_path: Path) -> None:
    service.start()
    served = service.served
    token, wrong = served.enrol(), "0" * 16 + "." + "S" * 43
    client = EdgeClient("r0", Spool(tmp_path / "spool", max_bytes=2**24), served.robot("r0"))
    record(client, 1)
    client.sync()
    asked = [("GET", "/v1/announcements"), ("POST", "/v1/uploads"), ("GET", f"/v1/objects/{token}")]
    for used in (token, wrong):
        for method, path in asked:
            served.ask(method, path, used, None if method == "GET" else {"episodes": []})
    assert service.stop() == 0
    with pytest.raises(urllib3.exceptions.HTTPError):
        served.ask("GET", "/healthz")
    text = "".join(path.read_text() for path in (service.home / "logs").iterdir())
    assert '"message": "commit"' in text and '"robot": "r0"' in text and "refused: the robot token is unknown" in text
    assert "listening" in text
    for secret in (token.partition(".")[2], "S" * 43, "Bearer", "X-Amz-Signature"):
        assert secret not in text


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is taken"):
            Listener(load_settings(home=tmp_path, ingest_port=port))


def test_answers_are_not_held_back(tmp_path: Path) -> None:
    """asyncio sets TCP_NODELAY on sockets that say that they are TCP; without it an answer takes 40 ms."""
    listener = Listener(load_settings(home=tmp_path, ingest_port=0))
    assert listener._socket.proto == socket.IPPROTO_TCP
    assert listener.url == f"http://127.0.0.1:{listener.port}" and listener.port > 0
    listener.close()


def test_it_does_not_speak_in_the_clear_to_other_machines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0.0.0.0 is reached from other machines, and there is no TLS"):
        Listener(load_settings(home=tmp_path, ingest_host="0.0.0.0", ingest_port=0))
    Listener(load_settings(home=tmp_path, ingest_host="0.0.0.0", ingest_port=0, ingest_insecure=True)).close()
    with pytest.raises(ConfigError, match="nowhere.invalid"):
        Listener(load_settings(home=tmp_path, ingest_host="nowhere.invalid", ingest_port=0))


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="only one of"):
        Listener(load_settings(home=tmp_path, ingest_cert=tmp_path / "cert.pem", ingest_port=0))
    both = {"ingest_cert": tmp_path / "cert.pem", "ingest_key": tmp_path / "cert.pem"}
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        Listener(load_settings(home=tmp_path, ingest_port=0, **both))


def test_a_fleets_service_without_a_catalog_does_not_make_one_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LWD_PROFILE", "fleet")
    monkeypatch.setenv("LWD_INGEST_URL", "http://127.0.0.1:1")  # as a robot's home has it
    assert in_process(main, ["--home", str(tmp_path)]) == ConfigError.exit_code
    assert "needs its catalog" in capfd.readouterr().err
    assert not (tmp_path / "catalog.db").exists()
