"""A robot with a URL and a token: nothing lost or doubled whatever dies, no secret told, no wait without an end."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from invariants import KILLED, assert_i7_kept, assert_invariants, digest, example_episode, in_process
from recording import record_episode
from serving import Process, Served, serving

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from policies import Channel, make_base

from infra.catalog.schema import episodes, measurements, outbox, policies, robots
from infra.crashpoints import registered
from infra.edge.client import EdgeClient
from infra.edge.remote import RemoteServer
from infra.edge.server import Heartbeat, RefusedError, RobotServer, Upload, from_wire, to_wire
from infra.edge.spool import Spool
from infra.episode import encode
from infra.errors import ConfigError, ConflictError, CorruptDataError, LwdError, StorageFullError, UnavailableError
from infra.fleet.embedded import EmbeddedServer
from infra.objects.directory import DirectoryStore
from infra.policy.subscriber import PolicySubscriber
from infra.process import JsonLines
from infra.reconcile import reconcile
from infra.service import backend
from infra.service.auth import Tokens
from infra.settings import load_settings

TOKEN = "0" * 16 + "." + "a" * 43


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "home", robot_episodes_per_min=6000) as found:
        yield found


def an_upload(number: int, robot: str = "r0", **changes: Any) -> Upload:
    data = encode(example_episode(number, robot=robot))
    return Upload(
        **{"episode_id": f"{number:032x}", "sha256": digest(data), "size": len(data), "data": data, **changes}
    )


def a_client(server: RobotServer, spool: Path, robot: str = "r0") -> EdgeClient:
    return EdgeClient(robot, Spool(spool, max_bytes=2**24), server, poll_s=0.01)


def committed(served: Served) -> set[tuple[str, str]]:
    with served.plane.catalog.read() as connection:
        return {(row.episode_id, row.sha256) for row in connection.execute(sa.select(episodes))}


# --- the port, in both its forms --------------------------------------------------------------------------------------


@pytest.fixture(params=["remote", "embedded"])
def server(request: pytest.FixtureRequest, served: Served) -> Callable[[str], RobotServer]:
    """Makes a robot's port; both must behave the same."""
    if request.param == "remote":
        return served.robot
    return lambda robot="r0": EmbeddedServer(served.plane.catalog, served.plane.objects, robot)


def test_spooled_episodes_end_in_a_snapshot(server: Any, served: Served, tmp_path: Path) -> None:
    client = a_client(server("r0"), tmp_path / "spool")
    for steps in range(2, 22):
        record_episode(client, steps=steps)
    spooled = {closed.episode_id: closed.sha256 for closed in client.spool.pending()}
    assert client.sync().sent == 20
    assert client.sync().waiting == 20
    served.plane.settle()
    assert client.sync().confirmed == 20 and client.spool.pending() == []
    assert_invariants(served.plane.home, spooled)
    with served.plane.catalog.read() as connection:
        (robot,) = connection.execute(sa.select(episodes.c.robot_id).distinct()).scalars()
        traces = connection.execute(sa.select(outbox.c.trace_id)).scalars().all()
    assert robot == "r0" and all(trace.startswith("00-") for trace in traces)


def test_handing_in_again_changes_nothing(server: Any, served: Served) -> None:
    port = server("r0")
    for _ in range(3):
        assert port.submit_many([an_upload(1), an_upload(2), an_upload(1)]) == ["committed"] * 3
    assert len(committed(served)) == 2
    assert list(served.plane.objects.list("incoming")) == []
    assert port.status(f"{1:032x}", an_upload(1).sha256) == "committed"
    assert port.status(f"{1:032x}", an_upload(2).sha256) == "unknown"


def test_the_errors_of_one_episode_are_its_own(server: Any, served: Served, tmp_path: Path) -> None:
    port = server("r0")
    port.submit(an_upload(1))
    (tmp_path / "tar").write_bytes(an_upload(5).data)
    outcomes = port.submit_many(
        [
            an_upload(1, data=an_upload(2).data, sha256=an_upload(2).sha256),
            an_upload(3, data=an_upload(3).data[:-1] + b"x"),
            an_upload(4, meta={"produced_at": "today"}),
            an_upload(6, episode_id="../" + "0" * 29),
            an_upload(5, data=tmp_path / "tar"),
        ]
    )
    kinds = [type(outcome) if isinstance(outcome, LwdError) else outcome for outcome in outcomes]
    assert kinds == [ConflictError, CorruptDataError, ConfigError, ConfigError, "committed"]
    assert "the id was committed with sha256" in outcomes[0].problem and "produced_at" in outcomes[2].problem
    with pytest.raises(ConfigError, match="produced_at"):
        port.submit(an_upload(4, meta={"produced_at": "today"}))
    with pytest.raises(ConflictError, match="belongs to robot r0, not to r1"):
        server("r1").submit(an_upload(1))


