"""Bad input as a user meets it: a message that names the thing and the fix, a non-zero exit, and nothing lost.

Each kind has its own tests where it is refused (shards, contracts, learner, catalog, coordinator); here, the commands.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "fleet"))
sys.path.insert(0, str(Path(__file__).parents[1] / "lwd_model"))
import yaml
from deployment import scene_bundle
from factory import agent_config, normaliser
from invariants import open_plane
from safetensors.numpy import load_file, save_file

from data_contracts.contract import FOLDER
from flows.cli import app, guarded
from flows.demo import _started
from flows.online_learner import read_rows
from flows.stages.__main__ import main as stage
from flows.stages.common import BUFFER, CHECKPOINT, DEMONSTRATIONS, OFFLINE, PLAY, QUARANTINE, ROLLOUTS, SFT
from infra.coordinator import Coordinator
from infra.episode import Episode, decode, encode
from infra.errors import ConfigError, CorruptDataError, LeaseLostError, StorageFullError, UnavailableError
from infra.events.outbox import OutboxLog
from lwd_model.learner import Learner
from lwd_model.shards import INDEX, read_buffer, write_buffer

ROOT = Path(__file__).parents[2]
Make = Callable[..., Episode]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the repository's parameters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


@pytest.fixture
def lwd(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `lwd …`: its exit code and all that it printed."""

    def run(*words: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = guarded(lambda: app([str(word) for word in words], standalone_mode=False))
        return code, "".join(capsys.readouterr())

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def demonstration(make: Make, seed: int, **changes: object) -> Episode:
    return make(seed, **{"source": "demo", "policy_version": None, "obs_dim": 86} | changes)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_is_named_and_left_as_it_is(workspace: Path, lwd, make_episode: Make, damage: str) -> None:
    write_buffer([demonstration(make_episode, seed) for seed in range(3)], DEMONSTRATIONS)
    shard = DEMONSTRATIONS / "00000.tar"
    data = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        shard.write_bytes(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
    else:
        shard.unlink()
    before = contents(workspace)
    code, text = lwd("contracts", "check", DEMONSTRATIONS)
    assert code == CorruptDataError.exit_code
    assert str(shard) in text and "dvc pull" in text
    assert contents(workspace) == before


def test_a_missing_column_of_an_episode_is_named(workspace: Path, lwd, make_episode: Make) -> None:
    episode = demonstration(make_episode, 0)
    write_buffer([episode], DEMONSTRATIONS)
    shard, stripped = DEMONSTRATIONS / "00000.tar", io.BytesIO()
    with tarfile.open(shard) as old, tarfile.open(fileobj=stripped, mode="w") as new:
        for member in old:
            if not member.name.endswith("rewards.npy"):
                new.addfile(member, old.extractfile(member))
    index = json.loads((DEMONSTRATIONS / INDEX).read_text())
    index["shards"][0]["sha256"] = hashlib.sha256(stripped.getvalue()).hexdigest()
    shard.write_bytes(stripped.getvalue())
    (DEMONSTRATIONS / INDEX).write_text(json.dumps(index))
    code, text = lwd("contracts", "check", DEMONSTRATIONS)
    assert code == CorruptDataError.exit_code
    assert episode.episode_id in text and "rewards.npy" in text and "fix:" in text


def test_a_stage_that_cannot_read_its_data_keeps_its_former_output(
    workspace: Path, make_episode: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (DEMONSTRATIONS, ROLLOUTS, PLAY):
        write_buffer([demonstration(make_episode, 0)], folder)
    QUARANTINE.mkdir()
    (QUARANTINE / "quarantine.json").write_text("[]")
    write_buffer([demonstration(make_episode, 1)], BUFFER)
    before = contents(BUFFER)
    (PLAY / "00000.tar").write_bytes(b"")
    assert stage(["buffer"]) == CorruptDataError.exit_code
    said = capsys.readouterr().err
    assert "stage buffer" in said and str(PLAY / "00000.tar") in said and "fix:" in said
    assert contents(BUFFER) == before


# --- episodes ---------------------------------------------------------------------------------------------------------


def broken(make: Make) -> dict[str, Episode]:
    """One episode of each kind, by the rule that names it."""
    whole = [demonstration(make, seed) for seed in range(4)]
    nan, far = whole[0].actions.copy(), whole[1].actions.copy()
    nan[3, 2] = np.nan
    far[5, 0] = 57.3
    return {
        "action-finite": dataclasses.replace(whole[0], actions=nan),
        "action-limits": dataclasses.replace(whole[1], actions=far),
        "transition-schema": dataclasses.replace(whole[2], actions=whole[2].actions[:, :4]),
        "instruction-of-task": dataclasses.replace(whole[3], task="S9"),
    }


def test_contracts_check_names_rule_value_and_owner_of_each_bad_episode(
    workspace: Path, lwd, make_episode: Make
) -> None:
    bad = broken(make_episode)
    write_buffer([*bad.values(), demonstration(make_episode, 9)], ROLLOUTS)
    before = contents(workspace)
    code, text = lwd("contracts", "check", ROLLOUTS)
    text = " ".join(text.split())
    assert code == 3
    assert "5 episodes, 4 refused" in text
    for rule, episode in bad.items():
        assert f"block {episode.episode_id} demo {episode.task}: {rule}: " in text
    assert "actions[3, 2] = nan" in text and "actions[5, 0] = 57.3" in text
    assert "(12, 4)" in text and "(12, 5)" in text and "'S9' is unknown" in text
    assert contents(workspace) == before


@pytest.mark.timeout(120)
def test_the_pipeline_sets_bad_episodes_aside_with_their_reasons_and_loses_none(
    workspace: Path, make_episode: Make
) -> None:
    bad = broken(make_episode)
    write_buffer([demonstration(make_episode, 10 + n) for n in range(8)], DEMONSTRATIONS)
    write_buffer([make_episode(20 + n, source="rollout", obs_dim=86) for n in range(4)], ROLLOUTS)
    write_buffer([*bad.values(), make_episode(30, source="play", obs_dim=86)], PLAY)
    assert stage(["validate"]) == 0
    refused = {row["episode_id"]: row for row in json.loads((QUARANTINE / "quarantine.json").read_text())}
    for rule, episode in bad.items():
        assert rule in {reason["rule"] for reason in refused[episode.episode_id]["reasons"]}
        kept = decode((QUARANTINE / f"{episode.episode_id}.tar").read_bytes())
        assert encode(kept) == encode(episode)
    assert stage(["buffer"]) == 0
    held = {episode.episode_id for episode in read_buffer(BUFFER)}
    listed = (QUARANTINE / "quarantine.json").read_text()
    one_more = json.dumps([*json.loads(listed), {"episode_id": min(held), "reasons": []}])
    for text, code in (
        ("[]", ConfigError),
        (one_more, ConfigError),
        ("[{}]", CorruptDataError),
        ("", CorruptDataError),
    ):
        (QUARANTINE / "quarantine.json").write_text(text)  # the contract decides, not this file
        assert stage(["buffer"]) == code.exit_code
        assert {episode.episode_id for episode in read_buffer(BUFFER)} == held
    assert len(held) == 13 and len(refused) == 4 and held.isdisjoint(refused)


def test_as_few_updates_as_the_parameters_allow_are_a_whole_stage(workspace: Path, make_episode: Make) -> None:
    path = workspace / "params.yaml"
    path.write_text(path.read_text().replace("updates: 3000", "updates: 3").replace("early: 1000", "early: 3"))
    write_buffer([demonstration(make_episode, seed) for seed in range(2)], DEMONSTRATIONS)
    assert stage(["sft"]) == 0
    assert json.loads(Path("metrics/sft.json").read_text())["updates"] == 3


def test_a_row_that_was_cut_short_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    path.write_bytes(b'{"update": 20, "a": 0.5}\n{"update": 40, "a"\n[]\n{}\n\xff\n{"update": 60, "a": 1.0}\n{"upda')
    assert read_rows(path) == [{"update": 20, "a": 0.5}, {"update": 60, "a": 1.0}]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"at": "x"}'])
def test_a_damaged_note_of_the_start_does_not_stop_the_demo(tmp_path: Path, text: str) -> None:
    (tmp_path / "started.json").write_text(text)
    at = _started(tmp_path)
    assert _started(tmp_path) == at > 1e9


# --- contracts --------------------------------------------------------------------------------------------------------


def test_a_typo_in_a_contract_stops_the_check_at_its_line(
    workspace: Path, lwd, make_episode: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_buffer([demonstration(make_episode, 0)], DEMONSTRATIONS)
    edited = workspace / "contracts"
    shutil.copytree(FOLDER, edited)
    monkeypatch.setenv("LWD_CONTRACTS", str(edited))
    file = edited / "transition.odcs.yaml"
    file.write_text(file.read_text().replace("check: increasing", "check: incresing"))
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "incresing" in text)
    code, text = lwd("contracts", "check", DEMONSTRATIONS)
    assert code == ConfigError.exit_code
    assert f"{file}:{line}" in text and "'incresing'" in text and "use 'increasing'" in text


def test_a_contract_that_lacks_a_column_is_refused(workspace: Path, lwd, make_episode: Make) -> None:
    write_buffer([demonstration(make_episode, 0)], DEMONSTRATIONS)
    text = (FOLDER / "offline_buffer.odcs.yaml").read_text()
    line = "      - {name: outcome, logicalType: string, required: true}\n"
    assert line in text
    file = workspace / "mine.yaml"
    file.write_text(text.replace(line, ""))
    code, said = lwd("contracts", "check", DEMONSTRATIONS, "--contract", file)
    assert code == ConfigError.exit_code
    assert f"{file}:" in said and "lacks outcome" in said and "put the columns back" in said


# --- policies and checkpoints -----------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_architecture_is_named_on_both_sides(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SFT.mkdir(parents=True)
    Learner(agent_config(), normaliser(), accelerator="cpu").save(SFT / CHECKPOINT)
    before = contents(SFT)
    OFFLINE.mkdir(parents=True)
    (OFFLINE / CHECKPOINT).write_bytes(b"of an earlier run")
    raw = yaml.safe_load((workspace / "params.yaml").read_text())
    raw["offline"]["learner"] = {**(raw["offline"].get("learner") or {}), "value_kind": "expectile"}
    (workspace / "params.yaml").write_text(yaml.safe_dump(raw))
    assert stage(["offline"]) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert str(SFT / CHECKPOINT) in said and "value_kind='distributional'" in said and "value_kind='expectile'" in said
    assert "fix:" in said
    assert contents(SFT) == before and (OFFLINE / CHECKPOINT).read_bytes() == b"of an earlier run"


def test_a_torn_checkpoint_is_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SFT.mkdir(parents=True)
    (SFT / CHECKPOINT).write_bytes(b"PK\x03\x04 and then nothing")
    assert stage(["offline"]) == CorruptDataError.exit_code
    said = capsys.readouterr().err
    assert f"{SFT / CHECKPOINT}: torn or not a checkpoint" in said and "fix:" in said


def test_a_policy_of_another_architecture_does_not_act(workspace: Path, lwd) -> None:
    bundle = scene_bundle(workspace / "bundle")
    tensors = load_file(bundle / "policy.safetensors")
    for name in ("state.weight", "observation.mean", "observation.std"):
        tensors[name] = np.ascontiguousarray(tensors[name][..., :80])
    save_file(tensors, bundle / "policy.safetensors")
    code, text = lwd("robot", bundle, "--episodes", "1")
    assert code == ConfigError.exit_code
    assert "observation.mean" in text and "80" in text and "86" in text and "fix:" in text


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_full_disk_ends_a_stage_with_the_file_and_the_fix(
    tiny_disk: Path, tmp_path: Path, make_episode: Make, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sources = {
        DEMONSTRATIONS: [demonstration(make_episode, n, steps=60) for n in range(9)],
        ROLLOUTS: [make_episode(20 + n, source="rollout", steps=60, obs_dim=86) for n in range(3)],
        PLAY: [make_episode(30 + n, source="play", steps=60, obs_dim=86) for n in range(3)],
    }
    (tiny_disk / "data").mkdir()
    for folder, episodes in sources.items():
        write_buffer(episodes, tmp_path / folder)
        (tiny_disk / folder).symlink_to(tmp_path / folder)
    (tiny_disk / QUARANTINE).mkdir()
    (tiny_disk / QUARANTINE / "quarantine.json").write_text("[]")
    shutil.copy(ROOT / "params.yaml", tiny_disk)
    before = contents(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.chdir(tiny_disk)
        assert stage(["buffer"]) == StorageFullError.exit_code
    said = capsys.readouterr().err
    assert "No space left on device" in said and str(BUFFER) in said and "fix:" in said
    assert not (tiny_disk / BUFFER / INDEX).exists()  # a buffer without an index is no buffer: nobody reads half of it
    assert contents(tmp_path / "data") == before


def test_a_full_disk_under_a_deployment_is_named(tiny_disk: Path, lwd) -> None:
    (tiny_disk / "filler").write_bytes(b"x" * 200_000)
    code, text = lwd("status", "--home", tiny_disk / "home")
    assert code == StorageFullError.exit_code
    assert str(tiny_disk) in text and "fix:" in text


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("demo",), "not inside of a DVC repository"),
        (("train",), "not inside of a DVC repository"),
        (("collect",), "not inside of a DVC repository"),
        (("online", "--params", "mine.yaml"), "mine.yaml not found"),
        (("evaluate", "--params", "bad.yaml"), "bad.yaml: online.robots"),
    ],
)
def test_what_a_flow_lacks_is_said_before_a_server_starts(workspace: Path, lwd, command, named: str) -> None:
    raw = yaml.safe_load((workspace / "params.yaml").read_text())
    raw["online"]["robots"] = -1
    (workspace / "bad.yaml").write_text(yaml.safe_dump(raw))
    before = contents(workspace)
    code, text = lwd(*command)
    assert code == ConfigError.exit_code
    assert named in text and "fix:" in text and "starting Prefect" not in text
    assert contents(workspace) == before


def test_a_stage_that_does_not_exist_is_named_with_those_that_do(
    workspace: Path, lwd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code, text = lwd("train", "--until", "offlien", "--home", workspace / "home")
    assert code == ConfigError.exit_code
    assert "no stage 'offlien'" in text and "demonstrations, sft" in " ".join(text.split())
    assert not (workspace / "home").exists()


def test_a_port_in_use_is_named_before_anything_starts(workspace: Path, lwd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = lwd("evaluate", "--home", workspace / "home", "--port", port)
    assert code == UnavailableError.exit_code
    assert f"port {port}" in text and "--port" in text
    assert not (workspace / "home").exists() and "PREFECT_API_URL" not in os.environ


def test_a_second_coordinator_ends_and_says_who_works(tmp_path: Path, make_episode: Make) -> None:
    plane = open_plane(tmp_path / "home")
    first = Coordinator(plane.catalog, plane.objects, OutboxLog(plane.catalog), lambda episode: [], holder="first:1")
    plane.submit(make_episode(1))
    assert first.step() == 1
    plane.submit(make_episode(2))
    command = [sys.executable, "-m", "infra.coordinator", "--home", str(plane.home)]
    done = subprocess.run(
        [*command, "--check", "data_contracts.checks:default_check"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == LeaseLostError.exit_code
    assert "first:1" in done.stderr and "fix:" in done.stderr
    assert first.step() == 1
    assert plane.snapshots.latest().episodes == 2
