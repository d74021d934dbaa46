"""`make demo`: the whole loop on one machine, from nothing to a policy that improved while it was deployed.

Offline pipeline, gate, online stage with robots and takeovers, gate again, report. Stopped anywhere, the same command
goes on from there: DVC knows what is done, the catalog and the learner's checkpoint hold the rest.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from prefect import flow

from flows import report
from flows.console import bold, green, say, yellow
from flows.deployment import Deployment, deployment, read_json
from flows.evaluation import limits_s
from flows.offline import offline
from flows.online import online
from flows.params import Params, load_params
from flows.promotion import act_on, introduce, judge, results_of
from flows.record import learning_curve, online_steps, record_offline, record_online
from flows.stages.common import BUNDLE, SFT
from infra.edge.inference import load_policy
from infra.errors import UnavailableError
from infra.files import write_durably
from infra.fleet.filmstrip import render_episode
from infra.fleet.rollout import run_jobs
from infra.fleet.sources import job_list
from infra.fleet.tasks import TASKS
from lwd_model.evaluation import EpisodeResult

CURVE_POINTS = 3
_STARTED = "started.json"


@flow(name="demo", flow_run_name="demo")
def demo(run_dir: str = "runs/demo", params_path: str = "params.yaml") -> dict[str, Any]:
    """Run the demo; returns report.json.

    Args:
        run_dir: what this run writes; the pipeline's data and models lie in `data/` and `models/`.
        params_path: parameters; the repository's own are the demo's.
    """
    folder, params = Path(run_dir), load_params(Path(params_path))
    home = folder / "home"
    started = _started(folder)
    instructions = {key: TASKS[key].instruction for key in params.tasks}
    report.record_run(folder, command="make demo", seeds=[params.seed], title="LWD demo", tasks=instructions)
    say(bold("1/5 offline pipeline"), " (dvc.yaml)")
    offline()
    record_offline(folder, params)
    say(bold("2/5 gate: the offline policy against SFT"))
    with deployment(home) as plane:
        _, first = introduce(plane)
        _gate(folder, plane, params, first, "offline", "sft")
    say(bold("3/5 online stage"), f": {params.online.robots} robots, one learner, redeployed every "
        f"{params.online.publish_every} updates")  # fmt: skip
    online(str(home), params_path)
    with deployment(home) as plane:
        last = plane.registry.policies()[0]["version"]
        say(bold("4/5 gate: the online policy against the champion"))
        results = results_of(plane, params, last, params.evaluate.episodes)
        report.record_evaluation(
            folder,
            "online",
            results,
            updates=params.online.updates,
            env_steps=online_steps(plane),
            policy_version=last,
            limits_s=limits_s(params.tasks),
        )
        _gate(folder, plane, params, last, "online", "champion")
        say(bold("5/5 report"))
        record_online(folder, plane, learning_curve(plane, params, CURVE_POINTS))
        _film(folder, plane, params, results_of(plane, params, last, params.evaluate.episodes), last)
    report.record_run(
        folder, command="make demo", seeds=[params.seed], title="LWD demo", tasks=instructions,
        wall_s=time.time() - started,
    )  # fmt: skip
    page = report.build_report(folder)
    document: dict[str, Any] = json.loads((folder / "report.json").read_text())
    _say_results(document, page)
    return document


def _started(folder: Path) -> float:
    """When this run began, also if it was stopped and is going on."""
    path = folder / _STARTED
    at = read_json(path).get("at")
    if not isinstance(at, float):
        at = time.time()
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps({"at": at}, allow_nan=False).encode())
    return at


def _gate(folder: Path, plane: Deployment, params: Params, candidate: int, name: str, against: str) -> None:
    status = next(row["status"] for row in plane.registry.policies() if row["version"] == candidate)
    if status != "candidate" or candidate <= (plane.registry.alias("champion") or 0):
        return  # decided before this run was stopped
    judgement = judge(plane, params, candidate)
    for reason in judgement.decision.reasons:
        say(f"  {reason}")
    report.record_gate(folder, judgement.decision.as_dict(), candidate=name, champion=against)
    card = act_on(plane, judgement)
    if card is not None:
        report.record_model_card(folder, card)


def _film(folder: Path, plane: Deployment, params: Params, after: list[EpisodeResult], version: int) -> None:
    """One robot before and after: a start state where the SFT policy fails and the online one succeeds."""
    before = {
        (r.task, r.seed): r.success for r in results_of(plane, params, introduce(plane)[0], params.evaluate.episodes)
    }
    improved = [r for r in after if r.success and not before[r.task, r.seed]]
    if not improved:
        return
    chosen = max(improved, key=lambda r: r.steps)
    jobs = job_list(params.tasks, params.evaluate.episodes, params.evaluate.seed, "evaluation")
    job = [j for j in jobs if j.task == chosen.task][chosen.seed]
    try:
        for which, bundle, label in (
            ("before", SFT / BUNDLE, "SFT"),
            ("after", plane.bundle(version), f"online, v{version}"),
        ):
            episode = run_jobs(load_policy(bundle), [job], source="rollout", envs=1)[0]
            frames = render_episode(job.task, job.seed, episode.actions, frames=12, height=160, width=160)
            caption = f"{label}: {TASKS[job.task].instruction}, {episode.outcome} after {episode.timestamps[-1]:.1f} s"
            report.record_frames(folder, which, np.asarray(frames), caption, fps=4.0)  # type: ignore[arg-type]
    except UnavailableError as error:
        say(yellow(f"no pictures: {error}"))


def _say_results(document: dict[str, Any], page: Path) -> None:
    for name, record in document["results"]["methods"].items():
        s = record["success"]
        say(f"  {name:<8} success {s['mean']:.3f}  [{s['low']:.3f}, {s['high']:.3f}]")
    loop = document["results"].get("loop") or {}
    say(f"  loop: {loop}")
    say(green("done"), f" in {document['wall_s'] / 60:.1f} min: open {page.resolve()}")
