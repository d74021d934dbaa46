"""The service over HTTP: each robot its own, each mistake named, every call repeatable."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from invariants import assert_i7_kept, digest, example_episode
from jsonschema import Draft202012Validator
from serving import Served, serving

from infra.catalog.schema import episodes, measurements, outbox, policies, robots
from infra.coordinator import Coordinator
from infra.edge.server import MAX_BATCH
from infra.episode import encode
from infra.events.outbox import OutboxLog
from infra.objects import permitted_key
from infra.objects.directory import DirectoryStore
from infra.service import incoming, limits
from infra.service.auth import Tokens
from infra.service.head import MAX_JSON_BYTES

DATA = [encode(example_episode(number)) for number in range(4)]
IDS = [f"{number:032x}" for number in range(4)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, robot_episodes_per_min=6000, robot_mib_per_min=6000) as found:
        yield found


def named(number: int, **changes: Any) -> dict[str, Any]:
    return {"episode_id": IDS[number], "sha256": digest(DATA[number]), "size": len(DATA[number])} | changes


def offer(served: Served, token: str, *items: dict[str, Any]) -> list[dict[str, Any]]:
    status, answer, _ = served.ask("POST", "/v1/uploads", token, {"episodes": items})
    assert status == 200, answer
    return answer["episodes"]


def commit(served: Served, token: str, *items: dict[str, Any]) -> list[dict[str, Any]]:
    status, answer, _ = served.ask("POST", "/v1/episodes", token, {"episodes": items})
    assert status == 200, answer
    return answer["episodes"]


def upload(served: Served, token: str, number: int, data: bytes | None = None) -> str:
    """Ask for a place and put the bytes there; the key."""
    (place,) = offer(served, token, named(number))
    assert served.ask("PUT", place["url"], token, data or DATA[number])[0] == 201
    return place["key"]


def rows(served: Served) -> list[sa.Row[Any]]:
    with served.plane.catalog.read() as connection:
        return list(connection.execute(sa.select(episodes).order_by(episodes.c.episode_id)))


def a_policy(served: Served, version: int) -> None:
    row = {"version": version, "snapshot_version": 0, "bundle_key": "", "manifest_sha256": "", "status": "candidate"}
    with served.plane.catalog.begin() as connection:
        connection.execute(sa.insert(policies).values(**row, created_at=0.0))


# --- the way of an episode --------------------------------------------------------------------------------------------


def test_an_episode_is_offered_uploaded_committed_and_repeated(served: Served) -> None:
    token = served.enrol()
    key = upload(served, token, 0)
    meta = {"produced_at": 12.5, "schema_version": 1, "trace_id": "t"}
    for _ in range(3):
        assert commit(served, token, named(0, key=key, meta=meta)) == [{"status": "committed"}]
        assert offer(served, token, named(0)) == [{"status": "committed"}]  # no second upload
    (row,) = rows(served)
    assert (row.robot_id, row.sha256, row.produced_at, row.trace_id) == ("r0", digest(DATA[0]), 12.5, "t")
    with served.plane.catalog.read() as connection:
        assert len(connection.execute(sa.select(outbox)).all()) == 1
    assert [item.key for item in served.plane.objects.list("incoming")] == []
    assert_i7_kept(served.plane.home, [(IDS[0], digest(DATA[0]))])
    question = {"episodes": [{"episode_id": IDS[n], "sha256": digest(DATA[n])} for n in (1, 0)]}
    assert served.ask("POST", "/v1/episodes/status", token, question)[1] == {"statuses": ["unknown", "committed"]}


def test_a_second_upload_of_what_is_known_is_swept_at_once(served: Served) -> None:
    token = served.enrol()
    first, second = upload(served, token, 0), upload(served, token, 0)
    assert commit(served, token, named(0, key=first)) == commit(served, token, named(0, key=second))
    assert len(rows(served)) == 1 and list(served.plane.objects.list("incoming")) == []


def test_one_bad_episode_does_not_stop_its_batch(served: Served) -> None:
    token = served.enrol()
    key = upload(served, token, 0)
    wrong = upload(served, token, 1, DATA[1][:-1] + b"x")
    good = upload(served, token, 2)
    outcomes = commit(
        served, token,
        named(0, key=key), named(1, key=wrong), named(3, key=permitted_key("r0", IDS[3], digest(DATA[3]))),
        named(2, key=good, meta={"produced_at": "today"}), named(2, key=good),
    )  # fmt: skip
    found = [outcome.get("status") or outcome["error"]["kind"] for outcome in outcomes]
    assert found == ["committed", "CorruptDataError", "CorruptDataError", "ConfigError", "committed"]
    assert IDS[1] in outcomes[1]["error"]["problem"] and "sha256" in outcomes[1]["error"]["problem"]
    assert [row.episode_id for row in rows(served)] == [IDS[0], IDS[2]]
    assert list(served.plane.objects.list("incoming")) == []


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_row_security_a_robot_can_neither_write_nor_commit_as_another(served: Served) -> None:
    a, b = served.enrol("a"), served.enrol("b")
    (place,) = offer(served, b, named(0) | {"robot_id": "a"})  # what the body says of the robot is nothing
    assert place["key"].startswith("incoming/b/")
    status, answer, _ = served.ask("PUT", place["url"], a, DATA[0])
    assert (status, answer["kind"]) == (422, "ConfigError") and "not robot a's own" in answer["problem"]
    assert list(served.plane.objects.list("incoming")) == []
    assert served.ask("PUT", place["url"], b, DATA[0])[0] == 201
    (outcome,) = commit(served, a, named(0, key=place["key"]))
    assert "not robot a's own" in outcome["error"]["problem"]
    assert rows(served) == []
    commit(served, b, named(0, key=place["key"]))
    assert rows(served)[0].robot_id == "b"
    key = upload(served, a, 0)  # the same id, and the same bytes, from another robot
    (outcome,) = commit(served, a, named(0, key=key))
    assert outcome["error"]["kind"] == "ConflictError" and rows(served)[0].robot_id == "b"


def test_a_robot_that_calls_itself_by_another_name_is_told(served: Served) -> None:
    token = served.enrol("a", "canary")
    for headers, what in (({"LWD-Robot": "b"}, "robot a"), ({"LWD-Cohort": "production"}, "cohort canary")):
        status, answer, _ = served.ask("GET", "/v1/announcements", token, **headers)
        assert (status, answer["kind"]) == (403, "ConfigError") and what in answer["problem"]
    assert served.ask("GET", "/v1/announcements", token, **{"LWD-Robot": "a", "LWD-Cohort": "canary"})[0] == 200


@pytest.mark.parametrize("path", ["/v1/uploads", "/v1/episodes", "/v1/episodes/status", "/v1/heartbeat"])
def test_nothing_is_done_without_a_token(served: Served, path: str) -> None:
    bodies: dict[str, Any] = {"/v1/heartbeat": {"episodes": 1}}
    body = bodies.get(path, {"episodes": [named(0, key="k")]})
    for token in (None, "x", "0" * 16 + "." + "a" * 43):
        status, answer, headers = served.ask("POST", path, token, body)
        assert (status, answer["kind"], headers["WWW-Authenticate"]) == (401, "RefusedError", "Bearer")
        assert "enrol" in answer["fix"]
    with served.plane.catalog.read() as connection:
        assert connection.execute(sa.select(robots)).all() == []


def test_a_revoked_robot_is_sent_away(served: Served) -> None:
    token = served.enrol("a")
    Tokens(served.plane.catalog).revoke("a")
    status, answer, _ = served.ask("GET", "/v1/announcements", token)
    assert status == 401 and "robot a was revoked" in answer["problem"]


def test_a_robot_hears_what_is_announced_to_its_own_cohort_alone(served: Served) -> None:
    from infra.policy.channel import PolicyPublisher
    from infra.policy.keys import create_keys

    bundle = served.plane.home / "bundle"
    bundle.mkdir()
    (bundle / "policy.safetensors").write_bytes(b"weights")
    (bundle / "architecture.json").write_text("{}")
    publisher = PolicyPublisher(served.plane.catalog, served.plane.objects, create_keys(served.plane.home / "keys"))
    publisher.publish(bundle, cohort="production")
    secret = publisher.publish(bundle, cohort=None)  # not announced, but published: for a canary to come
    learning, production = served.enrol("a"), served.enrol("b", "production")
    for query in ("", "?cohort=production", "?after=0&cohort=production"):
        assert served.ask("GET", f"/v1/announcements{query}", learning)[1]["announcements"] == []
    (said,) = served.ask("GET", "/v1/announcements", production)[1]["announcements"]
    assert (said["version"], said["cohort"], secret) == (1, "production", 2)
    assert served.ask("GET", f"/v1/announcements?after={said['seq']}", production)[1]["announcements"] == []
    status, data, _ = served.ask(
        "GET", f"/v1/policies/objects/{said['manifest_sha256']}/policy.safetensors", production
    )
    assert (status, data) == (200, b"weights")


# --- what is refused --------------------------------------------------------------------------------------------------

TRAVERSAL = ["../../etc/passwd", "..%2f..", IDS[0] + "\n", IDS[0].upper().replace("0", "A"), "", IDS[0] + "/.."]


@pytest.mark.parametrize("episode_id", TRAVERSAL)
def test_an_id_that_is_no_id_is_refused_before_a_path_is_built(served: Served, episode_id: str) -> None:
    token = served.enrol()
    (place,) = offer(served, token, named(0, episode_id=episode_id))
    assert place["error"]["kind"] == "ConfigError" and "episode_id" in place["error"]["problem"]
    (outcome,) = commit(served, token, named(0, episode_id=episode_id, key=f"incoming/r0/{episode_id}-00000000.tar"))
    assert outcome["error"]["kind"] == "ConfigError"
    assert rows(served) == []


@pytest.mark.parametrize(
    "key",
    ["episodes/00/" + "0" * 64 + ".tar", f"incoming/r0/../r1/{IDS[0]}-00000000.tar", f"incoming/r0/{IDS[0]}.tar",
     f"incoming/r0/{IDS[0]}-00000000.tar\n", f"incoming/r0/{IDS[1]}-00000000.tar",
     f"incoming/r0/{IDS[0]}-00000000.tar", "/etc/passwd", ""],
)  # fmt: skip
def test_a_key_that_is_not_the_episodes_own_is_refused(served: Served, key: str) -> None:
    (outcome,) = commit(served, served.enrol(), named(0, key=key))
    assert outcome["error"]["kind"] == "ConfigError" and "own" in outcome["error"]["problem"]


@pytest.mark.parametrize("path", ["../secret", "%2e%2e/secret", "episodes/00/x", "incoming/r0/" + IDS[0] + ".tar"])
def test_a_put_elsewhere_is_refused(served: Served, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(served.url.rpartition(":")[2]), timeout=10)
    connection.request("PUT", f"/v1/objects/{path}", b"x", {"Authorization": f"Bearer {served.enrol()}"})
    assert connection.getresponse().status in (404, 405, 422)
    connection.close()
    assert not (served.plane.home / "secret").exists()


def test_an_upload_of_another_size_is_refused(served: Served) -> None:
    token = served.enrol()
    (place,) = offer(served, token, named(0))
    for data in (DATA[0] + b"x", DATA[0][:-1]):
        status, answer, _ = served.ask("PUT", place["url"], token, data)
        assert (status, answer["kind"]) == (422, "ConfigError") and str(len(DATA[0])) in answer["problem"]
    assert list(served.plane.objects.list("incoming")) == []
    (place,) = offer(served, token, named(0, size=2**40))
    assert place["error"]["kind"] == "ConfigError" and "bytes" in place["error"]["problem"]
    assert served.ask("PUT", f"/v1/objects/incoming/r0/{IDS[0]}-00000000.tar", token, b"x")[0] == 503  # not permitted


def test_an_upload_that_breaks_off_leaves_nothing(served: Served) -> None:
    token = served.enrol()
    (place,) = offer(served, token, named(0))
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as cut:
        head = f"PUT {place['url']} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        cut.sendall(f"{head}Content-Length: {len(DATA[0])}\r\n\r\n".encode() + DATA[0][:100])
    assert served.ask("GET", "/healthz")[0] == 200
    assert list(served.plane.objects.list("incoming")) == []
    assert served.ask("PUT", place["url"], token, DATA[0])[0] == 201
    assert [path.name for path in (served.plane.home / "service").iterdir()] == []


def test_the_length_of_a_body_is_said_and_bounded(served: Served) -> None:
    token = served.enrol()
    status, answer, _ = served.ask("POST", "/v1/uploads", token, b"x" * (MAX_JSON_BYTES + 1))
    assert (status, answer["kind"]) == (413, "ConfigError")
    connection = http.client.HTTPConnection("127.0.0.1", int(served.url.rpartition(":")[2]), timeout=10)
    connection.request("POST", "/v1/uploads", iter([b"{}"]), {"Authorization": f"Bearer {token}"})  # chunked
    assert connection.getresponse().status == 411
    connection.close()


@pytest.mark.parametrize(
    ("body", "named_in"),
    [
        (b"{", "JSON"),
        (b'{"episodes": [{"episode_id": "a\\u0000b", "sha256": "", "size": 1}]}', "database"),
        (b'{"episodes": [{"episode_id": "\\ud800", "sha256": "", "size": 1}]}', "database"),
        (b'{"episodes": [], "episodes": []}', "twice"),
        (b'{"episodes": [{"episode_id": "", "sha256": "", "size": 1e400}]}', "double"),
        (b'{"episodes": [{"episode_id": "", "sha256": "", "size": NaN}]}', "NaN"),
        (b'{"episodes": [{"episode_id": "", "sha256": "", "size": 1180591620717411303424}]}', "64 bits"),
        (b'{"episodes": ' + b"[" * 1000 + b"]" * 1000 + b"}", "nested"),
        (b'{"episodes": ' + b"[" * 4000, "nested"),
        (b'{"episodes": [' + b"{}," * 80_000 + b"{}]}", "8192 values"),
        (b'{"episodes": [], "a": ' + b"[[" * 5000 + b"]]" * 5000 + b"}", "8192 values"),
        ('{"episodes": []}'.encode("utf-16"), "JSON"),
        ({}, "episodes"),
        ({"episodes": []}, "episodes"),
        ({"episodes": [{}] * (MAX_BATCH + 1)}, "episodes"),
        ({"episodes": [{"episode_id": 1, "sha256": "", "size": 1}]}, "episode_id"),
        ({"episodes": [{"episode_id": "x" * 10_000, "sha256": "", "size": 1}]}, "episode_id"),
    ],
)
def test_a_malformed_request_is_named(served: Served, body: Any, named_in: str) -> None:
    token = served.enrol()
    status, answer, _ = served.ask("POST", "/v1/uploads", token, body, **{"Content-Type": "application/json"})
    assert (status, answer["kind"]) == (422, "ConfigError") and named_in in answer["problem"]
    assert token not in str(answer)


def test_an_unknown_route_is_named(served: Served) -> None:
    for path in ("/v2/x", "/healthz/", "//healthz", "/v1"):
        assert served.ask("GET", path)[0] == 404
    status, answer, _ = served.ask("DELETE", "/v1/episodes", served.enrol(), b"")
    assert (status, set(answer)) == (405, {"kind", "problem", "fix"})


@pytest.mark.parametrize("path", ["objects/{d}/signing.pem", "objects/{d}/..%2fx", "objects/x/manifest.json", "bases/x",
                                  "objects/{d}/manifest.json", "objects/../../episodes/x"])  # fmt: skip
def test_only_published_policies_can_be_fetched(served: Served, path: str) -> None:
    served.plane.objects.put(f"policies/{'a' * 64}/manifest.json", b"unpublished")
    status, answer, _ = served.ask("GET", f"/v1/policies/{path.format(d='a' * 64)}", served.enrol())
    assert status == 404 and set(answer) == {"kind", "problem", "fix"}


# --- permits ----------------------------------------------------------------------------------------------------------


def test_a_permit_is_for_one_digest_one_size_and_one_commit(served: Served) -> None:
    token = served.enrol()
    keys = {offer(served, token, named(0))[0]["key"] for _ in range(20)}
    (key,) = keys  # asked for again it is the same place
    for data in (DATA[0], DATA[1][: len(DATA[0])], DATA[0]):
        assert served.ask("PUT", f"/v1/objects/{key}", token, data)[0] == 201
    assert len(list(served.plane.objects.list("incoming"))) == 1
    (outcome,) = commit(served, token, named(1, key=key))  # another episode's digest
    assert outcome["error"]["kind"] == "ConfigError"
    assert commit(served, token, named(0, key=key)) == [{"status": "committed"}]
    assert served.ask("PUT", f"/v1/objects/{key}", token, DATA[0])[0] == 503  # used up
    refused = upload(served, token, 1, b"x" * len(DATA[1]))
    (outcome,) = commit(served, token, named(1, key=refused))
    assert outcome["error"]["kind"] == "CorruptDataError"
    assert served.ask("PUT", f"/v1/objects/{refused}", token, DATA[1])[0] == 503
    assert list(served.plane.objects.list("incoming")) == []


def test_a_robot_holds_no_more_uncommitted_bytes_than_it_may(tmp_path: Path) -> None:
    size = len(DATA[0]) / 2**20
    with serving(tmp_path, robot_episodes_per_min=6000, robot_incoming_mib=2.5 * size) as served:
        token = served.enrol()
        keys = [upload(served, token, number) for number in range(2)]
        status, answer, headers = served.ask("POST", "/v1/uploads", token, {"episodes": [named(2)]})
        assert (status, answer["kind"]) == (429, "UnavailableError") and int(headers["Retry-After"]) > 0
        assert "url" in offer(served, served.enrol("other"), named(2))[0]
        assert commit(served, token, named(0, key=keys[0])) == [{"status": "committed"}]
        assert "url" in offer(served, token, named(2))[0]


def test_an_upload_that_is_repeated_counts_again(tmp_path: Path) -> None:
    """Else one permit fills the service's disk: each of its uploads waits there until it is whole."""
    size = len(DATA[0]) / 2**20
    with serving(tmp_path, robot_episodes_per_min=6000, robot_mib_per_min=3.5 * size) as served:
        token = served.enrol()
        (place,) = offer(served, token, named(0))
        answers = [served.ask("PUT", place["url"], token, DATA[0]) for _ in range(6)]
        assert [status for status, _, _ in answers] == [201] * 3 + [429] * 3
        assert int(answers[-1][2]["Retry-After"]) > 0
        upload(served, served.enrol("other"), 1)
        assert commit(served, token, named(0, key=place["key"])) == [{"status": "committed"}]


