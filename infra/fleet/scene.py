"""The robot's scene: OGBench's `scene-v0` physics with the project's tasks, observation and sub-step scores.

The compiled model, its constants and its gains come from OGBench; the control step is OGBench's too (0.05 s of 0.002 s
physics, differential inverse kinematics), written without the bookkeeping that a robot does not need: goals are not
simulated at reset, the model is compiled once a process and copied, names are resolved once. The tests hold it to
OGBench's own step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import numpy.typing as npt
from ogbench.manipspace.envs.scene_env import SceneEnv as OGBenchScene

from infra.errors import ConfigError
from infra.fleet import features
from infra.fleet.render import Camera
from infra.fleet.tasks import LOCKED, MARK, Facts, Scorer, TaskSpec, achieved, task

Array = npt.NDArray[np.float64]

CONTROL_PERIOD = 0.05  # seconds
ACTION_DIM = 5
_DAMPING = (1e6, 2.0)  # of a locked and of an unlocked slide (OGBench's `_apply_button_states`)
_PRESSED = -0.02  # metres: a button toggles when pushed past this
_LOST = 0.2  # metres outside the workspace: the cube is lost


class _Template:
    """One compiled scene a process: the model that every `SceneEnv` copies, ids, constants, inverse kinematics."""

    def __init__(self) -> None:
        scene = OGBenchScene(env_type="scene", mode="data_collection")
        scene.reset(seed=0)
        self.model: mujoco.MjModel = scene._model
        self.ik_model: mujoco.MjModel = scene._ik._model
        self.ik_site = int(scene._ik._site_ids[0])
        self.colors = scene._colors
        model = self.model
        self.arm = slice(0, 6)
        assert list(scene._arm_joint_ids) == list(range(6)) and list(scene._arm_actuator_ids) == list(range(6))
        self.gripper_actuator = int(scene._gripper_actuator_ids[0])
        self.gripper = int(model.jnt_qposadr[scene._gripper_opening_joint_id])
        self.pinch = int(scene._pinch_site_id)
        self.pad = model.body("ur5e/robotiq/right_pad").id
        self.pinch_to_attach = scene._T_pa.translation().copy()
        self.pinch_to_attach_quat = scene._T_pa.rotation().wxyz.copy()
        self.home = scene._home_qpos.copy()
        self.action_scale = scene.action_high.copy()
        self.workspace = scene._workspace_bounds.copy()
        self.arm_bounds = np.array([[0.25, -0.2, 0.20], [0.6, 0.2, 0.35]])
        joint = {name: model.joint(name).id for name in (
            "object_joint_0", "buttonbox_joint_0", "buttonbox_joint_1", "drawer_slide", "window_slide")}  # fmt: skip
        self.qpos = {name: int(model.jnt_qposadr[i]) for name, i in joint.items()}
        self.dof = {name: int(model.jnt_dofadr[i]) for name, i in joint.items()}
        self.drawer_handle = model.site("drawer_handle_center").id
        self.window_handle = model.site("window_handle_center").id
        self.buttons = np.array([model.site(f"btntop_{i}").id for i in (0, 1)])
        self.button_geoms = [ids for group in scene._button_geom_ids_list for ids in group]
        self.handle_materials = [model.material(f"{name}_handle").id for name in ("drawer", "window")]
        self.mark_mocap = int(scene._cube_target_mocap_ids[0])
        self.mark_geoms = list(scene._cube_target_geom_ids_list[0])
        model.geom_rgba[self.mark_geoms, 3] = 0.2  # the mark is seen in pictures
        data = scene._data
        matrix = data.site_xmat[self.drawer_handle].reshape(3, 3)
        self.drawer_yaw = float(np.arctan2(matrix[1, 0], matrix[0, 0]))
        matrix = data.site_xmat[self.window_handle].reshape(3, 3)
        self.window_yaw = float(np.arctan2(matrix[1, 0], matrix[0, 0]))
        self.drawer_depth = np.array([0.33, -0.24, 0.066]) - np.array([0.33, -0.08, 0.08])  # handle to centre
        self.steps = round(CONTROL_PERIOD / model.opt.timestep)


@functools.cache
def _template() -> _Template:
    return _Template()


class SceneEnv(gym.Env[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
    """A UR5e with a cube, a drawer, a window and their two lock buttons; one task an episode.

    Observation: (D,) float32 in the order of `features`. Action: (5,) in [-1, 1]: effector translation (x, y, z, at
    most 5 cm), yaw (0.3 rad), gripper (positive closes). The reward is 1 on success, which terminates; the task's limit
    truncates; a cube flung out of the workspace terminates without reward (`info["failure"]` says so).
    The same seed and actions give the same episode, bit for bit, in a new scene or a used one.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 (Gymnasium's own name)

    def __init__(self, default_task: str = "S1") -> None:
        self._t = _template()
        self._model: mujoco.MjModel = copy.copy(self._t.model)
        self._data = mujoco.MjData(self._model)
        self._ik = mujoco.MjData(self._t.ik_model)
        self._jac = np.empty((6, 6))
        self._err = np.empty(6)
        self._camera: Camera | None = None
        self.spec_task: TaskSpec = task(default_task)
        self._steps = 0
        self._buttons = [LOCKED, LOCKED]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (len(self.features),), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    # -- what the episode's record needs ---------------------------------------------------------

    @property
    def task(self) -> TaskSpec:
        return self.spec_task

    @property
    def instruction(self) -> str:
        return self.spec_task.instruction

    @property
    def substeps(self) -> tuple[str, ...]:
        return self.spec_task.substeps

    @property
    def substep_scores(self) -> tuple[float, ...]:
        """The scores so far, one of 1, 0.5 and 0 for each sub-step."""
        return self._scorer.scores

    @property
    def progress(self) -> int:
        """How often a sub-step's condition has begun to hold."""
        return self._scorer.progress

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the observation's entries."""
        return features.FEATURES

    @property
    def steps(self) -> int:
        """Control steps since the reset."""
        return self._steps

    @property
    def time(self) -> float:
        """Seconds of simulated time since the reset: the physics' own clock."""
        return float(self._data.time)

    @property
    def arm_bounds(self) -> Array:
        """(2, 3) metres: where free effector positions are drawn from."""
        return self._t.arm_bounds

    # -- Gymnasium -------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start an episode of `options["task"]` (the last one's task without it).

        Raises:
            ConfigError: unknown task.
        """
        super().reset(seed=seed)
        if options and "task" in options:
            self.spec_task = task(options["task"])
        t, start, draw, data = self._t, self.spec_task.start, self.np_random, self._data
        mujoco.mj_resetData(self._model, data)
        effector = draw.uniform(*t.arm_bounds)
        data.qpos[t.arm] = self._solve_ik(effector, float(draw.uniform(-np.pi, np.pi)), t.home)
        cube = np.array([0.0, 0.0, 0.02])
        while True:
            cube[:2] = draw.uniform(start.cube_low, start.cube_high)
            if np.linalg.norm(cube[:2] - MARK[:2]) >= start.off_mark:
                break
        yaw = draw.uniform(0, 2 * np.pi)
        at = t.qpos["object_joint_0"]
        data.qpos[at : at + 3] = cube
        data.qpos[at + 3 : at + 7] = (np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2))
        drawn = draw.integers(0, 2, size=2)
        locks = (start.drawer_lock, start.window_lock)
        self._buttons = [int(drawn[i]) if lock is None else lock for i, lock in enumerate(locks)]
        self._set_locks()
        data.qpos[t.qpos["drawer_slide"]] = draw.uniform(*start.drawer)
        data.qpos[t.qpos["window_slide"]] = draw.uniform(*start.window)
        data.mocap_pos[t.mark_mocap] = MARK
        data.mocap_quat[t.mark_mocap] = (1.0, 0.0, 0.0, 0.0)
        mujoco.mj_forward(self._model, data)
        self._steps = 0
        self._scorer = Scorer(self.spec_task, self._facts())
        return self._observe(), {"success": False, "failure": None}

    def step(
        self, action: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Simulate 0.05 s. Actions beyond [-1, 1] are clipped.

        Raises:
            ConfigError: the action has another shape or is not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ConfigError(
                f"the scene's action has shape {action.shape} or is not finite", f"give ({ACTION_DIM},) finite numbers"
            )
        t, data = self._t, self._data
        self._control(np.clip(action, -1.0, 1.0))
        before = self._button_pos()
        mujoco.mj_step(self._model, data, nstep=t.steps)
        mujoco.mj_rnePostConstraint(self._model, data)  # contact forces: the gripper feels the cube
        mujoco.mj_kinematics(self._model, data)  # places of the state after the last physics step
        after = self._button_pos()
        toggled = False
        for i in (0, 1):
            if before[i] > _PRESSED >= after[i]:
                self._buttons[i] = 1 - self._buttons[i]
                toggled = True
        if toggled:
            self._set_locks()
        self._steps += 1
        facts = self._facts()
        self._scorer.update(facts)
        success = achieved(self.spec_task.goal, facts)
        lost = bool(np.any(facts.cube <= t.workspace[0] - _LOST) or np.any(facts.cube >= t.workspace[1] + _LOST))
        lost = lost or not np.isfinite(facts.cube).all()
        failure = "the cube left the workspace" if lost and not success else None
        truncated = self._steps >= self.spec_task.limit and not (success or lost)
        return self._observe(), float(success), success or lost, truncated, {"success": success, "failure": failure}

    def render_frame(self, height: int = 128, width: int = 128) -> npt.NDArray[np.uint8]:
        """A picture (height, width, 3) of the front camera.

        Raises:
            UnavailableError: no OpenGL on this machine; the message says what to install.
        """
        t = self._t
        red, white = t.colors["red"], t.colors["white"]
        for i in (0, 1):
            color = red if self._buttons[i] == LOCKED else white
            self._model.geom_rgba[t.button_geoms[i]] = color
            self._model.mat_rgba[t.handle_materials[i]] = color
        if self._camera is None or self._camera.size != (height, width):
            self.close()
            self._camera = Camera(self._model, height, width)
        return self._camera.picture(self._data)

    def close(self) -> None:
        """Release the renderer."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    # -- what experts read -----------------------------------------------------------------------

    @property
    def info(self) -> dict[str, Any]:
        """The state under the names that OGBench's oracles read (`proprio/*`, `privileged/*`), without targets."""
        t, data = self._t, self._data
        at = t.qpos["object_joint_0"]
        quat = data.qpos[at + 3 : at + 7].copy()
        return {
            "proprio/effector_pos": self.effector,
            "proprio/effector_yaw": np.array([self._effector_yaw()]),
            "proprio/gripper_opening": np.array([self._gripper_opening()]),
            "proprio/gripper_contact": np.array([self._gripper_contact()]),
            "privileged/block_0_pos": self.cube,
            "privileged/block_0_quat": quat,
            "privileged/block_0_yaw": np.array([features.yaw_of_quat(quat)]),
            "privileged/button_0_state": self._buttons[0],
            "privileged/button_1_state": self._buttons[1],
            "privileged/drawer_pos": np.array([data.qpos[t.qpos["drawer_slide"]]]),
            "privileged/drawer_handle_pos": data.site_xpos[t.drawer_handle].copy(),
            "privileged/drawer_handle_yaw": np.array([t.drawer_yaw]),
            "privileged/window_pos": np.array([data.qpos[t.qpos["window_slide"]]]),
            "privileged/window_handle_pos": data.site_xpos[t.window_handle].copy(),
            "privileged/window_handle_yaw": np.array([t.window_yaw]),
        }

    @property
    def effector(self) -> Array:
        """(3,) metres: the point between the fingers."""
        return self._data.site_xpos[self._t.pinch].copy()

    @property
    def cube(self) -> Array:
        """(3,) metres: the cube's centre."""
        at = self._t.qpos["object_joint_0"]
        return self._data.qpos[at : at + 3].copy()

    @property
    def facts(self) -> Facts:
        """What goals and sub-steps are judged by."""
        return self._facts()

    def button_top(self, button: int) -> Array:
        """(3,) metres: the top of a button."""
        return self._data.site_xpos[self._t.buttons[button]].copy()

    # -- internals -------------------------------------------------------------------------------

    def _button_pos(self) -> tuple[float, float]:
        at, qpos = self._t.qpos, self._data.qpos
        return float(qpos[at["buttonbox_joint_0"]]), float(qpos[at["buttonbox_joint_1"]])

    def _set_locks(self) -> None:
        for name, state in zip(("drawer_slide", "window_slide"), self._buttons, strict=True):
            self._model.dof_damping[self._t.dof[name]] = _DAMPING[state]

    def _effector_yaw(self) -> float:
        matrix = self._data.site_xmat[self._t.pinch]
        return float(np.arctan2(matrix[3], matrix[0]))

    def _gripper_opening(self) -> float:
        return min(max(float(self._data.qpos[self._t.gripper]) / 0.8, 0.0), 1.0)

    def _gripper_contact(self) -> float:
        force = self._data.cfrc_ext[self._t.pad]
        return min(float(np.sqrt(force @ force)) / 50, 1.0)

    def _control(self, action: Array) -> None:
        """OGBench's `set_control`: a relative effector pose, through inverse kinematics, to joint targets."""
        t, data = self._t, self._data
        delta = action * t.action_scale
        position = np.clip(data.site_xpos[t.pinch] + delta[:3], t.workspace[0], t.workspace[1])
        data.ctrl[t.arm] = self._solve_ik(position, self._effector_yaw() + delta[3], data.qpos[t.arm])
        data.ctrl[t.gripper_actuator] = 255.0 * min(max(self._gripper_opening() + delta[4], 0.0), 1.0)

    def _solve_ik(self, position: Array, yaw: float, current: Array) -> Array:
        """Joint angles (6,) that put the fingers at `position`, pointing down, turned by `yaw` (DiffIKController)."""
        t, ik, model = self._t, self._ik, self._t.ik_model
        pinch = np.array([0.0, np.cos(yaw / 2), np.sin(yaw / 2), 0.0])  # Rz(yaw) then half a turn about x
        quat, target, inverse, site = np.empty(4), np.empty(3), np.empty(4), np.empty(4)
        mujoco.mju_mulQuat(quat, pinch, t.pinch_to_attach_quat)
        mujoco.mju_rotVecQuat(target, t.pinch_to_attach, pinch)
        target += position
        ik.qpos[:] = current
        err = self._err
        for _ in range(20):
            mujoco.mj_kinematics(model, ik)
            mujoco.mj_comPos(model, ik)
            err[:3] = target - ik.site_xpos[t.ik_site]
            mujoco.mju_mat2Quat(site, ik.site_xmat[t.ik_site])
            mujoco.mju_negQuat(inverse, site)
            mujoco.mju_mulQuat(site, quat, inverse)
            mujoco.mju_quat2Vel(err[3:], site, 1.0)
            if err[:3] @ err[:3] <= 1e-8 and err[3:] @ err[3:] <= 1e-8:
                break
            mujoco.mj_jacSite(model, ik, self._jac[:3], self._jac[3:], t.ik_site)
            gram = self._jac @ self._jac.T
            gram.flat[::7] += 1e-12
            update = self._jac.T @ np.linalg.solve(gram, err)
            largest = np.abs(update).max()
            if largest > np.pi / 4:
                update *= np.pi / 4 / largest
            ik.qpos[:] += update
        return ik.qpos.copy()

    def _facts(self) -> Facts:
        t, data = self._t, self._data
        cube = self.cube
        handle = float(data.site_xpos[t.drawer_handle][1])
        over = 0.21 <= cube[0] <= 0.45 and handle - 0.27 <= cube[1] <= handle - 0.07  # OGBench's `_is_in_drawer`
        return Facts(
            cube=cube,
            drawer=float(data.qpos[t.qpos["drawer_slide"]]),
            window=float(data.qpos[t.qpos["window_slide"]]),
            drawer_lock=self._buttons[0],
            window_lock=self._buttons[1],
            cube_in_drawer=bool(over and 0.0 <= cube[2] <= 0.15),
            cube_over_drawer=bool(over),
            cube_released=self._gripper_contact() < 0.1,
        )

    def _observe(self) -> npt.NDArray[np.float32]:
        t, data = self._t, self._data
        qpos, qvel = data.qpos, data.qvel
        at, dof = t.qpos, t.dof
        cube = at["object_joint_0"]
        handle = data.site_xpos[t.drawer_handle]
        return features.observe(
            joint_pos=qpos[t.arm],
            joint_vel=qvel[t.arm],
            effector=data.site_xpos[t.pinch],
            effector_yaw=self._effector_yaw(),
            gripper_opening=self._gripper_opening(),
            gripper_contact=self._gripper_contact(),
            cube=qpos[cube : cube + 3],
            cube_quat=qpos[cube + 3 : cube + 7],
            button_states=(self._buttons[0], self._buttons[1]),
            button_pos=self._button_pos(),
            button_vel=(qvel[dof["buttonbox_joint_0"]], qvel[dof["buttonbox_joint_1"]]),
            button_tops=data.site_xpos[t.buttons],
            drawer=(qpos[at["drawer_slide"]], qvel[dof["drawer_slide"]]),
            drawer_handle=handle,
            drawer_centre=handle + t.drawer_depth,
            window=(qpos[at["window_slide"]], qvel[dof["window_slide"]]),
            window_handle=data.site_xpos[t.window_handle],
            handle_yaw=t.drawer_yaw,
        )
