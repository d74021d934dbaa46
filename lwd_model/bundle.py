"""A policy as files that a robot without torch can run: `policy.safetensors` and `architecture.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from infra.errors import ConfigError, CorruptDataError, DivergedError, StorageFullError
from lwd_model.config import PolicyConfig, from_dict, to_dict
from lwd_model.flow import euler
from lwd_model.networks import FlowPolicy
from lwd_model.normaliser import CLIP, Normaliser

WEIGHTS, ARCHITECTURE, FORMAT = "policy.safetensors", "architecture.json", 1
_TRIAL = 64  # instructions


def export_bundle(policy: FlowPolicy, normaliser: Normaliser, config: PolicyConfig, out_dir: Path) -> Path:
    """Write a policy's two files; the policy channel signs them later.

    Args:
        policy: the network to deploy, usually the agent's `deployed`.
        out_dir: made if absent; its two files are replaced.

    Returns:
        `out_dir`.

    Raises:
        DivergedError: a weight or an action of a trial is not finite; nothing was written.
        StorageFullError: the disk does not take the weights.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in policy.named_tensors().items()}
    tensors["observation.mean"] = torch.from_numpy(normaliser.mean.copy())
    tensors["observation.std"] = torch.from_numpy(normaliser.std.copy())
    _must_be_finite(policy, config, tensors)
    out_dir.mkdir(parents=True, exist_ok=True)
    architecture = {"format": FORMAT, "policy": to_dict(config), "normaliser": normaliser.digest}
    aside = out_dir / (WEIGHTS + ".part")
    try:
        save_file(tensors, aside)
    except SafetensorError as error:
        aside.unlink(missing_ok=True)
        raise StorageFullError(f"{aside} cannot be written ({error})", "free disk space, or see that disk") from error
    os.replace(aside, out_dir / WEIGHTS)
    (out_dir / ARCHITECTURE).write_text(json.dumps(architecture, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return out_dir


def _must_be_finite(policy: FlowPolicy, config: PolicyConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    fix = "publish nothing of this training; go back to a checkpoint before it"
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"{name} of the policy is not finite", fix)
    if (problem := actions_problem(policy, config)) is not None:
        raise DivergedError(problem, fix)


@torch.no_grad()
def actions_problem(policy: FlowPolicy, config: PolicyConfig) -> str | None:
    """What is wrong with a policy whose weights are finite and whose actions are not; None if it can act.

    The trial is that of a robot that loads it: an ordinary observation, and two at the ends of their range.
    """
    device, weights = policy.flat.device, policy.weights()
    tasks = torch.arange(min(len(config.instructions), _TRIAL), device=device)
    for sigma in (0.0, -CLIP, CLIP):  # standardised
        cache = policy.prefix(torch.full((len(tasks), config.obs_dim), sigma, device=device), tasks, weights)
        noise = torch.full((len(tasks), config.horizon, config.action_dim), float(np.sign(sigma)), device=device)
        action = euler(
            lambda x, w, cache=cache: policy.velocity(cache, x, w, weights),  # type: ignore[misc]
            noise * config.noise_scale,
            config.flow_steps,
        )
        if not bool(torch.isfinite(action).all()):
            where = "at the mean observation" if not sigma else f"{sigma:g} standard deviations from it"
            return f"the policy's action {where} is not finite"
    return None


def import_bundle(bundle_dir: Path) -> tuple[FlowPolicy, Normaliser, PolicyConfig]:
    """The inverse of `export_bundle`, for training on from a deployed policy.

    Raises:
        CorruptDataError: a file is missing or unreadable. ConfigError: of another format or architecture.
    """
    try:
        architecture = json.loads((bundle_dir / ARCHITECTURE).read_text())
        tensors = load_file(bundle_dir / WEIGHTS)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorruptDataError(f"policy bundle {bundle_dir} cannot be read ({error})", "export it again") from error
    except Exception as error:  # safetensors' own error type is not exported everywhere
        raise CorruptDataError(f"policy bundle {bundle_dir}: damaged weights ({error})", "export it again") from error
    if architecture.get("format") != FORMAT:
        raise ConfigError(
            f"policy bundle {bundle_dir} has format {architecture.get('format')!r}, not {FORMAT}",
            "export it again with this version",
        )
    config = from_dict(PolicyConfig, architecture["policy"], "architecture.json: policy")
    normaliser = Normaliser(tensors.pop("observation.mean").numpy(), tensors.pop("observation.std").numpy())
    policy = FlowPolicy(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != policy.shapes:
        wrong = sorted(name for name in shapes.keys() | policy.shapes if shapes.get(name) != policy.shapes.get(name))
        raise ConfigError(
            f"policy bundle {bundle_dir}: tensor {wrong[0]!r} does not fit its architecture.json", "export it again"
        )
    policy.load_named(tensors)
    return policy, normaliser, config
