"""The frame of every long-lived process (`infra.process`): it stops when told to or left alone, and logs no secret."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from invariants import KILLED, in_process, start_process

from infra.process import MAX_LOG_CHARS, die_with_parent, log_to, stop_on_signal

# Each child does nothing but wait for the event, so that the signal finds it anywhere within wait().
CHILDREN = """
import os, random, signal, sys, time
from infra.process import stop_on_signal

hung = 0
for _ in range(60):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        stop = stop_on_signal()
        os.write(tell, b"x")
        while not stop.is_set():
            stop.wait(0)
        os._exit(0)
    os.read(ready, 1)
    time.sleep(random.uniform(0, 0.005))
    os.kill(child, signal.SIGTERM)
    end = time.monotonic() + 5
    while time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    if time.monotonic() >= end:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        hung += 1
        break
print(hung)
"""


def test_a_signal_at_any_moment_of_a_wait_ends_it() -> None:
    done = subprocess.run([sys.executable, "-c", CHILDREN], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


@pytest.mark.parametrize(("times", "pause_s", "code"), [(1, 0.0, 0), (2, 0.0, 0), (2, 1.1, 128 + 15)])
def test_the_second_signal_ends_the_process_at_once(times: int, pause_s: float, code: int) -> None:
    """Two at once are one: the kernel's, for the parent's death, and that of whoever ends the parent's command."""
    program = (
        "import os, signal, time\nfrom infra.process import stop_on_signal\nstop = stop_on_signal()\n"
        f"for _ in range({times}): os.kill(os.getpid(), signal.SIGTERM); time.sleep({pause_s})\n"
        "assert stop.wait(10)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == code


def test_a_child_whose_parent_died_while_it_was_started_ends_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = f"from infra.process import die_with_parent; die_with_parent({gone.pid}); print('outlived')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGTERM
    assert child.stdout == ""


def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """The parent is killed; the kernel tells the child, which writes that it was told."""

    def child() -> None:
        stop = stop_on_signal()
        die_with_parent(os.getppid())
        (tmp_path / "started").touch()
        if stop.wait(30):
            (tmp_path / "stopped").touch()

    def parent() -> None:
        start_process(child)
        while not (tmp_path / "started").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_process(parent) == KILLED
    for _ in range(1000):
        if (tmp_path / "stopped").exists():
            return
        time.sleep(0.01)
    raise AssertionError("the child lives on")


def test_logs_are_json_without_secrets(tmp_path: Path) -> None:
    def work_and_log() -> None:
        path = log_to(tmp_path, "robot")
        url = "https://store/incoming/x?X-Amz-Signature=abc123&X-Amz-Date=1"
        logging.getLogger("infra").warning("put %s", url, extra={"fields": {"db": "postgresql://u:hunter2@host/d"}})
        assert path == tmp_path / "robot.jsonl"

    assert in_process(work_and_log) == 0
    entry = json.loads((tmp_path / "robot.jsonl").read_text())
    assert entry["message"] == "put https://store/incoming/x?X-Amz-Signature=***&X-Amz-Date=1"
    assert entry["db"] == "postgresql://u:***@host/d"


def test_a_line_of_the_log_is_capped_in_each_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log_to(tmp_path, "capped")
    fields = {"robot": "r" * 10**6, "reasons": [{"message": "m" * 10**5}] * 9, "steps": 4}
    logging.getLogger("test").warning("odd \x1b[31m %s", "x" * 10**6, extra={"fields": fields})
    line = path.read_text()
    assert len(line) < 4 * MAX_LOG_CHARS
    entry = json.loads(line)
    assert entry["steps"] == 4 and entry["robot"].endswith("more characters)")
    said = capsys.readouterr().err
    assert "\x1b" not in said and len(said) <= MAX_LOG_CHARS + 1
