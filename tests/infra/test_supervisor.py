"""The supervisor restarts what dies, leaves what finishes, isolates what keeps dying, and itself survives anything."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from infra.supervisor import PARTS, ProcessSpec, Supervisor, isolated_parts, read_parts


def wait_for(condition, supervisor: Supervisor, seconds: float = 20.0) -> None:
    def holds() -> bool:
        supervisor.poll()
        return condition()

    wait_until(holds, seconds=seconds)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, backoff_s=0.01)
    supervisor.start(ProcessSpec("sleeper", python("import time; time.sleep(60)")))
    first = supervisor.pid("sleeper")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: supervisor.restarts["sleeper"] == 1, supervisor)
    assert supervisor.pid("sleeper") != first
    assert supervisor.stop() == []


def test_a_finished_process_is_left(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    supervisor.start(ProcessSpec("once", python("print('done')")))
    wait_for(lambda: supervisor.finished("once"), supervisor)
    assert supervisor.restarts["once"] == 0
    assert supervisor.tail("once") == "done"


def test_one_that_keeps_dying_is_isolated_and_the_others_go_on(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, state=tmp_path / PARTS, backoff_s=0.01, longest_pause_s=0.1, max_deaths=2)
    supervisor.start(ProcessSpec("broken", python("raise SystemExit('no such port')")))
    supervisor.start(ProcessSpec("sound", python("import time; time.sleep(60)")))
    wait_for(lambda: "broken" in supervisor.isolated, supervisor)
    part = supervisor.isolated["broken"]
    assert part.deaths > 2 and "exit code 1" in part.cause and "no such port" in part.cause
    before = supervisor.restarts["broken"]
    wait_for(lambda: supervisor.restarts["broken"] > before + 2, supervisor)  # never given up
    assert set(supervisor.isolated) == {"broken"} and supervisor.restarts["sound"] == 0
    states = {part["name"]: part["state"] for part in read_parts(tmp_path / PARTS)["parts"]}
    assert states == {"broken": "isolated", "sound": "running"}
    (line,) = isolated_parts(tmp_path)
    assert "broken" in line and "no such port" in line
    supervisor.stop()
    assert isolated_parts(tmp_path) == []


def test_one_that_works_again_is_isolated_no_more(tmp_path: Path) -> None:
    (tmp_path / "bad").touch()
    code = f"import os, sys, time; os.path.exists({str(tmp_path / 'bad')!r}) and sys.exit(3); time.sleep(60)"
    supervisor = Supervisor(tmp_path, backoff_s=0.01, longest_pause_s=0.1, max_deaths=1, quick_s=0.5)
    supervisor.start(ProcessSpec("part", python(code)))
    wait_for(lambda: "part" in supervisor.isolated, supervisor)
    (tmp_path / "bad").unlink()
    wait_for(lambda: not supervisor.isolated, supervisor)
    supervisor.stop()


def test_deaths_are_counted_by_progress_where_a_process_has_a_measure_of_it(tmp_path: Path) -> None:
    """A life of any length without progress counts, and one with progress does not."""
    made = tmp_path / "made"
    made.write_text("0")
    supervisor = Supervisor(tmp_path / "logs", backoff_s=0.01, max_deaths=2, quick_s=0.0)
    stuck = ProcessSpec("stuck", python("raise SystemExit(1)"), progress=lambda: 7.0)
    code = f"p = open({str(made)!r}, 'r+'); n = int(p.read()); p.seek(0); p.write(str(n + 1)); p.flush(); exit(1)"
    busy = ProcessSpec("busy", python(code), progress=lambda: float(made.read_text()))
    supervisor.start(stuck)
    supervisor.start(busy)
    wait_for(lambda: "stuck" in supervisor.isolated and supervisor.restarts["busy"] > 4, supervisor)
    assert set(supervisor.isolated) == {"stuck"}
    supervisor.stop()


def test_a_slow_start_followed_by_death_counts_as_quick(tmp_path: Path) -> None:
    """A machine where a start takes longer than the limit: no life is much longer than the start."""
    supervisor = Supervisor(tmp_path, backoff_s=0.01, max_deaths=2, quick_s=0.05)
    supervisor.start(ProcessSpec("slow", python("import time; time.sleep(0.5); raise SystemExit(1)")))
    wait_for(lambda: "slow" in supervisor.isolated, supervisor, seconds=60.0)
    supervisor.stop()


def test_watching_survives_a_deleted_folder_and_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    supervisor = Supervisor(logs, state=tmp_path / "gone" / PARTS, backoff_s=0.01, longest_pause_s=0.05, max_deaths=2)
    supervisor.start(ProcessSpec("absent", ["/no/such/program"]))
    supervisor.start(ProcessSpec("sleeper", python("import time; time.sleep(60)")))
    wait_for(lambda: "absent" in supervisor.isolated, supervisor)
    assert "could not be started" in supervisor.isolated["absent"].cause
    shutil.rmtree(logs)
    os.kill(supervisor.pid("sleeper"), signal.SIGKILL)
    wait_for(lambda: supervisor.restarts["sleeper"] == 1, supervisor)
    shutil.rmtree(logs)
    logs.write_text("a file where the folder was")  # no log can be opened at all
    os.kill(supervisor.pid("sleeper"), signal.SIGKILL)
    wait_for(lambda: supervisor.restarts["sleeper"] == 2, supervisor)
    assert supervisor.stop() == []


def test_the_end_of_a_log_is_capped(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    supervisor.start(ProcessSpec("wordy", python("print('x' * 10_000_000); print('end')")))
    wait_for(lambda: supervisor.finished("wordy"), supervisor)
    assert len(supervisor.tail("wordy")) < 1000 and supervisor.tail("wordy").endswith("end")


def test_processes_are_not_given_the_orchestrators_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "lwd:secret")
    supervisor = Supervisor(tmp_path)
    supervisor.start(
        ProcessSpec("asks", python("import os; print([n for n in os.environ if n.startswith('PREFECT')])"))
    )
    wait_for(lambda: supervisor.finished("asks"), supervisor)
    assert supervisor.tail("asks") == "[]"


def test_one_that_ignores_sigterm_is_killed_and_named(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    supervisor.start(ProcessSpec("deaf", python(code)))
    wait_for(lambda: supervisor.tail("deaf") == "up", supervisor)
    assert supervisor.stop(timeout_s=0.2) == ["deaf"]


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    supervisor.start(ProcessSpec("a", python("")))
    with pytest.raises(ValueError, match="already supervised"):
        supervisor.start(ProcessSpec("a", python("")))
    supervisor.stop()
