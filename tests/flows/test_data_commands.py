"""`lwd data`: each command does what it says to a deployment, and names what it cannot do."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from flows.cli import app as cli
from flows.data import app
from flows.deployment import deployment
from infra.catalog.leases import Lease
from infra.catalog.schema import collections, dead_letters, outbox, quarantine, robots
from infra.coordinator import Coordinator
from infra.episode import Episode, encode
from infra.errors import ConfigError, ConflictError, CorruptDataError, LwdError
from infra.events.outbox import OutboxLog
from infra.ingest import Ingest
from infra.objects import episode_key
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


def test_verify_and_recover_bring_back_what_the_catalog_lost(plane: Plane, make_episode: Make) -> None:
    kept, lost = [make_episode(seed) for seed in range(2)], [make_episode(seed, robot_id="r7") for seed in (5, 6)]
    plane.submit(*kept)
    plane.coordinate()
    assert "0 objects have no row, 0 rows have no object; 0 episodes wait" in plane.lwd("verify")
    for episode in lost:
        data = encode(episode)
        plane.objects.put(episode_key(hashlib.sha256(data).hexdigest()), data)
    junk = episode_key("0" * 64)
    plane.objects.put(junk, b"noise")
    with pytest.raises(CorruptDataError, match="3 stored objects have no row in the catalog") as caught:
        plane.lwd("verify")
    assert "lwd data recover" in caught.value.fix
    assert "3 stored objects have no row" in plane.lwd("reconcile", "--grace", "0")
    assert len(list(plane.objects.list("episodes"))) == 5, "nothing was deleted"
    said = plane.lwd("recover", "--actor", "anna")
    assert "r7: 2 episodes" in said and f"left as it is: {junk}" in said
    assert said.endswith("2 episodes committed again, 0 put in quarantine, 1 left")
    assert "2 episodes wait" in audit_said(plane)
    plane.coordinate()
    assert plane.snapshots.latest().episodes == 4
    with pytest.raises(ConfigError, match="not an object that the catalog lacks"):
        plane.lwd("discard", plane.snapshots.episodes(2)[0].key)
    assert plane.lwd("discard", junk) == "1 objects deleted"
    assert "2 snapshots match" in plane.lwd("verify", "--read")


def audit_said(plane: Plane) -> str:
    """What `lwd data verify` prints before it ends in an error."""
    done = CliRunner().invoke(app, ["verify", "--home", str(plane.home)], env={"COLUMNS": "160"})
    return " ".join(done.output.split())


def test_a_grace_of_nothing_is_refused_while_somebody_works(plane: Plane, make_episode: Make) -> None:
    plane.objects.put("incoming/r0/under-way", b"x")
    lease = Lease(plane.catalog, "coordinator", 10.0, holder="machine:7")
    lease.acquire()
    with pytest.raises(ConfigError, match=r"grace of 0 s is too short while coordinator \(machine:7\) is at work"):
        plane.lwd("reconcile", "--grace", "0")
    lease.release()
    beat = {"robot_id": "r9", "cohort": "learning", "last_seen": time.time(), "episodes": 1}
    with plane.catalog.begin() as connection:
        connection.execute(robots.insert().values(beat))
    with pytest.raises(ConfigError, match="robot r9"):
        plane.lwd("reconcile", "--grace", "59")
    assert plane.objects.exists("incoming/r0/under-way")
    plane.lwd("reconcile", "--grace", "60")
    assert plane.objects.exists("incoming/r0/under-way")
    with plane.catalog.begin() as connection:
        connection.execute(robots.update().values(last_seen=time.time() - 120.0))
    plane.lwd("reconcile", "--grace", "0")
    assert not plane.objects.exists("incoming/r0/under-way")


def test_a_home_without_its_catalog_is_built_again(plane: Plane, make_episode: Make) -> None:
    plane.submit(make_episode(1), make_episode(2))
    plane.coordinate()
    plane.catalog.close()
    for path in plane.home.glob("catalog.db*"):
        path.write_bytes(b"\xa5" * 5000)
    with pytest.raises(CorruptDataError, match="is damaged"):
        plane.lwd("verify")
    for path in plane.home.glob("catalog.db*"):
        path.unlink()
    assert plane.lwd("recover").endswith("2 episodes committed again, 0 put in quarantine, 0 left")
    rebuilt = Plane(plane.home)
    rebuilt.coordinate()
    assert rebuilt.snapshots.latest().episodes == 2
    rebuilt.lwd("verify", "--read")


def test_all_who_ask_say_the_same_of_what_is_unaccounted(plane: Plane, make_episode: Make) -> None:
    episode = make_episode(1)
    plane.submit(episode)
    with pytest.raises(ConflictError):
        plane.submit(dataclasses.replace(episode, instruction="another"))
    with deployment(plane.home) as opened:
        assert opened.unaccounted() == 1
    said = CliRunner().invoke(cli, ["status", "--home", str(plane.home)], env={"COLUMNS": "160"}).output
    assert "quarantine: 1; unaccounted: 1" in said
    assert "1 episodes wait for the coordinator" in plane.lwd("verify")
    plane.coordinate()
    said = CliRunner().invoke(cli, ["status", "--home", str(plane.home)], env={"COLUMNS": "160"}).output
    assert "quarantine: 1; unaccounted: 0" in said
