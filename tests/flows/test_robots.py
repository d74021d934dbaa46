"""`lwd robots`: a token is shown once, works, and ends when it is revoked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli import guarded
from flows.robots import app
from infra.edge.server import RefusedError
from infra.plane import open_catalog
from infra.service.auth import TOKEN, Tokens
from infra.settings import load_settings

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def robots(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `lwd robots …`: its exit code, answer (stdout) and messages (stderr)."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = guarded(lambda: app([*words, "--home", str(tmp_path)], standalone_mode=False))
        return code, *capsys.readouterr()

    return run


def tokens(home: Path) -> Tokens:
    return Tokens(open_catalog(load_settings(home=home)), cache_s=0.0)


def test_a_robots_way_from_enrolment_to_revocation(robots: Run, tmp_path: Path) -> None:
    code, token, said = robots("enrol", "r7", "--cohort", "canary", "--days", "2", "--actor", "ann")
    token = token.strip()
    assert code == 0 and TOKEN.fullmatch(token)
    assert "LWD_ROBOT_TOKEN" in said and token not in said
    assert tokens(tmp_path).verify(token).cohort == "canary"
    _, listed, _ = robots("list")
    assert all(word in listed for word in ("r7", "canary", "valid", "ann", token[:16])) and token not in listed
    new = robots("enrol", "r7")[1].strip()
    assert "1 valid token of r7 revoked" in robots("revoke", "r7", "--token", token[:16])[1]
    with pytest.raises(RefusedError):
        tokens(tmp_path).verify(token)
    assert tokens(tmp_path).verify(new).robot_id == "r7"
    assert "1 valid token of r7" in robots("revoke", "r7")[1]
    assert "0 valid tokens of r7" in robots("revoke", "r7")[1]
    assert "r7" not in robots("list")[1]
    assert robots("list", "--all")[1].count("revoked") == 2


def test_mistakes_are_named(robots: Run) -> None:
    for words, named in (
        ("revoke r9", "no robot r9"),
        ("enrol ../r", "../r"),
        ("enrol r1 --cohort all", "all"),
        ("enrol r1 --days -1", "-1"),
    ):
        code, out, said = robots(*words.split())
        assert (code, out) == (2, "") and named in said and "fix:" in said
