"""Files that are either the old or the new one, whatever dies in between."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(target: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `target` by `data` atomically: write aside, fsync, rename, fsync the folder."""
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
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
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
