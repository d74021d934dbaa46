"""The online stage as it runs: real processes, killed one after another; nothing is lost or counted twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from waiting import wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
from invariants import assert_invariants
from online_stage import (
    assert_each_update_counted_once,
    closed_by_robots,
    kill_role,
    learner_status,
    stage_processes,
)
from short_pipeline import ROOT, UPDATES, fill_workspace

from flows.deployment import deployment
from flows.online import summarise
from infra.catalog import schema


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the outputs of a very short offline pipeline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fill_workspace(tmp_path, production=1)
    return tmp_path


@pytest.mark.timeout(900)
def test_the_loop_goes_on_when_each_of_its_processes_is_killed(workspace: Path) -> None:
    home = workspace / "home"
    command = [sys.executable, "-m", "flows.online", "--home", str(home)]
    flow = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        for number, role in enumerate(("robot", "coordinator", "prefetcher", "learner")):
            wait_until(lambda n=number: learner_status(home).get("updates", 0) >= 10 * n + 2)
            kill_role(home, role)
        # The supervisor last: its children end with it, and the same command goes on from where they were.
        wait_until(lambda: learner_status(home).get("updates", 0) >= 42)
        flow.kill()
        flow.wait()
        wait_until(lambda: not stage_processes(home))
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
    assert_each_update_counted_once(home)
    with deployment(home) as plane:
        assert plane.unaccounted() == 0
        with plane.catalog.read() as connection:
            seen = {robot.robot_id: robot for robot in connection.execute(sa.select(schema.robots))}
        assert {name: robot.cohort for name, robot in seen.items()} == {
            "r0": "learning", "r1": "learning", "p0": "production"
        }  # fmt: skip
        assert seen["p0"].active_version == plane.registry.alias("champion") == 1 < seen["r0"].active_version
        assert seen["p0"].episodes > 0
        assert summarise(plane, {}).episodes == summary["episodes"]
