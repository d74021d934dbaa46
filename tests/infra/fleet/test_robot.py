"""A robot: waits for a policy, swaps at the boundary, survives SIGKILL, stops at SIGTERM; torch is never imported."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from deployment import Deployment, scene_bundle
from invariants import assert_invariants, open_plane
from serving import Process, Served, serving
from waiting import wait_until

from infra.catalog import Catalog, schema
from infra.edge.server import Upload
from infra.errors import ConfigError, UnavailableError
from infra.fleet import robot as robot_module
from infra.fleet.robot import Robot, RobotConfig, main, spawn_robot
from infra.policy.channel import PolicyPublisher
from infra.policy.keys import Signer, create_keys
from infra.policy.permission import Permission, Validity
from infra.policy.permit import permit
from infra.policy.registry import Registry
from infra.settings import Settings, load_settings


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment(tmp_path)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path, poll_s=0.02)


def make(deployment: Deployment, settings: Settings, episodes: int = 2, **fields: object) -> Robot:
    config = RobotConfig(**{"robot_id": "r0", "tasks": ("S1", "S2"), "drain_s": 0.0, "episodes": episodes, **fields})  # type: ignore[arg-type]
    return Robot(config, settings, threading.Event())


def test_a_robot_never_imports_torch() -> None:
    code = (
        "import sys, infra.fleet.robot\n"
        "heavy = {'torch', 'lightning', 'prefect', 'kafka', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_a_robot_records_is_what_it_did(deployment: Deployment, settings: Settings) -> None:
    deployment.publish()
    assert make(deployment, settings, operator=1.0, seed=3).run() == 2
    deployment.coordinate()
    first, second = deployment.episodes()
    assert (first.task, second.task) == ("S1", "S2") and first.instruction == "open the drawer"
    for episode in (first, second):
        assert (episode.source, episode.policy_version, episode.robot_id) == ("online", 1, "r0")
        assert episode.observations.shape[0] == episode.steps + 1 == len(episode.timestamps)
        assert np.abs(episode.actions).max() <= 1 and np.isfinite(episode.observations).all()
        assert episode.rewards.sum() == episode.rewards[-1] == float(episode.success)
        taken = episode.extra["takeover_step"]  # a random policy stalls or runs out of time: the operator comes
        assert not episode.intervention[:taken].any() and episode.intervention[taken:].all()
    with deployment.plane.catalog.read() as connection:
        row = connection.execute(sa.select(schema.robots)).one()
    assert (row.robot_id, row.cohort, row.active_version, row.episodes) == ("r0", "learning", 1, 2)


def test_the_same_seed_gives_the_same_episodes(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        deployment = Deployment(tmp_path / name)
        deployment.publish()
        make(deployment, load_settings(home=tmp_path / name), episodes=1, operator=0.5).run()
        deployment.coordinate()
        found += deployment.episodes()
    np.testing.assert_array_equal(found[0].actions, found[1].actions)
    np.testing.assert_array_equal(found[0].observations, found[1].observations)


def test_row_33_a_policy_published_in_mid_episode_waits_for_the_boundary(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment.publish()
    robot = make(deployment, settings, episodes=3)
    record, frames = robot.client.record, []

    def publish_in_mid_episode(frame: object) -> None:
        frames.append(frame)
        if len(frames) == 10:
            deployment.publish(seed=1)
        record(frame)  # type: ignore[arg-type]

    monkeypatch.setattr(robot.client, "record", publish_in_mid_episode)
    robot.run()
    deployment.coordinate()
    assert [episode.policy_version for episode in deployment.episodes()] == [1, 2, 2]
    with deployment.plane.catalog.read() as connection:
        staged, active = connection.execute(sa.select(schema.measurements).order_by(schema.measurements.c.id)).all()
    assert (staged.name, active.name) == ("publish_to_staged_s", "publish_to_active_s")
    assert {(row.subject, row.version) for row in (staged, active)} == {("r0", 2)}
    assert 0 < staged.value <= active.value


@pytest.mark.parametrize("damage", ["tampered", "of another embodiment"])
def test_row_31_a_bad_policy_leaves_the_last_good_one_at_work(
    deployment: Deployment, settings: Settings, damage: str
) -> None:
    deployment.publish()
    make(deployment, settings, episodes=1).run()
    if damage == "tampered":
        deployment.publish(seed=1)
        key = next(o.key for o in deployment.plane.objects.list("policies") if _version(deployment, o.key) == 2)
        deployment.plane.objects.put(key.rsplit("/", 1)[0] + "/policy.safetensors", b"x")
    else:  # signed, but it cannot be loaded
        bundle = deployment.home / "export"
        architecture = json.loads((bundle / "architecture.json").read_text())
        architecture["policy"]["horizon"] = 7
        (bundle / "architecture.json").write_text(json.dumps(architecture))
        deployment.publisher.publish(bundle)
    make(deployment, settings, episodes=2).run()
    deployment.coordinate()
    assert [episode.policy_version for episode in deployment.episodes()] == [1, 1]
    with deployment.plane.catalog.read() as connection:
        row = connection.execute(sa.select(schema.robots)).one()
    assert row.active_version == 1 and row.details["refused"]


def _version(deployment: Deployment, key: str) -> int | None:
    if not key.endswith("manifest.json"):
        return None
    return json.loads(deployment.plane.objects.get(key))["version"]


def test_a_full_spool_stops_collection_until_there_is_room(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment.publish()
    robot = make(deployment, settings, episodes=2)
    robot.client.spool.max_bytes = 90_000  # one episode, not two
    said: list[str] = []
    submit = robot.client._ingest.submit_many

    def unreachable(uploads: Sequence[Upload]) -> object:
        if "stopped: full" not in said:
            raise UnavailableError("the ingest service is away", "wait")
        return submit(uploads)

    monkeypatch.setattr(robot.client._ingest, "submit_many", unreachable)
    monkeypatch.setattr(robot_module, "_say", lambda message, level=0, **fields: said.append(message))
    stop = threading.Event()
    coordinator = deployment.coordinate_until(stop)
    robot.run()
    stop.set()
    coordinator.join()
    assert "stopped: full" in said and said.count("episode") == 2
    deployment.coordinate()
    assert len(deployment.episodes()) == 2


def test_a_killed_robot_loses_only_the_unfinished_attempt(deployment: Deployment, settings: Settings) -> None:
    deployment.publish()
    config = RobotConfig("r0", ("S1", "S2"), operator=0.5, drain_s=0.0)
    home = deployment.home
    spool = settings.spool_dir / "r0"
    process = spawn_robot(home, config)
    try:
        wait_until(lambda: _committed(deployment) >= 2 and any((spool / "open").glob("*.log")))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    torn = {path.stem for path in (spool / "open").glob("*.log")}
    again = spawn_robot(home, config)
    before = _committed(deployment)
    try:
        wait_until(lambda: _committed(deployment) > before)
        again.terminate()
        assert again.wait(60) == 0  # SIGTERM: a clean end at the boundary
    finally:
        again.kill()
        again.wait()
    assert list((spool / "open").iterdir()) == []
    discarded = (spool / "journal.jsonl").read_text() if torn else ""
    deployment.coordinate()
    spooled = {}
    for path in (spool / "closed").iterdir():
        spooled[path.name.split(".")[0]] = path.name.split(".")[1]
    for episode_id in torn:
        assert (episode_id in discarded) != (episode_id in {e.episode_id for e in deployment.episodes()})
    assert_invariants(home, spooled)
    numbers = [episode.extra["number"] for episode in deployment.episodes()]
    assert len(set(numbers)) == len(numbers) >= 3
    assert len({episode.extra["seed"] for episode in deployment.episodes()}) == len(numbers)


def given_a_url_and_a_token(
    deployment: Deployment, served: Served, monkeypatch: pytest.MonkeyPatch, home: Path, name: str = "r0"
) -> Settings:
    """What a robot has that has nothing else but the public keys."""
    shutil.copytree(deployment.home / "keys" / "trusted", home / "keys" / "trusted")
    monkeypatch.setenv("LWD_INGEST_URL", served.url)
    monkeypatch.setenv("LWD_ROBOT_TOKEN", served.enrol(name))
    monkeypatch.setenv("LWD_PROFILE", "fleet")
    monkeypatch.setenv("LWD_POLL_S", "0.02")
    return load_settings(home=home)


def test_a_robot_needs_a_url_a_token_and_public_keys_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, home, stop = Deployment(tmp_path / "server"), tmp_path / "robot", threading.Event()
    deployment.publish()
    with serving(deployment.home) as served:
        given_a_url_and_a_token(deployment, served, monkeypatch, home)
        token = os.environ["LWD_ROBOT_TOKEN"]
        robot = spawn_robot(home, RobotConfig("r0", ("S1",), episodes=2, drain_s=60.0))
        coordinator = deployment.coordinate_until(stop)
        assert robot.wait(120) == 0
        stop.set()
        coordinator.join()
    assert [episode.policy_version for episode in deployment.episodes()] == [1, 1]
    assert {path.name for path in home.iterdir()} == {"keys", "logs", "robots", "spool"}  # no catalog, no store
    assert list((home / "spool" / "r0" / "closed").iterdir()) == []
    assert token.partition(".")[2] not in "".join(path.read_text() for path in (home / "logs").iterdir())
    with deployment.plane.catalog.read() as connection:
        row = connection.execute(sa.select(schema.robots)).one()
    assert (row.robot_id, row.episodes, row.active_version, row.details["ended"]) == ("r0", 2, 1, True)
    assert row.details["spool_episodes"] == 0 and row.details["spool_limit"] > row.details["spool_bytes"]


def test_a_robot_goes_on_while_its_server_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    deployment, stop = Deployment(tmp_path / "server"), threading.Event()
    deployment.publish()
    service = Process(deployment.home)
    service.start()
    settings = given_a_url_and_a_token(deployment, service.served, monkeypatch, tmp_path / "robot")
    robot = Robot(RobotConfig("r0", ("S1",), drain_s=0.0), settings, stop)
    thread = threading.Thread(target=robot.run)
    thread.start()

    def said(message: str) -> int:
        return sum(record.getMessage() == message for record in list(caplog.records))

    try:
        wait_until(lambda: _committed(deployment) >= 1)
        service.kill()
        wait_until(lambda: said("offline") == 1)
        before, committed = said("episode"), _committed(deployment)
        wait_until(lambda: said("episode") > before)  # the policy that it has is good enough
        assert _committed(deployment) == committed
        service.start()
        wait_until(lambda: said("online again") >= 1 and _committed(deployment) > committed)
    finally:
        stop.set()
        thread.join(60)
        service.kill()
    spooled = {path.name.split(".")[0] for path in (settings.spool_dir / "r0" / "closed").iterdir()}
    deployment.coordinate()
    assert {episode.episode_id for episode in deployment.episodes()} <= spooled  # nothing is confirmed yet


def test_a_robot_cut_off_runs_a_refused_policy_until_its_permission_ends_then_the_champion_then_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = Deployment(tmp_path / "server")
    plane, signer = deployment.plane, create_keys(deployment.home / "keys")
    short = Validity(learning=5.0, champion=10.0)
    publisher = PolicyPublisher(plane.catalog, plane.objects, signer, short)
    registry = Registry(plane.catalog, signer, validity=short)
    service, home = Process(deployment.home), tmp_path / "robot"
    service.start()
    settings = given_a_url_and_a_token(deployment, service.served, monkeypatch, home)
    publisher.publish(scene_bundle(deployment.home / "export", 0), cohort=None)
    robot = spawn_robot(home, RobotConfig("r0", ("S1",), drain_s=0.0))

    def lines() -> list[dict[str, Any]]:
        path = settings.logs_dir / "robot-r0.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def said(message: str) -> list[dict[str, Any]]:
        return [line for line in lines() if line["message"] == message]

    try:
        wait_until(lambda: _seen(deployment))  # its start does not count
        registry.promote(1, {})
        publisher.publish(scene_bundle(deployment.home / "export", 1))
        wait_until(lambda: [line for line in said("episode") if line["policy"] == 2])
        service.kill()
        registry.refuse(2, {})
        wait_until(lambda: said("hold: no permission"))
        ended = len(said("episode"))
        wait_until(lambda: time.time() > said("hold: no permission")[0]["at"] + 1.0)
        assert len(said("episode")) == ended and robot.poll() is None
        ran = [line["policy"] for line in said("episode")]
        assert ran[ran.index(2) :] == sorted(ran[ran.index(2) :], reverse=True) and set(ran) == {1, 2}
        service.start()
        assert permit_again(plane.catalog, signer)
        wait_until(lambda: said("permitted again"))
        wait_until(lambda: len(said("episode")) > ended)
        assert said("episode")[-1]["policy"] == 1  # the refused one was not renewed
    finally:
        robot.kill()
        robot.wait()
        service.kill()


def _seen(deployment: Deployment) -> bool:
    with deployment.plane.catalog.read() as connection:
        return connection.execute(sa.select(schema.robots)).first() is not None


def permit_again(catalog: Catalog, signer: Signer) -> list[Permission]:
    with catalog.begin() as connection:
        return permit(connection, signer, Validity())


def test_a_robot_with_another_robots_token_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = Deployment(tmp_path / "server")
    with serving(deployment.home) as served:
        settings = given_a_url_and_a_token(deployment, served, monkeypatch, tmp_path / "robot", name="r1")
        robot = Robot(RobotConfig("r0", ("S1",), drain_s=0.0), settings, threading.Event())
        with pytest.raises(ConfigError, match="the token is of robot r1, the request says robot 'r0'"):
            robot.run()


def _committed(deployment: Deployment) -> int:
    with deployment.plane.catalog.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(schema.episodes)).scalar_one()


def test_bad_arguments_are_named(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--home", str(deployment.home), "--robot", "r0", "--tasks", "S1,S99"]
    assert main(arguments) == 2
    assert "S99" in capsys.readouterr().err


def test_a_home_without_keys_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_plane(tmp_path)
    assert main(["--home", str(tmp_path), "--robot", "r0", "--tasks", "S1"]) == 2
    assert "no trusted key" in capsys.readouterr().err
