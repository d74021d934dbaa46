"""Rows 13 to 20 of the fault matrix, on real servers: what a log can do to episodes, and what it cannot."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from invariants import (
    KILLED,
    Plane,
    assert_i1_accounted_once,
    assert_i2_at_most_once,
    assert_i3_gapless,
    assert_i7_kept,
    assert_invariants,
    digest,
    example_episode,
    history,
    in_process,
    open_plane,
)
from log_tools import (
    PARTITIONS,
    closing,
    coordinator,
    drain,
    held,
    letters,
    members,
    open_log,
    open_relay,
    outbox_rows,
    positions,
    producing,
    records,
    relay_all,
    unsent,
)
from waiting import wait_until

from infra.episode import Episode, encode
from infra.errors import ConflictError, LeaseLostError
from infra.events import broker, message
from infra.objects import episode_key
from infra.reconcile import reconcile
from infra.servers import Servers
from infra.settings import load_settings

LATER = 2.0e10  # past every grace


@pytest.fixture
def plane(fleet_home: Path) -> Plane:
    return open_plane(fleet_home)


def submit(plane: Plane, *numbers: int, robot: str | None = None) -> dict[str, str]:
    """id -> sha256 of what was committed."""
    committed = {}
    for number in numbers:
        episode = example_episode(number, robot=robot or f"r{number % 5}")
        plane.submit(episode)
        committed[episode.episode_id] = digest(encode(episode))
    return committed


def claims(plane: Plane) -> list[bytes]:
    """The messages that the relay would send."""
    return [message.encode(row)[0] for row in outbox_rows(plane)]


# --- 13: the relay dies -----------------------------------------------------------------------------------------------


def relay_process(home: Path) -> None:
    relay = open_relay(home, batch=2)
    while relay.step():
        pass


@pytest.mark.parametrize(("point", "sent_twice"), [("relay.produced", 2), ("relay.marked", 2), ("relay.committed", 0)])
def test_row_13_the_relay_killed_around_its_mark(plane: Plane, fleet_home: Path, point: str, sent_twice: int) -> None:
    spooled = submit(plane, *range(6))
    plane.catalog.close()
    assert in_process(relay_process, fleet_home, crash=f"{point}:2") == KILLED
    assert unsent(plane) == (2 if point == "relay.committed" else 4)
    assert relay_all(fleet_home) == unsent_before(point)
    assert len(records(fleet_home)) == 6 + sent_twice
    assert drain(fleet_home) == 6 + sent_twice
    assert_invariants(fleet_home, spooled)
    assert members(plane) == set(range(6))


def unsent_before(point: str) -> int:
    return 2 if point == "relay.committed" else 4


# --- 14: the broker is down -------------------------------------------------------------------------------------------


def test_row_14_the_broker_is_down_and_the_outbox_drains_without_a_gap(
    plane: Plane, fleet_home: Path, servers: Servers
) -> None:
    """Killed, and down for longer than a producer keeps a record and a consumer its place in the group."""
    spooled = submit(plane, *range(4))
    stop = threading.Event()
    log = open_log(fleet_home)
    worker = coordinator(fleet_home, log, lease_s=60.0)
    relay = subprocess.Popen([sys.executable, "-m", "infra.events.relay", "--home", str(fleet_home)])
    consuming = threading.Thread(target=worker.run, args=(stop, 0.05))
    consuming.start()
    try:
        wait_for(plane, 4)
        servers.kafka.kill()
        down = time.monotonic()
        for number in range(4, 24):
            spooled |= submit(plane, number)
            time.sleep(0.5)
        assert unsent(plane) == 20, "nothing was marked that no broker acknowledged"
        servers.kafka.start()
        assert time.monotonic() - down > 10
        spooled |= submit(plane, *range(24, 28))
        wait_for(plane, 28)
    finally:
        stop.set()
        consuming.join()
        log.close()
        relay.terminate()
        relay.wait()
    assert relay.returncode == 0
    assert unsent(plane) == 0
    assert_invariants(fleet_home, spooled)
    for key in {record.key for record in records(fleet_home)}:
        ids = [int(json.loads(record.value)["episode_id"], 16) for record in records(fleet_home) if record.key == key]
        assert list(dict.fromkeys(ids)) == sorted(set(ids)), "one robot's episodes changed their order"
    lines = [json.loads(line) for line in (fleet_home / "logs" / "relay.jsonl").read_text().splitlines()]
    said = [line["message"] for line in lines if line["level"] == "warning"]
    assert 2 <= len(said) <= 5, f"an outage is said once by each part: {said}"


def wait_for(plane: Plane, episodes: int) -> None:
    def seen() -> int:
        return plane.snapshots.latest().episodes

    wait_until(lambda: seen() >= episodes, lambda: f"{seen()} of {episodes}")


# --- 15: the broker loses its log -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grown", [False, True], ids=["empty", "grown past the offsets"])
def test_row_15_the_broker_lost_its_log(
    plane: Plane, fleet_home: Path, servers: Servers, caplog: pytest.LogCaptureFixture, grown: bool
) -> None:
    """What was announced and not read is announced again by the reconciler; what was settled is not done twice."""
    settings = load_settings(home=fleet_home)
    spooled = submit(plane, *range(6))
    relay_all(fleet_home)
    drain(fleet_home)
    before = history(fleet_home)
    spooled |= submit(plane, *range(6, 12))
    relay_all(fleet_home)  # announced, acknowledged, and never read
    servers.kafka.kill()
    servers.kafka.wipe()
    servers.kafka.start()
    broker.create_topic(settings.kafka_bootstrap or "", settings.kafka_topic, len(PARTITIONS))
    spooled |= submit(plane, *range(12, 42 if grown else 12))
    relay_all(fleet_home)
    drain(fleet_home)
    assert len(members(plane)) == (36 if grown else 6)
    found = reconcile(plane.catalog, plane.objects, now=LATER)
    assert (found.announced_again, found.objects_lost) == (6, 0)
    assert relay_all(fleet_home) == 6
    drain(fleet_home)
    assert_invariants(fleet_home, spooled, before)
    assert {f"{number:032x}" for number in members(plane)} == set(spooled)
    assert "read from the beginning" in caplog.text
    assert reconcile(plane.catalog, plane.objects, now=LATER).announced_again == 0


def test_row_15_while_the_coordinator_reads_it(plane: Plane, fleet_home: Path, servers: Servers) -> None:
    """The same under a running coordinator and relay, which neither end nor need a hand."""
    settings = load_settings(home=fleet_home)
    spooled = submit(plane, *range(6))
    stop = threading.Event()
    log, relay = open_log(fleet_home), open_relay(fleet_home)
    worker = coordinator(fleet_home, log, lease_s=60.0)
    threads = [threading.Thread(target=worker.run, args=(stop, 0.05)), threading.Thread(target=relay.run, args=(stop,))]
    for thread in threads:
        thread.start()
    try:
        wait_for(plane, 6)
        servers.kafka.kill()
        servers.kafka.wipe()
        servers.kafka.start()
        spooled |= submit(plane, *range(6, 12))
        time.sleep(2)  # without its topic
        broker.create_topic(settings.kafka_bootstrap or "", settings.kafka_topic, len(PARTITIONS))
        wait_for(plane, 12)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        log.close()
    assert_invariants(fleet_home, spooled)


# --- 16 and 17: duplicates and order ----------------------------------------------------------------------------------


def test_row_16_duplicate_x_100(plane: Plane, fleet_home: Path) -> None:
    spooled = submit(plane, *range(6))
    copies = [claim for claim in claims(plane) for _ in range(100)]
    random.Random(16).shuffle(copies)
    with producing(fleet_home) as send:
        for number, claim in enumerate(copies):
            send(claim, number % len(PARTITIONS))
    before = len(records(fleet_home))
    assert before == 600
    assert drain(fleet_home, micro_batch=16) == 600
    assert_invariants(fleet_home, spooled)
    assert plane.snapshots.latest().episodes == 6
    relay_all(fleet_home)  # and once more by the regular way, after they were settled
    assert drain(fleet_home) == 6
    assert plane.snapshots.latest().episodes == 6
    assert_i2_at_most_once(fleet_home)


def test_row_17_reordering_across_partitions(plane: Plane, fleet_home: Path) -> None:
    """Three orders of the same announcements, each beginning where the last one ended: one set, in one history."""
    spooled = submit(plane, *range(12))
    rng, before = random.Random(17), {}
    for _ in range(3):
        shuffled = rng.sample(claims(plane), 12)
        with producing(fleet_home) as send:
            for claim in shuffled:
                send(claim, rng.choice(PARTITIONS))
        assert drain(fleet_home, micro_batch=rng.randint(1, 8)) == 12
        assert members(plane) == set(range(12))
        assert_invariants(fleet_home, spooled, before)
        before = history(fleet_home)
    assert plane.snapshots.latest().episodes == 12


# --- 18 and 19: poison and conflicts ----------------------------------------------------------------------------------


def test_row_18_poison_message(plane: Plane, fleet_home: Path) -> None:
    spooled = submit(plane, *range(4))
    good = claims(plane)
    body = json.loads(good[0])
    poison: dict[str, bytes | None] = {
        "not JSON": b"\x00\xff not JSON",
        "the record has no value": None,
        "a JSON list": b"[1, 2]",
        "field 'sha256' is missing": json.dumps({k: v for k, v in body.items() if k != "sha256"}).encode(),
        "field 'size' is '1'": json.dumps({**body, "size": "1"}).encode(),
        "field 'episode_id' is '../x'": json.dumps({**body, "episode_id": "../x"}).encode(),
        "not the content address": json.dumps({**body, "key": "episodes/00/other.tar"}).encode(),
        "message schema 2": json.dumps({**body, "schema": 2}).encode(),
    }
    with producing(fleet_home) as send:
        for number, value in enumerate(poison.values()):
            send(value, number % len(PARTITIONS))
            send(good[number % 4], number % len(PARTITIONS))
    assert drain(fleet_home, micro_batch=3) == 16
    assert members(plane) == set(range(4))
    assert_invariants(fleet_home, spooled)
    found = letters(plane)
    assert len(found) == len(poison)
    for reason, value in poison.items():
        (row,) = [row for row in found if reason in row.reason]
        assert row.log == load_settings(home=fleet_home).kafka_topic
        assert value is None or row.payload == value.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")
    assert sum(positions(plane).values()) == 16, "every partition advanced past its poison"


def test_row_18_unknown_schema_of_an_episode(plane: Plane, fleet_home: Path) -> None:
    episode = example_episode(1)
    data = encode(episode)
    plane.ingest.submit("r0", episode.episode_id, data, digest(data), len(data), {"schema_version": 99})
    relay_all(fleet_home)
    drain(fleet_home)
    assert letters(plane) == []
    assert held(plane) == {episode.episode_id: [(digest(data), "schema")]}
    assert_i1_accounted_once(fleet_home, [(episode.episode_id, digest(data))])


def test_row_19_same_id_other_sha(plane: Plane, fleet_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Handed in, it is refused, kept aside and told; announced past the ingest service, it changes nothing."""
    spooled = submit(plane, 1, 2)
    other = example_episode(1, robot="r1", task="L1")
    data = encode(other)
    with pytest.raises(ConflictError, match="in quarantine"):
        plane.submit(other)
    forged = json.loads(claims(plane)[1]) | {"sha256": digest(b"forged"), "key": episode_key(digest(b"forged"))}
    with producing(fleet_home) as send:
        send(json.dumps(forged).encode())
    relay_all(fleet_home)
    drain(fleet_home)
    assert_invariants(fleet_home, spooled)
    assert_i1_accounted_once(fleet_home, [(other.episode_id, digest(data))])
    assert_i7_kept(fleet_home, spooled.items())
    assert held(plane) == {other.episode_id: [(digest(data), "conflict")]}
    version = plane.snapshots.latest().version
    assert {m.episode_id: m.sha256 for m in plane.snapshots.episodes(version)} == spooled


