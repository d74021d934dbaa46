"""Flow matching: the behaviour-cloning loss and the Euler sampler (eq. 7, 34).

Flow time w runs from 0 (noise) to 1 (data).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A velocity field at fixed states: (x (B, *), w 0-d or (B,)) -> (B, *). The states' encoding is closed over."""


def over(w: Tensor, x: Tensor) -> Tensor:
    """`w`, 0-d or (B,), shaped so that it multiplies `x` (B, *)."""
    return w if w.ndim == 0 else w.reshape(-1, *[1] * (x.ndim - 1))


def flow_matching_loss(
    velocity: Velocity,
    actions: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    noise: Tensor,
    w: Tensor,
    over_ranks: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> Tensor:
    """Squared error to the velocity a - noise along the straight path (eq. 7, 34).

    Args:
        velocity: called once with x (B, H, A) and w (B,).
        actions: (B, H, A).
        mask: (B, H) bool, False on padding; None is all True.
        weight: (B,) weight of each sample (0 leaves it out); None is all 1.
        noise: (B, H, A) standard normal; w: (B,) in [0, 1].
        over_ranks: the mean over ranks of the batch's total weight: then the mean of the ranks' losses is the loss of
            their batches together, however unequal their weights.

    Returns:
        Scalar: weighted mean over real action entries; 0 where no entry has weight.
    """
    ww = over(w, actions)
    error = (velocity((1.0 - ww) * noise + ww * actions, w) - (actions - noise)).square()
    share = torch.ones_like(error[..., 0]) if mask is None else mask.to(error.dtype)
    if weight is not None:
        share = share * weight.to(error.dtype).unsqueeze(-1)
    total = (over_ranks(share.sum()) * actions.shape[-1]).clamp_min(torch.finfo(error.dtype).tiny)
    return (error * share.unsqueeze(-1)).sum() / total


def euler(velocity: Velocity, x0: Tensor, steps: int) -> Tensor:
    """Integrate the flow from noise to an action chunk: the deployed sampler.

    Args:
        x0: (B, *) standard normal noise.
        steps: number of Euler steps N; fewer than 10 lose most of what QAM gains.

    Returns:
        (B, *), not clipped.
    """
    times = torch.arange(steps, device=x0.device, dtype=x0.dtype) / steps
    x = x0
    for i in range(steps):
        x = x + velocity(x, times[i]) / steps
    return x
