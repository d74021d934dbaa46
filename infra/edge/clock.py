"""The time of the world in which a robot acts: what timestamps of an episode are read from."""

from __future__ import annotations

import time
from collections.abc import Callable

_LEAST = 1e-6  # seconds between two stamps, so that time goes strictly forward whatever the clock's resolution


class Clock:
    """Seconds since the episode's start.

    Args:
        read: the world's clock in seconds: `time.monotonic` on a robot, the simulator's own time where it runs as fast
            as the machine can.
        pace: seconds of the world in one of `read`: a simulator that runs at 1.5 times real time has 1.5.
    """

    def __init__(self, read: Callable[[], float] = time.monotonic, pace: float = 1.0) -> None:
        self._read = read
        self._pace = pace
        self.start()

    def start(self) -> None:
        """An episode begins: now is 0."""
        self._zero = self._read()
        self._last = -1.0

    def now(self) -> float:
        """Seconds since the start."""
        return (self._read() - self._zero) * self._pace

    def stamp(self) -> float:
        """`now`, strictly greater than the stamp before; the first one of an episode is 0."""
        self._last = 0.0 if self._last < 0 else max(self.now(), self._last + _LEAST)
        return self._last