def test_signs_of_life_and_latencies_arrive(server: Any, served: Served) -> None:
    port = server("r0")
    port.heartbeat(Heartbeat(3, None, 5, {"pid": 1, "tasks": ["S1"], "spool_bytes": 10, "ended": True}))
    with served.plane.catalog.read() as connection:
        (row,) = connection.execute(sa.select(robots)).all()
    assert (row.robot_id, row.cohort, row.active_version, row.staged_version, row.episodes) == (
        "r0", "learning", 3, None, 5,
    )  # fmt: skip
    assert row.details["tasks"] == ["S1"] and row.details["ended"]
    policy = {"version": 3, "snapshot_version": 0, "bundle_key": "", "manifest_sha256": "", "status": "candidate"}
    with served.plane.catalog.begin() as connection:
        connection.execute(sa.insert(policies).values(**policy, created_at=0.0))
    port.measure("publish_to_active_s", 3, row.last_seen - 1.5)
    with served.plane.catalog.read() as connection:
        (found,) = connection.execute(sa.select(measurements)).all()
    assert (found.name, found.subject, found.version) == ("publish_to_active_s", "r0", 3) and found.value >= 1.5
    with pytest.raises(ConfigError):
        port.measure("publish_to_active_s", 3, 0.0)


def test_row_32_a_robot_that_was_away_converges_on_the_latest_policy(
    server: Any, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "PAGE", 2)
    channel = Channel(served.plane.home)
    base = make_base(tmp_path / "base.safetensors")
    for number in range(5):
        channel.publish(base=base if number > 2 else None)
    robot = PolicySubscriber(tmp_path / "policy", "learning", server("r0"), channel.trust)
    assert robot.poll() == 5
    active = robot.activate_at_boundary()
    assert active is not None and active.version == 5 and (active.bundle / "base.safetensors").exists()
    assert [path.name[:2] for path in (tmp_path / "policy" / "bundles").iterdir()] == ["5-"]


def test_an_object_that_is_not_there_is_named(server: Any, served: Served) -> None:
    channel = Channel(served.plane.home)
    channel.publish()
    (said,) = server("r0").announcements("learning", 0)
    key = f"policies/{said.manifest_sha256}/manifest.json"
    assert server("r0").fetch(key) == served.plane.objects.get(key)
    served.plane.objects.delete(key)
    for absent in (key, f"policies/bases/{'a' * 64}/base.safetensors"):
        with pytest.raises(CorruptDataError):
            server("r0").fetch(absent)
    with pytest.raises(ConfigError, match="cohort"):
        server("r0").announcements("production", 0)


# --- crashes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A service in a process of its own: this one forks robots that are killed."""
    found = Process(tmp_path_factory.mktemp("service") / "home")
    found.start()
    yield found
    found.stop()


POINTS = ["remote.uploaded:1", "remote.uploaded:2", "remote.committed"]


def test_every_crash_point_is_below() -> None:
    assert {point.partition(":")[0] for point in POINTS} == set(registered("edge/remote.py"))


@pytest.mark.parametrize("point", POINTS)
def test_row_02_a_robot_killed_while_sending_is_sent_again_as_one_row(
    process: Process, tmp_path: Path, point: str
) -> None:
    served, robot = process.served, f"r-{point.replace(':', '-')}"
    token = served.enrol(robot)
    client = a_client(served.robot(robot), tmp_path / "spool", robot)
    for _ in range(2):
        record_episode(client)
    spooled = {(closed.episode_id, closed.sha256) for closed in client.spool.pending()}
    client.spool.release()
    before = committed(served)

    def work() -> None:
        a_client(RemoteServer(served.url, token, robot_id=robot, timeout_s=20.0), tmp_path / "spool", robot).sync()

    assert in_process(work, crash=point) == KILLED
    assert committed(served) - before == (spooled if point == "remote.committed" else set())
    orphans = len(list(served.plane.objects.list("incoming")))
    assert orphans == {"remote.uploaded:1": 1, "remote.uploaded:2": 2, "remote.committed": 0}[point]
    assert in_process(work) == 0
    assert committed(served) - before == spooled
    with served.plane.catalog.read() as connection:
        announced = connection.execute(sa.select(outbox.c.episode_id, outbox.c.sha256)).all()
    assert sorted(spooled) == sorted(tuple(row) for row in announced if tuple(row) in spooled)
    assert_i7_kept(process.home, spooled)
    reconcile(served.plane.catalog, served.plane.objects, now=2.0e10)
    assert list(served.plane.objects.list("incoming")) == []


