"""Cheap pictures of a scene: no shadows, reflections or multisampling; OpenGL in software where there is no screen."""

from __future__ import annotations

import os

import mujoco
import numpy as np
import numpy.typing as npt
from mujoco.rendering.classic import gl_context

from infra.errors import UnavailableError

_FIX = (
    "on a machine without a screen install Mesa's software renderer (Debian: apt-get install libegl1 libgl1-mesa-dri); "
    "collecting, learning and evaluating need no pictures"
)


class Camera:
    """Renders one model at one size from the scene's front camera.

    Raises:
        UnavailableError: no working OpenGL.
    """

    def __init__(self, model: mujoco.MjModel, height: int, width: int, name: str = "front") -> None:
        self.size = (height, width)
        self._name = name
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        try:
            if os.environ.get("MUJOCO_GL") == "disable":  # set by the package where there is no screen
                from mujoco.egl import GLContext

                gl_context.GLContext = GLContext  # what mujoco.Renderer asks for
            self._renderer = mujoco.Renderer(model, height, width)
        except Exception as error:  # PyOpenGL, GLFW and MuJoCo each raise their own kinds
            raise UnavailableError(f"MuJoCo cannot render here ({type(error).__name__}: {error})", _FIX) from error

    def picture(self, data: mujoco.MjData) -> npt.NDArray[np.uint8]:
        """(height, width, 3) uint8."""
        self._renderer.update_scene(data, camera=self._name)
        flags = self._renderer.scene.flags  # set anew by every update_scene
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return self._renderer.render()

    def close(self) -> None:
        """Release the OpenGL context."""
        self._renderer.close()