def test_permits_are_few_and_one_that_asks_for_many_waits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "PERMITS_MAX", 10)
    token = served.enrol()
    items = [named(0, episode_id=f"{number:032x}") for number in range(20)]
    assert sum("url" in place for place in offer(served, token, *items)) == 10
    assert "url" in offer(served, token, items[3])[0]  # renewed


def test_what_lies_in_a_robots_area_without_a_permit_counts_and_is_swept_when_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, robot_incoming_mib=1.0) as served:
        token, store = served.enrol(), served.plane.objects
        for number in range(3):
            store.put(f"incoming/r0/{number:032x}-0000000{number}.tar", bytes(2**19))
        store.put("incoming/r00/other.tar", b"x")
        assert served.ask("POST", "/v1/uploads", token, {"episodes": [named(0)]})[0] == 429
    monkeypatch.setattr(incoming, "PERMIT_S", -60.0)
    with serving(tmp_path, robot_incoming_mib=1.0) as served:
        assert served.ask("POST", "/v1/uploads", served.enrol(), {"episodes": [named(0)]})[0] == 200
        assert [item.key for item in served.plane.objects.list("incoming")] == ["incoming/r00/other.tar"]


# --- who must wait ----------------------------------------------------------------------------------------------------


def test_a_robot_over_its_rate_waits_and_the_others_do_not(tmp_path: Path) -> None:
    with serving(tmp_path, robot_episodes_per_min=2) as served:
        token = served.enrol()
        places = offer(served, token, *(named(n) for n in range(4)))
        assert ["url" in place for place in places] == [True, True, False, False]
        assert places[2]["error"]["kind"] == "UnavailableError" and "rate" in places[2]["error"]["problem"]
        status, answer, headers = served.ask("POST", "/v1/uploads", token, {"episodes": [named(2)]})
        assert (status, answer["kind"]) == (429, "UnavailableError") and 1 <= int(headers["Retry-After"]) <= 30
        assert "url" in offer(served, served.enrol("other"), named(2))[0]


