"""Stage `demonstrations`: the scripted expert's successes → data/demonstrations."""

from __future__ import annotations

from flows.console import progress
from flows.params import Params
from flows.stages.common import DEMONSTRATIONS, counted
from infra.fleet.sources import demonstrations
from lwd_model.shards import write_buffer


def run(params: Params) -> None:
    p = params.demonstrations
    episodes = demonstrations(params.tasks, p.per_task, params.seed, noise=p.noise, workers=params.workers)
    with progress("demonstrations", len(params.tasks) * p.per_task) as advance:
        write_buffer(counted(episodes, advance), DEMONSTRATIONS)
