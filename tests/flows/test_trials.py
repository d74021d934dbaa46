"""Trials: fresh start states, run by all policies of the trial, counted once; a stream of them keeps its error."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "fleet"))
from deployment import scene_bundle

from data_contracts.shield import default_shield
from flows import evaluation, promotion, trials
from flows.deployment import Deployment, deployment
from flows.evaluation import conditions, evaluate, read_results, write_results
from flows.gate import GateSpec, Verdict, level_at, load_gate, trace, verdicts
from flows.params import Params, load_params
from flows.promotion import act_on, approve, evaluation_file, judge, results_of
from flows.trials import Trial, open_trial, reference_of, results
from infra.catalog import schema
from infra.errors import ConfigError, UntrustedPolicyError
from infra.policy.approval import create_person_key, enrol_person
from lwd_model.evaluation import EpisodeResult

TASKS = ("S1", "S2")


@pytest.fixture
def params() -> Params:
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    evaluation = params.evaluate.model_copy(update={"gate_max": None, "episodes": 2})
    return params.model_copy(update={"tasks": TASKS, "workers": 0, "evaluate": evaluation})


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Deployment]:
    """Policies 1 to 4, the first one the champion."""
    with deployment(tmp_path / "home") as plane:
        for seed in range(4):
            plane.publisher.publish(scene_bundle(tmp_path / "export", seed), cohort=None)
        plane.registry.promote(1, {})
        yield plane


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Success rates by policy: episodes are drawn from them instead of run, by the trial's own seed."""
    table: dict[int, float] = {}

    def drawn(
        bundle: Path, wanted: list[tuple[str, int]], seed: int, *, workers: int, title: str
    ) -> list[EpisodeResult]:
        version = int(bundle.name)
        out = []
        for task, number in wanted:
            won = np.random.default_rng([seed, version, TASKS.index(task), number]).random() < table[version]
            out.append(EpisodeResult(task, number, bool(won), float(won), 2.0, 40))
        return out

    monkeypatch.setattr(trials, "run_episodes", drawn)
    return table


def rows(plane: Deployment, table: sa.Table) -> list[sa.Row[tuple[object, ...]]]:
    with plane.catalog.read() as connection:
        return list(connection.execute(sa.select(table)))


def test_all_policies_of_a_trial_run_the_same_fresh_start_states(plane: Deployment, params: Params) -> None:
    trial = open_trial(plane, params, 2, load_gate())
    trials.run_round(plane, params, trial, 2)
    arms = {version: results(plane, trial, version) for version in trial.arms}
    assert set(arms) == {1, 2}
    assert all([(r.task, r.seed) for r in arm] == [("S1", 0), ("S1", 1), ("S2", 0), ("S2", 1)] for arm in arms.values())
    again = evaluate(plane.bundle(2), TASKS, 2, trial.seed, workers=0, title="again")
    assert again == arms[2]  # they are of the trial's seed
    assert trial.seed != params.evaluate.seed


def test_each_candidate_gets_seeds_of_its_own_and_keeps_them(plane: Deployment, params: Params) -> None:
    second, third = open_trial(plane, params, 2, load_gate()), open_trial(plane, params, 3, load_gate())
    assert second.seed != third.seed
    assert open_trial(plane, params, 2, load_gate()) == second
    assert (second.position, third.position) == (1, 2)
    assert (second.level, third.level) == (level_at(load_gate(), 1, 0), level_at(load_gate(), 2, 0))


def test_a_gate_file_that_is_eased_meanwhile_does_not_ease_a_trial(plane: Deployment, params: Params) -> None:
    before = open_trial(plane, params, 2, load_gate())
    eased = GateSpec.model_validate(load_gate().model_dump() | {"alpha": 0.4})
    assert open_trial(plane, params, 2, eased) == before


@pytest.mark.parametrize("change", [{"tasks": ("S1",)}, {"tasks": ("S2", "S1", "S3")}])
def test_other_conditions_are_another_trial_with_a_place_of_its_own(
    plane: Deployment, params: Params, change: dict[str, object]
) -> None:
    first = open_trial(plane, params, 2, load_gate())
    other = open_trial(plane, params.model_copy(update=change), 2, load_gate())
    assert other.id != first.id and other.position == 2 and other.level < first.level


