"""Rollouts of many scenes in one process, with one batched inference for all that replan.

Every episode draws from its own generator, seeded by its job: results depend on the job alone, not on how many scenes
run side by side (up to the rounding of a batched matrix product in the policy).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.edge.clock import Clock
from infra.edge.shield import Limits, Shield
from infra.edge.watchdog import ActionPolicy
from infra.episode import Episode, Outcome, Source, new_episode_id
from infra.errors import ConfigError, CorruptDataError, LwdError, summary
from infra.fleet.experts import NOISE_CORRELATION
from infra.fleet.operator import ExpertOperator, Operator
from infra.fleet.scene import ACTION_DIM, SceneEnv
from infra.fleet.tasks import task

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """One episode to run: the task, the seed of everything random in it, and a label kept in `Episode.extra`.

    `perturbation` is the standard deviation of AR(1) noise added to the policy's actions (play).
    """

    task: str
    seed: int
    kind: str = ""
    perturbation: float = 0.0


@dataclass
class _Running:
    """One scene and the episode under way in it."""

    env: SceneEnv
    job: Job
    operator: Operator | None
    rng: np.random.Generator
    observations: list[Floats]
    disturbance: npt.NDArray[np.float64]
    started_at: float
    shield: Shield
    clock: Clock
    timestamps: list[float]
    chunk: Floats | None = None
    cursor: int = 0
    driven: bool = False  # by the operator
    actions: list[Floats] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    intervention: list[bool] = field(default_factory=list)


def run_jobs(
    policy: ActionPolicy | None,
    jobs: Iterable[Job],
    *,
    source: Source,
    envs: int = 8,
    execute: int | None = None,
    operator: Callable[[], Operator] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    again: Callable[[Job, Episode], Job | None] | None = None,
    robot_id: str = "sim",
    limits: Limits | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Episode]:
    """Run every job to its end; episodes in the order of the jobs. See `iterate_jobs` for the arguments."""
    done: dict[int, Episode] = {}
    for index, episode in iterate_jobs(
        policy,
        jobs,
        source=source,
        envs=envs,
        execute=execute,
        operator=operator,
        again=again,
        robot_id=robot_id,
        limits=limits,
        stop=stop,
    ):
        done[index] = episode
        if on_episode is not None:
            on_episode(episode)
    return [done[index] for index in sorted(done)]


def iterate_jobs(
    policy: ActionPolicy | None,
    jobs: Iterable[Job],
    *,
    source: Source,
    envs: int = 8,
    execute: int | None = None,
    operator: Callable[[], Operator] | None = None,
    again: Callable[[Job, Episode], Job | None] | None = None,
    robot_id: str = "sim",
    limits: Limits | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, Episode]]:
    """Run jobs and yield (index of the job, episode) as each ends.

    Args:
        policy: acts while no operator does; None only with an operator that is in control from the start.
        source: the episodes' source. Demonstrations are not flagged as interventions, other operators' segments are.
        envs: scenes stepped side by side.
        execute: actions of a chunk executed before replanning; all of them without it.
        operator: makes one operator for each scene; asked before every control step, in control until the end.
        again: asked at the end of each episode; a job that it returns is run in the place of the one that ended, whose
            episode is dropped.
        limits: of the shield that every action passes; without them the action's limits alone. Its counts are
            `extra["safety"]` of the episode.
        stop: asked between control steps; True ends the run, dropping unfinished episodes.

    Raises:
        ConfigError: unknown task; `execute` not in 1..H; no policy although nobody else acts.
    """
    execute = _check(policy, execute, operator)
    waiting = iter(enumerate(jobs))
    running: dict[int, _Running] = {}
    scenes: list[SceneEnv] = []
    try:
        while True:
            while len(running) < envs and (item := next(waiting, None)) is not None:
                index, job = item
                scene = scenes.pop() if scenes else SceneEnv()
                running[index] = _start(scene, job, operator, limits)
            if not running or (stop is not None and stop()):
                return
            replanning = [run for run in running.values() if _needs_plan(run, execute)]
            if replanning:
                _replan(policy, replanning)
            for index, run in list(running.items()):
                outcome = _step(run)
                if outcome is None:
                    continue
                episode = _finish(run, outcome, policy, source, robot_id)
                retry = again(run.job, episode) if again is not None else None
                if retry is not None:
                    running[index] = _start(run.env, retry, operator, limits)
                    continue
                del running[index]
                scenes.append(run.env)
                yield index, episode
    finally:
        for scene in [*scenes, *(run.env for run in running.values())]:
            scene.close()


def generator(job: Job) -> np.random.Generator:
    """The generator of everything random in the job's episode that the scene itself does not draw."""
    return np.random.default_rng([job.seed, 1])


