"""The ingest service on PostgreSQL and Garage: episodes and policies go by presigned URLs, nothing else changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
import urllib3
from invariants import assert_i7_kept, assert_invariants, digest
from serving import Process, Served
from waiting import wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "edge"))
sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "policy"))
from policies import Channel, make_base
from recording import record_episode

from infra.catalog.schema import episodes
from infra.edge.client import EdgeClient
from infra.edge.server import Upload
from infra.edge.spool import Spool
from infra.errors import LwdError
from infra.policy.subscriber import PolicySubscriber
from infra.servers import Servers
from infra.service.auth import Tokens
from infra.settings import load_settings


@pytest.fixture
def service(fleet_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    process = Process(fleet_home, LWD_ROBOT_EPISODES_PER_MIN="100000", LWD_ROBOT_MIB_PER_MIN="100000")
    process.start()
    yield process
    process.kill()


def sent(verb: str, url: str, body: bytes | None = None) -> int:
    """The store's status; on a connection of its own, since the store ends those on which it refused something."""
    return urllib3.request(verb, url, body=body, headers={"Connection": "close"}, retries=False).status


def a_client(served: Served, spool: Path, robot: str) -> EdgeClient:
    return EdgeClient(robot, Spool(spool, max_bytes=2**27), served.robot(robot), poll_s=0.02)


def logs(home: Path) -> str:
    return "".join(path.read_text() for path in (home / "logs").iterdir())


def test_episodes_of_several_robots_end_in_a_snapshot(service: Process, tmp_path: Path) -> None:
    served = service.served
    spooled: dict[str, str] = {}
    clients = [a_client(served, tmp_path / f"spool-{robot}", robot) for robot in ("r0", "r1", "r2")]
    for client in clients:
        for steps in range(2, 22):
            record_episode(client, steps=steps)
        spooled |= {closed.episode_id: closed.sha256 for closed in client.spool.pending()}
    for client in clients:
        client.start()
    wait_until(lambda: _committed(served) == len(spooled))
    served.plane.settle()
    wait_until(lambda: not any(client.spool.pending() for client in clients))
    for client in clients:
        client.stop()
    assert_invariants(service.home, spooled)
    assert list(served.plane.objects.list("incoming")) == []
    assert service.stop() == 0
    settings = load_settings(home=service.home)
    assert settings.s3_secret_key is not None
    text = logs(service.home)
    assert '"message": "commit"' in text
    for secret in ("X-Amz-Signature", "Bearer", settings.s3_secret_key.get_secret_value()):
        assert secret not in text


def test_a_large_episode_goes_straight_to_the_store(service: Process, tmp_path: Path) -> None:
    served, settings = service.served, load_settings(home=service.home)
    path = tmp_path / "episode.tar"
    path.write_bytes(bytes(range(256)) * (40 * 2**12))
    sha, size, token = digest(path.read_bytes()), path.stat().st_size, served.enrol()
    asked = {"episodes": [{"episode_id": "a" * 32, "sha256": sha, "size": size}]}
    (place,) = served.ask("POST", "/v1/uploads", token, asked)[1]["episodes"]
    assert urlsplit(place["url"]).netloc == urlsplit(str(settings.s3_endpoint)).netloc
    assert served.robot().submit(Upload("a" * 32, sha, size, path)) == "committed"
    assert_i7_kept(service.home, [("a" * 32, sha)])


def test_a_permit_is_for_one_key_and_one_verb(service: Process) -> None:
    served = service.served
    asked = {"episodes": [{"episode_id": "a" * 32, "sha256": "0" * 64, "size": 4}]}
    (place,) = served.ask("POST", "/v1/uploads", served.enrol("a"), asked)[1]["episodes"]
    elsewhere = [
        place["url"].replace("/incoming/a/", "/incoming/b/"),
        place["url"].replace(place["key"], "episodes/00/" + "0" * 64 + ".tar"),
        place["url"].replace("X-Amz-Expires=300", "X-Amz-Expires=600000"),
        place["url"].partition("?")[0],
    ]
    for url in elsewhere:
        assert url != place["url"]
        assert sent("PUT", url, b"evil") in (400, 403)
    for verb in ("GET", "DELETE"):
        assert sent(verb, place["url"]) in (400, 403)
    assert list(served.plane.objects.list("incoming")) == list(served.plane.objects.list("episodes")) == []
    assert sent("PUT", place["url"], b"good") == 200
    (item,) = served.plane.objects.list("incoming")
    assert item.key == place["key"]


