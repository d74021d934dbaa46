"""Stage `offline`: DIVL and QAM on the offline buffer, from the SFT policy → models/offline (Algorithm 1, stage 1)."""

from __future__ import annotations

from flows.console import progress
from flows.params import Params
from flows.stages.checked import checked_episodes
from flows.stages.common import (
    BUFFER,
    BUNDLE,
    CHECKPOINT,
    OFFLINE,
    SFT,
    fresh_folder,
    n_step,
    put_in_place,
    replay_for,
    write_metrics,
    write_plot,
)  # fmt: skip
from lwd_model.bundle import export_bundle
from lwd_model.health import stop_unless_finite
from lwd_model.learner import Learner


def run(params: Params) -> None:
    learner = Learner.resume(
        SFT / CHECKPOINT, params.offline.learner | {"updates": params.offline.updates}, threads=params.workers
    )
    agent, config = learner.agent, learner.config
    replay = replay_for(config)
    for episode in checked_episodes(BUFFER, 0.0)[0]:
        replay.add(episode, n_step(episode.task, config.learner))
    agent.start_rl()
    part = fresh_folder(OFFLINE)
    rows: list[dict[str, float]] = []

    with progress("offline RL", params.offline.updates) as advance:

        def on_step(update: int, metrics: dict[str, float] | None) -> None:
            if metrics is not None:
                stop_unless_finite(metrics, update, f"see what {BUFFER} holds, and offline.learner in params.yaml")
                rows.append({"update": update, **metrics})
            advance(1, f"Q {metrics['divl/q']:.3f}  target {metrics['divl/target']:.3f}" if metrics else "")

        learner.fit(
            lambda rng: replay.sample(config.learner.batch, rng, balanced=True),
            params.offline.updates,
            on_step=on_step,
            metrics_every=min(20, params.offline.updates),
        )
    export_bundle(agent.deployed, agent.normaliser, config.policy, part / BUNDLE)
    learner.save(part / CHECKPOINT)
    put_in_place(part, OFFLINE)
    write_plot("offline", rows)
    write_metrics("offline", {**rows[-1], "samples": len(replay), "episodes": len(replay.episodes)})
