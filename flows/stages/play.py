"""Stage `play`: the policy runs until it is off the road, an operator recovers → data/play."""

from __future__ import annotations

from flows.console import progress
from flows.params import Params
from flows.stages.common import BUNDLE, PLAY, SFT, counted
from infra.fleet.sources import play
from lwd_model.shards import write_buffer


def run(params: Params) -> None:
    per_task = params.play.per_task
    episodes = play(SFT / BUNDLE, params.tasks, per_task, params.seed, workers=params.workers)
    with progress("play", len(params.tasks) * per_task) as advance:
        write_buffer(counted(episodes, advance), PLAY)
