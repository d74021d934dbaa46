"""Rows 31 to 36, on real PostgreSQL and S3: policies damaged, missed, swapped, tried, replayed, cut off by a kill."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1] / "flows"))
sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "policy"))
from canary_fleet import QUICK, at_work
from invariants import KILLED, in_process, start_process
from policies import make_base, make_bundle

from flows.canary import Watcher, start
from flows.canary_gate import Answer, CanarySpec, load_canary
from flows.deployment import deployment
from infra.catalog import schema
from infra.crashpoints import registered
from infra.errors import UntrustedPolicyError
from infra.plane import open_catalog, open_objects
from infra.policy.announcement import Announcement, base_key
from infra.policy.approval import create_person_key, enrol_person, load_person_key
from infra.policy.artifact import BASE, file_sha256, verify
from infra.policy.channel import CatalogPolicySource, PolicyPublisher
from infra.policy.keys import create_keys, load_trusted
from infra.policy.registry import Registry
from infra.policy.subscriber import PolicySubscriber
from infra.settings import load_settings

pytestmark = pytest.mark.system
TABLES = (schema.policies, schema.aliases, schema.promotions, schema.announcements)


class Channel:
    """Publisher, registry and robots of a home in the fleet profile; each process opens its own."""

    def __init__(self, home: Path) -> None:
        settings = load_settings(home=home)
        self.home = home
        self.catalog, self.objects = open_catalog(settings, migrate=True), open_objects(settings)
        self.signer = create_keys(settings.keys_dir)
        self.trust = load_trusted(settings.keys_dir)
        self.publisher = PolicyPublisher(self.catalog, self.objects, self.signer)
        self.registry = Registry(self.catalog, self.signer)
        self.source = CatalogPolicySource(self.catalog, self.objects)
        self.count = 0

    def publish(self, cohort: str | None = "learning", base: Path | None = None) -> int:
        self.count += 1
        return self.publisher.publish(make_bundle(self.home / "export", self.count), cohort=cohort, base=base)

    def robot(self, name: str = "r0", cohort: str = "learning", source: object = None) -> PolicySubscriber:
        return PolicySubscriber(self.home / "robots" / name, cohort, source or self.source, self.trust)  # type: ignore[arg-type]

    def state(self) -> dict[str, list[tuple[object, ...]]]:
        """Every row that says which policy is where, without the clock's."""
        said: dict[str, list[tuple[object, ...]]] = {}
        with self.catalog.read() as connection:
            for table in TABLES:
                columns = [c for c in table.c if not c.name.endswith("_at") and not isinstance(c.type, sa.JSON)]
                said[table.name] = [
                    tuple(row) for row in connection.execute(sa.select(*columns).order_by(*table.primary_key))
                ]
        return said


@pytest.fixture
def channel(fleet_home: Path) -> Iterator[Channel]:
    channel = Channel(fleet_home)
    assert channel.catalog.engine.dialect.name == "postgresql"
    yield channel
    channel.catalog.close()


class Recording:
    """A source that notes what is fetched, and may say what it likes."""

    def __init__(self, channel: Channel, said: Sequence[Announcement] | None = None) -> None:
        self._channel, self._said = channel, said
        self.fetched: list[str] = []

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        return self._channel.source.announcements(cohort, after) if self._said is None else self._said

    def fetch(self, key: str) -> bytes:
        self.fetched.append(key)
        return self._channel.source.fetch(key)


def take(robot: PolicySubscriber) -> int:
    robot.poll()
    active = robot.activate_at_boundary()
    assert active is not None
    return active.version


