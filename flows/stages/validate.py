"""Stage `validate`: every collected episode against its contract → data/quarantine, with a page for the stewards."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter

from data_contracts.checks import check_episode
from data_contracts.contract import load_contract
from data_contracts.review import write_review
from data_contracts.suites import validate_batch
from flows.console import progress, red, say
from flows.params import Params
from flows.stages.common import DEMONSTRATIONS, PLAY, QUARANTINE, ROLLOUTS, write_metrics
from infra.episode import Episode, encode
from lwd_model.shards import read_buffer, read_index

SOURCES = (DEMONSTRATIONS, ROLLOUTS, PLAY)


def run(params: Params) -> None:
    contract = load_contract("episode")
    shutil.rmtree(QUARANTINE, ignore_errors=True)
    QUARANTINE.mkdir(parents=True)
    accepted: list[Episode] = []
    refused: list[dict[str, object]] = []
    warnings: Counter[str] = Counter()
    with progress("contracts", sum(read_index(folder).episodes for folder in SOURCES)) as advance:
        for folder in SOURCES:
            for episode in read_buffer(folder):
                violations = check_episode(contract, episode)
                blocking = [v for v in violations if v.severity == "block"]
                warnings.update(v.rule for v in violations if v.severity != "block")
                if blocking:
                    (QUARANTINE / f"{episode.episode_id}.tar").write_bytes(encode(episode))
                    refused.append(
                        {
                            "episode_id": episode.episode_id,
                            "task": episode.task,
                            "source": episode.source,
                            "robot_id": episode.robot_id,
                            "at": time.time(),
                            "reasons": [
                                {"rule": v.rule, "severity": v.severity, "message": v.message, "owner": v.owner}
                                for v in blocking
                            ],
                        }
                    )
                    name = f"{episode.episode_id[:8]} ({episode.source} {episode.task})"
                    say("  ", red("refused"), f" {name}: {blocking[0].message}")
                else:
                    accepted.append(episode)
                advance()
    # The same rules once more over the accepted episodes as one table, in Great Expectations.
    report = validate_batch(contract, accepted)
    (QUARANTINE / "quarantine.json").write_text(json.dumps(refused, indent=1, allow_nan=False) + "\n")
    write_review(QUARANTINE / "review.html", [contract], [report], refused)
    write_metrics(
        "validate",
        {
            "accepted": len(accepted),
            "quarantined": len(refused),
            "warnings": dict(warnings),
            "batch_passed": report.success,
        },
    )
