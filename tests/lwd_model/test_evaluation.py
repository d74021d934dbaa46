"""Episodes to results to the record of a method."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest

from infra.episode import Episode
from infra.errors import ConfigError, CorruptDataError
from lwd_model.evaluation import EpisodeResult, method_record, result_of, safety_counters
from lwd_model.statistics import wilson


def result(task: str, seed: int, success: bool, score: float = 0.5, seconds: float = 3.0) -> EpisodeResult:
    return EpisodeResult(task, seed, success, 1.0 if success else score, seconds, 60)


def test_failures_count_at_the_limit(make_episode: Callable[..., Episode]) -> None:
    won = make_episode(0, steps=40, success=True, extra={"seed": 7})
    stopped = make_episode(1, steps=10, success=False, extra={"seed": 8})
    length = float(won.timestamps[-1] - won.timestamps[0])
    assert result_of(won, limit_s=100.0).cycle_time_s == pytest.approx(length)
    assert result_of(won, limit_s=length / 2).cycle_time_s == pytest.approx(length / 2)
    assert result_of(stopped, limit_s=5.0).cycle_time_s == 5.0
    assert result_of(stopped).cycle_time_s == pytest.approx(stopped.timestamps[-1] - stopped.timestamps[0])
    assert (result_of(won).seed, result_of(won, seed=3).seed) == (7, 3)


def test_an_episode_without_seed_cannot_be_paired(make_episode: Callable[..., Episode]) -> None:
    with pytest.raises(ConfigError, match="has no seed"):
        result_of(make_episode(0, extra={}))


def test_safety_counters(make_episode: Callable[..., Episode]) -> None:
    clean = make_episode(0, steps=10)
    assert safety_counters(clean) == {}
    actions = clean.actions.copy()
    actions[2, 0], actions[3, 1], actions[4, 0] = 1.2, np.nan, 1.00001
    dirty = dataclasses.replace(clean, actions=actions, extra={"safety": {"emergency_stop": 2, "collision": 0}})
    assert safety_counters(dirty) == {"action_limit": 1, "emergency_stop": 2, "non_finite": 1}


def test_record_averages_over_tasks_and_groups() -> None:
    run = [result("S1", i, i < 8) for i in range(10)] + [result("L1", i, i < 10, 0.25) for i in range(20)]
    record = method_record([run], updates=100, env_steps=5)
    assert record["success"]["mean"] == pytest.approx((0.8 + 0.5) / 2)
    assert record["short"]["mean"] == pytest.approx(0.8)
    assert record["long"]["mean"] == pytest.approx(0.5)
    assert record["score"]["mean"] == pytest.approx(((8 + 2 * 0.5) / 10 + (10 + 10 * 0.25) / 20) / 2)
    assert list(record["per_task"]) == ["S1", "L1"]
    assert (record["per_task"]["L1"]["n"], record["per_task"]["L1"]["k"]) == (20, 10)
    assert (record["updates"], record["env_steps"]) == (100, 5)
    for name in ("success", "short", "long", "score", "cycle_time_s"):
        interval = record[name]
        assert interval["low"] <= interval["mean"] <= interval["high"]
    json.dumps(record, allow_nan=False)


def test_seeds_are_summed_and_widen_the_interval() -> None:
    def run(k: int) -> list[EpisodeResult]:
        return [result("S1", i, i < k) for i in range(50)]

    same, apart = method_record([run(35)] * 3), method_record([run(20), run(35), run(50)])
    assert (apart["per_task"]["S1"]["n"], apart["per_task"]["S1"]["k"]) == (150, 105)
    assert apart["success"]["mean"] == pytest.approx(same["success"]["mean"])
    assert apart["success"]["high"] - apart["success"]["low"] > 2 * (same["success"]["high"] - same["success"]["low"])


def test_perfect_success_is_not_certain() -> None:
    record = method_record([[result("S1", i, True) for i in range(20)]])
    assert record["success"]["low"] == pytest.approx(wilson(20, 20).low)
    assert record["long"] is None


def test_results_survive_json() -> None:
    before = EpisodeResult("S1", 3, False, 0.5, 2.0, 40, {"collision": 1})
    assert EpisodeResult.from_dict(json.loads(json.dumps(before.as_dict()))) == before
    with pytest.raises(CorruptDataError, match="sucess"):
        EpisodeResult.from_dict({"task": "S1", "seed": 1, "sucess": True})


def test_nothing_evaluated_is_an_error() -> None:
    with pytest.raises(ConfigError, match="without episodes"):
        method_record([])
    with pytest.raises(ConfigError, match="without episodes"):
        method_record([[]])
