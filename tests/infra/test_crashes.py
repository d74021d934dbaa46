"""SIGKILL at every crash point of the data plane's core, and at random moments: nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from invariants import (
    KILLED,
    Plane,
    assert_i1_accounted_once,
    assert_i7_kept,
    assert_invariants,
    digest,
    example_episode,
    history,
    in_process,
    open_plane,
    start_process,
)
from waiting import wait_until

from infra.coordinator import Coordinator, main
from infra.crashpoints import registered
from infra.episode import Episode, encode
from infra.errors import ConfigError, ConflictError, LeaseLostError
from infra.events.outbox import OutboxLog
from infra.reconcile import reconcile

CORE = ("coordinator.py", "ingest.py", "objects/directory.py", "reconcile.py", "snapshots.py", "catalog/")
# Where the crash points of other files are enumerated and passed.
ELSEWHERE = {"policy/": "policy", "edge/": "edge", "fleet/": "fleet", "service/": "service", "reader.py": "",
             "prefetcher.py": "", "collect.py": "", "recover.py": "", "events/": "../system"}  # fmt: skip
POINTS = [name for name, where in registered().items() if where.startswith(CORE) and name != "coordinator.started"]
EPISODES = 6
ALTERED = f"{4:032x}"
UNREADABLE = f"{2:032x}"


class Refusal:
    rule, severity, message = "short", "block", "too short"


def check(episode: Episode) -> Sequence[Refusal]:
    """The contract of these tests: task S4 is refused."""
    return [Refusal()] if episode.task == "S4" else []


def spool(home: Path) -> dict[str, tuple[Path, str]]:
    return {path.name[:32]: (path, digest(path.read_bytes())) for path in sorted((home / "spool").iterdir())}


def fill_spool(home: Path) -> dict[str, str]:
    (home / "spool").mkdir(exist_ok=True)
    for number in range(EPISODES):
        episode = example_episode(number)
        (home / "spool" / f"{episode.episode_id}.tar").write_bytes(encode(episode))
    return {name: sha for name, (_, sha) in spool(home).items()}


def work(home: Path) -> None:
    """All that the core does, until the spool is empty; started again after a kill it goes on."""
    plane = open_plane(home)
    log = home / "acknowledged"
    coordinator = Coordinator(plane.catalog, plane.objects, OutboxLog(plane.catalog), check, micro_batch=2, lease_s=0.1)
    while pending := spool(home):
        for name, (path, sha) in pending.items():
            if plane.ingest.status(name, sha) == "unknown":
                plane.ingest.submit("r0", name, path, sha, path.stat().st_size)
                with log.open("a") as handle:
                    handle.write(f"{name} {sha}\n")
        other = encode(example_episode(4, task="L4"))
        with contextlib.suppress(ConflictError):
            plane.ingest.submit("r0", ALTERED, other, digest(other), len(other))
        reconcile(plane.catalog, plane.objects, now=2.0e10)  # no grace: what waits is announced twice
        try:
            while coordinator.step():
                pass
        except LeaseLostError:  # the killed one's; it ends by itself
            time.sleep(0.05)
        if plane.ingest.status(UNREADABLE) == "snapshot":
            plane.snapshots.withdraw([UNREADABLE], reason="unreadable", writer="reader")
        for name, (path, sha) in pending.items():
            if plane.ingest.status(name, sha) in ("snapshot", "quarantined"):
                path.unlink()
        reconcile(plane.catalog, plane.objects, now=2.0e10)
    coordinator.lease.release()


def assert_ended_well(home: Path, spooled: dict[str, str], before: dict) -> None:  # type: ignore[type-arg]
    assert spool(home) == {}
    assert_invariants(home, spooled, before)
    altered = digest(encode(example_episode(4, task="L4")))
    assert_i1_accounted_once(home, [(ALTERED, altered)])
    plane = open_plane(home)
    refused = {f"{n:032x}" for n in range(EPISODES) if n % 4 == 3}
    members = {m.episode_id for m in plane.snapshots.episodes(plane.snapshots.latest().version)}
    assert members == spooled.keys() - refused - {UNREADABLE}
    acknowledged = {tuple(line.split()) for line in (home / "acknowledged").read_text().splitlines()}
    assert_i7_kept(home, acknowledged)  # type: ignore[arg-type]


def test_the_work_without_a_crash(tmp_path: Path) -> None:
    spooled = fill_spool(tmp_path)
    assert in_process(work, tmp_path) == 0
    assert_ended_well(tmp_path, spooled, {})


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_crash_point(tmp_path: Path, point: str) -> None:
    spooled = fill_spool(tmp_path)
    assert in_process(work, tmp_path, crash=point) == KILLED, f"nothing passes the crash point {point}"
    before = history(tmp_path)
    assert in_process(work, tmp_path) == 0
    assert_ended_well(tmp_path, spooled, before)


def settle(home: Path) -> None:
    """The coordinator alone, with nobody to announce again what it skipped."""
    open_plane(home).settle(check, micro_batch=2, lease_s=0.01)


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("coordinator.")])
def test_the_offsets_move_with_the_effects(tmp_path: Path, point: str) -> None:
    plane = open_plane(tmp_path)
    for number in range(EPISODES):
        plane.submit(example_episode(number))
    assert in_process(settle, tmp_path, crash=f"{point}:2") == KILLED
    before = history(tmp_path)
    time.sleep(0.02)  # the killed one's lease
    assert in_process(settle, tmp_path) == 0
    spooled = {f"{n:032x}": digest(encode(example_episode(n))) for n in range(EPISODES)}
    assert_invariants(tmp_path, spooled, before)
    assert plane.snapshots.latest().version == EPISODES // 2


def test_killed_again_and_again_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(7)
    spooled = fill_spool(tmp_path)
    before: dict = {}  # type: ignore[type-arg]
    kills = 0
    for _ in range(10):
        crash = f"{rng.choice(POINTS)}:{rng.randint(1, 4)}" if rng.random() < 0.5 else None
        process = start_process(work, tmp_path, crash=crash)
        process.join(rng.uniform(0.02, 0.2))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        kills += process.exitcode == KILLED
        now = history(tmp_path)
        assert before == {version: now[version] for version in before}, "I4"
        before = now
    assert kills > 0
    assert in_process(work, tmp_path) == 0
    assert_ended_well(tmp_path, spooled, before)


def test_every_crash_point_has_a_test_that_reaches_it() -> None:
    """A point in a file outside CORE must be enumerated by a test of its own folder."""
    root = Path(__file__).parent
    for point, where in registered().items():
        if where.startswith(CORE):
            continue
        folders = [folder for prefix, folder in ELSEWHERE.items() if where.startswith(prefix)]
        assert folders, f"crash point {point} at {where} is passed by no test: add its file to CORE or ELSEWHERE"
        tests = "\n".join(path.read_text() for path in (root / folders[0]).rglob("test_*.py"))
        assert point in tests or "registered(" in tests, f"no test below {root / folders[0]} names {point}"


def test_a_crash_point_must_have_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.crashpoints.__file__", str(tmp_path / "crashpoints.py"))
    (tmp_path / "a.py").write_text("crashpoint('x')\n")
    assert registered() == {"x": "a.py:1"}
    (tmp_path / "b.py").write_text("crashpoint('x')\n")
    with pytest.raises(ConfigError, match=r"'x' is at a\.py:1 and at b\.py:1"):
        registered()
    (tmp_path / "b.py").write_text("crashpoint(name)\n")
    with pytest.raises(ConfigError, match=r"b\.py:1 is not named by a literal"):
        registered()


# --- the process itself -----------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWD_LEASE_S", "1.0")
    monkeypatch.setenv("LWD_POLL_S", "0.02")


def arguments(home: Path, *options: str) -> list[str]:
    return ["--home", str(home), "--check", "test_crashes:check", *options]


def wait_for(plane: Plane, version: int) -> None:
    wait_until(lambda: plane.snapshots.latest().version >= version, f"no snapshot {version}")


@pytest.mark.usefixtures("quick")
def test_the_coordinator_process_from_start_to_takeover(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Killed at its start, refused beside another, taken over from when that is killed, and stopped by SIGTERM."""
    plane = open_plane(tmp_path)
    assert in_process(main, arguments(tmp_path), crash="coordinator.started") == KILLED
    plane.submit(example_episode(1))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # it loads `check` from here
    first = subprocess.Popen([sys.executable, "-m", "infra.coordinator", *arguments(tmp_path)], env=env)
    try:
        wait_for(plane, 1)
        assert in_process(main, arguments(tmp_path)) == LeaseLostError.exit_code
        said = capfd.readouterr().err
        assert f":{first.pid}:" in said and "fix:" in said
        second = start_process(main, arguments(tmp_path, "--standby"))
        first.kill()
        plane.submit(example_episode(2))
        wait_for(plane, 2)
        second.terminate()
        second.join(60)
        assert second.exitcode == 0
    finally:
        first.kill()
        first.wait()
    assert_invariants(tmp_path, {f"{n:032x}": digest(encode(example_episode(n))) for n in (1, 2)})
    assert (tmp_path / "logs" / "coordinator.jsonl").read_text().count('"snapshot": 2') == 1


@pytest.mark.usefixtures("quick")
def test_a_check_that_cannot_be_loaded_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = in_process(main, arguments(tmp_path, "--check", "no_such_module:check"))
    assert code == ConfigError.exit_code
    assert "no_such_module:check" in capfd.readouterr().err
