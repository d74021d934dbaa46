"""A very short offline pipeline's outputs, for tests of the online stage."""

from __future__ import annotations

import functools
from pathlib import Path

import yaml

from flows.params import load_params
from flows.stages.common import BUFFER, BUNDLE, CHECKPOINT, OFFLINE, SFT, agent_config, n_step, replay_for
from infra.fleet.operator import ExpertOperator
from infra.fleet.rollout import run_jobs
from infra.fleet.sources import job_list
from lwd_model.bundle import export_bundle
from lwd_model.learner import Learner
from lwd_model.normaliser import Normaliser
from lwd_model.shards import write_buffer

ROOT = Path(__file__).parents[1]
UPDATES = 60


def fill_workspace(folder: Path, updates: int = UPDATES, **online: object) -> None:
    """Write `params.yaml`, a buffer, and SFT and offline models into `folder`, the current folder.

    Args:
        updates: of the online stage.
        online: others of its parameters.
    """
    from bench.workspace import merged

    small = {
        "tasks": ["S1", "S2"],
        "workers": 1,
        "online": {"robots": 2, "pace": 0.0, "updates": updates, "updates_per_episode": 4, "publish_every": 10,
                   "learner": {"batch": 16, "policy_batch": 8}, **online},
    }  # fmt: skip
    params = merged(yaml.safe_load((ROOT / "params.yaml").read_text()), small)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    loaded = load_params(folder / "params.yaml")
    expert = functools.partial(ExpertOperator, 0.15)
    episodes = run_jobs(None, job_list(loaded.tasks, 2, 0, "demo"), source="demo", operator=expert)
    write_buffer(episodes, BUFFER)
    config = agent_config(loaded, batch=16, policy_batch=8)
    learner = Learner(config, Normaliser.fit(e.observations for e in episodes))
    replay = replay_for(config)
    for episode in episodes:
        replay.add(episode, n_step(episode.task, config.learner))
    learner.fit(lambda rng: replay.sample(16, rng), 5, stage="sft")
    learner.agent.start_rl()
    for place in (SFT, OFFLINE):
        export_bundle(learner.agent.deployed, learner.agent.normaliser, config.policy, place / BUNDLE)
        learner.save(place / CHECKPOINT)
