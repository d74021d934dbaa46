import numpy as np
import pytest
import torch

from infra.errors import ConfigError
from lwd_model.agent import LWDAgent
from lwd_model.chunks import Batch
from lwd_model.diagnostics import diagnose
from lwd_model.normaliser import Normaliser
from lwd_model.schedule import learning_rate
from tests.lwd_model.factory import ACT, OBS, H, agent_config, batch, episode, generator, normaliser


def flats(agent):
    return {name: network.flat.detach().clone() for name, network in agent.networks()}


def changed(agent, before):
    return {name for name, network in agent.networks() if not torch.equal(network.flat, before[name])}


def test_sft_moves_the_policy_and_its_ema_alone():
    config = agent_config()
    agent = LWDAgent(config, normaliser())
    before = flats(agent)
    metrics = agent.sft_update(batch(config), generator())
    assert changed(agent, before) == {"policy", "deployed"}
    assert metrics["sft/loss"] > 0 and agent.counters == {"sft": 1, "rl": 0}


def test_sft_learns_what_is_demonstrated():
    config = agent_config(policy_lr=3e-3, deploy_ema=0.05)
    agent, g = LWDAgent(config, normaliser()), generator()
    data = batch(config)
    sign = torch.where(data.obs[:, 0] > 0, 0.6, -0.6)
    data.actions.copy_(sign[:, None, None].expand_as(data.actions))
    for _ in range(200):
        agent.sft_update(data, g)
    noise = torch.randn(16, H, ACT, generator=g)
    assert (agent.act(data.obs, data.task, noise) - data.actions).abs().mean() < 0.25  # untrained: 0.8


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({}, {"clone", "reference"}),
        ({"reference": "frozen"}, set()),
        ({"critic_warmup": 5}, {"clone", "reference"}),
        ({"value_kind": "expectile"}, {"clone", "reference"}),
    ],
)
def test_who_moves_in_an_update(options, moved):
    config = agent_config(**options)
    agent = LWDAgent(config, normaliser())
    before = flats(agent)
    for _ in range(3):
        agent.update(batch(config), generator())
    policy = set() if options.get("critic_warmup") else {"policy", "deployed"}
    assert changed(agent, before) == {"critic", "critic_target", "value", "value_target"} | policy | moved


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": "printed"},
        {"rollout": "reference"},
        {"rollout": "reference_iw", "samples": 4},
        {"critic_grad": "min"},
        {"tau_kind": "constant"},
        {"endpoint": "replay_grad"},
        {"cloned": "all"},
        {"step_subset": None},
        {"value_kind": "expectile"},
        {"interpolate": False, "clip_targets": False},
        {"decay": "cosine", "updates": 10, "weight_decay": 0.01},
    ],
)
def test_every_option_trains_and_differs_from_the_default(options):
    results = []
    for chosen in ({}, options):
        config = agent_config(**({"samples": options["samples"]} if "samples" in options else {}) | chosen)
        agent, g = LWDAgent(config, normaliser()), generator()
        with torch.no_grad():
            agent.value_target.flat.add_(0.1 * torch.randn(agent.value_target.flat.shape, generator=generator(5)))
        for i in range(4):
            metrics = agent.update(batch(config, i), g)
            assert all(torch.isfinite(value) for value in metrics.values())
        results.append(torch.cat([agent.policy.flat, agent.clone.flat, agent.critic.flat[:1000]]).detach())
    if results[0].shape == results[1].shape:
        assert not torch.equal(*results)


def test_constant_tau_is_tau_base():
    config = agent_config(tau_kind="constant", tau_base=0.7)
    metrics = LWDAgent(config, normaliser()).update(batch(config), generator())
    assert float(metrics["value/tau"]) == pytest.approx(0.7)


def test_parallel_and_serial_updates_are_equal_bit_for_bit():
    config = agent_config(critic_warmup=1)
    agents = [LWDAgent(config, normaliser(), parallel=parallel) for parallel in (False, True)]
    for agent in agents:
        g = generator()
        for i in range(5):
            agent.update(batch(config, i), g)
    serial, parallel = map(flats, agents)
    assert all(torch.equal(serial[name], parallel[name]) for name in serial)


def test_targets_follow_at_the_ema_rate():
    config = agent_config()
    agent = LWDAgent(config, normaliser())
    before = flats(agent)
    agent.update(batch(config), generator())
    for target, online in (("critic_target", "critic"), ("value_target", "value"), ("reference", "clone")):
        expected = 0.995 * before[target] + 0.005 * getattr(agent, online).flat.detach()
        torch.testing.assert_close(getattr(agent, target).flat, expected)


