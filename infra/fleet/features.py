"""What the robot observes: OGBench's 40 scaled readings and the relative features of this embodiment.

Differences of positions pass through tanh at 10 cm and at 2 cm: the coarse one steers, the fine one grasps and hooks.
The goal is not in here, except that the mark is a fixed place in the room.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from infra.fleet.tasks import MARK

Array = npt.NDArray[np.float64]

CENTRE = np.array([0.425, 0.0, 0.0])  # OGBench's centring and scales (SceneEnv.compute_observation)
POSITION_SCALE, GRIPPER_SCALE, BUTTON_SCALE, DRAWER_SCALE, WINDOW_SCALE = 10.0, 3.0, 120.0, 18.0, 15.0
COARSE, FINE = 0.10, 0.02  # metres

_XYZ = ("x", "y", "z")
_RAW = (
    *(f"joint_pos_{i}" for i in range(6)),
    *(f"joint_vel_{i}" for i in range(6)),
    *(f"effector_{c}" for c in _XYZ),
    "effector_yaw_cos",
    "effector_yaw_sin",
    "gripper_opening",
    "gripper_contact",
    *(f"cube_{c}" for c in _XYZ),
    *(f"cube_quat_{c}" for c in "wxyz"),
    "cube_yaw_cos",
    "cube_yaw_sin",
    *(f"button{i}_{name}" for i in (0, 1) for name in ("locked", "unlocked", "pos", "vel")),
    "drawer_pos",
    "drawer_vel",
    "window_pos",
    "window_vel",
)
_PAIRS = (
    "effector_to_cube",
    "effector_to_drawer_handle",
    "effector_to_window_handle",
    "effector_to_button0",
    "effector_to_button1",
    "cube_to_mark",
    "cube_to_drawer",
)
FEATURES: tuple[str, ...] = (
    *_RAW,
    *(f"{pair}_{c}_{scale}" for scale in ("10cm", "2cm") for pair in _PAIRS for c in _XYZ),
    "grasp_yaw_cos4",
    "grasp_yaw_sin4",
    "hook_yaw_cos2",
    "hook_yaw_sin2",
)
RAW_DIM = len(_RAW)
_MARK = np.asarray(MARK)


def yaw_of_quat(quat: Array) -> float:
    """Yaw in radians of a wxyz unit quaternion."""
    w, x, y, z = quat
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def observe(
    *,
    joint_pos: Array,
    joint_vel: Array,
    effector: Array,
    effector_yaw: float,
    gripper_opening: float,
    gripper_contact: float,
    cube: Array,
    cube_quat: Array,
    button_states: tuple[int, int],
    button_pos: tuple[float, float],
    button_vel: tuple[float, float],
    button_tops: Array,
    drawer: tuple[float, float],
    drawer_handle: Array,
    drawer_centre: Array,
    window: tuple[float, float],
    window_handle: Array,
    handle_yaw: float,
) -> npt.NDArray[np.float32]:
    """The observation (D,) float32, in the order of `FEATURES`.

    Args:
        joint_pos, joint_vel: (6,) radians and radians per second.
        effector, cube, drawer_handle, drawer_centre, window_handle: (3,) metres; button_tops: (2, 3) metres.
        effector_yaw, handle_yaw: radians; cube_quat: (4,) wxyz.
        gripper_opening, gripper_contact: in [0, 1].
        drawer, window: position in metres and velocity; button_pos in metres and button_vel likewise.
    """
    out = np.empty(len(FEATURES))
    out[0:6] = joint_pos
    out[6:12] = joint_vel
    out[12:15] = (effector - CENTRE) * POSITION_SCALE
    out[15], out[16] = np.cos(effector_yaw), np.sin(effector_yaw)
    out[17], out[18] = gripper_opening * GRIPPER_SCALE, gripper_contact
    out[19:22] = (cube - CENTRE) * POSITION_SCALE
    out[22:26] = cube_quat
    cube_yaw = yaw_of_quat(cube_quat)
    out[26], out[27] = np.cos(cube_yaw), np.sin(cube_yaw)
    for i in (0, 1):
        state = button_states[i]
        out[28 + 4 * i : 32 + 4 * i] = (1 - state, state, button_pos[i] * BUTTON_SCALE, button_vel[i])
    out[36:40] = (drawer[0] * DRAWER_SCALE, drawer[1], window[0] * WINDOW_SCALE, window[1])

    delta = np.empty((7, 3))
    delta[0] = cube - effector
    delta[1] = drawer_handle - effector
    delta[2] = window_handle - effector
    delta[3:5] = button_tops - effector
    delta[5] = _MARK - cube
    delta[6] = drawer_centre - cube
    flat = delta.ravel()
    out[40:61] = np.tanh(flat / COARSE)
    out[61:82] = np.tanh(flat / FINE)
    grasp = 4 * (cube_yaw - effector_yaw)  # a cube looks the same every quarter turn, a handle every half
    hook = 2 * (handle_yaw - effector_yaw)
    out[82:86] = (np.cos(grasp), np.sin(grasp), np.cos(hook), np.sin(hook))
    return out.astype(np.float32)
