"""A service that means harm: whatever it answers, a robot's calls end soon, small, and with a named error."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hostile_service import Hostile, answer, hostile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from policies import Channel

from infra.edge import remote as remote_module
from infra.edge.remote import RemoteServer
from infra.edge.server import Heartbeat, Upload
from infra.errors import (
    ConfigError,
    CorruptDataError,
    LwdError,
    StorageFullError,
    UnavailableError,
    UntrustedPolicyError,
)
from infra.policy import artifact
from infra.policy.announcement import Announcement
from infra.policy.artifact import Manifest, read_signed_manifest, seal
from infra.policy.keys import canonical_json
from infra.policy.subscriber import PolicySubscriber

TOKEN = "0" * 16 + "." + "a" * 43
SECRET = "a" * 43
TIMEOUT_S = 0.4  # all that a call may take is made of it
KEY = f"policies/{'0' * 64}/policy.safetensors"


@pytest.fixture
def server() -> Iterator[Hostile]:
    with hostile() as found:
        yield found


def port(server: Hostile, tries: int = 2) -> RemoteServer:
    return RemoteServer(server.url, TOKEN, timeout_s=TIMEOUT_S, tries=tries)


CALLS: dict[str, Callable[[RemoteServer, Path], object]] = {
    "announcements": lambda port, _: port.announcements("learning", 0),
    "permissions": lambda port, _: port.permissions("learning"),
    "fetch": lambda port, _: port.fetch(KEY),
    "fetch_to": lambda port, folder: port.fetch_to(KEY, folder / "file", 1000),
    "statuses": lambda port, _: port.statuses([("0" * 32, "0" * 64)]),
    "submit": lambda port, _: port.submit(Upload("0" * 32, "0" * 64, 3, b"abc")),
    "heartbeat": lambda port, _: port.heartbeat(Heartbeat(None, None, 0)),
    "measure": lambda port, _: port.measure("publish_to_active_s", 1, 0.0),
}
NEVER = 100 * 2**20
ENDLESS: dict[str, Callable[[Hostile, socket.socket], None]] = {
    "drips its first line": lambda server, c: server.drip(c, b"HTTP/1.1 200 " + b"x" * 1000),
    "drips headers": lambda server, c: server.drip(c, b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100),
    "drips a body": lambda server, c: (
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"), server.drip(c, b" ")),
    "drips a body without a length": lambda server, c: (c.sendall(b"HTTP/1.1 200 OK\r\n\r\n"), server.drip(c, b" ")),
    "drips chunks": lambda server, c: (
        c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), server.drip(c, b"1\r\n \r\n")),
    "continues": lambda server, c: server.drip(c, b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    "says nothing": lambda server, c: server.drip(c, b"", 0.05) if not server._closed.wait(30) else None,
}  # fmt: skip
FLOODS: dict[str, bytes] = {
    "a body": b"HTTP/1.1 200 OK\r\n\r\n",
    "a body of petabytes": b"HTTP/1.1 200 OK\r\nContent-Length: 9000000000000000\r\n\r\n",
    "a chunk's line": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
    "a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n",
    "a header": b"HTTP/1.1 200 OK\r\nX-A: ",
    "a first line": b"HTTP/1.1 200 ",
    "an error": b"HTTP/1.1 503 X\r\n\r\n",
    "a redirect": b"HTTP/1.1 307 X\r\nLocation: /x\r\n\r\n",
}


def flood(beginning: bytes, connection: socket.socket) -> None:
    connection.sendall(beginning)
    block = b"0" * 2**16
    for _ in range(NEVER // len(block)):
        connection.sendall(block)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("manner", ENDLESS)
def test_no_answer_lasts_for_ever(server: Hostile, tmp_path: Path, call: str, manner: str) -> None:
    server.behave = lambda connection, path: ENDLESS[manner](server, connection)
    began = time.monotonic()
    with pytest.raises(LwdError):
        CALLS[call](port(server), tmp_path)
    assert time.monotonic() - began < 20 * TIMEOUT_S  # of minutes or for ever


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", FLOODS)
def test_no_answer_takes_more_memory_or_disk_than_it_may(
    server: Hostile, tmp_path: Path, call: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "_MAX_OBJECT_BYTES", 2**20)
    server.behave = lambda connection, path: flood(FLOODS[what], connection)
    tracemalloc.start()
    try:
        with contextlib.suppress(LwdError):  # a heartbeat's answer is not read
            CALLS[call](port(server, tries=1), tmp_path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 24 * 2**20
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000


def page(numbers: range, **fields: object) -> dict[str, object]:
    said = [asdict(Announcement(seq, "learning", 1, "publish", "0" * 64, 0.0, "k:s")) | fields for seq in numbers]
    return {"announcements": said, "more": True}


def after(path: str) -> int:
    return int(path.partition("after=")[2])


def test_announcements_without_end_are_taken_in_parts(server: Hostile) -> None:
    server.behave = lambda connection, path: answer(connection, page(range(after(path) + 1, after(path) + 1001)))
    found = RemoteServer(server.url, TOKEN).announcements("learning", 5)
    assert [said.seq for said in found] == list(range(6, 10_006)) and len(server.paths) == 10


def test_pages_of_one_are_not_followed_for_ever(server: Hostile) -> None:
    server.behave = lambda connection, path: answer(connection, page(range(after(path) + 1, after(path) + 2)))
    assert len(RemoteServer(server.url, TOKEN).announcements("learning", 0)) == len(server.paths) <= 64


@pytest.mark.parametrize("numbers", [[3, 3], [4, 3], [0], [5, 6, 6], [2**70], [-1], [True], [1.0], ["1"], [None]])
def test_the_same_or_an_earlier_number_again_is_nonsense(server: Hostile, numbers: list[object]) -> None:
    documents = [page(range(1, 2))["announcements"][0] | {"seq": number} for number in numbers]  # type: ignore[index]
    server.behave = lambda connection, path: answer(connection, {"announcements": documents, "more": True})
    with pytest.raises(UnavailableError, match="announcements"):
        port(server).announcements("learning", 0)
    assert len(server.paths) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["announcements", "permissions", "reset", "statuses", "episodes", "more", "kind", "problem",
                         "fix", "error", "status", "key", "url", "epoch", "seq"]),
        inner, max_size=4,
    ),
    max_leaves=10,
)  # fmt: skip
BODY = (
    JSON
    | st.binary(max_size=60)
    | st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b'"\\ud800"', b"\xff\xfe", b'{"announcements": NaN}']
    )
)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["Location", "Retry_After", "Content_Length", "Content_Encoding", "Transfer_Encoding", "Content_Type"]
    ),
    st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=20)
    | st.sampled_from(["²", "-1", "9" * 400, "http://[", "//", "file:///x", "http://a:b@127.0.0.1:1/", "gzip"]),
    max_size=2,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=st.sampled_from(sorted(CALLS)), body=BODY, headers=HEADERS,
       status=st.sampled_from([200, 201, 204, 206, 301, 307, 400, 401, 403, 404, 429, 500, 503, 507, 599]))  # fmt: skip
def test_whatever_is_answered_has_a_name(
    server: Hostile, tmp_path: Path, call: str, body: object, headers: dict[str, str], status: int
) -> None:
    server.behave = lambda connection, path: answer(connection, body, status, **headers)
    told = ""
    try:
        CALLS[call](port(server, tries=1), tmp_path)
    except LwdError as error:
        told = str(error)
    assert len(told) < 3000 and SECRET not in told and "a:b@" not in told


# --- redirects --------------------------------------------------------------------------------------------------------


def test_the_token_follows_no_redirect_and_there_is_one_step_only(server: Hostile) -> None:
    with hostile() as store:
        server.behave = lambda connection, path: answer(connection, b"", 307, Location=store.url + "/x")
        store.behave = lambda connection, path: answer(connection, b"", 307, Location=store.url + "/x")
        with pytest.raises(UnavailableError, match="HTTP 307"):
            port(server, tries=1).fetch(KEY)
        assert len(server.paths) == len(store.paths) == 1 and store.tokens == []
        store.behave = lambda connection, path: answer(connection, b"", 307, Location=server.url + "/v1/heartbeat")
        with pytest.raises(UnavailableError):
            port(server, tries=1).fetch(KEY)
        assert len(store.paths) == 2 and len(server.tokens) == 2 and store.tokens == []
    for call in ("announcements", "permissions", "statuses", "heartbeat"):
        server.paths.clear()
        with pytest.raises(LwdError):
            CALLS[call](port(server, tries=1), Path())
        assert len(set(server.paths)) == 1  # a redirect of anything else is an error


@pytest.mark.parametrize("location", ["", "/relative", "file:///etc/passwd", "ftp://a/b", "http://", "http://[", "x",
                                      "http://a:99999/", "gopher://127.0.0.1", "http:///x"])  # fmt: skip
def test_a_place_that_is_no_servers_is_refused(server: Hostile, location: str) -> None:
    server.behave = lambda connection, path: answer(connection, b"", 307, Location=location)
    with pytest.raises(UnavailableError):
        port(server, tries=1).fetch(KEY)


# --- what a policy's files claim --------------------------------------------------------------------------------------


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    found = Channel(tmp_path / "home")
    found.publish()
    return found


def serves(server: Hostile, channel: Channel, **instead: Callable[[socket.socket], None]) -> None:
    """The channel's announcements and files, but for files that a test answers for itself, `policy_safetensors=…`."""

    def behave(connection: socket.socket, path: str) -> None:
        name = path.rpartition("/")[2].replace(".", "_")
        if name in instead:
            instead[name](connection)
        elif "announcements" in path:
            said = channel.source.announcements("learning", after(path))
            answer(connection, {"announcements": [asdict(one) for one in said], "more": False})
        elif path == "/v1/permissions":
            answer(connection, channel.source.permissions("learning").document())
        else:
            digest, _, file = path.removeprefix("/v1/policies/objects/").partition("/")
            answer(connection, channel.source.fetch(f"policies/{digest}/{file}"))

    server.behave = behave


