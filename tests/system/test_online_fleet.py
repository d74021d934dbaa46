"""The online stage in the fleet profile: every process and every server of it is killed; nothing is lost or doubled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from invariants import assert_invariants
from online_stage import (
    ROLES,
    assert_each_update_counted_once,
    closed_by_robots,
    kill_role,
    learner_status,
)
from short_pipeline import ROOT, fill_workspace
from waiting import wait_until

from flows.deployment import deployment
from infra.catalog import schema
from infra.servers import Servers
from infra.servers.toolchain import free_port

SERVERS = ("kafka", "garage", "postgres")
STEP = 8  # updates between two kills, at least
UPDATES = 400  # far more than are done while one after another is killed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_fleet_goes_on_when_each_process_and_each_server_is_killed(
    tmp_path: Path, fleet_home: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LWD_INGEST_PORT", str(free_port()))
    monkeypatch.setenv("LWD_LEASE_S", "3")
    fill_workspace(tmp_path, updates=UPDATES, pace=2.0)
    command = [sys.executable, "-m", "flows.online", "--home", str(fleet_home)]
    flow = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def updates() -> int:
        assert flow.poll() is None, "the stage ended before all were killed"
        return learner_status(fleet_home).get("updates", 0)

    try:
        mark = 2
        for role in ROLES.values():
            wait_until(lambda m=mark: updates() >= m, seconds=300)
            kill_role(fleet_home, role)
            mark = updates() + STEP
        for name in SERVERS:
            wait_until(lambda m=mark: updates() >= m, seconds=300)
            getattr(servers, name).kill()
            getattr(servers, name).start()
            mark = updates() + STEP
        out, _ = flow.communicate(timeout=600)
    finally:
        if flow.poll() is None:
            flow.kill()
    assert flow.returncode == 0
    summary = json.loads(out)
    assert (summary["unaccounted"], summary["updates"]) == (0, UPDATES)
    assert all(summary["restarts"][name] >= 1 for name in ("service", "relay", "coordinator", "reconciler", "learner"))
    # A robot that was stopped takes what it could not yet hand in along in its spool.
    kept = {file.name.split(".")[0] for file in (fleet_home / "fleet" / "spool").glob("*/closed/*.tar")}
    closed = closed_by_robots(fleet_home / "fleet") - kept
    assert len(closed) >= UPDATES / 4
    with deployment(fleet_home) as plane, plane.catalog.read() as connection:
        digests = dict(connection.execute(sa.select(schema.episodes.c.episode_id, schema.episodes.c.sha256)).all())
        tokens = connection.execute(sa.select(schema.robot_tokens.c.sha256)).scalars().all()
    assert_invariants(fleet_home, {episode: digests[episode] for episode in closed})
    assert_each_update_counted_once(fleet_home)
    assert tokens and not any((fleet_home / "fleet").rglob("settings.yaml")), "robots hold no server's credentials"
