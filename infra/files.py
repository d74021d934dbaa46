"""Files that are either the old or the new one, whatever dies in between; and reading what may be no file."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path


def write_durably(target: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `target` by `data` atomically: write aside, fsync, rename, fsync the folder.

    A folder that was deleted under a running process is made again: what it held is gone, the process goes on.
    """
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(fd, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, target)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(target.parent)


def keep_durably(part: Path, target: Path) -> None:
    """Give a whole file, written by whoever, its name: fsync, rename, fsync the folder."""
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(part, target)
    fsync_folder(target.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> io.BufferedReader:
    """A file to read from.

    Raises:
        OSError: it cannot be opened, or is no file: a pipe would keep its reader waiting, a device has no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_capped(path: Path, most: int) -> bytes:
    """All of a file; OSError as `open_regular`, ValueError where it has more than `most` bytes."""
    with open_regular(path) as handle:
        data = handle.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path.name} has more than {most} bytes")
    return data