@pytest.mark.parametrize("path", ["uploads", "episodes", "episodes/status"])
def test_a_request_of_many_episodes_counts_as_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(limits, "REQUESTS_PER_S", 5.0)
    with serving(tmp_path, robot_episodes_per_min=6000) as slow:
        token = slow.enrol()
        body = {"episodes": [named(0, key="k", episode_id=f"{number:032x}") for number in range(MAX_BATCH)]}
        answers = [slow.ask("POST", f"/v1/{path}", token, body) for _ in range(8)]
        assert answers[0][0] == 200 and "requests of robot r0" in str(
            [text for code, text, _ in answers if code == 429]
        )


def test_heartbeats_of_one_robot_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes: one robot's would keep the commits of all the others waiting."""
    monkeypatch.setattr(limits, "BEATS_PER_S", 0.05)
    with serving(tmp_path) as slow:
        token = slow.enrol()
        answers = [slow.ask("POST", "/v1/heartbeat", token, {"episodes": 1})[0] for _ in range(12)]
        assert answers[0] == 204 and 429 in answers
        assert slow.ask("GET", "/v1/announcements", token)[0] == 200
        assert slow.ask("POST", "/v1/heartbeat", slow.enrol("other"), {"episodes": 1})[0] == 204


def test_new_episodes_wait_while_the_coordinator_is_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_LOOK_S", 0.0)
    with serving(tmp_path, unsettled_max=1) as served:
        token, plane = served.enrol(), served.plane
        commit(served, token, *(named(n, key=upload(served, token, n)) for n in range(2)))
        assert offer(served, token, named(0)) == [{"status": "committed"}]  # what is known needs no room
        status, answer, headers = served.ask("POST", "/v1/uploads", token, {"episodes": [named(2)]})
        assert (status, answer["kind"]) == (503, "UnavailableError") and "coordinator" in answer["problem"]
        assert int(headers["Retry-After"]) >= 1
        coordinator = Coordinator(plane.catalog, plane.objects, OutboxLog(plane.catalog), lambda episode: [])
        coordinator.step()
        assert "url" in offer(served, token, named(2))[0]


