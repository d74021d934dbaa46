"""A policy as files that a robot without torch can run: `policy.safetensors` and `architecture.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from infra.errors import ConfigError, CorruptDataError, DivergedError
from lwd_model.config import PolicyConfig, from_dict, to_dict
from lwd_model.flow import euler
from lwd_model.networks import FlowPolicy
from lwd_model.normaliser import Normaliser

WEIGHTS, ARCHITECTURE, FORMAT = "policy.safetensors", "architecture.json", 1


def export_bundle(policy: FlowPolicy, normaliser: Normaliser, config: PolicyConfig, out_dir: Path) -> Path:
    """Write a policy's two files; the policy channel signs them later.

    Args:
        policy: the network to deploy, usually the agent's `deployed`.
        out_dir: made if absent; its two files are replaced.

    Returns:
        `out_dir`.

    Raises:
        DivergedError: a weight or an action of a trial is not finite; nothing was written.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in policy.named_tensors().items()}
    tensors["observation.mean"] = torch.from_numpy(normaliser.mean.copy())
    tensors["observation.std"] = torch.from_numpy(normaliser.std.copy())
    _must_be_finite(policy, config, tensors)
    out_dir.mkdir(parents=True, exist_ok=True)
    architecture = {"format": FORMAT, "policy": to_dict(config), "normaliser": normaliser.digest}
    aside = out_dir / (WEIGHTS + ".part")
    save_file(tensors, aside)
    os.replace(aside, out_dir / WEIGHTS)
    (out_dir / ARCHITECTURE).write_text(json.dumps(architecture, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return out_dir


@torch.no_grad()
def _must_be_finite(policy: FlowPolicy, config: PolicyConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    fix = "publish nothing of this training; go back to a checkpoint before it"
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"{name} of the policy is not finite", fix)
    device, weights = policy.flat.device, policy.weights()
    obs = torch.zeros(1, config.obs_dim, device=device)  # the mean observation, standardised
    cache = policy.prefix(obs, torch.zeros(1, dtype=torch.int64, device=device), weights)
    noise = torch.zeros(1, config.horizon, config.action_dim, device=device)
    action = euler(lambda x, w: policy.velocity(cache, x, w, weights), noise, config.flow_steps)
    if not bool(torch.isfinite(action).all()):
        raise DivergedError("the policy's action at the mean observation is not finite", fix)


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
