"""Real processes whose clocks are wrong by a day: ingest goes on, each episode is settled once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from invariants import KILLED, assert_invariants, digest, example_episode, in_process, open_plane, start_process
from waiting import wait_until

from infra.catalog import dialect
from infra.catalog.leases import Lease
from infra.coordinator import CONSUMER, main
from infra.episode import encode

DAY = 86_400.0


def accept(episode: object) -> list[object]:
    return []


def coordinate(home: Path, ahead: float) -> int:
    """A standby coordinator on a machine whose clock is wrong by `ahead`."""
    dialect.now = lambda connection: time.time() + ahead  # type: ignore[assignment]
    os.environ["LWD_LEASE_S"] = "1"
    return main(["--home", str(home), "--check", "test_clocks:accept", "--standby"])


def take_and_die(home: Path, ahead: float) -> None:
    dialect.now = lambda connection: time.time() + ahead  # type: ignore[assignment]
    Lease(open_plane(home).catalog, CONSUMER, 10.0).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("ahead", [DAY, 400 * DAY])
def test_a_lease_taken_a_day_ahead_silences_nothing(tmp_path: Path, ahead: float) -> None:
    plane = open_plane(tmp_path)
    assert in_process(take_and_die, tmp_path, ahead) == KILLED
    for number in range(3):
        plane.submit(example_episode(number))
    worker = start_process(coordinate, tmp_path, 0.0)
    try:
        wait_until(lambda: plane.snapshots.latest().episodes == 3, "the coordinator waits for a clock")
    finally:
        worker.terminate()
        worker.join(60)
    assert worker.exitcode == 0


def test_two_coordinators_with_clocks_a_day_apart_settle_each_episode_once(tmp_path: Path) -> None:
    plane, spooled = open_plane(tmp_path), {}
    workers = [start_process(coordinate, tmp_path, ahead) for ahead in (DAY, 0.0)]
    try:
        for number in range(24):
            plane.submit(example_episode(number))
            spooled[f"{number:032x}"] = digest(encode(example_episode(number)))
            time.sleep(0.1)
            if number == 12:  # whichever of them has the lease: the other goes on
                workers[0].kill()
                workers[0].join()
        wait_until(lambda: plane.snapshots.latest().episodes == 24, "not all was settled")
    finally:
        for worker in workers:
            worker.terminate()
            worker.join(60)
    assert_invariants(tmp_path, spooled)
