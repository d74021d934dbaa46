"""Rows 37 and 38: the orchestrator may be away or die at any moment; episodes and learning go on or go on later."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from online_stage import (
    ROLES,
    assert_each_update_counted_once,
    kill_tree,
    learner_status,
    stage_processes,
)
from short_pipeline import ROOT, fill_workspace
from waiting import wait_until

from flows.deployment import deployment
from infra.servers.toolchain import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
UPDATES = 200  # the stage goes on for long enough to be disturbed


@pytest.fixture
def workspace(tmp_path: Path, fleet_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a very short offline pipeline's outputs, whose deployment has real servers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LWD_INGEST_PORT", str(free_port()))
    monkeypatch.setenv("LWD_LEASE_S", "3")
    fill_workspace(tmp_path, updates=UPDATES, pace=2.0)
    return tmp_path


@pytest.fixture
def prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path / "prefect")
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    server.start()
    yield server
    server.stop()


class PrefectServer:
    """A Prefect server that can be stopped and started again at the same address."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        import httpx

        self.home.mkdir(exist_ok=True)
        env = os.environ | {"PREFECT_HOME": str(self.home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        env.pop("PREFECT_API_URL", None)
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

        def ready() -> bool:
            try:
                return httpx.get(f"{self.url}/health", timeout=2.0).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(ready)

    def stop(self) -> None:
        if self._process is not None:
            kill_tree(self._process.pid)
            self._process.wait()
            self._process = None


def prefect_command(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", *arguments], capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


def test_row_37_orchestrator_s_server_down_while_the_fleet_works(workspace: Path, fleet_home: Path, prefect) -> None:
    code = "import sys; from flows.online import online; online(sys.argv[1], sys.argv[2])"
    flow = subprocess.Popen(
        [sys.executable, "-c", code, str(fleet_home), str(workspace / "params.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: learner_status(fleet_home).get("updates", 0) >= 5)
        prefect.stop()
        before = learner_status(fleet_home)
        wait_until(lambda: learner_status(fleet_home)["updates"] >= before["updates"] + 20)
        assert learner_status(fleet_home)["episodes"] > before["episodes"], "ingest stood still"
        assert flow.poll() is None
        prefect.start()
        assert flow.wait(timeout=400) == 0
    finally:
        flow.kill()
    with deployment(fleet_home) as plane:
        assert plane.unaccounted() == 0
        assert plane.snapshots.verify() == plane.snapshots.latest().version > 0
    assert learner_status(fleet_home)["updates"] == UPDATES


def test_row_38_worker_killed_and_rerun_is_idempotent(workspace: Path, fleet_home: Path, prefect) -> None:
    pool = "test"
    prefect_command("work-pool", "create", pool, "--type", "process")
    (workspace / "flows").symlink_to(ROOT / "flows")  # a deployment's runs begin in the folder that it was made in
    prefect_command("deploy", "flows/online.py:online", "--name", "row38", "--pool", pool)
    worker = start_worker(pool)
    run = ["deployment", "run", "online/row38", "--param", f"home={fleet_home}", "--param"]
    run.append(f"params_path={workspace / 'params.yaml'}")
    try:
        prefect_command(*run)
        wait_until(lambda: learner_status(fleet_home).get("updates", 0) >= 12)
        # The worker and the flow run that it had started, without a goodbye; the stage's processes end with the run.
        kill_tree(worker.pid, spare=ROLES)
        worker.wait()
        wait_until(lambda: not stage_processes(fleet_home))
        held = learner_status(fleet_home)["updates"]
        worker = start_worker(pool)
        prefect_command(*run)
        prefect_command(*run)  # a second run beside it finds the lease held, and does no harm
        wait_until(lambda: learner_status(fleet_home)["updates"] == UPDATES, seconds=500)
        wait_until(lambda: not stage_processes(fleet_home))
        assert 12 <= held < UPDATES, "nothing was left for the second run"
    finally:
        kill_tree(worker.pid)
        worker.wait()
    assert_each_update_counted_once(fleet_home)
    with deployment(fleet_home) as plane:
        assert plane.unaccounted() == 0
        assert plane.snapshots.verify() == plane.snapshots.latest().version > 0


def start_worker(pool: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--limit", "4"]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(2.0)
    assert worker.poll() is None
    return worker
