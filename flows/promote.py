"""Prefect flows of promotion: `evaluate` a policy, ask the gate and `promote`, or `rollback` in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.console import say
from flows.deployment import Deployment, deployment
from flows.gate import load_gate
from flows.params import load_params
from flows.promotion import act_on, judge, results_of
from infra.errors import ConfigError
from lwd_model.evaluation import method_record


def newest_candidate(plane: Deployment) -> int:
    """The latest published policy that may be promoted.

    Raises:
        ConfigError: there is none.
    """
    champion = plane.registry.alias("champion") or 0
    for row in plane.registry.policies():
        if row["status"] == "candidate" and row["version"] > champion:
            return int(row["version"])
    raise ConfigError("no candidate is newer than the champion", "publish one: `lwd online`; see `lwd policies`")


@flow(name="evaluate", flow_run_name="evaluate")
def evaluate(
    home: str = "runs/local",
    versions: list[int] | None = None,
    episodes: int | None = None,
    params_path: str = "params.yaml",
) -> dict[str, Any]:
    """Run policies on the same start states; the champion and the newest candidate unless versions are named."""
    params = load_params(Path(params_path))
    with deployment(Path(home)) as plane:
        if not versions:
            champion = plane.registry.alias("champion")
            versions = [newest_candidate(plane)] + ([champion] if champion else [])
        records = {
            f"v{version}": method_record([results_of(plane, params, version, episodes or params.evaluate.episodes)])
            for version in versions
        }
    rows = [
        {"policy": name, "task": task, "success": f"{row['k']}/{row['n']}", "score": round(row["score"], 3)}
        for name, record in records.items()
        for task, row in record["per_task"].items()
    ]
    create_table_artifact(rows, key="evaluation", description="success and step-wise score on shared start states")
    return records


@flow(name="promote", flow_run_name="promote")
def promote(
    home: str = "runs/local",
    version: int | None = None,
    gate: str | None = None,
    approver: str | None = None,
    digest: str | None = None,
    params_path: str = "params.yaml",
) -> dict[str, Any]:
    """Ask the gate about a candidate; promote it on PASS, refuse it on FAIL, leave it on CONTINUE.

    Args:
        version: the newest candidate unless given.
        gate: a gate file; the default one unless given.
        approver, digest: who approves which manifest digest, where the deployment asks for approval.
    """
    params = load_params(Path(params_path))
    spec = load_gate(Path(gate)) if gate else load_gate()
    with deployment(Path(home)) as plane:
        judgement = judge(plane, params, version or newest_candidate(plane), spec)
        card = act_on(plane, judgement, approver=approver, digest=digest)
    decision = judgement.decision
    create_markdown_artifact(
        f"# {decision.verdict}: v{judgement.candidate} against v{judgement.champion}\n\n"
        + "\n".join(f"- {reason}" for reason in decision.reasons),
        key="gate",
    )
    return {
        "verdict": str(decision.verdict),
        "candidate": judgement.candidate,
        "champion": judgement.champion,
        "card": card,
    }


@flow(name="rollback", flow_run_name="rollback")
def rollback(home: str = "runs/local", reason: str = "", actor: str = "operator") -> int:
    """Make the previous champion champion again: one transaction, announced with a signed permission to go back."""
    with deployment(Path(home)) as plane:
        version = plane.registry.rollback(actor=actor, reason=reason or "not given")
    say(f"policy v{version} is champion again")
    return version
