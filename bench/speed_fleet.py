"""Speeds of the fleet: environment steps, evaluation, and the way of an episode from a robot's spool to a snapshot.

As a process, `python -m bench.speed_fleet BUNDLE NUMBER` is one robot that steps scenes as fast as it can: it reads
a number of seconds from stdin, steps for that long, answers with a line of JSON, and waits for the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from infra.catalog import Catalog
from infra.edge.client import EdgeClient
from infra.edge.framelog import Frame
from infra.edge.spool import Spool
from infra.episode import Episode, new_episode_id
from infra.errors import UnavailableError
from infra.fleet.embedded import EmbeddedServer
from infra.fleet.features import FEATURES
from infra.fleet.robot import robot_environment
from infra.fleet.scene import ACTION_DIM, CONTROL_PERIOD
from infra.fleet.tasks import TASKS
from infra.objects.directory import DirectoryStore
from infra.settings import MIB, Settings, load_settings

Peak = Callable[[], float]
_CHECK = "data_contracts.checks:default_check"
_LOOK_S = 0.005


def env_steps(bundle: Path, robots: int, rounds: int, seconds: float, peak: Peak) -> dict[str, Any]:
    """Steps/s of `robots` processes together, each with one scene and the bundle's policy, episodes starting anew.

    Args:
        peak: FLOP/s of matrix products now; measured between the rounds.
    """
    command = [sys.executable, "-m", "bench.speed_fleet", str(bundle)]
    fleet = [
        subprocess.Popen(
            [*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | robot_environment(),
        )
        for number in range(robots)
    ]  # fmt: skip
    turns = []
    try:
        _round(fleet, min(0.5, seconds))  # scenes are built, caches are warm
        for _ in range(rounds):
            before = peak()
            turns.append((_round(fleet, seconds), before))
    finally:
        for robot in fleet:
            assert robot.stdin is not None
            robot.stdin.close()
            try:
                robot.wait(10)
            except subprocess.TimeoutExpired:
                robot.kill()
    return {
        "env_steps_per_s": round(statistics.median(rate for rate, _ in turns), 1),
        "rounds": [round(rate, 1) for rate, _ in turns],
        "robots": robots,
        "matmul_gflops": round(statistics.median(flops for _, flops in turns) / 1e9, 1),
    }


def _round(fleet: list[subprocess.Popen[str]], seconds: float) -> float:
    """Steps/s of the whole fleet over that time."""
    for robot in fleet:
        assert robot.stdin is not None
        robot.stdin.write(f"{seconds}\n")
        robot.stdin.flush()
    total = 0.0
    for robot in fleet:
        assert robot.stdout is not None
        line = robot.stdout.readline()
        if not line:
            raise UnavailableError("a stepping robot ended", "see its error above")
        answer = json.loads(line)
        total += answer["steps"] / answer["seconds"]
    return total


def step_on_demand(bundle: Path, number: int) -> None:
    """One robot, until stdin ends."""
    from infra.edge.inference import load_policy
    from infra.fleet.rollout import Job, iterate_jobs

    keys = list(TASKS)
    jobs = (Job(keys[(number + i) % len(keys)], 1000 * number + i, "evaluation") for i in itertools.count())
    steps, began, end = 0, 0.0, 0.0

    def stop() -> bool:
        """Asked before every step."""
        nonlocal steps, began, end
        now = time.perf_counter()
        if now < end:
            steps += 1
            return False
        if end:
            print(json.dumps({"steps": steps, "seconds": now - began}), flush=True)
        line = sys.stdin.readline()
        if not line:
            return True
        steps, began = 1, time.perf_counter()
        end = began + float(line)
        return False

    for _ in iterate_jobs(load_policy(bundle), jobs, source="rollout", envs=1, stop=stop):
        pass


def evaluation(bundle: Path, tasks: list[str], per_task: int, workers: int, rounds: int, peak: Peak) -> dict[str, Any]:
    """Evaluation episodes/min, the start of the worker processes included."""
    from flows.evaluation import evaluate

    turns = []
    for number in range(rounds):
        before, began = peak(), time.perf_counter()
        done = evaluate(bundle, tasks, per_task, number, workers=workers, title=f"round {number + 1}")
        seconds = time.perf_counter() - began
        turns.append((60 * len(done) / seconds, before, statistics.mean(result.steps for result in done)))
    return {
        "eval_episodes_per_min": round(statistics.median(turn[0] for turn in turns), 1),
        "rounds": [round(turn[0], 1) for turn in turns],
        "episodes_per_round": per_task * len(tasks),
        "tasks": tasks,
        "steps_per_episode": round(statistics.mean(turn[2] for turn in turns), 1),
        "workers": workers,
        "matmul_gflops": round(statistics.median(turn[1] for turn in turns) / 1e9, 1),
    }


def episode(rng: np.random.Generator, task: str = "S1", source: str = "online", number: int = 0) -> Episode:
    """An episode that keeps the contract and takes its task's whole time, with the scene's shapes."""
    spec = TASKS[task]
    steps = spec.limit
    return Episode(
        episode_id=new_episode_id(),
        robot_id=f"r{number}",
        task=task,
        instruction=spec.instruction,
        source=source,  # type: ignore[arg-type]
        outcome="success",
        policy_version=1,
        observations=rng.normal(size=(steps + 1, len(FEATURES))).astype(np.float32),
        actions=rng.uniform(-1, 1, (steps, ACTION_DIM)).astype(np.float32),
        rewards=np.eye(1, steps, steps - 1, dtype=np.float32)[0],
        intervention=np.zeros(steps, bool),
        timestamps=np.arange(steps + 1, dtype=np.float64) * CONTROL_PERIOD,
        substep_scores=(1.0,) * len(spec.steps),
        started_at=time.time(),
    )


def spool_to_snapshot(home: Path, episodes: int, robots: int, peak: Peak) -> dict[str, Any]:
    """Seconds from the call that closes an episode on its robot to its being in a snapshot, contract check included.

    The coordinator is a process; the robots are edge clients in this one, each sending from its own thread and closing
    its next episode when the last is in. Pauses of idle processes are the settings' defaults.
    """
    settings = load_settings(home=home)
    home.mkdir(parents=True, exist_ok=True)
    catalog = Catalog(settings.catalog_url)
    catalog.migrate()
    objects = DirectoryStore(settings.objects_dir)
    command = [sys.executable, "-m", "infra.coordinator", "--home", str(home), "--check", _CHECK]
    coordinator = subprocess.Popen([*command, "--parent", str(os.getpid())], env=os.environ | robot_environment())
    latencies: list[list[float]] = [[] for _ in range(robots)]
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            latencies[number] = _send(
                settings, EmbeddedServer(catalog, objects, f"r{number}"), number, -(-episodes // robots), coordinator
            )
        except BaseException as error:  # handed to the caller below
            failed.append(error)

    before = peak()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(robots)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        coordinator.terminate()
        coordinator.wait(30)
        catalog.close()
    if failed:
        raise failed[0]
    found = [seconds for one in latencies for seconds in one]
    return {
        "p50": round(float(np.quantile(found, 0.5)), 4),
        "p99": round(float(np.quantile(found, 0.99)), 4),
        "quantiles": [round(float(q), 4) for q in np.quantile(found, np.linspace(0, 1, 41))],
        "episodes": len(found),
        "robots": robots,
        "matmul_gflops": round((before + peak()) / 2 / 1e9, 1),
    }


def _send(
    settings: Settings, server: EmbeddedServer, number: int, episodes: int, coordinator: subprocess.Popen[bytes]
) -> list[float]:
    """Latencies of one robot's episodes; the first, which waits for the coordinator to start, is not counted."""
    rng = np.random.default_rng(number)
    spool = Spool(settings.spool_dir / f"r{number}", max_bytes=settings.spool_max_mib * MIB)
    client = EdgeClient(f"r{number}", spool, server, poll_s=settings.poll_s)
    client.start()
    found = []
    try:
        for _ in range(episodes + 1):
            made = episode(rng, number=number)
            client.begin(made.task, made.instruction, source="online", policy_version=1, episode_id=made.episode_id)
            for t in range(made.steps):
                client.record(
                    Frame(made.observations[t], made.actions[t], float(made.rewards[t]), False, made.timestamps[t])
                )
            began = time.perf_counter()
            closed = client.close(made.observations[-1], made.timestamps[-1], made.outcome, made.substep_scores)
            while (status := server.status(made.episode_id, closed.sha256)) != "snapshot":
                if coordinator.poll() is not None or status == "quarantined":
                    raise UnavailableError(
                        f"episode {made.episode_id} is {status}, the coordinator "
                        + ("at work" if coordinator.poll() is None else f"ended with {coordinator.returncode}"),
                        f"read {settings.logs_dir}",
                    )
                time.sleep(_LOOK_S)
            found.append(time.perf_counter() - began)
    finally:
        client.stop()
        spool.release()
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("number", type=int)
    options = parser.parse_args()
    step_on_demand(options.bundle, options.number)


if __name__ == "__main__":
    main()
