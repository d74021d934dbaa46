"""A learner that diverges publishes nothing, goes back and says so; two learners never write to one home."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from waiting import wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
from invariants import open_plane
from online_stage import learner_status
from short_pipeline import ROOT, fill_workspace

from flows import online_learner
from flows.deployment import Deployment, deployment
from flows.online import deploy_first
from flows.online_learner import OnlineLearner
from flows.params import load_params
from flows.stages.common import CHECKPOINT
from infra.errors import DivergedError, LeaseLostError
from infra.fleet.operator import ExpertOperator
from infra.fleet.rollout import run_jobs
from infra.fleet.sources import job_list
from lwd_model.ranks import Ranks

UPDATES = 30


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment with online episodes, and no learner yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    health = {"healthy_after": 5, "falls": 3}
    fill_workspace(tmp_path, updates=UPDATES, robots=0, updates_per_episode=20, publish_every=5, health=health)
    deploy_first.fn("home")
    plane = open_plane(tmp_path / "home")
    expert = functools.partial(ExpertOperator, 0.15)
    for episode in run_jobs(None, job_list(("S1", "S2"), 2, 99, "demo"), source="online", operator=expert):
        plane.submit(episode)
    plane.settle()
    return tmp_path / "home"


@pytest.fixture
def plane(home: Path) -> Iterator[Deployment]:
    with deployment(home) as plane:
        yield plane


def published(plane: Deployment) -> list[int]:
    """Updates of the policies that the learner published, oldest first."""
    rows = [row["details"] for row in reversed(plane.registry.policies())]
    return [row["updates"] for row in rows if row.get("stage") == "online"]


def poisoned(monkeypatch: pytest.MonkeyPatch, when: list[int], network: str, value: float) -> list[int]:
    """Have a network hold `value` before these updates of the run, as a bit flip would; where it was done."""
    honest, done, ran = OnlineLearner.update, [], [0]

    def update(loop: OnlineLearner) -> dict[str, float] | None:
        ran[0] += 1
        if ran[0] in when:
            done.append(loop.updates)
            with torch.no_grad():
                dict(loop.learner.agent.networks())[network].flat[::7] = value
        return honest(loop)

    monkeypatch.setattr(OnlineLearner, "update", update)
    return done


@pytest.mark.parametrize(("network", "value"), [("critic", float("nan")), ("critic", 1e18), ("policy", float("inf"))])
def test_a_learner_that_diverged_once_goes_back_and_on(
    plane: Deployment, monkeypatch: pytest.MonkeyPatch, network: str, value: float
) -> None:
    done = poisoned(monkeypatch, [18], network, value)
    online_learner.run(load_params(), plane, threading.Event(), Ranks.from_environment())
    assert done
    told = learner_status(plane.settings.home)
    assert told["updates"] == UPDATES and published(plane)[-1] == UPDATES
    log = (plane.settings.home / "learner" / "training.jsonl").read_text()
    assert "NaN" not in log and "Infinity" not in log
    for row in plane.registry.policies():
        weights = load_file(plane.bundle(row["version"]) / "policy.safetensors")
        assert all(np.isfinite(array).all() for array in weights.values())


def test_a_learner_that_falls_again_and_again_stops_and_names_the_quantity(
    plane: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = poisoned(monkeypatch, list(range(12, 400)), "critic", float("nan"))
    with pytest.raises(DivergedError, match="fell 3 times in a row") as caught:
        online_learner.run(load_params(), plane, threading.Event(), Ranks.from_environment())
    assert len(done) == 3 and "nan" in str(caught.value)
    assert max(published(plane), default=0) <= 11  # nothing of a poisoned learner
    resumed = online_learner.start(load_params(), plane, Ranks.from_environment())
    assert all(bool(torch.isfinite(net.flat).all()) for _, net in resumed.learner.agent.networks())


def process(home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.online_learner", "--home", str(home), "--parent", str(os.getpid())]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"LWD_LEASE_S": "3"})


@pytest.mark.timeout(400)
def test_a_learner_that_was_stopped_past_its_lease_writes_nothing_when_it_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP, another learner finishes the stage, SIGCONT: neither a policy nor a checkpoint of the first."""
    params = Path("params.yaml")
    params.write_text(params.read_text().replace(f"updates: {UPDATES}", "updates: 75", 1))
    first = process(home)
    second = None
    try:
        wait_until((home / "learner" / CHECKPOINT).exists)
        first.send_signal(signal.SIGSTOP)
        second = process(home)
        _, told = second.communicate(timeout=200)
        assert second.returncode == 0, told
        checkpoint = (home / "learner" / CHECKPOINT).read_bytes()
        with deployment(home) as plane:
            before = published(plane)
        first.send_signal(signal.SIGCONT)
        _, told = first.communicate(timeout=100)
        assert first.returncode == LeaseLostError.exit_code, told
    finally:
        for each in (first, second):
            if each is not None and each.poll() is None:
                each.kill()
                each.wait()
    assert (home / "learner" / CHECKPOINT).read_bytes() == checkpoint
    with deployment(home) as plane:
        assert published(plane) == before == sorted(set(before))
