"""Who must come back later: robots over their rate, and everybody while the coordinator is behind."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import sqlalchemy as sa

from infra.catalog import Catalog
from infra.catalog.accounting import unaccounted
from infra.catalog.schema import outbox
from infra.errors import UnavailableError

REQUESTS_PER_S, NOTES_PER_MIN = 100.0, 60.0  # of one robot: requests of any kind, measurements
EPISODES_A_REQUEST = 8  # named in one: more of them count as more requests
BEATS_PER_S = 5.0  # heartbeats: each writes, and writers of the catalog wait for each other
_LOOK_S = 0.5  # between two looks at the backlog
_SAMPLE = 32
_ROBOTS = 4096  # whose buckets are kept
_ADDRESSES = 4096  # whose failures are kept
_FREE_FAILURES = 16  # of one address, before it must pause: 1 s, 2 s, 4 s, …
_PAUSE_MAX_S, _FORGIVE_S = 64.0, 300.0
_LOOKUPS_PER_S = 50.0  # of unknown tokens, in the catalog, whoever asks


class LaterError(UnavailableError):
    """Not now: the answer says when.

    Args:
        status: of HTTP: 429 for a robot over its rate, 503 for everybody.
        after: seconds until it is worth another try.
    """

    def __init__(self, problem: str, fix: str, status: int, after: float) -> None:
        super().__init__(problem, fix)
        self.status = status
        self.after = after


class TokenBucket:
    """Lets `per_s` units pass in the long run, at once as many as a minute's.

    What is larger than all that it can hold passes once it is full, and is paid back afterwards.

    Args:
        per_s: units a second. burst: units that an idle bucket has gathered.
        clock: replaced in tests.
    """

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._level, self._at = burst, clock()

    def take(self, amount: float) -> float:
        """Take `amount` if it is there; seconds to wait, 0 where it was taken."""
        wait = self.wait(amount)
        if wait == 0.0:
            self._level -= amount
        return wait

    def wait(self, amount: float) -> float:
        """Seconds until `amount` may be taken."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._per_s)
        self._at = now
        missing = min(amount, self._burst) - self._level
        return 0.0 if missing <= 1e-9 else missing / self._per_s


