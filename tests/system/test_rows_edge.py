"""Rows 2, 4, 5, 9 and 37 of the fault matrix: the robot's end, on real servers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from invariants import KILLED, assert_i7_kept, assert_invariants, in_process
from serving import Process, Served
from small_disk import small_disk
from waiting import wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "edge"))
from recording import record_episode

from infra.catalog.schema import episodes, outbox
from infra.edge.client import EdgeClient
from infra.edge.remote import RemoteServer
from infra.edge.server import Upload
from infra.edge.spool import Spool
from infra.errors import StorageFullError
from infra.reconcile import reconcile
from infra.servers.proxy import FaultProxy
from infra.settings import load_settings

LATER = 2.0e10  # far beyond every grace


@pytest.fixture
def service(fleet_home: Path) -> Iterator[Process]:
    process = Process(fleet_home)
    process.start()
    yield process
    process.kill()


def a_client(server: RemoteServer, spool: Path) -> EdgeClient:
    return EdgeClient("r0", Spool(spool, max_bytes=2**24), server, poll_s=0.02)


def spooled(client: EdgeClient) -> dict[str, str]:
    return {closed.episode_id: closed.sha256 for closed in client.spool.pending()}


def rows(served: Served) -> tuple[dict[str, str], int]:
    """The committed (id, sha256), and how many events announce them."""
    with served.plane.catalog.read() as connection:
        found = {row.episode_id: row.sha256 for row in connection.execute(sa.select(episodes))}
        return found, int(connection.execute(sa.select(sa.func.count()).select_from(outbox)).scalar_one())


def incoming(served: Served) -> int:
    return len(list(served.plane.objects.list("incoming")))


@pytest.mark.parametrize("point", ["remote.uploaded", "remote.committed"])
def test_row_02_kill_edge_after_put_before_commit(service: Process, tmp_path: Path, point: str) -> None:
    served = service.served
    client = a_client(served.robot(), tmp_path / "spool")
    for _ in range(2):
        record_episode(client)
    wanted = spooled(client)
    client.spool.release()
    token = served.enrol()

    def work() -> None:
        a_client(RemoteServer(served.url, token, robot_id="r0"), tmp_path / "spool").sync()

    assert in_process(work, crash=point) == KILLED
    uploaded_only = point == "remote.uploaded"
    assert rows(served) == (({}, 0) if uploaded_only else (wanted, 2))
    assert incoming(served) == uploaded_only
    assert in_process(work) == 0
    assert rows(served) == (wanted, 2)
    served.plane.settle()
    reconcile(served.plane.catalog, served.plane.objects, now=LATER)
    assert incoming(served) == 0
    assert_invariants(service.home, wanted)


def test_row_04_put_acknowledged_answer_lost(fleet_home: Path, tmp_path: Path) -> None:
    store = urlsplit(str(load_settings(home=fleet_home).s3_endpoint))
    with FaultProxy(str(store.hostname), int(store.port or 0)) as proxy:
        service = Process(fleet_home, LWD_S3_ENDPOINT=f"http://127.0.0.1:{proxy.port}")
        service.start()
        try:
            client = a_client(service.served.robot(), tmp_path / "spool")
            record_episode(client)
            wanted = spooled(client)
            proxy.reset()  # the service's own connections, from its health check
            proxy.set(cut_after_bytes=0, cut_times=1)  # the PUT arrives whole; its answer does not
            assert client.sync().sent == 1
            assert proxy.counts()["cut"] == 1
            assert rows(service.served) == (wanted, 1)
            assert [item.key[:9] for item in service.plane.objects.list("episodes")] == ["episodes/"]
            assert incoming(service.served) == 0
            service.served.plane.settle()
            assert client.sync().confirmed == 1
            assert_invariants(fleet_home, wanted)
        finally:
            service.kill()


class Forgetful(RemoteServer):
    """Its store loses the first upload that it has acknowledged."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.url, served.enrol(), robot_id="r0")
        self._served, self.lost = served, 0

    def _place(self, upload: Upload, url: str) -> None:
        super()._place(upload, url)
        if not self.lost:
            self.lost += 1
            for item in self._served.plane.objects.list("incoming"):
                self._served.plane.objects.delete(item.key)


def test_row_05_acknowledged_put_vanishes(service: Process, tmp_path: Path) -> None:
    served = service.served
    said: list[str] = []
    client = EdgeClient("r0", Spool(tmp_path / "spool", max_bytes=2**24), Forgetful(served),
                        on_event=lambda event, fields: said.append(str(fields.get("problem"))))  # fmt: skip
    record_episode(client)
    wanted = spooled(client)
    report = client.sync()
    assert (report.sent, report.failed) == (0, 1) and next(iter(wanted)) in said[0]  # re-verified: not acknowledged
    assert rows(served) == ({}, 0)
    assert client.sync().sent == 1
    assert_i7_kept(service.home, wanted.items())
    # And one that the store loses after it was committed: the reconciler notices, the spool still has it.
    for item in served.plane.objects.list("episodes"):
        served.plane.objects.delete(item.key)
    reconcile(served.plane.catalog, served.plane.objects, now=LATER)
    assert client.sync().sent == 1
    served.plane.settle()
    assert client.sync().confirmed == 1
    assert_invariants(service.home, wanted)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB, where the user may mount one."""
    with small_disk(tmp_path / "disk", "512k", lazily=True) as folder:
        yield folder


def test_row_09_edge_disk_full(service: Process, tiny_disk: Path) -> None:
    served = service.served
    client = EdgeClient("r0", Spool(tiny_disk, max_bytes=2**30), served.robot(timeout_s=1.0), poll_s=0.02)
    service.kill()  # nothing leaves the robot
    with pytest.raises(StorageFullError, match=r"no space left under .*/disk"):
        _record_for_ever(client)
    wanted = spooled(client)
    assert len(wanted) > 5
    assert client.sync().failed == len(wanted)
    assert spooled(client) == wanted
    client.discard("the disk is full")
    service.start()
    wait_until(lambda: client.sync().waiting == len(wanted))
    assert_i7_kept(service.home, wanted.items())
    served.plane.settle()
    client.sync()
    left = spooled(client)  # one that could not be sealed for want of room is sealed as soon as there is some
    assert len(left) <= 1 and not left.keys() & wanted.keys()
    wanted |= left
    record_episode(client, steps=200)  # there is room again
    wanted |= spooled(client)
    client.spool.release()
    client = EdgeClient("r0", Spool(tiny_disk, max_bytes=2**30), served.robot(), poll_s=0.02)  # after a restart
    wanted |= spooled(client)  # an episode that could not be sealed for want of room is sealed now
    client.sync()
    served.plane.settle()
    client.sync()
    assert client.spool.pending() == []
    assert_invariants(service.home, wanted)
    client.spool.release()


def _record_for_ever(client: EdgeClient) -> None:
    while True:
        record_episode(client, steps=200)


def test_row_37_orchestrator_server_down(fleet_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # nobody there
    service = Process(fleet_home)
    service.start()
    try:
        client = a_client(service.served.robot(), tmp_path / "spool")
        for _ in range(3):
            record_episode(client)
        wanted = spooled(client)
        assert client.sync().sent == 3
        service.served.plane.settle()
        assert client.sync().confirmed == 3
        assert_invariants(fleet_home, wanted)
        loaded = Path(f"/proc/{service.process.pid}/maps").read_text() if service.process else ""
        assert "prefect" not in loaded
    finally:
        service.kill()
