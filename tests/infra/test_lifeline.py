"""Nothing that a command has started outlives it, and no second command begins beside what is left: real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

from infra.errors import ConfigError, LeaseLostError
from infra.exclusive import exclusive

COMMAND = """
import subprocess, sys, time
from pathlib import Path
from infra.exclusive import exclusive
from infra.lifeline import lifeline
sleep = [sys.executable, "-c", "import signal, time; {deaf}time.sleep(120)"]
with exclusive(Path(sys.argv[1]), "the thing") as lock, lifeline([lock]):
    plain = subprocess.Popen(sleep)
    session = subprocess.Popen(sleep, start_new_session=True)
    shell = subprocess.Popen(["sh", "-c", "'%s' -c 'import time; time.sleep(120)' & wait" % sys.executable])
    words = "'%s' -c 'import time; time.sleep(120)' >/dev/null 2>&1 & echo $!" % sys.executable
    orphan = subprocess.run(["sh", "-c", words], stdout=subprocess.PIPE, text=True).stdout.strip()
    time.sleep(0.5)
    print(plain.pid, session.pid, shell.pid, orphan, flush=True)
    {then}
"""


def start(lock: Path, then: str, deaf: str = "") -> tuple[subprocess.Popen[str], list[int]]:
    code = COMMAND.replace("{then}", then).replace("{deaf}", deaf)
    process = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(word) for word in process.stdout.readline().split()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("deaf", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN); "], ids=["hears", "deaf"])
def test_a_killed_command_leaves_nothing_and_keeps_its_lock_until_then(tmp_path: Path, deaf: str) -> None:
    process, pids = start(tmp_path / "lock", "time.sleep(120)", deaf)
    assert len(alive(pids)) == 4
    process.kill()
    process.wait()
    with exclusive(tmp_path / "lock", "the thing"):  # waits for what is left
        assert alive(pids) == []


@pytest.mark.parametrize("then", ["pass", "raise SystemExit(3)", "sys.exit('an error')"])
def test_a_command_that_ends_leaves_nothing(tmp_path: Path, then: str) -> None:
    process, pids = start(tmp_path / "lock", then)
    process.wait(60)
    assert alive(pids) == []
    with exclusive(tmp_path / "lock", "the thing"):
        pass


def test_the_holder_is_named(tmp_path: Path) -> None:
    process, pids = start(tmp_path / "lock", "time.sleep(120)")
    with (
        pytest.raises(LeaseLostError, match=f"the thing is in use by process {process.pid}"),
        exclusive(tmp_path / "lock", "the thing"),
    ):
        pass
    process.send_signal(signal.SIGTERM)
    process.wait()
    wait_until(lambda: not alive(pids))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file"), exclusive(tmp_path / "file" / "lock", "the thing"):
        pass


ANCESTORS = """
import os, subprocess, sys
code = "from infra.lifeline import end_with_ancestors; import time; end_with_ancestors(0.05); "
code += "print(1, flush=True); time.sleep(99)"
child = subprocess.Popen([*sys.argv[1:], f"'{sys.executable}' -c '{code}'; true"], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
import time; time.sleep(99)
"""


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_process_ends_with_who_started_its_shell(shell: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", ANCESTORS, shell, "-c"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    between = psutil.Process(int(process.stdout.readline()))
    family = [between, *between.children(recursive=True)]
    assert len(family) == 2, "the shell stands between"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not alive([family[1].pid]), seconds=10.0)
