"""n-step fields of an episode: what each start's TD target is made of (eq. 2, 19), in numpy.

A *start* is a time step t in 0 … T-1; its window is [t, end). The window ends after n chunks of H steps, at the end
of the episode, or (options) where an operator takes over.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError

TimeLimit = Literal["failure", "bootstrap"]
Takeover = Literal["continue", "cut", "failure"]


class Fields(NamedTuple):
    """Per start: y = reward + discount · V(observation[bootstrap_index]).

    Attributes:
        reward: (T,) float64, Σ γ^(u-t) r_u over the window.
        discount: (T,) float64, γ to the window's length, 0 where nothing is bootstrapped.
        bootstrap_index: (T,) int64 in [1, T]: where the window ends. The start's own chunk is real up to here.
    """

    reward: npt.NDArray[np.float64]
    discount: npt.NDArray[np.float64]
    bootstrap_index: npt.NDArray[np.int64]


def nstep_fields(
    rewards: npt.NDArray[np.floating],
    intervention: npt.NDArray[np.bool_],
    outcome: str,
    horizon: int,
    n: int,
    gamma: float,
    time_limit: TimeLimit = "failure",
    takeover: Takeover = "continue",
) -> Fields:
    """The n-step fields of every start of one episode.

    With e = min(t + nH, T): reward = Σ_{u=t}^{e-1} γ^(u-t) r_u; discount = γ^(nH) where t + nH < T, else 0. The bold r
    of eq. 2 is already discounted within its chunk, so that a success in the window gives exactly γ^(T-1-t).

    Args:
        rewards: (T,), any values (a success has 1 on its last step).
        intervention: (T,) bool, True where an operator acted.
        outcome: `success`, `failure` or `time_limit`.
        horizon: H; n: chunks per window.
        time_limit: `failure` is the paper's (no bootstrap); `bootstrap` takes V(s_T) with γ^(T-t) when time ran out.
        takeover: what a window does that meets the step b where an operator takes over from the policy.
            `continue` is the paper's, silently: the robot's dithering is credited with the operator's success.
            `cut` ends the window at b and bootstraps there. `failure` ends it at b without: the autonomous part failed.
            A window that ends exactly at b has met it.

    Raises:
        ConfigError: an empty episode, arrays of different lengths, or an unknown option.
    """
    steps = len(rewards)
    if steps == 0 or len(intervention) != steps:
        raise ConfigError(
            f"an episode has {steps} rewards and {len(intervention)} intervention flags",
            "give one of each per control step, at least one step",
        )
    if time_limit not in get_args(TimeLimit) or takeover not in get_args(Takeover):
        raise ConfigError(
            f"time_limit={time_limit!r}, takeover={takeover!r}: unknown option",
            f"use time_limit in {get_args(TimeLimit)} and takeover in {get_args(Takeover)}",
        )
    if horizon < 1 or n < 1:
        raise ConfigError(f"horizon={horizon}, n={n}: a window is empty", "use at least 1 of each")

    starts = np.arange(steps)
    end = np.minimum(starts + n * horizon, steps)
    bootstraps = end < steps
    if takeover != "continue":
        boundary = _next_takeover(intervention)
        met = boundary <= end
        end = np.minimum(end, boundary)
        # At the boundary there is always a state to bootstrap from: boundary <= T-1.
        bootstraps = np.where(met, takeover == "cut", bootstraps)
    if time_limit == "bootstrap" and outcome == "time_limit":
        bootstraps = bootstraps | (end == steps)

    reward = np.zeros(steps)
    for u in np.flatnonzero(rewards).tolist():  # sparse: one pass for a success, and no cancellation
        first = max(0, u - n * horizon + 1)
        powers = gamma ** np.arange(u - first, -1, -1, dtype=np.float64)
        reward[first : u + 1] += np.where(end[first : u + 1] > u, powers * float(rewards[u]), 0.0)
    discount = np.where(bootstraps, np.float64(gamma) ** (end - starts), 0.0)
    return Fields(reward, discount, end.astype(np.int64))


def _next_takeover(intervention: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each step, the first later step at which an operator takes over from the policy; T+1 where none does."""
    steps = len(intervention)
    onsets = 1 + np.flatnonzero(intervention[1:] & ~intervention[:-1])
    after = np.searchsorted(onsets, np.arange(steps), side="right")
    return np.append(onsets, steps + 1)[after].astype(np.int64)


def discounted_return(rewards: npt.NDArray[np.floating], gamma: float) -> npt.NDArray[np.float64]:
    """Monte-Carlo return Σ_{u≥t} γ^(u-t) r_u of every step, (T,) -> (T,)."""
    total = np.zeros(len(rewards))
    running = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        running = float(rewards[t]) + gamma * running
        total[t] = running
    return total
