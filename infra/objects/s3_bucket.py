"""Requests to one bucket of an S3 server: each tried again where that may help, its failures as our errors.

A request that finds the server away, silent, or answering 5xx is tried again at most `TRIES` times in all, after pauses
that double and are drawn at random (`infra.process.backoff`), and not once twice the time-out has passed since the
first. The transport below tries nothing again by itself. An answer shorter than it announced is a failure, too.
"""

from __future__ import annotations

import hashlib
import io
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.commonconfig import REPLACE, ComposeSource, CopySource
from minio.credentials import Credentials
from minio.datatypes import ListMultipartUploadsResult, Object
from minio.signer import sign_v4_s3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import IncompleteRead, ProtocolError

from infra.errors import ConfigError, CorruptDataError, UnavailableError
from infra.objects import UnreadableError
from infra.objects.s3_errors import FAILURES, Translator, absent, changed
from infra.process import backoff

T = TypeVar("T")

TRIES = 4
COPY_BYTES = 256 * 2**20  # a copy larger than this goes in parts: one that takes longer than the time-out would fail
PAGE = 1000
_PAUSE_S = 0.1
_BLOCK = 2**20
_PIECE = 2**18
_UNSENT = 2**19  # the system doubles it; 10 MB/s at 100 ms to the server and back
_TAR = "application/x-tar"


class _Transport(urllib3.PoolManager):
    """Sends a body in pieces, and has the system hold few of them: the time-out is for a stop, not for a slow link.

    A socket's time-out is for all that one call gives it to send; and what the system has taken, but not yet sent, is
    waited for as if the server were silent.
    """

    def urlopen(  # type: ignore[override]
        self, method: str, url: str, redirect: bool = True, **options: Any
    ) -> urllib3.BaseHTTPResponse:
        body = options.pop("body", None)
        return super().urlopen(method, url, redirect, body=io.BytesIO(body) if body else body, **options)


class ChangedError(Exception):
    """The source of a copy no longer has the ETag that was asked for."""


class Bucket:
    """One bucket, and the client that reaches it; arguments and errors as of `S3Store`. Threads may share it."""

    def __init__(
        self, endpoint: str, name: str, *, access_key: str, secret_key: str, region: str, timeout_s: float, pool: int
    ) -> None:
        url = urlsplit(endpoint)
        if (
            url.scheme not in ("http", "https")
            or not url.netloc
            or url.path.strip("/")
            or url.query
            or "@" in url.netloc
        ):
            raise ConfigError("s3_endpoint is not a server's URL", "give it as http(s)://host:port, without a path")
        self.name = name
        self.endpoint = f"{url.scheme}://{url.netloc}"
        self._timeout_s = timeout_s
        self._region = region
        self._explain = Translator(self.endpoint, name, timeout_s)
        transport = _Transport(
            maxsize=pool,
            block=True,
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
            retries=False,
            blocksize=_PIECE,
            socket_options=[*HTTPConnection.default_socket_options, (socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)],
            ssl_context=ssl.create_default_context() if url.scheme == "https" else None,
        )
        try:
            self._credentials = Credentials(access_key, secret_key)
            self.client = Minio(
                url.netloc,
                access_key=access_key,
                secret_key=secret_key,
                secure=url.scheme == "https",
                region=region,
                http_client=transport,
            )
            self.presigned("GET", "no-request-but-the-names-are-checked", timedelta(days=1))
        except ValueError as error:
            raise ConfigError(f"s3_endpoint, s3_region, s3_bucket or the keys: {error}", "correct it") from error

    def presigned(self, method: str, key: str, validity: timedelta, now: datetime | None = None) -> str:
        """A URL for requests of one method to one key, whatever they send."""
        return self.client.get_presigned_url(method, self.name, key, validity, request_date=now)

    def presigned_upload(self, key: str, size: int, validity: timedelta) -> str:
        """A URL for PUTs of `size` bytes to one key: the length is signed, too, as S3's signatures can be for any
        header, but the client's own presigning cannot."""
        now = datetime.now(UTC)
        url = urlsplit(self.presigned("PUT", key, validity, now))
        query = url.query.partition("&X-Amz-Signature=")[0]
        query = query.replace("X-Amz-SignedHeaders=host", "X-Amz-SignedHeaders=content-length%3Bhost")
        signed = sign_v4_s3(
            method="PUT",
            url=url._replace(query=query),
            region=self._region,
            headers={"Host": url.netloc, "Content-Length": str(size)},
            credentials=self._credentials,
            content_sha256="UNSIGNED-PAYLOAD",
            date=now,
        )
        signature = str(signed["Authorization"]).rpartition("Signature=")[2]
        return url._replace(query=f"{query}&X-Amz-Signature={signature}").geturl()

    def patiently(self, work: Callable[[], T], key: str) -> T:
        """`work()`, which asks something about `key`, tried again as the module says."""
        until = time.monotonic() + 2 * self._timeout_s
        for attempt in range(TRIES):
            try:
                return work()
            except FAILURES as error:
                explained = self._explain(error, key)
                last = attempt + 1 == TRIES or time.monotonic() >= until
                if last or not isinstance(explained, UnavailableError):
                    raise explained from error
            time.sleep(backoff(attempt, _PAUSE_S))
        raise AssertionError("the last try returns or raises")

    def read(self, key: str) -> bytes:
        """The object whole.

        Raises:
            CorruptDataError: there is none.
            UnreadableError: its bytes do not come whole.
        """

        def read() -> bytes:
            with self._answer(key) as (response, length):
                data = response.read(decode_content=False)
                if len(data) != length:
                    raise IncompleteRead(len(data), length - len(data))
                return data

        return self._patiently_read(read, key)

    def digest(self, key: str, size: int) -> tuple[str, str]:
        """(sha256, ETag) of the object, read through.

        Raises:
            CorruptDataError: there is none, or it is not `size` bytes.
            UnreadableError: its bytes do not come whole.
        """

        def read() -> tuple[str, str]:
            with self._answer(key) as (response, length):
                if length != size:
                    raise CorruptDataError(f"{key} holds {length} bytes, announced were {size}", "send it again")
                digest, found = hashlib.sha256(), 0
                while block := response.read(_BLOCK, decode_content=False):
                    digest.update(block)
                    found += len(block)
                if found != length:
                    raise IncompleteRead(found, length - found)
                return digest.hexdigest(), response.headers.get("ETag", "").strip('"')

        return self._patiently_read(read, key)

    def stat(self, key: str) -> Object | None:
        """Size, ETag and time of the object; None if there is none, or no bucket: servers do not tell which."""

        def stat() -> Object | None:
            try:
                return self.client.stat_object(self.name, key)
            except FAILURES as error:
                if not absent(error):
                    raise
                return None

        return self.patiently(stat, key)

    def copy(self, source: str, etag: str, size: int, target: str) -> None:
        """Copy inside the store. Metadata that the uploader gave stays behind.

        Raises:
            ChangedError: `source` has another ETag by now; nothing was copied.
            CorruptDataError: there is no `source`.
        """

        def copy() -> None:
            metadata: dict[str, str | list[str] | tuple[str]] = {"Content-Type": _TAR}
            try:
                if size <= COPY_BYTES:
                    whole = CopySource(self.name, source, match_etag=etag)
                    self.client.copy_object(self.name, target, whole, metadata=metadata, metadata_directive=REPLACE)
                else:
                    if self.client.stat_object(self.name, source).etag != etag:  # the client looks at the size alone
                        raise ChangedError(source)
                    parts = [
                        ComposeSource(self.name, source, offset=at, length=min(COPY_BYTES, size - at), match_etag=etag)
                        for at in range(0, size, COPY_BYTES)
                    ]
                    self.client.compose_object(self.name, target, parts, metadata=metadata)
            except FAILURES as error:
                if changed(error):
                    raise ChangedError(source) from error
                raise

        self.patiently(copy, source)

    def page(self, prefix: str, after: str | None) -> list[Object]:
        """The first `PAGE` objects below a prefix, in order of key, of those after a key."""

        def page() -> list[Object]:
            found = self.client.list_objects(self.name, prefix=prefix, recursive=True, start_after=after)
            return list(islice(found, PAGE))

        return self.patiently(page, prefix)

    def uploads(self, after: str | None) -> ListMultipartUploadsResult:
        """A page of the uploads in parts that have not ended, of keys after a key."""
        return self.patiently(
            lambda: self.client._list_multipart_uploads(self.name, key_marker=after), "the uploads in parts"
        )

    def abort(self, key: str, upload: str) -> bool:
        """End an upload in parts and drop what it sent; False if it had ended."""

        def abort() -> bool:
            try:
                self.client._abort_multipart_upload(self.name, key, upload)
            except FAILURES as error:
                if getattr(error, "code", None) != "NoSuchUpload":
                    raise
                return False
            return True

        return self.patiently(abort, key)

    def _patiently_read(self, read: Callable[[], T], key: str) -> T:
        try:
            return self.patiently(read, key)
        except UnavailableError as error:
            try:
                self.client.stat_object(self.name, key)
            except FAILURES:
                raise error from error.__cause__
            raise UnreadableError(
                f"{self.endpoint} serves, but object {key} did not come whole at any try: {error.problem}",
                "send it again from the spool, or restore it in the store; or see what cuts long answers on the way",
            ) from error

    @contextmanager
    def _answer(self, key: str) -> Iterator[tuple[urllib3.BaseHTTPResponse, int]]:
        """The answer to a GET, and the bytes that it announces; its connection is closed if it is not read whole."""
        response = self.client.get_object(self.name, key)
        try:
            length = response.headers.get("Content-Length", "")
            if not length.isdecimal():
                raise ProtocolError("the answer does not say its length")
            yield response, int(length)
        finally:
            response.close()
            response.release_conn()
