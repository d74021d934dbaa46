"""The head of a request, judged before anything else: what is ambiguous or unbounded is refused before a body is read.

The only framing that is accepted is one `Content-Length`. Every way by which two readers of the same bytes could find
different ends of a body (RFC 9112, section 11.2) is refused, though the HTTP library would forgive some of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from infra.errors import ConfigError
from infra.ingest import MAX_OBJECT_BYTES

MAX_HEAD_BYTES = 16 * 2**10
MAX_HEADERS = 64
MAX_TARGET_BYTES = 4096
MAX_JSON_BYTES = 2**18
END = re.compile(rb"\n\r?\n")  # as h11 finds it
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")
_ONCE = (b"content-length", b"host", b"authorization", b"content-type", b"lwd-robot", b"lwd-cohort")
_BODILESS = (b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE")


@dataclass(frozen=True)
class Head:
    """What the door needs to know of a request: the bytes of its body."""

    length: int


class HeadError(ConfigError):
    """The request is refused for its head; `status` of HTTP."""

    def __init__(self, status: int, problem: str, fix: str) -> None:
        super().__init__(problem, fix)
        self.status = status


def read_head(raw: bytes) -> Head:
    """Judge a head: everything up to the blank line, which is part of it.

    Raises:
        HeadError: it is malformed, ambiguous, too large, or asks for what this service does not do.
    """
    if len(raw) > MAX_HEAD_BYTES:
        raise HeadError(431, f"the request's head has more than {MAX_HEAD_BYTES} bytes", "send fewer headers")
    first, *lines = raw.removesuffix(b"\r\n\r\n").split(b"\r\n")
    if not raw.endswith(b"\r\n\r\n") or any(mark in line for line in (first, *lines) for mark in b"\r\n\0"):
        raise HeadError(400, "the request's head is malformed", "end each line with CR LF")
    method, target = _request_line(first)
    return Head(_length(method, target, _headers(lines)))


def _request_line(line: bytes) -> tuple[bytes, bytes]:
    words = line.split(b" ")
    if len(words) != 3:
        raise HeadError(400, "the first line is no request", "send METHOD /path HTTP/1.1")
    method, target, version = words
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise HeadError(505, "the request is not of HTTP/1.1", "speak HTTP/1.1, without an upgrade")
    if len(target) > MAX_TARGET_BYTES:
        raise HeadError(414, f"the request's address has more than {MAX_TARGET_BYTES} bytes", "see /openapi.json")
    return method, target


def _headers(lines: list[bytes]) -> dict[bytes, bytes]:
    """By lower-case name."""
    if len(lines) > MAX_HEADERS:
        raise HeadError(431, f"the request has more than {MAX_HEADERS} headers", "send fewer")
    found: dict[bytes, bytes] = {}
    for line in lines:
        parts = _LINE.fullmatch(line)
        if parts is None:  # folded lines, too
            raise HeadError(400, "a header of the request is malformed", "send NAME: VALUE, each in one line")
        name = parts[1].lower()
        if name in _ONCE and name in found:
            raise HeadError(400, f"the request has {name.decode()} twice", "send it once")
        found[name] = parts[2]
    return found


def _length(method: bytes, target: bytes, headers: dict[bytes, bytes]) -> int:
    said = headers.get(b"content-length")
    if b"transfer-encoding" in headers:
        status = 411 if said is None else 400
        raise HeadError(status, "the request's body comes in chunks", "send Content-Length, no Transfer-Encoding")
    if b"upgrade" in headers:
        raise HeadError(400, "the request asks for another protocol", "speak HTTP/1.1, without an upgrade")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HeadError(415, "the request's body is compressed", "send it as it is, without Content-Encoding")
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise HeadError(417, "the request expects something unknown", "send no Expect, or 100-continue")
    if said is None:
        if method not in _BODILESS:
            raise HeadError(411, "the request does not say its length", "send Content-Length")
        return 0
    if not said.isdigit():
        raise HeadError(400, "the request's Content-Length is no number", "send the body's bytes, in decimal digits")
    length = int(said) if len(said) <= 18 else 10**18
    if length and method in _BODILESS:
        raise HeadError(400, f"a {method.decode()[:16]} has no body", "send none")
    upload = method == b"PUT" and target.startswith(b"/v1/objects/")
    most, what = (MAX_OBJECT_BYTES, "an object") if upload else (MAX_JSON_BYTES, "a request")
    if length > most:
        raise HeadError(413, f"{what} of more than {most} bytes", f"send at most {most}: fewer episodes at once")
    return length
