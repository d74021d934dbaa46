"""Prefect flow `report`: the page and the JSON of a run, from the pipeline's outputs and the deployment's catalog."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_link_artifact

from flows import report as pages
from flows.console import say
from flows.deployment import deployment
from flows.params import load_params
from flows.record import record_offline, record_online
from infra.fleet.tasks import TASKS


@flow(name="report", flow_run_name="report")
def report(run_dir: str = "runs/local/report", home: str = "runs/local", params_path: str = "params.yaml") -> str:
    """Record what the pipeline and the deployment hold at this moment, and build the page."""
    params, folder = load_params(Path(params_path)), Path(run_dir)
    instructions = {key: TASKS[key].instruction for key in params.tasks}
    pages.record_run(folder, command="lwd report", seeds=[params.seed], tasks=instructions)
    record_offline(folder, params)
    if (Path(home) / "learner" / "training.jsonl").exists():
        with deployment(Path(home)) as plane:
            record_online(folder, plane)
    page = pages.build_report(folder)
    create_link_artifact(key="report", link=page.resolve().as_uri())
    say(f"report: {page}")
    return str(page)