class RobotLimits:
    """The rate caps of each robot. Safe for threads.

    Args:
        episodes_per_min, mib_per_min: that one robot may hand in, sustained.
        clock: replaced in tests.
    """

    def __init__(
        self, episodes_per_min: float, mib_per_min: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._caps = {
            "episodes": (episodes_per_min / 60, episodes_per_min),
            "bytes": (mib_per_min * 2**20 / 60, mib_per_min * 2**20),
            "requests": (REQUESTS_PER_S, 4 * REQUESTS_PER_S),
            "notes": (NOTES_PER_MIN / 60, NOTES_PER_MIN),
            "heartbeats": (BEATS_PER_S, 20 * BEATS_PER_S),
        }
        self._clock = clock
        self._buckets: dict[tuple[str, str], TokenBucket] = {}
        self._lock = threading.Lock()

    def upload(self, robot_id: str, size: int) -> float:
        """Ask for one episode of `size` bytes; seconds to wait, 0 where it may be uploaded now."""
        with self._lock:
            episodes, data = self._bucket(robot_id, "episodes"), self._bucket(robot_id, "bytes")
            wait = max(episodes.wait(1), data.wait(size))
            if wait == 0.0:
                episodes.take(1)
                data.take(size)
            return wait

    def request(self, robot_id: str, kind: str = "requests", amount: float = 1.0) -> None:
        """Count a request, or `amount` of them; `kind` is `requests`, `notes` or `heartbeats`.

        Raises:
            LaterError: there were too many.
        """
        with self._lock:
            wait = self._bucket(robot_id, kind).take(amount)
        if wait:
            raise over_rate(f"{kind} of robot {robot_id}", wait)

    def named(self, robot_id: str, episodes: int) -> None:
        """Count what a request names beside itself.

        Raises:
            LaterError: there was too much.
        """
        self.request(robot_id, amount=episodes / EPISODES_A_REQUEST)

    def _bucket(self, robot_id: str, kind: str) -> TokenBucket:
        if len(self._buckets) >= _ROBOTS * len(self._caps):
            self._buckets.clear()
        key = (robot_id, kind)
        if key not in self._buckets:
            self._buckets[key] = TokenBucket(*self._caps[kind], self._clock)
        return self._buckets[key]


class ThrottledError(LaterError):
    """Too much is asked about tokens of which nothing is known."""


class Strangers:
    """How often one address may ask about tokens of which nothing is known: what fails costs ever longer pauses.

    Args:
        clock: replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # by address: how often, when last
        self._asked = TokenBucket(_LOOKUPS_PER_S, _LOOKUPS_PER_S * 2, clock)
        self._lock = threading.Lock()

    def check(self, address: str) -> None:
        """Raises:
        ThrottledError: too much failed from there, or all addresses together ask too much.
        """
        with self._lock:
            failures, at = self._failed.get(address, (0, 0.0))
            pause = 0.0 if failures < _FREE_FAILURES else min(_PAUSE_MAX_S, 2.0 ** min(failures - _FREE_FAILURES, 16))
            wait = max(at + pause - self._clock(), 0.0) or self._asked.take(1)
        if wait > 0:
            raise ThrottledError(
                "too many requests came with unknown tokens", "wait, and use a robot's token", 429, wait
            )

    def failed(self, address: str) -> None:
        """A token from there was unknown."""
        with self._lock:
            failures, at = self._failed.pop(address, (0, 0.0))
            if self._clock() - at > _FORGIVE_S:
                failures = 0
            self._failed[address] = (failures + 1, self._clock())
            while len(self._failed) > _ADDRESSES:
                self._failed.popitem(last=False)


class Backpressure:
    """Whether so much waits for the coordinator, or the store is in such trouble, that more would only pile up.

    Args:
        catalog: where what waits is seen.
        limit: committed episodes that may wait, about: it is behind when most of those announced just before the newest
            `limit` are neither in a snapshot nor in quarantine. Costs the same at a million episodes.
    """

    def __init__(self, catalog: Catalog, limit: int) -> None:
        self._catalog = catalog
        self._limit = limit
        self._behind, self._look_at = False, 0.0
        self._store_away_until = 0.0

    def check(self) -> None:
        """Raises:
        LaterError: come back later with new episodes.
        """
        if time.monotonic() < self._store_away_until:
            raise LaterError("the object store is in trouble", "keep the episodes in the spool and wait", 503, 2.0)
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _LOOK_S
            self._behind = self._is_behind()
        if self._behind:
            problem = f"more than {self._limit} committed episodes wait for the coordinator"
            raise LaterError(problem, "keep the episodes in the spool; see that the coordinator runs", 503, 2.0)

    def store_failed(self) -> None:
        """The store did not answer, or has no room: ask for nothing new for a moment."""
        self._store_away_until = time.monotonic() + 2.0

    def _is_behind(self) -> bool:
        window = (
            sa.select(outbox.c.episode_id, outbox.c.sha256)
            .order_by(outbox.c.seq.desc())
            .offset(self._limit)
            .limit(_SAMPLE)
            .subquery()
        )
        query = sa.select(sa.case((unaccounted(window), 0), else_=1)).select_from(window)
        with self._catalog.read() as connection:
            settled = connection.execute(query).scalars().all()
        return len(settled) > 0 and 2 * sum(settled) < len(settled)


def over_rate(what: str, after: float) -> LaterError:
    """The answer to a robot that asks for too much."""
    problem = f"{what} are over the rate that one robot has"
    return LaterError(problem, "wait; the service's settings robot_…_per_min say how many episodes it may", 429, after)