# --- signs of life ----------------------------------------------------------------------------------------------------


def test_a_heartbeat_and_a_measurement_are_the_tokens_robots(served: Served) -> None:
    token = served.enrol("a", "canary")
    beat = {"robot_id": "b", "cohort": "production", "active_version": 3, "episodes": 7,
            "details": {"pid": 1, "spool_bytes": 10, "new": "word"}}  # fmt: skip
    for _ in range(2):
        assert served.ask("POST", "/v1/heartbeat", token, beat)[0] == 204
    measured = {"name": "publish_to_active_s", "version": 3, "since": 1.0e9}
    assert served.ask("POST", "/v1/measurements", token, measured)[0] == 422  # no time of this catalog
    with served.plane.catalog.read() as connection:
        (row,) = connection.execute(sa.select(robots)).all()
        assert connection.execute(sa.select(measurements)).all() == []
    assert (row.robot_id, row.cohort, row.active_version, row.episodes) == ("a", "canary", 3, 7)
    assert row.details["spool_bytes"] == 10 and "new" not in row.details
    measured |= {"since": row.last_seen - 2.0}
    status, answer, _ = served.ask("POST", "/v1/measurements", token, measured)
    assert status == 422 and "no policy 3" in answer["problem"]
    a_policy(served, 3)
    assert served.ask("POST", "/v1/measurements", token, measured)[0] == 204
    with served.plane.catalog.read() as connection:
        (found,) = connection.execute(sa.select(measurements)).all()
    assert (found.subject, found.name, found.version) == ("a", "publish_to_active_s", 3) and found.value >= 2.0
    for _ in range(20):
        assert served.ask("POST", "/v1/measurements", token, measured)[0] == 204
    with served.plane.catalog.read() as connection:
        assert len(connection.execute(sa.select(measurements)).all()) == 8, "rows of one robot are bounded"
    assert served.ask("POST", "/v1/measurements", token, measured | {"name": "anything"})[0] == 422
    assert served.ask("POST", "/v1/heartbeat", token, beat | {"active_version": 2**40})[0] == 422


