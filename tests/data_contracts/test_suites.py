"""Great Expectations and the plain code judge the same episodes alike; the buffer's composition is bounded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data_contracts.checks import check_episode
from data_contracts.contract import Contract, load_contract
from data_contracts.frames import frames
from data_contracts.suites import BatchReport, default_batch_check, validate_batch, validate_buffer, validate_frames
from infra.episode import Episode
from infra.errors import ConfigError

Make = Callable[..., Episode]


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract("episode")


@pytest.fixture(scope="module")
def buffer_contract() -> Contract:
    return load_contract("offline_buffer")


ODD = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 0.5, 1.0, 1.00001, 1.000011, -1.0, -1.5, 2.0, 1000.0, 1e4])


@st.composite
def damage(draw: st.DrawFn) -> dict[str, Any]:
    """What to do to one valid episode: odd values somewhere in its arrays, odd fields, wrong shapes."""
    names = st.sampled_from(["observations", "actions", "rewards", "timestamps"])
    fields: dict[str, st.SearchStrategy[Any]] = {
        "task": st.sampled_from(["S1", "S4", "S9", "", 3]),
        "instruction": st.sampled_from(["open the drawer", "unlock and open the window", "dance"]),
        "source": st.sampled_from(["demo", "rollout", "play", "online", "web"]),
        "outcome": st.sampled_from(["success", "failure", "time_limit", "won"]),
        "policy_version": st.sampled_from([None, 0, 3, -1, 2.5, True]),
        "substep_scores": st.lists(st.sampled_from([0, 0.5, 1, 0.3, float("nan")]), max_size=3).map(tuple),
        "started_at": st.sampled_from([0, 1.7e9, -1.0, 5e9, 1e300, float("nan"), float("inf"), "now"]),
        "schema_version": st.sampled_from([1, 2]),
        "robot_id": st.sampled_from(["r0", "../r0", "", "r0\n", "r" * 65]),
    }
    return {
        "fields": {name: draw(fields[name]) for name in draw(st.lists(st.sampled_from(list(fields)), max_size=3))},
        "values": draw(st.lists(st.tuples(names, st.integers(0, 10**6), ODD), max_size=3)),
        "shape": draw(st.sampled_from([None] * 6 + ["actions", "rewards", "timestamps", "float64"])),
        "steps": draw(st.sampled_from([1, 2, 12, 81])),
        "intervention": draw(st.booleans()),
        "later": draw(st.sampled_from([0.0, 0.0, 0.05, 100.0, -5.0])),
        "hangs": draw(st.sampled_from([False, False, True])),
        "stretch": draw(st.sampled_from([1.0, 1.0, 0.8, 1.21, 2.0])),
    }


def damaged(make: Make, seed: int, how: dict[str, Any]) -> Episode:
    episode = make(seed, steps=how["steps"])
    arrays = {name: getattr(episode, name).copy() for name in ("observations", "actions", "rewards", "timestamps")}
    arrays["timestamps"] *= how["stretch"]
    arrays["timestamps"] += how["later"]
    if how["hangs"]:
        arrays["observations"][:] = arrays["observations"][0]
    for name, at, value in how["values"]:
        arrays[name].flat[at % arrays[name].size] = value
    if how["shape"] == "float64":
        arrays["rewards"] = arrays["rewards"].astype(np.float64)
    elif how["shape"]:
        arrays[how["shape"]] = arrays[how["shape"]][:-1]
    return replace(episode, **arrays, intervention=np.full(how["steps"], how["intervention"]), **how["fields"])


def broken(report: BatchReport) -> set[tuple[str, str]]:
    return {(one.rule, episode_id) for one in report.results for episode_id in one.episodes}


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a suite takes a second: shrinking a failure would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(damage(), min_size=6, max_size=20))
def test_agrees_with_plain_code(contract: Contract, make_episode: Make, how: list[dict[str, Any]]) -> None:
    episodes = [damaged(make_episode, seed, one) for seed, one in enumerate(how)]
    plain = {(one.rule, e.episode_id) for e in episodes for one in check_episode(contract, e)}
    report = validate_batch(contract, episodes)
    assert broken(report) == plain
    blocked = any(contract.rule(rule).severity == "block" for rule, _ in plain)
    assert report.success == (not blocked)


def test_valid_batch_passes_every_rule(contract: Contract, make_episode: Make) -> None:
    report = validate_batch(contract, [make_episode(seed, success=seed % 2 == 0) for seed in range(6)])
    assert report.success and not report.violations and report.n == 6
    assert [one.rule for one in report.results] == [one.id for one in contract.rules]


def test_empty_batch_passes(contract: Contract) -> None:
    assert validate_batch(contract, []).success


def test_transition_contract_alone(make_episode: Make) -> None:
    episode = make_episode(1, task="no such task")
    report = validate_batch(load_contract("transition"), [replace(episode, actions=episode.actions * 3)])
    assert [one.rule for one in report.violations] == ["action-limits"]


def test_warning_does_not_fail_the_batch(contract: Contract, make_episode: Make) -> None:
    episode = make_episode(1)
    report = validate_batch(contract, [replace(episode, timestamps=episode.timestamps * 1.3)])
    assert report.success
    assert [(one.rule, one.severity) for one in report.violations] == [("control-period", "warn")]


def test_episode_twice_in_a_batch(contract: Contract, make_episode: Make) -> None:
    report = validate_batch(contract, [make_episode(1), make_episode(2), make_episode(1)])
    assert broken(report) == {("episode-unique", make_episode(1).episode_id)}
    assert not report.success


@pytest.mark.parametrize(
    ("table", "column", "rule"),
    [("steps", "actions_not_finite", "action-finite"), ("episodes", "source", "source-allowed")],
)
def test_missing_column_breaks_its_rule(
    contract: Contract, make_episode: Make, table: str, column: str, rule: str
) -> None:
    tables = frames(contract, [make_episode(1)])
    report = validate_frames(contract, replace(tables, **{table: getattr(tables, table).drop(columns=column)}), 1)
    message = next(one.message for one in report.violations if one.rule == rule)
    assert table in message and column in message
    assert not report.success


def test_violations_by_episode(make_episode: Make) -> None:
    bad = make_episode(2, robot_id="a b")
    found = default_batch_check([make_episode(1), bad])
    assert {key: [one.rule for one in value] for key, value in found.items()} == {bad.episode_id: ["robot-id-pattern"]}


def buffer(make: Make, **counts: int) -> list[Episode]:
    """Episodes by `TASK_source=count`; every second rollout and play succeeds."""
    episodes: list[Episode] = []
    for key, count in counts.items():
        task, source = key.split("_")
        for number in range(count):
            success = source == "demo" or number % 2 == 0
            episodes.append(make(len(episodes), task=task, source=source, success=success))
    return episodes


def names(report: BatchReport) -> set[str]:
    return {one.rule for one in report.violations}


def test_balanced_buffer_passes(buffer_contract: Contract, make_episode: Make) -> None:
    sources = ("demo", "rollout", "play")
    report = validate_buffer(buffer_contract, buffer(make_episode, **{f"{t}_{s}": 12 for t in "AB" for s in sources}))
    assert report.success and not report.violations


def test_bad_buffers(buffer_contract: Contract, make_episode: Make) -> None:
    no_demonstration = buffer(make_episode, A_demo=12, A_rollout=12, A_play=12, B_rollout=12, B_play=12)
    report = validate_buffer(buffer_contract, no_demonstration)
    assert not report.success
    first = next(one for one in report.violations if one.severity == "block")
    assert first.rule == "buffer-demonstrations-per-task" and "B demo: 0" in first.message and first.owner

    repeated = buffer(make_episode, A_demo=12, A_rollout=12, A_play=12)
    report = validate_buffer(buffer_contract, [*repeated, repeated[3]])
    assert names(report) == {"buffer-unique"} and repeated[3].episode_id in report.violations[0].message

    assert "buffer-size" in names(validate_buffer(buffer_contract, buffer(make_episode, A_demo=2)))
    assert "buffer-size" in names(validate_buffer(buffer_contract, []))
    assert "buffer-demonstration-share" in names(validate_buffer(buffer_contract, buffer(make_episode, A_demo=20)))

    few = buffer(make_episode, A_demo=12, A_rollout=12, A_play=3)
    report = validate_buffer(buffer_contract, few)
    assert report.success and names(report) == {"buffer-sources-per-task"}

    uneven = buffer(make_episode, A_demo=400, A_rollout=400, A_play=400, B_demo=10, B_rollout=10, B_play=10)
    assert names(validate_buffer(buffer_contract, uneven)) == {"buffer-task-balance"}

    all_succeed = [replace(one, outcome="success") for one in few]
    assert "buffer-rollout-success" in names(validate_buffer(buffer_contract, all_succeed))


def test_wrong_contract_is_refused(contract: Contract, buffer_contract: Contract) -> None:
    with pytest.raises(ConfigError, match="offline_buffer"):
        validate_buffer(contract, [])
    with pytest.raises(ConfigError, match="'episode'"):
        validate_batch(buffer_contract, [])


def test_plain_checks_load_no_tables() -> None:
    """The coordinator must not pay for pandas and Great Expectations, nor hold their memory."""
    code = "import sys, data_contracts.checks; print({'pandas', 'great_expectations'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
