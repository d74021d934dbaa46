"""The client: nothing leaves the spool before a snapshot or the quarantine holds it; resending changes nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from invariants import Plane, assert_i7_kept, open_plane
from recording import record_episode
from waiting import wait_until

from infra.catalog.schema import outbox
from infra.edge.client import BATCH_EPISODES, EdgeClient
from infra.edge.server import Upload
from infra.edge.spool import Spool
from infra.errors import ConflictError, CorruptDataError, LwdError, StorageFullError, UnavailableError
from infra.fleet.embedded import EmbeddedServer


class Server:
    """An ingest service of which a test says how it behaves."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.submitted: list[str] = []
        self.batches: list[int] = []
        self.away = False
        self.before_submit: Callable[[str], None] = lambda episode_id: None

    def submit_many(self, uploads: Sequence[Upload]) -> list[Any]:
        self.batches.append(len(uploads))
        return [self._submit(upload.episode_id) for upload in uploads]

    def _submit(self, episode_id: str) -> Any:
        try:
            self.before_submit(episode_id)
        except LwdError as error:
            return error
        self.submitted.append(episode_id)
        self.states[episode_id] = "committed"
        return "committed"

    def statuses(self, episodes: Sequence[tuple[str, str]]) -> list[Any]:
        if self.away:
            raise UnavailableError("the service is away", "wait")
        return [self.states.get(episode_id, "unknown") for episode_id, _ in episodes]


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(tmp_path: Path, server: Server) -> EdgeClient:
    return EdgeClient("r0", Spool(tmp_path / "spool", max_bytes=2**20), server, poll_s=0.01)


@pytest.mark.parametrize("final", ["snapshot", "quarantined"])
def test_an_episode_leaves_the_spool_only_when_the_server_holds_it_for_good(
    client: EdgeClient, server: Server, final: str
) -> None:
    episode_id = record_episode(client)
    assert client.sync().sent == 1
    report = client.sync()
    assert (report.waiting, report.confirmed) == (1, 0) and len(client.spool.pending()) == 1
    server.states[episode_id] = final
    assert client.sync().confirmed == 1
    assert client.spool.pending() == [] and server.submitted == [episode_id]


def test_an_episode_that_the_server_lost_is_sent_again(client: EdgeClient, server: Server) -> None:
    episode_id = record_episode(client)
    client.sync()
    server.states[episode_id] = "unknown"  # its object vanished: the reconciler wants it again
    assert client.sync().sent == 1
    assert server.submitted == [episode_id, episode_id]


def test_trouble_with_one_episode_does_not_stop_the_others(client: EdgeClient, server: Server) -> None:
    first, second = record_episode(client), record_episode(client)

    def fail(episode_id: str) -> None:
        if episode_id == first:
            raise UnavailableError("the store answers 503", "wait")

    server.before_submit = fail
    report = client.sync()
    assert (report.sent, report.failed) == (1, 1) and server.submitted == [second]
    server.before_submit = lambda episode_id: None
    assert client.sync().sent == 1 and set(server.submitted) == {first, second}


def test_a_full_spool_is_emptied_batch_by_batch(client: EdgeClient, server: Server) -> None:
    ids = [record_episode(client, steps=2) for _ in range(40)]
    assert client.sync().sent == 40
    assert server.submitted == ids and server.batches == [16, 16, 8]


