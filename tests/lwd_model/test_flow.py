"""Flow matching: the loss against its formula, masks and weights, and the sampler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lwd_model.flow import euler, flow_matching_loss

torch.set_num_threads(1)


def sample(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(6, 4, 2, generator=generator) * 2 - 1,
        torch.randn(6, 4, 2, generator=generator),
        torch.rand(6, generator=generator),
    )


def bent(x: Tensor, w: Tensor) -> Tensor:
    return x.sin() + w[:, None, None]


def test_loss_is_equation_34() -> None:
    actions, noise, w = sample()
    expected = [
        ((((1 - w[b]) * noise[b] + w[b] * actions[b]).sin() + w[b] - (actions[b] - noise[b])) ** 2).mean()
        for b in range(6)
    ]
    loss = flow_matching_loss(bent, actions, None, None, noise, w)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_the_true_velocity_of_one_action_has_no_loss() -> None:
    actions, noise, w = sample()
    loss = flow_matching_loss(
        lambda x, t: (actions - x) / (1 - t)[:, None, None], actions, torch.ones(6, 4, dtype=torch.bool), None, noise, w
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-8)


def test_padding_does_not_matter() -> None:
    actions, noise, w = sample()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:, 2:] = False
    other = actions.clone()
    other[:, 2:] = 7.0
    losses = [flow_matching_loss(bent, a, mask, None, noise, w).item() for a in (actions, other)]
    short = flow_matching_loss(bent, actions[:, :2], None, None, noise[:, :2], w).item()
    assert losses[0] == losses[1] == pytest.approx(short, rel=1e-6)


def test_weight_zero_leaves_a_sample_out() -> None:
    actions, noise, w = sample()
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    kept = weight > 0
    loss = flow_matching_loss(bent, actions, None, weight, noise, w)
    alone = flow_matching_loss(bent, actions[kept], None, None, noise[kept], w[kept])
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)


def test_nothing_to_clone_is_no_loss_and_no_nan() -> None:
    actions, noise, w = sample()
    scale = torch.ones((), requires_grad=True)
    loss = flow_matching_loss(lambda x, t: scale * x, actions, None, torch.zeros(6), noise, w)
    loss.backward()
    assert loss.item() == 0.0 and scale.grad is not None and scale.grad.item() == 0.0


def test_euler_takes_n_steps_at_the_left_ends() -> None:
    times: list[float] = []

    def velocity(x: Tensor, w: Tensor) -> Tensor:
        times.append(w.item())
        return x

    out = euler(velocity, torch.ones(2, 3), 4)
    assert times == [0.0, 0.25, 0.5, 0.75]
    assert torch.allclose(out, torch.full((2, 3), 1.25**4))


def test_ten_euler_steps_shrink_a_wide_base() -> None:
    def standard_normal(x: Tensor, w: Tensor) -> Tensor:
        return (2 * w - 1) / (w**2 + (1 - w) ** 2) * x

    # A linear map: what it does to 1 is what it does to the standard deviation.
    assert euler(standard_normal, torch.ones(1), 10).item() == pytest.approx(0.88, abs=0.005)
    assert euler(standard_normal, torch.ones(1), 2000).item() == pytest.approx(1.0, abs=0.005)
