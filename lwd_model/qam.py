"""Policy extraction: Q-learning with adjoint matching (section III-C, IV-B; arXiv 2601.14234, 2409.08861).

The discretisation, with N steps, h = 1/N, w_i = i·h:

    x_{i+1} = x_i + h·(2 f(x_i, w_i) - x_i/(w_i+h)) + √h σ_i ε        for i < N-1;  x_N = x_{N-1} + h·f
    σ_i²    = 2 (1 - w_i + h)/(w_i + h)                               finite at every step
    g_N     = -∇_a Q(clip(x_N))/λ
    g_i     = g_{i+1} + h·VJP_{x_i}[2 f_β(x, w_i+h) - x/(w_i+h)](g_{i+1})
    loss    = mean over states of Σ_i ‖2 (f_θ(x_i, w_i) - f_β(x_i, w_i))/σ_i + σ_i g_i‖²

Networks come in as callables. A *field* is `field(k) -> velocity`, where `velocity(x, w)` serves the batch of states
tiled k times: x is (k·B, *), tile-major (`x.unflatten(0, (k, B))` has the states along dim 1), and w is 0-d or
(k·B,). A policy network encodes its observations once, keeps that cache, and broadcasts it over the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infra.errors import ConfigError
from lwd_model.flow import Velocity, over

Field = Callable[[int], Velocity]
Sigma = Literal["memoryless", "printed"]
Rollout = Literal["policy", "reference", "reference_iw"]
Endpoint = Literal["generated", "replay_grad"]
Adjoint = Literal["lean", "exact"]


@dataclass(frozen=True)
class QAMLoss:
    """The loss, and detached 0-d statistics named for logging."""

    loss: Tensor
    metrics: dict[str, Tensor]


def sigmas(steps: int, sigma: Sigma = "memoryless", *, like: Tensor | None = None) -> Tensor:
    """Noise scale σ_i of each step, (N,).

    `memoryless` is √(2(1-w+h)/(w+h)). `printed` is the paper's √(2(1-w)w): the slash is lost there, and with it the
    optimum is not π_β·exp(Q/λ) at any N; it exists as an ablation. It is 0 at w = 0, where the loss divides by it: the
    first step takes it at w = h/2.
    """
    device, dtype = (None, torch.float64) if like is None else (like.device, like.dtype)
    h = 1.0 / steps
    w = torch.arange(steps, device=device, dtype=dtype) * h
    if sigma == "printed":
        w = w.clamp_min(h / 2)
        return (2.0 * (1.0 - w) * w).sqrt()
    if sigma == "memoryless":
        return (2.0 * (1.0 - w + h) / (w + h)).sqrt()
    raise ConfigError(f"sigma={sigma!r} is unknown", "use 'memoryless' (right) or 'printed' (the paper's typography)")


@torch.no_grad()
def memoryless_rollout(velocity: Velocity, noise: Tensor, sigma: Tensor) -> Tensor:
    """Stochastic rollout of the flow; the last step is noise-free. No graph is kept.

    Args:
        velocity: field to roll out, at the batch's states.
        noise: (N, B, *) standard normal; row 0 is x_0, row i+1 the noise of step i.
        sigma: (N,).

    Returns:
        (N+1, B, *): x_0 … x_N.
    """
    steps = noise.shape[0]
    h = 1.0 / steps
    times = torch.arange(steps, device=noise.device, dtype=noise.dtype) * h
    path = [noise[0]]
    for i in range(steps - 1):
        x = path[-1]
        drift = 2.0 * velocity(x, times[i]).to(x.dtype) - x / (i * h + h)
        path.append(x + h * drift + h**0.5 * sigma[i] * noise[i + 1])
    path.append(path[-1] + h * velocity(path[-1], times[-1]).to(noise.dtype))
    return torch.stack(path)


def critic_gradient(q: Callable[[Tensor], Tensor], x: Tensor, clip: float | None = 1.0) -> tuple[Tensor, Tensor]:
    """Q and ∇_x Q(clip(x, -clip, clip)): the clip is inside, a dimension out of range gets no gradient.

    Args:
        q: (B, *) -> (B,); its parameters get no gradient.
        x: (B, *).

    Returns:
        values (B,), gradient (B, *), both detached.

    Raises:
        ConfigError: q cut the graph.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        values = q(leaf if clip is None else leaf.clamp(-clip, clip))
        _must_differentiate(values, "the critic's value")
        (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True, materialize_grads=True)
    return values.detach(), gradient


