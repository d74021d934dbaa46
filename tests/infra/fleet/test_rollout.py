"""Rollouts, operators and sources: batched inference, seeded episodes, flags, retries, processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np
import pytest

from infra.episode import Episode, decode, encode
from infra.errors import ConfigError, UnavailableError
from infra.fleet import sources
from infra.fleet.operator import ExpertOperator, TakeoverOperator
from infra.fleet.rollout import Job, run_jobs
from infra.fleet.scene import SceneEnv
from infra.fleet.tasks import TASKS


class Reaching:
    """A policy that waves its hand: a linear map of the observation, the instruction's length and the noise."""

    horizon, version = 5, 7

    def __init__(self) -> None:
        self.batches: list[int] = []

    def act(self, observations: np.ndarray, instructions: Sequence[str], noise: np.ndarray) -> np.ndarray:
        assert observations.dtype == noise.dtype == np.float32 and noise.shape == (len(observations), 5, 5)
        assert len(instructions) == len(observations) and set(instructions) <= {t.instruction for t in TASKS.values()}
        self.batches.append(len(observations))
        lengths = np.array([len(text) for text in instructions], np.float32)[:, None, None]
        return np.clip(2 * noise + observations[:, None, 40:45] + 0.01 * lengths, -1, 1).astype(np.float32)


class Idle(Reaching):
    """A policy that stalls at once."""

    def act(self, observations: np.ndarray, instructions: Sequence[str], noise: np.ndarray) -> np.ndarray:
        return np.zeros_like(noise)


def same(a: Episode, b: Episode) -> bool:
    return (
        np.array_equal(a.observations, b.observations)
        and np.array_equal(a.actions, b.actions)
        and np.array_equal(a.intervention, b.intervention)
        and (a.outcome, a.substep_scores, a.extra) == (b.outcome, b.substep_scores, b.extra)
    )


def test_episodes_do_not_depend_on_the_number_of_scenes() -> None:
    jobs = [Job("S1", 1), Job("S2", 2, perturbation=0.5), Job("S1", 4), Job("S1", 1)]
    policy = Reaching()
    alone = run_jobs(policy, jobs, source="rollout", envs=1)
    assert set(policy.batches) == {1}
    together = run_jobs(policy, jobs, source="rollout", envs=3)
    assert max(policy.batches) == 3
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert same(alone[0], alone[3]) and not same(alone[0], alone[2])
    assert alone[0].episode_id != alone[3].episode_id


def test_episodes_have_the_recorded_shape() -> None:
    seen: list[Episode] = []
    (episode,) = run_jobs(Reaching(), [Job("S4", 5, "x")], source="rollout", on_episode=seen.append)
    assert seen == [episode]
    steps = episode.steps
    assert steps == TASKS["S4"].limit and episode.outcome == "time_limit" and episode.rewards.sum() == 0
    assert episode.observations.shape == (steps + 1, len(SceneEnv().features))
    np.testing.assert_allclose(np.diff(episode.timestamps), 0.05)
    assert episode.policy_version == 7 and episode.extra == {"seed": 5, "kind": "x"}
    assert not episode.intervention.any() and len(episode.substep_scores) == 2
    assert decode(encode(episode)).meta() == episode.meta()