def test_qam_sees_an_evenly_spread_part_of_the_batch():
    """A mixed batch holds its online half at the end; the policy's 8 of 16 states must be a mix as well."""
    config = agent_config()
    agent = LWDAgent(config, normaliser())
    seen: list[Batch] = []
    original = agent._qam
    agent._qam = lambda few, *rest: (seen.append(few), original(few, *rest))[1]  # type: ignore[method-assign]
    data = batch(config)
    data.online[8:] = True
    agent.update(data, generator())
    assert len(seen[0]) == 8 and int(seen[0].online.sum()) == 4


def test_start_rl_begins_at_the_deployed_sft_policy():
    config = agent_config()
    agent, g = LWDAgent(config, normaliser()), generator()
    for _ in range(3):
        agent.sft_update(batch(config), g)
    agent.start_rl()
    for network in (agent.policy, agent.clone, agent.reference):
        assert torch.equal(network.flat, agent.deployed.flat)
    assert not agent.optimisers["policy"].state


def bandit(config, seed):
    """One-step episodes: reward 1 where the first action dimension is above 0, else 0; the data has both equally."""
    rng = np.random.default_rng(seed)
    data = batch(config)
    b = len(data)
    actions = torch.from_numpy(rng.uniform(-1, 1, (b, H, ACT)).astype(np.float32))
    mask = torch.zeros(b, H, dtype=torch.bool)
    mask[:, 0] = True
    data.actions.copy_(actions)
    data.mask.copy_(mask)
    data.reward.copy_((actions[:, 0, 0] > 0).float())
    data.discount.zero_()
    data.clone_weight.fill_(1.0)
    return data


def test_learns_a_bandit_and_keeps_what_the_reward_does_not_care_about():
    config = agent_config(
        batch=48,
        policy_batch=24,
        inv_temp=20.0,
        policy_lr=2e-3,
        critic_lr=2e-3,
        ema=0.05,
        deploy_ema=0.05,
        cloned="all",
    )
    agent, g = LWDAgent(config, normaliser()), generator()
    for i in range(150):
        agent.sft_update(bandit(config, i), g)
    agent.start_rl()
    obs = torch.zeros(256, OBS)
    task = torch.zeros(256, dtype=torch.int64)
    noise = torch.randn(256, H, ACT, generator=g)
    before = agent.act(obs, task, noise)
    for i in range(200):
        metrics = agent.update(bandit(config, 1000 + i), g)
    after = agent.act(obs, task, noise)
    assert (before[:, 0, 0] > 0).float().mean() < 0.65
    assert (after[:, 0, 0] > 0).float().mean() > 0.9
    assert after[:, 0, 1].std() > 0.25  # no collapse of the other dimension
    assert abs(float(metrics["divl/target"]) - 0.5) < 0.15


def test_gradients_are_clipped_and_rates_follow_the_schedule():
    config = agent_config(decay="cosine", updates=100, policy_lr=1e-3).learner
    assert learning_rate(1e-3, 0, config) < 1e-4  # warm-up
    assert learning_rate(1e-3, 50, config) == pytest.approx(5e-4)
    assert learning_rate(1e-3, 100, config) == pytest.approx(0.0, abs=1e-12)
    agent = LWDAgent(agent_config(grad_clip=0.5), normaliser())
    p = agent.policy.weights()
    norms: list[float] = []
    optimiser = agent.optimisers["policy"]
    optimiser.register_step_pre_hook(lambda *_: norms.append(float(agent.policy.flat.grad.norm())))
    agent._step("policy", agent.policy, p, sum(1e3 * tensor.square().sum() for tensor in p.values()), 0)
    assert norms == [pytest.approx(0.5, rel=1e-4)]


def test_a_normaliser_of_another_embodiment_is_refused():
    with pytest.raises(ConfigError, match="obs_dim=6"):
        LWDAgent(agent_config(), Normaliser(np.zeros(4, np.float32), np.ones(4, np.float32)))


@pytest.mark.parametrize("kind", ["distributional", "expectile"])
def test_diagnose_covers_every_state_of_an_episode(kind):
    agent = LWDAgent(agent_config(value_kind=kind), normaliser())
    found = diagnose(agent, episode(3, steps=9))
    assert found["value"].shape == (10,) and found["q"].shape == (9,)
    if kind == "distributional":
        assert found["probs"].shape == (10, 41) and found["atoms"].shape == (41,)
        np.testing.assert_allclose(found["probs"].sum(-1), 1.0, atol=1e-5)
        np.testing.assert_allclose(found["tau"], np.clip(0.6 - 0.3 * found["entropy"], 0.05, 0.95), atol=1e-6)
        np.testing.assert_allclose(found["mean"], found["probs"] @ found["atoms"], atol=1e-5)
