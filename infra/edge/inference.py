"""A flow policy on a robot: numpy only, no training code.

Reads the two files of a policy bundle and integrates the same flow as the learner's network, to 1e-4 of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infra.edge.bundle import MAX_WORK, Architecture, read_architecture, read_tensors
from infra.errors import ConfigError, CorruptDataError

Array = npt.NDArray[np.float32]
CLIP = 10.0  # of the standardised observations, as in training
EPSILON = 1e-5  # of LayerNorm
_TRIAL = 64  # instructions tried when a policy is loaded


@dataclass(frozen=True)
class Embodiment:
    """What a policy must fit: D observation and A action dimensions, and the sentences that it will be given."""

    obs_dim: int
    action_dim: int
    instructions: tuple[str, ...] = ()


class NumpyFlowPolicy:
    """A deployed policy: `act(observations, instructions, noise) -> action chunks`.

    Attributes:
        horizon: H, actions in a chunk. action_dim: A. obs_dim: D.
        version: of the policy, as its manifest says; None outside the policy channel.
        instructions: the sentences it knows.
    """

    def __init__(self, architecture: Architecture, tensors: Mapping[str, Array], version: int | None = None) -> None:
        self.version = version
        self.horizon, self.action_dim = architecture.horizon, architecture.action_dim
        self.obs_dim, self.blocks = architecture.obs_dim, architecture.blocks
        self.flow_steps, self.kind = architecture.flow_steps, architecture.kind
        self.noise_scale = architecture.noise_scale
        self.instructions = architecture.instructions
        self._mean, self._std = tensors["observation.mean"], tensors["observation.std"]
        self._state = _pair(tensors, "state")
        self._task, self._action = tensors["task.embedding"], tensors["action.weight"].T
        layers = [f"block{i}" for i in range(self.blocks)]
        self._in = [_pair(tensors, f"{name}.in") for name in layers]
        self._out = [tensors[f"{name}.out.weight"].T for name in layers] if self.kind == "residual" else []
        self._head = _pair(tensors, "head")
        time = tensors["time.weight"]
        frequencies = np.logspace(np.log10(np.pi / 2), np.log10(32 * np.pi), time.shape[1] // 2)
        angle = np.arange(self.flow_steps)[:, None] / self.flow_steps * frequencies
        self._times = (np.concatenate([np.sin(angle), np.cos(angle)], -1) @ time.T).astype(np.float32)
        self._index = {instruction: i for i, instruction in enumerate(self.instructions)}

    def act(self, observations: Array, instructions: Sequence[str], noise: Array) -> Array:
        """Integrate the flow by Euler's method from the given noise.

        Args:
            observations: (B, D), raw. instructions: B sentences. noise: (B, H, A) standard normal.

        Returns:
            (B, H, A) float32 in [-1, 1].

        Raises:
            ConfigError: an unknown instruction, or arrays of a wrong shape.
        """
        batch = len(instructions)
        if observations.shape != (batch, self.obs_dim) or noise.shape != (batch, self.horizon, self.action_dim):
            raise ConfigError(
                f"observations {observations.shape} and noise {noise.shape} do not fit {batch} instructions and a "
                f"policy of {self.obs_dim}-D observations and {self.horizon}×{self.action_dim} actions",
                "run the policy on the embodiment that it was trained for",
            )
        try:
            task = [self._index[instruction] for instruction in instructions]
        except KeyError as error:
            known = "; ".join(self.instructions)
            raise ConfigError(f"the policy does not know the instruction {error}", f"use one of: {known}") from None
        z = np.clip((observations - self._mean) / self._std, -CLIP, CLIP).astype(np.float32)
        cache = z @ self._state[0] + self._state[1] + self._task[task]
        x = np.asarray(noise, np.float32).reshape(batch, -1) * np.float32(self.noise_scale)
        step = np.float32(1.0 / self.flow_steps)
        with np.errstate(over="ignore"):  # exp(-u) of a very negative u is inf, and silu 0, as it should be
            for time in self._times:
                x = x + step * self._velocity(cache + time, x)
        return np.clip(x, -1.0, 1.0).reshape(noise.shape)

    def _velocity(self, base: Array, x: Array) -> Array:
        h = base + x @ self._action
        for i, (weight, bias) in enumerate(self._in):
            if self.kind == "residual":
                h += _silu(_norm(h) @ weight + bias) @ self._out[i]
            else:
                h = _norm(_silu((_silu(h) if i == 0 else h) @ weight + bias))
        return _norm(h) @ self._head[0] + self._head[1]


def load_policy(
    bundle_dir: str | Path, version: int | None = None, embodiment: Embodiment | None = None
) -> NumpyFlowPolicy:
    """Read a policy bundle, and try the policy on made-up observations: what cannot run is refused here.

    Args:
        bundle_dir: holds `policy.safetensors` and `architecture.json`; verify its signature before.
        version: what to report as the policy's version.
        embodiment: what it is to run on, where that is known.

    Raises:
        CorruptDataError: a file is missing, truncated or not finite, or actions are not. ConfigError: of another
            format, architecture or embodiment, or something that this version does not know.
    """
    folder = Path(bundle_dir)
    architecture = read_architecture(folder)
    if embodiment is not None:
        _fits(architecture, embodiment, folder)
    tensors = read_tensors(folder, architecture.shapes)
    if not (tensors["observation.std"] > 0).all():
        raise CorruptDataError(
            f"policy bundle {folder}: observation.std is not positive", "do not deploy it; export it again"
        )
    policy = NumpyFlowPolicy(architecture, tensors, version)
    tried = min(_TRIAL, max(1, MAX_WORK // architecture.work))
    _try(policy, tensors["observation.mean"], tensors["observation.std"], folder, architecture.instructions[:tried])
    return policy


def _fits(architecture: Architecture, embodiment: Embodiment, folder: Path) -> None:
    found = (architecture.obs_dim, architecture.action_dim)
    if found != (embodiment.obs_dim, embodiment.action_dim):
        raise ConfigError(
            f"policy bundle {folder} is of {found[0]}-D observations and {found[1]}-D actions, this robot of "
            f"{embodiment.obs_dim}-D and {embodiment.action_dim}-D",
            "run the policy on the embodiment that it was trained for",
        )
    if unknown := [one for one in embodiment.instructions if one not in architecture.instructions]:
        raise ConfigError(
            f"policy bundle {folder} does not know the instruction {unknown[0]!r}",
            "train it with this robot's tasks, or give the robot others",
        )


def _try(policy: NumpyFlowPolicy, mean: Array, std: Array, folder: Path, instructions: Sequence[str]) -> None:
    """One inference each on an ordinary observation and on two at the ends of their range."""
    shape = (len(instructions), policy.horizon, policy.action_dim)
    with np.errstate(all="ignore"):
        for sigma in (0.0, -CLIP, CLIP):
            observation = np.clip(mean + sigma * std, np.finfo(np.float32).min, np.finfo(np.float32).max)
            noise = np.full(shape, np.sign(sigma), np.float32)
            chunks = policy.act(np.tile(observation.astype(np.float32), (len(instructions), 1)), instructions, noise)
            if chunks.shape != shape or not np.isfinite(chunks).all():
                raise CorruptDataError(
                    f"policy bundle {folder}: its actions for an observation {sigma:g} standard deviations from the "
                    "mean are not finite",
                    "do not deploy it; look at its training",
                )


def _pair(tensors: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    return tensors[f"{name}.weight"].T, tensors[f"{name}.bias"]


def _norm(h: Array) -> Array:
    centred = h - h.mean(-1, keepdims=True)
    variance = np.einsum("ij,ij->i", centred, centred) / np.float32(h.shape[-1])
    centred *= (1.0 / np.sqrt(variance + np.float32(EPSILON)))[:, None]
    return centred


def _silu(u: Array) -> Array:
    return np.divide(u, np.float32(1.0) + np.exp(-u), dtype=np.float32)