def robot(server: Hostile, channel: Channel, root: Path) -> PolicySubscriber:
    return PolicySubscriber(root, "learning", port(server, tries=1), channel.trust)


def leftovers(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {"state.json", "floor.json", "clock.json", "bundles"}


@pytest.mark.parametrize("name", ["manifest_json", "manifest_sig", "policy_safetensors", "architecture_json"])
@pytest.mark.parametrize("manner", ["endless", "dripping", "longer than signed", "shorter", "absent", "of petabytes"])
def test_a_file_that_is_not_as_signed_leaves_the_old_policy_and_nothing_else(
    server: Hostile, channel: Channel, tmp_path: Path, name: str, manner: str
) -> None:
    root = tmp_path / "policy"
    serves(server, channel)
    subscriber = robot(server, channel, root)
    assert subscriber.poll() == 1 and subscriber.activate_at_boundary() is not None
    channel.publish()
    serves(server, channel, **{name: {
        "endless": lambda c: flood(b"HTTP/1.1 200 OK\r\n\r\n", c),
        "dripping": lambda c: (c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n"), server.drip(c, b"0")),
        "longer than signed": lambda c: answer(c, b"0" * 500_000),
        "shorter": lambda c: answer(c, b"{"),
        "absent": lambda c: answer(c, {"kind": "CorruptDataError", "problem": "absent", "fix": "x"}, 404),
        "of petabytes": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000000000000\r\n\r\n0"),
    }[manner]})  # fmt: skip
    with pytest.raises((UntrustedPolicyError, UnavailableError)):
        subscriber.poll()
    assert subscriber.active is not None and subscriber.active.version == 1 and subscriber.staged is None
    assert leftovers(root) == set()
    serves(server, channel)
    assert subscriber.poll() == 2


BAD_NAMES = ["../x.json", "/etc/x.json", "a/b.json", "..", "", "X.json", "x.json\n", "x.py", "con.json", "nul.json",
             "com1.json", "aux.safetensors", "base.safetensors", "manifest.json", "a" * 65 + ".json", "x.json.",
             "é.json", "x\x00.json", "~.json", "x.pickle"]  # fmt: skip


def a_manifest(channel: Channel, **changes: object) -> dict[str, object]:
    known = channel.registry.policies()[0]
    manifest = channel.source.fetch(f"policies/{known['manifest_sha256']}/manifest.json")
    return json.loads(manifest) | changes


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_file_name_that_no_bundle_may_hold(channel: Channel, name: str) -> None:
    files = a_manifest(channel)["files"] | {name: {"sha256": "0" * 64, "size": 1}}  # type: ignore[operator]
    with pytest.raises(UntrustedPolicyError):
        Manifest.parse(canonical_json(a_manifest(channel, files=files)), "m")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {f"f{number}.json": {"sha256": "0" * 64, "size": 0} for number in range(65)}},
        {"files": {"policy.safetensors": {"sha256": "0" * 64, "size": 2**50}}},
        {"files": {f"f{number}.json": {"sha256": "0" * 64, "size": 2**32} for number in range(3)}},
        {"files": {"policy.safetensors": {"sha256": "0" * 64, "size": -1}}},
        {"files": {"policy.safetensors": {"sha256": "0" * 64, "size": 1e400}}},
        {"files": {"policy.safetensors": {"sha256": "../..", "size": 1}}},
        {"files": []}, {"files": None}, {"version": "1"}, {"version": 2**70}, {"version": True}, {"version": None},
        {"parent": -1}, {"created_at": "x"}, {"created_at": 1e300}, {"cohort": 5}, {"architecture_sha256": None},
        {"base": {"name": "../base", "sha256": "0" * 64, "size": 1}}, {"surprise": 1},
        {"base": {"name": "base.safetensors", "sha256": "0" * 64, "size": 2**60}},
    ],
)  # fmt: skip
def test_a_manifest_that_claims_too_much_or_is_of_odd_types(channel: Channel, changes: dict[str, object]) -> None:
    with pytest.raises(UntrustedPolicyError):
        Manifest.parse(json.dumps(a_manifest(channel, **changes)).encode(), "m")


