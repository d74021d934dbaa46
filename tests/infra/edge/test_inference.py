import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from infra.edge.inference import load_policy
from infra.errors import ConfigError, CorruptDataError
from lwd_model.bundle import export_bundle
from lwd_model.config import PolicyConfig
from lwd_model.networks import FlowPolicy
from lwd_model.normaliser import CLIP, Normaliser

D, A, H = 9, 3, 4
INSTRUCTIONS = ("open the drawer", "close the window")


def make(tmp_path, **options):
    config = PolicyConfig(D, A, H, INSTRUCTIONS, **({"width": 48, "blocks": 2} | options))
    policy = FlowPolicy(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.flat.add_(0.08 * torch.randn(policy.flat.shape, generator=torch.Generator().manual_seed(1)))
    rng = np.random.default_rng(0)
    stats = Normaliser(rng.normal(size=D).astype(np.float32), rng.uniform(0.1, 2, D).astype(np.float32))
    return policy, stats, export_bundle(policy, stats, config, tmp_path / "bundle")


def inputs(batch, seed=1):
    rng = np.random.default_rng(seed)
    observations = (3 * rng.normal(size=(batch, D))).astype(np.float32)
    instructions = [INSTRUCTIONS[i % 2] for i in range(batch)]
    return observations, instructions, rng.normal(size=(batch, H, A)).astype(np.float32)


@torch.no_grad()
def torch_actions(policy, stats, observations, instructions, noise):
    c = policy.config
    z = torch.from_numpy((observations - stats.mean) / stats.std).clamp(-CLIP, CLIP)
    cache = policy.prefix(z, torch.tensor([INSTRUCTIONS.index(i) for i in instructions]))
    x = c.noise_scale * torch.from_numpy(noise)
    for i in range(c.flow_steps):
        x = x + policy.velocity(cache, x, torch.tensor(i / c.flow_steps)) / c.flow_steps
    return x.clamp(-1, 1).numpy()


@pytest.mark.parametrize("options", [{}, {"kind": "plain"}, {"noise_scale": 0.5}, {"flow_steps": 3, "width": 256}])
@pytest.mark.parametrize("batch", [1, 17])
def test_numpy_equals_torch(tmp_path, options, batch):
    policy, stats, folder = make(tmp_path, **options)
    given = inputs(batch)
    actions = load_policy(folder).act(*given)
    expected = torch_actions(policy, stats, *given)
    assert actions.dtype == np.float32 and actions.shape == (batch, H, A)
    np.testing.assert_allclose(actions, expected, atol=1e-4)
    assert np.abs(expected).min() < 0.9  # not all at the clip


def test_actions_stay_within_limits(tmp_path):
    policy = load_policy(make(tmp_path)[2])
    observations, instructions, noise = inputs(8)
    assert np.abs(policy.act(observations, instructions, 50 * noise)).max() == 1.0


def test_noise_scale_is_deployments_alone(tmp_path):
    _, _, folder = make(tmp_path, noise_scale=0.0)
    observations, instructions, noise = inputs(3)
    policy = load_policy(folder, version=12)
    assert policy.version == 12 and policy.horizon == H
    np.testing.assert_array_equal(
        policy.act(observations, instructions, noise), policy.act(observations, instructions, -noise)
    )


def test_unknown_instruction_and_wrong_shapes_are_named(tmp_path):
    policy = load_policy(make(tmp_path)[2])
    observations, instructions, noise = inputs(2)
    with pytest.raises(ConfigError, match="make tea"):
        policy.act(observations, ["make tea", instructions[0]], noise)
    with pytest.raises(ConfigError, match=r"\(2, 8\)"):
        policy.act(observations[:, :8], instructions, noise)
    with pytest.raises(ConfigError, match=r"\(2, 4, 2\)"):
        policy.act(observations, instructions, noise[..., :2])


def test_damaged_bundles_are_refused(tmp_path):
    folder = make(tmp_path)[2]
    weights = folder / "policy.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptDataError, match="bundle"):
        load_policy(folder)
    weights.write_bytes(data)
    tensors = load_file(weights)
    save_file(tensors | {"head.bias": np.full_like(tensors["head.bias"], np.nan)}, weights)
    with pytest.raises(CorruptDataError, match=r"head\.bias"):
        load_policy(folder)
    save_file({k: v for k, v in tensors.items() if k != "head.bias"}, weights)
    with pytest.raises(ConfigError, match=r"head\.bias"):
        load_policy(folder)
    save_file(tensors | {"action.weight": tensors["action.weight"][:, :5]}, weights)
    with pytest.raises(ConfigError, match=r"action\.weight"):
        load_policy(folder)
    weights.unlink()
    with pytest.raises(CorruptDataError, match=r"policy\.safetensors"):
        load_policy(folder)


def test_another_format_is_refused(tmp_path):
    folder = make(tmp_path)[2]
    architecture = json.loads((folder / "architecture.json").read_text())
    (folder / "architecture.json").write_text(json.dumps(architecture | {"format": 2}))
    with pytest.raises(ConfigError, match="format"):
        load_policy(folder)


def test_a_robot_needs_no_torch(tmp_path):
    folder = make(tmp_path)[2]
    load = f"from infra.edge.inference import load_policy; load_policy({str(folder)!r})"
    code = f"import sys; {load}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
