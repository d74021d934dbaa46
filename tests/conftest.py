"""What every test shares: one thread, no telemetry, and small episodes made from a seed."""

from __future__ import annotations

import logging
import os

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}.items():
    os.environ.setdefault(_name, _value)

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_disk import small_disk

from infra.episode import Episode


@pytest.fixture(autouse=True)
def _log_of_each_test() -> Iterator[None]:
    """A process's log that a test sets up ends with it: the stream that it writes to is that test's own."""
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    yield
    root.handlers[:] = kept
    root.setLevel(level)


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    """Factory of valid episodes: `make_episode(seed, steps=…, success=…, **fields to replace)`."""

    def make(seed: int = 0, *, steps: int = 12, obs_dim: int = 7, success: bool = True, **replaced: Any) -> Episode:
        rng = np.random.default_rng(seed)
        rewards = np.zeros(steps, np.float32)
        rewards[-1] = float(success)
        fields: dict[str, Any] = {
            "episode_id": rng.bytes(16).hex(),
            "robot_id": "r0",
            "task": "S1",
            "instruction": "open the drawer",
            "source": "online",
            "outcome": "success" if success else "time_limit",
            "policy_version": 1,
            "observations": rng.normal(size=(steps + 1, obs_dim)).astype(np.float32),
            "actions": rng.uniform(-1, 1, size=(steps, 5)).astype(np.float32),
            "rewards": rewards,
            "intervention": np.zeros(steps, bool),
            "timestamps": np.arange(steps + 1) * 0.05,
            "substep_scores": (float(success),),
            "started_at": 1.7e9 + seed,
        }
        return Episode(**(fields | replaced))

    return make


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB where the user may mount one; left to nobody at the end, or it is an error."""
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder
