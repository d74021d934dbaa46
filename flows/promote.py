"""Prefect flows of promotion: `evaluate` a policy, ask the gate and `promote`, try a `canary`, or `rollback`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.canary import Look, start, watch
from flows.canary_gate import DEFAULT_CANARY, load_canary
from flows.console import bold, say
from flows.deployment import deployment
from flows.gate import load_gate
from flows.params import load_params
from flows.promotion import act_on, judge, newest_candidate, results_of
from lwd_model.evaluation import method_record


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
    params_path: str = "params.yaml",
) -> dict[str, Any]:
    """Ask the gate about a candidate; promote it on PASS, refuse it on FAIL, leave it on CONTINUE.

    Args:
        version: the newest candidate unless given.
        gate: a gate file; the default one unless given.

    Where the deployment asks for a person's approval, PASS proposes it: `lwd approve`.
    """
    params = load_params(Path(params_path))
    spec = load_gate(Path(gate)) if gate else load_gate()
    with deployment(Path(home)) as plane:
        judgement = judge(plane, params, version or newest_candidate(plane), spec)
        card = act_on(plane, judgement)
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


@flow(name="canary", flow_run_name="canary")
def canary(
    home: str = "runs/local", version: int | None = None, gate: str | None = None, poll_s: float = 2.0
) -> dict[str, Any]:
    """Put a candidate on trial in the canary cohort and watch it until there is an answer; HARM sends it back.

    Stopped or killed, run it again: it goes on with what is on trial, and what was seen counts.

    Args:
        version: the one on trial, or else the newest candidate, unless given.
        gate: a canary's file; the default one unless given.
        poll_s: pause between two looks.
    """
    spec = load_canary(Path(gate) if gate else DEFAULT_CANARY)
    with deployment(Path(home)) as plane:
        chosen = version or plane.registry.alias("canary") or newest_candidate(plane)
        found = start(plane, spec, chosen, proposer="canary flow")
        who = ", ".join(found) or "nobody yet: start a robot with --cohort canary"
        say(f"policy v{chosen} is on trial; in the canary cohort: {who}")
        look = watch(plane, spec, poll_s=poll_s, on_look=_teller())
    if look is None:
        return {"version": chosen, "answer": "ENDED", "reasons": ["ended by another decision"], "acted": "", "rows": []}
    reasons, rows = list(look.decision.reasons), look.rows()
    create_table_artifact(rows, key="canary", description=f"{look.answer}: v{chosen} against v{look.trial.champion}")
    create_markdown_artifact(
        f"# {look.answer}: v{chosen} on trial against v{look.trial.champion}\n\n"
        + "\n".join(f"- {reason}" for reason in reasons),
        key="canary-answer",
    )
    return {"version": chosen, "answer": str(look.answer), "reasons": reasons, "acted": look.acted, "rows": rows}


def _teller() -> Callable[[Look], None]:
    """A line for every tenth episode."""
    told = -1

    def tell(look: Look) -> None:
        nonlocal told
        ran = look.decision.evidence["episodes"]
        if ran // 10 != told:
            told = ran // 10
            say(f"canary v{look.trial.version}: {ran} episodes: ", bold(look.answer), f"; {look.decision.reasons[0]}")

    return tell


@flow(name="rollback", flow_run_name="rollback")
def rollback(home: str = "runs/local", reason: str = "", actor: str = "operator") -> int:
    """Make the previous champion champion again: one transaction, announced with a signed permission to go back."""
    with deployment(Path(home)) as plane:
        version = plane.registry.rollback(actor=actor, reason=reason or "not given")
    say(f"policy v{version} is champion again")
    return version
