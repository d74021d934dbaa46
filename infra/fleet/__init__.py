"""The robots that everyone can run: eight language-labelled tasks on OGBench's scene, experts, operators, sources.

`tasks` names the tasks and their sub-steps; `scene` simulates them; `features` says what the robot observes; `experts`
act from any state by sub-goals; `operator` takes over from a stalled policy; `rollout` runs many scenes with one
batched inference; `sources` collects demonstrations, rollouts and play in worker processes; `render` and `filmstrip`
make pictures; `robot` is the process on the robot.
"""

import os as _os
import sys as _sys

if _sys.platform.startswith("linux") and not _os.environ.get("DISPLAY"):
    # Read when mujoco is imported: without it every process looks for a screen. `render` brings its own OpenGL.
    _os.environ.setdefault("MUJOCO_GL", "disable")
