"""One family of errors: each names the thing that is wrong and the way to fix it."""

from __future__ import annotations

import unicodedata


class LwdError(Exception):
    """A failure that the user can act on.

    Args:
        problem: what is wrong, naming the file, field, episode or server.
        fix: what to do about it, one sentence.

    The command line prints both and exits with `exit_code`; nothing that was acknowledged is lost.
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\n  fix: {self.fix}"

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.problem, self.fix)


class ConfigError(LwdError):
    """A setting, a parameter or a contract file is wrong."""

    exit_code = 2


class CorruptDataError(LwdError):
    """Bytes are not what their digest, their format or their schema says."""

    exit_code = 3


class ConflictError(LwdError):
    """The same identity was given to two different things (an episode id with two digests)."""

    exit_code = 4


class StorageFullError(LwdError):
    """A disk, a quota or a spool has no room left; nothing was acknowledged."""

    exit_code = 5


class LeaseLostError(LwdError):
    """Another process holds the coordinator's lease; this one must not write."""

    exit_code = 6


class UntrustedPolicyError(LwdError):
    """A policy artifact failed its signature, digest, cohort or version check."""

    exit_code = 7


class DivergedError(LwdError):
    """Training gave numbers that are not finite or beyond the limits; nothing of it was published."""

    exit_code = 13


class UnavailableError(LwdError):
    """A server or a process did not answer in time."""

    exit_code = 8


def escaped(text: str, keep: str = "") -> str:
    """The text with escapes for what a terminal obeys or a database refuses, and for what hides or reorders the rest:
    control characters, separators of lines, marks of direction, half surrogates.

    Args:
        keep: characters that stay nevertheless.
    """
    if text.isprintable():
        return text
    return "".join(char if char in keep or _is_plain(char) else ascii(char)[1:-1] for char in text)


def _is_plain(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] != "C" and category not in ("Zl", "Zp")


def shown(text: str, limit: int = 200) -> str:
    """Text of another machine as a message, a row, a log or a page may hold it: `escaped`, in one line, of at most
    `limit` characters."""
    safe = escaped(text[: limit + 1])
    return safe if len(safe) <= limit else f"{safe[: limit - 1]}…"


def named(value: object, limit: int = 80) -> str:
    """Any value of another machine, as a message names it: `repr`, but short, and never an error of its own."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    except Exception:  # an integer of too many digits, a structure nested too deeply, a __repr__ that breaks
        text = f"<{type(value).__name__}>"
    return shown(text, limit)


def summary(error: BaseException) -> str:
    """An error's kind and text in one bounded line, for one of no known kind."""
    try:
        text = str(error)
    except Exception:
        text = "no text"
    return shown(f"{type(error).__name__}: {text}", 300)
