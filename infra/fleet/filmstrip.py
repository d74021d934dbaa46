"""Pictures of a recorded episode, made afterwards by simulating its actions again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from infra.fleet.scene import SceneEnv


def render_episode(
    task: str,
    seed: int,
    actions: npt.NDArray[np.float32],
    frames: int | Sequence[int] = 8,
    height: int = 128,
    width: int = 128,
) -> npt.NDArray[np.uint8]:
    """Pictures (n, height, width, 3) uint8 of the episode that `seed` and `actions` (T, 5) determine.

    Args:
        task, seed, actions: of the episode (`Episode.task`, `Episode.extra["seed"]`, `Episode.actions`).
        frames: how many, evenly spaced from the start to the end; or the steps, 0..T, to show.

    Raises:
        UnavailableError: no OpenGL on this machine.
        ConfigError: unknown task.
    """
    steps = np.linspace(0, len(actions), frames).round() if isinstance(frames, int) else np.asarray(frames)
    env = SceneEnv()
    try:
        env.reset(seed=seed, options={"task": task})
        pictures: dict[int, npt.NDArray[np.uint8]] = {}
        wanted = {int(step) for step in steps}
        for step in range(len(actions) + 1):
            if step in wanted:
                pictures[step] = env.render_frame(height, width)
            if step < len(actions):
                env.step(actions[step])
        return np.stack([pictures[int(step)] for step in steps])
    finally:
        env.close()
