"""dvc.yaml is the one description of the stages, and every stage in it can be run."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench.workspace import freeze
from data_contracts.contract import FOLDER
from flows import pipeline
from flows.stages.__main__ import NAMES, main
from infra.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_stages_come_in_the_order_of_their_dependencies(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = pipeline.stages()
    assert set(names) == set(NAMES)
    for before, after in (
        ("demonstrations", "sft"),
        ("sft", "rollouts"),
        ("validate", "buffer"),
        ("offline", "evaluate"),
    ):
        assert names.index(before) < names.index(after)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_is_a_module_and_a_command_of_dvc_yaml(name):
    assert callable(importlib.import_module(f"flows.stages.{name}").run)
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]
    assert stage["cmd"] == f"python -m flows.stages {name}"
    assert f"flows/stages/{name}.py" in stage["deps"]


# What a stage imports and its result does not depend on: how it speaks and how its errors are named.
_NO_INPUT = {"flows.console", "flows.params", "infra.errors", "flows.stages.common", "flows.stages.validate"}


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_depends_on_what_it_reads(name):
    tree = ast.parse((ROOT / "flows" / "stages" / f"{name}.py").read_text())
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params"
    }
    assert read <= {key.partition(".")[0] for key in stage.get("params", [])}
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    for module in imported - _NO_INPUT - {"__future__"}:
        if module.partition(".")[0] in ("flows", "infra", "lwd_model", "data_contracts") and name != "contracts":
            places = {part for dep in stage["deps"] for part in [dep.removesuffix(".py").replace("/", ".")]}
            assert any(module == place or module.startswith(place + ".") for place in places), module
    if "data_contracts" in stage["deps"] and imported & {
        "data_contracts.contract", "flows.stages.checked", "flows.evaluation",
    }:  # fmt: skip
        assert "data/contracts" in stage["deps"]


def test_contracts_of_another_folder_are_another_input(tmp_path, monkeypatch):
    folder = freeze(tmp_path / "ws", {})
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("LWD_CONTRACTS", raising=False)
    pipeline.run("contracts")
    packaged = Path("data/contracts/transition.odcs.yaml").read_text()
    assert packaged == (FOLDER / "transition.odcs.yaml").read_text()
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "transition.odcs.yaml").write_text(packaged.replace("min: -1, max: 1,", "min: -0.5, max: 0.5,"))
    monkeypatch.setenv("LWD_CONTRACTS", str(edited))
    pipeline.run("contracts")  # without being asked: nothing that DVC looks at has changed
    assert Path("data/contracts/transition.odcs.yaml").read_text() == (edited / "transition.odcs.yaml").read_text()


def test_a_stage_that_does_not_exist_is_refused(capsys):
    assert main(["demonstration"]) == 2


def test_a_failing_stage_says_what_is_wrong_and_exits_with_its_code(tmp_path):
    folder = freeze(tmp_path / "ws", {"tasks": ["S9"]})
    command = [sys.executable, "-m", "flows.stages", "demonstrations"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == ConfigError.exit_code
    assert "S9" in done.stderr
    assert "fix:" in done.stderr


def test_dvc_runs_a_stage_once_and_then_takes_it_from_the_last_run(tmp_path, monkeypatch):
    folder = freeze(tmp_path / "ws", {"tasks": ["S1"], "workers": 1, "demonstrations": {"per_task": 2}})
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    assert pipeline.run("demonstrations") is True
    assert Path("data/demonstrations/index.json").exists()
    assert pipeline.run("demonstrations") is False


def test_outside_a_repository_is_said_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"dvc\.yaml"):
        pipeline.stages()
