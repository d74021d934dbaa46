"""Objects as files of one folder: the store of the local profile."""

from __future__ import annotations

import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from infra.crashpoints import crashpoint
from infra.errors import CorruptDataError, StorageFullError, UnavailableError
from infra.files import fsync_folder
from infra.objects import ASIDE, ObjectInfo, Payload, checked_key, episode_key
from infra.objects.metered import metered

_BLOCK = 2**20
_AGAIN = "send it again from the spool"


class DirectoryStore:
    """Objects as files below `root`: written aside, fsynced, renamed, and the folder fsynced.

    Args:
        root: the folder; made if absent. One file system, so that a rename is atomic.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._aside = self.root / ASIDE
        with _explained(self._aside):
            self._aside.mkdir(parents=True, exist_ok=True)

    @metered
    def put(self, key: str, data: Payload) -> None:
        if isinstance(data, Path):
            with data.open("rb") as source:
                self._write(key, source)
        else:
            self._write(key, data)

    @metered
    def accept(self, incoming: str, sha256: str, size: int) -> str:
        key = episode_key(sha256)
        target = self._path(key)
        with self._open(incoming) as source:
            found = os.fstat(source.fileno()).st_size
            if found != size:
                raise CorruptDataError(f"{incoming} holds {found} bytes, announced were {size}", _AGAIN)
            with _explained(target):
                if target.exists() and _sha256(target) == sha256 == _digest(source):
                    os.utime(target)  # young again: a sweep of uncommitted objects must not take it from this commit
                    return key
                source.seek(0)
            self._write(key, source, sha256=sha256)  # hashed while copied
        return key

    @metered
    def get(self, key: str) -> bytes:
        with self._open(key) as handle, _explained(self._path(key)):
            return handle.read()

    def open(self, key: str) -> BinaryIO:
        return self._open(key)

    @metered
    def exists(self, key: str) -> bool:
        path = self._path(key)
        with _explained(path):
            return path.is_file()

    @metered
    def delete(self, key: str) -> None:
        path = self._path(key)
        with _explained(path):
            path.unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = self._path(prefix.rstrip("/"))
        with _explained(folder):
            found = sorted(folder.rglob("*"), key=Path.as_posix)
        for path in found:
            with _explained(path):
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue  # deleted since it was listed
            if S_ISREG(stat.st_mode):
                yield ObjectInfo(path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime)

    @metered
    def sweep_unfinished(self, older_than_s: float) -> int:
        """See `ObjectStore.sweep_unfinished`: files that a crash left half written."""
        removed = 0
        with _explained(self._aside):
            self._aside.mkdir(parents=True, exist_ok=True)
            for path in self._aside.iterdir():
                try:
                    if time.time() - path.stat().st_mtime >= older_than_s:
                        path.unlink()
                        removed += 1
                except FileNotFoundError:
                    continue
        return removed

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*checked_key(key).split("/"))

    def _open(self, key: str) -> BufferedReader:
        path = self._path(key)
        with _explained(path):
            try:
                return path.open("rb")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
                raise CorruptDataError(f"object {key} is not in {self.root}", _AGAIN) from error

    def _write(self, key: str, data: bytes | BufferedReader, sha256: str | None = None) -> None:
        target, aside = self._path(key), self._aside / uuid.uuid4().hex
        with _explained(target):
            self._aside.mkdir(parents=True, exist_ok=True)  # it may have been deleted since
            try:
                found = _write_file(aside, data)
                if sha256 not in (None, found):
                    raise CorruptDataError(f"bytes for {key} have sha256 {found}", _AGAIN)
                crashpoint("objects.written_aside")
                _make_folder(target.parent, self.root)
                aside.replace(target)
                crashpoint("objects.renamed")
                fsync_folder(target.parent)
            finally:
                aside.unlink(missing_ok=True)


def _write_file(path: Path, data: bytes | BufferedReader) -> str:
    """Write a new file, durably; the sha256 of what was written."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for block in [data] if isinstance(data, bytes) else iter(lambda: data.read(_BLOCK), b""):
            digest.update(block)
            view = memoryview(block)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _digest(handle: BufferedReader) -> str:
    return hashlib.file_digest(handle, "sha256").hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return _digest(handle)


def _make_folder(folder: Path, root: Path) -> None:
    """Make `folder` and its parents below `root`, each entry durable."""
    if folder == root or folder.is_dir():
        return
    _make_folder(folder.parent, root)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """An error of the file system, as one that names the path and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            problem = f"no room to write {path} ({error.strerror}); nothing was kept"
            raise StorageFullError(problem, "free space there") from error
        raise UnavailableError(
            f"cannot use {path}: {error.strerror}", "see that the folder exists and is writable"
        ) from error
