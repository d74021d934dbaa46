"""A lease on a role, with a fencing token: of two processes that believe they hold it, only one can write.

When a lease ends is a matter of clocks, and clocks jump. So the catalog's clock decides only where nothing better is
known:

- An end further ahead than the lease lasts was written by another clock, before a jump or on another machine. Such a
  lease counts as ended.
- A process that waits for the lease watches its row by its own monotonic clock. A holder that was seen to renew, or to
  take the lease from this process, is alive for as long as its lease lasts, whatever the catalog's clock says; one that
  was not seen to renew for that long is not.

Taking a lease too early costs a change of hands and no more: the token keeps the former holder's writes out.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from infra.catalog import dialect
from infra.catalog.schema import leases
from infra.catalog.store import Catalog
from infra.errors import LeaseLostError

log = logging.getLogger(__name__)
SLACK_S = 5.0  # clocks that are kept in step differ by less


class Lease:
    """One process's hold on `name`.

    Args:
        catalog: where the lease is.
        name: the role, for example `coordinator`.
        seconds: how long the hold lasts without renewal.
        holder: how others see this process; host, process id and a random part by default.
    """

    def __init__(self, catalog: Catalog, name: str, seconds: float, holder: str | None = None) -> None:
        self.name = name
        self.seconds = seconds
        self.holder = holder or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.token = 0  # of the last acquisition; 0 before the first
        self._catalog = catalog
        self._seen: tuple[object, ...] | None = None  # the row as it was last seen
        self._seen_at = 0.0  # since when it has been so, by the monotonic clock
        self._renewed = False  # whether it had been another before

    def acquire(self) -> int:
        """Take the lease, or renew it; returns the fencing token, which grows with each change of hands.

        Raises:
            LeaseLostError: another process holds it; the message names the holder.
        """
        with self._catalog.begin() as connection:
            row = self._row(connection)
            now = dialect.now(connection)
            mine = row is not None and (row.holder, row.token) == (self.holder, self.token)
            if row is not None and not mine and row.holder != self.holder:
                self._watch(row)
                if (remaining := self._remaining(row, now)) > 0:
                    raise self._lost(row.holder, remaining)
            token = self.token if mine else (1 if row is None else row.token + 1)
            values = {
                "name": self.name,
                "holder": self.holder,
                "token": token,
                "expires_at": now + self.seconds,
                "seconds": self.seconds,
            }
            dialect.upsert(connection, leases, values)
        self.token = token
        self._saw(self.holder, token, now + self.seconds)
        return token

    def guard(self, connection: sa.Connection) -> None:
        """Renew within the transaction that writes under the lease, or refuse the write.

        The token alone decides: an expired lease that nobody took is still this process's.

        Raises:
            LeaseLostError: another process took the lease since; the transaction must not commit.
        """
        row = self._row(connection)
        now = dialect.now(connection)
        if row is None or row.token != self.token or row.holder != self.holder:
            raise self._lost("nobody" if row is None else row.holder, 0.0 if row is None else row.expires_at - now)
        values = {"expires_at": now + self.seconds, "seconds": self.seconds}
        connection.execute(leases.update().where(leases.c.name == self.name).values(values))

    def prove(self) -> None:
        """`guard` in a transaction of its own: renew now, or LeaseLostError."""
        with self._catalog.begin() as connection:
            self.guard(connection)

    @contextmanager
    def kept(self, on_lost: Callable[[LeaseLostError], None] | None = None) -> Iterator[None]:
        """While the block runs, a thread renews the lease: for work that may take longer than the lease lasts, which
        two processes would else take from each other, again and again. `guard` says afterwards whether it was kept.

        Args:
            on_lost: told, in that thread, when another process is found to have taken it.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._keep, args=(done, on_lost), name=f"{self.name}-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def release(self) -> None:
        """Let another process take over at once; nothing happens if the lease is not held."""
        with self._catalog.begin() as connection:
            mine = sa.and_(leases.c.name == self.name, leases.c.holder == self.holder, leases.c.token == self.token)
            connection.execute(leases.update().where(mine).values(expires_at=0.0))

    def _keep(self, done: threading.Event, on_lost: Callable[[LeaseLostError], None] | None) -> None:
        while not done.wait(self.seconds / 3):
            try:
                self.prove()
            except LeaseLostError as error:
                if on_lost is not None:
                    on_lost(error)
                return
            except Exception as error:  # a database that is away: nobody can take the lease meanwhile either
                log.warning("the %s lease could not be renewed: %s", self.name, error)

    def _watch(self, row: sa.Row[Any]) -> None:
        state = (row.holder, row.token, row.expires_at)
        if state != self._seen:
            self._renewed = self._seen is not None
            self._seen, self._seen_at = state, time.monotonic()

    def _saw(self, *state: object) -> None:
        self._seen, self._seen_at, self._renewed = state, time.monotonic(), False

    def _remaining(self, row: sa.Row[Any], now: float) -> float:
        """For how long another process's lease still holds, seconds; at most 0 if it has ended."""
        if row.expires_at <= 0:
            return 0.0  # given back
        unseen = row.seconds - (time.monotonic() - self._seen_at)  # of a holder that shows no sign of life
        if self._renewed or unseen <= 0:
            return float(unseen)
        by_clock = row.expires_at - now
        return 0.0 if by_clock > row.seconds + SLACK_S else float(min(by_clock, unseen))

    def _row(self, connection: sa.Connection) -> sa.Row[Any] | None:
        return connection.execute(sa.select(leases).where(leases.c.name == self.name)).first()

    def _lost(self, holder: str, remaining: float) -> LeaseLostError:
        return LeaseLostError(
            f"the {self.name} lease is held by {holder} for another {max(remaining, 0.0):.1f} s, not by {self.holder}",
            f"stop {holder}, or wait until its lease ends; only one {self.name} may run",
        )


def held(connection: sa.Connection) -> list[tuple[str, str]]:
    """(name, holder) of the leases that have not ended, by the catalog's clock: a look from outside."""
    now = dialect.now(connection)
    ahead = leases.c.expires_at - now
    live = sa.and_(leases.c.expires_at > now, ahead <= leases.c.seconds + SLACK_S)
    rows = connection.execute(sa.select(leases.c.name, leases.c.holder).where(live).order_by(leases.c.name))
    return [(row.name, row.holder) for row in rows]
