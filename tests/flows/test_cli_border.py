"""The border of the command line, run as a person runs it: odd texts, terminals and paths, servers that are away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from infra.catalog.schema import dead_letters
from infra.episode import Episode
from infra.plane import open_catalog
from infra.settings import load_settings
from lwd_model.shards import write_buffer

ROOT = Path(__file__).parents[2]
ODD_HOMES = [
    "a?b",
    "a?c",
    "a#b",
    "a%41b",
    "a b",
    "[red]",
    "a{1..2}",
    "é",
    "a'b",
    'a"b',
    "$HOME",
    "-x",
    "a;b",
    "a&b=c",
    ":memory:",
]


def lwd(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`lwd …` in a folder, its output in pipes."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LWD_", "PREFECT_"))}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_each_home_has_a_catalog_of_its_own(tmp_path: Path) -> None:
    for name in ODD_HOMES:
        catalog = open_catalog(load_settings(home=tmp_path / name), migrate=True)
        with closing(catalog), catalog.begin() as connection:
            connection.execute(
                dead_letters.insert().values(log=name, partition=0, position=0, payload="", reason="", created_at=0.0)
            )
    for name in ODD_HOMES:
        catalog = open_catalog(load_settings(home=tmp_path / name))
        with closing(catalog), catalog.read() as connection:
            assert [row.log for row in connection.execute(sa.select(dead_letters))] == [name]
    assert sorted(path.parent.name for path in tmp_path.rglob("catalog.db")) == sorted(ODD_HOMES)


def test_odd_texts_of_the_log_are_shown_to_odd_terminals(tmp_path: Path) -> None:
    payload = "[/red][link=https://evil.example]x[/link]\x1b[2J τ"
    catalog = open_catalog(load_settings(home=tmp_path / "h"), migrate=True)
    with closing(catalog), catalog.begin() as connection:
        values = {
            "partition": 0,
            "position": 1,
            "payload": payload,
            "reason": "[bold]\x1b]8;;https://e",
            "created_at": 0.0,
        }
        connection.execute(dead_letters.insert().values(log="[/]", **values))
    for encoding in ("utf-8", "latin-1", "ascii"):
        done = lwd(tmp_path, "data", "dead-letters", "--home", "h", PYTHONIOENCODING=encoding)
        said = done.stdout.decode(encoding)
        assert done.returncode == 0, done.stderr
        assert "[/red][link=https://evil.example]x[/link]\\x1b[2J" in said and "[bold]\\x1b]8;;https://e" in said
        assert "\x1b" not in said


def test_variables_of_others_in_dot_env_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WANDB_API_KEY=abc123secret\nLWD_POLL_S=0.5\nLWD_CONTRACTS=mine\n")
    done = lwd(tmp_path, "status", "--home", "h")
    assert done.returncode == 0, done.stderr
    assert b"abc123secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "environment", "code", "named"),
    [
        (("rollback", "--home", "h"), {}, 2, "no previous champion"),
        (("status", "--home", "h"), {"LWD_CATALOG": "postgresql+psycopg://u:hidden@127.0.0.1:9/x"}, 8, "127.0.0.1"),
        (("status", "--home", "h"), {"LWD_PROFLE": "hidden"}, 2, "LWD_PROFLE"),
        (("evaluate", "--home", "h"), {"PREFECT_API_URL": "http://127.0.0.1:9/api"}, 8, "does not answer"),
        (("status", "--home", "/proc/1/nothing"), {}, 2, "/proc/1/nothing"),
        (("status", "--home", "file"), {}, 2, "file"),
        (("status", "--home", "x" * 300), {}, 2, "name too long"),
        (("robot", "nowhere"), {}, 3, "nowhere"),
        (("contracts", "check", "nowhere"), {}, 3, "nowhere"),
        (("data", "verify", "--home", "h"), {"LWD_PROFILE": "fleet"}, 2, "fleet profile needs"),
    ],
)
def test_an_error_is_a_message_with_a_fix(
    tmp_path: Path, words: tuple[str, ...], environment: dict[str, str], code: int, named: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    done = lwd(tmp_path, *words, **environment)
    said = done.stderr.decode()
    assert done.returncode == code, said
    assert named.lower() in said.lower() and "fix:" in said
    assert "Traceback" not in said and "hidden" not in said


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m flows.cli snapshots --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("status", "--home", "a", "--home", "b"), "--home"),
        (("data", "release", "--stage", "a", "--stage", "b"), "--stage"),
        (("servers", "down", "--data", "a", "--data", "b"), "--data"),
        (("servers", "up", "--port", "kafka=1", "--port", "kafka=2"), "--port"),
        (("canary", "--stop", "--once"), "--stop"),
        (("canary", "--once", "3"), "--once"),
        (("canary", "--reason", "x"), "--reason"),
        (("snapshots", "--last", "-5"), "--last"),
        (("evaluate", "--episodes", "0"), "--episodes"),
        (("robot", "models", "--seed", "-3"), "--seed"),
        (("robot", "models", "--pictures", "no/x.png"), "--pictures"),
    ],
)
def test_options_that_contradict_or_mean_nothing_are_refused(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    done = lwd(tmp_path, *words)
    assert done.returncode == 2 and message in done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_env_file_is_named_whatever_the_command(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("LWD_POLL_S\n")
    command = [sys.executable, "-m", "flows.command", "status", "--home", "h"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: .env, line 1") and "Traceback" not in done.stderr


def test_a_buffer_is_checked_as_a_whole(tmp_path: Path, make_episode: Callable[..., Episode]) -> None:
    write_buffer([make_episode(seed, source="play", obs_dim=86) for seed in range(2)], tmp_path / "play")
    done = lwd(tmp_path, "contracts", "check", "play", "--contract", "offline_buffer")
    assert done.returncode == 3 and b"buffer-size" in done.stdout and b"2 episodes, refused as a whole" in done.stdout
