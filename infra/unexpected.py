"""The border of a command or a process: an error that nobody foresaw becomes one that names the thing and the fix."""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from infra.errors import ConfigError, LwdError, StorageFullError, UnavailableError, shown, summary

_TEXT_MAX = 300  # characters of an unexpected error's text in a message
# Of servers' clients, whose modules need not be there: by name, nothing is imported for it.
_NO_ANSWER = {"httpx.TransportError", "urllib3.HTTPError", "kafka.KafkaError"}


def explained(error: BaseException) -> LwdError:
    """The error as one that a person can act on; an LwdError is returned as it is.

    A defect's traceback is kept in a file, which the fix names.
    """
    if isinstance(error, LwdError):
        return error
    for cause in _chain(error):
        if isinstance(cause, LwdError):
            return cause
        if isinstance(cause, ConnectionError | TimeoutError) or _names(cause) & _NO_ANSWER:
            return UnavailableError(
                f"a server does not answer: {_text(error)}",
                "start it, or correct its address (settings, PREFECT_API_URL); the same command then goes on",
            )
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_system(error)
    if isinstance(error, MemoryError):
        return LwdError("this machine's memory is used up", "end other programs, or use smaller parameters")
    return LwdError(
        f"unexpected {summary(error)}",
        f"this is a defect of LWD: report it with {_keep(error)}; what was acknowledged is not lost",
    )


def _of_the_system(error: OSError) -> LwdError:
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError(what, "free disk space, then run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(what, "make it readable and writable for this user, or name another folder")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG):
        return ConfigError(what, "check the path")
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
        return UnavailableError(what, "raise the limits of this user (`ulimit -a`), or end other programs")
    return LwdError(what, f"see {_keep(error)} for where it happened")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        current = current.__cause__ or current.__context__


def _names(error: BaseException) -> set[str]:
    """Its classes, each as package and name."""
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}


def _text(error: BaseException) -> str:
    return shown(str(error) or type(error).__name__, _TEXT_MAX)


def _keep(error: BaseException) -> str:
    """Where the traceback was written; nothing is written where that is not possible."""
    path = Path(tempfile.gettempdir()) / f"lwd-error-{os.getpid()}.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return "what you did"
    return str(path)
