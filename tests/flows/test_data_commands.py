"""`lwd data`: each command does what it says to a deployment, and names what it cannot do."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from flows.data import app
from infra.catalog.schema import collections, dead_letters, outbox, quarantine
from infra.coordinator import Coordinator
from infra.episode import Episode, encode
from infra.errors import ConfigError, CorruptDataError, LwdError
from infra.events.outbox import OutboxLog
from infra.ingest import Ingest
from infra.plane import open_catalog, open_objects
from infra.settings import load_settings
from infra.snapshots import Snapshots

Make = Callable[..., Episode]


class Plane:
    """A deployment in a folder, and `lwd data` on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        settings = load_settings(home=home)
        self.catalog = open_catalog(settings, migrate=True)
        self.objects = open_objects(settings)
        self.ingest = Ingest(self.catalog, self.objects)
        self.snapshots = Snapshots(self.catalog)

    def submit(self, *episodes: Episode) -> None:
        for episode in episodes:
            data = encode(episode)
            sha256 = hashlib.sha256(data).hexdigest()
            self.ingest.submit(episode.robot_id, episode.episode_id, data, sha256, len(data))

    def coordinate(self, check: Callable[[Episode], list[object]] = lambda episode: []) -> None:
        worker = Coordinator(self.catalog, self.objects, OutboxLog(self.catalog), check)  # type: ignore[arg-type]
        while worker.step():
            pass
        worker.lease.release()

    def lwd(self, *arguments: object) -> str:
        """What the command prints; its LwdError is raised."""
        words = [str(argument) for argument in arguments]
        done = CliRunner().invoke(app, [*words, "--home", str(self.home)], env={"COLUMNS": "160"})
        if isinstance(done.exception, LwdError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    def rows(self, table: sa.Table) -> list[sa.Row[tuple[object, ...]]]:
        with self.catalog.read() as connection:
            return list(connection.execute(sa.select(table)))


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plane:
    monkeypatch.chdir(tmp_path)
    return Plane(tmp_path / "home")


def test_revoke_removes_refuses_and_collect_frees(plane: Plane, make_episode: Make) -> None:
    bad = [make_episode(seed, robot_id="r2") for seed in range(3)]
    plane.submit(make_episode(9, robot_id="r1"), *bad)
    plane.coordinate()
    said = plane.lwd("revoke", "r2", "--since", "0", "--reason", "loose gripper", "--actor", "anna")
    assert said == "r2: 3 episodes removed by snapshot 2, 1 remain"
    assert {row.stage for row in plane.rows(quarantine)} == {"revoked"}
    assert "nothing of it is in snapshot 2" in plane.lwd("revoke", "r7", "--since", "2026-01-01", "--reason", "x")
    assert plane.lwd("collect", "--keep-days", "30") == "0 objects freed, 0.0 MiB; the oldest snapshot kept is 0"
    freed = plane.lwd("collect", "--keep-days", "0", "--actor", "anna")
    assert freed.startswith("3 objects freed") and freed.endswith("the oldest snapshot kept is 2")
    assert [row.actor for row in plane.rows(collections)] == ["anna"]
    assert len(list(plane.objects.list("episodes"))) == 1
    assert plane.lwd("verify", "--read").endswith("1 objects read, 0 damaged")


def test_times_are_iso_or_seconds(plane: Plane, make_episode: Make) -> None:
    plane.submit(make_episode(1))
    plane.coordinate()
    hour = 3600.0
    ahead = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + hour))
    later = str(time.time() + 2 * hour)
    assert "nothing" in plane.lwd("revoke", "r0", "--since", ahead, "--until", later, "--reason", "x")
    before = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - hour))
    assert "1 episodes removed" in plane.lwd("revoke", "r0", "--since", before, "--until", ahead, "--reason", "x")
    with pytest.raises(ConfigError, match="--since 'yesterday' is no time"):
        plane.lwd("revoke", "r0", "--since", "yesterday", "--reason", "x")
    with pytest.raises(ConfigError, match="since .* is after until"):
        plane.lwd("revoke", "r0", "--since", "5", "--until", "4", "--reason", "x")


def test_release_sends_a_stage_or_some_ids_through_the_checks_again(plane: Plane, make_episode: Make) -> None:
    refused = [make_episode(seed) for seed in range(3)]
    plane.submit(*refused)
    plane.coordinate(lambda episode: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="nothing to release"):
        plane.lwd("release")
    with pytest.raises(ConfigError, match=f"{'0' * 32} cannot be released"):
        plane.lwd("release", refused[0].episode_id, "0" * 32)
    assert len(plane.rows(quarantine)) == 3
    assert plane.lwd("release", refused[0].episode_id).startswith("1 episodes")
    assert plane.lwd("release", "--stage", "influence").startswith("0 episodes")
    assert plane.lwd("release", "--stage", "contract").startswith("2 episodes")
    plane.coordinate()
    assert plane.rows(quarantine) == [] and plane.snapshots.latest().episodes == 3
    plane.snapshots.withdraw([refused[1].episode_id], reason="unreadable", writer="reader")
    assert plane.lwd("release", "--stage", "read").startswith("0 episodes")


def test_reconcile_announces_what_was_lost(plane: Plane, make_episode: Make) -> None:
    plane.submit(make_episode(1), make_episode(2))
    with plane.catalog.begin() as connection:
        connection.execute(outbox.delete())
    plane.objects.put("incoming/r0/left", b"x")
    numbers = [word for word in plane.lwd("reconcile", "--grace", "0").split() if word.isdigit()]
    assert numbers == ["2", "0", "0", "1", "0"]
    plane.coordinate()
    assert plane.snapshots.latest().episodes == 2


def test_verify_names_what_is_damaged(plane: Plane, make_episode: Make) -> None:
    plane.submit(make_episode(1), make_episode(2))
    plane.coordinate()
    assert plane.lwd("verify").startswith("1 snapshots match their digests; the oldest kept whole is 0 2 committed")
    first, second = plane.snapshots.episodes(1)
    plane.objects.put(first.key, b"other bytes")
    plane.objects.delete(second.key)
    with pytest.raises(CorruptDataError, match="2 objects of committed episodes are damaged or gone"):
        plane.lwd("verify", "--read")
    with plane.catalog.begin() as connection:
        connection.exec_driver_sql("UPDATE episodes SET sha256 = 'x'")
    with pytest.raises(CorruptDataError, match="does not match its digest"):
        plane.lwd("verify")


def test_dead_letters_are_shown_with_their_reasons(plane: Plane) -> None:
    with plane.catalog.begin() as connection:
        for position in range(3):
            values = {"log": "lwd.episodes", "partition": 1, "position": position, "created_at": 1.7e9 + position}
            connection.execute(dead_letters.insert().values(payload="{" * 100, reason=f"no JSON {position}", **values))
    said = plane.lwd("dead-letters", "--last", "2")
    assert "no JSON 2" in said and "no JSON 1" in said and "no JSON 0" not in said and said.endswith("3 in all")
