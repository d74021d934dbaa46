"""Objects in any S3 server, through the `minio` client: the store of the fleet profile.

Nothing rests on the server's word: an upload is read back and hashed before it is copied to its content address, and
that copy is looked at. `infra.objects.s3_bucket` says when a request is tried again.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from infra.errors import ConfigError, CorruptDataError, UnavailableError
from infra.objects import ObjectInfo, Payload, checked_key, episode_key
from infra.objects.metered import metered
from infra.objects.s3_bucket import PAGE, Bucket, ChangedError
from infra.objects.s3_errors import FAILURES, absent

PART_BYTES = 16 * 2**20  # an upload larger than this goes in parts of this size
MAX_PRESIGNED_S = 7 * 24 * 3600  # S3's limit
_AGAIN = "send it again from the spool"


class S3Store:
    """Objects of one bucket. Threads may share it; a forked process opens its own.

    Args:
        endpoint: `http(s)://host:port`, as robots reach it, too: presigned URLs name it.
        bucket: an existing bucket, with nothing else in it.
        access_key, secret_key: of a key that may read and write it.
        region: the one that the server says it is of.
        timeout_s: to connect, and without a byte, seconds.
        pool: connections that are open at most; further requests wait for one.

    Raises:
        ConfigError: the endpoint, bucket or region cannot be one; by any method: the server knows no such bucket or
            key, or denies it.
    """

    def __init__(
        self, endpoint: str, bucket: str, *, access_key: str, secret_key: str, region: str, timeout_s: float, pool: int
    ) -> None:
        self._bucket = Bucket(
            endpoint,
            bucket,
            access_key=access_key,
            secret_key=secret_key,
            region=region,
            timeout_s=timeout_s,
            pool=pool,
        )

    @metered
    def put(self, key: str, data: Payload) -> None:
        """See `ObjectStore.put`. More than `PART_BYTES` go in parts; when one fails, all are sent again."""
        checked_key(key)

        def send() -> None:
            with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as source:
                size = source.seek(0, io.SEEK_END)
                source.seek(0)
                # One part after another: threads of the client outlive an upload that fails.
                self._bucket.client.put_object(
                    self._bucket.name, key, source, size, part_size=PART_BYTES, num_parallel_uploads=1
                )

        self._bucket.patiently(send, key)

    @metered
    def accept(self, incoming: str, sha256: str, size: int) -> str:
        """See `ObjectStore.accept`. Only the ETag that was hashed is copied. Where the copy's ETag is another one (of a
        server that ignores the condition, or of a copy in parts), it is read back, and deleted if it is wrong.

        An ETag is an MD5, which two contents can share: readers check the sha256 of what they read all the same.
        """
        key = episode_key(sha256)
        found, etag = self._bucket.digest(checked_key(incoming), size)
        if found != sha256:
            raise CorruptDataError(f"{incoming} has sha256 {found}, announced was {sha256}", _AGAIN)
        if self._made_young(key, sha256, size):
            return key
        try:
            self._bucket.copy(incoming, etag, size, key)
        except ChangedError as error:
            raise CorruptDataError(f"{incoming} was changed after its sha256 was verified", _AGAIN) from error
        copied = self._bucket.stat(key)
        if copied is None:
            raise UnavailableError(f"{self._bucket.endpoint} took {key}, but does not hold it", "commit it again")
        same = (copied.size, copied.etag) == (size, etag)
        if not same and (copied.size != size or self._bucket.digest(key, size)[0] != sha256):
            self.delete(key)
            raise CorruptDataError(f"{incoming} was copied to {key} as other bytes than were verified", _AGAIN)
        return key

    @metered
    def get(self, key: str) -> bytes:
        return self._bucket.read(checked_key(key))

    @metered
    def exists(self, key: str) -> bool:
        if self._bucket.stat(checked_key(key)) is not None:
            return True
        name = self._bucket.name
        if not self._bucket.patiently(lambda: self._bucket.client.bucket_exists(name), key):
            raise ConfigError(f"{self._bucket.endpoint} has no bucket {name}", "make it, or correct s3_bucket")
        return False

    @metered
    def delete(self, key: str) -> None:
        checked_key(key)

        def remove() -> None:
            try:
                self._bucket.client.remove_object(self._bucket.name, key)
            except FAILURES as error:
                if not absent(error):
                    raise

        self._bucket.patiently(remove, key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = f"{checked_key(prefix.rstrip('/'))}/"
        last: str | None = None
        while True:
            page = self._bucket.page(folder, last)
            for item in page:
                modified = time.time() if item.last_modified is None else item.last_modified.timestamp()
                yield ObjectInfo(str(item.object_name), int(item.size or 0), modified)
            if len(page) < PAGE:
                return
            last = page[-1].object_name

    def presign_put(self, key: str, size: int, seconds: float) -> str:
        """A URL that permits PUTs of `size` bytes to `key`, and nothing else, for that many whole seconds, from 1 to
        7 days."""
        return self._bucket.presigned_upload(checked_key(key), size, _validity(seconds))

    def presign_get(self, key: str, seconds: float) -> str:
        """A URL that permits GETs of `key`, and nothing else, for that many whole seconds, from 1 to 7 days."""
        return self._bucket.presigned("GET", checked_key(key), _validity(seconds))

    @metered
    def sweep_unfinished(self, older_than_s: float) -> int:
        """See `ObjectStore.sweep_unfinished`: uploads in parts, which are aborted.

        A presigned PUT is in one part: these are `put`s of more than `PART_BYTES` whose process died.
        """
        before = time.time() - older_than_s
        aborted = 0
        after: str | None = None
        while True:
            page = self._bucket.uploads(after)
            for upload in page.uploads:
                if upload.initiated_time is not None and upload.initiated_time.timestamp() <= before:
                    aborted += self._bucket.abort(upload.object_name, str(upload.upload_id))
            if not page.is_truncated or not page.next_key_marker:
                return aborted
            after = page.next_key_marker

    def _made_young(self, key: str, sha256: str, size: int) -> bool:
        """Whether the right object is at this address already; it is then as young as one just written: a sweep of
        uncommitted objects must not take it from this commit. It is copied onto itself, so no upload can alter it.
        """
        there = self._bucket.stat(key)
        if there is None or there.size != size or not self._is(key, sha256, size):
            return False
        try:
            self._bucket.copy(key, str(there.etag), size, key)
        except (ChangedError, CorruptDataError):
            return False  # replaced or deleted meanwhile
        return True

    def _is(self, key: str, sha256: str, size: int) -> bool:
        """Whether the object can be read and has this sha256."""
        try:
            return self._bucket.digest(key, size)[0] == sha256
        except (CorruptDataError, UnavailableError):
            return False  # a server that has lost the bytes fails at each GET, and does all else


def _validity(seconds: float) -> timedelta:
    if not 1 <= seconds <= MAX_PRESIGNED_S:
        raise ConfigError(f"a URL cannot be valid for {seconds} s", f"ask for 1 to {MAX_PRESIGNED_S} s")
    return timedelta(seconds=int(seconds))
