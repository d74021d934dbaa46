"""Each bad input breaks its rule and no other that reads the same field well; a valid episode breaks none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_contracts.checks import Violation, check_episode, default_check
from data_contracts.contract import Contract, load_contract
from infra.catalog.fits import misfit
from infra.catalog.schema import episodes, snapshot_episodes
from infra.episode import OUTCOMES, SOURCES, Episode, decode, encode
from infra.fleet.features import FEATURES
from infra.fleet.scene import ACTION_DIM

Make = Callable[..., Episode]


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract("episode")


def put(array: np.ndarray[Any, Any], index: Any, value: float) -> np.ndarray[Any, Any]:
    changed = array.copy()
    changed[index] = value
    return changed


BAD: dict[str, tuple[str, Callable[[Episode], dict[str, Any]], str]] = {
    "NaN action": ("action-finite", lambda e: {"actions": put(e.actions, (3, 2), np.nan)}, "actions[3, 2]"),
    "NaN observation": (
        "observation-finite",
        lambda e: {"observations": put(e.observations, (0, 1), np.nan)},
        "[0, 1]",
    ),
    "NaN reward": ("reward-finite", lambda e: {"rewards": put(e.rewards, 2, np.nan)}, "rewards[2]"),
    "NaN time": ("timestamp-finite", lambda e: {"timestamps": put(e.timestamps, 4, np.nan)}, "timestamps[4]"),
    "NaN clock": ("started-at-finite", lambda e: {"started_at": float("nan")}, "started_at"),
    "old clock": ("started-at-range", lambda e: {"started_at": -5.0}, "outside"),
    "action too large": ("action-limits", lambda e: {"actions": put(e.actions, (7, 4), -1.001)}, "actions[7, 4]"),
    "wrong unit": ("observation-range", lambda e: {"observations": put(e.observations, (1, 0), 5e3)}, "5000"),
    "action dimension": ("transition-schema", lambda e: {"actions": e.actions[:, :4]}, "(12, 5)"),
    "float64 actions": ("transition-schema", lambda e: {"actions": e.actions.astype(np.float64)}, "float64"),
    "one-dimensional": ("transition-schema", lambda e: {"observations": e.observations[:, 0]}, "(13,)"),
    "observations cut": ("transition-schema", lambda e: {"observations": e.observations[:-1]}, "(13, 86)"),
    "one sensor less": ("transition-schema", lambda e: {"observations": e.observations[:, :-1]}, "(13, 85)"),
    "one sensor more": ("transition-schema", lambda e: {"observations": np.hstack([e.observations] * 2)}, "(13, 172)"),
    "rewards cut": ("transition-schema", lambda e: {"rewards": e.rewards[:-1]}, "(12,)"),
    "mask cut": ("transition-schema", lambda e: {"intervention": e.intervention[:-1]}, "(12,)"),
    "no array": ("transition-schema", lambda e: {"rewards": None}, "NoneType"),
    "no task": ("episode-schema", lambda e: {"task": None}, "NoneType"),
    "task a number": ("episode-schema", lambda e: {"task": 5}, "int"),
    "score a string": ("episode-schema", lambda e: {"substep_scores": ("1",)}, "str"),
    "version a truth value": ("episode-schema", lambda e: {"policy_version": True}, "bool"),
    "version too long": ("episode-schema", lambda e: {"policy_version": 10**400}, "int"),
    "time stands still": ("timestamp-increasing", lambda e: {"timestamps": put(e.timestamps, 3, 0.1)}, "step 2"),
    "time of the epoch": (
        "timestamp-starts-at-zero",
        lambda e: {"timestamps": e.timestamps + 1.7956e9},
        "timestamps[0] = 1.7956e+09",
    ),
    "time of the robot's start": ("timestamp-starts-at-zero", lambda e: {"timestamps": e.timestamps + 100}, "100"),
    "time before the start": ("timestamp-starts-at-zero", lambda e: {"timestamps": e.timestamps - 5}, "-5"),
    "an attempt of days": ("timestamp-range", lambda e: {"timestamps": e.timestamps * 1e6}, "outside"),
    "a sensor that hangs": (
        "observation-changes",
        lambda e: {"observations": np.ascontiguousarray(np.broadcast_to(e.observations[0], (13, 86)))},
        "all 13 rows",
    ),
    "no measurement": ("observation-magnitude", lambda e: {"observations": put(e.observations, (2, 1), 1e30)}, "1e+30"),
    "slow": ("control-period", lambda e: {"timestamps": e.timestamps * 1.4}, "0.07"),
    "jitter": ("control-jitter", lambda e: {"timestamps": e.timestamps + (np.arange(13) > 5) * 0.04}, "0.09"),
    "reward of 2": ("reward-allowed", lambda e: {"rewards": put(e.rewards, 0, 2)}, "rewards[0]"),
    "early reward": ("reward-only-at-end", lambda e: {"rewards": put(e.rewards, 4, 1)}, "rewards[4]"),
    "success without reward": ("outcome-matches-reward", lambda e: {"rewards": put(e.rewards, -1, 0)}, "success"),
    "reward without success": ("outcome-matches-reward", lambda e: {"outcome": "failure"}, "failure"),
    "unknown outcome": ("outcome-allowed", lambda e: {"outcome": "won"}, "won"),
    "unknown source": ("source-allowed", lambda e: {"source": "web"}, "web"),
    "unknown task": ("instruction-of-task", lambda e: {"task": "S9"}, "S9"),
    "another instruction": ("instruction-of-task", lambda e: {"instruction": "dance"}, "open the drawer"),
    "bad score": ("substep-scores-allowed", lambda e: {"substep_scores": (0.3,)}, "0.3"),
    "NaN score": ("substep-scores-finite", lambda e: {"substep_scores": (float("nan"),)}, "not finite"),
    "scores missing": ("substeps-of-task", lambda e: {"substep_scores": ()}, "0 sub-step"),
    "no version": ("policy-version-by-source", lambda e: {"policy_version": None}, "online"),
    "version of 2^40": ("policy-version-limit", lambda e: {"policy_version": 2**40}, "above"),
    "clock beyond the calendar": ("started-at-calendar", lambda e: {"started_at": 1e300}, "1e+300"),
    "task of 65 characters": ("task-pattern", lambda e: {"task": "S" * 65}, "does not match"),
    "task with a NUL": ("task-pattern", lambda e: {"task": "S1\0"}, "does not match"),
    "negative version": ("policy-version-range", lambda e: {"policy_version": -1}, "below 0"),
    "path as robot": ("robot-id-pattern", lambda e: {"robot_id": "../r0"}, "../r0"),
    "newline in robot": ("robot-id-pattern", lambda e: {"robot_id": "r0\n"}, "r0"),
    "path as id": ("episode-id-pattern", lambda e: {"episode_id": "../../etc"}, "etc"),
    "newer format": ("schema-version-known", lambda e: {"schema_version": 2}, "2"),
}


def rules(found: list[Violation]) -> set[str]:
    return {one.rule for one in found}


@pytest.mark.parametrize("success", [True, False])
def test_valid_episode_passes(contract: Contract, make_episode: Make, success: bool) -> None:
    episode = make_episode(1, success=success)
    assert check_episode(contract, episode) == []
    assert default_check(decode(encode(episode))) == []


@pytest.mark.parametrize("name", BAD)
def test_bad_input_breaks_its_rule(contract: Contract, make_episode: Make, name: str) -> None:
    rule_id, change, part = BAD[name]
    episode = make_episode(2)
    found = check_episode(contract, replace(episode, **change(episode)))
    mine = [one for one in found if one.rule == rule_id]
    assert mine, found
    rule = contract.rule(rule_id)
    assert part in mine[0].message
    assert (mine[0].severity, mine[0].owner) == (rule.severity, rule.owner)


def test_every_rule_has_a_bad_input(contract: Contract) -> None:
    elsewhere = {"steps-of-task", "outcome-by-source", "intervention-by-source", "episode-unique"}  # below, and suites
    assert {rule.id for rule in contract.rules} == {rule for rule, _, _ in BAD.values()} | elsewhere


def test_demonstrations(contract: Contract, make_episode: Make) -> None:
    good = {"source": "demo", "policy_version": None}
    assert not check_episode(contract, make_episode(3, **good))
    assert rules(check_episode(contract, make_episode(3, success=False, **good))) == {"outcome-by-source"}
    taken_over = make_episode(3, **good, intervention=np.ones(12, bool))
    assert rules(check_episode(contract, taken_over)) == {"intervention-by-source"}
    assert rules(check_episode(contract, make_episode(3, source="demo"))) == {"policy-version-by-source"}


@pytest.mark.parametrize("source", ["rollout", "play"])
def test_offline_sources_need_no_published_version(contract: Contract, make_episode: Make, source: str) -> None:
    assert not check_episode(contract, make_episode(3, source=source, policy_version=None))


@pytest.mark.parametrize(("steps", "broken"), [(1, set()), (80, set()), (81, {"steps-of-task"})])
def test_steps(contract: Contract, make_episode: Make, steps: int, broken: set[str]) -> None:
    assert rules(check_episode(contract, make_episode(4, steps=steps))) == broken


def test_no_steps_at_all(contract: Contract, make_episode: Make) -> None:
    episode = make_episode(4)
    empty = replace(
        episode,
        observations=episode.observations[:1],
        actions=episode.actions[:0],
        rewards=episode.rewards[:0],
        intervention=episode.intervention[:0],
        timestamps=episode.timestamps[:1],
    )
    assert rules(check_episode(contract, empty)) == {"transition-schema"}


def test_tolerance_of_the_action_limits(contract: Contract, make_episode: Make) -> None:
    episode = make_episode(5)
    assert not check_episode(contract, replace(episode, actions=put(episode.actions, (0, 0), 1.000005)))


def test_pinned_observation_dimension(contract: Contract, make_episode: Make) -> None:
    pinned = replace(contract, observation_dim=8)
    assert not check_episode(pinned, make_episode(6, obs_dim=8))
    assert rules(check_episode(pinned, make_episode(6, obs_dim=7))) == {"transition-schema"}


def test_the_packaged_contract_pins_the_sizes_of_the_fleets_arms(contract: Contract) -> None:
    assert (contract.observation_dim, contract.action_dim) == (len(FEATURES), ACTION_DIM)


def test_the_packaged_contract_asks_for_no_more_than_the_catalog_keeps(contract: Contract) -> None:
    """What the contract accepts fits the columns: the widest value that each of its rules lets pass does."""
    widest = {
        "task": max(contract.tasks, key=len),
        "source": max(SOURCES, key=len),
        "outcome": max(OUTCOMES, key=len),
        "policy_version": contract.rule("policy-version-limit").parameters["max"],
        "steps": max(terms.max_steps for terms in contract.tasks.values()),
    }
    assert misfit(snapshot_episodes, widest) is None
    assert misfit(episodes, {"robot_id": "r" * 64}) is None and misfit(episodes, {"robot_id": "r" * 65}) is not None


def test_a_first_time_within_one_period_is_the_start(contract: Contract, make_episode: Make) -> None:
    late = make_episode(1)
    assert not check_episode(contract, replace(late, timestamps=late.timestamps + 0.01))


def test_a_message_is_short_whatever_the_robot_wrote(contract: Contract, make_episode: Make) -> None:
    for field in ("task", "instruction", "source", "outcome", "robot_id", "episode_id"):
        for one in check_episode(contract, replace(make_episode(1), **{field: "\x1b[31m" + "x" * 10**6})):
            assert len(one.message) < 600 and "\x1b" not in one.message
