import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import ConfigError, CorruptDataError, DivergedError, StorageFullError
from lwd_model.agent import LWDAgent
from lwd_model.bundle import export_bundle, import_bundle
from tests.lwd_model.factory import agent_config, batch, generator, normaliser


@pytest.fixture
def bundle(tmp_path):
    config = agent_config()
    agent = LWDAgent(config, normaliser())
    for _ in range(3):
        agent.sft_update(batch(config), generator())
    return agent, export_bundle(agent.deployed, agent.normaliser, config.policy, tmp_path / "bundle")


def test_import_gives_back_the_same_policy(bundle):
    agent, folder = bundle
    policy, stats, config = import_bundle(folder)
    assert torch.equal(policy.flat, agent.deployed.flat)
    assert stats.digest == agent.normaliser.digest and config == agent.config.policy


def test_equal_policies_export_equal_bytes(bundle, tmp_path):
    agent, folder = bundle
    again = export_bundle(agent.deployed, agent.normaliser, agent.config.policy, tmp_path / "again")
    for name in ("policy.safetensors", "architecture.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert sorted(p.name for p in again.iterdir()) == ["architecture.json", "policy.safetensors"]


def test_another_architecture_is_named(bundle):
    _, folder = bundle
    tensors = load_file(folder / "policy.safetensors")
    tensors["head.bias"] = torch.zeros(99)
    save_file(tensors, folder / "policy.safetensors")
    with pytest.raises(ConfigError, match="head.bias"):
        import_bundle(folder)


def test_another_format_and_damage_are_named(bundle):
    _, folder = bundle
    architecture = json.loads((folder / "architecture.json").read_text())
    (folder / "architecture.json").write_text(json.dumps(architecture | {"format": 7}))
    with pytest.raises(ConfigError, match="format 7"):
        import_bundle(folder)
    (folder / "policy.safetensors").write_bytes((folder / "policy.safetensors").read_bytes()[:500])
    with pytest.raises(CorruptDataError, match="bundle"):
        import_bundle(folder)


@pytest.mark.parametrize("tensor", ["head.weight", "state.weight"])
def test_a_policy_that_robots_would_refuse_to_load_is_not_exported(bundle, tmp_path, tensor):
    """Finite weights and no finite action, at the mean observation or only far from it."""
    agent, _ = bundle
    tensors = agent.deployed.named_tensors()
    tensors[tensor] *= 1e38 / tensors[tensor].abs().max()
    agent.deployed.load_named(tensors)
    with pytest.raises(DivergedError, match="not finite"):
        export_bundle(agent.deployed, agent.normaliser, agent.config.policy, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_disk_that_does_not_take_a_bundle_is_named(bundle, tmp_path):
    agent, _ = bundle
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageFullError, match=r"policy\.safetensors"):
            export_bundle(agent.deployed, agent.normaliser, agent.config.policy, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "full").iterdir()) == []
