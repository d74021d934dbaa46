"""Variables: only those with the prefix are looked at, and a wrong one of these is refused by its own name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import ConfigError
from infra.settings import load_settings
from infra.variables import dotenv_variables, variable

SECRET = "abc123secret"


def said_by(work: Callable[[], object]) -> str:
    """The message of the error, or nothing where the value is taken."""
    try:
        work()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LWD_HOME", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        f"WANDB_API_KEY={SECRET}",
        f"LWDX_TOKEN={SECRET}",
        f"MY_LWD_TOKEN={SECRET}",
        f"export AWS_SECRET_ACCESS_KEY='{SECRET}'",
        f"this is no assignment {SECRET}",
        f"# LWD_APROVAL={SECRET}",
        f'BROKEN="{SECRET}',
    ],
)
def test_lines_of_others_are_nobody_s_business(folder: Path, line: str) -> None:
    (folder / ".env").write_text(f"{line}\nLWD_MICRO_BATCH=3\n", encoding="latin-1")
    assert load_settings().micro_batch == 3


@pytest.mark.parametrize("place", ["environment", "file"])
@pytest.mark.parametrize(
    ("name", "near"), [("LWD_APROVAL", "LWD_APPROVAL"), ("LWD_CONTRACT", "LWD_CONTRACTS"), ("LWD_LWD_HOME", "LWD_HOME")]
)
def test_a_wrong_variable_is_refused_by_its_own_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str, near: str
) -> None:
    if place == "file":
        (folder / ".env").write_text(f"{name}={SECRET}\n")
    else:
        monkeypatch.setenv(name, SECRET)
    with pytest.raises(ConfigError, match=name) as error:
        load_settings()
    assert near in error.value.fix
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "name", ["S3_SECRET_KEY", "S3_ACCESS_KEY", "ROBOT_TOKEN", "CATALOG", "KAFKA_OPTIONS", "LEASE_S", "APPROVAL",
             "PROFILE", "INGEST_CERT", "S3_POOL"],
)  # fmt: skip
@pytest.mark.parametrize("value", [f'["{SECRET * 4}"]', f'{{"a": "{SECRET * 4}", "a": 1}}', SECRET * 4])
def test_no_message_holds_a_value_that_may_be_a_secret(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"LWD_{name}", value)
    assert SECRET not in said_by(load_settings)


def test_documented_variables_that_are_no_settings_are_taken_from_the_file(folder: Path) -> None:
    (folder / ".env").write_text("export LWD_CONTRACTS=mine\nLWD_SERVERS_DIR='a b'\nlwd_home=${LWD_CONTRACTS}/h\n")
    assert (variable("LWD_CONTRACTS"), variable("LWD_SERVERS_DIR")) == ("mine", "a b")
    assert load_settings().home == Path("mine/h")


def test_the_environment_wins_over_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".env").write_text("LWD_POLL_S=3\n")
    assert load_settings().poll_s == 3
    monkeypatch.setenv("LWD_POLL_S", "4")
    assert load_settings().poll_s == 4


@pytest.mark.parametrize("text", ["LWD_POLL_S=1\nlwd_poll_s=2\n", "LWD_POLL_S\n", 'LWD_POLL_S="1\n'])
def test_a_line_of_ours_that_is_wrong_or_twice_is_refused(folder: Path, text: str) -> None:
    (folder / ".env").write_text(text)
    with pytest.raises(ConfigError, match=r"\.env"):
        dotenv_variables()


@pytest.mark.parametrize(
    ("file", "said", "refused"),
    [
        ("approval: true", "false", True),
        ("approval: true", "1", False),
        ("approval: false", "true", True),
        ("approval: true", "perhaps", True),
    ],
)
def test_what_protects_a_deployment_is_its_file_s_decision(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, said: str, refused: bool
) -> None:
    (folder / "settings.yaml").write_text(file)
    monkeypatch.setenv("LWD_APPROVAL", said)
    if refused:
        with pytest.raises(ConfigError, match="LWD_APPROVAL contradicts"):
            load_settings(home=folder)
    else:
        assert load_settings(home=folder).approval
    monkeypatch.delenv("LWD_APPROVAL")
    assert load_settings(home=folder, approval=said == "1").approval == file.endswith("true")


@pytest.mark.parametrize("name", ["influence_max", "permit_canary_s", "permit_learning_s", "permit_champion_s"])
@pytest.mark.parametrize("place", ["shell", "dotenv"])
def test_a_shell_does_not_widen_what_the_deployment_s_file_bounds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    """How long a permission lasts without a renewal, and the share of the data that one robot may make up."""
    (folder / "settings.yaml").write_text(f"{name}: 0.25\n")
    variable = f"LWD_{name.upper()}"
    for said in ("1", "0.25"):
        if place == "shell":
            monkeypatch.setenv(variable, said)
        else:
            (folder / ".env").write_text(f"{variable}={said}\n")
        if said == "1":
            with pytest.raises(ConfigError, match=f"{variable} contradicts"):
                load_settings(home=folder)
        else:
            assert getattr(load_settings(home=folder), name) == 0.25


def test_a_setting_twice_in_the_home_s_file_is_refused(folder: Path) -> None:
    (folder / "settings.yaml").write_text("approval: true\npoll_s: 1\napproval: false\n")
    with pytest.raises(ConfigError, match=r"settings\.yaml:3: the key 'approval' stands twice"):
        load_settings(home=folder)
