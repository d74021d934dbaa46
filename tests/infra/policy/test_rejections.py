"""A policy that failed on a robot is never run there again: by digest, across restarts, cohorts and damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
from policies import Channel

from infra.policy.rejections import Rejections


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    return Channel(tmp_path)


def test_the_previous_policy_becomes_active_and_stays_so(channel: Channel) -> None:
    robot = channel.robot()
    for _ in range(2):
        channel.publish()
        robot.poll()
        robot.activate_at_boundary()
    active = robot.reject(2, "NaN" * 1000)
    assert active is not None and active.version == 1
    for again in (robot, channel.robot()):
        assert again.poll() is None and again.staged is None
        assert again.active is not None and again.active.version == 1
        (entry,) = again.rejected
        assert (entry.version, len(entry.reason)) == (2, 300)
    channel.publish()
    assert robot.poll() == 3  # a newer one is tried
    assert robot.reject(3, "x") == robot.active and robot.staged is None


def test_without_a_previous_policy_none_is_active(channel: Channel) -> None:
    robot = channel.robot()
    channel.publish()
    robot.poll()
    robot.activate_at_boundary()
    assert robot.reject(1, "x") is None
    assert channel.robot().poll() is None and channel.robot().active is None


def test_a_version_that_is_not_here_changes_nothing(channel: Channel) -> None:
    robot = channel.robot()
    channel.publish()
    robot.poll()
    robot.activate_at_boundary()
    assert robot.reject(9, "x") == robot.active is not None and robot.rejected == ()


def test_a_rejection_holds_in_every_cohort(channel: Channel) -> None:
    robot = channel.robot()
    version = channel.publish()
    robot.poll()
    robot.activate_at_boundary()
    robot.reject(version, "x")
    assert [one.version for one in channel.robot(cohort="canary").rejected] == [version]


@pytest.mark.parametrize("content", [b"", b"{", b"[3]", b"null", b'[{"version": "x"}]', b"\xff", b"[" * 100_000])
def test_a_damaged_list_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rejected.json"
    path.write_bytes(content)
    rejections = Rejections(path)
    assert list(rejections) == [] and (tmp_path / "rejected.json.damaged").exists()
    rejections.add(1, "a" * 64, "x")
    assert "a" * 64 in Rejections(path)
