"""Prefect flow `offline`: the stages of `dvc.yaml`, one task each, with retries, progress and artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows import pipeline
from flows.console import bold, say
from infra import interrupts


def _is_failure(*_: Any) -> bool:
    """Whether a task may be tried again: what somebody stopped may not."""
    return interrupts.asked() is None


@task(task_run_name="{stage}", retries=1, retry_delay_seconds=2, retry_condition_fn=_is_failure)
def reproduce(stage: str) -> bool:
    """Reproduce one stage; True where it ran, False where nothing had changed."""
    say(bold(f"stage {stage}"))
    ran = pipeline.run(stage)
    if not ran:
        say("  unchanged: taken from the last run")
    return ran


def flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as `a.b.c` → number, as `dvc metrics show` names them."""
    rows: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            rows |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            rows[prefix + key] = value
    return rows


@flow(name="offline", flow_run_name="offline")
def offline(until: str | None = None) -> dict[str, bool]:
    """Bring the offline pipeline up to date.

    Args:
        until: last stage to run; all of them by default.

    Returns:
        For each stage, whether it ran.
    """
    ran = {name: reproduce(name) for name in pipeline.stages(until)}
    for path in sorted(Path("metrics").glob("*.json")):
        rows = [{"metric": k, "value": v} for k, v in flat(json.loads(path.read_text())).items()]
        create_table_artifact(rows, key=f"metrics-{path.stem}", description=f"{path.name} of the offline pipeline")
    create_markdown_artifact(
        "\n".join(f"- {name}: {'ran' if did else 'unchanged'}" for name, did in ran.items()), key="offline-stages"
    )
    return ran


@flow(name="collect", flow_run_name="collect")
def collect() -> dict[str, bool]:
    """Bring the three offline sources up to date: demonstrations, rollouts of historical policies, play."""
    return {name: reproduce(name) for name in ("demonstrations", "sft", "rollouts", "play")}
