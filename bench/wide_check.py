"""The packaged contract for episodes of any width: robots of the benchmarks send images' worth in each observation."""

from __future__ import annotations

import functools
from dataclasses import replace

from data_contracts.checks import Violation, check_episode, default_contract
from data_contracts.contract import Contract
from infra.episode import Episode


@functools.cache
def _contract() -> Contract:
    return replace(default_contract(), observation_dim=None)


def wide_check(episode: Episode) -> list[Violation]:
    """Every rule of the episode contract but the size of an observation: `--check bench.wide_check:wide_check`."""
    return check_episode(_contract(), episode)
