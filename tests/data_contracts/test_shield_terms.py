"""The contract's limits reach the robot's shield: the rules' own numbers, and the custom property's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from data_contracts.contract import FOLDER, load_contract
from data_contracts.shield import default_shield, shield_of
from infra.edge.shield import Limits, Workspace
from infra.errors import ConfigError


def test_the_packaged_contract_gives_limits_that_can_be_kept() -> None:
    limits = Limits.of(default_shield())
    assert limits.low == (-1.0,) * 5 and limits.high == (1.0,) * 5 and limits.period_s == 0.05
    assert isinstance(limits.workspace, Workspace) and limits.hold == "zero"


def test_a_contract_without_the_property_gives_what_its_rules_say() -> None:
    contract = replace(load_contract("episode"), shield=None)
    assert shield_of(contract) == {"action_dim": 5, "low": -1, "high": 1, "period_s": 0.05}


@pytest.mark.parametrize("field", ["low", "high", "period_s", "action_dim"])
def test_a_limit_is_said_once(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is said twice"):
        shield_of(replace(load_contract("episode"), shield={field: 1}))


def test_a_contract_without_a_range_of_actions_is_named() -> None:
    contract = load_contract("episode")
    rules = tuple(rule for rule in contract.rules if rule.id != "action-limits")
    with pytest.raises(ConfigError, match="no blocking range of actions"):
        shield_of(replace(contract, rules=rules))


def test_a_property_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    path = tmp_path / "transition.odcs.yaml"
    text = path.read_text()
    begin, end = text.index("  - property: shield"), text.index("schema:\n")
    path.write_text(text[:begin] + "  - property: shield\n    value: 3\n" + text[end:])
    with pytest.raises(ConfigError, match="shield is 3"):
        load_contract(tmp_path / "episode.odcs.yaml")
