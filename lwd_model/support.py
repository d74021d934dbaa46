"""The categorical support of the value distribution: projection, mean, entropy and quantiles (appendix A1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from infra.errors import ConfigError

CDF_TOLERANCE = 1e-6  # a float32 CDF reaches 1 - 1e-7 where it should reach 1


class Support(nn.Module):
    """K equally spaced atoms on [v_min, v_max]; the paper uses 201 on [-0.1, 1.1].

    A module only for its buffer, so that it moves with the agent that holds it; it has no parameters and leaves
    nothing in a state dict.

    Attributes:
        atoms: (K,) float32, ascending.
        spacing: distance of two neighbouring atoms, in units of return.

    Raises:
        ConfigError: fewer than two atoms, or v_min not below v_max.
    """

    atoms: Tensor

    def __init__(self, v_min: float = -0.1, v_max: float = 1.1, atoms: int = 201) -> None:
        super().__init__()
        if atoms < 2 or not v_min < v_max:
            raise ConfigError(
                f"value support [{v_min}, {v_max}] with {atoms} atoms is empty",
                "give v_min < v_max and at least 2 atoms",
            )
        self.v_min, self.v_max, self.size = v_min, v_max, atoms
        self.spacing = (v_max - v_min) / (atoms - 1)
        self.register_buffer(
            "atoms", torch.linspace(v_min, v_max, atoms, dtype=torch.float64).float(), persistent=False
        )

    def neighbours(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The lower neighbouring atom of each value, and the mass of the upper one.

        Args:
            values: (B,), clipped to the support here.

        Returns:
            lower: (B,) int64 in [0, K-2]; weight: (B,) in [0, 1], the mass of atom `lower + 1`.
        """
        position = (values.clamp(self.v_min, self.v_max) - self.v_min) / self.spacing
        lower = position.floor().clamp(0, self.size - 2)
        return lower.long(), (position - lower).clamp(0.0, 1.0)

    def project(self, values: Tensor) -> Tensor:
        """Two-hot distribution on the two neighbouring atoms (C51 projection of a point).

        Args:
            values: (B,), clipped to the support.

        Returns:
            (B, K) probabilities, whose mean is the clipped value.
        """
        lower, weight = self.neighbours(values)
        probs = values.new_zeros((*values.shape, self.size))
        probs.scatter_(-1, lower.unsqueeze(-1), (1.0 - weight).unsqueeze(-1))
        return probs.scatter_(-1, (lower + 1).unsqueeze(-1), weight.unsqueeze(-1))

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax (eq. 20) in at least float32, whatever the precision of the logits. (B, K) -> (B, K)."""
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def mean(self, probs: Tensor) -> Tensor:
        """Expectation of the distribution. (B, K) -> (B,)."""
        return probs @ self.atoms.to(probs.dtype)

    def entropy(self, probs: Tensor) -> Tensor:
        """Normalised entropy (eq. 17, 24), in [0, 1]. (B, K) -> (B,)."""
        return (-torch.xlogy(probs, probs).sum(-1) / math.log(self.size)).clamp(0.0, 1.0)

    def quantile(self, probs: Tensor, tau: Tensor, *, interpolate: bool = False) -> Tensor:
        """The tau-quantile (eq. 23): the first atom whose CDF reaches tau.

        With `interpolate`, the CDF is linear instead of a staircase: the mass of an atom is spread evenly over its
        own cell (atom ± spacing/2), so that one backup can move a value by less than an atom. At tau = 1/2 it adds
        no drift to a concentrated distribution; the staircase rounds by up to one spacing at every backup.

        Args:
            probs: (B, K).
            tau: (B,) or scalar, in (0, 1].

        Returns:
            (B,) in [v_min, v_max].
        """
        tau = tau.expand(probs.shape[:-1])
        cdf = probs.cumsum(-1)
        first = (cdf < (tau - CDF_TOLERANCE).unsqueeze(-1)).sum(-1).clamp_max(self.size - 1)
        values = self.atoms.to(probs.dtype)[first]
        if not interpolate:
            return values
        mass = probs.gather(-1, first.unsqueeze(-1)).squeeze(-1)
        below = cdf.gather(-1, first.unsqueeze(-1)).squeeze(-1) - mass
        share = ((tau - below) / mass.clamp_min(torch.finfo(probs.dtype).tiny)).clamp(0.0, 1.0)
        return (values + (share - 0.5) * self.spacing).clamp(self.v_min, self.v_max)
