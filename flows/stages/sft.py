"""Stage `sft`: flow matching on the demonstrations → models/sft, with an early checkpoint beside the final one."""

from __future__ import annotations

from flows.console import progress
from flows.params import Params
from flows.stages.checked import checked_episodes
from flows.stages.common import (
    BUNDLE,
    CHECKPOINT,
    DEMONSTRATIONS,
    EARLY,
    SFT,
    agent_config,
    fresh_folder,
    put_in_place,
    replay_for,
    write_metrics,
    write_plot,
)  # fmt: skip
from lwd_model.bundle import export_bundle
from lwd_model.health import stop_unless_finite
from lwd_model.learner import Learner
from lwd_model.normaliser import Normaliser


def run(params: Params) -> None:
    """Raises DivergedError when a number is not finite; models/sft is then as it was."""
    config = agent_config(params, **params.offline.learner | {"updates": params.sft.updates})
    episodes, refused = checked_episodes(DEMONSTRATIONS, params.sft.refused_max)
    replay = replay_for(config)
    for episode in episodes:
        replay.add(episode)
    normaliser = Normaliser.fit(episode.observations for episode in episodes)
    learner = Learner(config, normaliser, seed=params.seed, threads=params.workers)
    agent, rows = learner.agent, []

    part = fresh_folder(SFT)
    with progress("SFT", params.sft.updates) as advance:

        def on_step(update: int, metrics: dict[str, float] | None) -> None:
            if metrics is not None:
                stop_unless_finite(metrics, update, f"see what {DEMONSTRATIONS} holds, and the learning rate")
                rows.append({"update": update, "loss": metrics["sft/loss"]})
            if update == params.sft.early:
                export_bundle(agent.deployed, normaliser, config.policy, part / EARLY)
            advance(1, f"loss {rows[-1]['loss']:.3f}" if rows else "")

        learner.fit(
            lambda rng: replay.sample(config.learner.batch, rng, balanced=True),
            params.sft.updates,
            stage="sft",
            on_step=on_step,
            metrics_every=min(50, params.sft.updates),
        )
    export_bundle(agent.deployed, normaliser, config.policy, part / BUNDLE)
    learner.save(part / CHECKPOINT)
    put_in_place(part, SFT)
    write_plot("sft", rows)
    write_metrics(
        "sft",
        {"loss": rows[-1]["loss"], "demonstrations": len(episodes), "refused": refused, "updates": params.sft.updates},
    )
