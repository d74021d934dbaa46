"""What a robot may run ends with time, by a clock that may jump; renewed, reset, refused: attacks on each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import Channel

from infra.catalog import schema
from infra.errors import (
    ConfigError,
    LeaseLostError,
    LwdError,
    StorageFullError,
    UnavailableError,
    UntrustedPolicyError,
)
from infra.policy.announcement import Announcement
from infra.policy.clock import SKEW_MAX_S, DeploymentClock
from infra.policy.keys import create_keys, load_signer, rotate_key, signed_by
from infra.policy.permission import Permission, Permissions, Reset, Validity
from infra.policy.permit import permissions_of, permit
from infra.policy.refusals import record_refusals, refusals
from infra.policy.renew import Renewer
from infra.policy.subscriber import PolicySubscriber
from infra.settings import load_settings

HOUR, DAY = 3600.0, 86400.0


class Clocks:
    """The clocks of one robot's machine, ahead of this one's by what a test says."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.passed, self.wrong, self.boot = 0.0, wrong, "boot 1"
        self._booted = 0.0

    def reboot(self, after: float, wrong: float | None = None) -> None:
        self.passed += after
        self._booted = self.passed
        self.boot += "'"
        self.wrong = self.wrong if wrong is None else wrong

    def of(self, robot: Path) -> DeploymentClock:
        start = time.time()
        robot.mkdir(parents=True, exist_ok=True)
        return DeploymentClock(
            robot / "clock.json",
            wall=lambda: start + self.passed + self.wrong,
            uptime=lambda: 1000.0 + self.passed - self._booted,
            boot=self.boot,
        )


