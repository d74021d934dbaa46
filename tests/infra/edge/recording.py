"""Records small episodes through an EdgeClient, for tests."""

from __future__ import annotations

import numpy as np

from infra.edge.client import EdgeClient
from infra.edge.framelog import Frame


def record_episode(client: EdgeClient, *, steps: int = 6, version: int | None = 1) -> str:
    """One successful episode of random numbers, D = 7, A = 5; returns its id."""
    rng = np.random.default_rng(steps)
    episode_id = client.begin("S1", "open the drawer", source="online", policy_version=version)
    for t in range(steps):
        observation, action = rng.normal(size=7).astype(np.float32), rng.uniform(-1, 1, 5).astype(np.float32)
        client.record(Frame(observation, action, float(t == steps - 1), False, 0.05 * t))
    client.close(rng.normal(size=7).astype(np.float32), 0.05 * steps, "success", (1.0,))
    return episode_id
