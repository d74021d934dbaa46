"""The message on the wire: one committed episode as JSON, a claim check. Whatever else comes is named and put aside.

    {"schema": 1, "episode_id": …, "robot_id": …, "key": …, "sha256": …, "size": …, "schema_version": …, "trace_id": …}

`schema` is the version of this message, `schema_version` that of the episode it announces. A reader passes over fields
that it does not know; a field that changes its meaning makes a new `schema`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from infra.episode import EPISODE_ID
from infra.errors import escaped, named
from infra.events import DeadLetter, Event
from infra.objects import ROBOT_ID, episode_key

MESSAGE_SCHEMA = 1
MAX_LETTER_BYTES = 4096
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class MalformedMessageError(ValueError):
    """A record that announces no episode; its text is the reason."""


def encode(claim: Any) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The record's value and headers.

    Args:
        claim: an Event, or a row of the outbox.

    The headers are for those who route or trace without reading the value: `schema`, and `traceparent` where the trace
    id is one of W3C's trace context.
    """
    body = {"schema": MESSAGE_SCHEMA} | {name: getattr(claim, name) for name in _FITS}
    headers = [("schema", str(MESSAGE_SCHEMA).encode())]
    if _TRACEPARENT.fullmatch(claim.trace_id):
        headers.append(("traceparent", claim.trace_id.encode()))
    return json.dumps(body, separators=(",", ":")).encode(), headers


def read(value: bytes | None, offset: int, partition: int) -> Event | DeadLetter:
    """What the record at `offset`, counted from 1, announces; or what is wrong with it. Never raises."""
    try:
        return decode(value, offset, partition)
    except MalformedMessageError as error:
        return DeadLetter(offset=offset, partition=partition, payload=_shown(value), reason=str(error))


def decode(value: bytes | None, offset: int, partition: int) -> Event:
    """The announced episode.

    Raises:
        MalformedMessageError: the value is not JSON, lacks a field, or a field is not what it should be.
    """
    body = _parse(value)
    schema = body.get("schema")
    if type(schema) is not int or schema != MESSAGE_SCHEMA:
        raise MalformedMessageError(f"message schema {named(schema, 100)}, this version reads {MESSAGE_SCHEMA}")
    for name, fits in _FITS.items():
        if name not in body:
            raise MalformedMessageError(f"field {name!r} is missing")
        if not fits(body[name]):
            raise MalformedMessageError(f"field {name!r} is {named(body[name], 100)}")
    if body["key"] != episode_key(body["sha256"]):
        raise MalformedMessageError(f"field 'key' is {named(body['key'], 100)}, not the content address of its sha256")
    return Event(offset=offset, partition=partition, **{name: body[name] for name in _FITS})


def _parse(value: bytes | None) -> dict[str, Any]:
    if value is None:
        raise MalformedMessageError("the record has no value")
    try:
        body = json.loads(value.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise MalformedMessageError(f"not JSON: {named(error, 100)}") from error
    if not isinstance(body, dict):
        raise MalformedMessageError(f"a JSON {type(body).__name__}, not an object")
    return body


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _text(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _whole(bound: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 <= value < bound  # a bool is no number


_FITS: dict[str, Callable[[Any], bool]] = {  # what the ingest service can have written, and a database can hold
    "episode_id": _text(EPISODE_ID),
    "robot_id": _text(ROBOT_ID),
    "key": _text(re.compile(r"[\x20-\x7e]{1,255}")),
    "sha256": _text(re.compile(r"[0-9a-f]{64}")),
    "size": _whole(2**63),
    "schema_version": _whole(2**31),
    "trace_id": _text(re.compile(r"[^\x00\ud800-\udfff]{1,64}")),
}


def _shown(value: bytes | None) -> str:
    """A record's value as text that a database takes: at most 4 KiB of UTF-8, what is no text escaped."""
    text = (value or b"")[:MAX_LETTER_BYTES].decode("utf-8", errors="backslashreplace")
    return escaped(text, keep="\n\t").encode()[:MAX_LETTER_BYTES].decode("utf-8", errors="ignore")
