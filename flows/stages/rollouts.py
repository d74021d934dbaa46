"""Stage `rollouts`: successes and failures of two historical policies, early and final SFT → data/rollouts.

`faults.planted` broken copies are added, as a failing sensor and a wrong unit would make them: the contracts must
catch them in the next stage.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from flows.console import progress
from flows.params import Params
from flows.stages.common import BUNDLE, EARLY, ROLLOUTS, SFT, counted
from infra.episode import Episode, new_episode_id
from infra.fleet.sources import rollouts
from lwd_model.shards import write_buffer


def run(params: Params) -> None:
    p = params.rollouts
    early = round(p.per_task * p.early_share)
    shares = ((SFT / EARLY, early, 0), (SFT / BUNDLE, p.per_task - early, 1))
    episodes = itertools.chain.from_iterable(
        rollouts(bundle, params.tasks, count, params.seed + 7919 * offset, workers=params.workers)
        for bundle, count, offset in shares
        if count
    )
    with progress("rollouts", len(params.tasks) * p.per_task) as advance:
        write_buffer(with_faults(counted(episodes, advance), params.faults.planted), ROLLOUTS)


def with_faults(episodes, planted: int):
    """The episodes, and after each of the first `planted` a broken copy of it."""
    for number, episode in enumerate(episodes):
        yield episode
        if number < planted:
            yield broken(episode, number)


def broken(episode: Episode, kind: int) -> Episode:
    """A copy as a faulty robot would record it: a joint sensor that drops out, or actions in another unit."""
    observations, actions = episode.observations.copy(), episode.actions.copy()
    if kind % 2 == 0:
        observations[len(observations) // 2 :, 0] = np.nan
    else:
        actions *= 57.3
    return dataclasses.replace(
        episode, episode_id=new_episode_id(), robot_id="faulty", observations=observations, actions=actions
    )
