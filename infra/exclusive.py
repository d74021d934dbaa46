"""One command at a time: a file's lock that the kernel frees, and that names who holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from infra.errors import ConfigError, LeaseLostError

_ENDING_S = 30.0  # what is left of a command that was killed is ended within this


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[int]:
    """Hold `path`'s lock; its descriptor, for `lifeline`.

    Args:
        what: the thing that nobody else may work on, for the message.

    Raises:
        LeaseLostError: another process holds it; it is named.
        ConfigError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{path.parent} cannot be written: {error.strerror}",
            "let this user write there, or choose another --home",
        ) from error
    try:
        _take(handle, path, what)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its name is missing
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()} {' '.join(sys.argv)[:200]}".encode(errors="replace"), 0)
        yield handle
        fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _take(handle: int, path: Path, what: str) -> None:
    """Take the lock; what is left of a killed command is waited for."""
    started = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # a file system without locks
        pid, _, command = os.pread(handle, 4096, 0).decode(errors="replace").partition(" ")
        alive = pid.isdigit() and psutil.pid_exists(int(pid))
        if time.monotonic() - started > (1.0 if alive else _ENDING_S):
            raise LeaseLostError(
                f"{what} is in use by process {pid or 'unknown'} ({command or 'no name'}), which holds {path}",
                f"wait until it ends, or stop it: kill {pid}" if alive else "stop what is left of it, then try again",
            )
        time.sleep(0.1)
