"""The directory store: whole or not at all, never outside its folder, and clear when there is no room."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import KILLED, digest, in_process, start_process

from infra.crashpoints import registered
from infra.errors import ConfigError, CorruptDataError, StorageFullError, UnavailableError
from infra.objects import DirectoryStore, episode_key

ID = "0" * 31 + "1"


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "objects")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB where the user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@given(st.binary(max_size=3 * 2**20))
@settings(max_examples=15, deadline=None)
def test_what_is_put_is_read_back(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    store = DirectoryStore(tmp_path_factory.mktemp("objects"))
    key = store.put_incoming("r0", ID, data)
    assert store.verify(key) == (len(data), digest(data))
    final = store.promote(key, digest(data))
    assert final == episode_key(digest(data))
    assert store.get(final) == data
    assert [item.key for item in store.list("episodes")] == [final]
    store.delete(key)
    assert not store.exists(key)
    assert list(store.list("incoming")) == []


def test_a_file_is_taken_like_bytes(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    store.put("policies/1/manifest.json", tmp_path / "f")
    assert store.get("policies/1/manifest.json") == b"abc"


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "", ".aside/x", "a\0b"])
def test_a_key_that_leaves_the_store_is_refused(store: DirectoryStore, key: str) -> None:
    for act in (store.get, store.verify, store.delete, store.exists):
        with pytest.raises(ConfigError, match="object key"):
            act(key)
    with pytest.raises(ConfigError, match="object key"):
        store.put(key, b"x")


@pytest.mark.parametrize(
    ("robot", "episode"), [("../r1", ID), ("r/1", ID), ("", ID), ("r1", "../" + "0" * 29), ("r1", "A" * 32), ("r1", "")]
)
def test_names_are_checked_before_a_path_is_built(store: DirectoryStore, robot: str, episode: str) -> None:
    with pytest.raises(ConfigError, match="id"):
        store.put_incoming(robot, episode, b"x")


def test_bytes_swapped_after_they_were_verified_are_not_promoted(store: DirectoryStore) -> None:
    key = store.put_incoming("r0", ID, b"good")
    sha = store.verify(key)[1]
    store.put(key, b"evil")
    with pytest.raises(CorruptDataError, match="sha256"):
        store.promote(key, sha)
    assert list(store.list("episodes")) == []


def test_promoting_twice_is_one_object_and_mends_a_damaged_one(store: DirectoryStore) -> None:
    key = store.put_incoming("r0", ID, b"good")
    final = store.promote(key, digest(b"good"))
    assert store.promote(key, digest(b"good")) == final
    (store.root / final).write_bytes(b"gooe")  # a bit flipped at rest
    store.promote(key, digest(b"good"))
    assert store.get(final) == b"good"


def test_an_absent_object_is_named(store: DirectoryStore) -> None:
    for act in (store.get, store.verify):
        with pytest.raises(CorruptDataError, match="episodes/ab/none.tar is not in"):
            act("episodes/ab/none.tar")
    store.delete("episodes/ab/none.tar")  # no error: deletions are repeated


def test_a_full_disk_is_named_and_leaves_nothing(tiny_disk: Path) -> None:
    store = DirectoryStore(tiny_disk / "objects")
    store.put("episodes/a", b"x" * 100_000)
    with pytest.raises(StorageFullError, match=f"{tiny_disk}/objects/episodes/b"):
        store.put("episodes/b", b"y" * 300_000)
    assert [item.key for item in store.list("episodes")] == ["episodes/a"]
    assert list((tiny_disk / "objects/.aside").iterdir()) == []
    store.put("episodes/c", b"z" * 10_000)  # room is used again


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError), (errno.EIO, UnavailableError)],
)
def test_errors_of_the_disk(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, number: int, error) -> None:  # type: ignore[no-untyped-def]
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    for call in ("write", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(error, match="incoming/r0"):
                store.put_incoming("r0", ID, b"x")
    assert list(store.list("incoming")) == []


def test_short_writes_are_completed(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    store.put("a", b"0123456789")
    assert store.get("a") == b"0123456789"


def _put(root: Path, key: str, data: bytes) -> None:
    DirectoryStore(root).put(key, data)


@pytest.mark.parametrize("point", registered("objects.py"))
def test_a_killed_writer_leaves_the_old_object_or_the_new(tmp_path: Path, point: str) -> None:
    _put(tmp_path, "k", b"old")
    assert in_process(_put, tmp_path, "k", b"new", crash=point) == KILLED
    store = DirectoryStore(tmp_path)
    assert store.get("k") in (b"old", b"new")
    assert [item.key for item in store.list("k")] == []  # `k` is an object, not a folder
    store.put("k", b"newer")
    assert store.get("k") == b"newer"
    store.sweep_aside(older_than_s=0)
    assert list((tmp_path / ".aside").iterdir()) == []


def test_writers_of_one_key_never_mix(tmp_path: Path) -> None:
    contents = [bytes([n]) * 200_000 for n in range(4)]
    processes = [start_process(_put, tmp_path, "k", content) for content in contents]
    for process in processes:
        process.join(60)
    assert DirectoryStore(tmp_path).get("k") in contents
