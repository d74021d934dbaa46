"""Who may hold a connection, and for how long: a bounded number in all, of strangers at one address, and of one robot.

A connection belongs to a stranger until a request on it has shown a valid token. When there is no room, strangers that
say nothing go first, the oldest before the others, then robots' idle connections: robots at work stay served, whoever
else knocks. Nobody may be silent, drip or stop reading for longer than the deadlines below.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Literal

from infra.telemetry import metrics

HEAD_S = 10.0  # from the connection, or from the first byte of a further request, to the end of its head
IDLE_S = 75.0  # between two requests
GRACE_S = 10.0  # before a body, or the reading of an answer, must have gone at `MIN_BYTES_PER_S`
MIN_BYTES_PER_S = 4096.0
ANSWER_S = 600.0  # for the service's own work
LINGER_S = 2.0  # for a robot to read why it was refused, while what it still sends is thrown away
SHORT_S = 5.0  # how long the service says that it is short of descriptors, after it last was
PER_ROBOT = 16
_WAITING = ("handshake", "head", "idle", "linger")
_log = logging.getLogger("lwd.service.door")

Stage = Literal["handshake", "head", "body", "answer", "idle", "linger"]


class Guest:
    """One connection.

    Args:
        address: of the other side.
        abort: ends it at once.
    """

    def __init__(self, address: str, abort: Callable[[], object], now: float) -> None:
        self.address = address
        self.abort = abort
        self.robot: str | None = None
        self.stage: Stage = "handshake"
        self.since = now
        self.owed_s = self.received = 0.0  # of the body: seconds in which it could have come, and its bytes
        self.unread_s = self.drained = 0.0  # of the answer, likewise
        self.gone = False

    def enter(self, stage: Stage) -> None:
        """It goes on to a stage."""
        self.stage, self.since = stage, time.monotonic()
        self.owed_s = self.received = 0.0


class Door:
    """Admits connections and ends those that are in the way. For one event loop.

    Args:
        capacity: connections in all. per_address: of strangers at one address.
    """

    def __init__(self, capacity: int, per_address: int) -> None:
        self.capacity = capacity
        self._per_address = per_address
        self._strangers: dict[Guest, None] = {}  # in order of their coming, as all of these
        self._at: dict[str, dict[Guest, None]] = {}
        self._robots: dict[str, dict[Guest, None]] = {}
        self._short_at = float("-inf")

    def __len__(self) -> int:
        return len(self._strangers) + sum(map(len, self._robots.values()))

    def admit(self, address: str, abort: Callable[[], object]) -> Guest | None:
        """A new connection, after room was made for it; None if there is none."""
        here = self._at.get(address, {})
        if len(here) >= self._per_address and not self._make_room(here, "address"):
            return None
        if len(self) >= self.capacity and not self._make_room(self._strangers, "full") and not self._end_idle():
            return None
        guest = Guest(address, abort, time.monotonic())
        self._add_stranger(guest)
        return guest

    def identify(self, guest: Guest, robot: str | None) -> bool:
        """Whose requests come on it from now on, None for a stranger's; whether the robot may hold one more."""
        if guest.gone or guest.robot == robot:
            return not guest.gone
        if robot is not None:
            mine = self._robots.get(robot, {})
            if len(mine) >= PER_ROBOT:
                idle = next((other for other in mine if other.stage == "idle"), None)
                if idle is None:
                    return False
                self._end(idle, "robot")
        self._take_out(guest)
        guest.robot = robot
        if robot is None:
            self._add_stranger(guest)
        else:
            self._robots.setdefault(robot, {})[guest] = None
        return True

    def leave(self, guest: Guest) -> None:
        """The connection has ended."""
        if not guest.gone:
            guest.gone = True
            self._take_out(guest)

    def sweep(self) -> None:
        """End what is over its deadline; to be called often."""
        now = time.monotonic()
        for guest in self._all():
            if (reason := _over(guest, now - guest.since)) is not None:
                self._end(guest, reason)
        robots, strangers = len(self) - len(self._strangers), len(self._strangers)
        metrics.CONNECTIONS.set(robots, kind="robot")
        metrics.CONNECTIONS.set(strangers, kind="stranger")
        metrics.DESCRIPTORS_SHORT.set(float(self.is_short()))

    def is_short(self) -> bool:
        """Whether the process has run out of file descriptors, just now or a moment ago."""
        return time.monotonic() - self._short_at < SHORT_S

    def ran_short(self) -> None:
        """There was no descriptor for a connection that came: give one back if possible."""
        if not self.is_short():
            _log.error("no file descriptor is left: new connections wait; raise the limit (ulimit -n) of the service")
        self._short_at = time.monotonic()
        if not self._make_room(self._strangers, "descriptors"):
            self._end_idle()

    def _all(self) -> list[Guest]:
        return [*self._strangers, *(guest for mine in self._robots.values() for guest in mine)]

    def _make_room(self, strangers: Iterable[Guest], reason: str) -> bool:
        """End the oldest stranger's connection that waits, or the oldest."""
        found = next((guest for guest in strangers if guest.stage in _WAITING), next(iter(strangers), None))
        if found is not None:
            self._end(found, reason)
        return found is not None

    def _end_idle(self) -> bool:
        idle = [guest for mine in self._robots.values() for guest in mine if guest.stage == "idle"]
        if not idle:
            return False
        self._end(min(idle, key=lambda guest: guest.since), "full")
        return True

    def _end(self, guest: Guest, reason: str) -> None:
        metrics.CONNECTIONS_ENDED.inc(kind=reason)
        self.leave(guest)
        guest.abort()

    def _add_stranger(self, guest: Guest) -> None:
        self._strangers[guest] = None
        self._at.setdefault(guest.address, {})[guest] = None

    def _take_out(self, guest: Guest) -> None:
        self._strangers.pop(guest, None)
        for table, name in ((self._at, guest.address), (self._robots, guest.robot)):
            if name is not None and name in table:
                table[name].pop(guest, None)
                if not table[name]:
                    del table[name]


def _over(guest: Guest, seconds: float) -> str | None:
    """Which deadline the connection is beyond, `seconds` after it entered its stage."""
    if guest.stage in ("handshake", "head") and seconds > HEAD_S:
        return "head"
    if guest.stage == "idle" and seconds > IDLE_S:
        return "idle"
    if guest.stage == "linger" and seconds > LINGER_S:
        return "linger"
    if guest.stage == "answer" and seconds > ANSWER_S:
        return "answer"
    if guest.received < (guest.owed_s - GRACE_S) * MIN_BYTES_PER_S:
        return "body"
    if guest.drained < (guest.unread_s - GRACE_S) * MIN_BYTES_PER_S:
        return "unread"
    return None