# --- row 31 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weights", "manifest", "base"])
@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_row_31_a_damaged_policy_is_refused_and_the_last_good_one_stays(
    channel: Channel, tmp_path: Path, part: str, damage: str
) -> None:
    base = make_base(tmp_path / "base.safetensors")
    robot = channel.robot()
    channel.publish()
    assert take(robot) == 1
    channel.publish(base=base)
    prefix = next(row["bundle_key"] for row in channel.registry.policies() if row["version"] == 2)
    key = {
        "weights": f"{prefix}/policy.safetensors",
        "manifest": f"{prefix}/manifest.json",
        "base": base_key(file_sha256(base)),
    }[part]
    good = channel.objects.get(key)
    if damage == "missing":
        channel.objects.delete(key)
    else:
        channel.objects.put(key, good[:-2] if damage == "truncated" else good[:-1] + bytes([good[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(UntrustedPolicyError):
            robot.poll()
        active = robot.activate_at_boundary()
        assert active is not None and active.version == 1 and verify(active.bundle, channel.trust).version == 1
    assert channel.robot().active == active  # nor after a restart
    channel.objects.put(key, good)
    assert take(robot) == 2


# --- row 32 -----------------------------------------------------------------------------------------------------------


def test_row_32_a_robot_offline_across_five_publishes_takes_the_latest_approved_only(
    channel: Channel, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base.safetensors")
    channel.publish(None)
    channel.registry.promote(1, {})
    production, learning = channel.robot("p0", "production"), channel.robot("l0")
    assert take(production) == 1
    for version in range(2, 7):  # offline: five are published, two of them approved, the last one is not
        channel.publish(base=base)
        if version in (3, 5):
            channel.registry.promote(version, {})
    for robot, newest, cohort in ((production, 5, "production"), (learning, 6, "learning")):
        source = Recording(channel)
        robot = channel.robot({"production": "p0", "learning": "l0"}[cohort], cohort, source)
        assert take(robot) == newest
        digest = next(p["manifest_sha256"] for p in channel.registry.policies() if p["version"] == newest)
        folders = {key.rpartition("/")[0] for key in source.fetched}
        assert folders == {f"policies/{digest}", base_key(file_sha256(base)).rpartition("/")[0]}
        assert len(source.fetched) == len(set(source.fetched)) == 5


# --- row 33 -----------------------------------------------------------------------------------------------------------


def _publish_ten(home: Path) -> None:
    channel = Channel(home)
    for _ in range(10):
        channel.publish()


def test_row_33_a_policy_published_in_mid_episode_is_swapped_at_the_boundary(
    channel: Channel, fleet_home: Path
) -> None:
    """Ten are published by another process while a robot runs episodes, looking for policies at every step of them."""
    channel.publish()
    robot = channel.robot()
    take(robot)
    publisher = start_process(_publish_ten, fleet_home)
    episodes: list[set[int]] = []
    while not episodes or publisher.is_alive() or max(episodes[-1]) < 11:
        assert len(episodes) < 2000
        ran: set[int] = set()
        for _ in range(3):  # steps of one episode
            active = robot.active
            assert active is not None and (active.bundle / "policy.safetensors").exists()
            ran.add(verify(active.bundle, channel.trust).version)
            robot.poll()
        episodes.append(ran)
        robot.activate_at_boundary()
    publisher.join()
    assert publisher.exitcode == 0
    assert all(len(ran) == 1 for ran in episodes), "I6: a policy was swapped within an episode"
    order = [next(iter(ran)) for ran in episodes]
    assert order == sorted(order) and order[-1] == 11 and len(set(order)) > 1


# --- row 34 -----------------------------------------------------------------------------------------------------------


def test_row_34_a_canary_that_regresses_is_rolled_back_and_its_reach_is_bounded(fleet_home: Path) -> None:
    spec = CanarySpec.model_validate(load_canary().model_dump() | QUICK)
    with deployment(fleet_home) as plane:
        fleet = at_work(plane)
        start(plane, spec, 2)
        watcher, answers = Watcher(plane, spec), [Answer.CONTINUE]
        while answers[-1] is Answer.CONTINUE:
            fleet.together([False] * 4, [True] * 4)
            look = watcher.look()
            assert look is not None
            answers.append(look.answer)
        assert answers[-1] is Answer.HARM and look.decision.evidence["episodes"] < spec.episodes.max
        for name in ("p0", "p1", "c0"):
            fleet.boundary(name)
        assert fleet.history == {"p0": [1], "p1": [1], "c0": [1, 2, 1], "l0": []}
        assert [row["decision"] for row in plane.registry.history()] == ["promote", "canary", "refuse"]


def test_row_34_of_several_watchers_one_acts(fleet_home: Path) -> None:
    spec = CanarySpec.model_validate(load_canary().model_dump() | QUICK)
    with deployment(fleet_home) as plane:
        fleet = at_work(plane)
        start(plane, spec, 2)
        fleet.together([False] * 24, [True] * 24)
        looks: list[object] = []
        together = threading.Barrier(4)

        def look() -> None:
            watcher = Watcher(plane, spec)
            together.wait()
            looks.append(watcher.look())

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(looks) == 4 and sum(found is not None for found in looks) == 1
        assert [row["decision"] for row in plane.registry.history()] == ["promote", "canary", "refuse"]
        assert [said.kind for said in fleet.subscribers["c0"]._source.announcements("canary", 0)].count("rollback") == 1


# --- row 35 -----------------------------------------------------------------------------------------------------------


def test_row_35_an_old_pointer_is_refused_without_a_signed_rollback(channel: Channel) -> None:
    for version in (1, 2):
        channel.publish(None)
        channel.registry.promote(version, {})
    old = channel.source.announcements("production", 0)[0]
    assert take(channel.robot("p0", "production")) == 2
    for said, why in (
        (old, "replay"),
        (replace(old, seq=99), "does not match its content"),
        (replace(old, seq=99, kind="rollback"), "does not match its content"),
    ):
        robot = channel.robot("p0", "production", Recording(channel, [said]))
        with pytest.raises(UntrustedPolicyError, match=why):
            robot.poll()
        active = robot.activate_at_boundary()
        assert active is not None and active.version == 2
    # Whoever has the database points the newest announcement at the old policy.
    with channel.catalog.begin() as connection:
        values = {"seq": 99, "cohort": "production", "version": 1, "kind": "rollback", "manifest_key": "",
                  "authorisation": {"manifest_sha256": old.manifest_sha256, "signature": old.signature},
                  "created_at": old.created_at}  # fmt: skip
        connection.execute(sa.insert(schema.announcements).values(values))
    robot = channel.robot("p0", "production")
    with pytest.raises(UntrustedPolicyError, match="does not match its content"):
        robot.poll()
    with channel.catalog.begin() as connection:
        connection.execute(sa.delete(schema.announcements).where(schema.announcements.c.seq == 99))
    channel.registry.rollback(actor="ann", reason="worse")
    assert take(robot) == 1


# --- row 36 -----------------------------------------------------------------------------------------------------------


def _publish(home: Path) -> None:
    Channel(home).publisher.publish(make_bundle(home / "third", 3), base=make_base(home / "b" / "base.safetensors"))


def _promote(home: Path) -> None:
    Channel(home).registry.promote(2, {})


def _rollback(home: Path) -> None:
    Channel(home).registry.rollback(actor="ann", reason="worse")


def _try(home: Path) -> None:
    Channel(home).registry.register_candidate(2, proposer="ann")


def _refuse(home: Path) -> None:
    Channel(home).registry.end_trial(2, {}, decision="refuse")


# point: what passes it, whether all is done when it dies there, and the cohort and policy that follow
CRASHES = {
    "policy.base_stored": (_publish, False, "learning", 3),
    "policy.objects_stored": (_publish, False, "learning", 3),
    "policy.row_inserted": (_publish, False, "learning", 3),
    "policy.announced": (_publish, True, "learning", 3),
    "registry.promoted": (_promote, False, "production", 2),
    "registry.promotion_announced": (_promote, True, "production", 2),
    "registry.rolled_back": (_rollback, False, "production", 1),
    "registry.candidate_registered": (_try, False, "canary", 2),
    "registry.trial_ended": (_refuse, False, "canary", 1),
}


def test_row_36_every_point_of_the_servers_end_is_here() -> None:
    assert set(CRASHES) == set(registered("policy/")) - {"policy.base_kept"}  # that one is the robot's


@pytest.mark.parametrize("point", CRASHES)
def test_row_36_a_kill_between_approval_and_announcement_leaves_all_or_nothing(fleet_home: Path, point: str) -> None:
    work, done, cohort, version = CRASHES[point]
    before = Channel(fleet_home)
    for _ in range(2):
        before.publish(None)
    before.registry.promote(1, {})
    if work is _rollback:
        before.registry.promote(2, {})
    elif work is _refuse:
        before.registry.register_candidate(2, proposer="ann")
    was = before.state()
    before.catalog.close()
    assert in_process(work, fleet_home, crash=point) == KILLED
    after = Channel(fleet_home)
    found = after.state()
    assert (found != was) == done
    after.catalog.close()
    if not done:
        assert in_process(work, fleet_home) == 0
    ended = after.state()
    assert ended == found if done else ended != was
    grown = {name: len(rows) - len(was[name]) for name, rows in ended.items() if name != "aliases"}
    said = 2 if work in (_promote, _rollback) else 1
    decided = 0 if work is _publish else 1
    assert grown == {"policies": 1 - decided, "promotions": decided, "announcements": said}, "it completed once"
    robot = after.robot("fresh", cohort)
    assert take(robot) == version
    assert (robot.active.bundle / BASE).exists() == (work is _publish)  # type: ignore[union-attr]
    after.catalog.close()


@pytest.mark.parametrize("verb", ["update", "delete"])
def test_the_audit_is_append_only_on_postgresql(channel: Channel, verb: str) -> None:
    channel.publish(None)
    channel.registry.promote(1, {"why": "first"})
    statement = sa.delete(schema.promotions) if verb == "delete" else sa.update(schema.promotions).values(proposer="x")
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), channel.catalog.begin() as connection:
        connection.execute(statement)
    (row,) = channel.registry.history()
    assert (row["proposer"], row["decision"]) == ("gate", "promote")


def test_an_approval_is_a_person_s_signature_over_artifact_and_evidence(channel: Channel) -> None:
    channel.publish(None)
    keys = channel.home / "keys"
    create_person_key(channel.home / "bob.pem")
    enrol_person(keys, "bob", channel.home / "bob.pub")
    bob = load_person_key(channel.home / "bob.pem")
    registry = Registry(channel.catalog, channel.signer, approval=True, keys_dir=keys)
    registry.propose(1, {"verdict": "PASS"}, against=None, proposer="gate")
    proposal = registry.proposal(1)
    other = replace(proposal, artifact_sha256="0" * 64).approval("bob").signed(bob)
    with pytest.raises(UntrustedPolicyError, match="artifact_sha256 0000000000000000"):
        registry.promote(1, proposal.evidence, approval=other)
    assert registry.alias("champion") is None and channel.source.announcements("production", 0) == []
    registry.promote(1, proposal.evidence, approval=proposal.approval("bob").signed(bob))
    row = registry.history()[-1]
    assert (row["proposer"], row["approver"], row["artifact_sha256"]) == ("gate", "bob", proposal.artifact_sha256)
