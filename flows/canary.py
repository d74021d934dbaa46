"""A candidate on trial: watched at real work, sent back by itself when it does harm; its reach is bounded.

Only robots of the canary cohort ever run it. `start` refuses a cohort larger than the canary's file allows, and a look
that finds more robots, `episodes.max` episodes or `hours.max` hours without an answer, or a canary robot that refuses
the policy, ends the trial. What was found SAFE waits for a person, and no longer than `hours.max`; with `automatic` it
is promoted if it is also shown to be *better* than production robots at the same hours, at the level of its place in
the deployment's stream of candidates. All that is known lies in the catalog: a watcher that was killed goes on where it
was, and of several only one acts. `python -m flows.canary` watches whatever is on trial, for as long as it runs.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flows.canary_gate import (
    DEFAULT_CANARY,
    HOUR_S,
    Answer,
    CanarySpec,
    Standing,
    TrialDecision,
    decide_trial,
    load_canary,
)
from flows.canary_trial import (
    Trial,
    canary_robots,
    episodes_of,
    episodes_taken_in,
    find_trial,
    production_robots,
    refused_of,
    withdrawn_of,
    worked_before,
)
from flows.deployment import Deployment, deployment
from flows.gate import GateSpec, load_gate
from flows.promotion import weaknesses
from flows.trials import Trial as Entered
from flows.trials import close_trial, open_trial_at_work, trial_at_work
from infra.episode import decode
from infra.errors import ConfigError, CorruptDataError
from infra.objects import UnreadableError
from infra.policy.refusals import refusals
from infra.process import log_to, patiently, process_arguments, run_process
from infra.telemetry import metrics

POLL_S = 2.0
PROPOSER = "canary"
Acted = Literal["", "refused", "withdrawn", "promoted", "safe"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """One look at a trial: what was decided and done. `robots` are those of the canary cohort."""

    trial: Trial
    robots: tuple[str, ...]
    decision: TrialDecision
    acted: Acted = ""

    @property
    def answer(self) -> Answer:
        return self.decision.answer

    def rows(self) -> list[dict[str, Any]]:
        """The episodes by task, as a table."""
        table = self.decision.evidence["per_task"]
        return [
            {"task": task}
            | {
                f"{name} (v{version})": f"{row[name]['k']}/{row[name]['n']}, {row[f'{name}_takeovers']} takeovers"
                for name, version in (("candidate", self.trial.version), ("champion", self.trial.champion))
            }
            for task, row in table.items()
        ]


def start(plane: Deployment, spec: CanarySpec, version: int, *, proposer: str = "operator") -> list[str]:
    """Put a candidate on trial; one that is on trial already is left as it is. Returns the canary cohort's robots.

    Raises:
        ConfigError: no champion to come back to or nothing to compare with, no production robot at work, more robots
            than allowed, the candidate had its episodes, or the registry does not let it on trial.
    """
    if plane.registry.alias("canary") == version:
        return robots(plane)
    found, limit = robots(plane), spec.reach.robots
    if len(found) > limit:
        raise ConfigError(
            f"{len(found)} robots are in the canary cohort ({', '.join(found)}), the canary's file allows {limit}",
            "start the others with another --cohort, or raise reach.robots",
        )
    champion = plane.registry.alias("champion")
    if champion is None:
        raise ConfigError("there is no champion to compare with and to come back to", "promote one: `lwd promote`")
    with plane.catalog.read() as connection:
        trial = find_trial(connection, version, champion)
        taken_in = episodes_taken_in(connection, trial)
        earlier, tasks = worked_before(connection, trial, spec.episodes.max)
        at_work = production_robots(connection, trial.at - spec.window_hours * HOUR_S)
    during, (withdrawn, _) = episodes_of(taken_in, trial), withdrawn_of(taken_in, trial)
    seen = sum(episode.candidate for episode in during)
    if (ran := seen + withdrawn) >= spec.episodes.max:
        raise ConfigError(
            f"policy {version} has had {ran} canary episodes, the canary's file allows {spec.episodes.max}",
            "publish a new policy, or raise episodes.max: what was seen goes on to count",
        )
    if spec.baseline is None:
        _comparable(spec, champion, earlier + len(during) - seen, tasks, at_work)
    if spec.automatic and spec.baseline is None and not plane.registry.needs_approval:
        open_trial_at_work(plane, version, tasks, _stream(spec))  # before its first episode
    plane.registry.register_candidate(version, proposer=proposer)
    return found


def _comparable(spec: CanarySpec, champion: int, known: int, tasks: Sequence[str], at_work: Sequence[str]) -> None:
    if known < spec.episodes.min or not tasks:
        by = "production and canary" if tasks else "production"
        raise ConfigError(
            f"the champion, policy {champion}, has {known if tasks else 0} episodes by {by} robots since it was "
            f"promoted; {spec.episodes.min} are needed to know its tasks",
            "let it work first, or give a baseline in the canary's file",
        )
    if not at_work:
        raise ConfigError(
            f"no production robot was heard of in the last {spec.window_hours:g} hours: nothing to compare with",
            "start one (see `lwd status`), or give a baseline in the canary's file",
        )


def _stream(spec: CanarySpec) -> GateSpec:
    """The deployment's stream of candidates, with the canary's numbers of episodes."""
    return load_gate().model_copy(update={"episodes": spec.episodes})


def stop_trial(plane: Deployment, reason: str, *, actor: str = "operator") -> int:
    """End the trial, whatever it shows: the champion comes back, the candidate stays one; its version.

    Raises:
        ConfigError: nothing is on trial.
    """
    version = plane.registry.alias("canary")
    if version is None or not plane.registry.end_trial(
        version, {"reasons": [reason]}, decision="withdraw", proposer=actor
    ):
        raise ConfigError("no policy is on trial", "start one: `lwd canary VERSION`")
    return version


class Watcher:
    """Looks at whatever is on trial, and acts on what it sees.

    Args:
        plane: the deployment.
        spec: the canary's file.
    """

    def __init__(self, plane: Deployment, spec: CanarySpec) -> None:
        self._plane = plane
        self._spec = spec
        self._refused_by: dict[int, int | None] = {}  # row of the quarantine -> policy that ran the episode

    def look(self) -> Look | None:
        """One look; None when nothing is on trial (any more).

        Raises:
            UnavailableError: a server is away; look again later.
        """
        version, champion = self._plane.registry.alias("canary"), self._plane.registry.alias("champion")
        if version is None or champion is None:
            return None
        spec = self._spec
        with self._plane.catalog.read() as connection:
            trial = find_trial(connection, version, champion)
            taken_in = episodes_taken_in(connection, trial)
            _, known = worked_before(connection, trial, spec.episodes.max)
            found = canary_robots(connection)
            held = refused_of(connection, trial)
            unable = {robot: why for robot, why in refusals(connection, version).items() if robot in found}
        during, (withdrawn, lately) = episodes_of(taken_in, trial), withdrawn_of(taken_in, trial)
        tasks = known if spec.baseline is None else sorted(spec.baseline.success)
        entered = trial_at_work(self._plane, version, tasks) if self._may_promote else None
        standing = None if entered is None else Standing.of(entered.spec, entered.level, entered.opened_at)
        decision = decide_trial(spec, during, tasks, self._refused(held, version), withdrawn, standing=standing)
        ends = self._ends(trial, decision.answer, found, unable)
        if lately:
            ends.append(f"{lately} of its episodes were withdrawn: what is left of the comparison shows nothing")
        if decision.answer is not Answer.HARM and ends:
            decision = replace(decision, answer=Answer.STOP, reasons=(*ends, *decision.reasons), better=False)
        return self._act(Look(trial, tuple(found), decision), entered)

    @property
    def _may_promote(self) -> bool:
        """By itself: never where a person decides, nor on a comparison with fixed rates."""
        return self._spec.automatic and self._spec.baseline is None and not self._plane.registry.needs_approval

    def _ends(self, trial: Trial, answer: Answer, found: Sequence[str], unable: Mapping[str, str]) -> list[str]:
        """Why the trial ends, whatever it shows."""
        ends = [f"robot {robot} refuses the policy: {why}" for robot, why in unable.items()]
        if len(found) > self._spec.reach.robots:
            ends.append(f"{len(found)} robots are in the canary cohort, {self._spec.reach.robots} allowed")
        since, state = trial.restarted_at, "without an answer"
        if answer is Answer.SAFE and trial.safe_at is not None:
            since, state = trial.safe_at, "after it was found SAFE"
        if trial.at - since > self._spec.hours.max * HOUR_S:
            ends.append(f"on trial for more than {self._spec.hours.max:g} hours {state}")
        return ends

    def _act(self, look: Look, entered: Entered | None) -> Look | None:
        version, decision, registry = look.trial.version, look.decision, self._plane.registry
        evidence = decision.evidence | {"verdict": str(decision.answer), "reasons": list(decision.reasons)}
        acted: Acted = ""
        if decision.answer in (Answer.HARM, Answer.STOP):
            end: Literal["refuse", "withdraw"] = "refuse" if decision.answer is Answer.HARM else "withdraw"
            if not registry.end_trial(version, evidence, decision=end, proposer=PROPOSER):
                return None
            if entered is not None and decision.answer is Answer.HARM:
                close_trial(self._plane, entered, "FAIL")
            acted = "refused" if end == "refuse" else "withdrawn"
        elif decision.answer is Answer.SAFE and decision.better and entered is not None:
            close_trial(self._plane, entered, "PASS")
            stream = {"trial": entered.id, "position": entered.position, "reference": entered.reference}
            try:
                registry.promote(
                    version, evidence | {"stream": stream}, proposer=PROPOSER, against=look.trial.champion,
                    on_trial=True, known_failures=weaknesses(evidence),
                )  # fmt: skip
            except ConfigError:
                if registry.alias("canary") == version and registry.alias("champion") == look.trial.champion:
                    raise
                return None  # somebody else was first
            acted = "promoted"
        elif decision.answer is Answer.SAFE:
            if not registry.pass_trial(version, evidence, proposer=PROPOSER):
                return None
            acted = "safe"
        return replace(look, acted=acted)

    def _refused(self, held: Sequence[tuple[int, str]], version: int) -> int:
        """How many of the quarantine's rows are episodes that the candidate ran."""
        for number, key in held:
            if number not in self._refused_by:
                try:
                    self._refused_by[number] = decode(self._plane.objects.get(key), name=key).policy_version
                except CorruptDataError:  # the store's fault, not the policy's
                    self._refused_by[number] = None
                except UnreadableError as error:  # as well, and perhaps over at the next look
                    log.warning("%s", error.problem)
        return sum(self._refused_by.get(number) == version for number, _ in held)


