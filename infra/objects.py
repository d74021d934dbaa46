"""Where bytes are kept: a robot's own `incoming/` keys, and content-addressed places that no robot can write.

A key is a relative POSIX path. Nothing here trusts the writer's word: what is referenced was read back first.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from infra.crashpoints import crashpoint
from infra.episode import EPISODE_ID
from infra.errors import ConfigError, CorruptDataError, StorageFullError, UnavailableError

Payload = bytes | Path
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_BLOCK = 2**20


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its key, bytes, and when it was last written (seconds since the epoch, the store's clock)."""

    key: str
    size: int
    modified: float


class ObjectStore(Protocol):
    """What the data plane asks of a store; S3 comes as another class with these methods.

    Every method raises UnavailableError when the store does not answer and StorageFullError when it has no room.
    """

    def put(self, key: str, data: Payload) -> None:
        """Write an object whole or not at all, durable on return; replaces what was there."""

    def put_incoming(self, robot_id: str, episode_id: str, data: Payload) -> str:
        """Upload into the robot's own area; returns the key."""

    def verify(self, key: str) -> tuple[int, str]:
        """(size, sha256) of what the store itself holds now; CorruptDataError if it holds nothing there."""

    def promote(self, incoming: str, sha256: str) -> str:
        """Copy, inside the store, to `episodes/<sha[:2]>/<sha>.tar`; returns that key.

        Raises CorruptDataError, leaving nothing behind, if the bytes copied are not those of `sha256`.
        """

    def get(self, key: str) -> bytes:
        """The object's bytes; CorruptDataError if there is none."""

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose key begins with `prefix`, a folder, in order of key."""


def incoming_key(robot_id: str, episode_id: str) -> str:
    """A fresh key for one upload; ConfigError if a name could leave the robot's area."""
    if not _NAME.match(robot_id):
        raise ConfigError(f"robot id {robot_id!r} is not a plain name", "use letters, digits, '-', '_', '.', up to 64")
    if not EPISODE_ID.match(episode_id):
        raise ConfigError(f"episode id {episode_id!r} is not 32 lower-case hex digits", "make it with new_episode_id()")
    return f"incoming/{robot_id}/{episode_id}-{uuid.uuid4().hex[:8]}.tar"


def episode_key(sha256: str) -> str:
    """The content-addressed key of an episode object."""
    if not _SHA256.match(sha256):
        raise ConfigError(
            f"{sha256!r} is not a sha256 of 64 lower-case hex digits", "send hashlib.sha256().hexdigest()"
        )
    return f"episodes/{sha256[:2]}/{sha256}.tar"


class DirectoryStore:
    """Objects as files below `root`: written aside, fsynced, renamed, and the folder fsynced.

    Args:
        root: the folder; made if absent. One file system, so that a rename is atomic.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._aside = self.root / ".aside"
        try:
            self._aside.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _explain(error, self._aside) from error

    def put(self, key: str, data: Payload) -> None:
        if isinstance(data, Path):
            with data.open("rb") as source:
                self._write(key, source)
        else:
            self._write(key, data)

    def put_incoming(self, robot_id: str, episode_id: str, data: Payload) -> str:
        key = incoming_key(robot_id, episode_id)
        self.put(key, data)
        return key

    def verify(self, key: str) -> tuple[int, str]:
        with self._open(key) as handle:
            digest, size = hashlib.sha256(), 0
            while block := handle.read(_BLOCK):
                digest.update(block)
                size += len(block)
        return size, digest.hexdigest()

    def promote(self, incoming: str, sha256: str) -> str:
        key = episode_key(sha256)
        target = self._path(key)
        if target.exists() and self.verify(key)[1] == sha256:
            os.utime(target)  # young again: a sweep of uncommitted objects must not take it from this commit
            return key
        with self._open(incoming) as source:
            # Hashed while copied: what was verified cannot be swapped between the two.
            self._write(key, source, sha256=sha256)
        return key

    def get(self, key: str) -> bytes:
        with self._open(key) as handle:
            return handle.read()

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for path in sorted(self._path(prefix).rglob("*")):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # deleted since it was listed
            if path.is_file():
                yield ObjectInfo(path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime)

    def sweep_aside(self, older_than_s: float) -> int:
        """Remove files that a crash left half written; returns how many."""
        removed = 0
        for path in self._aside.iterdir():
            try:
                if time.time() - path.stat().st_mtime >= older_than_s:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:
                continue
        return removed

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or any(part in ("..", ".aside") for part in parts) or "\0" in key:
            raise ConfigError(f"object key {key!r} leaves the store", "give a relative path without '..'")
        return self.root.joinpath(*parts)

    def _open(self, key: str) -> IO[bytes]:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise CorruptDataError(f"object {key} is not in {self.root}", "send it again from the spool") from error
        except OSError as error:
            raise _explain(error, self._path(key)) from error

    def _write(self, key: str, data: bytes | IO[bytes], sha256: str | None = None) -> None:
        target, aside = self._path(key), self._aside / uuid.uuid4().hex
        try:
            digest = hashlib.sha256()
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                for block in [data] if isinstance(data, bytes) else iter(lambda: data.read(_BLOCK), b""):
                    digest.update(block)
                    view = memoryview(block)
                    while view:
                        view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise CorruptDataError(f"bytes for {key} have sha256 {digest.hexdigest()}", "upload the episode again")
            crashpoint("objects.written_aside")
            _make_folder(target.parent, self.root)
            aside.replace(target)
            crashpoint("objects.renamed")
            _fsync_folder(target.parent)
        except OSError as error:
            raise _explain(error, target) from error
        finally:
            aside.unlink(missing_ok=True)


def _make_folder(folder: Path, root: Path) -> None:
    """Make `folder` and its parents below `root`, each entry durable."""
    if folder == root or folder.is_dir():
        return
    _make_folder(folder.parent, root)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, path: Path) -> StorageFullError | UnavailableError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFullError(f"no room to write {path} ({error.strerror}); nothing was kept", "free space there")
    return UnavailableError(f"cannot use {path}: {error.strerror}", "see that the folder exists and is writable")
