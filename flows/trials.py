"""Trials in evaluation: candidate, champion and reference run the same start states, drawn once the candidate is fixed.

A trial is a row of the catalog with its own seed, its place in the stream of candidates and the level that goes with
it; its episodes are rows as well. Interrupted or asked again it goes on: an episode counts once, and no second draw is
made. Episodes that anything else ran never decide. A canary that may promote has its place in the same stream;
its episodes are those that robots ran (`flows.canary_trial`).
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa

from flows.deployment import Deployment
from flows.evaluation import run_episodes, world
from flows.gate import GateSpec, level_at, share_at
from flows.params import Params
from infra.catalog import schema
from infra.catalog.dialect import insert_if_absent, now
from infra.errors import ConfigError
from lwd_model.evaluation import EpisodeResult

ROUND = 10  # episodes a task and policy between two questions to the gate
Kind = Literal["gate", "canary"]


@dataclass(frozen=True)
class Trial:
    """A comparison under way.

    Attributes:
        candidate, champion, reference: versions; the reference may be the champion.
        position, level: its place in the stream, from 1, and the level that goes with it.
        seed: of its start states.
        spec: the thresholds that held when it began.
        verdict: PASS or FAIL, once given.
        opened_at: when it began, by the catalog's clock.
    """

    id: int
    kind: Kind
    candidate: int
    champion: int
    reference: int
    position: int
    level: float
    seed: int
    spec: GateSpec
    verdict: str
    opened_at: float

    @property
    def arms(self) -> tuple[int, ...]:
        """The policies that run, each once."""
        return tuple(dict.fromkeys((self.candidate, self.champion, self.reference)))


def reference_of(plane: Deployment) -> int:
    """The fixed reference: the best champion so far.

    It is the last policy that became champion by a trial which showed it better than the champion before it, or else
    the first champion. A champion that was rolled back is none, and a promotion without such a trial moves nothing.

    Raises:
        ConfigError: there is no champion.
    """
    champion = _champion(plane)
    with plane.catalog.read() as connection:
        policies = schema.policies
        standing = connection.execute(
            sa.select(policies.c.version)
            .where(policies.c.status.in_(("champion", "retired")), policies.c.version.in_(_discoveries()))
            .order_by(policies.c.version.desc())
            .limit(1)
        ).scalar()
        first = connection.execute(
            sa.select(schema.promotions.c.version)
            .where(schema.promotions.c.decision == "promote")
            .order_by(schema.promotions.c.id)
            .limit(1)
        ).scalar()
    return int(standing if standing is not None else first if first is not None else champion)


def _champion(plane: Deployment) -> int:
    """Today's champion; ConfigError if there is none."""
    champion = plane.registry.alias("champion")
    if champion is None:
        raise ConfigError("there is no champion to compare with", "introduce the pipeline's policies: `lwd online`")
    return champion


def open_trial(plane: Deployment, params: Params, candidate: int, spec: GateSpec) -> Trial:
    """The trial of a candidate against today's champion and reference: the one under way, or a new one.

    A candidate that failed a trial gets no other: that one is returned.

    Raises:
        ConfigError: there is no champion, or the candidate is none that could be promoted.
    """
    plane.registry.require_promotable(candidate)
    if (failed := _failed(plane, candidate)) is not None:
        return failed
    champion, reference = _champion(plane), reference_of(plane)
    said = _digests(plane, candidate, champion, reference) | world(params.tasks)
    return _enter(plane, "gate", (candidate, champion, reference), said, spec)


def open_trial_at_work(plane: Deployment, candidate: int, tasks: Sequence[str], spec: GateSpec) -> Trial | None:
    """The trial of a candidate at real work against today's champion: the one that was opened, or a new one.

    None where the champion is not the reference: at work nothing runs beside the champion that a chain of small losses
    could be held against.

    Args:
        tasks: those that it is judged by; with others it is another trial.
        spec: the gate's stream, with the canary's numbers of episodes.

    Raises:
        ConfigError: there is no champion, or the candidate is none that could be promoted.
    """
    plane.registry.require_promotable(candidate)
    arms, said = _at_work(plane, candidate, tasks)
    return None if arms is None else _enter(plane, "canary", arms, said, spec)


def trial_at_work(plane: Deployment, candidate: int, tasks: Sequence[str]) -> Trial | None:
    """The trial that `open_trial_at_work` opened; None if it did not, or if it would open none now.

    Raises:
        ConfigError: as there.
    """
    arms, said = _at_work(plane, candidate, tasks)
    if arms is None:
        return None
    with plane.catalog.read() as connection:
        row = connection.execute(_row_of("canary", arms, said)).first()
    return None if row is None else _trial(row)


def _failed(plane: Deployment, candidate: int) -> Trial | None:
    """The gate's trial that this candidate failed, where a process ended before the refusal was written."""
    table = schema.trials
    query = sa.select(table).where(table.c.kind == "gate", table.c.candidate == candidate, table.c.verdict == "FAIL")
    with plane.catalog.read() as connection:
        row = connection.execute(query.order_by(table.c.id).limit(1)).first()
    return None if row is None else _trial(row)


def _at_work(
    plane: Deployment, candidate: int, tasks: Sequence[str]
) -> tuple[tuple[int, int, int] | None, dict[str, Any]]:
    champion, reference = plane.registry.alias("champion"), reference_of(plane)
    said = _digests(plane, candidate, reference) | {"tasks": sorted(tasks)}
    return (candidate, reference, reference) if champion == reference else None, said