def watch(
    plane: Deployment,
    spec: CanarySpec,
    *,
    poll_s: float = POLL_S,
    stop: threading.Event | None = None,
    on_look: Callable[[Look], None] | None = None,
) -> Look | None:
    """Look until there is an answer; the last look, or None when the trial was ended by somebody else.

    Servers that are away are waited for. With `stop` set, the last look is a CONTINUE.
    """
    watcher, halt = Watcher(plane, spec), stop or threading.Event()
    while True:
        look = patiently(watcher.look, halt)
        if look is not None and on_look is not None:
            on_look(look)
        if look is None or look.answer is not Answer.CONTINUE or halt.wait(poll_s):
            return look


def robots(plane: Deployment) -> list[str]:
    """The robots of the canary cohort."""
    with plane.catalog.read() as connection:
        return canary_robots(connection)


def _show(look: Look | None) -> None:
    """As metrics."""
    if look is None:
        metrics.CANARY_EPISODES.forget()
        metrics.CANARY_ROBOTS.forget()
        return
    metrics.CANARY_LOOKS.inc(result=str(look.answer).lower())
    metrics.CANARY_EPISODES.set(sum(row["candidate"]["n"] for row in look.decision.evidence["per_task"].values()))
    metrics.CANARY_ROBOTS.set(len(look.robots))