def lean_adjoint(
    reference: Velocity,
    path: Tensor,
    terminal: Tensor,
    *,
    first: int = 0,
    mask: Tensor | None = None,
    scheme: Adjoint = "lean",
) -> Tensor:
    """Adjoint states along a path, backwards, through the reference field only: one forward and one VJP a step.

    Args:
        reference: f_β at the batch's states; no gradient reaches its parameters.
        path: (N+1, B, *) from `memoryless_rollout`.
        terminal: (B, *), g_N.
        first: the earliest step wanted; steps before it are not computed.
        mask: broadcastable to (B, *), 0 where the adjoint is to be zero.
        scheme: `lean` evaluates f_β at (x_i, w_i + h) at every step. `exact` differentiates the rollout's own steps,
            f_β at (x_i, w_i) and the noise-free last step: the exact gradient where the reference is rolled out.

    Returns:
        (N - first, B, *): g_first … g_{N-1}.

    Raises:
        ConfigError: the reference cut the graph.
    """
    steps = path.shape[0] - 1
    h = 1.0 / steps
    shift = 1 if scheme == "lean" else 0
    times = (torch.arange(steps, device=path.device, dtype=path.dtype) + shift) * h
    g = terminal if mask is None else terminal * mask
    adjoints = []
    for i in range(steps - 1, first - 1, -1):
        with torch.enable_grad():
            x = path[i].detach().requires_grad_()
            velocity = reference(x, times[i])
            _must_differentiate(velocity, "the reference velocity")
            (vjp,) = torch.autograd.grad(velocity, x, g.to(velocity.dtype), allow_unused=True, materialize_grads=True)
        if scheme == "exact" and i == steps - 1:
            g = g + h * vjp
        else:
            g = g + h * (2.0 * vjp - g / (i * h + h))
        if mask is not None:
            g = g * mask
        adjoints.append(g)
    return torch.stack(adjoints[::-1])