def _digests(plane: Deployment, *versions: int) -> dict[str, Any]:
    digests = {row["version"]: row["manifest_sha256"] for row in plane.registry.policies()}
    if versions[0] not in digests:
        raise ConfigError(f"there is no policy {versions[0]}", "list them with `lwd policies`")
    return {"policies": [digests[version] for version in versions]}


def _enter(plane: Deployment, kind: Kind, arms: tuple[int, int, int], said: dict[str, Any], spec: GateSpec) -> Trial:
    """The trial of candidate, champion and reference under these conditions; a new one takes the next place."""
    candidate, champion, reference = arms
    table, mine = schema.trials, _row_of(kind, arms, said)
    with plane.catalog.begin() as connection:
        row = connection.execute(mine).first()
        if row is None:
            last = connection.execute(sa.select(sa.func.max(table.c.position))).scalar() or 0
            found = connection.execute(sa.select(sa.func.count()).select_from(_discoveries().subquery())).scalar_one()
            level = level_at(spec, last + 1, found, _spent(connection))
            if level <= 0:
                raise ConfigError(
                    f"the trials before took more than the alpha of {spec.alpha:g} that this gate's file allows",
                    "go on with the stream (alpha, decay) of the file that those trials had",
                )
            values = {
                "kind": kind, "candidate": candidate, "champion": champion, "reference": reference,
                "conditions_sha256": _digest(said), "conditions": said, "spec": spec.model_dump(),
                "position": last + 1, "level": level, "seed": secrets.randbits(48), "created_at": now(connection),
            }  # fmt: skip
            connection.execute(table.insert().values(values))
            row = connection.execute(mine).one()
    return _trial(row)


def _discoveries() -> sa.Select[Any]:
    """Candidates that a trial showed to be better and that were promoted; a PASS that led to nothing is none.

    The levels to come grow with their number: e-LOND holds for any subset of what it lets pass.
    """
    promoted = sa.select(schema.promotions.c.version).where(schema.promotions.c.decision == "promote")
    return sa.select(schema.trials.c.candidate).where(
        schema.trials.c.verdict == "PASS", schema.trials.c.candidate.in_(promoted)
    )


def _spent(connection: sa.Connection) -> float:
    """What the trials so far took of alpha, each by the file that held when it began."""
    rows = connection.execute(sa.select(schema.trials.c.spec, schema.trials.c.position))
    return math.fsum(share_at(GateSpec.model_validate(row.spec), row.position) for row in rows)


def _row_of(kind: Kind, arms: tuple[int, int, int], said: dict[str, Any]) -> sa.Select[Any]:
    table = schema.trials
    candidate, champion, reference = arms
    return sa.select(table).where(
        table.c.kind == kind, table.c.candidate == candidate, table.c.champion == champion,
        table.c.reference == reference, table.c.conditions_sha256 == _digest(said),
    )  # fmt: skip


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _trial(row: Any) -> Trial:
    return Trial(
        row.id, row.kind, row.candidate, row.champion, row.reference, row.position, row.level, row.seed,
        GateSpec.model_validate(row.spec), row.verdict, row.created_at,
    )  # fmt: skip


def results(plane: Deployment, trial: Trial, version: int) -> list[EpisodeResult]:
    """The episodes of one of the trial's policies, so far."""
    table = schema.trial_episodes
    query = sa.select(table.c.result).where(table.c.trial == trial.id, table.c.version == version)
    with plane.catalog.read() as connection:
        found = [EpisodeResult.from_dict(raw) for raw in connection.execute(query).scalars()]
    return sorted(found, key=lambda r: (r.task, r.seed))


def run_round(plane: Deployment, params: Params, trial: Trial, episodes: int) -> None:
    """Bring each policy of the trial to `episodes` start states a task; they take turns in an order drawn anew."""
    order = np.random.default_rng([trial.seed, episodes]).permutation(trial.arms)
    for version in (int(v) for v in order):
        have = {(r.task, r.seed) for r in results(plane, trial, version)}
        missing = [(task, n) for task in params.tasks for n in range(episodes) if (task, n) not in have]
        if not missing:
            continue
        title = f"v{version} ({_role(trial, version)})"
        with plane.evaluating(version) as bundle:
            ran = run_episodes(bundle, missing, trial.seed, workers=params.workers, title=title)
        with plane.catalog.begin() as connection:
            for result in ran:
                values = {
                    "trial": trial.id, "version": version, "task": result.task, "number": result.seed,
                    "result": result.as_dict(),
                }  # fmt: skip
                insert_if_absent(connection, schema.trial_episodes, values)


def close_trial(plane: Deployment, trial: Trial, verdict: str) -> str:
    """Record the answer, once; the one that stands."""
    table = schema.trials
    with plane.catalog.begin() as connection:
        connection.execute(table.update().where(table.c.id == trial.id, table.c.verdict == "").values(verdict=verdict))
        return str(connection.execute(sa.select(table.c.verdict).where(table.c.id == trial.id)).scalar_one())


def _role(trial: Trial, version: int) -> str:
    names = (("candidate", trial.candidate), ("champion", trial.champion), ("reference", trial.reference))
    return next(name for name, which in names if which == version)
