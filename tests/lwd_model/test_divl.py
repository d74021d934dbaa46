"""Value learning: the chain that shows whether values decay, Proposition 1, and the losses' formulas."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from lwd_model.divl import (
    adaptive_tau,
    critic_loss,
    expectile_loss,
    scalar_td_target,
    td_target,
    unresolved_backup,
    value_loss,
)
from lwd_model.returns import nstep_fields
from lwd_model.support import Support

torch.set_num_threads(1)
SUPPORT = Support()
GAMMA, HORIZON, CHUNKS = 0.9999, 30, 180


def chain(nstep: int, *, start: float = 0.0, **target: object) -> Tensor:
    """Fixed point of tabular DIVL on a deterministic success of 180 chunks, one start a chunk: Q of each chunk.

    The value's cross-entropy is minimised exactly by the projection of the state's only Q, so a sweep is: project,
    extract, back up. Swept often enough for the longest chain of backups.
    """
    steps = CHUNKS * HORIZON
    rewards = np.zeros(steps)
    rewards[-1] = 1.0
    fields = nstep_fields(rewards, np.zeros(steps, bool), "success", HORIZON, nstep, GAMMA)
    starts = np.arange(0, steps, HORIZON)
    reward = torch.tensor(fields.reward[starts], dtype=torch.float32)
    discount = torch.tensor(fields.discount[starts], dtype=torch.float32)
    successor = torch.tensor(np.minimum(fields.bootstrap_index[starts] // HORIZON, CHUNKS - 1))
    q = torch.full((CHUNKS,), start)
    for _ in range(CHUNKS // nstep + 2):
        logits = SUPPORT.project(q)[successor].clamp_min(1e-12).log()
        q = td_target(reward, discount, logits, SUPPORT, **target).y
    return q


TRUTH = torch.tensor([GAMMA ** (HORIZON * k) for k in range(CHUNKS, 0, -1)])
PAPER = {"tau_base": 0.6, "alpha": 0.3, "interpolate": False, "clip": None}
RECOMMENDED = {"tau_base": 0.6, "alpha": 0.3}  # interpolated CDF and y in [0, 1] are the defaults


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
def test_10_chain_decays_with_the_recommended_settings(start: float) -> None:
    q = chain(10, start=start, **RECOMMENDED)
    assert (q - TRUTH).abs().max() <= 0.05
    assert q[0] == pytest.approx(0.58, abs=0.03)


def test_10_chain_sticks_with_the_papers_settings_and_one_step() -> None:
    q = chain(1, **PAPER)
    assert ((q >= 0.99) & (q <= 1.002)).all()  # where the truth falls to 0.58
    assert TRUTH[0] == pytest.approx(0.58, abs=0.005)


def test_10_ten_steps_are_fine_even_with_the_papers_quantile() -> None:
    assert (chain(10, **PAPER) - TRUTH).abs().max() <= 0.05


def test_10_unresolved_backups_are_announced_with_their_numbers() -> None:
    with pytest.warns(UserWarning, match=r"0\.003 .*gamma=0\.9999, n=1, H=30.*0\.012"):
        assert unresolved_backup(GAMMA, 1, HORIZON, SUPPORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not unresolved_backup(GAMMA, 10, HORIZON, SUPPORT)


@pytest.mark.parametrize("tau", [0.2, 0.5, 0.6, 0.85])
def test_11_proposition_1(tau: float) -> None:
    """Fit the distribution of Q over discrete actions by cross-entropy, extract; against direct regression on the Q."""
    # Atoms on multiples of 1/200, fine enough to hold the actions' values: the proposition is about the ideal limit.
    support = Support(0.0, 1.0, 201)
    values = torch.tensor([0.1, 0.35, 0.4, 0.8, 0.95], dtype=torch.float64)
    chance = torch.tensor([0.3, 0.15, 0.25, 0.2, 0.1], dtype=torch.float64)

    logits = torch.zeros(1, support.size, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = torch.stack(
            [p * value_loss(logits, v[None], support) for p, v in zip(chance, values, strict=True)]
        ).sum()
        total.backward()
        return total

    optimiser.step(loss)
    probs = support.probs(logits.detach())
    atoms = support.atoms.double()

    def asymmetric(candidate: Tensor, points: Tensor, mass: Tensor, power: int) -> Tensor:
        error = points - candidate[:, None]
        return (((error < 0).double() - tau).abs() * error.abs() ** power * mass).sum(-1)

    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    direct = {p: grid[asymmetric(grid, values, chance, p).argmin()] for p in (1, 2)}
    fitted = {p: grid[asymmetric(grid, atoms, probs[0], p).argmin()] for p in (1, 2)}
    assert fitted[2].item() == pytest.approx(direct[2].item(), abs=1e-3)
    assert support.quantile(probs, torch.tensor(tau)).item() == pytest.approx(direct[1].item(), abs=1e-3)

    # The expectile that the ablation's loss finds is the direct one.
    v = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([v], max_iter=200, line_search_fn="strong_wolfe")

    def regression() -> Tensor:
        descent.zero_grad()
        total = torch.stack([p * expectile_loss(v, q[None], tau) for p, q in zip(chance, values, strict=True)]).sum()
        total.backward()
        return total

    descent.step(regression)
    assert v.item() == pytest.approx(direct[2].item(), abs=1e-3)


def test_value_loss_is_the_cross_entropy_to_the_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 201, generator=generator)
    target = torch.rand(64, generator=generator) * 1.6 - 0.3  # some outside the support
    dense = -(SUPPORT.project(target) * logits.log_softmax(-1)).sum(-1).mean()
    assert value_loss(logits, target, SUPPORT).item() == pytest.approx(dense.item(), rel=1e-5)


def test_td_target_is_equation_19() -> None:
    logits = SUPPORT.project(torch.tensor([0.5, 0.9])).clamp_min(1e-12).log()
    out = td_target(
        torch.tensor([0.0, 0.7]), torch.tensor([0.9, 0.0]), logits, SUPPORT, tau_base=0.5, alpha=0.0, interpolate=False
    )
    assert out.y[0].item() == pytest.approx(0.9 * 0.5, abs=SUPPORT.spacing)
    assert out.y[1].item() == pytest.approx(0.7)  # nothing is bootstrapped where the discount is 0
    assert out.tau.tolist() == [0.5, 0.5]  # alpha = 0: constant


def test_td_target_gives_no_gradient_and_is_more_careful_where_uncertain() -> None:
    logits = torch.stack([torch.zeros(201), 50.0 * SUPPORT.project(torch.tensor(0.5))]).requires_grad_()
    out = td_target(torch.zeros(2), torch.ones(2), logits, SUPPORT, tau_base=0.6, alpha=0.3)
    assert not out.y.requires_grad and not out.tau.requires_grad
    assert out.tau[0].item() == pytest.approx(0.3, abs=1e-4) and out.tau[1].item() > 0.55
    assert not adaptive_tau(torch.ones(1, requires_grad=True), 0.6, 0.3).requires_grad


def test_targets_are_clipped_to_the_return_range_unless_told_otherwise() -> None:
    assert scalar_td_target(torch.tensor([0.9]), torch.tensor([1.0]), torch.tensor([0.5])).item() == 1.0
    assert scalar_td_target(torch.tensor([0.9]), torch.tensor([1.0]), torch.tensor([0.5]), clip=None).item() == (
        pytest.approx(1.4)
    )


def test_critic_loss_drives_every_head_to_the_same_target() -> None:
    q = torch.tensor([[0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    y = torch.tensor([1.0, 1.0], requires_grad=True)
    loss = critic_loss(q, y)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 + 0.25)
    assert y.grad is None and q.grad.tolist() == [[-1.0, 0.0], [-0.5, -0.5]]
