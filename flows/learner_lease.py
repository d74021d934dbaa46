"""One learner on a home: rank 0 holds a lease for all ranks, and nothing is published or saved without it.

A thread renews it, so that a long update, start or upload does not end it; a learner that is stopped stops renewing.
"""

from __future__ import annotations

import logging
import threading
import time

import sqlalchemy as sa

from infra.catalog import Catalog
from infra.catalog.leases import Lease
from infra.errors import LeaseLostError, LwdError
from infra.process import patiently

LEARNER = "learner"
_MARGIN_S = 1.0
_log = logging.getLogger("lwd.learner")


class LearnerLease:
    """Held by rank 0 for all ranks.

    Args:
        catalog: where the lease is. seconds: how long a killed learner's hold lasts.
    """

    def __init__(self, catalog: Catalog, seconds: float) -> None:
        self._catalog, self._lease = catalog, Lease(catalog, LEARNER, seconds)
        self._lost: LeaseLostError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

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
        self._thread.start()

    def require(self) -> None:
        """LeaseLostError if another learner was seen to have taken it."""
        if self._lost is not None:
            raise self._lost

    def prove(self) -> None:
        """Renew now, or refuse what was to be written: LeaseLostError if another took it."""
        with self._catalog.begin() as connection:
            self.guard(connection)

    def guard(self, connection: sa.Connection) -> None:
        """As `prove`, within the transaction that writes."""
        self._lease.guard(connection)

    def release(self) -> None:
        """Let another take over at once."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._lease.release()

    def _renew(self) -> None:
        while not self._ended.wait(self._lease.seconds / 3):
            try:
                self.prove()
            except LeaseLostError as error:
                self._lost = error
                return
            except LwdError as error:  # nobody else can take it from a catalog that does not answer
                _log.warning("the learner's lease was not renewed: %s", error.problem)