@pytest.mark.parametrize(
    ("path", "body", "named_in"),
    [
        ("heartbeat", {"episodes": "1"}, "episodes"),
        ("heartbeat", {"episodes": 1.0}, "episodes"),
        ("heartbeat", {"episodes": True}, "episodes"),
        ("heartbeat", {"episodes": 1, "details": {"pid": "9" * 4000}}, "pid"),
        ("heartbeat", {"episodes": 1, "details": {"spool_bytes": "9" * 4000}}, "spool_bytes"),
        ("heartbeat", {"episodes": 1, "details": {"safety": {"stop": "1"}}}, "safety"),
        ("heartbeat", {"episodes": 1, "details": {"permitted_until": "nan"}}, "permitted_until"),
        ("heartbeat", {"episodes": 1, "details": {"permitted_until": "1e999"}}, "permitted_until"),
        ("heartbeat", {"episodes": 1, "details": {"ended": "yes"}}, "ended"),
        ("measurements", {"name": "publish_to_active_s", "version": 1, "since": "inf"}, "since"),
        ("uploads", {"episodes": [named(0, size="9" * 4300)]}, "size"),
        ("episodes", {"episodes": [named(0, key="k", size="9" * 4300)] * 20}, "size"),
    ],
)
def test_a_number_is_a_number(served: Served, path: str, body: dict[str, Any], named_in: str) -> None:
    """Text is none: of thousands of digits, or `nan`, it would pass what the JSON's own numbers are held to."""
    status, answer, _ = served.ask("POST", f"/v1/{path}", served.enrol(), body)
    assert (status, answer["kind"]) == (422, "ConfigError") and named_in in answer["problem"]
    with served.plane.catalog.read() as connection:
        assert connection.execute(sa.select(robots)).all() == []


