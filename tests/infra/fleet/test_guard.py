"""The robot guards itself: faulty policies end in the last good one, faulty parts cost an attempt, time is measured."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from deployment import Deployment

from data_contracts.checks import check_episode, default_contract
from infra.catalog import schema
from infra.edge.inference import load_policy
from infra.episode import Episode
from infra.errors import ConfigError, LwdError, UnavailableError
from infra.fleet import robot as robot_module
from infra.fleet.operator import TakeoverOperator
from infra.fleet.robot import MAX_FAILURES, Robot, RobotConfig
from infra.fleet.rollout import Job, run_jobs
from infra.fleet.scene import CONTROL_PERIOD, SceneEnv
from infra.policy.keys import load_signer
from infra.policy.registry import Registry
from infra.settings import Settings, load_settings
from lwd_model.evaluation import result_of

SHIELD = "data_contracts.shield:default_shield"
FOREVER = threading.Event()


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment(tmp_path)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path, poll_s=0.01)


def make(settings: Settings, make_env: Callable[[], SceneEnv] = SceneEnv, **fields: Any) -> Robot:
    given = {"robot_id": "r0", "tasks": ("S1",), "drain_s": 0.0, "episodes": 1, "shield": SHIELD} | fields
    return Robot(RobotConfig(**given), settings, threading.Event(), make_env)


class Faulty:
    """A policy that does a good one's work until its third plan."""

    def __init__(self, policy: Any, fault: Callable[[np.ndarray], Any]) -> None:
        self.policy, self.fault, self.plans = policy, fault, 0
        self.horizon, self.version = policy.horizon, policy.version

    def act(self, observations: np.ndarray, instructions: Sequence[str], noise: np.ndarray) -> Any:
        self.plans += 1
        actions = self.policy.act(observations, instructions, noise)
        return self.fault(actions) if self.plans >= 3 else actions


def _raise(error: BaseException) -> Callable[[np.ndarray], Any]:
    def fail(actions: np.ndarray) -> Any:
        raise error

    return fail


def _some(value: float) -> Callable[[np.ndarray], Any]:
    def change(actions: np.ndarray) -> np.ndarray:
        actions[0, -1, -1] = value
        return actions

    return change


