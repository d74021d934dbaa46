"""What the S3 store says where no such server can be had: others' words for the same, TLS, wrong addresses."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from infra.errors import ConfigError, CorruptDataError, LwdError, StorageFullError, UnavailableError
from infra.objects.s3 import S3Store
from infra.objects.s3_bucket import TRIES

SECRET = "not-to-be-told"


def opened(endpoint: str, **changes: object) -> S3Store:
    values = {"access_key": "key", "secret_key": SECRET, "region": "here", "timeout_s": 5.0, "pool": 2} | changes
    return S3Store(endpoint, str(values.pop("bucket", "lwd")), **values)  # type: ignore[arg-type]


class Says(BaseHTTPRequestHandler):
    """A server that gives one answer to all: `server.answer` is (status, type, body)."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, kind, body = self.server.answer  # type: ignore[attr-defined]
        self.server.asked += 1  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_GET = do_PUT = do_HEAD = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Says) as running:
        running.asked = 0  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def store(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setattr("infra.objects.s3_bucket.backoff", lambda *_: 0.0)
    return opened(f"http://127.0.0.1:{server.server_port}")


@pytest.mark.parametrize(
    ("status", "code", "kind", "tries"),
    [
        (507, "InsufficientStorage", StorageFullError, 1),
        (507, "XMinioStorageFull", StorageFullError, 1),
        (400, "XMinioAdminBucketQuotaExceeded", StorageFullError, 1),
        (403, "QuotaExceeded", StorageFullError, 1),
        (403, "RequestTimeTooSkewed", ConfigError, 1),
        (403, "SignatureDoesNotMatch", ConfigError, 1),
        (403, "InvalidAccessKeyId", ConfigError, 1),
        (301, "PermanentRedirect", ConfigError, 1),
        (404, "NoSuchBucket", ConfigError, 1),
        (404, "NoSuchKey", CorruptDataError, 1),
        (405, "MethodNotAllowed", ConfigError, 1),
        (503, "SlowDown", UnavailableError, TRIES),
        (500, "InternalError", UnavailableError, TRIES),
        (400, "RequestTimeout", UnavailableError, TRIES),
        (400, "IncompleteBody", UnavailableError, TRIES),
        (429, "TooManyRequests", UnavailableError, TRIES),
    ],
)
def test_the_words_of_servers(
    store: S3Store, server: ThreadingHTTPServer, status: int, code: str, kind: type[LwdError], tries: int
) -> None:
    body = f"<Error><Code>{code}</Code><Message>of {SECRET}</Message><Resource>/x</Resource></Error>"
    server.answer = (status, "application/xml", body.encode())  # type: ignore[attr-defined]
    with pytest.raises(kind, match=f"{server.server_port}") as caught:
        store.put("a", b"x")
    assert type(caught.value) is kind
    assert SECRET not in str(caught.value)
    assert server.asked == tries  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("status", "kind", "body", "error"),
    [
        (200, "application/xml", b"<ListBucketResult><Na", UnavailableError),
        (200, "text/html", b"<html><body>Log in</body></html>", UnavailableError),
        (502, "text/html", b"<html>bad gateway</html>", UnavailableError),
        (404, "text/plain", b"page not found", ConfigError),
        (403, "text/plain", b"forbidden", ConfigError),
        (200, "application/xml", b"<Error><Code>InternalError</Code></Error>", UnavailableError),
    ],
)
def test_a_server_that_is_no_s3_server(
    store: S3Store, server: ThreadingHTTPServer, status: int, kind: str, body: bytes, error: type[LwdError]
) -> None:
    server.answer = (status, kind, body)  # type: ignore[attr-defined]
    with pytest.raises(error, match=f"127.0.0.1:{server.server_port}"):
        list(store.list("a"))


def test_an_answer_without_its_length_is_no_answer(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Says) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf of")
        self.close_connection = True

    monkeypatch.setattr(Says, "do_GET", answer)
    with pytest.raises(UnavailableError):
        store.get("a")


@pytest.mark.parametrize(
    "endpoint",
    [
        "127.0.0.1:9000",
        "ftp://host",
        "http://",
        "http://host/path",
        f"http://u:{SECRET}@host",
        "http://h?x=1",
        "http://h:x",
    ],
)
def test_an_endpoint_that_is_no_url_of_a_server_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="s3_endpoint") as caught:
        opened(endpoint)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("changes", [{"bucket": "A"}, {"bucket": ""}, {"region": "no/region"}], ids=str)
def test_names_that_are_none_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="s3_bucket"):
        opened("http://127.0.0.1:9000", **changes)


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UnavailableError, match=rf"http://127.0.0.1:{port} took no connection \(ECONNREFUSED\)"):
        opened(f"http://127.0.0.1:{port}").get("a")


def test_a_host_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.objects.s3_bucket.backoff", lambda *_: 0.0)
    with pytest.raises(UnavailableError, match="http://nowhere.invalid:9 has a name that does not resolve"):
        opened("http://nowhere.invalid:9").get("a")


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A PEM of a certificate for 127.0.0.1 that nobody vouches for, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = built.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "own.pem").write_bytes(pem)
    return tmp_path / "own.pem"


@pytest.fixture
def secure(server: ThreadingHTTPServer, certificate: Path) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.answer = (200, "application/octet-stream", b"hello")  # type: ignore[attr-defined]
    return f"https://127.0.0.1:{server.server_port}"


def test_a_certificate_that_nobody_vouches_for_is_not_believed(secure: str) -> None:
    with pytest.raises(ConfigError, match=f"certificate of {secure} is not believed.*self-signed"):
        opened(secure).get("a")


def test_a_certificate_that_the_system_is_told_of_is_believed(
    secure: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert opened(secure).get("a") == b"hello"


def test_tls_to_a_server_that_speaks_none(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.objects.s3_bucket.backoff", lambda *_: 0.0)
    with pytest.raises(UnavailableError, match="broke the connection"):
        opened(f"https://127.0.0.1:{server.server_port}").get("a")
