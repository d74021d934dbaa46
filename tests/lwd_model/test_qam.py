"""Adjoint matching against closed forms, float64.

With a Gaussian base and a quadratic Q/λ every field is affine in x, and so is the fixed point: per step, a slope and an
offset that follow a linear recursion, derived in `closed_form`. Noise whose sample moments are exactly those of the
standard normal (`white`) makes the regression's fixed point equal it to rounding, with 64 trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from infra.errors import ConfigError
from lwd_model import qam
from lwd_model.flow import euler

torch.set_num_threads(1)
CASES = [(0.0, 1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 3.0, 1.0, 0.0), (0.3, 0.2, 75.0, 0.6, 0.0)]
QUADRATIC = CASES[1]


def base_affine(mean: float, std: float, w: float) -> tuple[float, float]:
    """Slope and offset of the exact velocity of N(mean, std²) at time w."""
    slope = (w * std**2 - (1 - w)) / (w**2 * std**2 + (1 - w) ** 2)
    return slope, mean - slope * w * mean


def base_field(mean: float, std: float) -> qam.Field:
    def velocity(x: Tensor, w: Tensor) -> Tensor:
        w = w if w.ndim == 0 else w[:, None]
        slope = (w * std**2 - (1 - w)) / (w**2 * std**2 + (1 - w) ** 2)
        return slope * x + (mean - slope * w * mean)

    return lambda tiles: velocity


def tilt(mean: float, std: float, k: float, b: float, c: float) -> tuple[float, float]:
    """Mean and std of N(mean, std²)·exp(-k/2 (a-b)² + c·a)."""
    precision = std**-2 + k
    return (mean / std**2 + k * b + c) / precision, precision**-0.5


def closed_form(
    case: tuple[float, ...], steps: int, *, sigma: str = "memoryless", rollout: str = "policy", adjoint: str = "lean"
) -> tuple[float, float]:
    """Mean and std of the Euler sampler at the fixed point of adjoint matching with N steps.

    Backwards, E[g_{i+1} | x_{i+1}] = G x_{i+1} + o, from G = k, o = -k b - c. The residual vanishes where
    f_θ = f_β - σ²/2 E[g_i | x_i], with g_i = J (G x_{i+1} + o) and x_{i+1} = α x_i + κ + noise, where α and κ contain
    f_θ itself if the policy is rolled out: one linear equation for the step's slope, one for its offset.
    """
    mean, std, k, b, c = case
    h, slope_g, offset_g = 1.0 / steps, k, -k * b - c
    slopes, offsets = [0.0] * steps, [0.0] * steps
    for i in reversed(range(steps)):
        w, last = i * h, i == steps - 1
        slope, offset = base_affine(mean, std, w)
        var = 2 * (1 - w + h) / (w + h) if sigma == "memoryless" else 2 * (1 - max(w, h / 2)) * max(w, h / 2)
        if adjoint == "lean":
            jacobian = 1 + h * (2 * base_affine(mean, std, w + h)[0] - 1 / (w + h))
        else:
            jacobian = 1 + h * slope if last else 1 + h * (2 * slope - 1 / (w + h))
        gain = h if last else 2 * h  # of f in x_{i+1}
        alpha, kappa = (1 + h * slope if last else 1 + h * (2 * slope - 1 / (w + h))), gain * offset
        feedback = 1 + jacobian * slope_g * gain * var / 2 if rollout == "policy" else 1.0
        slope_g, offset_g = (
            jacobian * slope_g * alpha / feedback,
            jacobian * (slope_g * kappa + offset_g) / feedback,
        )
        slopes[i], offsets[i] = slope - var / 2 * slope_g, offset - var / 2 * offset_g
    m, variance = 0.0, 1.0
    for a, d in zip(slopes, offsets, strict=True):
        m, variance = m + h * (a * m + d), variance * (1 + h * a) ** 2
    return m, math.sqrt(variance)


def white(steps: int, rows: int) -> Tensor:
    """(N, rows, 1) noise of sample mean 0 and sample covariance I, exactly: every linear moment is the normal's."""
    noise = torch.randn(rows, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = noise - noise.mean(0)
    q, _ = torch.linalg.qr(noise)
    return (q * rows**0.5).T.unsqueeze(-1).contiguous()


def quadratic_q(case: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    _, _, k, b, c = case
    return lambda a: (-k / 2 * (a - b) ** 2 + c * a).sum(-1)


class AffinePolicy(nn.Module):
    """A slope and an offset per step, as corrections to a base field; batched times are told apart by index."""

    def __init__(self, base: qam.Field, steps: int) -> None:
        super().__init__()
        self.base, self.steps = base, steps
        self.slope = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(steps, dtype=torch.float64))

    def __call__(self, tiles: int) -> Callable[[Tensor, Tensor], Tensor]:
        def velocity(x: Tensor, w: Tensor) -> Tensor:
            i = (w * self.steps).round().long().expand(x.shape[0])
            return self.base(tiles)(x, w) + self.slope[i, None] * x + self.offset[i, None]

        return velocity

    def solve(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The exact minimiser of the loss (a quadratic, 2×2 per step) minus the present parameters."""
        grads = torch.autograd.grad(loss, [self.slope, self.offset], create_graph=True)
        rows = [torch.autograd.grad(g.sum(), [self.slope, self.offset], retain_graph=True) for g in grads]
        hessian = torch.stack([torch.stack(row, -1) for row in rows], -2)
        step = torch.linalg.solve(hessian, torch.stack([g.detach() for g in grads], -1))
        return -step[:, 0], -step[:, 1]


def fixed_point(case: tuple[float, ...], steps: int, noise: Tensor, iterations: int, **options: object) -> AffinePolicy:
    """Iterate regression on `qam_loss` to its fixed point, stepping half-way for stability."""
    policy = AffinePolicy(base_field(*case[:2]), steps)
    damping = 1.0 if iterations == 1 else 0.5
    for _ in range(iterations):
        out = qam.qam_loss(policy, policy.base, quadratic_q(case), noise, inv_temp=1.0, clip=None, **options)
        d_slope, d_offset = policy.solve(out.loss)
        with torch.no_grad():
            policy.slope += damping * d_slope
            policy.offset += damping * d_offset
    return policy


def deployed(policy: qam.Field, steps: int) -> tuple[float, float]:
    with torch.no_grad():
        samples = euler(policy(1), white(1, 512)[0], steps)
    return samples.mean().item(), samples.std(correction=0).item()


class TinyField(nn.Module):
    """A state-conditioned MLP field, as a policy is: the states' encoding is made once and broadcast over tiles."""

    def __init__(self, states: Tensor, action_dim: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.states = states
        self.encode = nn.Linear(states.shape[-1], 16, dtype=states.dtype)
        self.embed = nn.Linear(action_dim + 1, 16, dtype=states.dtype)
        self.head = nn.Linear(16, action_dim, dtype=states.dtype)
        self.calls: list[int] = []

    def __call__(self, tiles: int) -> Callable[[Tensor, Tensor], Tensor]:
        cache = self.encode(self.states)

        def velocity(x: Tensor, w: Tensor) -> Tensor:
            self.calls.append(x.shape[0])
            time = w.expand(x.shape[0])[:, None, None].expand(*x.shape[:2], 1)
            hidden = self.embed(torch.cat([x, time], -1)).unflatten(0, (tiles, -1)) + cache[:, None]
            return self.head(torch.tanh(hidden)).flatten(0, 1)

        return velocity


def tiny(batch: int = 4, dtype: torch.dtype = torch.float64) -> tuple[TinyField, TinyField, Callable[[Tensor], Tensor]]:
    """Two different fields over the same states, and a curved critic of (M·B, H=3, A=2) chunks."""
    states = torch.randn(batch, 5, dtype=dtype, generator=torch.Generator().manual_seed(3))
    return TinyField(states, 2, 0), TinyField(states, 2, 1), lambda a: (a.sin() * a[:, :1]).sum((1, 2))


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rollout", ["policy", "reference"])
@pytest.mark.parametrize("subset", [None, 3])
def test_01_equal_fields_and_no_critic_change_nothing(rollout: str, subset: int | None) -> None:
    policy, _, _ = tiny(batch=16, dtype=torch.float32)
    reference, _, _ = tiny(batch=16, dtype=torch.float32)
    before = [p.clone() for p in policy.parameters()]
    optimiser = torch.optim.Adam(policy.parameters(), lr=1.0)
    for seed in range(3):
        out = qam.qam_loss(
            policy,
            reference,
            lambda a: 0.0 * a.sum((1, 2)),
            gaussian(10, 16, 3, 2, seed=seed, dtype=torch.float32),
            inv_temp=10.0,
            rollout=rollout,
            step_subset=subset,
            generator=torch.Generator().manual_seed(seed),
        )
        assert out.loss.item() == 0.0
        out.loss.backward()
        optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("adjoint", ["lean", "exact"])
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("case", CASES)
def test_02_gaussian_fixed_point_is_the_discrete_closed_form(case: tuple[float, ...], steps: int, adjoint: str) -> None:
    policy = fixed_point(case, steps, white(steps, 64), 30, adjoint=adjoint)
    # The acceptance bound is 0.03; exact sample moments leave only the iteration's remainder.
    assert deployed(policy, steps) == pytest.approx(closed_form(case, steps, adjoint=adjoint), abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_03_closed_form_tends_to_the_true_tilt(case: tuple[float, ...]) -> None:
    assert closed_form(case, 4000) == pytest.approx(tilt(*case), abs=0.002)


def test_04_printed_sigma_misses_the_tilt() -> None:
    policy = fixed_point(CASES[0], 20, white(20, 64), 30, sigma="printed")
    mean, _ = deployed(policy, 20)
    assert mean == pytest.approx(0.19, abs=0.005)  # where exp(Q/λ) asks for 1.00
    assert mean == pytest.approx(closed_form(CASES[0], 20, sigma="printed")[0], abs=1e-5)
    assert closed_form(CASES[0], 4000, sigma="printed")[0] == pytest.approx(0.19, abs=0.005)  # at no N


def test_05_reference_overshoots_reference_iw_does_not() -> None:
    plain = fixed_point(QUADRATIC, 20, white(20, 64), 1, rollout="reference")
    mean, _ = deployed(plain, 20)
    assert mean == pytest.approx(1.16, abs=0.05)  # where exp(Q/λ) asks for 0.75
    assert mean == pytest.approx(closed_form(QUADRATIC, 20, rollout="reference")[0], abs=1e-6)

    rows = 30_000  # one state, all trajectories its own
    weighted = fixed_point(QUADRATIC, 20, gaussian(20, rows, 1, seed=1), 1, rollout="reference_iw", samples=rows)
    mean, std = deployed(weighted, 20)
    assert mean == pytest.approx(0.69, abs=0.05)
    assert (mean, std) == pytest.approx(closed_form(QUADRATIC, 20), abs=0.03)


def mixture_field(std: float) -> qam.Field:
    """The exact velocity of an even mixture of N(±1, std²)."""

    def velocity(x: Tensor, w: Tensor) -> Tensor:
        w = w if w.ndim == 0 else w[:, None]
        var = w**2 * std**2 + (1 - w) ** 2
        slope = (w * std**2 - (1 - w)) / var
        sign = torch.tanh(w * x / var)  # posterior mean of the mode
        return slope * x + sign * (1 - slope * w)

    return lambda tiles: velocity


def test_06_two_modes_are_reweighted_not_moved() -> None:
    """The recursion of `closed_form`, done on a grid for this mixture, gives 0.849, 1.077 and -0.919 at N = 20."""
    std, steps, bins, reach, rows = 0.3, 20, 120, 4.0, 20_000
    base = mixture_field(std)
    table = torch.zeros(steps, bins, dtype=torch.float64, requires_grad=True)  # correction to the base, per step and x

    def policy(tiles: int) -> Callable[[Tensor, Tensor], Tensor]:
        def velocity(x: Tensor, w: Tensor) -> Tensor:
            i = (w * steps).round().long().expand(x.shape[0])
            cell = ((x[:, 0] + reach) * (bins / (2 * reach))).long().clamp(0, bins - 1)
            return base(tiles)(x, w) + table[i, cell][:, None]

        return velocity

    for seed in range(20):
        noise = gaussian(steps, rows, 1, seed=seed)
        out = qam.qam_loss(policy, base, lambda a: a.sum(-1), noise, inv_temp=1.0, clip=None)
        (grad,) = torch.autograd.grad(out.loss, table, create_graph=True)
        (curvature,) = torch.autograd.grad(grad.sum(), table)  # the loss is diagonal in the table
        with torch.no_grad():  # half-way steps to the fixed point, then shrinking ones to average the noise out
            rate = min(0.5, 2.0 / (seed + 1))
            table -= rate * torch.where(curvature > 0, grad / curvature.clamp_min(1e-12), 0.0)
    with torch.no_grad():
        x = euler(policy(1), gaussian(1, 20_000, 1, seed=99)[0], steps)
    right = x > 0
    assert right.double().mean().item() == pytest.approx(0.85, abs=0.03)
    # Within a mode the tilt moves the mean by std², as it should.
    assert x[right].mean().item() == pytest.approx(1.0 + std**2, abs=0.08)
    assert x[~right].mean().item() == pytest.approx(-1.0 + std**2, abs=0.08)


def _through(reference: qam.Field, path: Tensor, start: int, x: Tensor, scheme: str, q: object) -> Tensor:
    """-Q(clip(x_N)) as a function of x_start, through the steps that the adjoint linearises, noise held fixed."""
    steps = path.shape[0] - 1
    h = 1.0 / steps
    velocity = reference(1)

    def step(y: Tensor, i: int) -> Tensor:
        if scheme == "exact" and i == steps - 1:
            return y + h * velocity(y, torch.tensor(i * h, dtype=y.dtype))
        time = torch.tensor((i + 1) * h if scheme == "lean" else i * h, dtype=y.dtype)
        return y + h * (2 * velocity(y, time) - y / (i * h + h))

    for i in range(start, steps):
        x = path[i + 1] + step(x, i) - step(path[i], i)  # the same path, with the steps' own sensitivity
    return -q(x.clamp(-1, 1))


@pytest.mark.parametrize("scheme", ["exact", "lean"])
def test_07_adjoint_against_finite_differences(scheme: str) -> None:
    _, reference, q = tiny(batch=2)
    steps = 10
    path = qam.memoryless_rollout(reference(1), 0.3 * gaussian(steps, 2, 3, 2), qam.sigmas(steps))
    _, gradient = qam.critic_gradient(q, path[-1])
    adjoint = qam.lean_adjoint(reference(1), path, -gradient, scheme=scheme)
    assert adjoint.abs().max() > 0.01
    eps = 1e-5
    with torch.no_grad():
        for start in (0, 4, 9):
            for coordinate in range(6):
                bump = torch.zeros(6, dtype=torch.float64)
                bump[coordinate] = eps
                bump = bump.reshape(3, 2)
                up, down = (_through(reference, path, start, path[start] + s * bump, scheme, q) for s in (1, -1))
                numeric = (up - down) / (2 * eps)
                assert torch.allclose(adjoint[start].flatten(1)[:, coordinate], numeric, rtol=0, atol=1e-7)


def test_07_exact_adjoint_is_the_gradient_of_the_rollout() -> None:
    _, reference, q = tiny(batch=2)
    steps = 10
    noise, sigma = 0.3 * gaussian(steps, 2, 3, 2), qam.sigmas(steps)
    path = qam.memoryless_rollout(reference(1), noise, sigma)
    _, gradient = qam.critic_gradient(q, path[-1])
    adjoint = qam.lean_adjoint(reference(1), path, -gradient, scheme="exact")
    eps = 1e-5
    for coordinate in range(6):
        bump = torch.zeros(6, dtype=torch.float64)
        bump[coordinate] = eps
        ends = []
        for s in (1, -1):
            moved = noise.clone()
            moved[0] += s * bump.reshape(3, 2)
            ends.append(-q(qam.memoryless_rollout(reference(1), moved, sigma)[-1].clamp(-1, 1)))
        assert torch.allclose(adjoint[0].flatten(1)[:, coordinate], (ends[0] - ends[1]) / (2 * eps), rtol=0, atol=1e-7)


def test_clip_is_inside_the_critic_gradient() -> None:
    x = torch.tensor([[[0.5, 1.5], [-2.0, -0.5]]])
    value, gradient = qam.critic_gradient(lambda a: (3.0 * a).sum((1, 2)), x)
    assert value.tolist() == [0.0]
    assert gradient.tolist() == [[[3.0, 0.0], [0.0, 3.0]]]


def test_gradient_reaches_the_policy_only() -> None:
    policy, reference, _ = tiny()
    critic = nn.Linear(6, 1, dtype=torch.float64)
    out = qam.qam_loss(
        policy, reference, lambda a: critic(a.flatten(1))[:, 0], 0.1 * gaussian(10, 4, 3, 2), inv_temp=1.0
    )
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())
    assert all(p.grad is None for p in [*reference.parameters(), *critic.parameters()])


def test_loss_equals_the_sum_written_from_the_formula() -> None:
    policy, reference, q = tiny()
    steps, noise = 10, gaussian(10, 4, 3, 2)
    out = qam.qam_loss(policy, reference, q, noise, inv_temp=2.0)
    h = 0.1
    with torch.no_grad():
        x, path = noise[0], [noise[0]]
        for i in range(steps):
            w = torch.tensor(i * h, dtype=torch.float64)
            var = 2 * (1 - w + h) / (w + h)
            f = policy(1)(x, w)
            x = x + h * f if i == steps - 1 else x + h * (2 * f - x / (w + h)) + (h * var).sqrt() * noise[i + 1]
            path.append(x)
    total = torch.zeros(4, dtype=torch.float64)
    g = -2.0 * torch.autograd.functional.jacobian(lambda a: q(a.clamp(-1, 1)).sum(), path[-1])
    for i in reversed(range(steps)):
        w = torch.tensor(i * h, dtype=torch.float64)
        _, vjp = torch.autograd.functional.vjp(lambda y, w=w: 2 * reference(1)(y, w + h) - y / (w + h), path[i], g)
        g = g + h * vjp
        std = (2 * (1 - w + h) / (w + h)).sqrt()
        with torch.no_grad():
            delta = policy(1)(path[i], w) - reference(1)(path[i], w)
        total += (2 * delta / std + std * g).square().sum((1, 2))
    assert out.loss.item() == pytest.approx(total.mean().item(), rel=1e-10)


def test_step_subset_is_unbiased_and_evaluates_only_its_steps() -> None:
    policy, reference, q = tiny()
    noise = gaussian(6, 4, 3, 2)
    full = qam.qam_loss(policy, reference, q, noise, inv_temp=1.0).loss.item()
    generator = torch.Generator().manual_seed(0)
    drawn = [
        qam.qam_loss(policy, reference, q, noise, inv_temp=1.0, step_subset=2, generator=generator).loss.item()
        for _ in range(400)
    ]
    spread = torch.tensor(drawn).std().item() / math.sqrt(len(drawn))
    assert abs(sum(drawn) / len(drawn) - full) < 4 * spread
    policy.calls.clear()
    qam.qam_loss(policy, reference, q, noise, inv_temp=1.0, step_subset=2)
    assert policy.calls == [4] * 6 + [2 * 4]  # the rollout, and one batched call


def test_samples_are_tile_major() -> None:
    policy, reference, q = tiny()
    noise = gaussian(10, 3 * 4, 3, 2)
    together = qam.qam_loss(policy, reference, q, noise, inv_temp=1.0, samples=3).loss
    apart = [qam.qam_loss(policy, reference, q, noise[:, 4 * m : 4 * (m + 1)], inv_temp=1.0).loss for m in range(3)]
    assert together.item() == pytest.approx(sum(loss.item() for loss in apart) / 3, rel=1e-10)


def test_masked_steps_give_no_loss_and_carry_no_adjoint() -> None:
    policy, reference, q = tiny()
    noise = gaussian(10, 4, 3, 2)
    mask = torch.tensor([[True, True, False]] * 4)
    out = qam.qam_loss(policy, reference, q, noise, inv_temp=1.0, mask=mask)
    # A critic and a difference of fields that live on padding alone count for nothing.
    same = qam.qam_loss(policy, policy, lambda a: a[:, 2].sum(-1), noise, inv_temp=1.0, mask=mask)
    assert same.loss.item() == 0.0 < out.loss.item()

    def coupled(x: Tensor, w: Tensor) -> Tensor:
        return x.flip(1).sin()

    path = qam.memoryless_rollout(coupled, noise, qam.sigmas(10, like=noise))
    adjoint = qam.lean_adjoint(coupled, path, torch.ones(4, 3, 2, dtype=torch.float64), mask=mask.double()[..., None])
    assert adjoint[:, :, 2].abs().max() == 0.0 < adjoint[:, :, :2].abs().max()


def test_replay_gradient_is_taken_at_the_replay_action() -> None:
    policy, reference, _ = tiny()
    noise, actions = gaussian(10, 4, 3, 2), 0.1 * gaussian(4, 3, 2, seed=5)
    seen: list[Tensor] = []

    def q(a: Tensor) -> Tensor:
        seen.append(a.detach())
        return a.square().sum((1, 2))

    qam.qam_loss(policy, reference, q, noise, inv_temp=1.0, endpoint="replay_grad", replay_actions=actions)
    assert torch.equal(seen[0], actions)


def test_a_callable_that_cuts_the_graph_is_refused() -> None:
    policy, reference, q = tiny()
    noise = gaussian(10, 4, 3, 2)
    with pytest.raises(ConfigError, match="the critic's value carries no gradient"):
        qam.qam_loss(policy, reference, torch.no_grad()(q), noise, inv_temp=1.0)
    with pytest.raises(ConfigError, match="the reference velocity carries no gradient"):
        qam.qam_loss(policy, lambda tiles: torch.no_grad()(reference(tiles)), q, noise, inv_temp=1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollout": "beta"}, "rollout='beta'"),
        ({"sigma": "wrong"}, "sigma='wrong'"),
        ({"endpoint": "replay_grad"}, "replay_actions"),
        ({"rollout": "reference_iw"}, "samples=1"),
        ({"samples": 3}, "samples=3"),
        ({"step_subset": 11}, "step_subset=11"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], words: str) -> None:
    policy, reference, q = tiny()
    with pytest.raises(ConfigError, match=words):
        qam.qam_loss(policy, reference, q, gaussian(10, 4, 3, 2), inv_temp=1.0, **options)