def test_executing_fewer_actions_replans_more_often() -> None:
    calls = {}
    for execute in (1, 5):
        policy = Reaching()
        run_jobs(policy, [Job("S1", 1)], source="rollout", execute=execute)
        calls[execute] = len(policy.batches)
    assert calls == {1: TASKS["S1"].limit, 5: TASKS["S1"].limit // 5}


@pytest.mark.parametrize("execute", [0, 6])
def test_an_impossible_execute_is_refused(execute: int) -> None:
    with pytest.raises(ConfigError, match="execute"):
        run_jobs(Reaching(), [Job("S1", 1)], source="rollout", execute=execute)


def test_unknown_tasks_and_missing_actors_are_refused() -> None:
    with pytest.raises(ConfigError, match="'S7'"):
        run_jobs(Reaching(), [Job("S7", 1)], source="rollout")
    with pytest.raises(ConfigError, match="'S7'"):
        sources.job_list(["S7"], 1, 0, "demo")
    with pytest.raises(ConfigError, match="without a policy"):
        run_jobs(None, [Job("S1", 1)], source="rollout", operator=TakeoverOperator)


def test_the_operator_takes_over_a_stalled_rollout_and_keeps_control() -> None:
    (episode,) = run_jobs(
        Idle(), [Job("S4", 0)], source="online", operator=functools.partial(TakeoverOperator, stall=10)
    )
    start = episode.extra["takeover_step"]
    assert 10 <= start <= 20 and episode.success
    np.testing.assert_array_equal(episode.intervention, np.arange(episode.steps) >= start)
    assert not episode.actions[:start].any()
    assert episode.rewards[-1] == 1 and episode.rewards[:-1].sum() == 0


def test_the_operator_takes_over_when_time_runs_out_or_is_not_there() -> None:
    (late,) = run_jobs(
        Reaching(), [Job("S1", 1)], source="online", operator=functools.partial(TakeoverOperator, stall=999)
    )
    assert late.extra["takeover_step"] == TASKS["S1"].limit // 2
    (absent,) = run_jobs(Reaching(), [Job("S1", 1)], source="online", operator=functools.partial(TakeoverOperator, 0.0))
    assert not absent.intervention.any()
    present = [
        episode.intervention.any()
        for episode in run_jobs(
            Idle(), [Job("S1", s) for s in range(8)], source="online", operator=functools.partial(TakeoverOperator, 0.5)
        )
    ]
    assert 0 < sum(present) < 8


def test_play_is_the_policy_then_a_flagged_recovery() -> None:
    episodes = list(sources.play(Reaching(), ["S1", "S3"], 3, seed=0, workers=0))
    assert {episode.source for episode in episodes} == {"play"}
    perturbed = [episode for episode in episodes if "perturbation" in episode.extra]
    assert 0 < len(perturbed) < len(episodes)
    for episode in episodes:
        start, limit = episode.extra["takeover_step"], TASKS[episode.task].limit
        assert 0.25 * limit <= start <= 0.5 * limit + 1
        assert episode.intervention[start:].all() and not episode.intervention[:start].any()
        assert episode.policy_version == 7
    assert sum(episode.success for episode in episodes) >= 5


def test_demonstrations_are_successes_made_again_after_failures() -> None:
    """At this noise the expert fails many attempts: all that come back are successes."""
    episodes = list(sources.demonstrations(["S1"], 4, seed=1, noise=0.7, workers=0))
    assert len(episodes) == 4 and all(episode.success for episode in episodes)
    assert any("#" in episode.extra["kind"] for episode in episodes)
    assert not any(episode.intervention.any() for episode in episodes)
    assert {episode.policy_version for episode in episodes} == {None}


def test_a_hopeless_expert_is_given_up(make_episode) -> None:  # type: ignore[no-untyped-def]
    failed = make_episode(success=False)
    seeds, job = set(), Job("S1", 3, "demo")
    for _ in range(19):
        seeds.add(job.seed)
        again = sources._demonstrate_again(job, failed)
        assert again is not None
        job = again
    assert len(seeds) == 19
    with pytest.raises(ConfigError, match="noise"):
        sources._demonstrate_again(job, failed)


def test_job_lists_are_balanced_paired_and_apart() -> None:
    jobs = sources.job_list(["S1", "S3"], 50, 0, "evaluation")
    assert [job.task for job in jobs[:4]] == ["S1", "S3", "S1", "S3"]
    assert len({job.seed for job in jobs}) == 100
    assert sources.job_list(["S3"], 2, 0, "evaluation") == [jobs[1], jobs[3]]  # whatever other tasks run beside it
    others = {job.seed for stream in ("demo", "rollout", "play") for job in sources.job_list(["S1"], 50, 0, stream)}
    assert not others & {job.seed for job in jobs}


def test_worker_processes_give_the_same_episodes_as_this_one() -> None:
    def by_seed(workers: int) -> dict[int, Episode]:
        episodes = sources.demonstrations(["S1"], 3, seed=0, workers=workers, envs=2)
        return {episode.extra["seed"]: episode for episode in episodes}

    here, there = by_seed(0), by_seed(1)
    assert here.keys() == there.keys() and all(same(here[seed], there[seed]) for seed in here)


def _die() -> ExpertOperator:
    os._exit(3)


def test_a_dead_worker_is_reported() -> None:
    operator = functools.partial(_Lethal)
    with pytest.raises(UnavailableError, match="code 3"):
        list(sources.collect([Job("S1", 0)], None, source="demo", operator=operator, workers=1))


class _Lethal(ExpertOperator):
    """An operator that kills its process."""

    def reset(self, env: SceneEnv, rng: np.random.Generator) -> None:
        _die()
        super().reset(env, rng)


def test_a_policy_object_is_not_sent_to_processes() -> None:
    with pytest.raises(ConfigError, match="bundle"):
        next(sources.rollouts(Reaching(), ["S1"], 1, 0, workers=1))
