"""What the value and the critic say along one episode: the data behind the paper's Fig. 6, 8 and 9."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from infra.episode import Episode
from lwd_model.agent import LWDAgent
from lwd_model.divl import adaptive_tau


@torch.no_grad()
def diagnose(agent: LWDAgent, episode: Episode) -> dict[str, npt.NDArray[np.float32]]:
    """Value statistics at every state, and the critic at every executed chunk.

    Returns:
        With T steps and K atoms, float32:
        `value` (T+1,): quantile at tau (the bootstrap's value; the scalar itself for the expectile ablation);
        `mean` (T+1,): of the distribution; `probs` (T+1, K); `tau`, `entropy` (T+1,); `atoms` (K,);
        `q` (T,): minimum over heads at the chunk executed from each step (its end masked where the episode ends).
        Without a distribution, only `value`, `mean` and `q`.
    """
    device = agent.obs_mean.device
    obs = agent.normalise(torch.from_numpy(np.ascontiguousarray(episode.observations)).to(device))
    task = torch.full((len(obs),), agent.config.policy.task_index(episode.instruction), device=device)
    steps, horizon = episode.steps, agent.config.policy.horizon
    where = np.arange(steps)[:, None] + np.arange(horizon)
    actions = torch.from_numpy(episode.actions[np.minimum(where, steps - 1)]).to(device)
    mask = torch.from_numpy(where < steps).to(device)
    q = agent.critic.q(agent.critic.prefix(obs[:-1], task[:-1]), actions, mask).amin(0)
    out = agent.value.logits(obs, task)
    c, support = agent.config.learner, agent.support
    if c.value_kind == "expectile":
        result = {"value": out.squeeze(-1), "mean": out.squeeze(-1), "q": q}
    else:
        probs = support.probs(out)
        entropy = support.entropy(probs)
        alpha = c.alpha if c.tau_kind == "adaptive" else 0.0
        tau = adaptive_tau(entropy, c.tau_base, alpha, c.tau_min, c.tau_max)
        value = support.quantile(probs, tau, interpolate=c.interpolate)
        result = {"value": value, "mean": support.mean(probs), "probs": probs, "tau": tau, "entropy": entropy}
        result |= {"q": q, "atoms": support.atoms}
    return {name: tensor.float().cpu().numpy() for name, tensor in result.items()}