FAULTS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "one NaN": (_some(np.nan), "non_finite"),
    "a wrong shape": (lambda actions: actions[:, :, :4], "malformed"),
    "texts": (lambda actions: [[["a"] * 5] * 5], "malformed"),
    "KeyError": (_raise(KeyError("x")), "fault"),
    "MemoryError": (_raise(MemoryError()), "fault"),
    "hangs": (lambda actions: FOREVER.wait(), "late"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_policy_that_fails_at_work_ends_in_the_last_good_one(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    act, kind = FAULTS[fault]

    def load(bundle: Path, version: int, embodiment: Any) -> Any:
        policy = load_policy(bundle, version, embodiment)
        return Faulty(policy, act) if version == 2 else policy

    monkeypatch.setattr(robot_module, "load_policy", load)
    deployment.publish()
    make(settings).run()
    deployment.publish(seed=1)
    options = {"patience": 2.0} if fault == "hangs" else {}
    make(settings, episodes=3, **options).run()
    make(settings, episodes=4).run()  # a restart runs the good one at once: no crash loop
    deployment.publish(seed=2)
    make(settings, episodes=5).run()  # a newer one is tried
    deployment.coordinate()
    episodes = deployment.episodes()
    assert [episode.policy_version for episode in episodes] == [1, 2, 1, 1, 3]
    bad = episodes[1]
    assert bad.outcome == "failure" and bad.extra["safety"][kind] >= 1 and bad.extra["policy_fault"]
    assert not bad.actions[-1].any()  # the hold
    for episode in episodes:
        assert [one for one in check_episode(default_contract(), episode) if one.severity == "block"] == []
    assert result_of(bad).safety[kind] >= 1 and result_of(episodes[2]).safety == {}
    details = _details(deployment)
    assert [refusal["version"] for refusal in details["refusals"]] == [2] and details["refusals"][0]["reason"]


def test_an_answer_to_an_earlier_episode_is_never_executed(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator takes over while an inference is late: the episode ends with its question open."""
    go, asked = threading.Event(), []

    class Slow:
        def __init__(self, policy: Any) -> None:
            self.policy, self.horizon, self.version = policy, policy.horizon, policy.version

        def act(self, observations: np.ndarray, instructions: Sequence[str], noise: np.ndarray) -> Any:
            asked.append(observations[0].copy())
            if len(asked) == 1:
                go.wait()
                return np.ones_like(noise)
            return np.zeros_like(noise)

    class Next(TakeoverOperator):
        def observe(self, env: Any, t: int) -> bool:
            go.set() if t == 3 else None
            return len(asked) <= 1 and t >= 1 and (super().observe(env, env.task.limit) or True)

    monkeypatch.setattr(robot_module, "load_policy", lambda *a, **k: Slow(load_policy(*a, **k)))
    monkeypatch.setattr(robot_module, "TakeoverOperator", Next)
    deployment.publish()
    robot = make(settings, episodes=2, operator=1.0, patience=1.0)
    run = robot._attempt.run

    def then_free(*given: Any) -> Any:
        monkeypatch.setattr(robot._attempt, "patience", 1.0 if not asked else 1000.0)
        return run(*given)

    monkeypatch.setattr(robot._attempt, "run", then_free)
    robot.run()
    deployment.coordinate()
    first, second = deployment.episodes()
    assert first.extra["safety"] == {"late": 1} and first.intervention[1:].all()
    np.testing.assert_array_equal(asked[1], second.observations[0])
    assert not second.actions[0].any()


def test_a_policy_that_cannot_be_loaded_does_not_keep_the_robot_from_the_champion(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last good policy's permission ends while one that cannot be loaded is announced."""

    def load(bundle: Path, version: int, embodiment: Any) -> Any:
        if version == 3:
            raise ConfigError("of another arm", "export it again")
        return load_policy(bundle, version, embodiment)

    monkeypatch.setattr(robot_module, "load_policy", load)
    deployment.publish()
    Registry(deployment.plane.catalog, load_signer(deployment.home / "keys")).promote(1, {})
    deployment.publish(seed=1)
    robot = make(settings, episodes=None)
    run, versions = robot._attempt.run, []

    def then(inference: Any, *given: Any) -> Any:
        versions.append(inference.policy.version)
        if versions == [2]:
            deployment.publish(seed=2)
        if versions == [2, 2]:  # the permission of 2 ends, those of 1 and 3 are renewed
            state = robot.subscriber._state
            ended = [replace(g, until=0.0) if g.digest == state.active.digest else g for g in state.grants]
            robot.subscriber._state = replace(state, grants=tuple(ended))
        if len(versions) == 4:
            robot._stop.set()
        return run(inference, *given)

    monkeypatch.setattr(robot._attempt, "run", then)
    stopper = threading.Timer(30.0, robot._stop.set)
    stopper.start()
    robot.run()
    stopper.cancel()
    assert versions == [2, 2, 1, 1]
    details = _details(deployment)
    assert [refusal["version"] for refusal in details["refusals"]] == [3] and details["refused"] == "of another arm"


def test_a_rejected_policy_with_none_before_it_leaves_the_robot_still(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = load_policy

    def load(bundle: Path, version: int, embodiment: Any) -> Any:
        policy = good(bundle, version, embodiment)
        return Faulty(policy, _some(np.nan)) if version == 1 else policy

    monkeypatch.setattr(robot_module, "load_policy", load)
    deployment.publish()
    robot = make(settings, episodes=2)
    reject = robot.subscriber.reject

    def then_another(version: int, reason: str) -> Any:
        active = reject(version, reason)
        assert active is None
        deployment.publish(seed=1)
        return active

    monkeypatch.setattr(robot.subscriber, "reject", then_another)
    robot.run()
    deployment.coordinate()
    assert [episode.policy_version for episode in deployment.episodes()] == [1, 2]


def _details(deployment: Deployment) -> dict[str, Any]:
    with deployment.plane.catalog.read() as connection:
        return dict(connection.execute(sa.select(schema.robots)).one().details)


@pytest.mark.parametrize("change", [{"horizon": None}, {"width": -1}, {"instructions": ["make tea"]}, {"obs_dim": 84}])
def test_a_signed_policy_that_cannot_be_loaded_leaves_the_last_good_one_at_work(
    deployment: Deployment, settings: Settings, change: dict[str, Any]
) -> None:
    deployment.publish()
    make(settings).run()
    bundle = deployment.home / "export"
    document = json.loads((bundle / "architecture.json").read_text())
    document["policy"] |= change
    (bundle / "architecture.json").write_text(json.dumps(document))
    deployment.publisher.publish(bundle)
    make(settings, episodes=2).run()
    deployment.coordinate()
    assert [episode.policy_version for episode in deployment.episodes()] == [1, 1]
    assert [refusal["version"] for refusal in _details(deployment)["refusals"]] == [2]


def test_whatever_loading_raises_is_caught_and_named(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(bundle: Path, version: int, embodiment: Any) -> Any:
        if version == 2:
            raise MemoryError("x" * 10_000)
        return load_policy(bundle, version, embodiment)

    monkeypatch.setattr(robot_module, "load_policy", load)
    deployment.publish()
    make(settings).run()
    deployment.publish(seed=1)
    make(settings, episodes=2).run()
    deployment.coordinate()
    assert [episode.policy_version for episode in deployment.episodes()] == [1, 1]
    (refusal,) = _details(deployment)["refusals"]
    assert "MemoryError" in refusal["reason"] and len(refusal["reason"]) <= 300


class Breaking(SceneEnv):
    """A scene of which one part fails as often as it is told to."""

    left = 0
    part = ""
    error: BaseException = KeyError("x")

    def _maybe(self, part: str) -> None:
        if part == type(self).part and type(self).left > 0:
            type(self).left -= 1
            raise type(self).error

    def reset(self, **options: Any) -> Any:
        self._maybe("reset")
        return super().reset(**options)

    def step(self, action: np.ndarray) -> Any:
        if self.steps == 3:
            self._maybe("step")
        after, *others = super().step(action)
        if self.part == "sensor" and self.steps == 3 and type(self).left > 0:
            type(self).left -= 1
            after = np.full_like(after, np.nan)
        return (after, *others)


@pytest.mark.parametrize("part", ["reset", "step", "sensor", "operator"])
@pytest.mark.parametrize("times", [MAX_FAILURES - 1, MAX_FAILURES])
def test_what_a_part_raises_costs_an_attempt_until_it_is_too_often(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch, part: str, times: int
) -> None:
    deployment.publish()
    monkeypatch.setattr(Breaking, "part", part)
    monkeypatch.setattr(Breaking, "left", times)
    if part == "operator":
        observe = TakeoverOperator.observe

        def failing(self: TakeoverOperator, env: Any, t: int) -> bool:
            env._maybe("operator")
            return observe(self, env, t)

        monkeypatch.setattr(TakeoverOperator, "observe", failing)
    robot = make(settings, Breaking, operator=1.0)
    if times < MAX_FAILURES:
        assert robot.run() == 1
        deployment.coordinate()
        (episode,) = deployment.episodes()
        assert (episode.extra["number"], episode.policy_version) == (times, 1)  # a sensor's fault is no policy's
    else:
        with pytest.raises(UnavailableError, match=f"{MAX_FAILURES} attempts in a row"):
            robot.run()
    journal = settings.spool_dir / "r0" / "journal.jsonl"
    assert (journal.read_text().count("discarded") if journal.exists() else 0) == (0 if part == "reset" else times)


@pytest.mark.parametrize("times", [MAX_FAILURES - 2, MAX_FAILURES - 1])
def test_a_scene_that_cannot_be_made_anew_is_tried_again(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """After one attempt that failed: a camera that needs time to come back."""
    deployment.publish()
    monkeypatch.setattr(Breaking, "part", "step")
    monkeypatch.setattr(Breaking, "left", 1)
    made: list[int] = []

    def make_env() -> SceneEnv:
        made.append(1)
        if 1 < len(made) <= 1 + times:
            raise OSError(5, "no camera")
        return Breaking()

    robot = make(settings, make_env)
    if times < MAX_FAILURES - 1:
        assert robot.run() == 1
    else:
        with pytest.raises(UnavailableError, match=rf"{MAX_FAILURES} attempts in a row.*no camera"):
            robot.run()


@pytest.mark.parametrize(("call", "error"), [("announcements", TypeError("x")), ("heartbeat", KeyError("x")),
                                             ("fetch", ValueError("x")), ("measure", MemoryError())])  # fmt: skip
def test_what_the_contact_raises_leaves_the_robot_at_work(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    deployment.publish()
    make(settings).run()
    deployment.publish(seed=1)
    robot = make(settings, episodes=3)

    def fail(*given: object) -> Any:
        raise error

    monkeypatch.setattr(robot._server, call, fail)
    assert robot.run() == 3


def test_simulated_time_is_the_simulators_and_paced_time_is_measured(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment.publish()
    make(settings).run()
    make(settings, episodes=2, pace=20.0).run()
    deployment.coordinate()
    simulated, paced = deployment.episodes()
    np.testing.assert_allclose(np.diff(simulated.timestamps), CONTROL_PERIOD)
    assert simulated.timestamps[0] == paced.timestamps[0] == 0 and (np.diff(paced.timestamps) > 0).all()
    assert not np.allclose(np.diff(paced.timestamps), CONTROL_PERIOD, atol=1e-6)
    assert paced.timestamps[-1] >= paced.steps * CONTROL_PERIOD  # never faster than the pace
    assert np.diff(paced.timestamps).min() >= 0.5 * CONTROL_PERIOD  # the last step takes its period as well


class Wild:
    """A policy beyond every limit, and now and then no number at all."""

    horizon, version = 5, 7

    def act(self, observations: np.ndarray, instructions: Sequence[str], noise: np.ndarray) -> np.ndarray:
        actions = 4 * noise
        actions[:, 2, 0] = np.nan
        return actions


def test_rollouts_pass_the_same_shield_and_tell_the_gate() -> None:
    (episode,) = run_jobs(Wild(), [Job("S1", 1)], source="rollout")
    assert np.abs(episode.actions).max() <= 1 and np.isfinite(episode.actions).all()
    assert not episode.actions[2::5].any()
    safety = result_of(episode).safety
    assert safety["non_finite"] == episode.steps // 5 and safety["clamped"] > episode.steps / 2


def test_a_policy_that_fills_one_array_again_and_again_is_recorded_as_it_acted() -> None:
    """Scenes side by side replan at different steps, each from the array that the others' chunks lie in."""

    class Reusing:
        horizon, version = 5, 7
        answer = np.zeros((4, 5, 5), np.float32)

        def act(self, observations: np.ndarray, instructions: Sequence[str], noise: np.ndarray) -> np.ndarray:
            self.answer[: len(noise)] = np.tanh(noise)
            noise *= 0
            return self.answer[: len(noise)]

    jobs = [Job(("S1", "S2", "S3")[i % 3], i) for i in range(5)]
    together = run_jobs(Reusing(), jobs, source="rollout", envs=3, execute=4)
    alone = run_jobs(Reusing(), jobs, source="rollout", envs=1, execute=4)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)


@pytest.mark.parametrize("answer", [None, "x", [object()], [[[object()] * 5] * 5], np.zeros((1, 5, 5), object)])
def test_an_evaluated_policy_that_gives_no_numbers_ends_in_a_named_error(answer: Any) -> None:
    class Odd:
        horizon, version = 5, 7

        def act(self, observations: np.ndarray, instructions: Sequence[str], noise: np.ndarray) -> Any:
            if isinstance(answer, np.ndarray):
                answer[:] = {}
            return answer

    with pytest.raises(LwdError):
        run_jobs(Odd(), [Job("S1", 1)], source="rollout")


def test_a_scene_that_fills_one_array_again_and_again_is_recorded_as_it_was(
    deployment: Deployment, settings: Settings
) -> None:
    class Reusing(SceneEnv):
        def _kept(self, observation: np.ndarray) -> np.ndarray:
            self.kept = getattr(self, "kept", np.empty_like(observation))
            self.kept[:] = observation
            return self.kept

        def reset(self, **options: Any) -> Any:
            observation, info = super().reset(**options)
            return self._kept(observation), info

        def step(self, action: np.ndarray) -> Any:
            observation, *others = super().step(action)
            return (self._kept(observation), *others)

    deployment.publish()
    make(settings).run()
    make(settings, Reusing, robot_id="r1").run()
    deployment.coordinate()
    for episode in deployment.episodes():
        assert len(np.unique(episode.observations, axis=0)) == episode.steps + 1


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 99_999, b'{"started": 1e999, "closed": 0}', b"[]", b" " * 2**20])
def test_a_damaged_count_of_episodes_is_named(deployment: Deployment, settings: Settings, data: bytes) -> None:
    folder = settings.robots_dir / "r0"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"progress\.json"):
        make(settings)


@pytest.mark.parametrize("reported", [3, [1], "x", None, {"a": -5}, {"a": "1"}, {3: 1}, {"a": True}, {"a": 2**70}])
def test_a_report_of_safety_that_cannot_be_read_is_an_event(make_episode: Any, reported: Any) -> None:
    episode: Episode = make_episode()
    episode.extra["safety"] = reported
    episode.extra["seed"] = 1
    assert result_of(episode).safety == {"unreadable_safety": 1}


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"pace": float("nan")}, "pace"), ({"pace": -1.0}, "pace"), ({"patience": 0.0}, "patience"),
     ({"shield": "os:getcwd"}, "shield"), ({"shield": "nothing:here"}, "cannot load"),
     ({"shield": f"{__name__}:of_another_arm"}, "7-D"),
     ({"shield": f"{__name__}:of_a_faster_arm"}, "control period")],
)  # fmt: skip
def test_limits_that_the_robot_cannot_keep_to_are_named(settings: Settings, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make(settings, **fields)


def of_another_arm() -> dict[str, Any]:
    return {"action_dim": 7, "low": -1, "high": 1}


def of_a_faster_arm() -> dict[str, Any]:
    return {"action_dim": 5, "low": -1, "high": 1, "period_s": 0.01}
