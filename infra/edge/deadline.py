"""An end to every request, whatever the other side does: one byte a second is never a time-out between two bytes.

The socket of a request that has lasted too long is shut down by another thread; what waits for its next byte then ends.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class DeadlineError(Exception):
    """The block lasted too long."""


class _Watch:
    """One block's socket, and whether its time is over."""

    def __init__(self) -> None:
        self.expired = False
        self._lock = threading.Lock()
        self._sock: Any = None

    def begin(self, sock: Any) -> None:
        # The socket and not its connection: that lets go of it while an answer without a length is still read.
        with self._lock:
            self._sock = sock
            if self.expired:
                raise DeadlineError

    def expire(self) -> None:
        with self._lock:
            self.expired = True
            if self._sock is not None:
                with contextlib.suppress(OSError, ValueError):  # closed already
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def forget(self) -> None:
        """The socket may be another block's from now on."""
        with self._lock:
            self._sock = None


_now = threading.local()


@contextlib.contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Requests of this thread within the block, through a pool of `watched_pools`, have this long in all.

    Raises:
        DeadlineError: they took longer; whatever else the block then raised is its cause.
    """
    watch = _Watch()
    timer = threading.Timer(seconds, watch.expire)
    timer.daemon = True
    outer, _now.watch = getattr(_now, "watch", None), watch
    timer.start()
    try:
        yield
    except Exception as error:
        if watch.expired:
            raise DeadlineError from error
        raise
    else:
        if watch.expired:  # an end of the body that was none
            raise DeadlineError
    finally:
        timer.cancel()
        watch.forget()
        _now.watch = outer


def watched_pools(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    """The manager, its connections watched."""
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
    return manager


def _watch(connection: HTTPConnection) -> None:
    if (watch := getattr(_now, "watch", None)) is not None:
        watch.begin(connection.sock)


class _Connection(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _watch(self)

    def request(self, *arguments: Any, **options: Any) -> None:
        _watch(self)  # one that was connected before
        super().request(*arguments, **options)


class _SecureConnection(HTTPSConnection):
    def connect(self) -> None:
        super().connect()  # the handshake as a whole has the connection's time-out
        _watch(self)

    def request(self, *arguments: Any, **options: Any) -> None:
        _watch(self)
        super().request(*arguments, **options)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection
