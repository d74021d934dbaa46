"""Whether a policy can learn from an episode: looked at before any array of it enters a replay.

The contract says what is good data; this says what the learner's arithmetic takes. An episode that passes one and not
the other is withdrawn by whoever reads it, and named.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from infra.episode import Episode
from lwd_model.config import PolicyConfig


def refusal(episode: Episode, policy: PolicyConfig) -> tuple[str, str] | None:
    """Why the policy cannot learn from the episode: (kind, sentence); None if it can.

    The kind is a field or `instruction`: equal for all episodes that fail in one way, whoever sent them.
    """
    if not isinstance(episode.instruction, str) or episode.instruction not in policy.instructions:
        return "instruction", f"instruction {str(episode.instruction)[:80]!r} is unknown to the policy"
    steps = len(episode.actions) if isinstance(episode.actions, np.ndarray) and episode.actions.ndim else 0
    if steps == 0:
        return "actions", "it has no step"
    shapes = {
        "actions": (steps, policy.action_dim),
        "observations": (steps + 1, policy.obs_dim),
        "rewards": (steps,),
        "intervention": (steps,),
    }
    for name, shape in shapes.items():
        values = getattr(episode, name)
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        if not isinstance(values, np.ndarray) or values.shape != shape:
            return name, f"{name} is {found}, the policy takes {shape}"
        if values.dtype.kind not in ("b" if name == "intervention" else "fiu"):
            return name, f"{name} is {found}, not {'truth values' if name == 'intervention' else 'real numbers'}"
        if (place := _first_not_finite(values)) is not None:
            return name, f"{name}{place} is not finite as float32"
    return None


def _first_not_finite(values: npt.NDArray[Any]) -> list[int] | None:
    with np.errstate(over="ignore", invalid="ignore"):
        bad = ~np.isfinite(values.astype(np.float32, copy=False))
    return [int(i) for i in np.argwhere(bad)[0]] if bad.any() else None
