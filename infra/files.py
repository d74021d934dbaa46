"""Files that are either the old or the new one, whatever dies in between."""

from __future__ import annotations

import os
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
