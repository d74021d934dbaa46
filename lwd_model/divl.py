"""Distributional implicit value learning (section IV-A): losses, adaptive tau, TD targets."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lwd_model.support import Support


@dataclass(frozen=True)
class Target:
    """A TD target and the statistics behind it, all detached.

    Attributes:
        y: (B,) target of both critic heads.
        bootstrap: (B,) value of the bootstrap state, before its discount.
        tau: (B,) quantile level used; entropy: (B,) normalised entropy of the bootstrap state's distribution.
    """

    y: Tensor
    bootstrap: Tensor
    tau: Tensor
    entropy: Tensor


def adaptive_tau(
    entropy: Tensor, tau_base: float, alpha: float, tau_min: float = 0.05, tau_max: float = 0.95
) -> Tensor:
    """Quantile level per state, stop-gradient (eq. 18). `alpha=0` is the constant-tau ablation.

    The bounds are not in the paper; 0.05 and 0.95 keep the quantile inside the distribution.

    Args:
        entropy: (B,) normalised, in [0, 1].

    Returns:
        (B,) in [tau_min, tau_max].
    """
    return (tau_base - alpha * entropy.detach()).clamp(tau_min, tau_max)


def value_loss(logits: Tensor, target_q: Tensor, support: Support) -> Tensor:
    """Cross-entropy to the projected critic target (eq. 12, 21).

    Args:
        logits: (B, K) of the value at s_t.
        target_q: (B,) minimum over the target critic's heads at the replay action; clipped to the support.

    Returns:
        Scalar, mean over the batch. The dense two-hot of `Support.project` is not built: only two atoms have mass.
    """
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    lower, weight = support.neighbours(target_q.detach().to(log_probs.dtype))
    pair = log_probs.gather(-1, torch.stack([lower, lower + 1], dim=-1))
    return -((1.0 - weight) * pair[..., 0] + weight * pair[..., 1]).mean()


@torch.no_grad()
def td_target(
    reward: Tensor,
    discount: Tensor,
    next_logits: Tensor,
    support: Support,
    *,
    tau_base: float,
    alpha: float,
    tau_min: float = 0.05,
    tau_max: float = 0.95,
    interpolate: bool = True,
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> Target:
    """Critic target y = reward + discount · Quant_tau(V(bootstrap state)) (eq. 14, 18, 19).

    The paper's reading is `interpolate=False, clip=None`. With it, a backup that discounts by less than about two
    spacings is rounded away and values stop decaying with the distance to success; see `unresolved_backup`.

    Args:
        reward: (B,) discounted rewards of the window, `returns.Fields.reward`.
        discount: (B,) gamma to the length of the window, 0 where nothing is bootstrapped.
        next_logits: (B, K) of the *target* value at the bootstrap state.
        clip: range of the return, applied to y; None leaves y as it is.
    """
    probs = support.probs(next_logits)
    entropy = support.entropy(probs)
    tau = adaptive_tau(entropy, tau_base, alpha, tau_min, tau_max)
    bootstrap = support.quantile(probs, tau, interpolate=interpolate)
    y = reward + discount * bootstrap
    return Target(y if clip is None else y.clamp(*clip), bootstrap, tau, entropy)


@torch.no_grad()
def scalar_td_target(
    reward: Tensor, discount: Tensor, next_value: Tensor, *, clip: tuple[float, float] | None = (0.0, 1.0)
) -> Tensor:
    """Critic target of the expectile ablation: y = reward + discount · V(bootstrap state) (eq. 5). All (B,)."""
    y = reward + discount * next_value
    return y if clip is None else y.clamp(*clip)


def expectile_loss(value: Tensor, target_q: Tensor, tau: float) -> Tensor:
    """Scalar expectile regression of IQL (eq. 3, 4), the ablation of DIVL. (B,), (B,) -> scalar."""
    error = target_q.detach() - value
    return ((error < 0).to(error.dtype).sub(tau).abs() * error.square()).mean()


def critic_loss(q: Tensor, y: Tensor) -> Tensor:
    """Squared error of every head to the same target (eq. 15).

    Args:
        q: (heads, B); y: (B,).

    Returns:
        Scalar: sum over heads of the mean over the batch, so that a head's gradient does not depend on their number.
    """
    return (q - y.detach()).square().mean(-1).sum()


def unresolved_backup(gamma: float, nstep: int, horizon: int, support: Support) -> bool:
    """Warn where one backup discounts by less than two spacings of the support.

    Then 1 - gamma^(n·H) < 2·spacing, and the quantile's rounding is of the size of the discount: values stick near 1
    however far success is. Called once, when the learner is configured.

    Returns:
        True where it warned.
    """
    step = 1.0 - gamma ** (nstep * horizon)
    if step >= 2.0 * support.spacing:
        return False
    warnings.warn(
        f"one backup discounts by 1 - gamma^(n·H) = {step:.2g} (gamma={gamma}, n={nstep}, H={horizon}), less than two "
        f"spacings of the value support ({2 * support.spacing:.2g}): values will hardly decay with the distance to "
        "success; raise n, lower gamma, or use more atoms",
        stacklevel=2,
    )
    return True
