"""One learner on a home: rank 0 holds a lease for all ranks, and nothing is published or saved without it."""

from __future__ import annotations

import threading
import time

import sqlalchemy as sa

from infra.catalog import Catalog
from infra.catalog.leases import Lease
from infra.errors import LeaseLostError
from infra.process import patiently

LEARNER = "learner"
_MARGIN_S = 1.0


class LearnerLease:
    """Held by rank 0 for all ranks.

    Args:
        catalog: where the lease is. seconds: how long a killed learner's hold lasts.
    """

    def __init__(self, catalog: Catalog, seconds: float) -> None:
        self._catalog, self._lease = catalog, Lease(catalog, LEARNER, seconds)
        self._renew_at = 0.0

    def acquire(self, stop: threading.Event) -> None:
        """Take it. The hold of one that was killed is waited out; that of one that lives never ends.

        Raises:
            LeaseLostError: another learner renews it; the message names it.
        """
        end = time.monotonic() + self._lease.seconds + _MARGIN_S
        while True:
            try:
                patiently(self._lease.acquire, stop)
                break
            except LeaseLostError:
                if time.monotonic() >= end or stop.wait(self._lease.seconds / 20):
                    raise
        self._renewed()

    def renew(self, stop: threading.Event) -> None:
        """Renew when a third of it has passed; LeaseLostError if another took it."""
        if time.monotonic() >= self._renew_at:
            patiently(self.prove, stop)

    def prove(self) -> None:
        """Renew now, or refuse what was to be written: LeaseLostError if another took it."""
        with self._catalog.begin() as connection:
            self.guard(connection)
        self._renewed()

    def guard(self, connection: sa.Connection) -> None:
        """As `prove`, within the transaction that writes."""
        self._lease.guard(connection)

    def release(self) -> None:
        """Let another take over at once."""
        self._lease.release()

    def _renewed(self) -> None:
        self._renew_at = time.monotonic() + self._lease.seconds / 3
