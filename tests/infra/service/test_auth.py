"""Tokens: only who has the secret is the robot; what ends, ends everywhere within seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from invariants import Plane, open_plane

from infra.catalog.schema import robot_tokens
from infra.edge.server import RefusedError
from infra.errors import ConfigError
from infra.service.auth import TOKEN, Identity, Tokens


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


@pytest.fixture
def tokens(plane: Plane) -> Tokens:
    return Tokens(plane.catalog, cache_s=0.0)


def enrol(tokens: Tokens, robot: str = "r0", cohort: str = "learning", days: float = 1.0) -> str:
    return tokens.enrol(robot, cohort, days=days, actor="ann")


def age(plane: Plane, seconds: float) -> None:
    """Let the time pass for every token."""
    with plane.catalog.begin() as connection:
        changed = {"expires_at": robot_tokens.c.expires_at - seconds, "created_at": robot_tokens.c.created_at - seconds}
        connection.execute(sa.update(robot_tokens).values(changed))


def test_a_token_says_whose_it_is(tokens: Tokens) -> None:
    assert tokens.verify(enrol(tokens, "r0", "canary")) == Identity("r0", "canary")
    first, second = enrol(tokens, "r1"), enrol(tokens, "r1", "production")
    assert tokens.verify(first) == Identity("r1", "learning")  # an older one stays valid, for an overlap
    assert tokens.verify(second) == Identity("r1", "production")


def test_the_catalog_has_a_digest_alone(tokens: Tokens, plane: Plane) -> None:
    token = enrol(tokens)
    assert TOKEN.fullmatch(token) and len(token) == 16 + 1 + 43
    secret = token.partition(".")[2]
    with plane.catalog.read() as connection:
        row = connection.execute(sa.select(robot_tokens)).one()
    assert secret not in str(row) and row.token_id == token.partition(".")[0]
    assert len({enrol(tokens) for _ in range(20)}) == 20


@pytest.mark.parametrize("bad", [None, "", "x", "a" * 60, "0" * 16 + "." + "a" * 42, "0" * 16 + "." + "a" * 43 + "\n"])
def test_a_malformed_token_is_refused_without_a_look_at_the_catalog(
    tokens: Tokens, plane: Plane, monkeypatch: pytest.MonkeyPatch, bad: str | None
) -> None:
    monkeypatch.setattr(plane.catalog, "read", None)
    with pytest.raises(RefusedError, match=r"no robot token|malformed"):
        tokens.verify(bad)


def test_a_wrong_secret_and_an_unknown_id_are_the_same(tokens: Tokens) -> None:
    name, _, secret = enrol(tokens).partition(".")
    other = enrol(tokens, "r1").partition(".")[2]
    said = set()
    for token in (f"{name}.{other}", f"{'0' * 16}.{secret}"):
        with pytest.raises(RefusedError) as error:
            tokens.verify(token)
        said.add(str(error.value))
        assert secret not in str(error.value) and other not in str(error.value)
    assert len(said) == 1


def test_an_expired_token_is_refused_by_name(tokens: Tokens, plane: Plane) -> None:
    token = enrol(tokens, days=1.0)
    age(plane, 86_300)
    assert tokens.verify(token).robot_id == "r0"
    age(plane, 200)
    with pytest.raises(RefusedError, match="robot r0 has expired"):
        tokens.verify(token)


def test_a_revoked_robot_is_refused_and_its_neighbour_is_not(tokens: Tokens) -> None:
    old, new, other = enrol(tokens), enrol(tokens), enrol(tokens, "r1")
    assert tokens.revoke("r0", old.partition(".")[0]) == 1
    with pytest.raises(RefusedError, match="robot r0 was revoked"):
        tokens.verify(old)
    assert tokens.verify(new).robot_id == "r0"
    assert tokens.revoke("r0") == 1
    assert tokens.revoke("r0") == tokens.revoke("nobody") == 0
    with pytest.raises(RefusedError, match="revoked"):
        tokens.verify(new)
    assert tokens.verify(other).robot_id == "r1"


def test_what_was_good_is_believed_for_a_moment_only(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("infra.service.auth.time.monotonic", lambda: now)
    tokens, elsewhere = Tokens(plane.catalog, cache_s=2.0), Tokens(plane.catalog)
    token = enrol(tokens)
    tokens.verify(token)
    elsewhere.revoke("r0")  # by another process
    now = 1001.9
    assert tokens.verify(token).robot_id == "r0"
    with pytest.raises(RefusedError):  # the cache is of whole tokens
        tokens.verify(token[:-1] + ("a" if token[-1] != "a" else "b"))
    now = 1002.1
    with pytest.raises(RefusedError, match="revoked"):
        tokens.verify(token)


def test_the_list_shows_everything_but_the_tokens(tokens: Tokens, plane: Plane) -> None:
    gone = enrol(tokens, "r0", days=0.5)
    age(plane, 86_400)
    revoked, valid = enrol(tokens, "r1"), enrol(tokens, "r2", "production")
    tokens.revoke("r1")
    rows = tokens.list()
    assert [(row.robot_id, row.state, row.cohort, row.actor) for row in rows] == [
        ("r0", "expired", "learning", "ann"),
        ("r1", "revoked", "learning", "ann"),
        ("r2", "valid", "production", "ann"),
    ]
    assert not any(token.partition(".")[2] in str(rows) for token in (gone, revoked, valid))


@pytest.mark.parametrize(
    ("robot", "cohort", "days", "named"),
    [
        ("../r0", "learning", 1, "robot id"),
        ("r0\n", "learning", 1, "robot id"),
        ("", "learning", 1, "robot id"),
        ("r0", "everyone", 1, "cohort"),
        ("r0", "learning", 0, "0 days"),
        ("r0", "learning", float("nan"), "nan days"),
    ],
)
def test_a_robot_is_enrolled_by_plain_words_only(
    tokens: Tokens, robot: str, cohort: str, days: float, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        enrol(tokens, robot, cohort, days)
    assert tokens.list() == []
