"""Writers of a run's record: each stage of the flows calls its own, in any order; a second call replaces the first.

Everything lies below `RUN/record/` as JSON and NPZ (no pickle), each file written whole or not at all.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flows.report.data import RECORD, read_json
from flows.report.envelope import machine, utc_now, write_json
from infra.episode import Episode
from infra.errors import ConfigError
from lwd_model.evaluation import EpisodeResult, result_of


def record_run(
    run_dir: Path,
    *,
    command: str,
    seeds: Sequence[int],
    title: str = "Learning while deploying",
    suite: str = "scene-8",
    tasks: Mapping[str, str] | None = None,
    wall_s: float | None = None,
    started: str | None = None,
) -> None:
    """What the run is; call it first, it measures the machine while nothing else runs, and again with `wall_s` last.

    Args:
        run_dir: folder of the run, for example `runs/demo`.
        command: that makes the run again.
        seeds: used.
        title: of the page.
        suite: name of the task suite.
        tasks: {task key: instruction}, in the order to show.
        wall_s: duration; without it the report takes the time between the start and the last thing recorded.
        started: ISO 8601; now when not given. A second call keeps the first one's start and machine.
    """
    path = run_dir / RECORD / "run.json"
    value: dict[str, Any] = {
        "command": command, "seeds": list(seeds), "title": title, "suite": suite,
        "tasks": dict(tasks or {}), "wall_s": wall_s,
    }  # fmt: skip
    if wall_s is not None and path.exists():
        before = read_json(path)
        value |= {"started": before["started"], "machine": before["machine"]}
        value["tasks"] = value["tasks"] or before["tasks"]
    else:
        value |= {"started": started or utc_now(), "machine": machine()}
    write_json(path, value)


def record_evaluation(
    run_dir: Path,
    name: str,
    episodes: Iterable[Episode | EpisodeResult],
    *,
    label: str | None = None,
    updates: int | None = None,
    env_steps: int | None = None,
    policy_version: int | None = None,
    limits_s: Mapping[str, float] | None = None,
) -> list[EpisodeResult]:
    """Evaluation episodes of one policy.

    Args:
        run_dir: folder of the run.
        name: `sft`, `offline`, `online` or another method's name.
        episodes: Episodes (with `extra["seed"]`) or results.
        label: to show; the name's usual one when not given.
        updates: learner updates that the policy has had.
        env_steps: control steps collected online for it.
        policy_version: in the registry.
        limits_s: {task: time limit in seconds}, at which failures count; see `lwd_model.evaluation.result_of`.

    Returns:
        The results, for the gate.
    """
    limits = limits_s or {}
    results = [e if isinstance(e, EpisodeResult) else result_of(e, limit_s=limits.get(e.task)) for e in episodes]
    if not results:
        raise ConfigError(f"evaluation {name!r} has no episode", "evaluate at least one episode a task")
    value = {
        "name": name, "label": label, "updates": updates, "env_steps": env_steps, "policy_version": policy_version,
        "episodes": [result.as_dict() for result in results],
    }  # fmt: skip
    write_json(run_dir / RECORD / "evaluations" / f"{name}.json", value)
    return results


def record_training(run_dir: Path, stage: str, rows: Iterable[Mapping[str, float]]) -> None:
    """Learner metrics over a stage (`sft`, `offline`, `online`): one row per logged update.

    Args:
        run_dir: folder of the run.
        stage: its name.
        rows: mappings with `update` (counted from 0 in the stage) and any metrics. The names that end in `tau` and
            `entropy` make the figure. A metric that is not finite is dropped from its row.
    """
    kept = [{key: float(v) for key, v in row.items() if np.isfinite(float(v))} for row in rows]
    if any("update" not in row for row in kept):
        raise ConfigError(f"training metrics of stage {stage!r} lack 'update'", "log the update's number in each row")
    write_json(run_dir / RECORD / "training" / f"{stage}.json", kept)


def record_learning_curve(
    run_dir: Path,
    episodes: Sequence[Mapping[str, Any]],
    *,
    redeployments: Sequence[Mapping[str, int]] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The online stage, episode by episode as it entered the snapshots.

    Args:
        run_dir: folder of the run.
        episodes: in order: {"task", "success", "takeover", "policy_version"}; `takeover` is True where an operator
            acted in any step.
        redeployments: {"episodes": collected when the policy was activated by a robot, "version"}.
        evaluations: evaluations on the way: {"episodes": collected so far, "success": {"mean", "low", "high"},
            "version"}. The evaluations named `offline` and `online` are added as the two ends.
    """
    rows = [
        {
            "task": str(e["task"]),
            "success": bool(e["success"]),
            "takeover": bool(e["takeover"]),
            "policy_version": e.get("policy_version"),
        }
        for e in episodes
    ]
    value = {
        "episodes": rows,
        "redeployments": [dict(row) for row in redeployments],
        "evaluations": [dict(row) for row in evaluations],
    }
    write_json(run_dir / RECORD / "curve.json", value)


