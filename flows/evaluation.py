"""Evaluating policies: the same fresh start states for each, so that two are compared episode by episode."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_contracts.shield import default_shield
from flows.console import progress
from infra.edge.shield import Limits
from infra.errors import CorruptDataError
from infra.fleet.scene import CONTROL_PERIOD
from infra.fleet.sources import collect, job_list
from infra.fleet.tasks import TASKS
from lwd_model.evaluation import EpisodeResult, result_of


def limits_s(tasks: Iterable[str]) -> dict[str, float]:
    """Time limits in seconds, by task."""
    return {key: TASKS[key].limit * CONTROL_PERIOD for key in tasks}


def evaluate(
    bundle: Path, tasks: Sequence[str], episodes: int, seed: int, *, workers: int, title: str, first: int = 0
) -> list[EpisodeResult]:
    """Run episodes number `first` to `episodes` - 1 of each task, nobody taking over.

    Args:
        bundle: the policy.
        seed: the i-th episode of a task starts the same for every policy evaluated with this seed. A result's own
            `seed` is i, so that more episodes come after those that a gate has seen already.
    """
    jobs = job_list(tasks, episodes, seed, "evaluation")[first * len(tasks) :]
    number = {job.seed: first + place // len(tasks) for place, job in enumerate(jobs)}
    limits = limits_s(tasks)
    results: list[EpisodeResult] = []
    with progress(f"evaluate {title}", len(jobs)) as advance:
        shield = Limits.of(default_shield())
        for episode in collect(jobs, bundle, source="rollout", limits=shield, workers=workers, envs=16):
            results.append(result_of(episode, seed=number[episode.extra["seed"]], limit_s=limits[episode.task]))
            advance(1, f"success {sum(r.success for r in results) / len(results):.2f}")
    return sorted(results, key=lambda r: (r.task, r.seed))


def write_results(path: Path, results: Sequence[EpisodeResult]) -> None:
    """Keep results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([r.as_dict() for r in results]) + "\n")


def read_results(path: Path) -> list[EpisodeResult]:
    """The inverse of `write_results`.

    Raises:
        CorruptDataError: missing or damaged.
    """
    try:
        return [EpisodeResult.from_dict(raw) for raw in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise CorruptDataError(f"evaluation {path} cannot be read ({error})", "evaluate again") from error
