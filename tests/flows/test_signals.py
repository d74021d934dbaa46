"""Ctrl-C, SIGTERM and SIGKILL to whole commands, at different moments: nothing is begun again, nothing is left."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from online_stage import learner_status
from short_pipeline import ROOT, fill_workspace
from waiting import wait_until
from whole_command import Command

from bench.workspace import freeze
from infra import interrupts

pytestmark = pytest.mark.timeout(600)
WHOLE = [pytest.mark.system, pytest.mark.slow]  # of the whole matrix, which `make test-system` runs
STAGE = "flows.stages demonstrations"
WORKER = "multiprocessing.spawn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose first stage takes longer than any test."""
    long = {"tasks": ["S1"], "workers": 2, "demonstrations": {"per_task": 50_000}}
    return freeze(tmp_path_factory.mktemp("signals") / "ws", long)


def train(folder: Path, home: str = "home") -> Command:
    return Command(folder, "train", "--until", "demonstrations", "--home", home)


def at(command: Command, moment: str) -> None:
    """Wait for a moment of the command's life."""
    if moment == "imports":
        time.sleep(0.3)
    elif moment == "server":
        command.says("starting Prefect")
        wait_until(lambda: command.descendants("prefect server start"))
    elif moment == "stage begins":
        wait_until(lambda: command.descendants(STAGE), lambda: command.output)
    else:
        wait_until(lambda: len(command.descendants(WORKER)) >= 2, lambda: command.output)


def states(folder: Path, home: str) -> set[str]:
    """The states of the flow runs, by the server's own database."""
    with sqlite3.connect(folder / home / "prefect" / "prefect.db") as database:
        return {row[0] for row in database.execute("SELECT state_type FROM flow_run")}


@pytest.mark.parametrize(
    "moment", [*(pytest.param(early, marks=WHOLE) for early in ("imports", "server", "stage begins")), "stage"]
)
def test_one_ctrl_c_ends_the_command(folder: Path, moment: str) -> None:
    home = f"ctrl-c-{moment.replace(' ', '-')}"
    with train(folder, home) as command:
        at(command, moment)
        stage = [process.pid for process in command.descendants(STAGE)]
        command.press()
        assert command.ends() == 130, command.output
        command.leaves_nothing()
        assert interrupts.MESSAGE in command.output
        assert "Traceback" not in command.output and "error:" not in command.output, command.output
        assert command.output.count("stage demonstrations") <= 2, "begun again"  # its title, and its own last word
    if stage:
        assert states(folder, home) == {"CRASHED"}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param("server", signal.SIGTERM, marks=WHOLE),
        ("stage", signal.SIGTERM),
        pytest.param("stage", signal.SIGHUP, marks=WHOLE),
    ],
)
def test_a_signal_ends_the_command_and_all_that_it_started(folder: Path, moment: str, number: int) -> None:
    with train(folder) as command:
        at(command, moment)
        command.process.send_signal(number)
        assert command.ends() == 128 + number, command.output
        command.leaves_nothing(1.0)
        assert "error:" not in command.output and "Traceback" not in command.output, command.output


@pytest.mark.parametrize("moment", [pytest.param("server", marks=WHOLE), "stage"])
def test_sigkill_ends_all_that_the_command_started(folder: Path, moment: str) -> None:
    with train(folder) as command:
        at(command, moment)
        command.process.kill()
        command.leaves_nothing()


@pytest.mark.parametrize("after_s", [0.1, 0.3, 0.6, 1.0])
def test_a_signal_while_a_stage_is_imported_leaves_no_traceback(tmp_path: Path, after_s: float) -> None:
    command = [sys.executable, "-m", "flows.stages", "demonstrations"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    time.sleep(after_s)
    process.terminate()
    messages = process.communicate(timeout=60)[1]
    assert "Traceback" not in messages and process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM, 2), messages


