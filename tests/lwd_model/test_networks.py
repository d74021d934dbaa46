import pytest
import torch
import torch.nn.functional as F

from lwd_model.config import CriticConfig, PolicyConfig
from lwd_model.networks import Critic, FlowPolicy, Value
from tests.lwd_model.factory import ACT, INSTRUCTIONS, OBS, H, generator

POLICY = PolicyConfig(OBS, ACT, H, INSTRUCTIONS, width=32, blocks=2, time_features=8)


def trained_like(network):
    """Heads start at zero; tests want every path open."""
    with torch.no_grad():
        network.flat.add_(0.1 * torch.randn(network.flat.shape, generator=generator(9)))
    return network


def inputs(batch=5, dtype=torch.float32):
    g = generator(1)
    obs = torch.randn(batch, OBS, generator=g, dtype=dtype)
    x = torch.randn(batch, H, ACT, generator=g, dtype=dtype)
    return obs, torch.arange(batch) % 2, x, torch.rand(batch, generator=g, dtype=dtype)


def test_velocity_equals_the_formula_written_with_torch_modules():
    policy = trained_like(FlowPolicy(POLICY, generator()))
    p = policy.named_tensors()
    obs, task, x, w = inputs()
    angle = w[:, None] * policy.frequencies
    h = (
        F.linear(obs, p["state.weight"], p["state.bias"])
        + F.embedding(task, p["task.embedding"])
        + F.linear(torch.cat([angle.sin(), angle.cos()], -1), p["time.weight"])
        + F.linear(x.reshape(len(x), -1), p["action.weight"])
    )
    layer_norm = torch.nn.LayerNorm(32, elementwise_affine=False)
    for i in range(2):
        u = F.linear(layer_norm(h), p[f"block{i}.in.weight"], p[f"block{i}.in.bias"])
        h = h + F.linear(torch.nn.SiLU()(u), p[f"block{i}.out.weight"])
    expected = F.linear(layer_norm(h), p["head.weight"], p["head.bias"]).view_as(x)
    torch.testing.assert_close(policy.velocity(policy.prefix(obs, task), x, w), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "plain"])
def test_tiled_call_equals_separate_calls(kind):
    policy = trained_like(
        FlowPolicy(PolicyConfig(OBS, ACT, H, INSTRUCTIONS, width=32, blocks=2, kind=kind), generator())
    )
    obs, task, x, _ = inputs()
    cache = policy.prefix(obs, task)
    both = policy.velocity(cache, torch.cat([x, 2 * x]), torch.cat([torch.full((5,), 0.2), torch.full((5,), 0.7)]))
    torch.testing.assert_close(both[:5], policy.velocity(cache, x, torch.tensor(0.2)))
    torch.testing.assert_close(both[5:], policy.velocity(cache, 2 * x, torch.tensor(0.7)))


@pytest.mark.parametrize("kind", ["residual", "plain"])
def test_handwritten_vjp_equals_autograd_in_float64(kind):
    config = PolicyConfig(OBS, ACT, H, INSTRUCTIONS, width=32, blocks=2, kind=kind)
    policy = trained_like(FlowPolicy(config, generator())).double().requires_grad_(False)
    obs, task, x, w = inputs(dtype=torch.float64)
    p, x = policy.weights(), x.requires_grad_()
    cache = policy.prefix(obs, task, p)
    g = torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
    expected = policy.velocity(cache, x, w, p)
    fast = policy.frozen_velocity(cache, x, w, p)
    torch.testing.assert_close(fast, expected, atol=1e-12, rtol=0)
    (want,) = torch.autograd.grad(expected, x, g)
    (have,) = torch.autograd.grad(fast, x, g)
    torch.testing.assert_close(have, want, atol=1e-12, rtol=0)
    assert want.abs().max() > 1e-3


def test_collect_equals_autograd_through_the_flat_tensor():
    policy = trained_like(FlowPolicy(POLICY, generator()))
    obs, task, x, w = inputs()
    p = policy.weights()
    loss = policy.velocity(policy.prefix(obs, task, p), x, w, p).square().sum()
    gradient = policy.collect(loss, p)
    views = policy._views(policy.flat)  # a graph through the flat tensor itself
    loss = policy.velocity(policy.prefix(obs, task, views), x, w, views).square().sum()
    (expected,) = torch.autograd.grad(loss, policy.flat)
    torch.testing.assert_close(gradient, expected)


def test_bfloat16_stays_near_float32_and_heads_stay_exact():
    policy = trained_like(FlowPolicy(POLICY, generator()))
    obs, task, x, w = inputs(batch=64)
    p = policy.weights(torch.bfloat16)
    assert p["head.weight"].dtype == torch.float32 and p["block0.in.weight"].dtype == torch.bfloat16
    exact = policy.velocity(policy.prefix(obs, task), x, w)
    rough = policy.velocity(policy.prefix(obs, task, p), x, w, p)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.03 * exact.norm()


def test_critic_heads_in_one_call_equal_each_head_alone():
    critic = trained_like(Critic(POLICY, CriticConfig(width=16, blocks=2, heads=3), generator()))
    obs, task, x, _ = inputs()
    together = critic.q(critic.prefix(obs, task), x)
    assert together.shape == (3, 5)
    for head in range(3):
        alone = Critic(POLICY, CriticConfig(width=16, blocks=2, heads=1))
        alone.load_named({name: tensor[head : head + 1] for name, tensor in critic.named_tensors().items()})
        torch.testing.assert_close(alone.q(alone.prefix(obs, task), x)[0], together[head], atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3  # heads are independent


def test_padding_does_not_reach_the_critic():
    critic = trained_like(Critic(POLICY, CriticConfig(width=16, blocks=1), generator()))
    obs, task, x, _ = inputs()
    mask = torch.tensor([True, True, False]).expand(5, H)
    other = x.clone()
    other[:, 2] = 7.0
    cache = critic.prefix(obs, task)
    assert torch.equal(critic.q(cache, x, mask), critic.q(cache, other, mask))
    assert not torch.equal(critic.q(cache, x), critic.q(cache, other))


def test_value_shape_and_task_matter():
    value = trained_like(Value(POLICY, CriticConfig(width=16, blocks=1), 41, generator()))
    obs, task, _, _ = inputs()
    assert value.logits(obs, task).shape == (5, 41)
    assert not torch.equal(value.logits(obs, task), value.logits(obs, 1 - task))


def test_follow_is_an_ema_and_become_a_copy():
    first, second = FlowPolicy(POLICY, generator(1)), FlowPolicy(POLICY, generator(2))
    expected = 0.995 * first.flat + 0.005 * second.flat
    first.follow(second, 0.005)
    torch.testing.assert_close(first.flat, expected)
    first.become(second)
    assert torch.equal(first.flat, second.flat)


def test_initial_weights_depend_on_the_seed_alone():
    assert torch.equal(FlowPolicy(POLICY, generator(1)).flat, FlowPolicy(POLICY, generator(1)).flat)
    assert not torch.equal(FlowPolicy(POLICY, generator(1)).flat, FlowPolicy(POLICY, generator(2)).flat)


def test_named_tensors_round_trip():
    policy = trained_like(FlowPolicy(POLICY, generator()))
    other = FlowPolicy(POLICY)
    other.load_named(policy.named_tensors())
    obs, task, x, w = inputs()
    assert torch.equal(other.velocity(other.prefix(obs, task), x, w), policy.velocity(policy.prefix(obs, task), x, w))