def adjoint_matching_loss(
    policy: Velocity,
    reference: Velocity,
    x: Tensor,
    w: Tensor,
    adjoint: Tensor,
    sigma: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """‖2(f_θ - f_β)/σ + σ g‖² per sample (eq. 9). x, adjoint and f_β are constants.

    Both fields are evaluated by the same call on the same batch, so that equal fields give a difference of exactly 0.

    Args:
        x, adjoint: (B, *); w, sigma: (B,).
        mask: broadcastable to (B, *), 0 on padding.

    Returns:
        loss (B,), and ‖f_θ - f_β‖² (B,), detached.
    """
    with torch.no_grad():
        base = reference(x, w)
    delta = (policy(x, w) - base).to(x.dtype)
    residual = 2.0 * delta / over(sigma, x) + over(sigma, x) * adjoint
    if mask is not None:
        residual, delta = residual * mask, delta * mask
    return residual.square().flatten(1).sum(-1), delta.detach().square().flatten(1).sum(-1)


def qam_loss(
    policy: Field,
    reference: Field,
    q: Callable[[Tensor], Tensor],
    noise: Tensor,
    *,
    inv_temp: float,
    sigma: Sigma = "memoryless",
    rollout: Rollout = "policy",
    endpoint: Endpoint = "generated",
    adjoint: Adjoint = "lean",
    samples: int = 1,
    step_subset: int | None = None,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    clip: float | None = 1.0,
    replay_actions: Tensor | None = None,
) -> QAMLoss:
    """One QAM loss on a batch of B states, with M = `samples` trajectories each and N flow steps.

    Args:
        policy, reference: fields (see the module) of f_θ and f_β. Gradients reach the policy's parameters only.
        q: (M·B, H, A) -> (M·B,), the target critic at the states tiled M times; mean or minimum of heads is its choice.
        noise: (N, M·B, H, A) standard normal, tile-major; row 0 is x_0. N is read from here.
        inv_temp: 1/λ.
        sigma: `memoryless`, or `printed` (ablation).
        rollout: who is rolled out. `policy` is right; `reference` is Algorithm 2, line 6, whose fixed point is of first
            order in 1/λ only; `reference_iw` weights its trajectories by exp(Q/λ), self-normalised over a state's M.
        endpoint: `generated` takes the critic's gradient at x_N; `replay_grad` at `replay_actions`, which is the letter
            of Algorithm 2, line 7, and diverges: for study only.
        adjoint: see `lean_adjoint`.
        step_subset: number of steps, drawn without replacement, that enter the loss (scaled to stay unbiased); None:
            all.
        generator: CPU generator of that draw.
        mask: (B, H) bool, False on padding: no loss and no adjoint there.
        clip: actions' bound inside the critic's gradient; None: unbounded.
        replay_actions: (M·B, H, A), for `replay_grad`.

    Returns:
        Loss: mean over states of the (weighted) mean over trajectories of the sum over steps. Metrics: `q` at the
        endpoints, `q_grad` and `adjoint` (root mean square norms), `delta` (same, of f_θ - f_β), `weight_ess`.

    Raises:
        ConfigError: an unknown option, or options that do not go together.
    """
    steps, batch = noise.shape[0], noise.shape[1] // samples
    _check(rollout, endpoint, adjoint, samples, step_subset, steps, noise.shape[1], replay_actions)
    scale = sigmas(steps, sigma, like=noise)
    tiled = None if mask is None else mask.to(noise.dtype).repeat(samples, 1).unsqueeze(-1)

    path = memoryless_rollout((policy if rollout == "policy" else reference)(samples), noise, scale)
    where = path[-1] if endpoint == "generated" or replay_actions is None else replay_actions
    value, gradient = critic_gradient(q, where, clip)
    chosen = _choose(steps, step_subset, generator)
    adjoints = lean_adjoint(reference(samples), path, -inv_temp * gradient, first=chosen[0], mask=tiled, scheme=adjoint)

    # One batched call of each field over the chosen steps: (k·M·B, H, A), steps outermost, as tile-major wants.
    count = len(chosen)
    index = torch.tensor(list(chosen), device=noise.device)
    x, g = path[index].flatten(0, 1), adjoints[index - chosen[0]].flatten(0, 1)
    per_step = torch.stack([index.to(noise.dtype) / steps, scale[index]]).repeat_interleave(samples * batch, dim=1)
    loss, delta = adjoint_matching_loss(
        policy(count * samples),
        reference(count * samples),
        x,
        per_step[0],
        g,
        per_step[1],
        None if tiled is None else tiled.repeat(count, 1, 1),
    )
    by_path = loss.unflatten(0, (count, samples, batch)).sum(0) * (steps / count)
    weight = torch.full_like(by_path, 1.0 / samples)
    if rollout == "reference_iw":
        weight = (inv_temp * value).to(by_path.dtype).unflatten(0, (samples, batch)).softmax(0)
    metrics = {
        "q": value.mean(),
        "q_grad": gradient.square().flatten(1).sum(-1).mean().sqrt(),
        "adjoint": g.square().flatten(1).sum(-1).mean().sqrt(),
        "delta": delta.mean().sqrt(),
        "weight_ess": (1.0 / weight.square().sum(0)).mean(),
    }
    return QAMLoss((weight * by_path).sum(0).mean(), metrics)


def _must_differentiate(value: Tensor, name: str) -> None:
    """A callable that cut the graph would pass for one whose gradient is 0, and the policy would learn nothing."""
    if not value.requires_grad:
        raise ConfigError(
            f"{name} carries no gradient with respect to the actions",
            "freeze its parameters with requires_grad_(False) or detached weights, not with no_grad or inference_mode",
        )


def _choose(steps: int, subset: int | None, generator: torch.Generator | None) -> Sequence[int]:
    if subset is None or subset == steps:
        return range(steps)
    return sorted(torch.randperm(steps, generator=generator)[:subset].tolist())


def _check(
    rollout: str,
    endpoint: str,
    adjoint: str,
    samples: int,
    subset: int | None,
    steps: int,
    rows: int,
    replay_actions: Tensor | None,
) -> None:
    for name, value, known in (
        ("rollout", rollout, ("policy", "reference", "reference_iw")),
        ("endpoint", endpoint, ("generated", "replay_grad")),
        ("adjoint", adjoint, ("lean", "exact")),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is unknown", f"use one of {', '.join(known)}")
    if samples < 1 or rows % samples:
        raise ConfigError(f"noise has {rows} rows, no multiple of samples={samples}", "draw noise for samples × states")
    if rollout == "reference_iw" and samples < 2:
        raise ConfigError("rollout='reference_iw' with samples=1 weights nothing", "set samples to 4 or more")
    if subset is not None and not 1 <= subset <= steps:
        raise ConfigError(f"step_subset={subset} is not within 1..{steps}", "choose fewer steps than the flow has")
    if endpoint == "replay_grad" and replay_actions is None:
        raise ConfigError("endpoint='replay_grad' needs replay_actions", "pass the batch's actions, or use 'generated'")
