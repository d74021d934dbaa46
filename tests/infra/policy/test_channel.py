"""I6: an active policy is signed, approved for its cohort, and was swapped at a boundary. Rows 31-33, 35, 36."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from invariants import in_process
from policies import Channel, make_bundle

from infra.catalog import schema
from infra.crashpoints import registered
from infra.errors import ConfigError, UntrustedPolicyError
from infra.policy.announcement import Announcement
from infra.policy.artifact import verify
from infra.policy.channel import announce, fetch_bundle
from infra.policy.keys import create_keys
from infra.policy.subscriber import PolicySubscriber


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    return Channel(tmp_path)


class Replaying:
    """A source that says what a test wants it to say."""

    def __init__(self, channel: Channel, said: Sequence[Announcement]) -> None:
        self._channel, self.said = channel, said

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        return self.said

    def fetch(self, key: str) -> bytes:
        return self._channel.source.fetch(key)


def versions(robot: PolicySubscriber) -> tuple[int | None, int | None]:
    active, staged = robot.active, robot.staged
    return (active.version if active else None, staged.version if staged else None)


def test_row_33_a_policy_published_in_mid_episode_is_swapped_at_the_boundary(channel: Channel) -> None:
    robot = channel.robot()
    assert robot.poll() is None and robot.activate_at_boundary() is None
    channel.publish()
    robot.poll()
    assert versions(robot) == (None, 1)
    robot.activate_at_boundary()
    channel.publish()
    assert robot.poll() == 2
    assert versions(robot) == (1, 2)  # in mid-episode: staged only
    active = robot.activate_at_boundary()
    assert active is not None and active.version == 2 and verify(active.bundle, channel.trust).version == 2


def test_row_32_a_robot_offline_across_five_publishes_fetches_only_the_last(channel: Channel) -> None:
    robot = channel.robot()
    for _ in range(5):
        channel.publish()
    fetched: list[str] = []
    fetch = channel.source.fetch
    channel.source.fetch = lambda key: fetched.append(key) or fetch(key)  # type: ignore[method-assign,func-returns-value]
    assert robot.poll() == 5
    assert len({key.split("/")[1] for key in fetched}) == 1
    robot.activate_at_boundary()
    assert versions(robot) == (5, None)


def test_a_killed_robot_comes_back_with_the_policy_it_had(channel: Channel) -> None:
    robot = channel.robot()
    channel.publish()
    robot.poll()
    robot.activate_at_boundary()
    channel.publish()
    robot.poll()  # staged, never activated: the robot dies here
    again = channel.robot()
    assert versions(again) == (1, None)
    assert again.poll() == 2


@pytest.mark.parametrize("damage", ["tampered", "truncated", "missing"])
def test_row_31_a_damaged_policy_is_refused_and_the_last_good_one_stays(channel: Channel, damage: str) -> None:
    robot = channel.robot()
    channel.publish()
    robot.poll()
    robot.activate_at_boundary()
    channel.publish()
    with channel.plane.catalog.read() as connection:
        prefix = connection.execute(sa.select(schema.policies.c.bundle_key).where(schema.policies.c.version == 2))
        key = f"{prefix.scalar_one()}/policy.safetensors"
    good = channel.plane.objects.get(key)
    if damage == "missing":
        channel.plane.objects.delete(key)
    else:
        channel.plane.objects.put(key, good[:-3] if damage == "truncated" else good[:-1] + bytes([good[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(UntrustedPolicyError):
            robot.poll()
        robot.activate_at_boundary()
        assert versions(robot) == (1, None)
    channel.plane.objects.put(key, good)  # repaired
    assert robot.poll() == 2


def test_a_policy_that_rots_on_the_robot_gives_way_to_the_previous_one(channel: Channel) -> None:
    robot = channel.robot()
    for _ in range(2):
        channel.publish()
        robot.poll()
        active = robot.activate_at_boundary()
    assert active is not None
    (active.bundle / "policy.safetensors").write_bytes(b"rot")
    again = channel.robot()
    assert versions(again) == (1, None)
    assert again.poll() == 2  # fetched again
    again.activate_at_boundary()
    shutil.rmtree(again.active.bundle.parent)  # type: ignore[union-attr]
    bare = channel.robot()
    assert versions(bare) == (None, None)
    assert bare.poll() == 2


def test_a_cohort_follows_only_what_was_approved_for_it(channel: Channel) -> None:
    production = channel.robot("p", "production")
    channel.publish("learning")
    assert production.poll() is None
    with channel.plane.catalog.begin() as connection:  # someone with the database points the row at production
        connection.execute(sa.update(schema.announcements).values(cohort="production"))
    with pytest.raises(UntrustedPolicyError, match="does not match its content"):
        production.poll()
    assert versions(production) == (None, None)


def test_an_announcement_by_another_key_is_refused_and_hides_nothing(channel: Channel) -> None:
    robot = channel.robot()
    channel.publish()
    stranger = create_keys(channel.home / "stranger")
    with channel.plane.catalog.begin() as connection:
        announce(connection, stranger, cohort="learning", version=1, kind="publish", manifest_sha256="0" * 64)
    with pytest.raises(UntrustedPolicyError, match="unknown key"):
        robot.poll()
    robot.activate_at_boundary()
    assert versions(robot) == (1, None)
    channel.publish()
    with pytest.raises(UntrustedPolicyError, match="unknown key"):  # it is said again, once: the row is still there
        robot.poll()
    assert versions(robot) == (1, 2)
    assert robot.poll() == 2


def test_row_35_an_old_pointer_replayed_is_refused(channel: Channel) -> None:
    robot = channel.robot()
    for _ in range(2):
        channel.publish()
    old = channel.source.announcements("learning", 0)
    robot.poll()
    robot.activate_at_boundary()
    replaying = PolicySubscriber(channel.home / "robots" / "r0", "learning", Replaying(channel, old[:1]), channel.trust)
    with pytest.raises(UntrustedPolicyError, match="replay"):
        replaying.poll()
    # With its number raised the signature no longer holds.
    forged = replace(old[0], seq=99)
    replaying = PolicySubscriber(
        channel.home / "robots" / "r0", "learning", Replaying(channel, [forged]), channel.trust
    )
    with pytest.raises(UntrustedPolicyError, match="does not match its content"):
        replaying.poll()
    assert versions(replaying) == (2, None)


def test_row_35_a_lower_version_needs_a_signed_rollback(channel: Channel) -> None:
    robot = channel.robot()
    for _ in range(2):
        channel.publish()
    robot.poll()
    robot.activate_at_boundary()
    digest = channel.source.announcements("learning", 0)[0].manifest_sha256
    said = {"cohort": "learning", "version": 1, "manifest_sha256": digest}
    with channel.plane.catalog.begin() as connection:
        announce(connection, channel.signer, kind="publish", **said)  # type: ignore[arg-type]
    with pytest.raises(UntrustedPolicyError, match="without a signed rollback"):
        robot.poll()
    assert versions(robot) == (2, None)
    with channel.plane.catalog.begin() as connection:
        announce(connection, channel.signer, kind="rollback", **said)  # type: ignore[arg-type]
    assert robot.poll() == 1
    robot.activate_at_boundary()
    assert versions(robot) == (1, None)
    assert channel.publish() == 3
    assert robot.poll() == 3  # and forward again


def test_a_robot_offline_across_a_rollback_accepts_what_came_after_it(channel: Channel) -> None:
    robot = channel.robot("p", "production")
    for _ in range(3):
        channel.publish(None)
    channel.registry.promote(1, {})
    channel.registry.promote(3, {})
    robot.poll()
    robot.activate_at_boundary()
    channel.registry.rollback(actor="ann", reason="worse")
    channel.registry.promote(2, {})
    assert robot.poll() == 2  # lower than 3, but the rollback to 1 lies between


def test_a_robot_that_changes_cohort_starts_anew_there(channel: Channel) -> None:
    learning = channel.robot()
    for _ in range(2):
        channel.publish()
    learning.poll()
    learning.activate_at_boundary()
    channel.registry.promote(1, {})
    production = channel.robot(cohort="production")
    assert versions(production) == (None, None)
    assert production.poll() == 1


def test_a_robot_that_comes_back_to_a_cohort_replays_nothing_there(channel: Channel) -> None:
    for _ in range(3):
        channel.publish()
    channel.registry.promote(1, {})
    first = channel.source.announcements("production", 0)
    channel.registry.promote(2, {})
    for cohort, version in (("production", 2), ("canary", 2)):
        robot = channel.robot(cohort=cohort)
        assert robot.poll() == version
        robot.activate_at_boundary()
    root = channel.home / "robots" / "r0"
    replaying = PolicySubscriber(root, "production", Replaying(channel, first), channel.trust)
    with pytest.raises(UntrustedPolicyError, match="replay"):
        replaying.poll()
    back = channel.robot(cohort="production")
    assert versions(back) == (2, None)  # the same bundle, approved there before
    channel.registry.promote(3, {})
    assert back.poll() == 3


@pytest.mark.parametrize("damage", [b"[]", b"", b"\xff", b"[" * 100_000, b'{"cohort": "learning", "seq": "9"}',
                                    b'{"cohort": "learning", "active": {"version": 1, "digest": "../../x"}}',
                                    b'{"cohort": "learning", "grants": [1]}', b'{"cohort": 3, "x": 1}'])  # fmt: skip
def test_a_damaged_state_is_put_aside_and_old_announcements_stay_refused(channel: Channel, damage: bytes) -> None:
    robot = channel.robot()
    for _ in range(2):
        channel.publish()
        robot.poll()
        robot.activate_at_boundary()
    old = channel.source.announcements("learning", 0)
    root = channel.home / "robots" / "r0"
    (root / "state.json").write_bytes(damage)
    replaying = PolicySubscriber(root, "learning", Replaying(channel, old), channel.trust)
    assert versions(replaying) == (None, None) and (root / "state.damaged").read_bytes() == damage
    with pytest.raises(UntrustedPolicyError, match="replay"):
        replaying.poll()
    channel.publish()
    assert channel.robot().poll() == 3  # a new announcement is taken


def test_publishing_needs_a_whole_bundle(channel: Channel) -> None:
    with pytest.raises(ConfigError, match=r"architecture\.json"):
        channel.publisher.publish(channel.home / "nothing")
    bundle = make_bundle(channel.home / "half")
    (bundle / "policy.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"policy\.safetensors"):
        channel.publisher.publish(bundle)
    assert channel.registry.policies() == []


def test_fetching_a_policy_for_evaluation(channel: Channel) -> None:
    channel.publish()
    bundle = fetch_bundle(channel.plane.objects, channel.plane.catalog, channel.trust, 1, channel.home / "copy")
    assert verify(bundle, channel.trust).version == 1
    with pytest.raises(ConfigError, match="no policy 7"):
        fetch_bundle(channel.plane.objects, channel.plane.catalog, channel.trust, 7, channel.home / "copy7")


@pytest.mark.parametrize("name", ["policy.safetensors", "architecture.json", "manifest.json", "manifest.sig"])
def test_what_is_evaluated_is_what_was_published(channel: Channel, name: str) -> None:
    channel.publish()
    channel.publish()
    objects, catalog, target = channel.plane.objects, channel.plane.catalog, channel.home / "copy"
    bundle = fetch_bundle(objects, catalog, channel.trust, 1, target)
    (bundle / name).write_bytes(b"other bytes")  # the copy of an earlier evaluation is looked at again
    assert verify(fetch_bundle(objects, catalog, channel.trust, 1, target), channel.trust).version == 1
    first, second = (row["bundle_key"] for row in reversed(channel.registry.policies()))
    objects.put(f"{first}/{name}", objects.get(f"{second}/{name}") + b" ")
    with pytest.raises(UntrustedPolicyError):
        fetch_bundle(objects, catalog, channel.trust, 1, channel.home / "anew")


def test_another_policy_s_whole_bundle_is_not_evaluated(channel: Channel) -> None:
    channel.publish()
    channel.publish()
    objects = channel.plane.objects
    first, second = (row["bundle_key"] for row in reversed(channel.registry.policies()))
    for name in ("policy.safetensors", "architecture.json", "manifest.json", "manifest.sig"):
        objects.put(f"{first}/{name}", objects.get(f"{second}/{name}"))
    with pytest.raises(UntrustedPolicyError, match="the store holds policy 2"):
        fetch_bundle(objects, channel.plane.catalog, channel.trust, 1, channel.home / "copy")


def _publish(home: Path) -> None:
    Channel(home).publish()


def _promote(home: Path) -> None:
    Channel(home).registry.promote(2, {})


def _rollback(home: Path) -> None:
    Channel(home).registry.rollback(actor="ann", reason="worse")


def _try(home: Path) -> None:
    Channel(home).registry.register_candidate(2, proposer="ann")


def _refuse(home: Path) -> None:
    Channel(home).registry.end_trial(2, {}, decision="refuse")


IN_TEST_BASES = {"policy.base_stored", "policy.base_kept"}
CRASHES = {
    "policy.objects_stored": (_publish, False),
    "policy.row_inserted": (_publish, False),
    "policy.announced": (_publish, True),
    "registry.promoted": (_promote, False),
    "registry.promotion_announced": (_promote, True),
    "registry.rolled_back": (_rollback, False),
    "registry.candidate_registered": (_try, False),
    "registry.trial_ended": (_refuse, False),
}


def test_every_crash_point_of_the_channel_is_reached_here() -> None:
    assert set(CRASHES) | IN_TEST_BASES == set(registered("policy/"))


@pytest.mark.parametrize("point", CRASHES)
def test_row_36_a_kill_leaves_everything_or_nothing(tmp_path: Path, point: str) -> None:
    work, done = CRASHES[point]
    before = Channel(tmp_path)
    before.publish()
    before.publish()
    if work is _rollback:
        before.registry.promote(1, {})
        before.registry.promote(2, {})
    elif work is not _publish:
        before.registry.promote(1, {})
    if work is _refuse:
        before.registry.register_candidate(2, proposer="ann")
    counts = _counts(before)
    before.plane.catalog.close()
    assert in_process(work, tmp_path, crash=point) == -9
    assert (_counts(Channel(tmp_path)) != counts) == done
    if not done:
        assert in_process(work, tmp_path) == 0  # repeated, it completes once
    after = Channel(tmp_path)
    expected = {_publish: (1, 0, 1), _promote: (0, 1, 2), _rollback: (0, 1, 2), _try: (0, 1, 1), _refuse: (0, 1, 1)}[
        work
    ]
    assert tuple(b - a for a, b in zip(counts, _counts(after), strict=True)) == expected
    assert [policy["version"] for policy in after.registry.policies()] == list(range(counts[0] + expected[0], 0, -1))
    cohort = {_publish: "learning", _try: "canary", _refuse: "canary"}.get(work, "production")
    assert after.robot("fresh", cohort).poll() == {_publish: 3, _promote: 2, _rollback: 1, _try: 2, _refuse: 1}[work]


def _counts(channel: Channel) -> tuple[int, ...]:
    tables = (schema.policies, schema.promotions, schema.announcements)
    with channel.plane.catalog.read() as connection:
        return tuple(connection.execute(sa.select(sa.func.count()).select_from(t)).scalar_one() for t in tables)