def test_a_second_ctrl_c_ends_the_command_at_once(folder: Path) -> None:
    with train(folder) as command:
        at(command, "stage")
        for process in command.descendants(STAGE):
            process.suspend()  # one that hangs: the first Ctrl-C waits for it
        command.press()
        time.sleep(0.6)
        pressed = time.monotonic()
        command.press()
        assert command.ends(20.0) == 130
        assert time.monotonic() - pressed < 5.0
        command.leaves_nothing()


def test_the_next_command_does_not_begin_beside_another(folder: Path) -> None:
    with train(folder) as first, train(folder, "another-home") as second:
        at(first, "stage")
        assert second.ends() == 6 or first.process.poll() is not None
        assert f"process {first.process.pid}" in second.output, second.output
        assert len(first.descendants(STAGE)) >= 1 and not second.descendants(STAGE)
        first.process.kill()
        first.leaves_nothing()
    with train(folder) as third:  # nothing has to be removed by hand
        at(third, "stage begins")
        third.press()
        assert third.ends() == 130


def repro(folder: Path, shell: str = "/bin/sh") -> Command:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = (sys.executable, "-m", "dvc")
    return Command(folder, "repro", "demonstrations", program=program, environment={"SHELL": shell, "PATH": path})


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=WHOLE), signal.SIGKILL])
@pytest.mark.parametrize("shell", ["/bin/sh", pytest.param("/bin/bash", marks=WHOLE)])
def test_a_stage_ends_with_dvc_repro(folder: Path, number: int, shell: str) -> None:
    with repro(folder, shell) as dvc:
        at(dvc, "stage")
        dvc.process.send_signal(number)
        dvc.ends()
        dvc.leaves_nothing()


@pytest.mark.parametrize(
    "number", [*(pytest.param(number, marks=WHOLE) for number in (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL]
)
def test_a_stage_ends_with_a_flow_that_no_command_of_ours_runs(folder: Path, number: int) -> None:
    """As a Prefect worker does; there, the default handlers apply."""
    code = "from flows import pipeline; pipeline.run('demonstrations')"
    with Command(folder, code, program=(sys.executable, "-c")) as flow:
        at(flow, "stage")
        flow.process.send_signal(number)
        flow.ends()
        flow.leaves_nothing()


def test_ctrl_c_ends_dvc_repro_and_its_stage(folder: Path) -> None:
    with repro(folder) as dvc:
        at(dvc, "stage")
        dvc.press()
        assert dvc.ends() != 0
        dvc.leaves_nothing()
        assert "stopped; the same command runs it again" in dvc.output and "Traceback" not in dvc.output


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the outputs of a very short offline pipeline, and an online stage without an end."""
    monkeypatch.chdir(tmp_path)
    fill_workspace(tmp_path, updates=100_000)
    return tmp_path


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(number, marks=WHOLE) for number in (signal.SIGTERM, signal.SIGKILL))]
)
def test_the_online_stage_ends_with_its_command(workspace: Path, number: int) -> None:
    home = workspace / "home"
    with Command(workspace, "online", "--home", str(home), environment={"PYTHONPATH": str(ROOT)}) as command:
        wait_until(lambda: learner_status(home).get("updates", 0) >= 3, lambda: command.output)
        if number == signal.SIGINT:
            command.press()
        else:
            command.process.send_signal(number)
        assert command.ends(90.0) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        command.leaves_nothing()
        if number != signal.SIGKILL:
            assert interrupts.MESSAGE in command.output and "Traceback" not in command.output


INSTALLED = """
import sys, time
from infra import interrupts
interrupts.install()
class Finalised:
    def __del__(self):
        print("up", flush=True)
        time.sleep(1)
"""


@pytest.mark.parametrize(
    "body",
    [
        "print('up', flush=True)\ntry:\n    time.sleep(30)\nexcept Exception:\n    sys.exit(1)",
        "print('up', flush=True)\ntry:\n    time.sleep(30)\nexcept BaseException:\n    pass\ninterrupts.check()",
        "Finalised()\ntime.sleep(30)",
    ],
    ids=["a layer that records failures", "a layer that swallows everything", "a finaliser"],
)
def test_no_layer_swallows_the_stop(body: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INSTALLED + body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and "infra.interrupts.Stopped" in errors, errors