def test_bytes_changed_after_the_upload_are_refused(service: Process, tmp_path: Path) -> None:
    """A robot that writes again to its own key, with its permit, changes nothing that was verified."""
    served, token, good = service.served, service.served.enrol("a"), b"good" * 100
    named = {"episode_id": "a" * 32, "sha256": digest(good), "size": len(good)}
    (place,) = served.ask("POST", "/v1/uploads", token, {"episodes": [named]})[1]["episodes"]
    assert sent("PUT", place["url"], b"evil" * 100) == 200
    answer = served.ask("POST", "/v1/episodes", token, {"episodes": [{**named, "key": place["key"]}]})[1]
    assert answer["episodes"][0]["error"]["kind"] == "CorruptDataError"
    (place,) = served.ask("POST", "/v1/uploads", token, {"episodes": [named]})[1]["episodes"]
    assert sent("PUT", place["url"], good) == 200
    answer = served.ask("POST", "/v1/episodes", token, {"episodes": [{**named, "key": place["key"]}]})[1]
    assert answer["episodes"] == [{"status": "committed"}]
    assert sent("PUT", place["url"], b"evil" * 100) == 200
    assert_i7_kept(service.home, [("a" * 32, digest(good))])


def test_policies_and_their_base_come_by_presigned_urls(service: Process, tmp_path: Path) -> None:
    served = service.served
    channel = Channel(service.home)
    channel.publish(base=make_base(tmp_path / "base.safetensors"))
    robot = PolicySubscriber(tmp_path / "policy", "learning", served.robot(), channel.trust)
    assert robot.poll() == 1
    active = robot.activate_at_boundary()
    assert active is not None and (active.bundle / "base.safetensors").exists()
    (said,) = channel.source.announcements("learning", 0)
    path = f"/v1/policies/objects/{said.manifest_sha256}/manifest.json"
    status, _, headers = served.ask("GET", path, served.enrol())
    assert status == 307 and "X-Amz-Signature" in headers["Location"]
    assert served.ask("GET", path)[0] == 401


def test_a_revocation_counts_in_a_running_service(service: Process) -> None:
    served = service.served
    token = served.enrol("a")
    assert served.ask("GET", "/v1/announcements", token)[0] == 200
    Tokens(served.plane.catalog).revoke("a")
    wait_until(lambda: served.ask("GET", "/v1/announcements", token)[0] == 401, seconds=10)


def test_servers_that_go_and_come_back_are_waited_out(service: Process, servers: Servers, tmp_path: Path) -> None:
    served = service.served
    client = a_client(served, tmp_path / "spool", "r0")
    record_episode(client)
    servers.garage.kill()
    wait_until(lambda: served.ask("GET", "/healthz")[0] == 503)
    assert client.sync().failed == 1
    servers.garage.start()
    wait_until(lambda: client.sync().waiting == 1)
    servers.postgres.kill()
    record_episode(client)
    assert client.sync().failed == 2
    wait_until(lambda: served.ask("GET", "/healthz")[:2] == (503, {"catalog": False, "store": True}))
    servers.postgres.start()
    wait_until(lambda: _counts(client) == 2)
    assert_i7_kept(service.home, [(closed.episode_id, closed.sha256) for closed in client.spool.pending()])


def _counts(client: EdgeClient) -> int:
    try:
        return client.sync().waiting
    except LwdError:
        return 0


def _committed(served: Served) -> int:
    with served.plane.catalog.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(episodes)).scalar_one())
