"""The relay: what it writes, that nobody waits for it, that two of it do no harm, and its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from invariants import Plane, example_episode, in_process, open_plane
from log_tools import closing, open_relay, records, relay_all, unsent
from waiting import wait_until

from infra.catalog import Catalog
from infra.errors import ConfigError, UnavailableError
from infra.events.relay import Relay, main
from infra.servers import Servers, write_settings
from infra.settings import load_settings

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def plane(fleet_home: Path) -> Plane:
    return open_plane(fleet_home)


def submit(plane: Plane, *numbers: int) -> None:
    for number in numbers:
        plane.submit(example_episode(number, robot=f"r{number % 5}"), trace_id=TRACE)


def test_a_record_has_the_claim_the_robots_key_and_the_trace(plane: Plane, fleet_home: Path) -> None:
    submit(plane, 7)
    assert relay_all(fleet_home) == 1
    (record,) = records(fleet_home)
    body = json.loads(record.value)
    assert (body["episode_id"], body["schema"], body["trace_id"]) == (f"{7:032x}", 1, TRACE)
    assert record.key == b"r2"
    assert dict(record.headers) == {"schema": b"1", "traceparent": TRACE.encode()}


def test_each_entry_is_sent_once_and_marked(plane: Plane, fleet_home: Path) -> None:
    submit(plane, *range(7))
    relay = open_relay(fleet_home, batch=3)
    with closing(relay):
        assert [relay.step() for _ in range(4)] == [3, 3, 1, 0]
    assert unsent(plane) == 0
    found = records(fleet_home)
    assert len(found) == 7
    for robot in (b"r0", b"r1"):
        own = [int(json.loads(record.value)["episode_id"], 16) for record in found if record.key == robot]
        assert own == sorted(own) and len(own) == 2


def test_writers_do_not_wait_for_a_relay_that_waits_for_the_broker(
    plane: Plane, fleet_home: Path, servers: Servers
) -> None:
    submit(plane, 0)
    relay = open_relay(fleet_home)
    failed: list[Exception] = []

    def step() -> None:
        try:
            relay.step()
        except UnavailableError as error:
            failed.append(error)

    with closing(relay):
        relay.step()  # connected
        submit(plane, 1)
        assert servers.kafka.pid is not None
        os.kill(servers.kafka.pid, signal.SIGSTOP)
        try:
            waiting = threading.Thread(target=step)
            waiting.start()
            time.sleep(0.5)
            submit(plane, 2, 3)
            assert waiting.is_alive(), "the writers waited for the relay"
            waiting.join()
        finally:
            os.kill(servers.kafka.pid, signal.SIGCONT)
        assert failed
        assert unsent(plane) == 3
        wait_until(lambda: relay_all(fleet_home) >= 0 and unsent(plane) == 0)
    assert {json.loads(record.value)["episode_id"] for record in records(fleet_home)} == {
        f"{number:032x}" for number in range(4)
    }


def test_two_relays_at_once_send_nothing_twice(plane: Plane, fleet_home: Path) -> None:
    submit(plane, *range(60))
    settings = load_settings(home=fleet_home)
    counts: list[int] = []

    def work() -> None:
        catalog = Catalog(settings.catalog_url)
        relay = Relay(catalog, settings.kafka_bootstrap or "", settings.kafka_topic, {}, batch=4)
        with closing(catalog, relay):
            while handled := relay.step():
                counts.append(handled)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    relay_all(fleet_home)  # what was locked when the others looked
    assert len(records(fleet_home)) == 60
    assert unsent(plane) == 0


def test_a_missing_topic_is_named_and_nothing_is_marked(plane: Plane, fleet_home: Path) -> None:
    submit(plane, 0)
    settings = load_settings(home=fleet_home)
    relay = Relay(plane.catalog, settings.kafka_bootstrap or "", "lwd.other", {})
    with closing(relay), pytest.raises(ConfigError, match=r"no topic 'lwd\.other'"):
        relay.step()
    assert unsent(plane) == 1


def test_an_option_that_its_promise_rests_on_is_refused(plane: Plane, fleet_home: Path) -> None:
    settings = load_settings(home=fleet_home)
    relay = Relay(plane.catalog, settings.kafka_bootstrap or "", settings.kafka_topic, {"acks": 1})
    with closing(relay), pytest.raises(ConfigError, match="'acks' is not to be changed"):
        relay.step()


# --- the process ------------------------------------------------------------------------------------------------------


def test_the_process_relays_until_it_is_told_to_stop(plane: Plane, fleet_home: Path) -> None:
    submit(plane, 0, 1)
    relay = subprocess.Popen([sys.executable, "-m", "infra.events.relay", "--home", str(fleet_home)])
    try:
        wait_until(lambda: unsent(plane) == 0)
        submit(plane, 2)
        wait_until(lambda: unsent(plane) == 0)
        relay.terminate()
        assert relay.wait(60) == 0
    finally:
        relay.kill()
        relay.wait()
    assert len(records(fleet_home)) == 3
    log = (fleet_home / "logs" / "relay.jsonl").read_text()
    assert '"entries": 2' in log
    assert (load_settings(home=fleet_home).catalog or "").split(":")[2].split("@")[0] not in log, "a password"


def test_it_does_not_outlive_its_parent(plane: Plane, fleet_home: Path) -> None:
    code = (
        "import os, subprocess, sys, time; p = subprocess.Popen([sys.executable, '-m', 'infra.events.relay', '--home',"
        f" {str(fleet_home)!r}, '--parent', str(os.getpid())]); print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        submit(plane, 0)
        wait_until(lambda: unsent(plane) == 0)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


def test_tables_of_another_version_are_named(fleet_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert in_process(main, ["--home", str(fleet_home)]) == ConfigError.exit_code
    assert "lwd migrate" in capfd.readouterr().err


def test_a_database_that_is_away_at_the_start_is_waited_for(fleet_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "away"
    values = load_settings(home=fleet_home).model_dump(exclude_unset=True)
    away = {name: values[name] for name in ("kafka_bootstrap", "kafka_topic", "s3_endpoint")}
    write_settings(home, {"profile": "fleet", "catalog": "postgresql+psycopg://u@127.0.0.1:1/x", **away})
    relay = subprocess.Popen([sys.executable, "-m", "infra.events.relay", "--home", str(home)])
    try:
        log = home / "logs" / "relay.jsonl"
        wait_until(lambda: log.exists() and "waiting" in log.read_text())
        relay.terminate()
        assert relay.wait(60) == UnavailableError.exit_code
    finally:
        relay.kill()
        relay.wait()
