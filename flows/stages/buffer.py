"""Stage `buffer`: the accepted episodes as WebDataset shards with an index, checked for composition → data/buffer."""

from __future__ import annotations

import json
from dataclasses import asdict

from data_contracts.contract import load_contract
from data_contracts.suites import validate_buffer
from flows.params import Params
from flows.stages.common import BUFFER, QUARANTINE, write_metrics
from flows.stages.validate import SOURCES
from infra.errors import ConfigError
from lwd_model.shards import read_buffer, write_buffer


def run(params: Params) -> None:
    refused = {row["episode_id"] for row in json.loads((QUARANTINE / "quarantine.json").read_text())}
    episodes = [e for folder in SOURCES for e in read_buffer(folder) if e.episode_id not in refused]
    report = validate_buffer(load_contract("offline_buffer"), episodes)
    if not report.success:
        first = next(v for v in report.violations if v.severity == "block")
        raise ConfigError(
            f"the offline buffer breaks its contract: {first.message}",
            f"collect more of what is missing, or have {first.owner} change the bound in offline_buffer.odcs.yaml",
        )
    index = write_buffer(episodes, BUFFER)
    write_metrics("buffer", {"episodes": index.episodes, "steps": index.steps, "shards": len(index.shards)})
    (BUFFER / "composition.json").write_text(json.dumps(asdict(index)["composition"], indent=1, allow_nan=False) + "\n")
