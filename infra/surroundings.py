"""What libraries take for granted of a machine: a name for the user, a home, a folder for caches.

A container's user often has none of them: a number without an entry in /etc/passwd, no HOME, or one that is read-only.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from infra.errors import ConfigError


def complete() -> None:
    """Give this process, and those that it starts, what is missing; what is there stays as it is.

    Raises:
        ConfigError: no folder for temporary files can be written.
    """
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")) and not _has_entry():
        os.environ["LOGNAME"] = os.environ["USER"] = f"uid-{os.getuid()}"
    if not _home_is_known():
        os.environ["HOME"] = str(_private_folder())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if not _writable(cache):
        os.environ["XDG_CACHE_HOME"] = str(_private_folder() / "cache")
        os.environ.setdefault("MPLCONFIGDIR", str(_private_folder() / "matplotlib"))


def _has_entry() -> bool:
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _home_is_known() -> bool:
    try:
        return Path.home().is_absolute() and (_has_entry() or Path.home().is_dir())
    except RuntimeError:  # neither a variable nor an entry
        return False


def _writable(folder: Path) -> bool:
    """Whether files can be made there; a folder that is not there yet is asked for at its nearest parent."""
    try:
        while not folder.exists():
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _private_folder() -> Path:
    """A folder of this user alone, for as long as the machine keeps its temporary files.

    Raises:
        ConfigError: there is no place for it, or somebody else has it.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"lwd-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"no folder for temporary files can be written: {error}", "set TMPDIR to a folder that this user can write"
        ) from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder} is not this user's alone", "remove it, or set HOME to a folder of this user")
    return folder
