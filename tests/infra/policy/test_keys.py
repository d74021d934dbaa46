"""Signing keys overlap: no robot is left without a policy while one key gives way to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from policies import Channel

from infra.errors import ConfigError, UntrustedPolicyError
from infra.policy.channel import PolicyPublisher
from infra.policy.keys import (
    create_keys,
    key_at,
    load_signer,
    load_trusted,
    retire_key,
    rotate_key,
    stage_key,
    trusted_ids,
)
from infra.policy.registry import Registry


def may_promote(keys: Path) -> set[str]:
    return {identity for identity, role in trusted_ids(keys).items() if role == "promote"}


def renewed(channel: Channel) -> None:
    """Publisher and registry as a process started now has them."""
    channel.signer = load_signer(channel.home / "keys")
    channel.publisher = PolicyPublisher(channel.plane.catalog, channel.plane.objects, channel.signer)
    channel.registry = Registry(channel.plane.catalog, channel.signer)


def test_robots_follow_across_a_rotation_without_a_restart(tmp_path: Path) -> None:
    channel = Channel(tmp_path)
    keys, robot = tmp_path / "keys", channel.robot()
    channel.publish()
    assert robot.poll() == 1
    robot.activate_at_boundary()
    said = len(channel.source.announcements("learning", 0))
    old, new = rotate_key(keys)
    assert old == channel.signer.key_id != new == load_signer(keys).key_id
    assert may_promote(keys) == {old, new}
    assert len(channel.source.announcements("learning", 0)) == said  # nothing is announced again
    channel.publish()  # by a learner that was not started again: the old key still counts
    assert robot.poll() == 2
    robot.activate_at_boundary()
    renewed(channel)
    channel.publish()
    assert robot.poll() == 3
    robot.activate_at_boundary()
    fresh = channel.robot("fresh")
    assert fresh.poll() == 3
    retire_key(keys, old)
    channel.publish()
    assert robot.poll() == 4 and may_promote(keys) == {new}


def test_a_retired_key_is_believed_no_more_not_even_by_a_robot_at_work(tmp_path: Path) -> None:
    channel = Channel(tmp_path)
    robot, stale = channel.robot(), channel.publisher
    old, _ = rotate_key(tmp_path / "keys")
    renewed(channel)
    channel.publish()
    robot.poll()
    robot.activate_at_boundary()
    retire_key(tmp_path / "keys", old)
    channel.publisher = stale  # whoever has the old key
    channel.publish()
    with pytest.raises(UntrustedPolicyError, match=f"unknown key '{old}'"):
        robot.poll()
    assert robot.active is not None and robot.active.version == 1


def test_a_key_can_be_brought_to_robots_before_it_signs(tmp_path: Path) -> None:
    before = create_keys(tmp_path).key_id
    staged = stage_key(tmp_path)
    assert stage_key(tmp_path) == staged and load_signer(tmp_path).key_id == before
    assert key_at(tmp_path / "next.pem") == staged and (tmp_path / "next.pem").stat().st_mode & 0o777 == 0o600
    assert may_promote(tmp_path) == {before, staged}
    with pytest.raises(ConfigError, match=r"is the key in .*next\.pem"):
        retire_key(tmp_path, staged)
    assert rotate_key(tmp_path) == (before, staged)
    assert key_at(tmp_path / "next.pem") is None and load_signer(tmp_path).key_id == staged
    assert (tmp_path / "signing.pem").stat().st_mode & 0o777 == 0o600


def test_the_key_that_signs_and_unknown_ones_cannot_be_retired(tmp_path: Path) -> None:
    signer = create_keys(tmp_path)
    with pytest.raises(ConfigError, match=r"is the key in .*signing\.pem"):
        retire_key(tmp_path, signer.key_id)
    with pytest.raises(ConfigError, match="is not trusted"):
        retire_key(tmp_path, "../../etc/passwd")
    with pytest.raises(ConfigError, match="cannot be read"):
        rotate_key(tmp_path / "none")


def test_a_broken_key_file_refuses_policies_and_stops_no_robot(tmp_path: Path) -> None:
    channel = Channel(tmp_path)
    robot = channel.robot()
    channel.publish()
    (tmp_path / "keys" / "trusted" / "0123456789abcdef.pub").write_text("nonsense")
    with pytest.raises(UntrustedPolicyError, match="is not an ed25519 public key"):
        robot.poll()
    (tmp_path / "keys" / "trusted" / "0123456789abcdef.pub").unlink()
    assert robot.poll() == 1


def test_a_robot_that_has_only_the_public_keys_verifies(tmp_path: Path) -> None:
    channel = Channel(tmp_path)
    channel.publish()
    trusted = tmp_path / "robot" / "trusted"
    trusted.mkdir(parents=True)
    for path in (tmp_path / "keys" / "trusted").glob("*.pub"):
        (trusted / path.name).write_bytes(path.read_bytes())
    channel.trust = load_trusted(tmp_path / "robot")
    assert channel.robot().poll() == 1


def test_the_learner_s_key_publishes_to_its_cohort_and_promotes_nothing(tmp_path: Path) -> None:
    channel = Channel(tmp_path)
    keys = tmp_path / "keys"
    learner = load_signer(keys, "publish")
    assert learner.key_id != channel.signer.key_id
    assert trusted_ids(keys) == {channel.signer.key_id: "promote", learner.key_id: "publish"}
    channel.publisher = PolicyPublisher(channel.plane.catalog, channel.plane.objects, learner)
    version = channel.publish()
    robot = channel.robot()
    assert robot.poll() == version
    robot.activate_at_boundary()
    for cohort in ("production", "canary"):
        Registry(channel.plane.catalog, learner).promote(channel.publish(None), {})
        with pytest.raises(UntrustedPolicyError, match="may publish and not promote"):
            channel.robot(f"robot-{cohort}", cohort).poll()


def test_a_machine_that_only_learns_cannot_promote(tmp_path: Path) -> None:
    channel = Channel(tmp_path)
    with pytest.raises(ConfigError, match="no key that may promote"):
        Registry(channel.plane.catalog, None).promote(channel.publish(), {})


def test_a_deployment_of_one_key_goes_on_with_it_until_the_learner_gets_its_own(tmp_path: Path) -> None:
    one = create_keys(tmp_path).key_id
    (tmp_path / "publishing.pem").unlink()
    assert create_keys(tmp_path).key_id == one == load_signer(tmp_path, "publish").key_id
    assert not (tmp_path / "publishing.pem").exists()
    old, new = rotate_key(tmp_path, "publish")
    assert old == one and load_signer(tmp_path, "publish").key_id == new and load_signer(tmp_path).key_id == one
    assert trusted_ids(tmp_path)[new] == "publish"
