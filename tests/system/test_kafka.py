"""Kafka as the log: the contract of every log through the relay, and what is Kafka's own."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from invariants import example_episode, open_plane
from kafka.structs import TopicPartition
from log_contract import LogContract, Rig, numbers
from log_tools import PARTITIONS, admin, closing, open_log, producing, relay_all

from infra.errors import ConfigError, UnavailableError
from infra.events import DeadLetter, store_offsets
from infra.events.broker import create_topic
from infra.events.kafka import KafkaLog
from infra.servers import Servers
from infra.settings import load_settings


@pytest.fixture
def rig(fleet_home: Path) -> Iterator[Rig]:
    log = open_log(fleet_home)
    yield Rig(open_plane(fleet_home), log, lambda: open_log(fleet_home), lambda: relay_all(fleet_home))
    log.close()


class TestKafkaLog(LogContract):
    pass


def poll_on(log: KafkaLog) -> None:
    """Until it raises; what is settled does not come again meanwhile."""
    while True:
        log.poll("a", 9)


def group_members(home: Path, consumer: str) -> int:
    group = f"lwd-{load_settings(home=home).kafka_topic}-{consumer}"
    with admin(home) as client:
        return len(client.describe_groups([group])[group]["members"])


def test_who_only_waits_takes_no_partitions_and_who_closes_leaves_at_once(rig: Rig, fleet_home: Path) -> None:
    rig.submit(*range(8))
    assert rig.log.lag("a") == 8
    assert group_members(fleet_home, "a") == 0
    rig.settle("a", rig.poll("a", 8))
    assert group_members(fleet_home, "a") == 1
    rig.log.poll("a", 1)  # sees what is settled
    rig.log.close()
    assert group_members(fleet_home, "a") == 0


def test_kafka_has_a_copy_of_the_offsets_for_its_own_tools(rig: Rig, fleet_home: Path) -> None:
    rig.submit(*range(8))
    events = rig.poll("a", 8)
    rig.settle("a", events)
    rig.log.poll("a", 1)
    rig.log.close()
    group = f"lwd-{rig.log.name}-a"
    with admin(fleet_home) as client:
        copied = client.list_group_offsets([group])[group]
    expected = {event.partition: event.offset for event in events}  # each partition's last
    assert {place.partition: found.offset for place, found in copied.items()} == expected


def test_members_share_the_partitions_and_take_over_what_another_left(rig: Rig, fleet_home: Path) -> None:
    """Cooperative: two rounds of rebalancing, in which nobody stops reading what he keeps."""
    for number in range(24):
        rig.plane.submit(example_episode(number, robot=f"r{number}"))
    rig.publish()
    assert {event.partition for event in rig.poll("a", 24)} == set(PARTITIONS)
    other = open_log(fleet_home)
    parts: dict[str, set[int]] = {"one": set(), "other": set()}
    stop = threading.Event()

    def poll_as(name: str, log: KafkaLog) -> None:
        while not stop.is_set():
            parts[name] = {event.partition for event in log.poll("a", 99)}

    threads = [threading.Thread(target=poll_as, args=arguments) for arguments in (("one", rig.log), ("other", other))]
    with closing(other):
        for thread in threads:
            thread.start()
        try:
            for _ in range(600):
                stop.wait(0.1)
                if parts["one"] and parts["other"] and parts["one"] ^ parts["other"] == set(PARTITIONS):
                    break
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert parts["one"] and parts["other"] and parts["one"] ^ parts["other"] == set(PARTITIONS)
    assert numbers(rig.poll("a", 24)) == list(range(24))


def test_a_missing_topic_is_named_with_its_fix(fleet_home: Path) -> None:
    settings = load_settings(home=fleet_home)
    log = KafkaLog(open_plane(fleet_home).catalog, settings.kafka_bootstrap or "", "lwd.other", {})
    for ask in (lambda: log.poll("a", 1), lambda: log.lag("a")):
        with pytest.raises(ConfigError, match=r"no topic 'lwd\.other'[\s\S]*--create --topic lwd\.other"):
            ask()
    log.close()


def test_making_a_topic_twice_keeps_it(rig: Rig, fleet_home: Path) -> None:
    rig.submit(0)
    settings = load_settings(home=fleet_home)
    create_topic(settings.kafka_bootstrap or "", settings.kafka_topic, 9)
    assert rig.log.lag("a") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acks_all": True}, "no option 'acks_all'"),
        ({"group_id": "mine"}, "'group_id' is not to be changed"),
        ({"bootstrap_servers": "elsewhere:1"}, "'bootstrap_servers' is not to be changed"),
    ],
)
def test_options_that_cannot_be_are_named(fleet_home: Path, options: dict[str, object], message: str) -> None:
    log = open_log(fleet_home, **options)
    with closing(log), pytest.raises(ConfigError, match=message):
        log.poll("a", 1)


def test_a_client_that_the_broker_does_not_understand_is_told_so(fleet_home: Path) -> None:
    log = open_log(fleet_home, security_protocol="SSL", bootstrap_timeout_ms=1500)
    with closing(log), pytest.raises(UnavailableError, match=load_settings(home=fleet_home).kafka_bootstrap):
        log.poll("a", 1)


def test_a_broker_that_is_away_is_named_once_and_leaves_nothing_behind(
    rig: Rig, fleet_home: Path, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    rig.submit(*range(4))
    events = rig.poll("a", 4)
    log = open_log(fleet_home, bootstrap_timeout_ms=500, request_timeout_ms=2000)
    rig.log.close()
    with closing(log):
        rig.settle("a", rig.poll("a", 4, log=log)[:2])
        caplog.set_level(logging.INFO)
        servers.kafka.kill()
        try:
            for attempt in range(4):
                threads = threading.active_count()
                with pytest.raises(
                    UnavailableError, match=rf"{servers.kafka.bootstrap} does not answer[\s\S]*start it"
                ):
                    poll_on(log)
                assert attempt == 0 or threading.active_count() <= threads
            with pytest.raises(UnavailableError):
                log.lag("a")
            said = [record for record in caplog.records if record.name.startswith(("kafka", "infra.events"))]
            assert len([record for record in said if record.levelno >= logging.WARNING]) == 1
        finally:
            servers.kafka.start()
        assert len(rig.poll("a", 2, log=log)) == len(events) - 2


def test_a_broker_that_stands_still_is_away_too(rig: Rig, fleet_home: Path, servers: Servers) -> None:
    rig.submit(0)
    log = open_log(fleet_home, bootstrap_timeout_ms=500, request_timeout_ms=1000)
    with closing(log):
        events = rig.poll("a", 1, log=log)
        rig.settle("a", events)
        assert servers.kafka.pid is not None
        os.kill(servers.kafka.pid, signal.SIGSTOP)
        try:
            with pytest.raises(UnavailableError, match="does not answer"):
                poll_on(log)
        finally:
            os.kill(servers.kafka.pid, signal.SIGCONT)
        rig.submit(1)
        assert numbers(rig.poll("a", 1, log=log)) == [1]


def test_settled_further_than_the_log_goes_is_a_lost_log(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.submit(*range(4), robot="r0")
    events = rig.poll("a", 4)
    with rig.plane.catalog.begin() as connection:
        store_offsets(connection, "a", {events[0].partition: 1000})
    assert rig.poll("a", 4) == events
    assert "lost its log" in caplog.text
    rig.settle("a", events)
    assert rig.log.poll("a", 4) == []


def test_records_that_the_broker_deleted_are_passed_with_a_warning(
    rig: Rig, fleet_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By its retention; what they announced is announced again by the reconciler."""
    rig.submit(*range(6), robot="r0")
    events = rig.poll("a", 6)
    with admin(fleet_home) as client:
        client.delete_records({TopicPartition(rig.log.name, events[0].partition): 4})
    rig.log.close()
    fresh = open_log(fleet_home)
    with closing(fresh):
        assert rig.poll("a", 2, log=fresh) == events[4:]
        assert rig.poll("a", 2, log=fresh) == events[4:]
        assert fresh.lag("a") == 2
        assert caplog.text.count("deleted up to 4") == 1
        rig.settle("a", events[4:])
        assert fresh.poll("a", 2) == []


def test_new_partitions_are_read_from_their_beginning(rig: Rig, fleet_home: Path) -> None:
    rig.log.close()
    log = open_log(fleet_home, metadata_max_age_ms=500)
    with closing(log):
        assert log.poll("a", 9) == []
        with admin(fleet_home) as client:
            client.create_partitions({rig.log.name: len(PARTITIONS) + 1})
        with producing(fleet_home) as send:
            send(b"in the new one", len(PARTITIONS))
        found = []
        for _ in range(100):
            if found := log.poll("a", 9):
                break
    assert isinstance(found[0], DeadLetter) and (found[0].partition, found[0].offset) == (len(PARTITIONS), 1)
