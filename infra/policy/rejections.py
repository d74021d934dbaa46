"""The policies that failed on this robot: never run again, whatever is announced and whichever cohort it is in.

`rejected.json` beside the robot's policies, replaced atomically. A robot that is killed between a policy's failure and
this line runs it once more, and no more often.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.files import read_capped, write_durably

MAX_REASON = 300
_MAX = 1000  # the oldest are forgotten beyond these
_MAX_BYTES = 2**22
_log = logging.getLogger("lwd.robot")


@dataclass(frozen=True)
class Rejection:
    """A policy by number and manifest digest, and what it did."""

    version: int
    digest: str
    reason: str


class Rejections:
    """The rejected policies, oldest first.

    Args:
        path: the file. One that cannot be read is kept beside as `.damaged`: to forget what failed is the lesser harm,
            a policy that fails again is rejected again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Rejection] = {}
        try:
            listed = json.loads(read_capped(path, _MAX_BYTES))
            found = [Rejection(int(one["version"]), str(one["digest"]), str(one["reason"])) for one in listed]
            self._entries = {one.digest: one for one in found}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            _log.error("the list of rejected policies cannot be read: %s", error)
            try:
                path.replace(path.with_name(path.name + ".damaged"))
            except OSError as problem:
                _log.error("nor be moved away: %s", problem)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __iter__(self) -> Iterator[Rejection]:
        return iter(self._entries.values())

    def add(self, version: int, digest: str, reason: str) -> None:
        """Reject a policy. It counts at once; a disk that takes nothing is logged, and the next call writes it."""
        self._entries[digest] = Rejection(version, digest, reason[:MAX_REASON])
        while len(self._entries) > _MAX:
            del self._entries[next(iter(self._entries))]
        try:
            write_durably(self._path, json.dumps([asdict(one) for one in self]).encode())
        except OSError as error:
            _log.error("the rejection of policy %d cannot be written: %s", version, error)
