"""A learner's checkpoint on disk: written aside, fsynced, renamed; the one before is kept, and read if it is torn."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from infra.errors import CorruptDataError, summary

MAGIC = b"LWDCKPT1"


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one is kept."""
    return path.with_name(path.name + ".previous")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`; at every moment one whole checkpoint is on disk.

    Raises:
        OSError: the disk does not take it; the checkpoint that was there stays, and nothing of the new one.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.write(MAGIC + hashlib.sha256(payload).digest() + payload)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        aside.unlink(missing_ok=True)  # a full disk needs the room
        raise
    if path.exists():
        os.replace(path, previous(path))
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The last whole checkpoint: `path`, or the one before where `path` is missing or torn (with a warning).

    Raises:
        CorruptDataError: neither is whole.
    """
    problems = []
    for candidate in (path, previous(path)):
        try:
            data = candidate.read_bytes()
        except OSError as error:
            problems.append(f"{candidate}: {error.strerror}")
            continue
        digest, payload = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
        if data[: len(MAGIC)] != MAGIC or hashlib.sha256(payload).digest() != digest:
            problems.append(f"{candidate}: torn or not a checkpoint ({len(data)} bytes)")
            continue
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        except Exception as error:  # something else was written there, and its digest
            problems.append(f"{candidate}: {summary(error)}")
            continue
        if problems:
            warnings.warn(f"{problems[0]}; resuming from {candidate}", stacklevel=2)
        return state
    raise CorruptDataError(
        f"no whole checkpoint: {'; '.join(problems)}", "train from the start, or restore the file from a backup"
    )


def exists(path: Path) -> bool:
    """Whether there is anything to resume from."""
    return path.exists() or previous(path).exists()
