"""What an S3 server, or the way to it, says when it fails, in our errors; none of them quotes a credential or a URL."""

from __future__ import annotations

import errno
import ssl
from dataclasses import dataclass
from xml.etree.ElementTree import ParseError

from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    IncompleteRead,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
)

from infra.errors import ConfigError, CorruptDataError, LwdError, StorageFullError, UnavailableError

# What may come out of the client: its own errors, the transport's, and those of an answer that is no S3 answer.
FAILURES = (MinioException, HTTPError, ParseError, ValueError)

_FULL = {"InsufficientStorage", "QuotaExceeded", "StorageFull", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "PermanentRedirect", "Redirect", "TemporaryRedirect"}
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled", "AccountProblem"}
# Of an upload in parts that has ended, or of bytes damaged on their way: sent again from the start.
_AGAIN = {"NoSuchUpload", "InvalidPart", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "RequestTimeout"}
_UP = "see that the object store is up and that this machine reaches it; what was not acknowledged is sent again"


def absent(error: Exception) -> bool:
    """Whether the failure says that there is no such object."""
    return isinstance(error, S3Error) and error.code == "NoSuchKey"


def changed(error: Exception) -> bool:
    """Whether the failure says that the object is another one than was asked for (If-Match)."""
    return isinstance(error, S3Error) and (error.code == "PreconditionFailed" or error.response.status == 412)


@dataclass(frozen=True)
class Translator:
    """Errors of one bucket's server.

    Args:
        endpoint: the server's URL.
        bucket: the bucket.
        timeout_s: of its connections, seconds.
    """

    endpoint: str
    bucket: str
    timeout_s: float

    def __call__(self, error: Exception, key: str) -> LwdError:
        """The error to raise for a failed request about `key`: UnavailableError for what another try may mend."""
        if getattr(error, "code", None) == "NoSuchUpload" and isinstance(error.__context__, S3Error):
            error = error.__context__  # the upload ended by failing; then the client found nothing to abort
        if isinstance(error, S3Error):
            return self._answered(error.response.status, str(error.code), str(error.message), key)
        if isinstance(error, ServerError):
            return self._answered(error.status_code, "", "", key)
        if isinstance(error, InvalidResponseError):
            return self._answered(error._code, "", "", key)
        if isinstance(error, HTTPError):
            return self._transport(error)
        return UnavailableError(f"{self.endpoint} gave an answer that is not S3's ({type(error).__name__})", _UP)

    def _answered(self, status: int, code: str, message: str, key: str) -> LwdError:
        said = f"{status} {code}".strip()
        if status == 507 or code in _FULL or _says_full(message):
            return StorageFullError(
                f"{self.endpoint} has no room for {key} in bucket {self.bucket} ({said})",
                "free space at the object store, or raise the bucket's quota",
            )
        if code == "NoSuchKey":
            return CorruptDataError(
                f"object {key} is not in {self.endpoint}/{self.bucket}", "send it again from the spool"
            )
        if code == "NoSuchBucket":
            return ConfigError(
                f"{self.endpoint} has no bucket {self.bucket}",
                "make it and let the key read and write it, or correct s3_bucket",
            )
        if code in _CLOCK or "too old" in message:
            return ConfigError(
                f"{self.endpoint} says that the time is another ({said})", "set the clocks of both machines"
            )
        if code in _ELSEWHERE or status in (301, 307):
            return ConfigError(
                f"{self.endpoint} is not of the region given ({said})", "correct s3_region or s3_endpoint"
            )
        if code in _DENIED or status in (401, 403):
            return ConfigError(
                f"{self.endpoint} denies access to {key} in bucket {self.bucket} ({said})",
                "correct s3_access_key and s3_secret_key, or let that key read and write the bucket",
            )
        if status >= 500 or status in (408, 425, 429) or code in _AGAIN:
            return UnavailableError(f"{self.endpoint} answered {said} for {key}", _UP)
        return ConfigError(
            f"{self.endpoint} refuses what is asked of {key} ({said})",
            "see that s3_endpoint is an S3 server's API, s3_region is its region, and the clocks agree",
        )

    def _transport(self, error: HTTPError) -> LwdError:
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return ConfigError(
                    f"the certificate of {self.endpoint} is not believed: {cause.verify_message}",
                    "add its authority to the system's, or name a PEM bundle in SSL_CERT_FILE",
                )
        return UnavailableError(f"{self.endpoint} {self._what(error)}", _UP)

    def _what(self, error: HTTPError) -> str:
        if isinstance(error, NameResolutionError):
            return "has a name that does not resolve"
        if isinstance(error, ReadTimeoutError):
            return f"sent nothing for {self.timeout_s:g} s"
        if isinstance(error, ConnectTimeoutError) and not isinstance(error, NewConnectionError):
            return f"took no connection within {self.timeout_s:g} s"
        if any(isinstance(cause, IncompleteRead) for cause in _causes(error)):
            return "broke its answer off"
        reason = next(filter(None, map(_reason, _causes(error))), type(error).__name__)
        verb = "took no connection" if isinstance(error, NewConnectionError) else "broke the connection"
        return f"{verb} ({reason})"


def _says_full(message: str) -> bool:
    """Servers without a code for it say it in words: Garage a quota in a 403, a full disk in a 500 or 503."""
    said = message.lower()
    return "quota" in said or "no space left" in said


def _reason(cause: BaseException) -> str:
    """A word of the system or of TLS for a failure; empty if it has none."""
    if isinstance(cause, ssl.SSLError):
        return cause.reason or "TLS"
    return errno.errorcode.get(cause.errno or 0, "") if isinstance(cause, OSError) else ""


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        inner = [argument for argument in following.args if isinstance(argument, BaseException)]
        following = following.__cause__ or (inner[0] if inner else None) or following.__context__
    return found
