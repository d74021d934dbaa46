"""Speeds of the reader: mixed batches out of the replay, and shards against plainly reading the same tars."""

from __future__ import annotations

import io
import statistics
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.speed_fleet import episode
from bench.speed_learner import rate_of
from infra.fleet.tasks import TASKS
from lwd_model.chunks import Replay, mixed_sample
from lwd_model.config import LearnerConfig
from lwd_model.shards import read_buffer, write_buffer

BATCH = 256


def reader(folder: Path, episodes: int, rounds: int, seconds: float, peak: Callable[[], float]) -> dict[str, Any]:
    """Samples/s of 1:1 mixed batches of 256, and the share of a raw tar read that checked, decoded shards reach.

    The shards are read with their digests checked and every array decoded; the raw read only takes the members' bytes
    out of the same files. Both find the files in the page cache, so that the code is measured and not the disk.
    """
    rng = np.random.default_rng(0)
    keys = list(TASKS)
    index = write_buffer((episode(rng, keys[i % len(keys)], "rollout") for i in range(episodes)), folder)
    size = sum(shard.bytes for shard in index.shards)
    config = LearnerConfig()
    offline, online = (Replay([t.instruction for t in TASKS.values()], 5, config.gamma) for _ in range(2))
    for place, one in enumerate(read_buffer(folder)):
        (online if place % 8 == 0 else offline).add(one, config.n_step_short)

    def shards() -> None:
        for _ in read_buffer(folder):
            pass

    turns = []
    for _ in range(rounds):
        flops = peak()
        samples = BATCH * rate_of(lambda: mixed_sample(offline, online, BATCH, rng, balanced=True), seconds)
        read, raw = rate_of(shards, seconds / 2), rate_of(lambda: _raw(folder), seconds / 2)
        turns.append((samples, read, raw, flops))
    samples, read, raw, flops = (statistics.median(turn[i] for turn in turns) for i in range(4))
    return {
        "reader_samples_per_s": round(samples),
        "reader_share_of_raw": round(statistics.median(turn[1] / turn[2] for turn in turns), 3),
        "shard_steps_per_s": round(read * index.steps),
        "shard_mib_per_s": round(read * size / 2**20, 1),
        "raw_mib_per_s": round(raw * size / 2**20, 1),
        "rounds": [round(turn[0]) for turn in turns],
        "batch": BATCH,
        "episodes": episodes,
        "steps": index.steps,
        "matmul_gflops": round(flops / 1e9, 1),
    }


def _raw(folder: Path) -> None:
    """The bytes of every member, and nothing else."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes()), mode="r|") as tar:
            for member in tar:
                handle = tar.extractfile(member)
                assert handle is not None
                handle.read()
