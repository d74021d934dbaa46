"""What a person sees of the online stage's processes: causes once, what keeps dying, and an end that names it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from flows import console
from flows.cli import status
from flows.deployment import deployment
from flows.online import Watch
from infra.errors import UnavailableError
from infra.supervisor import PARTS, ProcessSpec, Supervisor

DIES = "import sys; sys.exit('no [/red] port \\x1b[31m')"


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(console, "console", console.PlainConsole(file=written))
    return written


def watching(home: Path, patience_s: float, **programs: str) -> Watch:
    supervisor = Supervisor(home / "logs", state=home / PARTS, backoff_s=0.01, longest_pause_s=0.05, max_deaths=2)
    for name, code in programs.items():
        supervisor.start(ProcessSpec(name, [sys.executable, "-c", code]))
    return Watch(supervisor, patience_s)


def polled(watch: Watch, condition) -> None:
    def holds() -> bool:
        watch.poll()
        return condition()

    wait_until(holds, seconds=60.0)


def test_a_robot_that_keeps_dying_is_isolated_alone(tmp_path: Path, screen: io.StringIO, capsys) -> None:
    watch = watching(tmp_path, 0.0, robot=DIES, learner="import time; time.sleep(60)")
    polled(watch, lambda: watch.supervisor.restarts["robot"] > 5)
    assert watch.supervisor.restarts["learner"] == 0
    shown = screen.getvalue()
    assert shown.count("robot died and is started again") == 1, "each cause is shown once"
    assert shown.count("robot keeps dying and is isolated") == 1
    assert "no [/red] port" in shown and "\x1b" not in shown, "a log is neither markup nor control sequences"
    with deployment(tmp_path):
        pass
    status(tmp_path)
    assert "isolated: robot: died" in (told := capsys.readouterr().out) and "no [/red] port" in told
    watch.supervisor.stop()


@pytest.mark.parametrize("name", ["learner", "coordinator"])
def test_without_a_part_that_it_needs_the_stage_ends_after_its_patience(
    tmp_path: Path, screen: io.StringIO, name: str
) -> None:
    watch = watching(tmp_path, 1.0, **{name: DIES})
    polled(watch, lambda: watch.supervisor.isolated)  # it goes on at first
    with pytest.raises(UnavailableError, match=rf"(?s)'{name}' died .* in a row.*no \[/red\] port"):
        polled(watch, lambda: False)
    watch.supervisor.stop()


def test_one_that_works_again_is_said_so(tmp_path: Path, screen: io.StringIO) -> None:
    (tmp_path / "bad").touch()
    code = f"import os, sys, time; os.path.exists({str(tmp_path / 'bad')!r}) and sys.exit(3); print('fine')"
    watch = watching(tmp_path, 60.0, learner=code)
    polled(watch, lambda: watch.supervisor.isolated)
    (tmp_path / "bad").unlink()
    polled(watch, lambda: watch.supervisor.finished("learner"))
    assert "learner works again" in screen.getvalue()
