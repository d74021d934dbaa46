"""Bases: the frozen weights that a policy's action expert completes, fetched once and shared by every policy on them.

A base is named by its sha256. It may be gigabytes: it is hashed by blocks, fetched by blocks where the source can, and
stands in each bundle as a hard link to the one file.

    <sha256>.safetensors    a base whose digest held when it came
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

from infra.crashpoints import crashpoint
from infra.errors import CorruptDataError, StorageFullError, UntrustedPolicyError
from infra.files import keep_durably
from infra.policy.announcement import base_key
from infra.policy.artifact import BASE, BaseEntry, file_sha256


class ObjectSource(Protocol):
    """Where objects are fetched from."""

    def fetch(self, key: str) -> bytes:
        """The bytes of an object."""


@runtime_checkable
class StreamingSource(Protocol):
    """A source that can also write an object to a file block by block."""

    def fetch_to(self, key: str, path: Path, most: int) -> None:
        """Write an object of at most `most` bytes to `path`, replacing what is there; the caller checks what came."""


class BaseCache:
    """The bases below one folder.

    Args:
        root: the folder; made when the first base comes.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._checked: dict[str, tuple[int, int, int]] = {}  # digest -> what the file was when its digest held

    def ensure(self, entry: BaseEntry, source: ObjectSource) -> Path:
        """The file of a base, fetched unless it is here and sound.

        Raises:
            UntrustedPolicyError: what came is missing, truncated or not the base of that digest; nothing was kept.
            StorageFullError: no room for it; nothing was kept.
            UnavailableError: the source did not answer.
        """
        path = self._path(entry)
        if self._sound(path, entry):
            return path
        path.unlink(missing_ok=True)  # damaged on this disk
        self._root.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        try:
            _see_room(self._root, entry)
            _fetch(source, base_key(entry.sha256), part, entry.size)
            size = part.stat().st_size
            if size != entry.size or file_sha256(part) != entry.sha256:
                raise UntrustedPolicyError(
                    f"the base {entry.sha256[:16]}… came as {size} of {entry.size} bytes, or as another one",
                    "publish the policy again; the last policy that was good stays in use",
                )
            keep_durably(part, path)
        except (CorruptDataError, FileNotFoundError) as error:
            raise UntrustedPolicyError(
                f"the base {entry.sha256[:16]}… cannot be fetched ({error})",
                "publish the policy again; the last policy that was good stays in use",
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                problem = f"no room for the base of {entry.size} bytes in {self._root}"
                raise StorageFullError(problem, "free space there") from error
            raise
        finally:
            part.unlink(missing_ok=True)
        crashpoint("policy.base_kept")
        self._remember(path, entry)
        return path

    def link(self, entry: BaseEntry, bundle: Path) -> None:
        """Put a base that is here into a bundle's folder: a hard link, or a copy where there can be none."""
        target = bundle / BASE
        target.unlink(missing_ok=True)
        try:
            os.link(self._path(entry), target)
        except OSError:
            shutil.copyfile(self._path(entry), target)

    def known(self, entry: BaseEntry) -> Path | None:
        """The file of a base whose digest held when this process looked, and that has not changed since."""
        path = self._path(entry)
        return path if entry.sha256 in self._checked and self._checked[entry.sha256] == _stamp(path) else None

    def prune(self, kept: Collection[str]) -> None:
        """Remove every base but those of the digests `kept`; bundles keep their links. What cannot be removed stays."""
        if not self._root.is_dir():
            return
        for path in self._root.iterdir():
            if path.stem not in kept or path.suffix != ".safetensors":
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, entry: BaseEntry) -> Path:
        return self._root / f"{entry.sha256}.safetensors"

    def _sound(self, path: Path, entry: BaseEntry) -> bool:
        if self.known(entry) is not None:
            return True
        if not path.is_file() or path.stat().st_size != entry.size or file_sha256(path) != entry.sha256:
            return False
        self._remember(path, entry)
        return True

    def _remember(self, path: Path, entry: BaseEntry) -> None:
        stamp = _stamp(path)
        if stamp is not None:
            self._checked[entry.sha256] = stamp


def _see_room(root: Path, entry: BaseEntry) -> None:
    if shutil.disk_usage(root).free < entry.size:
        raise OSError(errno.ENOSPC, "no room")


def _fetch(source: ObjectSource, key: str, part: Path, most: int) -> None:
    if isinstance(source, StreamingSource):
        source.fetch_to(key, part, most)
    else:
        part.write_bytes(source.fetch(key))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