def _serve(options: argparse.Namespace, stop: threading.Event) -> None:
    spec = load_canary(options.gate)
    with deployment(options.home) as plane:
        log_to(plane.settings.logs_dir, "canary")
        metrics.serve(plane.settings, "canary")
        watcher, told = Watcher(plane, spec), ""
        while not stop.is_set():
            look = patiently(watcher.look, stop)
            _show(look)
            said = "" if look is None else f"policy {look.trial.version}: {look.answer}"
            if look is not None and said != told:
                level = logging.WARNING if look.acted in ("refused", "withdrawn") else logging.INFO
                log.log(level, "%s: %s", said, look.decision.reasons[0], extra={"fields": {"acted": look.acted}})
            told = said
            stop.wait(options.poll)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m flows.canary`: watch whatever is put on trial, until SIGTERM; exit code of the error otherwise."""
    parser = process_arguments("flows.canary", "Watch what is on trial.")
    parser.add_argument("--gate", type=Path, default=DEFAULT_CANARY, help="the canary's file")
    parser.add_argument("--poll", type=float, default=POLL_S, help="seconds between two looks")
    options = parser.parse_args(arguments)
    return run_process(options, lambda stop: _serve(options, stop), label="canary")


if __name__ == "__main__":
    sys.exit(main())
