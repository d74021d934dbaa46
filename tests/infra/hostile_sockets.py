"""What a hostile robot, or a stranger, sends to the service: bytes on sockets, without an HTTP library's politeness."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def connect(url: str, timeout: float = 10.0) -> socket.socket:
    """A connection to the service at `url`."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=timeout)


def head(method: str, path: str, *lines: str, token: str | None = None) -> bytes:
    """A request's head, with exactly these header lines besides Host and the token."""
    own = [] if token is None else [f"Authorization: Bearer {token}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *own, *lines, "", ""]).encode("latin-1")


def said(url: str, data: bytes, timeout: float = 20.0) -> bytes:
    """All that the service answers to these bytes, until it closes; what cannot be sent is not."""
    with connect(url, timeout) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(data)
        return rest(sock)


def rest(sock: socket.socket) -> bytes:
    """What still comes on a connection, until it closes or is silent for its time-out."""
    found = b""
    try:
        while block := sock.recv(2**16):
            found += block
    except OSError:
        pass
    return found


def status(answer: bytes) -> int:
    """Of the first answer; 0 where there is none."""
    words = answer.split(b" ", 2)
    return int(words[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def flood(url: str, start: bytes, block: bytes, count: int) -> tuple[int, bytes]:
    """Send `start` and then `block`, `count` times, or until the service closes; bytes sent, and its answer."""
    sent = 0
    with connect(url, 5.0) as sock:
        try:
            sock.sendall(start)
            for _ in range(count):
                sock.sendall(block)
                sent += len(block)
        except OSError:
            pass
        return sent, rest(sock)


def silent(url: str, count: int, say: bytes = b"") -> list[socket.socket]:
    """Connections that say `say`, and nothing more."""
    found = []
    for _ in range(count):
        sock = connect(url, 5.0)
        if say:
            with contextlib.suppress(OSError):
                sock.sendall(say)
        found.append(sock)
    return found


def close(sockets: Iterable[socket.socket]) -> None:
    """End them all."""
    for sock in sockets:
        sock.close()


def memory_mib(pid: int) -> float:
    """What a process holds."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def closed_within(sock: socket.socket, seconds: float) -> bool:
    """Whether the service closes a connection in time."""
    end = time.monotonic() + seconds
    sock.settimeout(min(1.0, seconds))
    while time.monotonic() < end:
        try:
            if not sock.recv(2**16):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def self_signed(folder: Path) -> Path:
    """A PEM of a certificate for 127.0.0.1 that nobody vouches for, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - day).not_valid_after(now + day).add_extension(here, False)
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "own.pem"
    path.write_bytes(pem)
    return path
