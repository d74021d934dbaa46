"""The online stage as it runs: real processes, killed one after another; nothing is lost or counted twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
from invariants import assert_invariants
from short_pipeline import ROOT, UPDATES, fill_workspace, learner_status, wait_until

from flows.deployment import deployment
from flows.online import summarise
from infra.catalog import schema


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the outputs of a very short offline pipeline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fill_workspace(tmp_path)
    return tmp_path


def children_of(pid: int) -> dict[str, psutil.Process]:
    """The stage's processes by role."""
    roles = {"infra.coordinator": "coordinator", "flows.online_learner": "learner", "infra.fleet.robot": "robot",
             "infra.prefetcher": "prefetcher"}  # fmt: skip
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        try:
            words = " ".join(child.cmdline())
        except psutil.Error:
            continue
        found |= {role: child for module, role in roles.items() if module in words}
    return found


def closed_by_robots(home: Path) -> set[str]:
    """Ids of all episodes that the robots have closed in all their lives, from their own logs."""
    lines = [json.loads(line) for log in (home / "logs").glob("robot-*.jsonl") for line in log.read_text().splitlines()]
    return {line["episode_id"] for line in lines if line["message"] == "episode"}


@pytest.mark.timeout(900)
def test_the_loop_goes_on_when_each_of_its_processes_is_killed(workspace: Path) -> None:
    home = workspace / "home"
    command = [sys.executable, "-m", "flows.online", "--home", str(home)]
    flow = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        for number, role in enumerate(("robot", "coordinator", "prefetcher", "learner")):
            wait_until(lambda n=number: learner_status(home).get("updates", 0) >= 10 * n + 2)
            wait_until(lambda r=role: r in children_of(flow.pid))
            os.kill(children_of(flow.pid)[role].pid, signal.SIGKILL)
        # The supervisor last: its children end with it, and the same command goes on from where they were.
        wait_until(lambda: learner_status(home).get("updates", 0) >= 42)
        orphans = list(children_of(flow.pid).values())
        flow.kill()
        flow.wait()
        wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in orphans))
        flow = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        out, _ = flow.communicate(timeout=400)
    finally:
        if flow.poll() is None:
            flow.kill()
    assert flow.returncode == 0
    summary = json.loads(out)
    assert summary["unaccounted"] == 0
    assert summary["updates"] == UPDATES
    assert summary["policies"] >= 2 + UPDATES // 10
    closed = closed_by_robots(home)
    assert len(closed) >= UPDATES / 4
    with deployment(home) as plane, plane.catalog.read() as connection:
        digests = dict(connection.execute(sa.select(schema.episodes.c.episode_id, schema.episodes.c.sha256)).all())
    assert_invariants(home, {episode: digests[episode] for episode in closed})
    rows = [json.loads(line)["update"] for line in (home / "learner" / "training.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows)), "an update was counted twice"
    with deployment(home) as plane:
        assert plane.unaccounted() == 0
        assert summarise(plane, {}).episodes == summary["episodes"]