def test_large_episodes_go_in_smaller_batches(
    client: EdgeClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        record_episode(client)
    monkeypatch.setattr("infra.edge.client.BATCH_BYTES", 2 * client.spool.pending()[0].size + 1)
    client.sync()
    assert server.batches == [2, 2, 1]


def test_a_server_that_is_away_ends_the_pass(client: EdgeClient, server: Server) -> None:
    for _ in range(20):
        record_episode(client, steps=2)
    server.away = True
    assert client.sync().failed == 20
    server.away = False

    def no_store(episode_id: str) -> None:
        raise UnavailableError("the store is away", "wait")

    server.before_submit = no_store
    assert client.sync().failed == 16 and server.batches == [16]
    server.before_submit = lambda episode_id: None
    assert client.sync().sent == 20


def test_an_episode_that_rotted_in_the_spool_is_set_aside(client: EdgeClient, server: Server) -> None:
    rotten, sound = record_episode(client), record_episode(client)
    path = next(closed.path for closed in client.spool.pending() if closed.episode_id == rotten)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    report = client.sync()
    assert (report.sent, report.failed) == (1, 1) and server.submitted == [sound]
    assert [closed.episode_id for closed in client.spool.pending()] == [sound]


def test_a_conflict_is_set_aside_and_kept(client: EdgeClient, server: Server) -> None:
    record_episode(client)

    def conflict(episode_id: str) -> None:
        raise ConflictError("same id, other digest", "new id")

    server.before_submit = conflict
    assert client.sync().failed == 1
    assert client.spool.pending() == [] and len(list((client.spool.root / "aside").iterdir())) == 1


def test_a_corrupt_answer_is_tried_again(client: EdgeClient, server: Server) -> None:
    """Row 5: an acknowledged PUT vanished, the service says so, the spool still has the bytes."""
    record_episode(client)

    def vanished(episode_id: str) -> None:
        server.before_submit = lambda _: None
        raise CorruptDataError("the store holds nothing", "submit again")

    server.before_submit = vanished
    assert client.sync().failed == 1
    assert client.sync().sent == 1


def test_a_full_spool_discards_the_open_attempt_and_says_so(tmp_path: Path, server: Server) -> None:
    client = EdgeClient("r0", Spool(tmp_path, max_bytes=60_000), server)
    kept = record_episode(client)
    with pytest.raises(StorageFullError):
        record_episode(client, steps=10_000)
    assert [closed.episode_id for closed in client.spool.pending()] == [kept]
    server.states[kept] = "snapshot"
    client.sync()
    record_episode(client)  # goes on by itself once there is room


def test_the_background_thread_sends_while_the_robot_records(client: EdgeClient, server: Server) -> None:
    client.start()
    ids = [record_episode(client) for _ in range(3)]
    wait_until(lambda: len(server.submitted) == 3)
    server.states.update(dict.fromkeys(ids, "snapshot"))
    wait_until(lambda: client.spool.pending() == [])
    client.stop()
    assert server.submitted == ids


def test_stopping_reports_what_still_waits(client: EdgeClient, server: Server) -> None:
    record_episode(client)
    assert client.drain(0.05) == 1
    server.states[server.submitted[0]] = "snapshot"
    assert client.drain(0.05) == 0


def _send_forever(home: Path, spool: Path) -> None:
    plane = open_plane(home)
    client = EdgeClient("r0", Spool(spool, max_bytes=2**24), EmbeddedServer(plane.catalog, plane.objects, "r0"))
    while True:
        record_episode(client)
        client.sync()


@pytest.mark.parametrize("after", [2, 5])
def test_a_robot_killed_while_sending_loses_and_repeats_nothing(tmp_path: Path, after: int) -> None:
    plane: Plane = open_plane(tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=_send_forever, args=(tmp_path, tmp_path / "spool"))
    process.start()
    wait_until(lambda: len(_committed(plane)) >= after)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    spool = Spool(tmp_path / "spool", max_bytes=2**24)
    spooled = {closed.episode_id: closed.sha256 for closed in spool.pending()}
    client = EdgeClient("r0", spool, EmbeddedServer(plane.catalog, plane.objects, "r0"))
    client.sync()
    assert client.sync().waiting == len(spooled)
    committed = _committed(plane)
    assert len(committed) >= after and {i: s for i, s in committed if i in spooled} == spooled
    assert len({episode_id for episode_id, _ in committed}) == len(committed)
    assert_i7_kept(tmp_path, committed)


def _committed(plane: Plane) -> list[tuple[str, str]]:
    with plane.catalog.read() as connection:
        return [(row.episode_id, row.sha256) for row in connection.execute(sa.select(outbox))]


class Strange(Server):
    """A server whose answers are a test's."""

    answer: Callable[[], Any] = staticmethod(lambda: None)
    on = "statuses"

    def statuses(self, episodes: Sequence[tuple[str, str]]) -> list[Any]:
        return self.answer() if self.on == "statuses" else super().statuses(episodes)

    def submit_many(self, uploads: Sequence[Upload]) -> list[Any]:
        return self.answer() if self.on == "submit" else super().submit_many(uploads)


def _raise(error: BaseException) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


ODD_ANSWERS: list[Callable[[], Any]] = [
    _raise(KeyError("x")), _raise(TypeError("x")), _raise(ValueError()), _raise(MemoryError()),
    _raise(OSError(5, "EIO")),
    lambda: None, lambda: [], lambda: 3, lambda: ["snapshot"] * 9, lambda: [{"status": "snapshot"}],
]  # fmt: skip


@pytest.mark.parametrize("on", ["statuses", "submit"])
@pytest.mark.parametrize("number", range(len(ODD_ANSWERS)))
def test_no_answer_ends_the_sending_thread_or_loses_an_episode(tmp_path: Path, number: int, on: str) -> None:
    server, events = Strange(), []
    client = EdgeClient("r0", Spool(tmp_path, max_bytes=2**20), server, poll_s=0.01,
                        on_event=lambda event, fields: events.append((event, fields)))  # fmt: skip
    server.answer, server.on = ODD_ANSWERS[number], on
    client.start()
    record_episode(client)
    if (number, on) != (len(ODD_ANSWERS) - 1, "submit"):  # where any word of a submission's answer is taken for "sent"
        wait_until(lambda: any(event == "trouble" for event, _ in events))
        assert all(len(fields["problem"]) <= 500 for event, fields in events if event == "trouble")
    assert len(client.spool.pending()) == 1
    server.on = ""
    wait_until(lambda: len(server.submitted) == 1)
    client.check()
    client.stop()


def test_a_listener_that_fails_stops_nothing(tmp_path: Path, server: Server) -> None:
    client = EdgeClient("r0", Spool(tmp_path, max_bytes=2**20), server, on_event=lambda event, fields: 1 / 0)
    record_episode(client)
    assert client.sync().sent == 1


def test_the_owner_sees_that_the_sending_thread_has_died(client: EdgeClient, server: Server) -> None:
    server.before_submit = lambda _: (_ for _ in ()).throw(SystemExit(3))
    record_episode(client)
    client.start()
    wait_until(lambda: client._death is not None)
    with pytest.raises(UnavailableError, match="SystemExit"):
        client.check()
    with pytest.raises(UnavailableError, match="SystemExit"):
        record_episode(client)
    client.stop()
    server.before_submit = lambda _: None
    client.start()
    record_episode(client)
    wait_until(lambda: len(server.submitted) == 2)
    client.stop()


def test_a_file_that_no_spool_wrote_stops_nothing(client: EdgeClient, server: Server) -> None:
    (client.spool.root / "closed" / "notes.tar").write_bytes(b"x")
    (client.spool.root / "closed" / "a.b.c.tar").write_bytes(b"x")
    record_episode(client)
    assert client.sync().sent == 1


def test_a_conflict_that_cannot_be_set_aside_does_not_stop_the_others(client: EdgeClient, server: Server) -> None:
    ids = [record_episode(client, steps=3 + i) for i in range(BATCH_EPISODES + 1)]

    def conflict(episode_id: str) -> None:
        if episode_id == ids[0]:
            raise ConflictError("other bytes", "look")

    server.before_submit = conflict
    (client.spool.root / "aside").rmdir()
    (client.spool.root / "aside").touch()
    client.sync()
    assert sorted(server.submitted) == sorted(ids[1:])


def test_a_client_that_is_started_twice_sends_with_one_thread(client: EdgeClient) -> None:
    client.start()
    first = client._thread
    client.start()
    assert client._thread is first
    client.stop()
    client.start()
    assert client._thread is not first
    client.stop()
