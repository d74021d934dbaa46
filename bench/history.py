"""The history checker: what the robots' operation logs say, against the catalog and the store; invariants I1 to I4, I7.

The logs say which episodes were closed, which the server acknowledged, and which it confirmed; the reader's log says
which version had which digest when it was new.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from infra.catalog import Catalog
from infra.catalog.schema import dead_letters, episodes, quarantine, snapshot_episodes
from infra.errors import CorruptDataError
from infra.objects import ObjectStore
from infra.snapshots import Snapshots


@dataclass
class Verdict:
    """What a run came to; `broken` names every invariant that does not hold, and the first thing that breaks it."""

    spooled: int
    acknowledged: int
    dead_letters: int  # records of the log that were no events
    breaches: int  # episodes that were made to break the contract
    in_snapshot: int = 0
    quarantined: int = 0
    quarantined_by_stage: dict[str, int] = field(default_factory=dict)
    refused_copies: int = 0  # other bytes under a known id: in quarantine beside the episode
    duplicates_in_snapshot: int = 0
    unaccounted: int = 0
    snapshots: int = 0
    objects_read_again: int = 0
    broken: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(
    catalog: Catalog, objects: ObjectStore, lines: Iterable[dict[str, Any]], reader: Path | None, *, sample: int = 500
) -> Verdict:
    """Hold the system to its logs, once everything is settled.

    Args:
        lines: of the operation logs.
        reader: its log, where there is one.
        sample: members whose objects are read back, besides what the reader has read.

    Raises:
        CorruptDataError: the snapshots do not match their chain of digests.
    """
    closed: dict[str, str] = {}
    breach: dict[str, bool] = {}  # of those whose robot lived to say what it made
    acknowledged: set[str] = set()
    for line in lines:
        if line["op"] == "closed":
            closed[line["id"]] = line["sha256"]
            if "breach" in line:
                breach[line["id"]] = line["breach"]
        elif line["op"] in ("sent", "confirmed"):
            acknowledged.add(line["id"])
    with catalog.read() as connection:
        known = {row.episode_id: row for row in connection.execute(sa.select(episodes))}
        current = sa.select(snapshot_episodes.c.episode_id).where(snapshot_episodes.c.removed.is_(None))
        members = set(connection.execute(current).scalars())
        held = {(row.episode_id, row.sha256): row.stage for row in connection.execute(sa.select(quarantine))}
        dead = int(connection.execute(sa.select(sa.func.count()).select_from(dead_letters)).scalar_one())
    # A robot killed between closing an episode and logging it: the catalog is the witness that there was one.
    claims = {i: row.sha256 for i, row in known.items()} | closed
    breaches = sum(breach.values())
    verdict = Verdict(spooled=len(claims), acknowledged=len(acknowledged), dead_letters=dead, breaches=breaches)
    stages: Counter[str] = Counter()
    for identifier, sha256 in claims.items():
        row, stage = known.get(identifier), held.get((identifier, sha256))
        accepted = identifier in members and row is not None and row.sha256 == sha256
        refused = stage is not None
        if accepted + refused != 1:
            verdict.unaccounted += 1
            verdict.broken.append(f"I1: episode {identifier} is {_where(accepted, refused)}")
        verdict.in_snapshot += accepted
        verdict.quarantined += refused
        if refused:
            stages[stage] += 1
        if accepted and breach.get(identifier):
            verdict.broken.append(f"contract: episode {identifier} breaks it, and is in the snapshot")
        if stage == "contract" and breach.get(identifier) is False:
            verdict.broken.append(f"contract: episode {identifier} keeps it, and was refused")
    verdict.quarantined_by_stage = dict(stages)
    verdict.refused_copies = sum((i, sha256) in held and claims.get(i) != sha256 for i, sha256 in held)
    lost = [i for i in acknowledged if i not in known or known[i].sha256 != claims[i]]
    verdict.broken += [f"I7: {i} was acknowledged and has no row, or another one's" for i in lost]
    _check_snapshots(verdict, catalog, reader)
    rng = random.Random(0)
    for identifier in rng.sample(sorted(members), min(sample, len(members))):
        verdict.objects_read_again += 1
        try:
            data = objects.get(known[identifier].key)
        except CorruptDataError as error:
            verdict.broken.append(f"I4, I7: {error.problem}")
            continue
        if hashlib.sha256(data).hexdigest() != known[identifier].sha256:
            verdict.broken.append(f"I4: the object of {identifier} has other bytes")
    return verdict


def _where(accepted: bool, refused: bool) -> str:
    return (
        "both in the snapshot and in quarantine" if accepted and refused else "neither in a snapshot nor in quarantine"
    )


def _check_snapshots(verdict: Verdict, catalog: Catalog, reader: Path | None) -> None:
    snapshots = Snapshots(catalog)
    verdict.snapshots = snapshots.verify()  # I3: gapless, chained
    latest = snapshots.latest()
    listed = [member.episode_id for member in snapshots.episodes(latest.version)]
    verdict.duplicates_in_snapshot = len(listed) - len(set(listed))
    if verdict.duplicates_in_snapshot:
        verdict.broken.append(f"I2: snapshot {latest.version} repeats {verdict.duplicates_in_snapshot} ids")
    if len(listed) != latest.episodes:
        verdict.broken.append(f"I3: snapshot {latest.version} counts {latest.episodes} of {len(listed)} episodes")
    if reader is None:
        return
    at, size = 0, 0
    for text in reader.read_text().splitlines():
        line = json.loads(text)
        if line["after"] != at or line["version"] <= at:
            verdict.broken.append(f"I3: the reader went from {at} by {line['after']} to {line['version']}")
        if line["digest"] != snapshots.get(line["version"]).digest:
            verdict.broken.append(f"I4: snapshot {line['version']} had another digest when it was new")
        at, size = line["version"], size + line["added"] - line["removed"]
    if (at, size) != (latest.version, latest.episodes):
        verdict.broken.append(
            f"I4: the reader holds {size} episodes at {at}, not {latest.episodes} at {latest.version}"
        )
