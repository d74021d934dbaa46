"""From a published policy to the champion: evaluation on shared start states, the gate, the registry."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.console import bold, green, say, yellow
from flows.deployment import Deployment
from flows.evaluation import conditions, evaluate, read_results, write_results
from flows.gate import Decision, GateSpec, Verdict, decide, episodes_at, load_gate
from flows.params import Params
from flows.stages.common import BUNDLE, EVALUATION, OFFLINE, SFT
from flows.trials import ROUND, Trial, close_trial, open_trial, results, run_round
from infra.errors import ConfigError
from infra.policy.approval import load_person_key
from lwd_model.evaluation import EpisodeResult

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
        if plane.registry.needs_approval:
            plane.registry.propose(sft, evidence, against=None, proposer="pipeline")
            say(yellow(f"policy v{sft} waits for a person: `lwd approve {sft} --as NAME --key FILE`"))
        else:
            plane.registry.promote(sft, evidence, proposer="pipeline")
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
    known, path = EVALUATION / f"{stage}.json", evaluation_file(plane, version)
    if known.exists():  # the pipeline evaluated this very policy; results of other conditions are evaluated anew
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(known, path)
    return version


def evaluation_file(plane: Deployment, version: int) -> Path:
    """Where a policy's evaluation is kept."""
    return plane.settings.home / "evaluations" / f"{version:06d}.json"


def results_of(plane: Deployment, params: Params, version: int, episodes: int) -> list[EpisodeResult]:
    """A policy's results on the first `episodes` start states of each task; runs those that are missing.

    For people: no promotion rests on them. Results that were kept under other conditions (another seed, other tasks or
    limits, another simulator) are not used.
    """
    path, p = evaluation_file(plane, version), params.evaluate
    bundle = plane.bundle(version)
    under = conditions(bundle, params.tasks, p.seed)
    known = read_results(path, under) if path.exists() else []
    have = min((sum(r.task == task for r in known) for task in params.tasks), default=0)
    if have < episodes:
        known += evaluate(
            bundle, params.tasks, episodes, p.seed, workers=params.workers, title=f"v{version}", first=have
        )
        write_results(path, known, under)
    return [r for r in known if r.seed < episodes]


def judge(plane: Deployment, params: Params, candidate: int, spec: GateSpec | None = None) -> Judgement:
    """Ask the gate about a candidate's trial, with more episodes while it says CONTINUE.

    The gate itself ends at its `episodes.max`, with FAIL; a lower `evaluate.gate_max` stops before, with CONTINUE, and
    the next call goes on from there. An answer that was given stays.

    Raises:
        ConfigError: there is no champion to compare with, or the candidate is none that could be promoted.
    """
    trial = open_trial(plane, params, candidate, spec or load_gate())
    limit = episodes_at(trial.spec, trial.level).max
    limit = min(limit, params.evaluate.gate_max or limit)
    say(f"gate: trial {trial.position} of this deployment, level {trial.level:.2g}")
    done = min((sum(r.task == task for r in results(plane, trial, candidate)) for task in params.tasks), default=0)
    while True:
        if not trial.verdict:
            run_round(plane, params, trial, done := max(done, ROUND))  # what is missing of it
        decision = _decide(plane, trial)
        say(f"gate: v{candidate} against v{trial.champion}, {done} episodes a task: ", bold(decision.verdict))
        if trial.verdict or decision.verdict is not Verdict.CONTINUE or done >= limit:
            break
        done = min(done + ROUND, limit)
    answer = trial.verdict
    if not answer and decision.verdict is not Verdict.CONTINUE:
        answer = close_trial(plane, trial, str(decision.verdict))
    if answer and answer != decision.verdict:  # another process was first, with the episodes that there were then
        said = f"trial {trial.position} was answered before: {answer}"
        decision = replace(decision, verdict=Verdict(answer), reasons=(said, *decision.reasons))
    stream = {"trial": trial.id, "position": trial.position, "seed": trial.seed, "reference": trial.reference}
    return Judgement(candidate, trial.champion, replace(decision, evidence=decision.evidence | {"stream": stream}))


def _decide(plane: Deployment, trial: Trial) -> Decision:
    """The gate's answer to the episodes so far."""
    return decide(
        trial.spec,
        results(plane, trial, trial.candidate),
        results(plane, trial, trial.champion),
        level=trial.level,
        reference=None if trial.reference == trial.champion else results(plane, trial, trial.reference),
    )


def act_on(plane: Deployment, judgement: Judgement, *, proposer: str = "gate") -> dict[str, Any] | None:
    """Promote on PASS (returns the model card), refuse on FAIL, do nothing on CONTINUE.

    Where the deployment asks for a person's approval, PASS proposes the candidate and returns None.
    """
    decision, candidate = judgement.decision, judgement.candidate
    evidence = decision.evidence | {"verdict": str(decision.verdict), "reasons": list(decision.reasons)}
    if decision.verdict is Verdict.FAIL:
        plane.registry.refuse(candidate, evidence)
        return None
    if decision.verdict is not Verdict.PASS:
        return None
    if plane.registry.needs_approval:
        plane.registry.propose(candidate, evidence, against=judgement.champion, proposer=proposer)
        say(yellow(f"policy v{candidate} waits for a person: `lwd approve {candidate} --as NAME --key FILE`"))
        return None
    card = plane.registry.promote(
        candidate, evidence, proposer=proposer, against=judgement.champion, known_failures=weaknesses(evidence)
    )
    say(green(f"policy v{candidate} is champion"), f" (before: v{judgement.champion})")
    return card.as_dict()


def approve(plane: Deployment, version: int, approver: str, key: Path) -> dict[str, Any]:
    """Sign the proposal of a candidate as a person, and promote it; its model card.

    Args:
        approver: an enrolled person.
        key: the file of that person's private key.

    Raises:
        ConfigError: nobody proposed it, there is another champion by now, or the key cannot be read.
        UntrustedPolicyError: the person is not enrolled with that key.
    """
    proposal = plane.registry.proposal(version)
    card = plane.registry.promote(
        version,
        proposal.evidence,
        proposer=proposal.proposer,
        against=proposal.against,
        approval=proposal.approval(approver).signed(load_person_key(key)),
        known_failures=weaknesses(proposal.evidence),
    )
    say(green(f"policy v{version} is champion"), f", approved by {approver} (before: v{proposal.against})")
    return card.as_dict()


def weaknesses(evidence: Mapping[str, Any]) -> list[str]:
    """Sentences on the tasks in which the candidate rarely succeeds, for its card."""
    return [
        f"{task}: success {row['candidate']['success']['mean']:.2f}"
        for task, row in evidence.get("per_task", {}).items()
        if row["candidate"]["success"]["mean"] < _WEAK
    ]
