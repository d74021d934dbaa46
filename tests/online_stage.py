"""How tests look at a running online stage: its processes, what its learner says, what its robots closed."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import psutil
from waiting import wait_until

ROLES = {
    "infra.service": "service",
    "infra.events.relay": "relay",
    "infra.coordinator": "coordinator",
    "infra.reconcile": "reconciler",
    "infra.prefetcher": "prefetcher",
    "flows.online_learner": "learner",
    "infra.fleet.robot": "robot",
}
"""Modules that the stage runs as processes: their roles."""


def stage_processes(home: Path) -> dict[str, psutil.Process]:
    """The living processes of this deployment's stage by role, one of each, whoever their parents are."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended meanwhile
            words = process.cmdline()
            if any(Path(word).is_relative_to(home) for word in words) and alive(process):
                found |= {role: process for module, role in ROLES.items() if module in words}
    return found


def kill_role(home: Path, role: str) -> None:
    """SIGKILL a process of this role, once there is one."""
    wait_until(lambda: role in stage_processes(home))
    stage_processes(home)[role].kill()


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and is not reaped does not."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def kill_tree(pid: int, *, spare: Collection[str] = ()) -> None:
    """Kill a process and what it has started, but for what runs a module of `spare`."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with suppress(psutil.Error):  # ended meanwhile
                if not set(spare) & set(process.cmdline()):
                    process.kill()


def learner_status(home: Path) -> dict[str, int]:
    """What the learner told last; empty before."""
    path = home / "learner" / "status.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def assert_each_update_counted_once(home: Path) -> None:
    """By the learner's own record, whatever died meanwhile."""
    rows = [json.loads(line)["update"] for line in (home / "learner" / "training.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows)), "an update was counted twice"


def closed_by_robots(home: Path) -> set[str]:
    """Ids of all episodes that the robots with this home have closed in all their lives, from their own logs."""
    lines = [json.loads(line) for log in (home / "logs").glob("robot-*.jsonl") for line in log.read_text().splitlines()]
    return {line["episode_id"] for line in lines if line["message"] == "episode"}
