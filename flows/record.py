"""What a run tells its report: the offline pipeline's outputs and the online stage's rows in the catalog."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from flows import report
from flows.deployment import Deployment
from flows.evaluation import evaluate, limits_s, read_results
from flows.online_learner import ROWS, read_rows
from flows.params import Params
from flows.stages.common import BUFFER, CHECKPOINT, EVALUATION, OFFLINE, read_plot, read_refused
from infra.catalog import schema
from infra.episode import Episode, decode
from lwd_model.diagnostics import diagnose
from lwd_model.evaluation import method_record
from lwd_model.learner import Learner
from lwd_model.shards import read_buffer

CURVE_SEED = 2_000_000


def record_offline(run_dir: Path, params: Params) -> None:
    """Evaluations, training curves, composition, quarantine and value diagnosis of the offline pipeline."""
    updates = {"sft": params.sft.updates, "offline": params.offline.updates}
    for name, done in updates.items():
        results = read_results(EVALUATION / f"{name}.json")
        report.record_evaluation(run_dir, name, results, updates=done, limits_s=limits_s(params.tasks))
        report.record_training(run_dir, name, read_plot(name))
    episodes = list(read_buffer(BUFFER))
    report.record_composition(run_dir, report.composition_of(episodes))
    report.record_quarantine(run_dir, quarantine_rows(read_refused()))
    record_values(run_dir, OFFLINE / CHECKPOINT, episodes, "the offline buffer")


def quarantine_rows(refused: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per violation of the refused episodes, as the report takes them."""
    return [
        {"episode_id": row["episode_id"], "task": row.get("task"), "source": row.get("source"),
         "robot_id": row.get("robot_id"), **reason}
        for row in refused
        for reason in row["reasons"]
    ]  # fmt: skip


def record_values(run_dir: Path, checkpoint: Path, episodes: Iterable[Episode], where: str) -> None:
    """Value distributions along the longest autonomous success and a failure of the same task (Figs. 6 and 9)."""
    autonomous = [e for e in episodes if e.source in ("rollout", "online") and not e.intervention.any()]
    failures = {e.task: e for e in autonomous if not e.success}
    successes = [e for e in autonomous if e.success and e.task in failures]
    if not successes:
        return
    success = max(successes, key=lambda e: e.steps)
    agent = Learner.resume(checkpoint).agent
    for which, episode in (("success", success), ("failure", failures[success.task])):
        found = diagnose(agent, episode)
        report.record_diagnosis(
            run_dir,
            which,  # type: ignore[arg-type]
            seconds=episode.timestamps,
            atoms=found["atoms"],
            distribution=found["probs"],
            task=episode.task,
            instruction=episode.instruction,
            caption=f"an autonomous {which} of {episode.task} in {where}",
        )


def record_online(run_dir: Path, plane: Deployment, curve: Iterable[dict[str, Any]] = ()) -> None:
    """The online stage: learning curve, training, latencies, composition, loop counts, values."""
    home = plane.settings.home
    members = list(_members(plane))
    takeovers = sum(m.interventions > 0 for m in members)
    report.record_learning_curve(
        run_dir,
        [
            {"task": m.task, "success": m.outcome == "success", "takeover": m.interventions > 0,
             "policy_version": m.policy_version}
            for m in members
        ],
        redeployments=_activations(members),
        evaluations=list(curve),
    )  # fmt: skip
    report.record_training(run_dir, "online", read_rows(home / "learner" / ROWS))
    latencies = {"episode_to_learner_s": _episode_to_learner(plane), "publish_to_active_s": _publish_to_active(plane)}
    report.record_latency(run_dir, latencies)
    report.record_loop(
        run_dir,
        redeployments=len(latencies["publish_to_active_s"]),
        interventions=takeovers,
        episodes_online=len(members),
    )
    online = [decode(plane.objects.get(m.key), name=m.key) for m in members]
    report.record_composition(run_dir, report.composition_of([*read_buffer(BUFFER), *online]))
    report.record_quarantine(run_dir, quarantine_rows(read_refused() + plane.quarantined()))
    record_values(run_dir, home / "learner" / CHECKPOINT, online, "the online stage")


def _members(plane: Deployment) -> list[Any]:
    members, episodes = schema.snapshot_episodes, schema.episodes
    query = (
        sa.select(members, episodes.c.key, episodes.c.produced_at)
        .join(episodes, episodes.c.episode_id == members.c.episode_id)
        .where(members.c.removed.is_(None))
        .order_by(members.c.added, episodes.c.produced_at)
    )
    with plane.catalog.read() as connection:
        return list(connection.execute(query))


def _activations(members: list[Any]) -> list[dict[str, int]]:
    """Where in the stream of episodes each policy version first shows up."""
    seen: dict[int, int] = {}
    for place, member in enumerate(members):
        if member.policy_version is not None and member.policy_version not in seen:
            seen[member.policy_version] = place
    first = min(seen, default=0)
    return [{"episodes": place, "version": version} for version, place in seen.items() if version != first]


def _episode_to_learner(plane: Deployment) -> list[float]:
    """Seconds from an episode's end on the robot to the learner's hold on the snapshot that has it."""
    members, episodes, loads = schema.snapshot_episodes, schema.episodes, schema.loads
    query = (
        sa.select(loads.c.loaded_at - episodes.c.produced_at)
        .select_from(members)
        .join(episodes, episodes.c.episode_id == members.c.episode_id)
        .join(loads, sa.and_(loads.c.version == members.c.added, loads.c.reader == "learner"))
    )
    with plane.catalog.read() as connection:
        return [float(value) for value in connection.execute(query).scalars()]


def _publish_to_active(plane: Deployment) -> list[float]:
    table = schema.measurements
    with plane.catalog.read() as connection:
        return [
            float(v)
            for v in connection.execute(sa.select(table.c.value).where(table.c.name == "publish_to_active_s")).scalars()
        ]


def online_steps(plane: Deployment) -> int:
    """Control steps collected online."""
    return int(np.sum([m.steps for m in _members(plane)]))


def policy_curve(plane: Deployment, points: int) -> list[tuple[int, int]]:
    """(version, online episodes known to its learner) of about `points` policies spread over the online stage."""
    published = [
        (row["version"], int(read["episodes"]))
        for row in reversed(plane.registry.policies())
        if (read := row["details"] or {}).get("stage") == "online"
    ]
    inner = published[:-1]
    if not inner or points < 1:
        return []
    places = np.unique(np.linspace(0, len(inner) - 1, points + 2)[1:-1].round().astype(int))
    return [inner[i] for i in places]


def learning_curve(plane: Deployment, params: Params, points: int) -> list[dict[str, Any]]:
    """Evaluations of about `points` of the policies deployed on the way, on start states of their own.

    Empty where `evaluate.curve` is 0.
    """
    curve = []
    for version, episodes in policy_curve(plane, points if params.evaluate.curve else 0):
        results = evaluate(
            plane.bundle(version),
            params.tasks,
            params.evaluate.curve,
            CURVE_SEED,
            workers=params.workers,
            title=f"v{version}",
        )
        curve.append({"episodes": episodes, "success": method_record([results])["success"], "version": version})
    return curve
