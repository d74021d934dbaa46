"""Rates of one robot, and backpressure on all: who must wait is told how long, and nobody waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
from invariants import example_episode, open_plane

from infra.coordinator import Coordinator
from infra.events.outbox import OutboxLog
from infra.service import limits
from infra.service.limits import Backpressure, LaterError, RobotLimits, TokenBucket


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_lets_its_rate_pass_in_the_long_run() -> None:
    clock = Clock()
    bucket = TokenBucket(2.0, 10.0, clock)
    passed = 0
    for _ in range(1000):
        clock.now += 0.1
        passed += bucket.take(1) == 0.0
    assert 200 <= passed <= 211  # two a second for 100 s, and the burst
    clock.now += 1000
    assert [bucket.take(1) for _ in range(10)] == [0.0] * 10  # idle: no more than the burst was gathered
    wait = bucket.take(1)
    assert 0 < wait <= 0.5
    clock.now += wait
    assert bucket.take(1) == 0.0


def test_what_is_larger_than_the_bucket_passes_and_is_paid_back() -> None:
    clock = Clock()
    bucket = TokenBucket(1.0, 10.0, clock)
    assert bucket.take(100) == 0.0
    assert bucket.take(1) == pytest.approx(91.0)
    clock.now += 91.001
    assert bucket.take(1) == 0.0


def test_robots_have_buckets_of_their_own() -> None:
    clock = Clock()
    robots = RobotLimits(3, 1024, clock)
    assert [robots.upload("r0", 10) > 0 for _ in range(4)] == [False, False, False, True]
    assert robots.upload("r1", 10) == 0.0
    clock.now += 21
    assert robots.upload("r0", 10) == 0.0


def test_bytes_are_capped_too() -> None:
    robots = RobotLimits(1000, 1, Clock())
    assert robots.upload("r0", 2**20 + 1) == 0.0
    assert robots.upload("r0", 1) > 0
    assert robots.upload("r1", 2**20) == 0.0


def test_requests_are_capped() -> None:
    robots = RobotLimits(1000, 1, Clock())
    for _ in range(60):
        robots.request("r0", "notes")
    with pytest.raises(LaterError) as error:
        robots.request("r0", "notes")
    assert (error.value.status, error.value.after > 0) == (429, True)
    robots.request("r0")


def test_the_service_stops_taking_episodes_while_the_coordinator_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_LOOK_S", 0.0)
    plane = open_plane(tmp_path)
    gate = Backpressure(plane.catalog, 3)
    for number in range(3):
        gate.check()
        plane.submit(example_episode(number))
    gate.check()
    plane.submit(example_episode(3))
    with pytest.raises(LaterError, match="more than 3 committed episodes") as error:
        gate.check()
    assert error.value.status == 503
    coordinator = Coordinator(plane.catalog, plane.objects, OutboxLog(plane.catalog), lambda episode: [], micro_batch=2)
    coordinator.step()
    gate.check()


def test_it_stops_for_a_moment_when_the_store_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    gate = Backpressure(open_plane(tmp_path).catalog, 3)
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    gate.store_failed()
    with pytest.raises(LaterError, match="store"):
        gate.check()
    now = 13.0
    gate.check()
