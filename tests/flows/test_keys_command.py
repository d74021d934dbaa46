"""`lwd keys`: a key gives way to the next, and is not retired while robots need what it signed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "policy"))
from policies import make_bundle

from flows.deployment import deployment
from flows.keys import app, in_use
from infra.errors import LwdError
from infra.policy.keys import create_keys, load_signer, trusted_ids


@pytest.fixture
def lwd(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Run `lwd keys …`: its exit code, and answer or error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            app([*words, "--home", str(tmp_path)], standalone_mode=False)
        except LwdError as error:
            return error.exit_code, str(error)
        return 0, capsys.readouterr().out

    return run


def publish(home: Path, cohort: str | None = None) -> int:
    with deployment(home) as plane:
        return plane.publisher.publish(make_bundle(home / "export"), cohort=cohort)


def with_one_key(home: Path) -> None:
    """A deployment whose learner has no key of its own."""
    create_keys(home / "keys")
    (home / "keys" / "publishing.pem").unlink()
    shutil.rmtree(home / "keys" / "trusted" / "publish")


def promote(home: Path, version: int) -> None:
    with deployment(home) as plane:
        plane.registry.promote(version, {})


def test_a_key_is_retired_when_nothing_in_use_is_signed_by_it(
    lwd: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    with_one_key(tmp_path)
    promote(tmp_path, publish(tmp_path))
    keys = tmp_path / "keys"
    old = load_signer(keys).key_id
    code, said = lwd("rotate")
    new = load_signer(keys).key_id
    assert code == 0 and f"{new} signs from now on" in said and f"lwd keys retire {old}" in said
    code, said = lwd("retire", old)
    assert code == 2 and "policy 1 (champion" in said and "the announcement of policy 1 to production" in said
    promote(tmp_path, publish(tmp_path))
    code, said = lwd("retire", old)  # the champion is of the new key, what a rollback goes back to is not
    assert code == 2 and "policy 1 (previous)" in said and "policy 2" not in said
    promote(tmp_path, publish(tmp_path))
    code, said = lwd("list")
    assert code == 0 and "policy 3 (champion" in said and old in said
    assert lwd("retire", old)[0] == 0 and new in trusted_ids(keys) and old not in trusted_ids(keys)
    assert old not in lwd("list")[1]


@pytest.mark.parametrize("cohort", ["learning", "canary"])
def test_what_other_cohorts_run_counts_too(lwd: Callable[..., tuple[int, str]], tmp_path: Path, cohort: str) -> None:
    with_one_key(tmp_path)
    version = publish(tmp_path, cohort="learning" if cohort == "learning" else None)
    old = load_signer(tmp_path / "keys").key_id
    with deployment(tmp_path) as plane:
        if cohort == "canary":
            plane.registry.register_candidate(version, proposer="ann")
        assert list(in_use(plane)) == [old]
    lwd("rotate")
    code, said = lwd("retire", old)
    assert code == 2 and cohort in said


def test_a_key_is_staged_before_it_signs(lwd: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    with_one_key(tmp_path)
    publish(tmp_path)
    keys = tmp_path / "keys"
    before = load_signer(keys).key_id
    code, said = lwd("rotate", "--stage")
    assert code == 0 and load_signer(keys).key_id == before
    (staged,) = set(trusted_ids(keys)) - {before}
    assert staged in said and "signs next" in lwd("list")[1]
    assert lwd("retire", staged)[0] == 2
    lwd("rotate")
    assert load_signer(keys).key_id == staged
    assert lwd("retire", staged)[0] == 2 and lwd("retire", before)[0] == 0


def test_an_unknown_key_is_named(lwd: Callable[..., tuple[int, str]]) -> None:
    code, said = lwd("retire", "0" * 16)
    assert code == 2 and "is not trusted" in said


def test_the_learner_s_key_is_rotated_by_itself(lwd: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    publish(tmp_path, cohort="learning")
    keys = tmp_path / "keys"
    before, promoting = load_signer(keys, "publish").key_id, load_signer(keys).key_id
    code, said = lwd("rotate", "--role", "publish")
    assert code == 0 and before in said
    assert load_signer(keys, "publish").key_id != before and load_signer(keys).key_id == promoting
    assert lwd("retire", before)[0] == 2  # the learning cohort runs what it signed
    code, said = lwd("rotate", "--role", "both")
    assert code == 2 and "promote, publish" in said
