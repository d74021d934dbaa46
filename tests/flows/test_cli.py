"""`lwd`: what its commands print and how they end."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "fleet"))
from deployment import Deployment, scene_bundle

from data_contracts.contract import FOLDER
from flows.cli import app, guarded
from flows.deployment import deployment
from infra.episode import Episode
from infra.errors import ConfigError
from lwd_model.shards import write_buffer

COMMANDS = (
    "demo", "collect", "train", "online", "evaluate", "promote", "rollback", "contracts", "snapshots", "policies",
    "report", "status", "robot", "migrate", "canary", "keys", "data", "robots", "servers",
)  # fmt: skip


@pytest.fixture
def lwd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run `lwd …`: its exit code, answer (stdout) and messages (stderr)."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = guarded(lambda: app([str(word) for word in words], standalone_mode=False))
        return code, *capsys.readouterr()

    return run


def test_help_as_a_program_lists_every_command_and_where_to_begin() -> None:
    done = subprocess.run([sys.executable, "-m", "flows.cli", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "lwd demo" in done.stdout
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("│ ") and len(line.split()) > 2}
    assert set(COMMANDS) <= listed


def test_the_version_is_the_installed_one(lwd) -> None:
    assert lwd("--version")[:2] == (0, f"lwd {version('lwd')}\n")


@pytest.mark.parametrize("command", [*COMMANDS, "contracts check", "contracts review"])
def test_every_command_explains_itself(lwd, command: str) -> None:
    code, out, _ = lwd(*command.split(), "--help")
    assert code == 0
    assert f"lwd {command}" in out or f" {command} " in out
    explained = [line for line in out.splitlines()[2:] if line.strip() and "Usage" not in line]
    assert explained and explained[0].rstrip().endswith((".", ":", "`", "page", "%"))


def test_an_unknown_command_or_option_is_a_usage_error(lwd) -> None:
    code, _, messages = lwd("statuss")
    assert code == 2 and "statuss" in messages
    code, _, messages = lwd("status", "--hom", "x")
    assert code == 2 and "--hom" in messages


def test_an_empty_deployment_is_shown_as_empty(lwd, tmp_path: Path) -> None:
    code, out, _ = lwd("status", "--home", tmp_path)
    assert code == 0
    assert "snapshot 0: 0 episodes; quarantine: 0; unaccounted: 0" in out
    assert "champion: None" in out
    for command, columns in (("snapshots", ("version", "digest")), ("policies", ("aliases", "manifest digest"))):
        code, out, _ = lwd(command, "--home", tmp_path)
        assert code == 0 and all(column in out for column in columns)


def test_a_deployment_shows_its_snapshots_and_policies(lwd, tmp_path: Path, make_episode) -> None:
    home = Deployment(tmp_path)
    version = home.publish()
    home.plane.submit(make_episode(1))
    home.plane.submit(make_episode(2))
    home.coordinate()
    code, out, _ = lwd("snapshots", "--home", tmp_path)
    digest = home.plane.snapshots.latest().digest
    assert code == 0 and digest[:12] in out
    code, out, _ = lwd("policies", "--home", tmp_path)
    with deployment(tmp_path) as plane:
        manifest = plane.registry.policies()[0]["manifest_sha256"]
    assert code == 0 and str(version) in out and manifest[:16] in out
    code, out, _ = lwd("status", "--home", tmp_path)
    assert code == 0 and "2 episodes; quarantine: 0; unaccounted: 0" in out


def test_rollback_without_a_previous_champion_says_what_to_do(lwd, tmp_path: Path) -> None:
    code, out, messages = lwd("rollback", "--home", tmp_path)
    assert code == ConfigError.exit_code == 2
    assert out == ""
    assert "no previous champion" in messages and "fix: promote another policy" in messages


def test_rollback_makes_the_previous_champion_champion_again(lwd, tmp_path: Path) -> None:
    home = Deployment(tmp_path)
    first, second = home.publish(seed=0), home.publish(seed=1)
    with deployment(tmp_path) as plane:
        for version in (first, second):
            plane.registry.promote(version, {"verdict": "PASS", "reasons": []}, proposer="test")
    code, _, messages = lwd("rollback", "--home", tmp_path, "--reason", "drops the cube", "--actor", "ann")
    assert code == 0 and f"v{first} is champion again" in messages
    with deployment(tmp_path) as plane:
        assert (plane.registry.alias("champion"), plane.registry.alias("previous")) == (first, None)
        assert "drops the cube" in str(plane.registry.history()) and "ann" in str(plane.registry.history())


def test_contracts_check_passes_good_data_and_refuses_a_planted_episode(lwd, tmp_path: Path, make_episode) -> None:
    good: list[Episode] = [make_episode(n, obs_dim=86, source="demo", policy_version=None) for n in range(3)]
    write_buffer(good, tmp_path / "good")
    code, out, _ = lwd("contracts", "check", tmp_path / "good")
    assert code == 0 and "3 episodes, 0 refused" in out
    planted = dataclasses.replace(good[0], actions=np.full_like(good[0].actions, 57.3))
    write_buffer([planted, *good[1:]], tmp_path / "bad")
    code, out, _ = lwd("contracts", "check", tmp_path / "good", tmp_path / "bad")
    assert code == 3
    assert f"block {planted.episode_id} demo S1: action-limits: " in out and "(fleet-operations)" in out
    assert "6 episodes, 1 refused" in out


def test_contracts_check_refuses_a_shield_that_a_robot_would_refuse(
    lwd, tmp_path: Path, make_episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_buffer([make_episode(0, obs_dim=86, source="demo", policy_version=None)], tmp_path / "good")
    shutil.copytree(FOLDER, tmp_path / "contracts")
    terms = tmp_path / "contracts" / "transition.odcs.yaml"
    terms.write_text(terms.read_text().replace("late_events: 3", "late_event: 3"))
    monkeypatch.setenv("LWD_CONTRACTS", str(tmp_path / "contracts"))
    code, _, messages = lwd("contracts", "check", tmp_path / "good")
    assert code == ConfigError.exit_code and "late_event" in messages and "late_events" in messages, messages


def test_a_robot_runs_a_policy_and_draws_what_it_did(lwd, tmp_path: Path) -> None:
    bundle = scene_bundle(tmp_path / "bundle")
    code, out, _ = lwd("robot", bundle, "--task", "S1", "--episodes", "2", "--pictures", tmp_path / "strip.png")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 3
    assert all("open the drawer" in line and "score" in line for line in lines[:2])
    assert lines[2].startswith("success ") and lines[2].endswith("/2")
    assert (tmp_path / "strip.png").read_bytes().startswith(b"\x89PNG")


def test_a_robot_without_its_policy_or_task_says_so(lwd, tmp_path: Path) -> None:
    code, _, messages = lwd("robot", tmp_path / "nowhere")
    assert code != 0 and str(tmp_path / "nowhere") in messages.replace("\n", "") and "fix:" in messages
    code, _, messages = lwd("robot", scene_bundle(tmp_path / "bundle"), "--task", "S9")
    assert code == ConfigError.exit_code and "S9" in messages and "S1" in messages
