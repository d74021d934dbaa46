"""The frame of every long-lived process (`infra.process`): it stops when told to, at whatever moment."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("times", [1, 2])
def test_the_second_signal_ends_the_process_at_once(times: int) -> None:
    code = (
        "import os, signal, time\nfrom infra.process import stop_on_signal\nstop = stop_on_signal()\n"
        f"for _ in range({times}): os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert stop.wait(10)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == (0 if times == 1 else 128 + 15)
