"""The learner as a process of several ranks: one dies, all begin again together, and hold the same data."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
from waiting import wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
from invariants import open_plane
from online_stage import alive, learner_status
from short_pipeline import ROOT, fill_workspace

from flows.deployment import deployment
from flows.online import deploy_first
from flows.stages.common import CHECKPOINT
from infra.catalog import schema
from infra.errors import UnavailableError
from infra.fleet.operator import ExpertOperator
from infra.fleet.rollout import run_jobs
from infra.fleet.sources import job_list

UPDATES = 120  # long enough to be killed in the middle


def learner(home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.online_learner", "--home", str(home), "--parent", str(os.getpid())]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def rank_processes(agent: int) -> dict[str, psutil.Process]:
    """The ranks, by number."""
    children = psutil.Process(agent).children()
    return {rank: child for child in children if (rank := child.environ().get("RANK")) is not None}


@pytest.mark.timeout(400)
def test_two_ranks_begin_again_together_when_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fill_workspace(tmp_path, updates=UPDATES, robots=0, ranks=2, updates_per_episode=12, publish_every=8)
    home = tmp_path / "home"
    deploy_first.fn(str(home))
    plane = open_plane(home)
    expert = functools.partial(ExpertOperator, 0.15)
    for episode in run_jobs(None, job_list(("S1", "S2"), 6, 99, "demo"), source="online", operator=expert):
        plane.submit(episode)
    plane.settle(micro_batch=3)

    agent = learner(home)
    try:
        wait_until((home / "learner" / CHECKPOINT).exists)
        ranks = rank_processes(agent.pid)
        assert sorted(ranks) == ["0", "1"]
        ranks["1"].kill()
        _, told = agent.communicate(timeout=120)
        assert agent.returncode == UnavailableError.exit_code
        assert "rank 1 of 2 ended with exit code -9" in told
        assert not any(alive(rank) for rank in ranks.values())

        agent = learner(home)
        _, told = agent.communicate(timeout=300)
        assert agent.returncode == 0, told
    finally:
        agent.kill()
        agent.wait()
    assert learner_status(home)["updates"] == UPDATES
    with deployment(home) as opened, opened.catalog.read() as connection:
        loads = connection.execute(sa.select(schema.loads.c.reader, schema.loads.c.version)).all()
        published = connection.execute(sa.select(schema.policies.c.details)).scalars().all()
    newest = plane.snapshots.latest().version
    assert newest >= 4
    assert sorted(loads) == [(name, v) for name in ("learner", "learner-1") for v in range(1, newest + 1)]
    done = [d["updates"] for d in published if d.get("stage") == "online"]
    assert done == sorted(set(done)) and done[-1] == UPDATES, "a policy was published twice"
