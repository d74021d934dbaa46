"""A lease on a role, with a fencing token: of two processes that believe they hold it, only one can write."""

from __future__ import annotations

import os
import socket
import uuid

import sqlalchemy as sa

from infra.catalog import dialect
from infra.catalog.schema import leases
from infra.catalog.store import Catalog
from infra.errors import LeaseLostError


class Lease:
    """One process's hold on `name`.

    Args:
        catalog: where the lease is; its clock decides expiry.
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

    def acquire(self) -> int:
        """Take the lease, or renew it; returns the fencing token, which grows with each change of hands.

        Raises:
            LeaseLostError: another process holds it; the message names the holder.
        """
        with self._catalog.begin() as connection:
            row = self._row(connection)
            now = dialect.now(connection)
            if row is not None and row.holder != self.holder and row.expires_at > now:
                raise self._lost(row.holder, row.expires_at - now)
            mine = row is not None and row.holder == self.holder and row.token == self.token
            token = self.token if mine else (1 if row is None else row.token + 1)
            values = {"name": self.name, "holder": self.holder, "token": token, "expires_at": now + self.seconds}
            dialect.upsert(connection, leases, values)
        self.token = token
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
        connection.execute(leases.update().where(leases.c.name == self.name).values(expires_at=now + self.seconds))

    def release(self) -> None:
        """Let another process take over at once; nothing happens if the lease is not held."""
        with self._catalog.begin() as connection:
            mine = sa.and_(leases.c.name == self.name, leases.c.holder == self.holder, leases.c.token == self.token)
            connection.execute(leases.update().where(mine).values(expires_at=0.0))

    def _row(self, connection: sa.Connection) -> sa.Row[tuple[object, ...]] | None:
        return connection.execute(sa.select(leases).where(leases.c.name == self.name)).first()

    def _lost(self, holder: str, remaining: float) -> LeaseLostError:
        return LeaseLostError(
            f"the {self.name} lease is held by {holder} for another {max(remaining, 0.0):.1f} s, not by {self.holder}",
            f"stop {holder}, or wait until its lease ends; only one {self.name} may run",
        )