def shield_counts(shield: Shield) -> dict[str, dict[str, int]]:
    """What the shield altered, for the episode's `extra`: `safety` of the policy's actions, `operator_safety` of the
    operator's; each only where there was something."""
    both = (("safety", shield.counts), ("operator_safety", shield.operator_counts))
    return {name: dict(sorted(counts.items())) for name, counts in both if counts}


def _check(policy: ActionPolicy | None, execute: int | None, operator: Callable[[], Operator] | None) -> int:
    if policy is None:
        if operator is None or not isinstance(operator(), ExpertOperator):
            raise ConfigError("rollouts without a policy need someone who acts from the start", "give a policy")
        return 1
    if execute is None:
        return policy.horizon
    if not 1 <= execute <= policy.horizon:
        raise ConfigError(
            f"execute={execute} actions of a chunk of {policy.horizon}", f"set execute within 1..{policy.horizon}"
        )
    return execute


def _start(scene: SceneEnv, job: Job, operator: Callable[[], Operator] | None, limits: Limits | None) -> _Running:
    task(job.task)
    observation, _ = scene.reset(seed=job.seed, options={"task": job.task})
    rng = generator(job)
    watcher = operator() if operator is not None else None
    if watcher is not None:
        watcher.reset(scene, np.random.default_rng([job.seed, 2]))
    clock = Clock(lambda: scene.time)
    shield = Shield(limits or Limits.box(ACTION_DIM))
    disturbance = np.zeros(ACTION_DIM)
    return _Running(scene, job, watcher, rng, [observation], disturbance, time.time(), shield, clock, [clock.stamp()])


def _needs_plan(run: _Running, execute: int) -> bool:
    if run.operator is not None and not run.driven:
        run.driven = run.operator.observe(run.env, run.env.steps)
    if run.driven:
        return False
    return run.chunk is None or run.cursor >= execute


def _replan(policy: ActionPolicy | None, runs: list[_Running]) -> None:
    assert policy is not None  # _check
    observations = np.stack([run.observations[-1] for run in runs])
    noise = np.stack([run.rng.standard_normal((policy.horizon, ACTION_DIM), np.float32) for run in runs])
    try:
        with np.errstate(all="ignore"):  # what is not finite, the shield finds
            chunks = policy.act(observations, [run.env.instruction for run in runs], noise.copy())
            # Copies: a policy may fill the same array again before these are executed.
            made = [np.array(chunk, np.float32) for chunk in chunks]
    except LwdError:
        raise
    except Exception as error:
        raise CorruptDataError(
            f"policy {policy.version}: inference raised {summary(error)}", "look at the policy's bundle"
        ) from error
    shape = getattr(chunks, "shape", None)
    if shape != noise.shape:
        raise ConfigError(f"the policy gave actions {shape}, not {noise.shape}", "use a policy of this fleet")
    for run, chunk in zip(runs, made, strict=True):
        run.chunk, run.cursor = chunk, 0


def _step(run: _Running) -> Outcome | None:
    if run.driven:
        assert run.operator is not None
        proposed = run.operator.act(run.env)
    else:
        assert run.chunk is not None  # _needs_plan
        proposed = run.chunk[run.cursor]
        run.cursor += 1
        if run.job.perturbation:
            drawn = run.rng.standard_normal(ACTION_DIM) * run.job.perturbation
            run.disturbance = NOISE_CORRELATION * run.disturbance + np.sqrt(1 - NOISE_CORRELATION**2) * drawn
            proposed = proposed + run.disturbance.astype(np.float32)
    action = run.shield.apply(proposed, position=run.env.effector, operator=run.driven)  # recorded as executed
    observation, reward, terminated, truncated, info = run.env.step(action)
    run.observations.append(observation)
    run.timestamps.append(run.clock.stamp())
    run.actions.append(action)
    run.rewards.append(reward)
    run.intervention.append(run.driven)
    if terminated:
        return "success" if info["success"] else "failure"
    return "time_limit" if truncated else None


def _finish(run: _Running, outcome: Outcome, policy: ActionPolicy | None, source: Source, robot_id: str) -> Episode:
    flagged = np.array(run.intervention, bool) & (source != "demo")
    extra: dict[str, Any] = {"seed": run.job.seed}
    if run.job.kind:
        extra["kind"] = run.job.kind
    if run.job.perturbation:
        extra["perturbation"] = run.job.perturbation
    if flagged.any():
        extra["takeover_step"] = int(flagged.argmax())
    extra |= shield_counts(run.shield)
    return Episode(
        episode_id=new_episode_id(),
        robot_id=robot_id,
        task=run.job.task,
        instruction=run.env.instruction,
        source=source,
        outcome=outcome,
        policy_version=policy.version if policy is not None else None,
        observations=np.stack(run.observations),
        actions=np.stack(run.actions),
        rewards=np.array(run.rewards, np.float32),
        intervention=flagged,
        timestamps=np.array(run.timestamps),
        substep_scores=run.env.substep_scores,
        started_at=run.started_at,
        extra=extra,
    )
