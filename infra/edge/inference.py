"""A flow policy on a robot: numpy and safetensors only, no training code.

Reads the two files of a policy bundle and integrates the same flow as the learner's network, to 1e-4 of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from infra.errors import ConfigError, CorruptDataError

Array = npt.NDArray[np.float32]
FORMAT = 1
CLIP = 10.0  # of the standardised observations, as in training
EPSILON = 1e-5  # of LayerNorm


class NumpyFlowPolicy:
    """A deployed policy: `act(observations, instructions, noise) -> action chunks`.

    Attributes:
        horizon: H, actions in a chunk. action_dim: A. obs_dim: D.
        version: of the policy, as its manifest says; None outside the policy channel.
        instructions: the sentences it knows.
    """

    def __init__(self, architecture: dict[str, Any], tensors: dict[str, Array], version: int | None = None) -> None:
        self.version = version
        try:
            self.horizon, self.action_dim = int(architecture["horizon"]), int(architecture["action_dim"])
            self.obs_dim, self.blocks = int(architecture["obs_dim"]), int(architecture["blocks"])
            self.flow_steps, self.kind = int(architecture["flow_steps"]), str(architecture["kind"])
            self.noise_scale = float(architecture["noise_scale"])
            self.instructions: tuple[str, ...] = tuple(architecture["instructions"])
            self._mean, self._std = tensors["observation.mean"], tensors["observation.std"]
            self._state = _pair(tensors, "state")
            self._task, self._action = tensors["task.embedding"], tensors["action.weight"].T
            layers = [f"block{i}" for i in range(self.blocks)]
            self._in = [_pair(tensors, f"{name}.in") for name in layers]
            self._out = [tensors[f"{name}.out.weight"].T for name in layers] if self.kind == "residual" else []
            self._head = _pair(tensors, "head")
            time = tensors["time.weight"]
        except KeyError as error:
            raise ConfigError(f"the policy bundle lacks {error}", "export the policy again with this version") from None
        chunk = self.horizon * self.action_dim
        expected = {"observation.mean": (self.obs_dim,), "action.weight": (time.shape[0], chunk)}
        expected["task.embedding"] = (len(self.instructions), time.shape[0])
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise ConfigError(
                    f"the policy bundle's {name} has shape {tensors[name].shape}, its architecture says {shape}",
                    "export the policy again; weights and architecture are of different policies",
                )
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


def load_policy(bundle_dir: str | Path, version: int | None = None) -> NumpyFlowPolicy:
    """Read a policy bundle.

    Args:
        bundle_dir: holds `policy.safetensors` and `architecture.json`; verify its signature before.
        version: what to report as the policy's version.

    Raises:
        CorruptDataError: a file is missing, truncated or not finite. ConfigError: of another format or architecture.
    """
    folder = Path(bundle_dir)
    try:
        architecture = json.loads((folder / "architecture.json").read_text())
        tensors = load_file(folder / "policy.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptDataError(
            f"policy bundle {folder} cannot be read ({error})", "fetch it again, or keep the last known good policy"
        ) from error
    if not isinstance(architecture, dict) or architecture.get("format") != FORMAT:
        raise ConfigError(f"policy bundle {folder} is not of format {FORMAT}", "update the robot's client")
    if bad := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise CorruptDataError(
            f"policy bundle {folder}: {bad[0]} is not finite", "do not deploy it; look at its training"
        )
    return NumpyFlowPolicy(architecture["policy"], tensors, version)


def _pair(tensors: dict[str, Array], name: str) -> tuple[Array, Array]:
    return tensors[f"{name}.weight"].T, tensors[f"{name}.bias"]


def _norm(h: Array) -> Array:
    centred = h - h.mean(-1, keepdims=True)
    variance = np.einsum("ij,ij->i", centred, centred) / np.float32(h.shape[-1])
    centred *= (1.0 / np.sqrt(variance + np.float32(EPSILON)))[:, None]
    return centred


def _silu(u: Array) -> Array:
    return np.divide(u, np.float32(1.0) + np.exp(-u), dtype=np.float32)
