"""Stage `sft`: flow matching on the demonstrations → models/sft, with an early checkpoint beside the final one."""

from __future__ import annotations

from flows.console import progress
from flows.params import Params
from flows.stages.common import (
    BUNDLE,
    CHECKPOINT,
    DEMONSTRATIONS,
    EARLY,
    SFT,
    agent_config,
    replay_for,
    write_metrics,
    write_plot,
)  # fmt: skip
from lwd_model.bundle import export_bundle
from lwd_model.learner import Learner
from lwd_model.normaliser import Normaliser
from lwd_model.shards import read_buffer


def run(params: Params) -> None:
    config = agent_config(params, **params.offline.learner | {"updates": params.sft.updates})
    episodes = list(read_buffer(DEMONSTRATIONS))
    replay = replay_for(config)
    for episode in episodes:
        replay.add(episode)
    normaliser = Normaliser.fit(episode.observations for episode in episodes)
    learner = Learner(config, normaliser, seed=params.seed, threads=params.workers)
    agent, rows = learner.agent, []

    with progress("SFT", params.sft.updates) as advance:

        def on_step(update: int, metrics: dict[str, float] | None) -> None:
            if metrics is not None:
                rows.append({"update": update, "loss": metrics["sft/loss"]})
            if update == params.sft.early:
                export_bundle(agent.deployed, normaliser, config.policy, SFT / EARLY)
            advance(1, f"loss {rows[-1]['loss']:.3f}" if rows else "")

        learner.fit(
            lambda rng: replay.sample(config.learner.batch, rng, balanced=True),
            params.sft.updates,
            stage="sft",
            on_step=on_step,
        )
    export_bundle(agent.deployed, normaliser, config.policy, SFT / BUNDLE)
    learner.save(SFT / CHECKPOINT)
    write_plot("sft", rows)
    write_metrics("sft", {"loss": rows[-1]["loss"], "demonstrations": len(episodes), "updates": params.sft.updates})
