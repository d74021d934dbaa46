"""The scene: faithful to OGBench's physics, deterministic, and strict about its inputs."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from ogbench.manipspace.envs.scene_env import SceneEnv as OGBenchScene

from infra.errors import ConfigError, UnavailableError
from infra.fleet.features import COARSE, FEATURES, FINE, RAW_DIM
from infra.fleet.filmstrip import render_episode
from infra.fleet.scene import SceneEnv
from infra.fleet.tasks import LOCKED, MARK, TASKS, UNLOCKED


@pytest.fixture(scope="module")
def env() -> SceneEnv:
    return SceneEnv()


def actions(seed: int, steps: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 5)).astype(np.float32)


def roll(env: SceneEnv, task: str, seed: int, steps: int = 25) -> np.ndarray:
    rows = [env.reset(seed=seed, options={"task": task})[0]]
    rows += [env.step(action)[0] for action in actions(seed, steps)]
    return np.stack(rows)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_and_actions_give_the_same_episode_in_a_new_and_in_a_used_scene(env: SceneEnv, task: str) -> None:
    first = roll(env, task, 3)
    np.random.seed(int(first[0, 0] * 1e6) % 1000)  # noqa: NPY002  (the global generator must not matter)
    roll(env, "L4" if task != "L4" else "S1", 4)
    np.testing.assert_array_equal(first, roll(env, task, 3))
    np.testing.assert_array_equal(first, roll(SceneEnv(), task, 3))
    assert not np.array_equal(first[0], roll(env, task, 5, 0)[0])


def test_one_step_is_ogbench_s_step(env: SceneEnv) -> None:
    """Same state, same actions, same controls: the state stays within solver tolerance of OGBench's own step."""
    theirs = OGBenchScene(env_type="scene", mode="data_collection")
    theirs.reset(seed=0)
    for seed in range(3):
        observation, _ = env.reset(seed=seed, options={"task": "L1"})
        theirs.reset(seed=seed)
        theirs.set_state(env._data.qpos, env._data.qvel, np.array([LOCKED, LOCKED]))
        np.testing.assert_allclose(observation[:RAW_DIM], theirs.compute_observation(), atol=2e-5)
        for action in actions(seed, 15):
            observation, *_ = env.step(action)
            expected, *_ = theirs.step(action)
            np.testing.assert_allclose(observation[:RAW_DIM], expected, atol=2e-3)


def test_a_reset_compiles_nothing(env: SceneEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OGBenchScene, "compile_model_and_data", lambda self: pytest.fail("compiled"))
    SceneEnv().reset(seed=0)
    env.reset(seed=0)


@pytest.mark.parametrize("task", TASKS)
def test_starts_are_random_within_the_task_s_ranges_and_not_yet_solved(env: SceneEnv, task: str) -> None:
    start = TASKS[task].start
    cubes = []
    for seed in range(12):
        env.reset(seed=seed, options={"task": task})
        facts = env.facts
        assert start.drawer[0] <= facts.drawer <= start.drawer[1] and start.window[0] <= facts.window <= start.window[1]
        assert start.drawer_lock in (None, facts.drawer_lock) and start.window_lock in (None, facts.window_lock)
        assert np.linalg.norm(facts.cube[:2] - MARK[:2]) >= start.off_mark
        assert env.substep_scores == (0.0,) * len(env.substeps)
        assert not env.step(np.zeros(5, np.float32))[2]
        cubes.append(facts.cube)
    assert np.ptp(np.stack(cubes), axis=0)[:2].min() > 0.05


def test_a_locked_slide_resists_and_an_unlocked_one_yields(env: SceneEnv) -> None:
    moved = {}
    for lock in (LOCKED, UNLOCKED):
        env.reset(seed=0, options={"task": "L1"})
        env._buttons[0] = lock
        env._set_locks()
        dof = env._t.dof["drawer_slide"]
        before = env.facts.drawer
        for _ in range(10):
            env._data.qfrc_applied[dof] = 20.0
            env.step(np.zeros(5, np.float32))
        moved[lock] = abs(env.facts.drawer - before)
        env._data.qfrc_applied[dof] = 0.0
    assert moved[LOCKED] < 1e-3 < 0.05 < moved[UNLOCKED]


