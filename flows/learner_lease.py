"""One learner on a home: rank 0 holds a lease for all ranks, and nothing is published or saved without it.

A thread renews it, so that a start, an update or a publication may last longer than the lease does. What protects the
home is the fencing token: whoever lost the lease finds it out before the next write, however long it was stopped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import sqlalchemy as sa

from infra.catalog import Catalog
from infra.catalog.leases import Lease
from infra.errors import LeaseLostError
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
        self._lease = Lease(catalog, LEARNER, seconds)
        self._lost: LeaseLostError | None = None
        self._keeping = contextlib.ExitStack()

    def acquire(self, stop: threading.Event) -> None:
        """Take it and keep it. The hold of one that was killed is waited out; that of one that lives never ends.

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
        self._keeping.enter_context(self._lease.kept(self._lose))

    def check(self) -> None:
        """LeaseLostError if the thread found that another learner took it; asks nobody."""
        if self._lost is not None:
            raise self._lost

    def prove(self) -> None:
        """Renew now, or refuse what was to be written: LeaseLostError if another took it."""
        self._lease.prove()

    def guard(self, connection: sa.Connection) -> None:
        """As `prove`, within the transaction that writes."""
        self._lease.guard(connection)

    def release(self) -> None:
        """Let another take over at once; where the catalog is away, when the lease has ended."""
        self._keeping.close()
        try:
            self._lease.release()
        except Exception as error:  # whatever ended the learner is what is to be told
            _log.warning("the learner's lease could not be given back: %s", error)

    def _lose(self, error: LeaseLostError) -> None:
        self._lost = error
