"""Learner updates per second and their share of the matmul peak.

The peak is that of square products (2048 × 2048) in the format that the trunks compute in, measured in turns with the
updates: other work on the machine then slows both, and the share stays. Work is counted by torch's own FLOP counter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lwd_model.agent import LWDAgent
from lwd_model.chunks import Batch
from lwd_model.config import AgentConfig, CriticConfig, LearnerConfig, PolicyConfig, preset
from lwd_model.normaliser import Normaliser
from lwd_model.precision import compute_dtype

OBS, ACTION, HORIZON, TASKS = 86, 5, 5, 8
INSTRUCTIONS = tuple(f"task {i}" for i in range(TASKS))


def state_preset() -> AgentConfig:
    """The state preset: width 256, QAM N = 10 on 64 states, DIVL with 2 critics and cloning on 256."""
    return preset("state", {"obs_dim": OBS, "action_dim": ACTION, "instructions": INSTRUCTIONS})


def plain_4x256() -> AgentConfig:
    """For public numbers: plain networks of 4 hidden layers of 256 (embedding and 3 more), all on 256 states."""
    return AgentConfig(
        PolicyConfig(OBS, ACTION, HORIZON, INSTRUCTIONS, kind="plain"),
        CriticConfig(kind="plain"),
        LearnerConfig(policy_batch=256, step_subset=None),
    )


def random_batch(size: int, seed: int = 0) -> Batch:
    """A batch of the suite's shapes; its values do not matter for speed."""
    g = torch.Generator().manual_seed(seed)
    return Batch(
        obs=torch.randn(size, OBS, generator=g),
        next_obs=torch.randn(size, OBS, generator=g),
        task=torch.randint(TASKS, (size,), generator=g),
        actions=torch.rand(size, HORIZON, ACTION, generator=g) * 2 - 1,
        mask=torch.ones(size, HORIZON, dtype=torch.bool),
        reward=torch.rand(size, generator=g).round(),
        discount=torch.full((size,), 0.8),
        mc_return=torch.rand(size, generator=g),
        intervention=torch.zeros(size, dtype=torch.bool),
        clone_weight=torch.ones(size),
        index=torch.arange(size),
        online=torch.zeros(size, dtype=torch.bool),
    )


def matmul_peak(dtype: torch.dtype, threads: int, seconds: float = 0.3, size: int = 2048) -> float:
    """FLOP/s of square products."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a = torch.randn(size, size, dtype=dtype)
    torch.mm(a, a)
    rate = rate_of(lambda: torch.mm(a, a), seconds)
    torch.set_num_threads(before)
    return rate * 2 * size**3


def measure(
    config: AgentConfig,
    threads: int,
    dtype: torch.dtype | None = None,
    rounds: int = 7,
    seconds: float = 1.0,
    peak_size: int = 2048,
) -> dict[str, Any]:
    """Updates/s and share of peak of one configuration; medians over rounds of peak, `seconds` of updates, peak."""
    device = torch.device("cpu")
    chosen = dtype or compute_dtype(device, min(config.policy.width, config.critic.width))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    stats = Normaliser(np.zeros(OBS, np.float32), np.ones(OBS, np.float32))
    agent = LWDAgent(config, stats, dtype=chosen, parallel=threads >= 2)
    batch, g = random_batch(config.learner.batch), torch.Generator().manual_seed(0)
    agent.parallel = False
    for _ in range(3):
        agent.update(batch, g)
    with FlopCounterMode(display=False) as counter:
        agent.update(batch, g)
    agent.parallel = threads >= 2
    work = counter.get_total_flops()
    agent.update(batch, g)
    turns = []
    for _ in range(rounds):
        peak = matmul_peak(chosen, threads, 0.3 * seconds, peak_size)
        rate = rate_of(lambda: agent.update(batch, g), seconds)
        turns.append(
            (rate, peak, rate * work / (0.5 * (peak + matmul_peak(chosen, threads, 0.3 * seconds, peak_size))))
        )
    return {
        "updates_per_s": round(statistics.median(t[0] for t in turns), 2),
        "share_of_matmul_peak": round(statistics.median(t[2] for t in turns), 3),
        "best_updates_per_s": round(max(t[0] for t in turns), 2),
        "matmul_gflops": round(statistics.median(t[1] for t in turns) / 1e9, 1),
        "gflop_per_update": round(work / 1e9, 2),
        "dtype": str(chosen).removeprefix("torch."),
        "threads": threads,
        "network": f"{config.policy.kind}, width {config.policy.width}, {config.policy.blocks} blocks",
        "batch": config.learner.batch,
        "policy_batch": config.learner.policy_batch,
        "step_subset": config.learner.step_subset,
    }


def rate_of(call: Callable[[], Any], seconds: float) -> float:
    """Calls a second, over at least `seconds`."""
    count, start = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return count / elapsed