def test_the_limit_truncates_and_success_terminates_with_reward_one(env: SceneEnv) -> None:
    env.reset(seed=1, options={"task": "S1"})
    flags = [env.step(np.zeros(5, np.float32))[1:4] for _ in range(TASKS["S1"].limit)]
    assert flags[-1] == (0.0, False, True) and all(flag == (0.0, False, False) for flag in flags[:-1])
    env.reset(seed=1, options={"task": "S1"})
    env._data.qpos[env._t.qpos["drawer_slide"]] = -0.15
    *_, reward, terminated, truncated, info = env.step(np.zeros(5, np.float32))
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert env.substep_scores == (1.0,)


def test_a_lost_cube_ends_the_episode_without_reward(env: SceneEnv) -> None:
    env.reset(seed=0, options={"task": "S3"})
    at = env._t.qpos["object_joint_0"]
    env._data.qpos[at : at + 3] = (2.0, 0.0, 0.5)
    _, reward, terminated, _, info = env.step(np.zeros(5, np.float32))
    assert terminated and reward == 0.0 and "cube" in info["failure"]


def test_the_observation_is_named_finite_and_relative(env: SceneEnv) -> None:
    observation, _ = env.reset(seed=2, options={"task": "S3"})
    named = dict(zip(env.features, observation, strict=True))
    assert len(set(FEATURES)) == len(FEATURES) == env.observation_space.shape[0]
    assert observation.dtype == np.float32 and np.isfinite(observation).all()
    for i, axis in enumerate("xyz"):
        difference = env.cube[i] - env.effector[i]
        assert named[f"effector_to_cube_{axis}_10cm"] == pytest.approx(np.tanh(difference / COARSE), abs=1e-6)
        assert named[f"effector_to_cube_{axis}_2cm"] == pytest.approx(np.tanh(difference / FINE), abs=1e-6)
        assert named[f"cube_to_mark_{axis}_2cm"] == pytest.approx(np.tanh((MARK[i] - env.cube[i]) / FINE), abs=1e-6)
    turn = 4 * (env.info["privileged/block_0_yaw"][0] - env.info["proprio/effector_yaw"][0])
    assert named["grasp_yaw_cos4"] == pytest.approx(np.cos(turn), abs=1e-5)
    drawer_open = env._t.drawer_depth + np.array([0.33, -0.08, 0.08])  # the centre when the drawer is open
    np.testing.assert_allclose(drawer_open, (0.33, -0.24, 0.066), atol=1e-9)


@pytest.mark.parametrize("bad", [np.zeros(4), np.full(5, np.nan), np.zeros((1, 5)), np.array([0, 0, 0, 0, np.inf])])
def test_bad_actions_are_refused(env: SceneEnv, bad: np.ndarray) -> None:
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="action"):
        env.step(bad)


def test_actions_out_of_range_are_clipped(env: SceneEnv) -> None:
    env.reset(seed=0, options={"task": "S1"})
    far = env.step(np.full(5, 7.0, np.float32))[0]
    env.reset(seed=0, options={"task": "S1"})
    np.testing.assert_array_equal(far, env.step(np.ones(5, np.float32))[0])


def test_an_unknown_task_is_named_beside_the_known_ones(env: SceneEnv) -> None:
    with pytest.raises(ConfigError, match=r"(?s)'S9'.*S1, S2.*L4"):
        env.reset(seed=0, options={"task": "S9"})


def test_the_scene_passes_gymnasium_s_checker() -> None:
    check_env(SceneEnv("S1"), skip_render_check=True)


def test_filmstrips_show_the_episode_or_say_what_is_missing() -> None:
    moves = actions(0, 10)
    try:
        frames = render_episode("S1", 0, moves, 3, 48, 64)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert frames.shape == (3, 48, 64, 3) and frames.dtype == np.uint8
    assert frames[0].std() > 10 and not np.array_equal(frames[0], frames[-1])
    np.testing.assert_array_equal(frames[[0, 2]], render_episode("S1", 0, moves, [0, 10], 48, 64))


def test_rendering_without_opengl_says_what_to_install(env: SceneEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gl(*_: object) -> None:
        raise ImportError("no libEGL")

    env.reset(seed=0)
    env.close()
    monkeypatch.setattr(mujoco, "Renderer", no_gl)
    with pytest.raises(UnavailableError, match="libegl1"):
        env.render_frame(32, 32)