def test_a_trial_goes_on_and_an_episode_counts_once(plane: Deployment, params: Params, rates: dict[int, float]) -> None:
    rates |= {1: 0.6, 2: 0.6}
    short = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"gate_max": 20})})
    first = judge(plane, short, 2)
    assert first.decision.verdict is Verdict.CONTINUE and first.decision.evidence["episodes_per_task"] == 20
    assert judge(plane, short, 2).decision == first.decision  # asked again: no other draw
    assert len(rows(plane, schema.trial_episodes)) == 2 * 2 * 20
    longer = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"gate_max": 40})})
    after = judge(plane, longer, 2)
    assert after.decision.evidence["episodes_per_task"] == 40
    assert len(rows(plane, schema.trials)) == 1 and len(rows(plane, schema.trial_episodes)) == 2 * 2 * 40


def test_a_trial_that_was_stopped_in_a_round_runs_what_is_missing(
    plane: Deployment, params: Params, rates: dict[int, float]
) -> None:
    rates |= {1: 0.5, 2: 0.9}
    trial = open_trial(plane, params, 2, load_gate())
    trials.run_round(plane, params, trial, 10)
    whole = results(plane, trial, 1)
    with plane.catalog.begin() as connection:
        table = schema.trial_episodes
        connection.execute(table.delete().where(table.c.version == 1, table.c.number > 6))
    judge(plane, params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"gate_max": 10})}), 2)
    assert results(plane, trial, 1) == whole


def test_cached_evaluations_never_decide(plane: Deployment, params: Params, rates: dict[int, float]) -> None:
    """Perfect results of the pipeline's own evaluation, and a trial that shows the truth."""
    rates |= {1: 0.9, 2: 0.2}
    for version in (1, 2):
        known = results_of(plane, params, version, 2)
        won = [dataclasses.replace(result, success=version == 2) for result in known]
        under = conditions(plane.bundle(version), TASKS, params.evaluate.seed)
        write_results(evaluation_file(plane, version), won, under)
    assert judge(plane, params, 2).decision.verdict is Verdict.FAIL


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("name", ["policy.safetensors", "architecture.json"])
def test_bytes_that_change_after_they_were_verified_are_not_counted(
    plane: Deployment, params: Params, monkeypatch: pytest.MonkeyPatch, name: str, restored: bool
) -> None:
    """A policy's file is replaced while its episodes run, and put back before they end."""
    real = trials.run_episodes

    def swapped(bundle: Path, *args: object, **options: object) -> list[EpisodeResult]:
        kept = (bundle / name).read_bytes()
        (bundle / name).write_bytes((plane.bundle(4) / name).read_bytes())
        ran = real(bundle, *args, **options)  # type: ignore[arg-type]
        if restored:
            (bundle / name).write_bytes(kept)
        return ran

    trial = open_trial(plane, params, 2, load_gate())
    monkeypatch.setattr(trials, "run_episodes", swapped)
    with pytest.raises(UntrustedPolicyError, match="changed while they were evaluated"):
        trials.run_round(plane, params, trial, 1)
    assert rows(plane, schema.trial_episodes) == []
    monkeypatch.setattr(trials, "run_episodes", real)
    trials.run_round(plane, params, trial, 1)
    assert len(rows(plane, schema.trial_episodes)) == 4


