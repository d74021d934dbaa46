"""What the transition contract says of a robot's shield, as plain values: robots read it with `Limits.of`.

The action's limits are those of the rule `action-limits` and the control period that of `control-period`: the robot
enforces what the contract checks afterwards. The custom property `shield` adds the rest.
"""

from __future__ import annotations

from typing import Any

from data_contracts.checks import default_contract
from data_contracts.contract import Contract
from data_contracts.rules import Rule
from infra.errors import ConfigError


def shield_of(contract: Contract) -> dict[str, Any]:
    """Fields of `infra.edge.shield.Limits` and `action_dim`.

    Raises:
        ConfigError: the contract has no range for actions, or its shield says again what a rule says.
    """
    given = dict(contract.shield or {})
    for name in ("low", "high", "period_s", "action_dim"):
        if name in given:
            raise ConfigError(
                f"{contract.path}: shield: {name} is said twice",
                "leave it to the rules action-limits and control-period, and to action_dim",
            )
    limits = _first(contract, "range", "actions")
    if limits is None or not {"min", "max"} <= limits.parameters.keys():
        raise ConfigError(
            f"{contract.path} has no blocking range of actions with min and max: a shield has nothing to keep to",
            "put the rule action-limits back",
        )
    period = _first(contract, "period", "timestamps")
    nominal = {"period_s": float(period.parameters["nominal"])} if period is not None else {}
    bounds = {"low": limits.parameters["min"], "high": limits.parameters["max"]}
    return {"action_dim": contract.action_dim, **bounds, **nominal, **given}


def default_shield() -> dict[str, Any]:
    """`shield_of` the contract in force: `--shield data_contracts.shield:default_shield`."""
    return shield_of(default_contract())


def _first(contract: Contract, check: str, field: str) -> Rule | None:
    return next((rule for rule in contract.rules if rule.check == check and rule.field == field), None)
