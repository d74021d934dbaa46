"""The supervisor restarts what dies, leaves what finishes, and gives up by name."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from infra.errors import UnavailableError
from infra.supervisor import ProcessSpec, Supervisor


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


def test_one_that_cannot_live_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, backoff_s=0.01, max_quick_deaths=2)
    supervisor.start(ProcessSpec("broken", python("raise SystemExit('no such port')")))
    with pytest.raises(UnavailableError, match=r"(?s)'broken' died 3 times.*no such port"):
        wait_for(lambda: False, supervisor)


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
