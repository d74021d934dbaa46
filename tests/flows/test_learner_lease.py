"""One learner on a home: a second is refused by name, a killed one waited out, one that was stopped cannot write."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
from invariants import open_plane, start_process
from waiting import wait_until

from flows.learner_health import Recovery
from flows.learner_lease import LearnerLease
from flows.params import HealthParams
from flows.stages.common import CHECKPOINT
from infra.errors import DivergedError, LeaseLostError, UnavailableError
from lwd_model.learner import Learner
from tests.lwd_model.factory import agent_config, normaliser

SECONDS = 1.5


def _hold(home: Path) -> int:
    """Hold the lease until told to go on; then say what becomes of a write."""
    lease = LearnerLease(open_plane(home).catalog, SECONDS)
    lease.acquire(threading.Event())
    (home / "held").touch()
    while not (home / "go").exists():
        time.sleep(0.02)
    learner = Learner(agent_config(), normaliser(), accelerator="cpu")
    recovery = Recovery(learner, home, HealthParams(), lease.prove)
    try:
        learner.save(home / "offline.ckpt")  # its own
        recovery.fall("a test")
    except LeaseLostError:
        return 42
    return 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    open_plane(tmp_path)
    monkeypatch.setattr("flows.learner_health.OFFLINE", tmp_path / "offline")
    learner = Learner(agent_config(), normaliser(), accelerator="cpu")
    learner.save(tmp_path / "offline" / CHECKPOINT)
    return tmp_path


def test_a_second_learner_is_refused_by_the_holders_name(home: Path) -> None:
    """Also when the holder does nothing for longer than its lease: a thread renews it."""
    process = start_process(_hold, home)
    try:
        wait_until((home / "held").exists)
        time.sleep(2 * SECONDS)  # an update, a start or a publication that takes long
        with pytest.raises(LeaseLostError, match=f":{process.pid}:"):
            LearnerLease(open_plane(home).catalog, SECONDS).acquire(threading.Event())
        (home / "go").touch()
        process.join(60)
        assert process.exitcode == 0 and (home / CHECKPOINT).exists()
    finally:
        process.kill()


def test_a_killed_learner_is_waited_out(home: Path) -> None:
    process = start_process(_hold, home)
    wait_until((home / "held").exists)
    process.kill()
    process.join()
    lease = LearnerLease(open_plane(home).catalog, SECONDS)
    lease.acquire(threading.Event())
    lease.prove()
    lease.release()


def test_a_learner_that_was_stopped_writes_nothing_after_another_took_over(home: Path) -> None:
    process = start_process(_hold, home)
    try:
        wait_until((home / "held").exists)
        os.kill(process.pid, signal.SIGSTOP)
        lease = LearnerLease(open_plane(home).catalog, SECONDS)
        lease.acquire(threading.Event())
        (home / CHECKPOINT).write_bytes(b"the second learner's")
        (home / "go").touch()
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == 42
        assert (home / CHECKPOINT).read_bytes() == b"the second learner's"
        lease.check()
        lease.prove()
        lease.release()
    finally:
        process.kill()


def test_a_learner_hears_from_its_thread_that_it_lost_the_lease(home: Path) -> None:
    catalog = open_plane(home).catalog
    first, second = LearnerLease(catalog, 0.3), LearnerLease(catalog, 30.0)
    first.acquire(threading.Event())
    first._lease.release()  # as if its clock had run out
    second.acquire(threading.Event())

    def told() -> bool:
        try:
            first.check()
        except LeaseLostError:
            return True
        return False

    wait_until(told)
    with pytest.raises(LeaseLostError):
        first.prove()
    first.release()
    second.prove()
    second.release()


def test_what_ended_the_learner_is_told_also_where_the_lease_cannot_be_given_back(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = LearnerLease(open_plane(home).catalog, SECONDS)
    lease.acquire(threading.Event())

    def away() -> None:
        raise UnavailableError("the catalog is away", "start it")

    monkeypatch.setattr(lease._lease, "release", away)

    def learn() -> None:
        try:
            raise DivergedError("a loss", "look")
        finally:
            lease.release()

    with pytest.raises(DivergedError):
        learn()