class Source:
    """A channel's source that a test may cut off or have say other things."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.cut, self.fetched = channel, False, 0
        self.permits: Permissions | None = None

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        self._reach()
        return self.channel.source.announcements(cohort, after)

    def permissions(self, cohort: str) -> Permissions:
        self._reach()
        return self.channel.source.permissions(cohort) if self.permits is None else self.permits

    def fetch(self, key: str) -> bytes:
        self._reach()
        self.fetched += 1
        return self.channel.source.fetch(key)

    def _reach(self) -> None:
        if self.cut:
            raise UnavailableError("cut off", "wait")


class Fleet:
    """One robot of a cohort, with clocks of its own."""

    def __init__(self, home: Path, cohort: str = "learning", wrong: float = 0.0) -> None:
        self.channel = Channel(home)
        self.source, self.clocks, self.cohort = Source(self.channel), Clocks(wrong), cohort
        self.start()

    def start(self) -> None:
        root = self.channel.home / "robots" / "r0"
        self.robot = PolicySubscriber(root, self.cohort, self.source, self.channel.trust, clock=self.clocks.of(root))

    def boundary(self) -> int | None:
        """Between two episodes: the version that is run; None on a hold."""
        try:
            self.robot.poll()
        except LwdError as error:
            self.said = error
        self.robot.activate_at_boundary()
        active = self.robot.active
        return active.version if active is not None and self.robot.permitted else None

    def renew(self) -> None:
        with self.channel.plane.catalog.begin() as connection:
            permit(connection, self.channel.signer, Validity())


@pytest.fixture
def learning(tmp_path: Path) -> Fleet:
    """Champion 1; 2 is announced to the learning cohort."""
    fleet = Fleet(tmp_path)
    fleet.channel.publish(None)
    fleet.channel.registry.promote(1, {})
    fleet.channel.publish()
    return fleet


def test_a_robot_cut_off_returns_to_the_champion_and_then_holds(learning: Fleet) -> None:
    assert learning.boundary() == 2
    learning.source.cut = True
    learning.channel.registry.refuse(2, {})  # which it does not hear
    assert learning.boundary() == 2
    learning.clocks.passed = HOUR + 60
    assert learning.boundary() == 1
    learning.clocks.passed = 7 * DAY - 60
    assert learning.boundary() == 1
    learning.clocks.passed = 7 * DAY + 60
    assert learning.boundary() is None
    learning.start()  # nothing of it is forgotten by a restart
    assert learning.boundary() is None


def test_a_restart_while_cut_off_changes_nothing(learning: Fleet) -> None:
    learning.boundary()
    learning.source.cut = True
    learning.start()
    assert learning.boundary() == 2
    learning.clocks.passed = HOUR + 60
    learning.start()
    assert learning.boundary() == 1  # its bundle was kept, though it never ran
    assert learning.source.fetched == 8


def test_a_renewed_policy_goes_on_and_a_late_renewal_brings_it_back(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, "canary")
    fleet.channel.publish(None)
    fleet.channel.registry.promote(1, {})
    fleet.channel.publish(None)
    fleet.channel.registry.register_candidate(2, proposer="ann")
    assert fleet.boundary() == 2
    fleet.clocks.passed = 901.0
    fleet.source.cut = True
    assert fleet.boundary() == 1
    fleet.source.cut = False
    later = _issue(fleet, 2, passed=901.0)
    fleet.source.permits = Permissions((later,))
    assert fleet.boundary() == 2


def _issue(fleet: Fleet, version: int, passed: float, number: int = 1000, role: str = "current") -> Permission:
    """A permission as it is signed when so much time has passed."""
    shown = fleet.channel.source.permissions(fleet.cohort).permissions
    known = next(one for one in shown if one.version == version)
    at = known.issued_at + passed
    unsigned = replace(known, number=number, role=role, issued_at=at,
                       valid_until=at + Validity().seconds(fleet.cohort, role), signature="")  # type: ignore[arg-type] # fmt: skip
    return replace(unsigned, signature=fleet.channel.signer.sign(unsigned.statement()))


@pytest.mark.parametrize("status", ["refused", "withdrawn", "refused by a robot"])
def test_what_was_taken_back_is_not_renewed(learning: Fleet, status: str) -> None:
    channel = learning.channel
    if status == "refused":
        channel.registry.refuse(2, {})
    elif status == "withdrawn":
        learning.cohort = "canary"
        channel.registry.register_candidate(2, proposer="ann")
        channel.registry.end_trial(2, {}, decision="withdraw")
    else:
        with channel.plane.catalog.begin() as connection:
            record_refusals(connection, "r7", [{"version": 2, "reason": "NaN"}])
    learning.renew()
    shown = channel.source.permissions(learning.cohort).permissions
    assert [one.version for one in shown if one.role == "current"] == ([1] if status == "withdrawn" else [])
    assert [one.version for one in shown if one.role == "champion"] == [1]


@pytest.mark.parametrize("wrong", [-HOUR, HOUR, -DAY])
def test_row_24_a_clock_that_is_wrong_by_an_hour_works_all_the_same(learning: Fleet, wrong: float) -> None:
    learning.clocks.wrong = wrong
    learning.start()
    assert learning.boundary() == 2
    learning.source.cut = True
    learning.clocks.passed = HOUR - 120
    assert learning.boundary() == 2
    learning.clocks.wrong = -wrong if abs(wrong) < DAY else 0.0  # corrected, or wrong the other way
    assert learning.boundary() == 2
    learning.clocks.passed = HOUR + 120
    assert learning.boundary() == 1


def test_a_clock_put_back_gives_no_time(learning: Fleet) -> None:
    learning.boundary()
    learning.source.cut = True
    for passed, wrong, expected in ((1800.0, 0.0, 2), (1801.0, -5 * HOUR, 2), (HOUR + 60, -10 * DAY, 1)):
        learning.clocks.passed, learning.clocks.wrong = passed, wrong
        assert learning.boundary() == expected
    learning.clocks.reboot(10.0, wrong=-10 * DAY)
    learning.start()
    assert learning.boundary() == 1


def test_the_time_between_two_boots_counts_by_the_wall_clock(learning: Fleet) -> None:
    learning.boundary()
    learning.source.cut = True
    learning.clocks.reboot(2 * HOUR)
    learning.start()
    assert learning.boundary() == 1


def test_a_clock_far_ahead_is_corrected_and_forgotten(learning: Fleet) -> None:
    learning.clocks.wrong = 10 * DAY
    learning.start()
    assert learning.boundary() is None  # it says so, rather than trust what may be old
    learning.clocks.wrong = 0.0
    assert learning.boundary() == 2


def test_a_deployment_whose_clock_was_a_day_ahead_is_followed_back(learning: Fleet) -> None:
    learning.boundary()
    learning.source.permits = Permissions((_issue(learning, 2, DAY, 1000),))
    learning.boundary()
    learning.source.permits = Permissions((_issue(learning, 2, 10.0, 1001),))
    learning.clocks.passed = 10.0
    learning.start()
    assert learning.boundary() == 2


def test_an_old_permission_is_a_replay_and_a_foreign_or_changed_one_is_refused(learning: Fleet, tmp_path: Path) -> None:
    old = learning.channel.source.permissions("learning")
    learning.boundary()
    learning.source.permits = Permissions((_issue(learning, 2, 5.0),))
    learning.clocks.passed = 1500.0
    assert learning.boundary() == 2
    stranger = create_keys(tmp_path / "stranger")
    true = _issue(learning, 2, 3000.0, 2000)
    unsigned = replace(true, signature="")
    attacks = {
        "replay": next(one for one in old.permissions if one.role == "current"),
        "does not match": replace(true, valid_until=true.valid_until + DAY),
        "unknown key": replace(true, signature=stranger.sign(unsigned.statement())),
        "not for cohort": _signed(learning, replace(unsigned, cohort="canary")),
        "of epoch": _signed(learning, replace(unsigned, epoch=3)),
        "names no manifest": _signed(learning, replace(unsigned, manifest_sha256="../..")),
    }
    for problem, attack in attacks.items():
        learning.source.permits = Permissions((attack,))
        with pytest.raises(UntrustedPolicyError, match=problem):
            learning.robot.poll()
    learning.clocks.passed = HOUR + 60
    learning.source.cut = True
    assert learning.boundary() == 1  # none of them gave it time


def _signed(fleet: Fleet, unsigned: Permission) -> Permission:
    return replace(unsigned, signature=fleet.channel.signer.sign(unsigned.statement()))


def test_an_announcement_without_a_permission_is_bounded(learning: Fleet) -> None:
    """A service of the version before, or one that keeps the permissions to itself."""
    learning.source.permits = Permissions()
    assert learning.boundary() == 2
    learning.clocks.passed = HOUR - 60
    assert learning.boundary() == 2
    learning.clocks.passed = HOUR + 60
    assert learning.boundary() is None


def test_an_announcement_held_back_gives_no_time_to_a_robot_that_knows_permissions(learning: Fleet) -> None:
    learning.boundary()
    learning.channel.publish()
    learning.source.permits = Permissions()
    learning.clocks.passed = HOUR + 60
    assert learning.boundary() == 1  # 3 was announced more than an hour ago


def test_what_a_state_of_the_version_before_had_is_bounded_from_now(learning: Fleet) -> None:
    learning.boundary()
    root = learning.channel.home / "robots" / "r0"
    state = json.loads((root / "state.json").read_text())
    for name in ("epoch", "champion", "numbers", "grants"):
        del state[name]
    (root / "state.json").write_text(json.dumps(state))
    (root / "clock.json").unlink()
    learning.source.cut = True
    learning.start()
    assert learning.boundary() == 2
    learning.clocks.passed = HOUR + 60
    learning.start()
    assert learning.boundary() is None


def test_a_staged_policy_that_is_withdrawn_before_the_boundary_is_not_activated(learning: Fleet) -> None:
    learning.boundary()
    learning.channel.publish()
    learning.robot.poll()
    assert learning.robot.staged is not None and learning.robot.staged.version == 3
    learning.clocks.passed = 3 * HOUR  # a long episode: its permission ended meanwhile
    assert learning.robot.staged is not None and learning.robot.staged.version == 1
    active = learning.robot.activate_at_boundary()
    assert active is not None and active.version == 1


def test_an_announcement_that_was_superseded_while_its_bundle_came_is_not_activated(learning: Fleet) -> None:
    learning.boundary()
    learning.channel.publish()
    fetch, source = learning.channel.source.fetch, learning.channel.source

    def superseded(key: str) -> bytes:
        source.fetch = fetch  # type: ignore[method-assign]
        learning.channel.publish()
        return fetch(key)

    source.fetch = superseded  # type: ignore[method-assign]
    learning.robot.poll()
    assert learning.boundary() == 4


# --- what fails on the robot's own disk -------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_policy_and_no_leftovers(learning: Fleet, tiny_disk: Path) -> None:
    root = tiny_disk / "policy"
    robot = PolicySubscriber(root, "learning", learning.source, learning.channel.trust)
    robot.poll()
    robot.activate_at_boundary()
    learning.channel.publish()
    filler = tiny_disk / "filler"
    filler.write_bytes(b"\0" * (_free(tiny_disk) - 8192))
    for _ in range(3):
        with pytest.raises(StorageFullError, match="no room"):
            robot.poll()
        assert robot.active is not None and robot.active.version == 2 and robot.permitted
        assert not (root / "staging").exists() and not list(root.glob("*.tmp"))
    filler.unlink()
    assert robot.poll() == 3


def _fill(folder: Path) -> None:
    descriptor = os.open(folder / "filler", os.O_CREAT | os.O_WRONLY)
    with contextlib.suppress(OSError):
        while os.write(descriptor, b"\0" * 1024):
            pass
    os.close(descriptor)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def test_a_recall_counts_although_it_cannot_be_written(learning: Fleet, tiny_disk: Path) -> None:
    root = tiny_disk / "policy"
    learning.cohort = "canary"
    learning.channel.registry.register_candidate(2, proposer="ann")
    robot = PolicySubscriber(root, "canary", learning.source, learning.channel.trust)
    robot.poll()
    assert robot.activate_at_boundary().version == 2  # type: ignore[union-attr]
    _fill(tiny_disk)
    learning.channel.registry.end_trial(2, {}, decision="refuse")
    with pytest.raises(StorageFullError, match="what the robot accepted"):
        robot.poll()
    assert robot.activate_at_boundary().version == 1  # type: ignore[union-attr]
    (tiny_disk / "filler").unlink()
    robot.poll()
    again = PolicySubscriber(root, "canary", learning.source, learning.channel.trust)
    assert again.active is not None and again.active.version == 1


def test_a_bundles_folder_that_is_deleted_while_the_robot_runs_is_fetched_again(learning: Fleet) -> None:
    learning.boundary()
    shutil.rmtree(learning.channel.home / "robots" / "r0" / "bundles")
    assert learning.boundary() == 2
    learning.channel.publish()
    shutil.rmtree(learning.channel.home / "robots" / "r0")
    assert learning.boundary() == 3


def test_a_lost_state_comes_back_with_the_permission_although_the_announcement_is_a_replay(learning: Fleet) -> None:
    learning.boundary()
    (learning.channel.home / "robots" / "r0" / "state.json").write_bytes(b"{")
    learning.start()
    assert learning.boundary() == 2


# --- resets -----------------------------------------------------------------------------------------------------------


def _burn(channel: Channel) -> Announcement:
    """An announcement of a number beyond all use, signed in error."""
    known = channel.source.announcements("learning", 0)[-1]
    unsigned = replace(known, seq=2**62, kind="publish", signature="")
    return replace(unsigned, signature=channel.signer.sign(unsigned.statement()))


def test_a_burnt_number_is_recovered_from_by_a_reset(learning: Fleet) -> None:
    channel, source = learning.channel, learning.source
    burnt = _burn(channel)
    honest = channel.source.announcements
    channel.source.announcements = lambda cohort, after: [burnt]  # type: ignore[method-assign]
    assert learning.boundary() == 2
    channel.source.announcements = honest  # type: ignore[method-assign]
    channel.publish()
    assert learning.boundary() == 2 and channel.source.announcements("learning", 2**62) == []
    assert channel.registry.reset(actor="ann", reason="signed in error") == 1
    learning.clocks.passed = 1500.0  # permissions are asked for
    assert learning.boundary() == 3
    channel.publish()
    assert learning.boundary() == 4
    # Of the epoch before nothing is taken any more: neither the burnt number nor a permission.
    channel.source.announcements = lambda cohort, after: [burnt]  # type: ignore[method-assign]
    with pytest.raises(UntrustedPolicyError, match="of epoch 0"):
        learning.robot.poll()
    channel.source.announcements = honest  # type: ignore[method-assign]
    assert channel.registry.reset(actor="ann", reason="again") == 2
    source.permits = None
    assert learning.boundary() == 4 or learning.boundary() == 4


def test_a_burnt_row_of_the_catalog_is_recovered_from(learning: Fleet) -> None:
    channel = learning.channel
    with channel.plane.catalog.begin() as connection:
        connection.execute(sa.update(schema.announcements).where(schema.announcements.c.cohort == "learning").values(
            seq=2**62, authorisation={"manifest_sha256": _burn(channel).manifest_sha256,
                                      "signature": _resigned(channel)}))  # fmt: skip
    assert learning.boundary() == 2
    channel.registry.reset(actor="ann", reason="burnt")
    channel.publish()
    learning.start()
    assert learning.boundary() == 3
    assert max(said.seq for said in channel.source.announcements("learning", 0)) < 100


def _resigned(channel: Channel) -> str:
    return _burn(channel).signature


def test_old_and_forged_resets_are_nothing(learning: Fleet, tmp_path: Path) -> None:
    channel = learning.channel
    channel.registry.reset(actor="ann", reason="one")
    first = channel.source.permissions("learning").reset
    assert first is not None and learning.boundary() == 2
    channel.registry.reset(actor="ann", reason="two")
    learning.start()
    assert learning.boundary() == 2
    epoch = json.loads((channel.home / "robots" / "r0" / "state.json").read_text())["epoch"]
    assert epoch == 2
    learning.source.permits = Permissions(reset=first)
    learning.start()
    learning.robot.poll()  # an old one is shown for ever, and changes nothing
    stranger = create_keys(tmp_path / "stranger")
    for reset in (
        Reset(9, 0.0, first.signature),
        Reset(9, 0.0, stranger.sign(Reset(9, 0.0).statement())),
        Reset(9, 0.0),
    ):
        learning.source.permits = Permissions(reset=reset)
        learning.start()
        with pytest.raises(UntrustedPolicyError, match="reset to epoch 9"):
            learning.robot.poll()
    assert json.loads((channel.home / "robots" / "r0" / "state.json").read_text())["epoch"] == 2


def test_a_robot_of_the_version_before_verifies_what_was_announced_before_any_reset(learning: Fleet) -> None:
    """It signs over these fields and no other."""
    said = learning.channel.source.announcements("learning", 0)[0]
    assert said.statement().keys() == {"type", "seq", "cohort", "version", "kind", "manifest_sha256", "created_at"}
    learning.channel.registry.reset(actor="ann", reason="x")
    assert learning.channel.source.announcements("learning", 0)[-1].statement()["epoch"] == 1


# --- the server's side ------------------------------------------------------------------------------------------------


def test_the_table_stays_as_small_as_it_is(learning: Fleet) -> None:
    catalog = learning.channel.plane.catalog
    for _ in range(5):
        learning.channel.publish()
        with catalog.begin() as connection:
            permit(connection, learning.channel.signer, Validity(0.001, 0.001, 0.001))
    with catalog.read() as connection:
        rows = connection.execute(sa.select(schema.policy_permissions)).all()
    assert len(rows) <= 6 and len({row.number for row in rows}) == len(rows)


def test_only_what_is_due_is_signed_again_and_a_rotated_key_signs_at_once(learning: Fleet) -> None:
    settings = load_settings(home=learning.channel.home)
    (settings.keys_dir / "publishing.pem").unlink()  # the fixture publishes with the one signing key
    renewer = Renewer(learning.channel.plane.catalog, settings)
    assert renewer.step() == []
    other = Renewer(learning.channel.plane.catalog, settings)
    with pytest.raises(LeaseLostError, match="renewer"):
        other.step()
    rotate_key(settings.keys_dir)
    assert len(renewer.step()) == len(_shown(learning)) and renewer.step() == []
    renewer.lease.release()
    short = Renewer(learning.channel.plane.catalog, load_settings(home=learning.channel.home, permit_canary_s=0.01))
    assert {(one.cohort, one.role) for one in short.step()} == {("canary", "current")}


def test_each_cohort_s_permissions_are_signed_by_the_key_that_may(learning: Fleet) -> None:
    settings = load_settings(home=learning.channel.home)
    renewer = Renewer(learning.channel.plane.catalog, settings)
    signed = {(one.cohort, one.role): signed_by(one.signature) for one in renewer.step()}
    learner, deployment = load_signer(settings.keys_dir, "publish").key_id, learning.channel.signer.key_id
    assert set(signed.values()) == {learner} and all(cohort == "learning" for cohort, _ in signed)
    assert learning.boundary() is not None
    assert {signed_by(one.signature) for one in _shown(learning) if one.cohort != "learning"} <= {deployment}


def test_a_permission_of_production_by_the_learner_s_key_is_refused(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, "production")
    fleet.channel.publish(None)
    fleet.channel.registry.promote(1, {})
    learner = load_signer(tmp_path / "keys", "publish")
    true = next(one for one in _shown(fleet) if one.cohort == "production")
    unsigned = replace(true, number=true.number + 9, valid_until=true.valid_until + DAY, signature="")
    fleet.source.permits = Permissions((replace(unsigned, signature=learner.sign(unsigned.statement())),))
    with pytest.raises(UntrustedPolicyError, match="may publish and not promote"):
        fleet.robot.poll()


def _shown(fleet: Fleet) -> list[Permission]:
    with fleet.channel.plane.catalog.read() as connection:
        return [one for cohort in ("learning", "canary", "production")
                for one in permissions_of(connection, cohort).permissions]  # fmt: skip


# --- refusals by robots -----------------------------------------------------------------------------------------------


def test_a_policy_that_a_robot_refused_is_neither_tried_nor_promoted(learning: Fleet) -> None:
    channel = learning.channel
    catalog = channel.plane.catalog
    with catalog.begin() as connection:
        assert record_refusals(connection, "r1", [{"version": 2, "reason": "actions of NaN" + "x" * 900}]) == 1
        assert record_refusals(connection, "r1", [{"version": 2, "reason": "again"}]) == 0
    for act in (lambda: channel.registry.promote(2, {}), lambda: channel.registry.register_candidate(2, proposer="a")):
        with pytest.raises(ConfigError, match="policy 2 was refused by robot r1: actions of NaN"):
            act()
    assert channel.registry.overrule_refusals(2, actor="ann", reason="r1 has a broken camera") == ["r1"]
    channel.registry.promote(2, {})
    row = next(row for row in channel.registry.history() if row["decision"] == "overrule")
    assert (row["proposer"], row["evidence"]["robots"], row["version"]) == ("ann", ["r1"], 2)
    with catalog.begin() as connection:  # told again, it stays overruled; another robot's word counts
        record_refusals(connection, "r1", [{"version": 2, "reason": "again"}])
        assert refusals(connection, 2) == {}
    with pytest.raises(ConfigError, match="no robot refuses"):
        channel.registry.overrule_refusals(1, actor="ann", reason="")


@settings(deadline=None)
@given(
    told=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=400),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["version", "reason", "x"]), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_whatever_a_robot_tells_of_refusals_is_kept_or_left_out(
    told: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    channel = _shared(tmp_path_factory)
    with channel.plane.catalog.begin() as connection:
        record_refusals(connection, "r1", told)
        record_refusals(connection, "r2", [told, {"version": 1, "reason": told}])
        assert all(len(reason) <= 300 for reason in refusals(connection, 1).values())


_CHANNELS: list[Channel] = []


def _shared(factory: pytest.TempPathFactory) -> Channel:
    if not _CHANNELS:
        _CHANNELS.append(Channel(factory.mktemp("shared")))
        _CHANNELS[0].publish()
    return _CHANNELS[0]


# --- odd answers of every kind ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("seq", "cohort", "version", "kind", "manifest_sha256", "created_at", "signature", "epoch", "number", "role",
          "issued_at", "valid_until")  # fmt: skip
ODD = st.dictionaries(st.sampled_from(FIELDS), JSON | st.sampled_from(["learning", "publish", "current", "0" * 64]))


@settings(deadline=None)
@given(document=ODD | JSON)
def test_a_document_is_an_announcement_a_permission_or_a_value_error(document: object) -> None:
    for kind in (Announcement, Permission, Reset, Permissions):
        try:
            kind.parse(document)  # type: ignore[attr-defined]
        except ValueError:
            continue


class Odd:
    """A source that says and raises anything."""

    def __init__(self, announcements: object, permissions: object, error: Exception | None) -> None:
        self._said, self._permissions, self._error = announcements, permissions, error

    def announcements(self, cohort: str, after: int) -> object:
        if self._error is not None:
            raise self._error
        return self._said

    def permissions(self, cohort: str) -> object:
        return self._permissions

    def fetch(self, key: str) -> object:
        return self._said


ERRORS = st.sampled_from([None, KeyError("x"), TypeError(), ValueError(), RecursionError(), OSError(5, "x"),
                          UnicodeError(), AttributeError(), MemoryError(), IndexError()])  # fmt: skip


@settings(deadline=None)
@given(said=JSON | st.lists(ODD), permissions=JSON, error=ERRORS)
def test_whatever_the_source_says_is_an_error_with_a_name(
    said: object, permissions: object, error: Exception | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    channel = _shared(tmp_path_factory)
    robot = PolicySubscriber(
        channel.home / "odd",
        "learning",
        Odd(said, permissions, error),
        channel.trust,  # type: ignore[arg-type]
    )
    with contextlib.suppress(LwdError):
        robot.poll()
    assert robot.activate_at_boundary() is None


@settings(deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from([field for field in FIELDS if field in Announcement.__annotations__]), JSON)
)
def test_an_announcement_of_odd_types_is_refused_and_hides_nothing(
    fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    channel = _shared(tmp_path_factory)
    true = channel.source.announcements("learning", 0)
    root = channel.home / "odd2"
    shutil.rmtree(root, ignore_errors=True)
    source = Source(channel)
    source.announcements = lambda cohort, after: [replace(true[0], **fields), *true]  # type: ignore[method-assign,arg-type]
    robot = PolicySubscriber(root, "learning", source, channel.trust)
    with contextlib.suppress(LwdError):
        robot.poll()
    assert robot.activate_at_boundary().version == true[-1].version  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"at": "x"}', b'{"at": 1e999, "wall": 1, "uptime": 1}']
)
def test_a_damaged_clock_is_as_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "clock.json").write_bytes(data)
    clock = DeploymentClock(tmp_path / "clock.json", wall=lambda: 5.0)
    assert clock.now() == 5.0
    clock.witness(100.0)
    assert clock.now() >= 100.0
    assert DeploymentClock(tmp_path / "clock.json", wall=lambda: SKEW_MAX_S).now() >= 100.0
