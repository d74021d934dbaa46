"""The directory store: the promises of every store, clear when there is no room, and whole after a SIGKILL."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from invariants import KILLED, digest, in_process, start_process
from objects_contract import ID, ObjectsContract, upload

from infra.crashpoints import registered
from infra.errors import ConfigError, StorageFullError, UnavailableError
from infra.objects import incoming_key
from infra.objects.directory import DirectoryStore


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "objects")


class TestDirectory(ObjectsContract):
    """The contract, on files."""


@pytest.mark.parametrize(
    ("robot", "episode"), [("../r1", ID), ("r/1", ID), ("", ID), ("r1", "../" + "0" * 29), ("r1", "A" * 32), ("r1", "")]
)
def test_names_are_checked_before_a_key_is_built(robot: str, episode: str) -> None:
    with pytest.raises(ConfigError, match="id"):
        incoming_key(robot, episode)


def test_each_upload_has_a_key_of_its_own() -> None:
    assert len({incoming_key("r0", ID) for _ in range(100)}) == 100
    assert incoming_key("r0", ID).startswith(f"incoming/r0/{ID}-")


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_leaves_nothing(tiny_disk: Path) -> None:
    store = DirectoryStore(tiny_disk / "objects")
    store.put("episodes/a", b"x" * 100_000)
    with pytest.raises(StorageFullError, match=f"{tiny_disk}/objects/episodes/b"):
        store.put("episodes/b", b"y" * 300_000)
    assert [item.key for item in store.list("episodes")] == ["episodes/a"]
    assert list((tiny_disk / "objects/.aside").iterdir()) == []
    store.put("episodes/c", b"z" * 10_000)  # room is used again


def test_an_upload_that_cannot_be_copied_for_lack_of_room_is_not_accepted(tiny_disk: Path) -> None:
    store = DirectoryStore(tiny_disk / "objects")
    data = b"x" * 150_000
    incoming = upload(store, data)
    with pytest.raises(StorageFullError, match="episodes"):
        store.accept(incoming, digest(data), len(data))
    assert list(store.list("episodes")) == []
    assert store.get(incoming) == data


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
                upload(store, b"x")
    assert list(store.list("incoming")) == []


def test_an_object_that_the_disk_does_not_give_is_named(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    incoming = upload(store, b"x")
    final = store.accept(incoming, digest(b"x"), 1)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("infra.objects.directory.hashlib.file_digest", fail)
    with pytest.raises(UnavailableError, match=f"{final}.*Input/output"):
        store.accept(incoming, digest(b"x"), 1)


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(UnavailableError, match=f"{tmp_path}/f"):
        DirectoryStore(tmp_path / "f" / "objects")


def test_short_writes_are_completed(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    store.put("a", b"0123456789")
    assert store.get("a") == b"0123456789"


# --- crashes ----------------------------------------------------------------------------------------------------------


def _put(root: Path, key: str, data: bytes) -> None:
    DirectoryStore(root).put(key, data)


@pytest.mark.parametrize("point", registered("objects/directory.py"))
def test_a_killed_writer_leaves_the_old_object_or_the_new(tmp_path: Path, point: str) -> None:
    _put(tmp_path, "k", b"old")
    assert in_process(_put, tmp_path, "k", b"new", crash=point) == KILLED
    store = DirectoryStore(tmp_path)
    assert store.get("k") in (b"old", b"new")
    assert [item.key for item in store.list("k")] == []  # `k` is an object, not a folder
    store.put("k", b"newer")
    assert store.get("k") == b"newer"
    store.sweep_unfinished(older_than_s=3600)
    store.sweep_unfinished(older_than_s=0)
    assert list((tmp_path / ".aside").iterdir()) == []


def _accept(root: Path, incoming: str, data: bytes) -> None:
    DirectoryStore(root).accept(incoming, digest(data), len(data))


@pytest.mark.parametrize("point", registered("objects/directory.py"))
def test_a_killed_accept_leaves_no_object_or_the_right_one(tmp_path: Path, point: str) -> None:
    store = DirectoryStore(tmp_path)
    incoming = upload(store, b"good")
    assert in_process(_accept, tmp_path, incoming, b"good", crash=point) == KILLED
    assert [store.get(item.key) for item in store.list("episodes")] in ([], [b"good"])
    assert store.get(store.accept(incoming, digest(b"good"), 4)) == b"good"


def test_there_are_crash_points_to_kill_at() -> None:
    assert len(registered("objects/directory.py")) == 2


def test_processes_that_write_one_key_never_mix(tmp_path: Path) -> None:
    contents = [bytes([n]) * 200_000 for n in range(4)]
    processes = [start_process(_put, tmp_path, "k", content) for content in contents]
    for process in processes:
        process.join(60)
    assert DirectoryStore(tmp_path).get("k") in contents


def test_folders_that_were_deleted_are_made_again(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "objects")
    store.put("incoming/r0/a", b"1")
    shutil.rmtree(tmp_path / "objects")
    assert list(store.list("incoming")) == [] and store.sweep_unfinished(0.0) == 0
    shutil.rmtree(tmp_path / "objects")
    store.put("incoming/r0/b", b"2")
    assert store.get("incoming/r0/b") == b"2"
