"""The history checker passes a run that went well, and names each invariant that was broken behind its back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from bench.actors import made
from bench.history import check
from data_contracts.checks import default_check
from infra.catalog import Catalog
from infra.catalog.schema import episodes, quarantine, snapshot_episodes
from infra.coordinator import Coordinator
from infra.episode import encode
from infra.errors import CorruptDataError
from infra.events.outbox import OutboxLog
from infra.ingest import Ingest
from infra.objects.directory import DirectoryStore
from infra.snapshots import Snapshots


@dataclass
class Run:
    """Six episodes that went through the data plane, one of them refused by the contract."""

    home: Path
    catalog: Catalog
    objects: DirectoryStore
    lines: list[dict[str, Any]]
    reader: Path

    def verdict(self) -> Any:
        return check(self.catalog, self.objects, self.lines, self.reader)

    def execute(self, statement: sa.Executable) -> None:
        with self.catalog.begin() as connection:
            connection.execute(statement)

    @property
    def member(self) -> str:
        return str(self.lines[0]["id"])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    catalog, objects = Catalog(f"sqlite:///{tmp_path}/catalog.db"), DirectoryStore(tmp_path / "objects")
    catalog.migrate()
    ingest = Ingest(catalog, objects)
    coordinator = Coordinator(catalog, objects, OutboxLog(catalog), default_check, micro_batch=2)
    rng, lines = np.random.default_rng(0), []
    for number in range(6):
        episode = made(rng, "a0", breach=number == 3)
        data = encode(episode)
        sha256 = hashlib.sha256(data).hexdigest()
        ingest.submit("a0", episode.episode_id, data, sha256, len(data))
        lines.append({"op": "closed", "id": episode.episode_id, "sha256": sha256,
                      "breach": number == 3})  # fmt: skip
        lines.append({"op": "sent", "id": episode.episode_id})
    read = []
    while coordinator.step():
        latest = Snapshots(catalog).latest()
        read.append({"after": latest.version - 1, "version": latest.version, "digest": latest.digest,
                     "added": latest.added, "removed": latest.removed})  # fmt: skip
    reader = tmp_path / "reader.jsonl"
    reader.write_text("".join(json.dumps(line) + "\n" for line in read))
    return Run(tmp_path, catalog, objects, lines, reader)


def test_what_went_well_passes(run: Run) -> None:
    verdict = run.verdict()
    assert verdict.broken == []
    assert (verdict.spooled, verdict.in_snapshot, verdict.quarantined) == (6, 5, 1)
    assert verdict.quarantined_by_stage == {"contract": 1} and verdict.breaches == 1
    assert (verdict.unaccounted, verdict.duplicates_in_snapshot, verdict.snapshots) == (0, 0, 3)
    assert verdict.objects_read_again == 5


def test_an_episode_whose_line_was_not_written_is_accounted_for_all_the_same(run: Run) -> None:
    run.lines = run.lines[2:]  # its robot was killed before it could log that it had closed it
    assert run.verdict().spooled == 6


def forget(run: Run) -> None:
    run.lines.append({"op": "closed", "id": "f" * 32, "sha256": "0" * 64})


def lose(run: Run) -> None:
    run.lines.append({"op": "closed", "id": "f" * 32, "sha256": "0" * 64})
    run.lines.append({"op": "sent", "id": "f" * 32})


def both(run: Run) -> None:
    with run.catalog.read() as connection:
        row = connection.execute(sa.select(episodes).where(episodes.c.episode_id == run.member)).one()
    values = {name: getattr(row, name) for name in ("episode_id", "sha256", "robot_id", "key")}
    run.execute(quarantine.insert().values(**values, stage="read", reasons=[], created_at=0.0))


def claim_a_breach(run: Run) -> None:
    run.lines[0]["breach"] = True


def claim_none(run: Run) -> None:
    run.lines[6]["breach"] = False


def replace_object(run: Run) -> None:
    with run.catalog.read() as connection:
        key = connection.execute(sa.select(episodes.c.key).where(episodes.c.episode_id == run.member)).scalar_one()
    run.objects.put(key, b"other bytes")


def delete_object(run: Run) -> None:
    with run.catalog.read() as connection:
        key = connection.execute(sa.select(episodes.c.key).where(episodes.c.episode_id == run.member)).scalar_one()
    run.objects.delete(key)


def go_back(run: Run) -> None:
    lines = run.reader.read_text().splitlines()
    run.reader.write_text("\n".join([lines[0], lines[1], lines[1], lines[2]]) + "\n")


def other_digest(run: Run) -> None:
    lines = [json.loads(line) for line in run.reader.read_text().splitlines()]
    lines[1]["digest"] = "0" * 64
    run.reader.write_text("".join(json.dumps(line) + "\n" for line in lines))


def stay_behind(run: Run) -> None:
    run.reader.write_text("\n".join(run.reader.read_text().splitlines()[:2]) + "\n")


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        (forget, "I1: episode f{32} is neither in a snapshot nor in quarantine"),
        (both, "I1: episode .* is both in the snapshot and in quarantine"),
        (claim_a_breach, "contract: episode .* breaks it, and is in the snapshot"),
        (claim_none, "contract: episode .* keeps it, and was refused"),
        (lose, "I7: f{32} was acknowledged"),
        (replace_object, "I4: the object of .* has other bytes"),
        (delete_object, "I4, I7: .*"),
        (go_back, "I3: the reader went from 2 by 1 to 2"),
        (other_digest, "I4: snapshot 2 had another digest"),
        (stay_behind, "I4: the reader holds .* at 2"),
    ],
)
def test_what_is_broken_is_named(run: Run, breaking: Callable[[Run], None], said: str) -> None:
    breaking(run)
    broken = "\n".join(run.verdict().broken)
    assert re.search(said, broken), broken


def test_a_member_that_appears_in_an_old_snapshot_breaks_the_chain(run: Run) -> None:
    run.execute(snapshot_episodes.update().where(snapshot_episodes.c.episode_id == run.member).values(added=3))
    with pytest.raises(CorruptDataError, match="snapshot 1"):
        run.verdict()
