"""Small episodes, batches and agents for the learner's tests; everything seeded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from infra.episode import Episode
from lwd_model.chunks import Batch, Replay
from lwd_model.config import AgentConfig, CriticConfig, LearnerConfig, PolicyConfig
from lwd_model.normaliser import Normaliser

OBS, ACT, H = 6, 2, 3
INSTRUCTIONS = ("go left", "go right")


def episode(seed: int, steps: int = 12, success: bool = True, task: int = 0, source: str = "demo") -> Episode:
    rng = np.random.default_rng(seed)
    rewards = np.zeros(steps, np.float32)
    rewards[-1] = float(success)
    return Episode(
        episode_id=f"{seed:032x}",
        robot_id="r0",
        task=f"S{task + 1}",
        instruction=INSTRUCTIONS[task],
        source=source,  # type: ignore[arg-type]
        outcome="success" if success else "time_limit",
        policy_version=None,
        observations=rng.normal(size=(steps + 1, OBS)).astype(np.float32),
        actions=rng.uniform(-1, 1, (steps, ACT)).astype(np.float32),
        rewards=rewards,
        intervention=np.zeros(steps, bool),
        timestamps=np.arange(steps + 1) * 0.05,
        substep_scores=(float(success),),
        started_at=0.0,
    )


def agent_config(width: int = 32, **learner: Any) -> AgentConfig:
    options: dict[str, Any] = {"batch": 16, "policy_batch": 8, "gamma": 0.9, "step_subset": 2} | learner
    return AgentConfig(
        PolicyConfig(OBS, ACT, H, INSTRUCTIONS, width=width, blocks=2, time_features=8, flow_steps=4),
        CriticConfig(width=width, blocks=1, atoms=41),
        LearnerConfig(**options),
    )


def normaliser() -> Normaliser:
    return Normaliser(np.full(OBS, 0.1, np.float32), np.full(OBS, 1.5, np.float32))


def replay(config: AgentConfig, episodes: int = 6) -> Replay:
    store = Replay(config.policy.instructions, H, config.learner.gamma)
    for i in range(episodes):
        store.add(episode(i, success=i % 2 == 0, task=i % 2, source="rollout"), nstep=2)
    return store


def batch(config: AgentConfig, seed: int = 0) -> Batch:
    return replay(config).sample(config.learner.batch, np.random.default_rng(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
