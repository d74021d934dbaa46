"""The message on the wire: what is written is read back; what anybody else wrote is named, and never raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.events import DeadLetter, Event
from infra.events.message import MAX_LETTER_BYTES, encode, read

SHA = "0123456789abcdef" * 4
CLAIM: dict[str, Any] = {
    "episode_id": "ab" * 16,
    "robot_id": "r0",
    "key": f"episodes/01/{SHA}.tar",
    "sha256": SHA,
    "size": 10240,
    "schema_version": 1,
    "trace_id": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}
BODY: dict[str, Any] = {"schema": 1, **CLAIM}

hexadecimal = st.text("0123456789abcdef", min_size=64, max_size=64)
plain = st.characters(codec="utf-8", exclude_characters="\x00")  # a NUL is in no PostgreSQL text
claims = st.builds(
    lambda sha, **rest: Event(offset=3, partition=2, sha256=sha, key=f"episodes/{sha[:2]}/{sha}.tar", **rest),
    sha=hexadecimal,
    episode_id=hexadecimal.map(lambda text: text[:32]),
    robot_id=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z"),
    size=st.integers(0, 2**63 - 1),
    schema_version=st.integers(0, 2**31 - 1),
    trace_id=st.text(plain, min_size=1, max_size=64),
)


def letter(value: bytes | None) -> DeadLetter:
    found = read(value, 7, 1)
    assert isinstance(found, DeadLetter)
    assert (found.offset, found.partition) == (7, 1)
    assert len(found.payload.encode()) <= MAX_LETTER_BYTES
    for text in (found.payload, found.reason):
        assert "\x00" not in text
        text.encode()  # no lone surrogates: a database takes it
    return found


@given(claims)
@settings(deadline=None)
def test_what_is_written_is_read_back(event: Event) -> None:
    value, headers = encode(event)
    assert read(value, 3, 2) == event
    assert ("schema", b"1") in headers


@pytest.mark.parametrize(
    ("trace_id", "carried"),
    [
        (CLAIM["trace_id"], True),
        ("4bf92f3577b34da6a3ce929d0e0e4736", False),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", False),
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01", False),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        (CLAIM["trace_id"] + "\n", False),
    ],
)
def test_a_trace_context_is_carried_in_its_header(trace_id: str, carried: bool) -> None:
    _, headers = encode(Event(offset=1, **{**CLAIM, "trace_id": trace_id}))
    assert dict(headers).get("traceparent") == (trace_id.encode() if carried else None)


def test_unknown_fields_are_passed_over() -> None:
    assert read(json.dumps({**BODY, "new": [1]}).encode(), 1, 0) == Event(offset=1, **CLAIM)


def test_an_unknown_schema_of_the_episode_is_still_an_event() -> None:
    found = read(json.dumps({**BODY, "schema_version": 99}).encode(), 1, 0)
    assert isinstance(found, Event) and found.schema_version == 99


@pytest.mark.parametrize("schema", [0, 2, "1", 1.0, True, None, [1]])
def test_an_unknown_schema_of_the_message_is_named(schema: object) -> None:
    assert "message schema" in letter(json.dumps({**BODY, "schema": schema}).encode()).reason


@pytest.mark.parametrize("field", sorted(CLAIM))
def test_each_field_must_be_there_and_be_what_it_says(field: str) -> None:
    without = {name: value for name, value in BODY.items() if name != field}
    assert letter(json.dumps(without).encode()).reason == f"field {field!r} is missing"
    wrong: list[object] = [None, True, 1.5, -1, [], {}, "", "x" * 300, 10**30, "\x00"]
    for value in wrong:
        found = letter(json.dumps({**BODY, field: value}).encode())
        assert field in found.reason and len(found.reason) < 200


def test_a_record_cannot_name_another_object_than_its_digest_does() -> None:
    assert "content address" in letter(json.dumps({**BODY, "key": "episodes/00/other.tar"}).encode()).reason


@pytest.mark.parametrize("value", ["r0\n", "r0\x00", "\ud800", "../../etc/passwd"])
def test_texts_that_a_database_or_a_path_would_not_bear_are_refused(value: str) -> None:
    assert "robot_id" in letter(json.dumps({**BODY, "robot_id": value}).encode()).reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no value"),
        (b"", "not JSON"),
        (b"not json", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "a JSON list"),
        (b"null", "a JSON NoneType"),
        (b'"text"', "a JSON str"),
        (b"{}", "message schema None"),
        (b'{"schema": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "not JSON"),
        (json.dumps(BODY).encode()[:-1], "not JSON"),
    ],
)
def test_poison_is_named(value: bytes | None, reason: str) -> None:
    assert reason in letter(value).reason


@given(st.binary(max_size=200) | st.binary(min_size=4000, max_size=6000))
@settings(deadline=None)
def test_arbitrary_bytes_are_a_dead_letter(value: bytes) -> None:
    letter(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=9), children, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(BODY)), json_values, min_size=1))
@settings(deadline=None)
def test_a_damaged_message_is_an_event_only_if_every_field_is_sound(changes: dict[str, object]) -> None:
    found = read(json.dumps({**BODY, **changes}).encode(), 7, 1)
    if isinstance(found, DeadLetter):
        letter(json.dumps({**BODY, **changes}).encode())
    else:
        value, _ = encode(found)
        assert read(value, 7, 1) == found


def test_the_payload_is_kept_as_text_cut_and_escaped() -> None:
    assert letter("grüße\tund\n".encode() + b"\x00\xff").payload == "grüße\tund\n\\x00\\xff"
    assert len(letter(b"\xff" * 10_000).payload.encode()) == MAX_LETTER_BYTES
    assert letter(("x" * (MAX_LETTER_BYTES - 1) + "ü").encode()).payload.startswith("xxx")
