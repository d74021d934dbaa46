"""Evaluating policies: the same fresh start states for each, so that two are compared episode by episode.

Results are kept with the conditions that they depend on; those of other conditions are none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from data_contracts.shield import default_shield
from flows.console import progress
from infra.edge.shield import Limits
from infra.errors import CorruptDataError
from infra.files import write_durably
from infra.fleet.scene import CONTROL_PERIOD
from infra.fleet.sources import collect, job_list
from infra.fleet.tasks import TASKS
from infra.policy.artifact import ARCHITECTURE, WEIGHTS, file_sha256
from lwd_model.evaluation import EpisodeResult, result_of

_SIMULATOR = ("mujoco", "ogbench", "gymnasium")


def limits_s(tasks: Iterable[str]) -> dict[str, float]:
    """Time limits in seconds, by task."""
    return {key: TASKS[key].limit * CONTROL_PERIOD for key in tasks}


def world(tasks: Sequence[str]) -> dict[str, Any]:
    """What any policy's result depends on: the tasks with their limits, the shield, and the simulator's versions."""
    simulator = {name: installed(name) for name in _SIMULATOR}
    return {"tasks": limits_s(tasks), "shield": default_shield(), "simulator": simulator}


def conditions(bundle: Path, tasks: Sequence[str], seed: int) -> dict[str, Any]:
    """All that a policy's results depend on: its bytes, the seed, and the world."""
    policy = {name: file_sha256(bundle / name) for name in (WEIGHTS, ARCHITECTURE)}
    return {"policy": policy, "seed": seed} | world(tasks)


def evaluate(
    bundle: Path, tasks: Sequence[str], episodes: int, seed: int, *, workers: int, title: str, first: int = 0
) -> list[EpisodeResult]:
    """Run episodes number `first` to `episodes` - 1 of each task, nobody taking over.

    Args:
        bundle: the policy.
        seed: the i-th episode of a task starts the same for every policy evaluated with this seed. A result's own
            `seed` is i, so that more episodes come after those that a gate has seen already.
    """
    wanted = [(task, number) for number in range(first, episodes) for task in tasks]
    return run_episodes(bundle, wanted, seed, workers=workers, title=title)


def run_episodes(
    bundle: Path, wanted: Sequence[tuple[str, int]], seed: int, *, workers: int, title: str
) -> list[EpisodeResult]:
    """Run the episodes with these (task, number); by task and number."""
    tasks = list(dict.fromkeys(task for task, _ in wanted))
    known = job_list(tasks, 1 + max((number for _, number in wanted), default=-1), seed, "evaluation")
    numbered = {(job.task, place // len(tasks)): job for place, job in enumerate(known)}
    jobs = [numbered[pair] for pair in wanted]
    number = {job.seed: place for (_, place), job in zip(wanted, jobs, strict=True)}
    limits = limits_s(tasks)
    results: list[EpisodeResult] = []
    with progress(f"evaluate {title}", len(jobs)) as advance:
        shield = Limits.of(default_shield())
        for episode in collect(jobs, bundle, source="rollout", limits=shield, workers=workers, envs=16):
            results.append(result_of(episode, seed=number[episode.extra["seed"]], limit_s=limits[episode.task]))
            advance(1, f"success {sum(r.success for r in results) / len(results):.2f}")
    return sorted(results, key=lambda r: (r.task, r.seed))


def write_results(path: Path, results: Sequence[EpisodeResult], under: dict[str, Any]) -> None:
    """Keep results as JSON, with the `conditions` under which they came about."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"conditions": under, "episodes": [r.as_dict() for r in results]}
    write_durably(path, (json.dumps(document, allow_nan=False) + "\n").encode())


def read_results(path: Path, under: dict[str, Any] | None = None) -> list[EpisodeResult]:
    """The inverse of `write_results`.

    Args:
        under: none but results of these conditions; of any if not given.

    Raises:
        CorruptDataError: missing or damaged.
    """
    try:
        document = json.loads(path.read_text())
        if isinstance(document, list):  # of a version that kept no conditions
            document = {"conditions": None, "episodes": document}
        if under is not None and document["conditions"] != under:
            return []
        return [EpisodeResult.from_dict(raw) for raw in document["episodes"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CorruptDataError(f"evaluation {path} cannot be read ({error})", "evaluate again") from error
