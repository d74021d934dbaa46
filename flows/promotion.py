"""From a published policy to the champion: evaluation on shared start states, the gate, the registry."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.console import bold, green, say
from flows.deployment import Deployment
from flows.evaluation import evaluate, read_results, write_results
from flows.gate import Decision, GateSpec, Verdict, decide, load_gate
from flows.params import Params
from flows.stages.common import BUNDLE, EVALUATION, OFFLINE, SFT
from infra.errors import ConfigError
from lwd_model.evaluation import EpisodeResult

STEP = 25  # further episodes a task when the gate says CONTINUE
_WEAK = 0.5


@dataclass(frozen=True)
class Judgement:
    """The gate's answer on one candidate, and the champion that it was compared with."""

    candidate: int
    champion: int
    decision: Decision


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


def introduce(plane: Deployment) -> tuple[int, int]:
    """Publish the SFT and the offline policy of the pipeline to a new deployment; versions of both.

    The SFT policy becomes the first champion: there is nothing to compare it with. The offline one goes to the
    learning cohort. A deployment that has policies already is left as it is.
    """
    policies = {row["details"].get("stage"): row["version"] for row in reversed(plane.registry.policies())}
    if "offline" in policies:
        return policies["sft"], policies["offline"]
    for folder in (SFT, OFFLINE):
        if not (folder / BUNDLE).exists():
            raise ConfigError(f"{folder / BUNDLE} not found", "run the offline pipeline first: `lwd train`")
    sft = policies.get("sft") or _publish(plane, SFT, "sft", None)
    if plane.registry.alias("champion") is None:
        evidence = {"verdict": "PASS", "reasons": ["the first policy of this deployment: nothing to compare it with"]}
        plane.registry.promote(sft, evidence, proposer="pipeline", approver=None)
    return sft, _publish(plane, OFFLINE, "offline", sft)


def _publish(plane: Deployment, folder: Path, stage: str, parent: int | None) -> int:
    bundle = plane.settings.home / "publish" / stage
    shutil.copytree(folder / BUNDLE, bundle, dirs_exist_ok=True)  # a manifest is written there
    version = plane.publisher.publish(
        bundle,
        parent=parent,
        cohort=None if stage == "sft" else "learning",
        proposer="pipeline",
        details={"stage": stage},
    )
    known = EVALUATION / f"{stage}.json"
    if known.exists():  # the pipeline evaluated this very policy on the same start states
        write_results(evaluation_file(plane, version), read_results(known))
    return version


def evaluation_file(plane: Deployment, version: int) -> Path:
    """Where a policy's evaluation is kept."""
    return plane.settings.home / "evaluations" / f"{version:06d}.json"


def results_of(plane: Deployment, params: Params, version: int, episodes: int) -> list[EpisodeResult]:
    """A policy's results on the first `episodes` start states of each task; runs those that are missing."""
    path = evaluation_file(plane, version)
    known = read_results(path) if path.exists() else []
    have = min((sum(r.task == task for r in known) for task in params.tasks), default=0)
    if have < episodes:
        p = params.evaluate
        known += evaluate(
            plane.bundle(version),
            params.tasks,
            episodes,
            p.seed,
            workers=params.workers,
            title=f"v{version}",
            first=have,
        )
        write_results(path, known)
    return [r for r in known if r.seed < episodes]


def judge(plane: Deployment, params: Params, candidate: int, spec: GateSpec | None = None) -> Judgement:
    """Ask the gate, with more episodes while it says CONTINUE.

    The gate itself ends at its `episodes.max`, with FAIL; a lower `evaluate.gate_max` stops before, with CONTINUE.

    Raises:
        ConfigError: there is no champion to compare with.
    """
    champion = plane.registry.alias("champion")
    if champion is None:
        raise ConfigError("there is no champion to compare with", "introduce the pipeline's policies: `lwd online`")
    spec = spec or load_gate()
    limit = min(spec.episodes.max, params.evaluate.gate_max or spec.episodes.max)
    episodes = min(params.evaluate.episodes, limit)
    while True:
        decision = decide(
            spec,
            results_of(plane, params, candidate, episodes),
            results_of(plane, params, champion, episodes),
        )
        say(f"gate: v{candidate} against v{champion}, {episodes} episodes a task: ", bold(decision.verdict))
        if decision.verdict is not Verdict.CONTINUE or episodes >= limit:
            return Judgement(candidate, champion, decision)
        episodes = min(episodes + STEP, limit)


def act_on(
    plane: Deployment,
    judgement: Judgement,
    *,
    proposer: str = "gate",
    approver: str | None = None,
    digest: str | None = None,
) -> dict[str, Any] | None:
    """Promote on PASS (returns the model card), refuse on FAIL, do nothing on CONTINUE."""
    decision = judgement.decision
    evidence = decision.evidence | {"verdict": str(decision.verdict), "reasons": list(decision.reasons)}
    if decision.verdict is Verdict.FAIL:
        plane.registry.refuse(judgement.candidate, evidence)
        return None
    if decision.verdict is not Verdict.PASS:
        return None
    weak = [
        f"{task}: success {row['candidate']['success']['mean']:.2f}"
        for task, row in decision.evidence["per_task"].items()
        if row["candidate"]["success"]["mean"] < _WEAK
    ]
    card = plane.registry.promote(
        judgement.candidate, evidence, proposer=proposer, approver=approver, approved_sha256=digest, known_failures=weak
    )
    say(green(f"policy v{judgement.candidate} is champion"), f" (before: v{judgement.champion})")
    return card.as_dict()
