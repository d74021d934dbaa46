"""Policies that complete a base: only the action expert travels, the base comes once and is checked. Row 31."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from invariants import KILLED, in_process
from policies import Channel, make_base

from infra.errors import ConfigError, CorruptDataError, StorageFullError, UntrustedPolicyError
from infra.policy.announcement import Announcement, base_key
from infra.policy.artifact import BASE, file_sha256, verify
from infra.policy.bases import StreamingSource
from infra.policy.channel import fetch_bundle
from infra.policy.subscriber import PolicySubscriber


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    return Channel(tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "model" / "pi.safetensors")


class Counting:
    """A source that notes what is fetched, in whole or by blocks."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.fetched: list[str] = []

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        return self._channel.source.announcements(cohort, after)

    def fetch(self, key: str) -> bytes:
        self.fetched.append(key)
        return self._channel.source.fetch(key)

    def bases(self) -> int:
        return sum(key.startswith("policies/bases/") for key in self.fetched)


class Streaming(Counting):
    """One that writes bases to files; `fail` is raised half way."""

    fail: Exception | None = None

    def fetch(self, key: str) -> bytes:
        assert not key.startswith("policies/bases/"), "a base must not come through memory here"
        return super().fetch(key)

    def fetch_to(self, key: str, path: Path, most: int) -> None:
        self.fetched.append(key)
        data = self._channel.source.fetch(key)
        assert len(data) <= most
        with path.open("wb") as handle:
            handle.write(data[: len(data) // 2])
            if self.fail is not None and key.startswith("policies/bases/"):
                raise self.fail
            handle.write(data[len(data) // 2 :])


def robot(channel: Channel, source: Counting) -> PolicySubscriber:
    return PolicySubscriber(channel.home / "robots" / "r0", "learning", source, channel.trust)


def take(subscriber: PolicySubscriber) -> Path:
    subscriber.poll()
    active = subscriber.activate_at_boundary()
    assert active is not None
    return active.bundle


@pytest.mark.parametrize("kind", [Counting, Streaming])
def test_the_base_is_uploaded_and_fetched_once(channel: Channel, base: Path, kind: type[Counting]) -> None:
    put, keys = channel.plane.objects.put, []
    channel.plane.objects.put = lambda key, data: (keys.append(key), put(key, data))[1]  # type: ignore[method-assign]
    source = kind(channel)
    assert isinstance(source, StreamingSource) == (kind is Streaming)
    subscriber = robot(channel, source)
    for _ in range(3):
        channel.publish(base=base)
        bundle = take(subscriber)
        assert (bundle / BASE).read_bytes() == base.read_bytes()
    key = base_key(file_sha256(base))
    assert keys.count(key) == 1 and source.fetched.count(key) == 1
    kept = channel.home / "robots" / "r0" / "bases" / f"{file_sha256(base)}.safetensors"
    assert kept.samefile(bundle / BASE)  # one file on the robot's disk, however many policies complete it
    again = robot(channel, source)
    channel.publish(base=base)
    take(again)
    assert source.bases() == 1, "a robot that was started again fetched the base again"


def test_bases_that_no_kept_policy_needs_are_removed(channel: Channel, base: Path) -> None:
    other = make_base(channel.home / "other.safetensors", seed=1)
    subscriber = channel.robot()
    folder = channel.home / "robots" / "r0" / "bases"
    for now, kept in (
        (base, {base}),
        (other, {base, other}),  # the previous policy is kept to go back to
        (other, {other}),
        (None, {other}),
        (None, set()),
    ):
        channel.publish(base=now)
        bundle = take(subscriber)
        assert (bundle / BASE).exists() == (now is not None)
        assert {path.stem for path in folder.iterdir()} == {file_sha256(path) for path in kept}


@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_row_31_a_damaged_base_is_refused_and_the_last_good_policy_stays(
    channel: Channel, base: Path, damage: str
) -> None:
    subscriber = channel.robot()
    channel.publish()
    assert verify(take(subscriber), channel.trust).version == 1
    channel.publish(base=base)
    key, good = base_key(file_sha256(base)), base.read_bytes()
    if damage == "missing":
        channel.plane.objects.delete(key)
    else:
        channel.plane.objects.put(key, good[:-1] if damage == "truncated" else good[:-1] + bytes([good[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(UntrustedPolicyError, match="base"):
            subscriber.poll()
        assert subscriber.staged is None
        active = subscriber.activate_at_boundary()
        assert active is not None and active.version == 1
        assert list((channel.home / "robots" / "r0" / "bases").iterdir()) == []
    if damage == "truncated":
        channel.publish(base=base)  # the publisher sees that the store holds a part only, and writes it again
        assert subscriber.poll() == 3
    else:
        channel.plane.objects.put(key, good)
        assert subscriber.poll() == 2


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (CorruptDataError("cut off", "again"), UntrustedPolicyError),
        (OSError(28, "No space left on device"), StorageFullError),
    ],
)
def test_a_base_cut_off_on_the_way_leaves_nothing(
    channel: Channel, base: Path, failure: Exception, expected: type[Exception]
) -> None:
    source = Streaming(channel)
    subscriber = robot(channel, source)
    channel.publish(base=base)
    source.fail = failure
    with pytest.raises(expected):
        subscriber.poll()
    assert list((channel.home / "robots" / "r0" / "bases").iterdir()) == [] and subscriber.staged is None
    source.fail = None
    assert subscriber.poll() == 1


def test_a_base_that_rots_on_the_robot_is_fetched_again(channel: Channel, base: Path) -> None:
    source = Counting(channel)
    channel.publish()
    subscriber = robot(channel, source)
    take(subscriber)
    channel.publish(base=base)
    bundle = take(subscriber)
    (bundle / BASE).write_bytes(b"rot")  # the one file that all of them link to
    again = robot(channel, source)
    assert again.active is not None and again.active.version == 1
    assert again.poll() == 2 and source.bases() == 2
    assert verify(again.activate_at_boundary().bundle, channel.trust).version == 2  # type: ignore[union-attr]


def test_a_manifest_is_believed_before_a_base_is_fetched_on_its_word(channel: Channel, base: Path) -> None:
    channel.publish(base=base)
    manifest = next(info.key for info in channel.plane.objects.list("policies") if info.key.endswith("manifest.sig"))
    channel.plane.objects.put(manifest, b"nobody:AAAA")
    source = Counting(channel)
    with pytest.raises(UntrustedPolicyError, match="unknown key"):
        robot(channel, source).poll()
    assert source.bases() == 0


def test_a_base_that_cannot_be_linked_is_copied(channel: Channel, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("infra.policy.bases.os.link", refuse)
    channel.publish(base=base)
    bundle = take(channel.robot())
    assert (bundle / BASE).stat().st_nlink == 1 and (bundle / BASE).read_bytes() == base.read_bytes()


def test_an_evaluation_finds_the_base_in_the_folder(channel: Channel, base: Path) -> None:
    for _ in range(2):
        channel.publish(base=base)
    for version in (1, 2):
        bundle = fetch_bundle(
            channel.plane.objects, channel.plane.catalog, channel.trust, version, channel.home / "eval" / str(version)
        )
        assert verify(bundle, channel.trust).version == version
    assert (channel.home / "eval" / "1" / BASE).samefile(channel.home / "eval" / "2" / BASE)


def test_a_base_that_is_not_there_is_named(channel: Channel) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.safetensors"):
        channel.publish(base=channel.home / "nowhere.safetensors")
    assert channel.registry.policies() == []


def _publish(home: Path) -> None:
    Channel(home).publish(base=home / "model" / "pi.safetensors")


def _take(home: Path) -> None:
    take(Channel(home).robot())


@pytest.mark.parametrize(("point", "work"), [("policy.base_stored", _publish), ("policy.base_kept", _take)])
def test_a_kill_beside_the_base_loses_nothing(tmp_path: Path, base: Path, point: str, work: object) -> None:
    channel = Channel(tmp_path)
    if work is _take:
        channel.publish(base=base)
    channel.plane.catalog.close()
    assert in_process(work, tmp_path, crash=point) == KILLED  # type: ignore[arg-type]
    after = Channel(tmp_path)
    assert len(after.registry.policies()) == (work is _take) and after.robot().active is None
    assert in_process(work, tmp_path) == 0  # type: ignore[arg-type]
    assert verify(take(Channel(tmp_path).robot()), channel.trust).version == 1
