"""Stage `offline`: DIVL and QAM on the offline buffer, from the SFT policy → models/offline (Algorithm 1, stage 1)."""

from __future__ import annotations

from flows.console import progress
from flows.params import Params
from flows.stages.common import (
    BUFFER,
    BUNDLE,
    CHECKPOINT,
    OFFLINE,
    SFT,
    n_step,
    replay_for,
    write_metrics,
    write_plot,
)  # fmt: skip
from lwd_model.bundle import export_bundle
from lwd_model.learner import Learner
from lwd_model.shards import read_buffer


def run(params: Params) -> None:
    learner = Learner.resume(
        SFT / CHECKPOINT, params.offline.learner | {"updates": params.offline.updates}, threads=params.workers
    )
    agent, config = learner.agent, learner.config
    replay = replay_for(config)
    for episode in read_buffer(BUFFER):
        replay.add(episode, n_step(episode.task, config.learner))
    agent.start_rl()
    rows: list[dict[str, float]] = []

    with progress("offline RL", params.offline.updates) as advance:

        def on_step(update: int, metrics: dict[str, float] | None) -> None:
            if metrics is not None:
                rows.append({"update": update, **metrics})
            advance(1, f"Q {metrics['divl/q']:.3f}  target {metrics['divl/target']:.3f}" if metrics else "")

        learner.fit(
            lambda rng: replay.sample(config.learner.batch, rng, balanced=True),
            params.offline.updates,
            on_step=on_step,
            metrics_every=20,
        )
    export_bundle(agent.deployed, agent.normaliser, config.policy, OFFLINE / BUNDLE)
    learner.save(OFFLINE / CHECKPOINT)
    write_plot("offline", rows)
    write_metrics("offline", {**rows[-1], "samples": len(replay), "episodes": len(replay.episodes)})