def composition_of(episodes: Iterable[Episode]) -> list[dict[str, Any]]:
    """Episodes and control steps of a buffer by task, source and outcome, as `record_composition` takes them."""
    counts: Counter[tuple[str, str, str]] = Counter()
    steps: Counter[tuple[str, str, str]] = Counter()
    for episode in episodes:
        key = (episode.task, episode.source, "success" if episode.success else "failure")
        counts[key] += 1
        steps[key] += episode.steps
    return [
        {"task": key[0], "source": key[1], "outcome": key[2], "episodes": counts[key], "steps": steps[key]}
        for key in sorted(counts)
    ]


def record_composition(run_dir: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """What the replay holds: rows of {"task", "source", "outcome", "episodes", "steps"}; see `composition_of`."""
    names = ("task", "source", "outcome", "episodes", "steps")
    write_json(run_dir / RECORD / "composition.json", [{name: row[name] for name in names} for row in rows])


def record_latency(run_dir: Path, samples: Mapping[str, Sequence[float]]) -> None:
    """Measured latencies: {"episode_to_learner_s": [...], "publish_to_active_s": [...]}, seconds, one per event."""
    write_json(run_dir / RECORD / "latency.json", {name: [float(v) for v in vs] for name, vs in samples.items()})


def record_diagnosis(
    run_dir: Path,
    which: Literal["success", "failure"],
    *,
    seconds: npt.ArrayLike,
    atoms: npt.ArrayLike,
    distribution: npt.ArrayLike,
    task: str,
    instruction: str,
    intervention: npt.ArrayLike | None = None,
    caption: str = "",
) -> None:
    """The learned value distribution along one episode (Figs. 6 and 9).

    Args:
        run_dir: folder of the run.
        which: `success` or `failure`.
        seconds: (T,) time of each state.
        atoms: (K,) the support.
        distribution: (T, K) probabilities.
        task: key.
        instruction: the sentence.
        intervention: (T,) True where an operator acted.
        caption: where the episode comes from.
    """
    times, support, probabilities = (np.asarray(a, dtype=np.float32) for a in (seconds, atoms, distribution))
    mask = np.zeros(len(times), bool) if intervention is None else np.asarray(intervention, dtype=bool)
    if probabilities.shape != (len(times), len(support)) or mask.shape != times.shape:
        raise ConfigError(
            f"diagnosis {which!r}: distribution {probabilities.shape} for {len(times)} states, {len(support)} atoms",
            "give (T, K) probabilities for T seconds and K atoms",
        )
    _write_npz(
        run_dir / RECORD / f"value_{which}.npz",
        seconds=times, atoms=support, distribution=probabilities, intervention=mask,
        task=np.array(task), instruction=np.array(instruction), caption=np.array(caption),
    )  # fmt: skip


def record_frames(
    run_dir: Path,
    which: Literal["before", "after"],
    frames: npt.NDArray[np.uint8],
    caption: str,
    *,
    fps: float = 10.0,
) -> None:
    """Camera frames of one robot: (n, h, w, 3) uint8, `before` and `after` on the same task and seed."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ConfigError(f"frames {which!r}: {frames.dtype} {frames.shape}", "give (n, h, w, 3) uint8, n >= 1")
    path = run_dir / RECORD / f"frames_{which}.npz"
    _write_npz(path, frames=frames, caption=np.array(caption), fps=np.array(fps))


def record_loop(run_dir: Path, *, redeployments: int, interventions: int, episodes_online: int) -> None:
    """Counts of the online stage: policies activated by robots, episodes with a takeover, episodes committed."""
    value = {"redeployments": redeployments, "interventions": interventions, "episodes_online": episodes_online}
    write_json(run_dir / RECORD / "loop.json", value)


def record_quarantine(run_dir: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Episodes refused by the data contracts: {"episode_id", "rule", "message"} and, where known, "task", "source",
    "robot_id", "severity", "owner". One row per violation; an empty list says that none was refused."""
    known = dict.fromkeys(("task", "source", "robot_id", "severity", "owner"))
    kept = [known | dict(row) for row in rows]
    for row in kept:
        if absent := {"episode_id", "rule", "message"} - row.keys():
            raise ConfigError(f"a quarantined episode lacks {', '.join(sorted(absent))}", "record all three")
    write_json(run_dir / RECORD / "quarantine.json", kept)


def record_gate(run_dir: Path, decision: Mapping[str, Any], *, candidate: str, champion: str) -> None:
    """`flows.gate.Decision.as_dict()` and the names of the two that were compared; one record per candidate."""
    value = {"candidate": candidate, "champion": champion, **decision}
    write_json(run_dir / RECORD / "gates" / f"{candidate}.json", value)


def record_model_card(run_dir: Path, card: Mapping[str, Any]) -> None:
    """The champion's model card as the registry wrote it, JSON values."""
    write_json(run_dir / RECORD / "model_card.json", dict(card))


def _write_npz(path: Path, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(buffer.getvalue())
    aside.replace(path)