def test_another_shield_is_another_condition(
    plane: Deployment, params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A contract with other limits on the actions: results under one are none under the other."""
    before, under = open_trial(plane, params, 2, load_gate()), conditions(plane.bundle(2), TASKS, 0)
    monkeypatch.setattr("flows.evaluation.default_shield", lambda: {**default_shield(), "low": -9.0, "high": 9.0})
    assert conditions(plane.bundle(2), TASKS, 0) != under
    assert open_trial(plane, params, 2, load_gate()).id != before.id


def test_results_of_other_conditions_are_not_used(
    plane: Deployment, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = results_of(plane, params, 2, 2)
    path = evaluation_file(plane, 2)
    assert results_of(plane, params, 2, 2) == first
    kept = path.read_bytes()
    other = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"seed": 7})})
    assert results_of(plane, other, 2, 2) != first or path.read_bytes() != kept
    under = conditions(plane.bundle(2), TASKS, 7)
    assert len(read_results(path, under)) == 4 and read_results(path, conditions(plane.bundle(2), TASKS, 8)) == []
    assert read_results(path, conditions(plane.bundle(3), TASKS, 7)) == []
    monkeypatch.setattr(evaluation, "default_shield", lambda: default_shield() | {"change": 0.1})
    assert read_results(path, conditions(plane.bundle(2), TASKS, 7)) == []  # actions pass another shield
    path.write_text("[]")  # of a version that kept no conditions
    assert len(results_of(plane, params, 2, 2)) == 4


def test_a_better_candidate_is_promoted_and_becomes_the_reference(
    plane: Deployment, params: Params, rates: dict[int, float]
) -> None:
    rates |= {1: 0.5, 2: 0.9, 3: 0.9}
    judgement = judge(plane, params, 2)
    assert judgement.decision.verdict is Verdict.PASS
    assert act_on(plane, judgement) is not None
    assert plane.registry.alias("champion") == 2 == reference_of(plane)
    assert judgement.decision.evidence["stream"]["position"] == 1
    assert open_trial(plane, params, 3, load_gate()).level == level_at(load_gate(), 2, 1)


def test_a_pass_that_led_to_no_promotion_does_not_loosen_the_levels(
    plane: Deployment, params: Params, rates: dict[int, float]
) -> None:
    rates |= {1: 0.5, 2: 0.9, 3: 0.9}
    judgement = judge(plane, params, 2)
    assert judgement.decision.verdict is Verdict.PASS
    plane.registry.refuse(2, {"reasons": ["a person said no"]})
    with pytest.raises(ConfigError, match="refused"):
        act_on(plane, judgement)
    assert open_trial(plane, params, 3, load_gate()).level == level_at(load_gate(), 2, 0)


def test_a_promotion_without_a_trial_does_not_move_the_reference(
    plane: Deployment, params: Params, rates: dict[int, float]
) -> None:
    """The reference stays what was shown to be the best, and runs in later trials."""
    rates |= {1: 0.9, 2: 0.5, 3: 0.7}
    plane.registry.promote(2, {})
    assert plane.registry.alias("champion") == 2 and reference_of(plane) == 1
    judgement = judge(plane, params, 3)
    assert judgement.decision.verdict is not Verdict.PASS
    assert any("reference" in reason for reason in judgement.decision.reasons)


def test_a_champion_that_was_rolled_back_is_no_reference(
    plane: Deployment, params: Params, rates: dict[int, float]
) -> None:
    rates |= {1: 0.5, 2: 0.9}
    act_on(plane, judge(plane, params, 2))
    plane.registry.rollback(actor="ann", reason="drops the cube")
    assert reference_of(plane) == 1


def test_evidence_against_an_earlier_champion_is_not_used(
    plane: Deployment, params: Params, rates: dict[int, float]
) -> None:
    rates |= {1: 0.4, 2: 0.7, 3: 0.9}
    third = judge(plane, params, 3)
    second = judge(plane, params, 2)
    assert third.decision.verdict is second.decision.verdict is Verdict.PASS
    act_on(plane, second)
    with pytest.raises(ConfigError, match="compares policy 3 with policy 1; the champion is 2"):
        act_on(plane, third)


def test_a_deployment_that_asks_for_approval_waits_for_a_person(
    plane: Deployment, params: Params, rates: dict[int, float], tmp_path: Path
) -> None:
    rates |= {1: 0.5, 2: 0.9}
    (plane.settings.home / "settings.yaml").write_text("approval: true\n")
    keys = plane.settings.keys_dir
    with deployment(plane.settings.home) as strict:
        assert act_on(strict, judge(strict, params, 2)) is None
        assert strict.registry.alias("champion") == 1
        create_person_key(tmp_path / "bob.pem")
        with pytest.raises(UntrustedPolicyError, match="nobody of that name"):
            approve(strict, 2, "bob", tmp_path / "bob.pem")
        enrol_person(keys, "bob", tmp_path / "bob.pub")
        assert approve(strict, 2, "bob", tmp_path / "bob.pem")["approver"] == "bob"
        assert strict.registry.alias("champion") == 2


@pytest.mark.parametrize("approval", [False, True])
def test_a_new_deployment_s_first_policy_waits_for_a_person_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, approval: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (promotion.SFT, promotion.OFFLINE):
        scene_bundle(folder / promotion.BUNDLE)
    home = tmp_path / "h"
    home.mkdir()
    (home / "settings.yaml").write_text(f"approval: {str(approval).lower()}\n")
    with deployment(home) as plane:
        assert promotion.introduce(plane) == (1, 2)
        assert plane.registry.alias("champion") == (None if approval else 1)
        assert [row["decision"] for row in plane.registry.history()] == ["propose" if approval else "promote"]


def test_many_equal_candidates_are_rarely_promoted() -> None:
    """Ville and e-LOND: over a stream of equal candidates the chance of any promotion is at most alpha."""
    spec, rng, streams, length = load_gate(), np.random.default_rng(0), 60, 12
    small = GateSpec.model_validate(
        spec.model_dump() | {"alpha": 0.2, "episodes": {"min": 5, "planned": 20, "max": 40}}
    )
    any_passed = np.zeros(streams, bool)
    for position in range(1, length + 1):
        level = level_at(small, position, 0)
        rounds = (rng.random((streams, 90, 2)) < 0.7).astype(float) - (rng.random((streams, 90, 2)) < 0.7)
        any_passed |= (verdicts(small, trace(small, rounds, level), level) == "PASS").any(-1)
    assert any_passed.mean() <= 0.2


def test_a_real_trial_of_two_policies_ends_in_a_decision(plane: Deployment, params: Params) -> None:
    one = params.model_copy(update={"tasks": ("S1",), "evaluate": params.evaluate.model_copy(update={"gate_max": 1})})
    judgement = judge(plane, one, 2)
    assert judgement.decision.verdict is Verdict.CONTINUE
    assert isinstance(open_trial(plane, one, 2, load_gate()), Trial)


def killed_before_the_refusal(plane: Deployment, params: Params) -> None:
    assert judge(plane, params, 2).decision.verdict is Verdict.FAIL  # and nobody acts on it


@pytest.mark.parametrize("change", ["tasks", "champion"])
def test_a_trial_that_failed_is_the_last_one_of_its_candidate(
    plane: Deployment, params: Params, rates: dict[int, float], change: str
) -> None:
    """A process that dies between the answer and the refusal leaves no second draw, whatever is changed then."""
    rates |= {1: 0.9, 2: 0.2, 3: 0.95}
    killed_before_the_refusal(plane, params)
    if change == "tasks":
        params = params.model_copy(update={"tasks": ("S1",)})
    else:
        plane.registry.promote(3, {})
        plane.registry.rollback(actor="ann", reason="r")
    rates[2] = 1.0
    judgement = judge(plane, params, 2)
    assert judgement.decision.verdict is Verdict.FAIL and len(rows(plane, schema.trials)) == 1
    act_on(plane, judgement)
    assert plane.registry.policies()[2]["status"] == "refused"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_what_cannot_be_promoted_takes_no_place_in_the_stream(
    plane: Deployment, params: Params, rates: dict[int, float], version: int
) -> None:
    """A policy below the champion, the champion itself, one that was refused: no draw, and nothing is made of it."""
    rates |= dict.fromkeys(range(1, 5), 0.5)
    plane.registry.promote(2, {})
    plane.registry.refuse(3, {})
    before = [(row["version"], row["status"]) for row in plane.registry.policies()]
    with pytest.raises(ConfigError, match="not newer than the champion|was refused"):
        judge(plane, params, version)
    assert rows(plane, schema.trials) == []
    assert [(row["version"], row["status"]) for row in plane.registry.policies()] == before
    assert plane.registry.rollback(actor="ann", reason="r") == 1


def test_of_two_processes_the_first_answer_stands(plane: Deployment, params: Params, rates: dict[int, float]) -> None:
    """One stands still with what it read while the other goes on: both say the same in the end."""
    rates |= {1: 0.5, 2: 0.9}
    trial = open_trial(plane, params, 2, load_gate())
    assert trials.close_trial(plane, trial, "PASS") == "PASS"
    assert trials.close_trial(plane, trial, "FAIL") == "PASS"
    trials.run_round(plane, params, trial, 10)
    judgement = judge(plane, params, 2)
    assert judgement.decision.verdict is Verdict.PASS
    assert any("answered before" in reason for reason in judgement.decision.reasons)


@pytest.mark.parametrize("later", [{"stream": {"decay": 4.0}}, {"alpha": 0.04}, {"alpha": 0.02}])
def test_a_stream_whose_file_changes_spends_no_more_than_alpha(
    plane: Deployment, params: Params, later: dict[str, object]
) -> None:
    def spec(changes: dict[str, object]) -> GateSpec:
        return GateSpec.model_validate(load_gate().model_dump() | changes)

    levels = [open_trial(plane, params, 2, spec({"stream": {"decay": 3.0}})).level]
    levels.append(open_trial(plane, params, 3, spec({"stream": {"decay": 1.01}})).level)
    if "alpha" in later:  # less than what was taken
        with pytest.raises(ConfigError, match="more than the alpha"):
            open_trial(plane, params, 4, spec(later))
    else:
        levels.append(open_trial(plane, params, 4, spec(later)).level)
    assert sum(levels) <= 0.05


def test_a_demo_that_goes_on_asks_nothing_that_was_decided(
    plane: Deployment, params: Params, rates: dict[int, float], tmp_path: Path
) -> None:
    """Stopped at its report, with the online policy as champion: the offline one is not tried again."""
    from flows.demo import _gate

    rates |= dict.fromkeys(range(1, 5), 0.5)
    for version in (2, 4):
        plane.registry.promote(version, {})
    for version in (2, 3, 4):
        _gate(tmp_path, plane, params, version, "offline", "sft")
    assert rows(plane, schema.trials) == []
    assert plane.registry.rollback(actor="ann", reason="r") == 2
