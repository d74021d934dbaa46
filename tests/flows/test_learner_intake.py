"""The learner's intake: what it cannot take is withdrawn with its reason; its own fault withdraws nothing."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
from invariants import Plane, open_plane

from flows.learner_intake import IN_A_ROW, REFUSALS, Intake
from flows.params import load_params
from flows.stages.checked import checked_episodes
from flows.stages.common import agent_config, replay_for
from infra.catalog.schema import quarantine
from infra.episode import Episode
from infra.errors import ConfigError, CorruptDataError
from infra.reader import Increment
from lwd_model.chunks import Replay
from lwd_model.shards import write_buffer

ROOT = Path(__file__).parents[2]
DIM = 86
Make = Callable[..., Episode]


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


@pytest.fixture
def rig(plane: Plane, tmp_path: Path) -> tuple[Intake, Replay]:
    config = agent_config(load_params(ROOT / "params.yaml"))
    replay = replay_for(config)
    return Intake(replay, config.policy, lambda task: 5, plane.snapshots, tmp_path), replay


@pytest.fixture
def make(make_episode: Make) -> Make:
    def made(seed: int, **fields: Any) -> Episode:
        return make_episode(seed, obs_dim=DIM, **fields)

    return made


def settled(plane: Plane, *episodes: Episode) -> Increment:
    """In a snapshot of an accepting contract, as a reader brings them."""
    for episode in episodes:
        plane.submit(episode)
    plane.settle()
    latest = plane.snapshots.latest()
    return Increment(0, latest.version, latest.digest, episodes, ())


def held(plane: Plane) -> list[Any]:
    with plane.catalog.read() as connection:
        return list(connection.execute(sa.select(quarantine).order_by(quarantine.c.id)))


ODD: dict[str, dict[str, Any]] = {
    "observations": {"observations": np.zeros((13, DIM - 1), np.float32)},
    "actions": {"actions": np.zeros((12, 4), np.float32)},
    "instruction": {"instruction": "make coffee"},
    "rewards": {"rewards": np.full(12, np.nan, np.float32)},
}


@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_be_taken_is_withdrawn_and_the_rest_is_taken(
    plane: Plane, rig: tuple[Intake, Replay], make: Make, kind: str
) -> None:
    intake, replay = rig
    odd = dataclasses.replace(make(2), **ODD[kind])
    taken = intake.take(settled(plane, make(1), odd, make(3)), threading.Event())
    assert [episode.episode_id for episode in taken] == [make(1).episode_id, make(3).episode_id]
    (row,) = held(plane)
    assert row.episode_id == odd.episode_id and row.stage == "read"
    assert plane.snapshots.latest().episodes == 2 and len(replay.episodes) == 2


def test_a_withdrawal_that_was_cut_short_is_done_again_and_counts_once(
    plane: Plane, rig: tuple[Intake, Replay], make: Make
) -> None:
    intake, _ = rig
    odd = dataclasses.replace(make(2), **ODD["observations"])
    increment = settled(plane, make(1), odd)
    intake.take(increment, threading.Event())
    version = plane.snapshots.latest().version
    intake.take(dataclasses.replace(increment, added=(odd,)), threading.Event())
    assert plane.snapshots.latest().version == version and len(held(plane)) == 1


def test_few_robots_that_send_only_what_is_refused_do_not_stop_the_learner(
    plane: Plane, rig: tuple[Intake, Replay], make: Make
) -> None:
    intake, replay = rig
    fleet = [make(n, robot_id=f"r{n % 8}") for n in range(16)]
    odd = [
        dataclasses.replace(make(100 + n, robot_id=f"evil{n % 2}"), **ODD["observations"]) for n in range(3 * IN_A_ROW)
    ]
    intake.take(settled(plane, *fleet, *odd), threading.Event())
    assert len(held(plane)) == len(odd) and len(replay.episodes) == len(fleet)


def test_a_learner_that_refuses_everything_withdraws_nothing_more_and_names_the_kind(
    plane: Plane, rig: tuple[Intake, Replay], make: Make, tmp_path: Path
) -> None:
    intake, _ = rig
    odd = [dataclasses.replace(make(n, robot_id=f"r{n % 4}"), **ODD["actions"]) for n in range(IN_A_ROW + 5)]
    increment = settled(plane, *odd)
    with pytest.raises(ConfigError, match="because of their actions"):
        intake.take(increment, threading.Event())
    assert held(plane) == []
    for episode in odd[:IN_A_ROW]:  # one at a time, as they come in
        intake.take(dataclasses.replace(increment, added=(episode,)), threading.Event())
    with pytest.raises(ConfigError, match="in a row"):
        intake.take(dataclasses.replace(increment, added=(odd[IN_A_ROW],)), threading.Event())
    assert len(held(plane)) == IN_A_ROW and (tmp_path / REFUSALS).exists()


FINITE: dict[str, dict[str, Any]] = {
    "an action of 57.3": {"actions": np.full((12, 5), 57.3, np.float32)},
    "the operator's flag": {"intervention": np.ones(12, bool)},
    "NaN": {"actions": np.full((12, 5), np.nan, np.float32)},
}


@pytest.mark.parametrize("kind", FINITE)
def test_stages_get_no_episode_that_the_contract_refuses(tmp_path: Path, make: Make, kind: str) -> None:
    good = [make(n, source="demo", policy_version=None) for n in range(9)]
    write_buffer(
        [*good, dataclasses.replace(make(50, source="demo", policy_version=None), **FINITE[kind])], tmp_path / "d"
    )
    accepted, refused = checked_episodes(tmp_path / "d", 0.2)
    assert (len(accepted), refused) == (9, 1)
    with pytest.raises(ConfigError, match="refuses 1 of 10"):
        checked_episodes(tmp_path / "d", 0.05)


def test_a_corrupt_shard_is_named(tmp_path: Path, make: Make) -> None:
    write_buffer([make(n, source="demo", policy_version=None) for n in range(3)], tmp_path / "d")
    shard = next(path for path in (tmp_path / "d").iterdir() if path.suffix == ".tar")
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(CorruptDataError, match=shard.name):
        checked_episodes(tmp_path / "d", 0.2)