# --- credentials ------------------------------------------------------------------------------------------------------


def test_a_revoked_robot_keeps_its_episodes(served: Served, tmp_path: Path) -> None:
    port = served.robot("r0")
    client = a_client(port, tmp_path / "spool")
    record_episode(client)
    Tokens(served.plane.catalog).revoke("r0")
    assert client.sync().failed == 1 and len(client.spool.pending()) == 1
    with pytest.raises(RefusedError, match="robot r0 was revoked"):
        port.statuses([("0" * 32, "0" * 64)])
    assert committed(served) == set()


def test_a_token_of_another_robot_or_cohort_is_named(served: Served) -> None:
    token = served.enrol("a", "canary")
    for own, named in (({"robot_id": "b"}, "robot a"), ({"cohort": "production"}, "cohort canary")):
        with pytest.raises(ConfigError, match=named):
            RemoteServer(served.url, token, **own).announcements("production", 0)
    Channel(served.plane.home).publish("canary")
    with pytest.raises(ConfigError, match="not of cohort production"):  # an older service, which does not compare
        RemoteServer(served.url, token).announcements("production", 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token": "secret"}, "malformed"),
        ({"url": "ftp://x"}, "ingest_url"),
        ({"url": "https://user:word@x"}, "ingest_url"),
        ({"url": "http://robots.example:8787"}, "in the clear to robots.example:8787"),
        ({"ca": Path("/nowhere.pem")}, "ingest_ca /nowhere.pem"),
    ],
)
def test_what_a_robot_is_configured_with_is_checked_at_its_start(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        RemoteServer(**{"url": "http://127.0.0.1:1", "token": TOKEN, **changes})
    assert "secret" not in str(error.value) and "word" not in str(error.value)
    RemoteServer("http://robots.example:8787", TOKEN, insecure=True)


def test_a_robot_without_a_token_is_told_how_to_get_one(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, ingest_url="https://x")
    with pytest.raises(ConfigError, match="robot r7 has no token") as error:
        RemoteServer.from_settings(settings, "r7", "learning")
    assert "lwd robots enrol r7" in error.value.fix


# --- TLS --------------------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str, issuer: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """A CA, or a certificate for 127.0.0.1 by one: `<name>.pem` and `<name>.key`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer_key, signer = (key, subject) if issuer is None else (issuer[0], issuer[1].subject)
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(True, False, False, False, False, issuer is None, issuer is None, False, False), critical=True
        )
        .sign(signer_key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return key, built


def test_tls_with_a_ca_of_ones_own(tmp_path: Path) -> None:
    ca = certificate(tmp_path, "ca")
    certificate(tmp_path, "server", ca)
    certificate(tmp_path, "other")
    both = {"ingest_cert": tmp_path / "server.pem", "ingest_key": tmp_path / "server.key"}
    with serving(tmp_path / "home", **both) as served:
        assert served.url.startswith("https://")
        port = served.robot("r0", ca=tmp_path / "ca.pem")
        assert port.submit(an_upload(1)) == "committed"
        for wrong in (None, tmp_path / "other.pem"):
            with pytest.raises(UnavailableError, match=r"certificate of 127\.0\.0\.1:\d+ is not believed") as error:
                served.robot("r0", ca=wrong).statuses([("0" * 32, "0" * 64)])
            assert "LWD_INGEST_CA" in error.value.fix


# --- a server or a store in trouble -----------------------------------------------------------------------------------


class Scripted:
    """An HTTP server that answers as a test says: `answers(method, path, body) -> status, headers, body`."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.answers: Callable[[str, str, bytes], tuple[int, dict[str, str], bytes]] = lambda *_: (200, {}, b"{}")
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                scripted.seen.append((self.command, self.path, dict(self.headers)))
                status, headers, data = scripted.answers(self.command, self.path, body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), "Connection": "close", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = True

            do_GET = do_PUT = do_POST = answer

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    found = Scripted()
    yield found
    found.close()


def test_a_server_that_is_away_is_named() -> None:
    with socket.socket() as nobody:  # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        port = RemoteServer(f"http://127.0.0.1:{nobody.getsockname()[1]}", TOKEN, timeout_s=1.0)
        _asks_in_vain(port)


def _asks_in_vain(port: RemoteServer) -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:\d+ does not answer"):
        port.statuses([("0" * 32, "0" * 64)])
    assert a_result(port.submit_many, [an_upload(1)]) is UnavailableError


def a_result(call: Callable[..., Any], *arguments: Any) -> type:
    with pytest.raises(LwdError) as error:
        call(*arguments)
    return type(error.value)


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_stumbling_server_is_asked_again(scripted: Scripted, status: int) -> None:
    scripted.answers = lambda *_: (
        (status, {}, b"<html>") if len(scripted.seen) < 3 else (200, {}, b'{"statuses": ["snapshot"]}')
    )
    port = RemoteServer(scripted.url, TOKEN)
    assert port.statuses([("0" * 32, "0" * 64)]) == ["snapshot"]
    scripted.answers = lambda *_: (status, {}, b"<html>")
    scripted.seen.clear()
    with pytest.raises(UnavailableError, match=f"HTTP {status}"):
        port.statuses([("0" * 32, "0" * 64)])
    assert len(scripted.seen) == 3


def test_a_robot_comes_back_when_it_was_told_to(scripted: Scripted) -> None:
    wire = b'{"kind": "UnavailableError", "problem": "behind", "fix": "wait"}'
    scripted.answers = lambda *_: (503, {"Retry-After": "30"}, wire)
    port = RemoteServer(scripted.url, TOKEN)
    with pytest.raises(UnavailableError, match="behind"):
        port.submit_many([an_upload(1)])
    with pytest.raises(UnavailableError, match="left alone"):
        port.submit_many([an_upload(1)])
    assert len(scripted.seen) == 1  # neither tried again at once nor asked before its time


@pytest.mark.parametrize("body", [b"", b"[]", b'{"statuses": 1}', b'{"statuses": ["snapshot", "snapshot"]}',
                                  b'{"statuses": ["gone"]}', b"\xff", b"[" * 10_000])  # fmt: skip
def test_nonsense_is_no_status(scripted: Scripted, body: bytes) -> None:
    scripted.answers = lambda *_: (200, {}, body)
    with pytest.raises(UnavailableError, match="answer"):
        RemoteServer(scripted.url, TOKEN).statuses([("0" * 32, "0" * 64)])


@pytest.mark.parametrize("body", [b"{}", b'{"announcements": [{}]}', b'{"announcements": [1]}',
                                  b'{"announcements": [{"seq": "1"}], "more": true}'])  # fmt: skip
def test_nonsense_is_no_announcement(scripted: Scripted, body: bytes) -> None:
    scripted.answers = lambda *_: (200, {}, body)
    with pytest.raises(UnavailableError, match="announcements"):
        RemoteServer(scripted.url, TOKEN).announcements("learning", 0)


class Store(DirectoryStore):
    """A directory whose objects are reached by the URLs of a scripted server."""

    url = ""

    def presign_put(self, key: str, size: int, seconds: float) -> str:
        return self.presign_get(key, seconds)

    def presign_get(self, key: str, seconds: float) -> str:
        return f"{self.url}/{key}?X-Amz-Signature=feed"


@pytest.fixture
def presigned(tmp_path: Path, scripted: Scripted) -> Iterator[tuple[Served, Store]]:
    store = Store(tmp_path / "home" / "objects")
    store.url = scripted.url

    def answer(method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        key = path[1:].partition("?")[0]
        if method == "PUT":
            store.put(key, body)
            return 200, {}, b""
        return (200, {}, store.get(key)) if store.exists(key) else (404, {}, b"<Error/>")

    scripted.answers = answer
    with serving(tmp_path / "home", objects=store) as served:
        yield served, store


def test_bytes_go_straight_to_the_store_and_the_token_does_not(
    presigned: tuple[Served, Store], scripted: Scripted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served, store = presigned
    caplog.set_level(logging.DEBUG)
    channel = Channel(served.plane.home)
    base = make_base(tmp_path / "base.safetensors")
    channel.publish(base=base)
    token = served.enrol()
    port = RemoteServer(served.url, token)
    client = a_client(port, tmp_path / "spool")
    record_episode(client)
    assert client.sync().sent == 1 and len(committed(served)) == 1
    robot = PolicySubscriber(tmp_path / "policy", "learning", port, channel.trust)
    assert robot.poll() == 1
    assert {method for method, *_ in scripted.seen} == {"PUT", "GET"} and len(scripted.seen) >= 6
    for _, _, headers in scripted.seen:
        assert "Authorization" not in headers and token not in str(headers)
    store.delete(f"policies/bases/{digest(base.read_bytes())}/base.safetensors")
    with pytest.raises(CorruptDataError, match="not in the store"):
        port.fetch(f"policies/bases/{digest(base.read_bytes())}/base.safetensors")
    lines = "\n".join(JsonLines().format(record) for record in caplog.records)
    assert token.partition(".")[2] not in lines and "feed" not in lines


@pytest.mark.parametrize(
    ("status", "error", "puts"), [(403, "expired", 1), (503, "HTTP 503", 3), (507, "no room", 1), (400, "HTTP 400", 1)]
)
def test_row_08_10_a_store_that_refuses_is_named_without_its_url(
    presigned: tuple[Served, Store], scripted: Scripted, status: int, error: str, puts: int
) -> None:
    served, _ = presigned
    works, scripted.answers = scripted.answers, lambda *_: (status, {}, b"<Error>X-Amz-Signature=feed</Error>")
    port = served.robot("r0")
    outcomes = port.submit_many([an_upload(1), an_upload(2)])
    assert len(scripted.seen) == puts  # the second is not even tried
    for outcome in outcomes:
        assert isinstance(outcome, StorageFullError if status == 507 else UnavailableError)
        assert error in outcome.problem and "feed" not in str(outcome) and "incoming" not in str(outcome)
    scripted.answers = works
    assert port.submit_many([an_upload(1), an_upload(2)]) == ["committed"] * 2


def test_row_04_a_put_whose_answer_was_lost_is_repeated(presigned: tuple[Served, Store], scripted: Scripted) -> None:
    served, _ = presigned
    works = scripted.answers

    def loses_the_first_answer(method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        answer = works(method, path, body)
        if len(scripted.seen) == 1:
            raise ConnectionResetError
        return answer

    scripted.answers = loses_the_first_answer
    scripted.server.handle_error = lambda *_: None  # type: ignore[method-assign]
    assert served.robot("r0").submit(an_upload(1)) == "committed"
    assert len(scripted.seen) == 2 and len(committed(served)) == 1


def test_row_05_an_acknowledged_put_that_vanished_is_sent_again(
    presigned: tuple[Served, Store], scripted: Scripted, tmp_path: Path
) -> None:
    served, _ = presigned
    works, scripted.answers = scripted.answers, lambda *_: (200, {}, b"")
    client = a_client(served.robot("r0"), tmp_path / "spool")
    record_episode(client)
    assert client.sync().failed == 1 and committed(served) == set()
    scripted.answers = works
    assert client.sync().sent == 1
    assert_i7_kept(served.plane.home, committed(served))


def test_row_07_a_truncated_download_is_fetched_again(
    presigned: tuple[Served, Store], scripted: Scripted, tmp_path: Path
) -> None:
    served, _ = presigned
    channel = Channel(served.plane.home)
    channel.publish()
    works = scripted.answers

    def half(method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        status, _, data = works(method, path, body)
        return (status, {"Content-Length": str(2 * len(data))}, data) if len(scripted.seen) == 1 else (status, {}, data)

    scripted.answers = half
    robot = PolicySubscriber(tmp_path / "policy", "learning", served.robot("r0"), channel.trust)
    assert robot.poll() == 1


def test_close_ends_a_wait(scripted: Scripted) -> None:
    scripted.answers = lambda *_: (502, {}, b"")
    port = RemoteServer(scripted.url, TOKEN, tries=10_000, timeout_s=60.0)
    found: list[type] = []
    asking = threading.Thread(target=lambda: found.append(a_result(port.statuses, [("0" * 32, "0" * 64)])))
    asking.start()
    while len(scripted.seen) < 2:
        time.sleep(0.01)
    port.close()
    asking.join(30)
    assert found == [UnavailableError]


# --- what it is made of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ConfigError, CorruptDataError, ConflictError, StorageFullError, UnavailableError,
                                 RefusedError])  # fmt: skip
def test_an_error_arrives_as_what_it_was(cls: type[LwdError]) -> None:
    class Special(cls):  # type: ignore[misc, valid-type]
        """Known to one end only."""

    for error in (cls("p", "f"), Special("p", "f")):
        found = from_wire(to_wire(error))
        assert type(found) is cls and found is not None and (found.problem, found.fix) == ("p", "f")
    assert from_wire({"kind": "Newer", "problem": "p", "fix": "f"}).__class__ is LwdError
    for nonsense in (None, [], {}, {"kind": 1, "problem": "p", "fix": "f"}):
        assert from_wire(nonsense) is None


def test_a_remote_robot_needs_no_server_library() -> None:
    code = (
        "import sys, infra.edge.remote, infra.edge.client, infra.policy.subscriber, infra.fleet.robot\n"
        "heavy = {'sqlalchemy', 'alembic', 'psycopg', 'fastapi', 'starlette', 'uvicorn', 'kafka', 'minio', 'torch',"
        " 'prefect'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
