"""What the learner cannot take is withdrawn and named; a minority of robots never stops it."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
from invariants import KILLED, Plane, example_episode, in_process, open_plane

from flows.learner_intake import IN_A_ROW, REFUSALS, Intake
from infra.catalog.schema import quarantine
from infra.episode import Episode
from infra.errors import ConfigError
from infra.reader import Increment
from lwd_model.chunks import Replay
from lwd_model.config import PolicyConfig

INSTRUCTION = "open the drawer"
POLICY = PolicyConfig(3, 5, 2, (INSTRUCTION,), width=8, blocks=1, time_features=8, flow_steps=2)


def nstep(task: str) -> int:
    return {"S1": 2, "S2": 2, "S3": 2, "S4": 2}[task]


def intake(home: Path) -> Intake:
    (home / "learner").mkdir(parents=True, exist_ok=True)
    return Intake(Replay((INSTRUCTION,), 2, 0.9), POLICY, nstep, open_plane(home).snapshots, home / "learner")


def members(home: Path, episodes: list[Episode]) -> Increment:
    """The episodes as members of a snapshot: of a contract that let them pass."""
    plane: Plane = open_plane(home)
    before = plane.snapshots.latest().version
    for episode in episodes:
        plane.submit(episode)
    plane.settle()
    latest = plane.snapshots.latest()
    return Increment(before, latest.version, latest.digest, tuple(episodes), ())


def withdrawn(home: Path) -> dict[str, str]:
    with open_plane(home).catalog.read() as connection:
        rows = connection.execute(sa.select(quarantine)).all()
    return {row.episode_id: str(row.reasons) for row in rows}


def wide(number: int, robot: str = "r0") -> Episode:
    return example_episode(number, robot=robot, observations=np.zeros((5, 84), np.float32))


def bad_value(field: str, value: float) -> Callable[[], Episode]:
    def make() -> Episode:
        episode = example_episode(1)
        values = getattr(episode, field).astype(np.float64)
        values.flat[-1] = value
        return dataclasses.replace(episode, **{field: values})

    return make


KINDS: dict[str, tuple[Callable[[], Episode], str]] = {
    "wide observations": (lambda: wide(1), "observations is"),
    "narrow observations": (lambda: example_episode(1, observations=np.zeros((5, 1), np.float32)), "observations is"),
    "one observation too few": (
        lambda: example_episode(1, observations=np.zeros((4, 3), np.float32)),
        "observations is",
    ),
    "narrow actions": (lambda: example_episode(1, actions=np.zeros((4, 1), np.float32)), "actions is"),
    "unknown instruction": (lambda: example_episode(1, instruction="fly"), "unknown to the policy"),
    "unknown task": (lambda: example_episode(1, task="S99"), "KeyError"),
    "NaN": (bad_value("observations", np.nan), "not finite"),
    "infinite action": (bad_value("actions", np.inf), "not finite"),
    "beyond float32": (bad_value("rewards", 1e300), "not finite"),
    "complex numbers": (lambda: example_episode(1, actions=np.zeros((4, 5), np.complex64)), "not real numbers"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_learner_cannot_take_is_withdrawn_and_named(tmp_path: Path, kind: str) -> None:
    make, named = KINDS[kind]
    odd, good = make(), example_episode(2)
    members(tmp_path, [example_episode(1), good])
    loop = intake(tmp_path)
    taken = loop.take(Increment(0, 1, "", (odd, good), ()), threading.Event())
    assert taken == [good] and set(loop._replay.episodes) == {good.episode_id}
    assert list(withdrawn(tmp_path)) == [odd.episode_id]
    assert named in withdrawn(tmp_path)[odd.episode_id]


def test_an_episode_without_a_step_is_withdrawn(tmp_path: Path) -> None:
    members(tmp_path, [example_episode(1)])
    empty = dataclasses.replace(
        example_episode(1), actions=np.zeros((0, 5), np.float32), observations=np.zeros((1, 3), np.float32),
        rewards=np.zeros(0, np.float32), intervention=np.zeros(0, bool), timestamps=np.zeros(1),
    )  # fmt: skip
    assert intake(tmp_path).take(Increment(0, 1, "", (empty,), ()), threading.Event()) == []
    assert "no step" in withdrawn(tmp_path)[empty.episode_id]


def test_one_or_two_robots_never_stop_the_learner(tmp_path: Path) -> None:
    """However much they send, in one increment or one by one, before or after the first episode that was taken."""
    members(tmp_path, [example_episode(i, robot=f"honest-{i}") for i in range(4)])
    loop, stop = intake(tmp_path), threading.Event()
    many = [wide(100 + i, robot=f"odd-{i % 2}") for i in range(3 * IN_A_ROW)]
    loop.take(members(tmp_path, many[: 2 * IN_A_ROW]), stop)
    for episode in many[2 * IN_A_ROW :]:
        loop.take(members(tmp_path, [episode]), stop)
    assert set(withdrawn(tmp_path)) == {episode.episode_id for episode in many}
    honest = example_episode(900, robot="honest-0")
    assert loop.take(members(tmp_path, [honest]), stop) == [honest]
    assert not (tmp_path / "learner" / REFUSALS).exists()


def test_a_fault_of_the_learner_withdraws_no_more(tmp_path: Path) -> None:
    """When most of the robots are refused for one reason, in one increment."""
    many = [wide(i, robot=f"r{i % 5}") for i in range(2 * IN_A_ROW)]
    increment = members(tmp_path, many)
    with pytest.raises(ConfigError, match=r"refused 20 of 20 episodes of 5 robots because of their observations"):
        intake(tmp_path).take(increment, threading.Event())
    assert withdrawn(tmp_path) == {}


def test_the_count_outlives_the_learner(tmp_path: Path) -> None:
    """Refusals one by one, each by a learner that was started again."""
    stop = threading.Event()
    for i in range(IN_A_ROW):
        intake(tmp_path).take(members(tmp_path, [wide(i, robot=f"r{i % 5}")]), stop)
    last = members(tmp_path, [wide(99, robot="r0")])
    with pytest.raises(ConfigError, match="in a row because of their observations"):
        intake(tmp_path).take(last, stop)
    assert len(withdrawn(tmp_path)) == IN_A_ROW


@pytest.mark.parametrize("content", ["", "[", "{}", '[{"id": 1}]', "null", "[7]", "\x00"])
def test_a_count_that_is_not_whole_counts_from_zero(tmp_path: Path, content: str) -> None:
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / REFUSALS).write_text(content)
    episode = wide(1)
    intake(tmp_path).take(members(tmp_path, [episode]), threading.Event())
    assert list(withdrawn(tmp_path)) == [episode.episode_id]


def _take(home: Path, increment: Increment) -> int:
    intake(home).take(increment, threading.Event())
    return 0


@pytest.mark.parametrize("point", ["snapshots.members_removed", "snapshots.version_inserted"])
def test_a_withdrawal_cut_short_is_done_again_once(tmp_path: Path, point: str) -> None:
    increment = members(tmp_path, [wide(1), example_episode(2), wide(3)])
    assert in_process(_take, tmp_path, increment, crash=point) == KILLED
    assert in_process(_take, tmp_path, increment) == 0
    version = open_plane(tmp_path).snapshots.latest().version
    assert set(withdrawn(tmp_path)) == {wide(1).episode_id, wide(3).episode_id}
    assert in_process(_take, tmp_path, increment) == 0
    assert open_plane(tmp_path).snapshots.latest().version == version
