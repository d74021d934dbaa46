"""One HTTP request of a robot: pooled, with time-outs, tried again where the other side was away.

A request whose answer did not come is sent again, since every call may be repeated: at most `tries` times, after pauses
that double and are drawn at random, and not beyond a deadline. What the service refuses, or asks to be left alone with,
not tried again here. Each request has a time in all, and an answer a size, whatever the other side sends. Presigned
URLs and the token are never part of an error: the libraries' own texts are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit

import urllib3

from infra.edge.deadline import DeadlineError, ends_within, watched_pools
from infra.edge.server import RefusedError, from_wire
from infra.errors import ConfigError, LwdError, StorageFullError, UnavailableError
from infra.process import backoff

T = TypeVar("T")

WAIT = "wait: nothing is lost, the spool keeps what was not confirmed"
_MAX_JSON_BYTES = 2**22
_PAUSE_S, _PAUSE_MAX_S = 0.1, 2.0
_LATER_MAX_S = 60.0
_MIN_RATE = 64 * 1024  # bytes a second: what is slower is as if it had stopped
# What the libraries raise on answers and URLs that are none; their texts may hold the URL.
_ODD = (ValueError, TypeError, LookupError, AttributeError, RecursionError, http.client.HTTPException)


class AgainError(UnavailableError):
    """Worth another try at once."""


class LaterError(UnavailableError):
    """The service says in how many seconds to come back."""

    def __init__(self, problem: str, fix: str, after: float) -> None:
        super().__init__(problem, fix)
        self.after = after


class Transport:
    """Requests to the service and to the store that it names. Threads may share it.

    Args:
        where: the service's host and port, for errors.
        ca: PEM bundle that is believed besides the system's.
        timeout_s: to connect, and without a byte, seconds; a store may take three times as long for an upload.
        tries: of one request.

    Raises:
        ConfigError: `ca` cannot be read.
    """

    def __init__(self, where: str, ca: Path | None, timeout_s: float, tries: int) -> None:
        self.where = where
        self._timeout = urllib3.Timeout(connect=min(3.0, timeout_s), read=timeout_s)
        self._slow = urllib3.Timeout(connect=min(3.0, timeout_s), read=3 * timeout_s)
        self._deadline_s = 2 * timeout_s
        self._tries = tries
        self._closed = threading.Event()
        self._pool = watched_pools(
            urllib3.PoolManager(num_pools=4, maxsize=4, retries=False, ssl_context=_tls(ca), blocksize=2**16)
        )

    def close(self) -> None:
        """Give the connections back and wait for nothing any more."""
        self._closed.set()
        self._pool.clear()

    def patiently(self, work: Callable[[], T], tries: int | None = None, size: int = 0) -> T:
        """`work()`, tried again where the other side was away.

        Args:
            size: bytes that it has to move; a try that takes longer than these need has failed.

        Raises:
            UnavailableError: it still was.
        """
        limit_s = self._deadline_s + size / _MIN_RATE
        end = time.monotonic() + self._deadline_s
        attempt = 0
        while True:
            try:
                with ends_within(limit_s):
                    return work()
            except DeadlineError:
                problem = AgainError(f"{self.where} or its store took longer than {limit_s:.0f} s", WAIT)
            except urllib3.exceptions.HTTPError as error:  # in the middle of a body
                problem = AgainError(f"{self.where} or its store broke off ({type(error).__name__})", WAIT)
            except _ODD as error:
                problem = AgainError(f"{self.where} or its store answers nonsense ({type(error).__name__})", WAIT)
            except AgainError as error:
                problem = error
            pause = backoff(attempt, _PAUSE_S, _PAUSE_MAX_S)
            attempt += 1
            if attempt >= (tries or self._tries) or time.monotonic() + pause > end or self._closed.wait(pause):
                raise UnavailableError(problem.problem, problem.fix) from None

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | IO[bytes] | None = None,
        *,
        slow: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """The answer, its body unread; redirections are not followed."""
        where = _place(url)
        try:
            return self._pool.request(
                method, url, headers=headers, body=body, timeout=self._slow if slow else self._timeout, redirect=False,
                preload_content=False, decode_content=False,
            )  # fmt: skip
        except urllib3.exceptions.SSLError as error:
            raise _untrusted(where, error) from None
        except urllib3.exceptions.HTTPError as error:  # its text may hold the URL
            raise AgainError(f"{where} does not answer ({type(error).__name__})", WAIT) from None

    def read(self, response: urllib3.BaseHTTPResponse) -> object:
        """The JSON of a short body; None if it is none."""
        data = response.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            response.close()  # there may be no end of it
        response.release_conn()
        try:
            return json.loads(data) if len(data) <= _MAX_JSON_BYTES else None
        except (ValueError, RecursionError):
            return None

    def error(self, response: urllib3.BaseHTTPResponse, answer: object) -> LwdError:
        """What an answer other than success means."""
        status, said = response.status, from_wire(answer)
        after = response.headers.get("Retry-After", "")
        if status in (429, 503) and said is not None and re.fullmatch(r"[0-9]{1,9}", after):
            return LaterError(said.problem, said.fix, min(float(after), _LATER_MAX_S))
        if said is not None:
            return AgainError(said.problem, said.fix) if status in (500, 503) else said
        if status in (401, 403):
            return RefusedError(
                f"{self.where} refuses this robot (HTTP {status})", "see what stands before the service"
            )
        return AgainError(f"{self.where} answers HTTP {status}", WAIT)


def checked_url(url: str, insecure: bool) -> str:
    """The service's URL, if a token may be sent there; ConfigError otherwise."""
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise ConfigError("ingest_url is not the URL of a service", "set LWD_INGEST_URL to https://host:port")
    if parts.scheme == "http" and not insecure and not _is_this_machine(parts.hostname):
        raise ConfigError(
            f"the robot's token would travel in the clear to {parts.netloc}",
            "set LWD_INGEST_URL to an https URL, or LWD_INGEST_INSECURE=true on a network that you trust",
        )
    return url.rstrip("/")


def _place(url: str) -> str:
    """Host and port of a URL, for errors: no user, no path, not without end.

    Raises:
        UnavailableError: it is no URL of a server.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        raise UnavailableError("a place was named that is no http or https URL", "see what answers as the service")
    return host[:100] + (f":{port}" if port else "")


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tls(ca: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"ingest_ca {ca} cannot be read ({error})", "give a PEM bundle") from error
    return context


def _untrusted(where: str, error: Exception) -> UnavailableError:
    found = re.search(r"certificate verify failed: ([^(]*)", str(error))
    why = found[1].strip() if found else "no TLS connection"
    return UnavailableError(
        f"the certificate of {where} is not believed: {why}", "give this robot the service's CA as LWD_INGEST_CA"
    )


def store_error(response: urllib3.BaseHTTPResponse) -> LwdError:
    """What a store's answer other than success means; its body is not looked at."""
    if response.status == 507:
        return StorageFullError("the object store has no room", "free space on it")
    error = f"the object store answers HTTP {response.status}"
    if response.status == 403:
        return UnavailableError(f"{error}: the permission has expired", "check this robot's and the server's clocks")
    return AgainError(error, WAIT) if response.status >= 500 else UnavailableError(error, WAIT)
