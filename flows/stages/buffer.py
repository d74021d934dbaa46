"""Stage `buffer`: the accepted episodes as WebDataset shards with an index, checked for composition → data/buffer.

Each episode is held to the contract here as well: what stage `validate` wrote decides nothing, it must only agree.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from data_contracts.contract import load_contract
from data_contracts.suites import validate_buffer
from flows.params import Params
from flows.stages.checked import checked_episodes
from flows.stages.common import BUFFER, QUARANTINE, read_refused, write_metrics
from flows.stages.validate import SOURCES
from infra.episode import Episode
from infra.errors import ConfigError
from lwd_model.shards import write_buffer


def run(params: Params) -> None:
    """Raises ConfigError where the buffer breaks its contract, or `validate` refused other episodes than this does."""
    said, refused = {row["episode_id"] for row in read_refused()}, set[str]()
    episodes: list[Episode] = []
    for folder in SOURCES:
        episodes += checked_episodes(folder, 1.0, lambda episode, _: refused.add(episode.episode_id))[0]
    if said != refused:
        first = sorted(said ^ refused)[0]
        known = "not refused by the contract" if first in said else "refused by the contract and not listed"
        raise ConfigError(
            f"{QUARANTINE / 'quarantine.json'} is of other data or another contract: episode {first} is {known}",
            "write it again: `dvc repro -f validate`",
        )
    report = validate_buffer(load_contract("offline_buffer"), episodes)
    if not report.success:
        broken = next(v for v in report.violations if v.severity == "block")
        raise ConfigError(
            f"the offline buffer breaks its contract: {broken.message}",
            f"collect more of what is missing, or have {broken.owner} change the bound in offline_buffer.odcs.yaml",
        )
    index = write_buffer(episodes, BUFFER)
    write_metrics("buffer", {"episodes": index.episodes, "steps": index.steps, "shards": len(index.shards)})
    (BUFFER / "composition.json").write_text(json.dumps(asdict(index)["composition"], indent=1, allow_nan=False) + "\n")
