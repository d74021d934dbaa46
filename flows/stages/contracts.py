"""Stage `contracts`: the contracts in force, those of LWD_CONTRACTS before the packaged ones → data/contracts.

The stages that read a contract depend on this copy: DVC sees neither the variable nor the folder that it names.
"""

from __future__ import annotations

import shutil

from data_contracts.contract import NAMES, contract_path, load_contract
from data_contracts.shield import default_shield
from flows.params import Params
from flows.stages.common import CONTRACTS, fresh_folder, put_in_place
from infra.edge.shield import Limits


def run(params: Params) -> None:
    """Raises ConfigError where a contract or its shield is wrong, before anything is collected."""
    Limits.of(default_shield())
    part = fresh_folder(CONTRACTS)
    for name in NAMES:
        load_contract(name)
        shutil.copyfile(contract_path(name), part / contract_path(name).name)
    put_in_place(part, CONTRACTS)
