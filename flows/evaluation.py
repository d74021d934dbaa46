"""Evaluating policies: the same fresh start states for each, so that two are compared episode by episode."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from flows.console import progress
from infra.errors import CorruptDataError
from infra.fleet.scene import CONTROL_PERIOD
from infra.fleet.sources import collect, job_list
from infra.fleet.tasks import TASKS
from lwd_model.evaluation import EpisodeResult, result_of


def limits_s(tasks: Iterable[str]) -> dict[str, float]:
    """Time limits in seconds, by task."""
    return {key: TASKS[key].limit * CONTROL_PERIOD for key in tasks}


def evaluate(
    bundle: Path, tasks: Sequence[str], episodes: int, seed: int, *, workers: int, title: str
) -> list[EpisodeResult]:
    """Run `episodes` episodes of each task, nobody taking over.

    Args:
        bundle: the policy.
        seed: the i-th episode of a task starts the same for every policy evaluated with this seed.
    """
    jobs = job_list(tasks, episodes, seed, "evaluation")
    limits = limits_s(tasks)
    results: list[EpisodeResult] = []
    with progress(f"evaluate {title}", len(jobs)) as advance:
        for episode in collect(jobs, bundle, source="rollout", workers=workers, envs=16):
            results.append(result_of(episode, limit_s=limits[episode.task]))
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
