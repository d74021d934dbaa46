"""The deployment's time, as a robot knows it: whose own clock may be wrong, jump, or forget itself at a boot.

Signed statements are the witnesses: the deployment's time is at least that of the newest one. From there the time since
the machine's boot is counted, which no clock's correction changes. After another boot that is what was last written
down, and the wall clock's word for the time between, until the next statement. A statement that was held back cannot
keep the time standing still for long: a wall clock is believed to be at most `SKEW_MAX_S` ahead.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from infra.files import read_capped, write_durably

SKEW_MAX_S = 2 * 3600.0  # more than that a wall clock is not ahead, or it is said that it is wrong
_KEEP_S = 30.0
_MAX_BYTES = 2**12
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger("lwd.robot")


class DeploymentClock:
    """The catalog's time, estimated from below. It never goes back while it has no reason to.

    Args:
        path: where it is written down; a file that cannot be read is as none.
        wall, uptime: the clocks, seconds; the uptime counts sleep.
    """

    def __init__(
        self,
        path: Path,
        *,
        wall: Callable[[], float] = time.time,
        uptime: Callable[[], float] | None = None,
        boot: str | None = None,
    ) -> None:
        self._path = path
        self._wall = wall
        self._uptime = uptime or _uptime
        self._boot = boot or _boot_id()
        self._at = -math.inf  # the time at `_mark`, by witnesses and uptime alone
        self._mark = self._uptime()
        self._guess = -math.inf  # the time at `_mark` with the wall clock's word for what lies between two boots
        self._kept: float | None = None
        self._load()

    def now(self) -> float:
        """Seconds since the epoch, the catalog's clock: at least."""
        wall = self._wall()
        if self._at == -math.inf:
            return wall
        return max(max(self._at, self._guess) + self._uptime() - self._mark, wall - SKEW_MAX_S)

    def witness(self, at: float) -> None:
        """A signed statement of the time `at`, newer than all before it, was taken."""
        known = self._at + self._uptime() - self._mark
        # The deployment's clock had been far ahead: its own later word and this robot's clock agree on that.
        ahead = known - at > SKEW_MAX_S and abs(self._wall() - at) < SKEW_MAX_S
        if ahead:
            _log.warning("the deployment's clock went back by %.0f s; this robot follows it", known - at)
        self._at, self._mark, self._guess = at if ahead else max(known, at), self._uptime(), -math.inf
        self.keep(at_once=True)

    def reset(self, at: float) -> None:
        """A signed reset of the time `at`: what was believed before does not count."""
        self._at, self._mark, self._guess = at, self._uptime(), -math.inf
        self.keep(at_once=True)

    def keep(self, *, at_once: bool = False) -> None:
        """Write the time down, now and then; a disk that takes nothing costs the time until the next boot only."""
        uptime = self._uptime()
        if self._at == -math.inf or (not at_once and self._kept is not None and uptime - self._kept < _KEEP_S):
            return
        self._kept = uptime
        known = {"at": self._at + uptime - self._mark, "wall": self._wall(), "boot": self._boot, "uptime": uptime}
        try:
            write_durably(self._path, json.dumps(known).encode())
        except OSError as error:
            _log.warning("%s cannot be written (%s)", self._path, error.strerror)

    def _load(self) -> None:
        try:
            known = json.loads(read_capped(self._path, _MAX_BYTES))
            at, wall, uptime = (float(known[name]) for name in ("at", "wall", "uptime"))
            if not all(map(math.isfinite, (at, wall, uptime))):
                raise ValueError("not finite")
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            _log.warning("%s is not a robot's clock (%s): the next signed statement sets it", self._path, error)
            return
        if known.get("boot") == self._boot and self._mark >= uptime:
            self._at = at + self._mark - uptime
        else:
            self._at, self._guess = at, at + max(0.0, self._wall() - wall)


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return f"process {time.time()}"  # another one each time: the wall clock counts between two lives