# --- 20: a pause that the group does not wait for ---------------------------------------------------------------------


def test_row_20_rebalance_past_the_poll_interval(plane: Plane, fleet_home: Path) -> None:
    """A coordinator stands still in the middle of a micro-batch; another takes its lease and its partitions.

    All of it stands still, as under SIGSTOP: the thread that keeps its lease as well.
    """
    spooled = submit(plane, *range(8))
    relay_all(fleet_home)
    impatient = {"max_poll_interval_ms": 1000, "session_timeout_ms": 6000, "heartbeat_interval_ms": 200}
    stuck, taken_over = threading.Event(), threading.Event()

    def stand_still(episode: Episode) -> Sequence[Any]:
        stuck.set()
        assert taken_over.wait(60)
        return []

    log, other_log = open_log(fleet_home, **impatient), open_log(fleet_home, **impatient)
    paused = coordinator(fleet_home, log, stand_still, holder="paused:1", lease_s=1.0, micro_batch=8)
    paused.lease.kept = contextlib.nullcontext  # type: ignore[method-assign]
    other = coordinator(fleet_home, other_log, holder="other:2", lease_s=60.0, micro_batch=3)
    ended: list[BaseException] = []

    def run_paused() -> None:
        try:
            while True:
                paused.step()
        except LeaseLostError as error:
            ended.append(error)

    thread = threading.Thread(target=run_paused)
    with closing(log, other_log):
        thread.start()
        assert stuck.wait(60)
        settled = 0
        until = time.monotonic() + 60
        while settled < 8 and time.monotonic() < until:
            try:
                settled += other.step()
            except LeaseLostError:  # not yet expired
                time.sleep(0.1)
        assert settled == 8, "the partitions of the one that stands still were not given to the other"
        before = history(fleet_home)
        taken_over.set()
        thread.join()
        assert ended and "held by other:2" in str(ended[0])
        assert history(fleet_home) == before, "the one that came back wrote"
        assert_invariants(fleet_home, spooled, before)
        # It takes over again, joins the group anew, and goes on where the other one ended.
        other.lease.release()
        other_log.close()
        spooled |= submit(plane, *range(8, 11))
        relay_all(fleet_home)
        settled = 0
        while settled < 3 and time.monotonic() < until:
            settled += paused.step()
        assert settled == 3
    assert_invariants(fleet_home, spooled, before)
    assert plane.snapshots.latest().episodes == 11
    assert_i3_gapless(fleet_home)