def test_health_says_what_does_not_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.ask("GET", "/healthz")[:2] == (200, {"catalog": True, "store": True})


def test_health_of_a_store_that_is_away(tmp_path: Path) -> None:
    class Away(DirectoryStore):
        def exists(self, key: str) -> bool:
            from infra.errors import UnavailableError

            raise UnavailableError("the store is away", "wait")

    with serving(tmp_path, objects=Away(tmp_path / "objects")) as served:
        assert served.ask("GET", "/healthz")[:2] == (503, {"catalog": True, "store": False})


# --- the document -----------------------------------------------------------------------------------------------------

ROUTES = {
    ("post", "/v1/uploads"), ("put", "/v1/objects/{key}"), ("post", "/v1/episodes"), ("post", "/v1/episodes/status"),
    ("get", "/v1/announcements"), ("get", "/v1/policies/objects/{digest}/{name}"),
    ("get", "/v1/policies/bases/{sha256}"), ("post", "/v1/heartbeat"), ("post", "/v1/measurements"),
    ("get", "/healthz"),
}  # fmt: skip


def test_the_openapi_document_lists_every_route_and_is_sound(served: Served) -> None:
    status, document, _ = served.ask("GET", "/openapi.json")
    assert status == 200 and document["openapi"].startswith("3.1")
    found = {(method, path) for path, item in document["paths"].items() for method in item}
    assert found >= ROUTES
    for method, path in ROUTES:
        operation = document["paths"][path][method]
        assert operation["description"] and operation["responses"]
        assert bool(operation.get("security")) == path.startswith("/v1/"), path
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "')[1:]}:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


