"""What every log of committed episodes promises; run for the outbox here, for relay and Kafka with the system tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from invariants import Plane, digest, example_episode

from infra.events import DeadLetter, Event, EventLog, reset_offsets, store_offsets


@dataclass(frozen=True)
class Rig:
    """A data plane and the log of its episodes.

    Attributes:
        open: another reader of the same log, as another process would be.
        publish: brings what is committed into the log, where something has to.
    """

    plane: Plane
    log: EventLog
    open: Callable[[], EventLog]
    publish: Callable[[], None]

    def submit(self, *numbers: int, robot: str | None = None) -> None:
        for number in numbers:
            self.plane.submit(example_episode(number, robot=robot or f"r{number % 3}"), trace_id=f"trace-{number}")
        self.publish()

    def poll(self, consumer: str, count: int, most: int = 100, log: EventLog | None = None) -> list[Event]:
        """The events of one poll that returned at least `count`; a log may need a moment to find them."""
        until = time.monotonic() + 20
        while len(found := (log or self.log).poll(consumer, most)) < count and time.monotonic() < until:
            time.sleep(0.02)
        assert len(found) >= count, f"{len(found)} of {count} events"
        assert not [record for record in found if isinstance(record, DeadLetter)]
        return [record for record in found if isinstance(record, Event)]

    def settle(self, consumer: str, events: list[Event]) -> None:
        with self.plane.catalog.begin() as connection:
            for event in sorted(events, key=lambda event: event.offset):
                store_offsets(connection, consumer, {event.partition: event.offset})


def numbers(events: list[Event]) -> list[int]:
    return sorted(int(event.episode_id, 16) for event in events)


class LogContract:
    """Subclasses give the fixture `rig`."""

    def test_events_carry_their_claims(self, rig: Rig) -> None:
        rig.submit(*range(5))
        events = rig.poll("c", 5)
        assert numbers(events) == list(range(5))
        for event in events:
            data = rig.plane.objects.get(event.key)
            assert (len(data), digest(data)) == (event.size, event.sha256)
            assert event.trace_id == f"trace-{int(event.episode_id, 16)}"
            assert event.robot_id == f"r{int(event.episode_id, 16) % 3}"
            assert event.schema_version == 1

    def test_one_robots_episodes_come_in_the_order_of_their_commits(self, rig: Rig) -> None:
        rig.submit(*range(12))
        events = rig.poll("c", 12)
        for robot in ("r0", "r1", "r2"):
            own = [event for event in events if event.robot_id == robot]
            assert len({event.partition for event in own}) == 1
            assert [int(event.episode_id, 16) for event in own] == sorted(int(event.episode_id, 16) for event in own)
        for partition in {event.partition for event in events}:
            places = [event.offset for event in events if event.partition == partition]
            assert places == sorted(set(places)) and places[0] >= 1

    def test_no_more_events_than_asked_for_and_the_first_ones(self, rig: Rig) -> None:
        rig.submit(*range(6), robot="r0")
        assert [int(event.episode_id, 16) for event in rig.poll("c", 2, most=2)] == [0, 1]
        assert [int(event.episode_id, 16) for event in rig.poll("c", 4, most=4)] == [0, 1, 2, 3]

    def test_polling_moves_nothing_and_consumers_are_apart(self, rig: Rig) -> None:
        rig.submit(*range(4), robot="r0")
        first = rig.poll("a", 4)
        assert rig.poll("a", 4) == first
        rig.settle("a", first[:2])
        assert rig.poll("a", 2) == first[2:]
        assert rig.poll("b", 4) == first
        assert rig.poll("a", 2) == first[2:]

    def test_settled_events_do_not_come_again_and_new_ones_do(self, rig: Rig) -> None:
        rig.submit(*range(5))
        rig.settle("a", rig.poll("a", 5))
        assert rig.log.poll("a", 10) == []
        rig.submit(5, 6)
        assert numbers(rig.poll("a", 2)) == [5, 6]

    def test_another_process_goes_on_from_the_stored_offsets(self, rig: Rig) -> None:
        rig.submit(*range(5), robot="r0")
        events = rig.poll("a", 5)
        rig.settle("a", events[:3])
        rig.log.close()
        other = rig.open()
        try:
            assert rig.poll("a", 2, log=other) == events[3:]
        finally:
            other.close()

    def test_offsets_that_another_process_moved_are_followed(self, rig: Rig) -> None:
        rig.submit(*range(5), robot="r0")
        events = rig.poll("a", 5)
        rig.settle("a", events[:1])
        assert rig.poll("a", 2, most=2) == events[1:3]
        rig.settle("a", events[:4])
        assert rig.poll("a", 1) == events[4:]

    def test_offsets_follow_their_transaction(self, rig: Rig) -> None:
        rig.submit(0)
        events = rig.poll("a", 1)

        def fail() -> None:
            with rig.plane.catalog.begin() as connection:
                store_offsets(connection, "a", {events[0].partition: events[0].offset})
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert rig.poll("a", 1) == events

    def test_a_reset_partition_is_read_from_its_beginning(self, rig: Rig) -> None:
        rig.submit(*range(3), robot="r0")
        events = rig.poll("a", 3)
        rig.settle("a", events)
        with rig.plane.catalog.begin() as connection:
            reset_offsets(connection, "a", events[0].partition)
        assert rig.poll("a", 3) == events

    def test_the_lag_is_what_is_not_settled(self, rig: Rig) -> None:
        assert rig.log.lag("a") == 0
        rig.submit(*range(5))
        assert rig.log.lag("a") == 5
        events = rig.poll("a", 5)
        assert rig.log.lag("a") == 5
        own = [event for event in events if event.partition == events[0].partition]
        rig.settle("a", own)
        assert rig.log.lag("a") == 5 - len(own)
        assert rig.log.lag("b") == 5
