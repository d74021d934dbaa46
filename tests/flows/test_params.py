"""Parameters are validated before anything runs, and the repository's own are valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bench.learning import SUITES
from bench.workspace import freeze, merged
from flows.params import Params, load_params
from infra.errors import ConfigError
from infra.fleet.tasks import TASKS

ROOT = Path(__file__).parents[2]


def test_the_repositorys_parameters_are_valid():
    params = load_params(ROOT / "params.yaml")
    assert set(params.tasks) <= set(TASKS)
    assert params.sft.early < params.sft.updates


@pytest.mark.parametrize("suite", SUITES)
def test_the_benchmarks_parameters_are_valid(suite):
    base = yaml.safe_load((ROOT / "params.yaml").read_text())
    _, path = SUITES[suite]
    params = Params.model_validate(merged(base, yaml.safe_load(path.read_text())))
    assert suite != "full" or params.tasks == tuple(TASKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft": {"updatess": 3}}, "sft.updatess"),
        ({"online": {"operator": 1.5}}, "online.operator"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["S1", "S9"]}, "tasks: 'S9'"),
        ({"tasks": ["S1", "S1"]}, "tasks: one stands twice"),
        ({"seed": -1}, "seed"),
        ({"faults": {"planted": True}}, "faults.planted.*switch"),
        ({"sft": {"refused_max": True}}, "sft.refused_max.*switch"),
        ({"sft": {"early": 3001}}, "sft.early"),
        ({"play": {"per_task": 0}}, "play.per_task"),
        ({"policy": {"preset": "stat"}}, "policy.preset"),
        ({"policy": {"noise_scale": float("inf")}}, "policy.noise_scale.*finite"),
        ({"online": {"updates_per_episode": float("inf")}}, "updates_per_episode.*finite"),
        ({"online": {"learner": {"polcy_lr": 0.1}}}, "online.learner.*'polcy_lr'"),
        ({"offline": {"learner": {"policy_lr": float("nan")}}}, "offline.learner.*not finite"),
        ({"offline": {"learner": {"updates": 7}}}, "offline.updates"),
        ({"online": {"learner": {"tau_base": 0.7}}}, "online.tau_base"),
    ],
)
def test_a_wrong_parameter_is_named(tmp_path, change, message):
    base = yaml.safe_load((ROOT / "params.yaml").read_text())
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(merged(base, change)))
    with pytest.raises(ConfigError, match=message):
        load_params(path)


def test_a_number_is_read_as_it_was_meant(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("learner: {} ", "learner: {policy_lr: 1e-3} ").replace("seed: 0\n", "seed: 010\n"))
    params = load_params(path)
    assert params.offline.learner == {"policy_lr": 0.001} and params.seed == 10


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"params.yaml not found"):
        load_params(tmp_path / "params.yaml")


def test_a_frozen_workspace_keeps_its_code_and_parameters(tmp_path):
    folder = freeze(tmp_path / "ws", {"seed": 7})
    (folder / "flows" / "params.py").write_text("# edited")
    assert freeze(folder, {"seed": 8}) == folder
    assert load_params(folder / "params.yaml").seed == 7
    assert (folder / "flows" / "params.py").read_text() == "# edited"
    assert (folder / ".dvc").is_dir()
