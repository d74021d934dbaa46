"""The gate: what passes, what fails, what waits; asked again and again; bad gate files named."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from bench.gate_nulls import simulate
from flows.gate import DEFAULT_GATE, GateSpec, Verdict, decide, episodes_at, level_at, load_gate, trace, verdicts
from infra.errors import ConfigError
from lwd_model.evaluation import EpisodeResult

TASKS = ("S1", "S2", "S3", "S4")


def episodes(rates: dict[str, float] | float, n: int, seed: int, first: int = 0) -> list[EpisodeResult]:
    """n episodes a task with the given success rates, spread evenly over the seeds in a random order."""
    rng = np.random.default_rng(seed)
    table = rates if isinstance(rates, dict) else dict.fromkeys(TASKS, rates)
    out = []
    for task, rate in table.items():
        won = rng.permutation(np.arange(n) < round(rate * n))
        out += [EpisodeResult(task, first + i, bool(w), float(w), 2.0, 40) for i, w in enumerate(won)]
    return out


def changed(**sections: object) -> GateSpec:
    return GateSpec.model_validate(load_gate().model_dump() | sections)


@pytest.fixture(scope="module")
def spec() -> GateSpec:
    return load_gate()


def test_a_clear_gain_passes(spec: GateSpec) -> None:
    decision = decide(spec, episodes(0.84, 50, 1), episodes(0.60, 50, 2))
    assert decision.verdict is Verdict.PASS
    assert decision.evidence["paired_by_seed"] and decision.evidence["episodes_per_task"] == 50
    pooled = decision.evidence["pooled"]
    assert pooled["e_better"] >= 20
    assert 0 < pooled["difference"]["low"] < 0.24 < pooled["difference"]["high"]
    json.dumps(decision.as_dict(), allow_nan=False)


def test_too_little_evidence_never_promotes(spec: GateSpec) -> None:
    for n in range(1, spec.episodes.min):
        assert decide(spec, episodes(1.0, n, 1), episodes(0.0, n, 2)).verdict is Verdict.CONTINUE
    assert decide(spec, episodes(1.0, spec.episodes.min, 1), episodes(0.0, 20, 2)).verdict is Verdict.PASS
    nothing = decide(spec, [], episodes(0.5, 50, 2))
    assert nothing.verdict is Verdict.CONTINUE and "0 paired episodes" in nothing.reasons[0]


def test_no_difference_waits_then_fails_at_the_budget(spec: GateSpec) -> None:
    waiting = decide(spec, episodes(0.7, 50, 1), episodes(0.7, 50, 2))
    assert waiting.verdict is Verdict.CONTINUE and "not yet shown better" in waiting.reasons[-1]
    spent = decide(spec, episodes(0.7, 200, 3), episodes(0.7, 200, 4))
    assert spent.verdict is Verdict.FAIL and "budget of 200" in spent.reasons[0]


def test_a_worse_candidate_fails_before_the_budget(spec: GateSpec) -> None:
    decision = decide(spec, episodes(0.5, 60, 1), episodes(0.85, 60, 2))
    assert decision.verdict is Verdict.FAIL
    assert any("shown not to be better" in reason for reason in decision.reasons)


def test_one_ruined_task_fails_however_good_the_rest(spec: GateSpec) -> None:
    champion = episodes(0.6, 50, 2)
    candidate = episodes({"S1": 0.1, "S2": 0.98, "S3": 0.98, "S4": 0.98}, 50, 1)
    decision = decide(spec, candidate, champion)
    assert decision.verdict is Verdict.FAIL
    assert decision.reasons[0].startswith("S1: shown worse")
    assert decision.evidence["pooled"]["e_better"] >= 20


def test_a_task_that_looks_worse_holds(spec: GateSpec) -> None:
    champion = episodes({"S1": 0.7, "S2": 0.5, "S3": 0.5, "S4": 0.5}, 50, 2)
    candidate = episodes({"S1": 0.6, "S2": 0.9, "S3": 0.9, "S4": 0.9}, 50, 1)
    decision = decide(spec, candidate, champion)
    assert decision.verdict is Verdict.CONTINUE
    assert decision.reasons == ("S1: looks worse than the champion by more than 0.05 (observed -0.10)",)


def test_strict_rule_asks_each_task_to_be_shown(spec: GateSpec) -> None:
    strict = changed(per_task={"margin": 0.05, "rule": "shown"})
    even = {"S1": 0.7, "S2": 0.95, "S3": 0.95, "S4": 0.95}, {"S1": 0.7, "S2": 0.5, "S3": 0.5, "S4": 0.5}
    candidate, champion = episodes(even[0], 50, 1), episodes(even[1], 50, 2)
    assert decide(spec, candidate, champion).verdict is Verdict.PASS
    held = decide(strict, candidate, champion)
    assert held.verdict is Verdict.CONTINUE
    assert [reason[:2] for reason in held.reasons] == ["S1"]
    assert decide(strict, episodes(0.95, 50, 1), episodes(0.5, 50, 2)).verdict is Verdict.PASS


@pytest.mark.parametrize("name", ["emergency_stop", "a_counter_that_the_gate_does_not_name"])
def test_one_unsafe_event_fails(spec: GateSpec, name: str) -> None:
    candidate, champion = episodes(1.0, 50, 1), episodes(0.2, 50, 2)
    candidate[17] = dataclasses.replace(candidate[17], safety={name: 1})
    decision = decide(spec, candidate, champion)
    assert decision.verdict is Verdict.FAIL and decision.reasons[0].startswith(f"safety: 1 {name}")
    assert decide(spec, candidate[:3], champion).verdict is Verdict.CONTINUE
    assert decide(changed(safety={name: 1}), candidate, champion).verdict is Verdict.PASS
    assert decide(spec, champion, candidate).reasons[0][:6] != "safety"  # the champion's are not the candidate's


def test_the_answer_does_not_depend_on_the_order_of_arrival(spec: GateSpec) -> None:
    candidate, champion = episodes(0.8, 30, 1), episodes(0.6, 30, 2)
    shuffled = [candidate[i] for i in np.random.default_rng(0).permutation(len(candidate))]
    assert decide(spec, shuffled, champion) == decide(spec, candidate, champion)


def test_what_was_shown_stays_shown(spec: GateSpec) -> None:
    """Asked again with more episodes, on later seeds: the evidence for a gain does not shrink."""
    candidate = episodes(0.9, 40, 1) + episodes(0.5, 20, 3, first=40)
    champion = episodes(0.5, 40, 2) + episodes(0.5, 20, 4, first=40)
    before = decide(spec, [r for r in candidate if r.seed < 40], [r for r in champion if r.seed < 40])
    after = decide(spec, candidate, champion)
    assert before.verdict is Verdict.PASS
    assert after.evidence["pooled"]["e_better"] >= before.evidence["pooled"]["e_better"] >= 20


def test_unpaired_seeds_are_compared_in_order(spec: GateSpec) -> None:
    decision = decide(spec, episodes(0.9, 50, 1, first=1000), episodes(0.5, 50, 2))
    assert decision.verdict is Verdict.PASS
    assert not decision.evidence["paired_by_seed"]


def test_only_shared_seeds_count_when_some_are_shared(spec: GateSpec) -> None:
    decision = decide(spec, episodes(0.9, 30, 1, first=20), episodes(0.5, 30, 2))
    assert decision.evidence["paired_by_seed"] and decision.evidence["episodes_per_task"] == 10


def test_different_tasks_and_repeated_seeds_are_refused(spec: GateSpec) -> None:
    with pytest.raises(ConfigError, match="champion on"):
        decide(spec, episodes({"S9": 0.5}, 5, 1), episodes(0.5, 5, 2))
    with pytest.raises(ConfigError, match="seed 0 was evaluated twice"):
        decide(spec, episodes(0.5, 5, 1) + episodes(0.5, 1, 3), episodes(0.5, 5, 2))


@pytest.mark.parametrize("rule", ["not_worse", "shown"])
def test_simulated_verdicts_are_the_gates_own(rule: str) -> None:
    """bench/gate.py measures `verdicts`; this ties it to `decide`, round by round."""
    spec = changed(episodes={"min": 5, "planned": 10, "max": 30}, per_task={"margin": 0.05, "rule": rule}, alpha=0.1)
    seen = set()
    for seed, rate in enumerate((0.2, 0.5, 0.7, 0.95)):
        candidate, champion = episodes(rate, 32, seed), episodes(0.5, 32, seed + 50)
        new, old = (
            np.array([[r.success for r in side if r.task == t] for t in TASKS], float).T
            for side in (candidate, champion)
        )
        answers = verdicts(spec, trace(spec, new - old))
        for n in (1, 5, 6, 10, 17, 29, 30, 32):
            decision = decide(spec, [r for r in candidate if r.seed < n], [r for r in champion if r.seed < n])
            assert decision.verdict.value == answers[n - 1]
            seen.add(decision.verdict)
    assert seen == set(Verdict)


def test_false_promotion_and_power(spec: GateSpec) -> None:
    """Asked after every round up to 200: at most alpha for no gain; a gain of 0.2 within the planned episodes."""
    rng = np.random.default_rng(7)
    rates = np.array([0.55, 0.7, 0.75, 0.8])
    answers, _ = simulate(spec, rates, rates, 400, rng)
    assert (answers == "PASS").mean() <= spec.alpha + 2.5 * np.sqrt(0.05 * 0.95 / 400)
    answers, rounds = simulate(spec, rates, rates + 0.19, 200, rng)
    assert ((answers == "PASS") & (rounds <= spec.episodes.planned)).mean() > 0.9


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda raw: raw["episodes"].update(plannd=5), "did you mean 'planned'"),
        (lambda raw: raw.update(alhpa=0.1), "did you mean 'alpha'"),
        (lambda raw: raw.update(alpha=0.7), "alpha"),
        (lambda raw: raw["per_task"].update(rule="shwon"), "per_task.rule"),
        (lambda raw: raw["per_task"].pop("margin"), "per_task.margin"),
        (lambda raw: raw["episodes"].update(min=80), "min <= planned <= max"),
        (lambda raw: raw["safety"].update(emergency_stop="none"), "safety.emergency_stop"),
    ],
)
def test_bad_gate_files_are_named(tmp_path: Path, edit: object, named: str) -> None:
    raw = yaml.safe_load(DEFAULT_GATE.read_text())
    edit(raw)  # type: ignore[operator]
    path = tmp_path / "gate.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load_gate(path)
    assert named in str(caught.value) and str(path) in str(caught.value)


def test_the_levels_of_a_stream_never_spend_more_than_alpha(spec: GateSpec) -> None:
    levels = [level_at(spec, position, 0) for position in range(1, 20_001)]
    assert all(a > b > 0 for a, b in itertools.pairwise(levels))
    assert sum(levels) < spec.alpha
    assert level_at(spec, 7, 2) == pytest.approx(3 * level_at(spec, 7, 0))  # each promotion earns some back
    assert level_at(spec, 1, 10**6) == spec.alpha


def test_a_stricter_level_asks_for_more_evidence_and_gives_more_episodes(spec: GateSpec) -> None:
    strict = level_at(spec, 50, 0)
    assert episodes_at(spec, spec.alpha) == spec.episodes
    longer = episodes_at(spec, strict)
    assert longer.planned == pytest.approx(spec.episodes.planned * np.log(strict) / np.log(spec.alpha), abs=1)
    candidate, champion = episodes(0.84, 50, 1), episodes(0.60, 50, 2)
    assert decide(spec, candidate, champion).verdict is Verdict.PASS
    held = decide(spec, candidate, champion, level=1e-12)
    assert held.verdict is Verdict.CONTINUE and "not yet shown better" in held.reasons[-1]


def test_a_candidate_is_held_to_the_reference_in_each_task(spec: GateSpec) -> None:
    """Better than a champion that had declined is not good enough."""
    candidate, champion, best = episodes(0.75, 60, 1), episodes(0.45, 60, 2), episodes(0.75, 60, 3)
    assert decide(spec, candidate, champion, reference=best).verdict is Verdict.PASS
    best = episodes({"S1": 0.85, "S2": 0.7, "S3": 0.7, "S4": 0.7}, 60, 3)
    held = decide(spec, candidate, champion, reference=best)
    assert held.verdict is Verdict.CONTINUE and held.reasons[0].startswith("S1: looks worse than the reference")
    worse = decide(spec, episodes(0.5, 60, 1), episodes(0.2, 60, 2), reference=episodes(0.95, 60, 3))
    assert worse.verdict is Verdict.FAIL and "shown worse than the reference" in worse.reasons[0]


def test_missing_or_broken_gate_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        load_gate(tmp_path / "none.yaml")
    path = tmp_path / "gate.yaml"
    path.write_text("alpha: [0.05")
    with pytest.raises(ConfigError, match="not YAML"):
        load_gate(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="the document"):
        load_gate(path)
