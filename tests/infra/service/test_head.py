"""The judge of heads: whatever it lets pass, the HTTP library reads in the same way."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.service.head import MAX_JSON_BYTES, HeadError, read_head

NAMES = st.sampled_from(
    ["Content-Length", "content-length", "Transfer-Encoding", "Host", "Expect", "X", "Content-Encoding", "Upgrade",
     "Content-Length ", " Content-Length", "Connection", ""]
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ["0", "1", "10", "+1", "-1", "0x1", "1_0", "1 0", "1,1", "chunked", "identity", "", "\t5", "５", "x"]
    ),
    st.text(st.characters(max_codepoint=255), max_size=8),
    st.integers(-(10**30), 10**30).map(str),
)
ENDS = st.sampled_from(["\r\n", "\r\n", "\r\n", "\n", "\r", "\r\n "])


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "G T", ""]),
    st.lists(st.tuples(NAMES, VALUES, ENDS), max_size=4),
)
def test_what_passes_is_read_alike(method: str, headers: list[tuple[str, str, str]]) -> None:
    lines = "".join(f"{name}: {value}{end}" for name, value, end in headers)
    raw = f"{method} /v1/uploads HTTP/1.1\r\nHost: y\r\n{lines}\r\n".encode("latin-1", "replace")
    try:
        length = read_head(raw).length
    except HeadError as error:
        refused = error.status
    else:
        refused = 0
    if refused:
        assert refused in (400, 411, 413, 414, 415, 417, 431, 505)
        return
    assert 0 <= length <= MAX_JSON_BYTES
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw + bytes(length))
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError:
        return  # stricter still
    assert isinstance(request, h11.Request)
    found = 0
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data)
        found += len(event.data)
    assert found == length and connection.trailing_data == (b"", False)


@pytest.mark.parametrize(("length", "passes"), [(0, True), (MAX_JSON_BYTES, True), (MAX_JSON_BYTES + 1, False)])
def test_bodies_of_json_are_short(length: int, passes: bool) -> None:
    raw = f"POST /v1/uploads HTTP/1.1\r\nHost: y\r\nContent-Length: {length}\r\n\r\n".encode()
    if passes:
        assert read_head(raw).length == length
    else:
        with pytest.raises(HeadError):
            read_head(raw)
