"""One family of errors: each names the thing that is wrong and the way to mend it."""

from __future__ import annotations


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
