"""The process that examines: it is killed and started again, and only the episode that did it is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from invariants import Plane, assert_invariants, digest, example_episode, open_plane
from test_coordinator import coordinator, drain, held, members

from infra.episode import encode
from infra.errors import ConfigError, UnavailableError
from infra.examination import OwnProcess


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


@pytest.fixture
def own() -> Iterator[OwnProcess]:
    process = OwnProcess("harmful_checks:check", seconds=2.0, memory_mib=512)
    yield process
    process.close()


def test_what_kills_or_stalls_the_process_is_refused_and_the_rest_goes_on(
    plane: Plane, own: OwnProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 1, 2, 3, 6, 8):
        plane.submit(example_episode(number))
    drain(coordinator(plane, own, micro_batch=3))  # type: ignore[arg-type]
    assert members(plane) == {0, 8}
    found = {int(name, 16): reason for name, reason in held(plane).items()}
    assert {number: stage for number, (stage, _) in found.items()} == dict.fromkeys((1, 2, 3, 6), "contract")
    assert "not examined within 2 s" in found[1][1]
    assert "SIGKILL" in found[2][1]
    assert "examine_mib" in found[3][1]
    assert "ZeroDivisionError" in found[6][1]
    assert len(capfd.readouterr().err) < 20_000, "the megabyte that an error says"


def test_one_death_is_not_the_episodes_fault_and_one_process_serves_many(
    plane: Plane, own: OwnProcess, tmp_path: Path
) -> None:
    """A process that the machine killed once is started again, and the same episode is read by the next one."""
    plane.submit(example_episode(4, task=str(tmp_path / "m")))
    for number in (5, 13, 21):
        plane.submit(example_episode(number))
    drain(coordinator(plane, own, micro_batch=1))  # type: ignore[arg-type]
    assert members(plane) == {4, 5, 13, 21} and held(plane) == {}
    with plane.catalog.read() as connection:
        rows = connection.exec_driver_sql("select warnings from snapshot_episodes where warnings != '[]'").all()
    assert len(rows) == 3 and len(set(rows)) == 1, "one process"


def test_memory_that_others_took_is_not_the_episodes_fault(plane: Plane) -> None:
    """Each leaves 64 MiB in use, of 160 that one may take."""
    own = OwnProcess("harmful_checks:forgetful", memory_mib=160)
    try:
        for number in range(6):
            plane.submit(example_episode(number))
        drain(coordinator(plane, own))  # type: ignore[arg-type]
    finally:
        own.close()
    assert members(plane) == set(range(6)) and held(plane) == {}


def test_the_batch_check_too_refuses_only_whom_it_does_not_survive(plane: Plane) -> None:
    own = OwnProcess("harmful_checks:check", "harmful_checks:batch_check", seconds=5.0)
    try:
        for number in (0, 7, 8, 5):
            plane.submit(example_episode(number))
        drain(coordinator(plane, own))  # type: ignore[arg-type]
    finally:
        own.close()
    assert {int(name, 16) for name in held(plane)} == {0, 5, 7, 8}
    assert "exit code 9" in held(plane)[f"{7:032x}"][1] and "of them" in held(plane)[f"{8:032x}"][1]


def test_a_check_that_cannot_be_loaded_is_the_deployments_trouble() -> None:
    with pytest.raises(ConfigError, match="no_such_module"):
        OwnProcess("no_such_module:check").start()


def test_a_process_that_does_not_start_refuses_no_episode(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plane.submit(example_episode(8))
    own = OwnProcess("harmful_checks:check")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    worker = coordinator(plane, own)  # type: ignore[arg-type]
    with pytest.raises(UnavailableError, match="does not start"):
        worker.step()
    assert held(plane) == {} and plane.snapshots.latest().version == 0
    monkeypatch.undo()
    drain(worker)
    own.close()
    assert members(plane) == {8}


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(one) for one in found.stdout.split()]


def test_the_process_ends_with_a_coordinator_that_is_killed(plane: Plane) -> None:
    for number in (8, 16):
        plane.submit(example_episode(number))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "infra.coordinator",
        "--home",
        str(plane.home),
        "--check",
        "harmful_checks:check",
    ]
    parent = subprocess.Popen(command, env=env)
    try:
        deadline = time.monotonic() + 60
        while plane.snapshots.latest().episodes < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        mine = children(parent.pid)
        assert len(mine) == 1
    finally:
        parent.kill()
        parent.wait()
    while Path(f"/proc/{mine[0]}").exists() and "zombie" not in Path(f"/proc/{mine[0]}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert_invariants(plane.home, {f"{n:032x}": digest(encode(example_episode(n))) for n in (8, 16)})