def test_what_the_signed_manifest_claims_must_fit_the_disk(server: Hostile, channel: Channel, tmp_path: Path) -> None:
    """Signed by the right key: nothing is fetched all the same."""
    root = tmp_path / "policy"
    free = shutil.disk_usage(tmp_path).free
    bundle = tmp_path / "huge"
    shutil.copytree(channel.home / "export-1", bundle)
    seal(bundle, channel.signer, version=2, parent=None, snapshot_version=0, cohort="learning")
    document = a_manifest(channel, version=2)
    entry = {"sha256": "0" * 64, "size": artifact._MAX_FILE_BYTES}
    if free > artifact._MAX_FILE_BYTES:
        pytest.skip("the disk is larger than any bundle may be")
    document["files"] = document["files"] | {"policy.safetensors": entry}  # type: ignore[operator]
    data = canonical_json(document)
    serves(server, channel, manifest_json=lambda c: answer(c, data),
           manifest_sig=lambda c: answer(c, channel.signer.sign(document).encode()))  # fmt: skip
    with pytest.raises((StorageFullError, UntrustedPolicyError)):
        robot(server, channel, root).poll()
    assert not any("safetensors" in path for path in server.paths)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200) | JSON.map(lambda d: str(d).encode("utf-8", "replace")) | st.just(b"[" * 100_000)
       | st.just(b" " * 2**18))  # fmt: skip
def test_no_bytes_are_a_manifest_but_one(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UntrustedPolicyError):
        Manifest.parse(data, "m")
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_bytes(data)
    with pytest.raises(UntrustedPolicyError):
        read_signed_manifest(folder, Channel.__new__(Channel))  # type: ignore[arg-type]
    shutil.rmtree(folder)


def test_keys_of_other_objects_are_not_asked_for(server: Hostile) -> None:
    for key in ("policies/../episodes/x", "episodes/00/x.tar", "policies/" + "0" * 64 + "/../x", "", "/etc/passwd"):
        with pytest.raises((ConfigError, CorruptDataError)):
            port(server).fetch(key)
    assert server.paths == []