# --- a store that gives URLs ------------------------------------------------------------------------------------------


class Presigning(DirectoryStore):
    """A directory whose objects have URLs; they lead nowhere."""

    def presign_put(self, key: str, size: int, seconds: float) -> str:
        return self._url(key, f"{seconds:.0f}&size={size}")

    def presign_get(self, key: str, seconds: float) -> str:
        return self._url(key, f"{seconds:.0f}")

    def _url(self, key: str, permitted: str) -> str:
        return f"http://store.invalid/{key}?X-Amz-Expires={permitted}&X-Amz-Signature=feed"


def test_where_the_store_gives_urls_the_service_hands_them_out(tmp_path: Path) -> None:
    with serving(tmp_path, objects=Presigning(tmp_path / "objects")) as served:
        token = served.enrol()
        (place,) = offer(served, token, named(0))
        assert (
            place["url"]
            == f"http://store.invalid/{place['key']}?X-Amz-Expires=300&size={len(DATA[0])}&X-Amz-Signature=feed"
        )
        assert served.ask("PUT", f"/v1/objects/{place['key']}", token, DATA[0])[0] == 503  # not through the service
        status, _, headers = served.ask("GET", f"/v1/policies/bases/{'a' * 64}", token)
        assert status == 307 and headers["Cache-Control"] == "no-store"
        assert headers["Location"].startswith(f"http://store.invalid/policies/bases/{'a' * 64}/base.safetensors?")
