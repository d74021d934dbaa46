"""A robot's own files, odd: it starts all the same, and waits for nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from policies import Channel

from infra.errors import UntrustedPolicyError
from infra.policy.artifact import read_signed_manifest, seal, verify

FILES = ("state.json", "floor.json", "clock.json", "rejected.json", "state-learning.json")
BIG = "1" + "0" * 400  # beyond a float
ODD = [
    b"", b"\xff", b"[]", b"3", b"null", b"[" * 100_000, b"{" * 3 + b"}" * 3, b'"x"', b" " * 2**23,
    f'{{"at": {BIG}, "wall": 1, "boot": "x", "uptime": 1}}'.encode(),
    f'{{"cohort": "learning", "announced_at": {BIG}}}'.encode(),
    f'{{"cohort": "learning", "seq": {BIG}}}'.encode(),
    f'{{"cohort": "learning", "grants": [{{"role": "current", "digest": "x", "until": {BIG}}}]}}'.encode(),
    f'{{"learning": [0, {BIG}]}}'.encode(),
    b'{"cohort": "learning", "numbers": 3}', b'[{"version": 1e999, "digest": "x", "reason": "x"}]',
]  # fmt: skip


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


PLACES = [pipe, endless, folder, loop]


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Channel:
    channel = Channel(tmp_path_factory.mktemp("home"))
    channel.publish()
    return channel


def runs(channel: Channel, name: str) -> None:
    """Such a robot comes to the policy that was announced, in this life and the next."""
    for _ in range(2):
        robot = channel.robot(name)
        robot.poll()
        active = robot.activate_at_boundary()
        assert active is not None and active.version == 1 and robot.permitted


@pytest.mark.parametrize("number", range(len(ODD)))
@pytest.mark.parametrize("file", FILES)
def test_an_odd_file_is_as_none(channel: Channel, file: str, number: int) -> None:
    root = channel.home / "robots" / f"{file}-{number}"
    root.mkdir(parents=True)
    (root / file).write_bytes(ODD[number])
    runs(channel, root.name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("file", [*FILES, "staging"])
def test_what_is_no_file_keeps_nobody_waiting(channel: Channel, file: str, place: Callable[[Path], None]) -> None:
    root = channel.home / "robots" / f"{file}-{place.__name__}"
    root.mkdir(parents=True)
    place(root / file)
    if place is folder and file != "staging":
        (root / file / "x").touch()
    runs(channel, root.name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", [*PLACES, Path.touch])
def test_what_lies_in_a_bundles_place_is_replaced(channel: Channel, place: Callable[[Path], None]) -> None:
    robot = channel.robot(f"bundle-{place.__name__}")
    digest = channel.source.announcements("learning", 0)[0].manifest_sha256
    target = channel.home / "robots" / f"bundle-{place.__name__}" / "bundles" / f"1-{digest[:16]}"
    target.parent.mkdir(parents=True)
    place(target)
    robot.poll()
    assert robot.activate_at_boundary() is not None and target.is_dir()


def test_what_cannot_be_removed_keeps_no_policy_from_the_boundary(channel: Channel) -> None:
    for below in ("bases", "bundles"):
        (channel.home / "robots" / "foreign" / below / "a" / "b").mkdir(parents=True)
    runs(channel, "foreign")


@pytest.mark.parametrize("file", ["policy.safetensors", "architecture.json", "manifest.json"])
def test_a_file_that_is_altered_after_it_was_verified_is_fetched_again_though_its_time_is_put_back(
    channel: Channel, file: str
) -> None:
    robot = channel.robot(f"altered-{file}")
    robot.poll()
    assert robot.staged is not None
    path = robot.staged.bundle / file
    was, true = path.stat(), path.read_bytes()
    path.write_bytes(bytes([true[0] ^ 1]) + true[1:])
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert robot.staged is None and robot.activate_at_boundary() is None
    robot.poll()
    assert robot.activate_at_boundary() is not None and path.read_bytes() == true


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("file", ["manifest.json", "manifest.sig", "architecture.json", "empty.json"])
def test_a_bundle_with_what_is_no_file_is_refused(
    channel: Channel, tmp_path: Path, file: str, place: Callable[[Path], None]
) -> None:
    (tmp_path / "architecture.json").write_text(json.dumps({"normaliser": None}))
    for name in ("policy.safetensors", "empty.json"):
        (tmp_path / name).touch()
    seal(tmp_path, channel.signer, version=1, parent=None, snapshot_version=0, cohort="learning")
    verify(tmp_path, channel.trust)
    (tmp_path / file).unlink()
    place(tmp_path / file)
    with pytest.raises(UntrustedPolicyError):
        verify(tmp_path, channel.trust)
    if file.startswith("manifest"):
        with pytest.raises(UntrustedPolicyError):
            read_signed_manifest(tmp_path, channel.trust)
