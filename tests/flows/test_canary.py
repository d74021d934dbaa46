"""Row 34: a candidate that does harm is sent back by itself, a sound one is not, and its reach is bounded."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "policy"))
from canary_fleet import QUICK, TASKS, Fleet, at_work
from invariants import KILLED, start_process

from flows.canary import Look, Watcher, main, robots, start, stop_trial, watch
from flows.canary_gate import (
    DEFAULT_CANARY,
    Answer,
    AtWork,
    CanarySpec,
    Standing,
    decide_trial,
    harmful,
    load_canary,
    weigh,
    weigh_better,
)
from flows.canary_pairs import concurrent
from flows.deployment import Deployment, deployment
from flows.gate import level_at, load_gate
from flows.trials import reference_of, trial_at_work
from infra.catalog import dialect, schema
from infra.errors import ConfigError
from infra.objects import UnreadableError
from infra.policy.refusals import record_refusals


def changed(**sections: object) -> CanarySpec:
    return CanarySpec.model_validate(load_canary().model_dump() | sections)


@pytest.fixture(scope="module")
def spec() -> CanarySpec:
    return load_canary()


# --- the decision -----------------------------------------------------------------------------------------------------


def simulated(
    spec: CanarySpec, new: object, old: object, trials: int, seed: int, takeovers: tuple[float, float] = (0.05, 0.05)
) -> tuple[np.ndarray, np.ndarray]:
    """Whether HARM was ever shown, and SAFE, within the bound: (S,) each, robots running the tasks in turn.

    `new` and `old` are success rates by task; asked after every pair, since all evidence is the largest so far.
    """
    rng = np.random.default_rng(seed)
    task = np.arange(spec.episodes.max) % len(TASKS)
    shape = (trials, spec.episodes.max)
    won = (rng.random(shape) < np.asarray(new)[task]).astype(float) - (rng.random(shape) < np.asarray(old)[task])
    took = (rng.random(shape) < takeovers[0]).astype(float) - (rng.random(shape) < takeovers[1])
    found = weigh(spec, won, took, task, len(TASKS))
    return harmful(spec, found), found.safe >= 1 / spec.alpha


CHAMPION = np.array([0.65, 0.8, 0.85, 0.9])


@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_a_sound_candidate_is_hardly_ever_sent_back(spec: CanarySpec, loss: float) -> None:
    """At most alpha, also at the worst that is allowed: success lower, and takeovers higher, by just the margins."""
    rise = 0.05 + spec.interventions.margin if loss else 0.05
    harm, _ = simulated(spec, CHAMPION - loss, CHAMPION, 2000, seed=1, takeovers=(rise, 0.05))
    assert harm.mean() <= (spec.alpha if loss else 0.01)


def test_a_drop_is_found_within_the_bound(spec: CanarySpec) -> None:
    harm, safe = simulated(spec, CHAMPION - 0.3, CHAMPION, 2000, seed=2)
    assert harm.mean() >= 0.99 and safe.mean() <= spec.alpha
    early, _ = simulated(changed(episodes={"min": 30, "planned": 60, "max": 60}), CHAMPION - 0.3, CHAMPION, 300, seed=3)
    assert early.mean() >= 0.5


def test_one_ruined_task_and_a_rise_of_takeovers_are_found(spec: CanarySpec) -> None:
    ruined, _ = simulated(spec, CHAMPION - [0, 0, 0.8, 0], CHAMPION, 200, seed=4)
    assert ruined.mean() >= 0.9
    helped, _ = simulated(spec, CHAMPION, CHAMPION, 200, seed=5, takeovers=(0.45, 0.05))
    assert helped.mean() >= 0.9


def test_safe_is_said_of_equals_and_hardly_ever_of_worse(spec: CanarySpec) -> None:
    _, equal = simulated(spec, CHAMPION, CHAMPION, 300, seed=6)
    _, worse = simulated(spec, CHAMPION - spec.safe.margin, CHAMPION, 2000, seed=7)
    assert equal.mean() >= 0.75 and worse.mean() <= spec.alpha


def ran(rate: float, n: int, seed: int, candidate: bool, takeovers: float = 0.0) -> list[AtWork]:
    """n episodes over the tasks in turn."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        intervened = bool(rng.random() < takeovers)
        out.append(AtWork(TASKS[i % 4], bool(rng.random() < rate) and not intervened, intervened, candidate))
    return out


def test_the_answers(spec: CanarySpec) -> None:
    champion = ran(0.8, 200, 1, False)

    def ask(rate: float, n: int, refused: int = 0, takeovers: float = 0.0, spec: CanarySpec = spec) -> tuple[str, str]:
        decision = decide_trial(spec, champion + ran(rate, n, 2, True, takeovers), TASKS, refused)
        json.dumps(decision.evidence, allow_nan=False)
        return str(decision.answer), decision.reasons[0]

    assert ask(0.8, 0)[0] == "CONTINUE" and "0 pairs" in ask(0.8, 0)[1]
    assert ask(1.0, spec.episodes.min - 1)[0] == "CONTINUE"
    assert ask(1.0, 60)[0] == "SAFE"
    assert ask(0.3, 80)[0] == "HARM" and "success: shown to be lower" in ask(0.3, 80)[1]
    assert ask(0.8, 2, refused=4)[0] == "HARM" and "4 episodes refused by the contract, 3 allowed" in ask(0.8, 2, 4)[1]
    assert ask(0.8, 20, refused=3)[0] == "CONTINUE"
    assert ask(0.68, 200)[0] == "STOP" and "bound of 200" in ask(0.68, 200)[1]
    assert ask(1.0, 120, takeovers=0.6)[0] == "HARM"


def test_tasks_of_which_nobody_has_a_pair_hold(spec: CanarySpec) -> None:
    decision = decide_trial(spec, ran(0.5, 100, 1, False) + ran(1.0, 100, 2, True), (*TASKS, "L1"))
    assert decision.answer is Answer.CONTINUE and "no pair of episodes yet of L1" in decision.reasons


def test_a_given_baseline_needs_no_champion(spec: CanarySpec) -> None:
    given_rates = changed(baseline={"success": dict.fromkeys(TASKS, 0.8), "interventions": 0.05})
    assert decide_trial(given_rates, ran(0.8, 190, 3, True), TASKS).answer is Answer.SAFE
    decision = decide_trial(given_rates, ran(0.4, 80, 4, True), TASKS)
    assert decision.answer is Answer.HARM and decision.evidence["per_task"]["S1"]["baseline"] == 0.8


arrivals = st.lists(
    st.tuples(st.sampled_from(TASKS), st.booleans(), st.floats(0, 10)), max_size=40
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(episodes=arrivals, window=st.floats(0.1, 20))
def test_pairs_are_concurrent_and_only_ever_added(episodes: list[tuple[str, bool, float]], window: float) -> None:
    """However the two policies' episodes interleave, later ones leave the pairs of earlier ones as they were, so that
    the evidence is one gambler's wealth and not a new gambler's at each look. The clock may go back."""

    def paired(some: list[tuple[str, bool, float]]) -> list[tuple[int, int]]:
        return concurrent([e[0] for e in some], [e[1] for e in some], [e[2] for e in some], window)

    whole = paired(episodes)
    for cut in range(len(episodes)):
        early = paired(episodes[:cut])
        assert early == whole[: len(early)]
    used = [index for pair in whole for index in pair]
    assert len(used) == len(set(used))
    for new, old in whole:
        (task, ours, at), (same, theirs, then) = episodes[new], episodes[old]
        assert task == same and ours and not theirs and abs(at - then) <= window


def test_each_episode_takes_the_newest_within_the_window() -> None:
    at = [0.0, 10.0, 20.0, 90.0, 25.0]
    assert concurrent(["S1"] * 5, [False, False, False, False, True], at, 60.0) == [(4, 2)]
    assert concurrent(["S1"] * 3, [False, False, True], [0.0, 1.0, 2.0], 60.0) == [(2, 1)]
    assert concurrent(["S1", "S2"], [False, True], [0.0, 0.0], 60.0) == []
    assert concurrent(["S1"] * 2, [True, False], [0.0, 61.0], 60.0) == []


def day(spec: CanarySpec, trials: int, seed: int, loss: float, drift: float) -> tuple[np.ndarray, ...]:
    """Pairs of one day: one canary robot, and production robots that work most in the morning; success of both changes
    by `drift` from morning to night. Differences in success (S, P), and the tasks (P,)."""
    rng = np.random.default_rng(seed)
    ours, theirs = np.sort(rng.uniform(0, 24, 200)), np.sort(24 * rng.beta(1, 2, 1500))
    at = np.concatenate([ours, theirs])
    order = np.argsort(at)
    task = rng.integers(0, 4, at.size)
    new = np.concatenate([np.ones(200, bool), np.zeros(1500, bool)])
    names = [TASKS[k] for k in task[order]]
    pairs = np.array(concurrent(names, list(new[order]), list(at[order] * 3600), spec.window_hours * 3600))
    rates = CHAMPION[task] + drift * (at / 24) - np.where(new, loss, 0.0)
    won = (rng.random((trials, at.size)) < np.clip(rates, 0, 1))[:, order].astype(float)
    return won[:, pairs[:, 0]] - won[:, pairs[:, 1]], task[order][pairs[:, 0]]


@pytest.mark.parametrize("drift", [-0.2, 0.0, 0.1])
def test_a_drift_of_the_day_is_not_taken_for_harm(spec: CanarySpec, drift: float) -> None:
    """A trial that compared with the morning's episodes would send most candidates back."""
    for loss, most in ((0.0, 0.01), (spec.harm.margin, spec.alpha)):
        won, task = day(spec, 1000, 8, loss, drift)
        found = weigh(spec, won, np.zeros_like(won), task, len(TASKS))
        assert won.shape[1] >= 190 and harmful(spec, found).mean() <= most
    won, task = day(spec, 500, 9, 0.3, drift)
    assert harmful(spec, weigh(spec, won, np.zeros_like(won), task, len(TASKS))).mean() >= 0.97


def test_a_chain_of_small_losses_does_not_promote_itself(spec: CanarySpec) -> None:
    """Fifteen candidates one after the other, each worse by 0.02 than the one before: with SAFE alone as the rule they
    would take success from 0.775 to 0.6. Judged "better" at the stream's level, none is promoted."""
    streams, gate = 400, load_gate().model_copy(update={"episodes": spec.episodes})
    any_promoted = np.zeros(streams, bool)
    rng = np.random.default_rng(10)
    task = np.arange(spec.episodes.max) % len(TASKS)
    for position in range(1, 16):
        standing = Standing.of(gate, level_at(gate, position, 0), 0.0)
        shape = (streams, spec.episodes.max)
        old = np.full(4, 0.775)[task]
        won = (rng.random(shape) < old - 0.02).astype(float) - (rng.random(shape) < old)
        any_promoted |= weigh_better(standing, won, task, len(TASKS)) >= 1 / standing.level
    assert any_promoted.mean() <= 0.05


def test_a_much_better_candidate_is_shown_so(spec: CanarySpec) -> None:
    gate = load_gate().model_copy(update={"episodes": spec.episodes})
    standing = Standing.of(gate, level_at(gate, 1, 0), 0.0)
    rng, task = np.random.default_rng(11), np.arange(200) % 4
    won = (rng.random((300, 200)) < 0.9).astype(float) - (rng.random((300, 200)) < 0.6)
    assert (weigh_better(standing, won, task, 4) >= 1 / standing.level).mean() >= 0.9


def test_safety_events_are_harm_beyond_what_is_allowed(spec: CanarySpec) -> None:
    def ask(**safety: int) -> tuple[Answer, str]:
        decision = decide_trial(spec, [AtWork("S1", True, False, True, safety=safety)], TASKS)
        return decision.answer, decision.reasons[0]

    assert ask()[0] is ask(late=3)[0] is Answer.CONTINUE
    for kind in ("clamped", "slowed", "off_limits", "unreadable_safety", "what_nobody_named"):
        answer, reason = ask(**{kind: 1})
        assert answer is Answer.HARM and reason == f"safety: 1 {kind} events, 0 allowed"
    champion = AtWork("S1", True, False, False, safety={"off_limits": 9})
    assert decide_trial(spec, [champion], TASKS).answer is Answer.CONTINUE


def test_a_typo_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "canary.yaml"
    path.write_text(DEFAULT_CANARY.read_text().replace("  margin: 0.15", "  margn: 0.15"))
    with pytest.raises(ConfigError, match="did you mean 'margin'"):
        load_canary(path)
    path.write_text(DEFAULT_CANARY.read_text().replace("baseline: null", "baseline: {success: {S1: 1.5}}"))
    with pytest.raises(ConfigError, match=r"baseline\.success\.S1"):
        load_canary(path)
    path.write_text(DEFAULT_CANARY.read_text().replace("baseline: null", "baseline: {success: {S1: 0.5}, interv: 1}"))
    with pytest.raises(ConfigError, match="did you mean 'interventions'"):
        load_canary(path)


# --- at work ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with deployment(tmp_path / "home") as plane:
        yield at_work(plane)


def decisions(plane: Deployment) -> list[str]:
    return [row["decision"] for row in plane.registry.history()]


def test_row_34_a_canary_that_regresses_comes_back_and_production_never_saw_it(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    assert start(plane, spec, 2) == ["c0"]
    watcher, looks = Watcher(plane, spec), []
    while not looks or looks[-1].answer is Answer.CONTINUE:
        fleet.together([False] * 4, [True] * 4)
        look = watcher.look()
        assert look is not None
        looks.append(look)
    assert (
        looks[-1].answer is Answer.HARM and looks[-1].acted == "refused" and "success" in looks[-1].decision.reasons[0]
    )
    assert looks[-1].decision.evidence["episodes"] < spec.episodes.max
    assert watcher.look() is None
    assert fleet.boundary("c0") == 1
    for name in ("p0", "p1"):
        fleet.boundary(name)
    assert fleet.history == {"p0": [1], "p1": [1], "c0": [1, 2, 1], "l0": []}
    row = plane.registry.history()[-1]
    assert (row["decision"], row["version"], row["proposer"]) == ("refuse", 2, "canary")
    assert row["evidence"]["verdict"] == "HARM" and row["evidence"]["per_task"]["S1"]["candidate"]["n"] > 0
    with pytest.raises(ConfigError, match="was refused"):
        start(plane, spec, 2)


def test_a_sound_canary_is_eligible_and_stays_until_somebody_decides(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    fleet.together([True] * 30, [True] * 30)
    looks: list[Look] = []
    look = watch(plane, spec, on_look=looks.append)
    assert look is not None and look.answer is Answer.SAFE and look.acted == "safe" and looks == [look]
    assert plane.registry.alias("canary") == 2 and plane.registry.alias("champion") == 1
    assert look.rows()[0]["candidate (v2)"].endswith("0 takeovers")
    watch(plane, spec)
    assert decisions(plane) == ["promote", "canary", "safe"]


BETTER = ([True] * 40, [number % 3 == 0 for number in range(40)])


@pytest.mark.parametrize("approval", [False, True])
def test_an_automatic_canary_promotes_the_better_unless_a_person_must_approve(fleet: Fleet, approval: bool) -> None:
    spec = changed(**QUICK, automatic=True)
    home = fleet.plane.settings.home
    if approval:
        (home / "settings.yaml").write_text("approval: true\n")
    with deployment(home) as plane:
        start(plane, spec, 2)
        fleet.together(*BETTER)
        look = watch(plane, spec)
        assert look is not None and look.acted == ("safe" if approval else "promoted")
        assert plane.registry.alias("champion") == (1 if approval else 2)
        if approval:
            return
        assert reference_of(plane) == 2, "the reference follows what was shown better"
    assert fleet.boundary("p0") == 2 and fleet.boundary("c0") == 2
    card = fleet.plane.registry.history()[-1]["evidence"]["card"]
    assert card["proposer"] == "canary" and card["evidence"]["verdict"] == "SAFE"
    assert card["evidence"]["better"]["evidence"] >= card["evidence"]["better"]["needed"]
    assert card["evidence"]["stream"]["position"] == 1
    assert (home / "cards" / "policy-00002.md").read_text().count("| S1 |") == 1


def test_what_is_only_safe_is_not_promoted_by_itself(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK, automatic=True)
    start(plane, spec, 2)
    fleet.together([True] * 30, [True] * 30)
    look = watch(plane, spec)
    assert look is not None and look.acted == "safe" and "not yet shown to be better" in look.decision.reasons[1]
    assert plane.registry.alias("champion") == 1 and reference_of(plane) == 1


def test_a_canary_s_trial_keeps_its_place_in_the_stream(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK, automatic=True)
    start(plane, spec, 2)
    entered = trial_at_work(plane, 2, TASKS)
    assert entered is not None and entered.position == 1 and entered.level < spec.alpha
    stop_trial(plane, "a pause")
    start(plane, spec, 2)
    assert trial_at_work(plane, 2, TASKS) == entered, "started again, it is the same trial"
    assert trial_at_work(plane, 2, TASKS[:2]) is None


def test_where_the_champion_is_not_the_best_so_far_a_person_decides(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK, automatic=True)
    plane.registry.promote(2, {})  # by hand: the reference stays 1
    third = fleet.publish()
    fleet.run("p0", [True] * 12)
    start(plane, spec, third)
    fleet.together(*BETTER)
    look = watch(plane, spec)
    assert look is not None and look.acted == "safe" and plane.registry.alias("champion") == 2


def test_a_trial_that_was_begun_for_a_person_is_not_made_automatic_by_its_luck(fleet: Fleet) -> None:
    """What was seen before the trial entered the stream cannot promote it."""
    plane, spec = fleet.plane, changed(**QUICK, automatic=True)
    start(plane, changed(**QUICK), 2)
    fleet.together(*(side[:30] for side in BETTER))
    look = Watcher(plane, spec).look()
    assert look is not None and look.acted == "safe" and look.decision.evidence["better"] is None
    stop_trial(plane, "now by itself")
    start(plane, spec, 2)
    look = Watcher(plane, spec).look()
    assert look is not None and look.acted == "safe" and look.decision.evidence["better"]["evidence"] == 1.0


def test_the_reach_is_bounded_by_episodes(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK | {"safe": {"margin": 0.0}})
    start(plane, spec, 2)
    fleet.together([number % 10 != 3 for number in range(40)], [True] * 40)
    look = watch(plane, spec)
    assert look is not None and look.answer is Answer.STOP and look.acted == "withdrawn"
    assert fleet.boundary("c0") == 1
    assert next(p["status"] for p in plane.registry.policies() if p["version"] == 2) == "candidate"
    with pytest.raises(ConfigError, match="has had 40 canary episodes, the canary's file allows 40"):
        start(plane, spec, 2)
    longer = changed(**QUICK | {"episodes": {"min": 10, "planned": 20, "max": 60}})
    start(plane, longer, 2)  # what was seen goes on to count
    look = Watcher(plane, longer).look()
    assert look is not None and look.decision.evidence["episodes"] == 40


def test_the_reach_is_bounded_by_robots(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    for name in ("c1", "c2"):
        fleet.robot(name, "canary")
    look = Watcher(plane, spec).look()
    assert look is not None and look.answer is Answer.STOP and look.acted == "withdrawn"
    assert "3 robots are in the canary cohort, 2 allowed" in look.decision.reasons[0]
    with pytest.raises(ConfigError, match=r"3 robots are in the canary cohort \(c0, c1, c2\)"):
        start(plane, spec, 2)
    assert plane.registry.alias("canary") is None


def test_an_enrolled_robot_counts_before_it_was_seen_and_a_revoked_one_no_more(fleet: Fleet) -> None:
    def enrol(robot: str, cohort: str, *, expires: float = 60.0, revoked: bool = False) -> None:
        with fleet.plane.catalog.begin() as connection:
            at = dialect.now(connection)
            values = {"token_id": f"{robot}-{cohort}", "robot_id": robot, "cohort": cohort, "sha256": "0" * 64,
                      "actor": "ann", "created_at": at, "expires_at": at + expires,
                      "revoked_at": at if revoked else None}  # fmt: skip
            connection.execute(sa.insert(schema.robot_tokens).values(values))

    assert robots(fleet.plane) == ["c0"]
    enrol("c9", "canary")
    assert robots(fleet.plane) == ["c0", "c9"]
    enrol("c0", "canary", revoked=True)
    enrol("c8", "canary", expires=-1.0)
    assert robots(fleet.plane) == ["c9"]
    enrol("c0", "production")
    assert robots(fleet.plane) == ["c9"]


def test_episodes_that_the_contract_refused_count_as_harm(fleet: Fleet) -> None:
    """They are in no snapshot: without this, a policy whose every episode is refused would look untried."""
    plane, spec = fleet.plane, changed(**QUICK)
    fleet.run("c0", [True] * 5, steps=3)  # the champion's, before
    start(plane, spec, 2)
    watcher = Watcher(plane, spec)
    fleet.run("c0", [True] * 3, steps=3)
    look = watcher.look()
    assert look is not None and look.answer is Answer.CONTINUE and look.decision.evidence["safety"] == {"refused": 3}
    fleet.run("c0", [True], steps=3)
    look = watcher.look()
    assert look is not None and look.answer is Answer.HARM and "refused by the contract" in look.decision.reasons[0]


def test_a_refused_episode_that_the_store_cannot_read_does_not_end_the_watch(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged block under one quarantined object: harm is still seen, and the object is counted once it comes."""
    plane, spec = fleet.plane, changed(**QUICK, hours={"max": 1000.0})
    start(plane, spec, 2)
    fleet.run("c0", [True], steps=3)
    real, watcher = plane.objects.get, Watcher(plane, spec)

    def damaged(key: str) -> bytes:
        raise UnreadableError(f"{key} does not come whole", "upload it again")

    monkeypatch.setattr(plane.objects, "get", damaged)
    look = watcher.look()
    assert look is not None and look.decision.evidence["safety"] == {"refused": 0}
    monkeypatch.setattr(plane.objects, "get", real)
    look = watcher.look()
    assert look is not None and look.decision.evidence["safety"] == {"refused": 1}


def test_a_success_with_help_is_none_and_learning_robots_do_not_count(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    helped = np.array([False, True, True, False])
    fleet.run("c0", [True] * 8, intervention=helped)
    fleet.subscribers["l0"], fleet.history["l0"] = fleet.subscribers["c0"], []
    fleet.run("l0", [True] * 8)
    look = Watcher(plane, spec).look()
    assert look is not None
    table = look.decision.evidence["per_task"].values()
    assert sum(row["candidate"]["n"] for row in table) == 8 and sum(row["candidate"]["k"] for row in table) == 0
    assert sum(row["candidate_takeovers"] for row in table) == 8


def test_a_trial_needs_a_champion_that_has_worked(fleet: Fleet, tmp_path: Path) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    plane.registry.promote(2, {})
    third = fleet.publish()
    with pytest.raises(ConfigError, match="has 0 episodes by production robots since it was promoted"):
        start(plane, spec, third)
    baseline = {"success": dict.fromkeys(TASKS, 0.9)}
    assert start(plane, changed(**QUICK, baseline=baseline), third) == ["c0"]
    with deployment(tmp_path / "new") as other, pytest.raises(ConfigError, match="no champion"):
        start(other, spec, 1)


def test_a_trial_needs_production_robots_at_work(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    ago(plane, schema.robots, "last_seen", 2 * 3600)
    with pytest.raises(ConfigError, match=r"no production robot was heard of in the last 1 hours"):
        start(plane, spec, 2)
    assert plane.registry.alias("canary") is None
    assert start(plane, changed(**QUICK, baseline={"success": dict.fromkeys(TASKS, 0.9)}), 2) == ["c0"]


def ago(plane: Deployment, table: sa.Table, column: str, seconds: float, *where: sa.ColumnElement[bool]) -> None:
    """Let what is recorded there be older."""
    with plane.catalog.begin() as connection:
        connection.execute(sa.update(table).where(*where).values({column: table.c[column] - seconds}))


def test_an_episode_counts_for_its_cohort_s_policy_only(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    fleet.run("p0", [True] * 8, policy_version=2)  # a production robot that claims the candidate's version
    fleet.run("c0", [True] * 8, policy_version=1)  # a canary robot that runs the champion
    look = Watcher(plane, spec).look()
    assert look is not None and look.decision.evidence["per_task"] == {} and look.decision.evidence["episodes"] == 0
    fleet.together([True] * 4, [True] * 4)
    look = Watcher(plane, spec).look()
    assert look is not None and look.decision.evidence["pairs"] == 4
    token = {"token_id": "t", "robot_id": "p0", "cohort": "canary", "sha256": "0" * 64, "actor": "ann",
             "created_at": 0.0, "expires_at": 2.0**40}  # fmt: skip
    with plane.catalog.begin() as connection:
        connection.execute(sa.insert(schema.robot_tokens).values(token))
    fleet.together([True] * 4, [True] * 4)
    look = Watcher(plane, spec).look()
    assert look is not None and look.decision.evidence["pairs"] == 4, "its token, and not its word, says its cohort"
    assert look.decision.evidence["episodes"] == 8


@pytest.mark.parametrize("by", ["word", "token", "revocation"])
def test_a_robot_that_is_moved_leaves_its_episodes_where_they_count(fleet: Fleet, by: str) -> None:
    """Else whoever moves a robot takes failures, safety events and the bound on episodes out of a trial."""
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    fleet.together([True] * 7 + [False], [True] * 8)
    fleet.run("c0", [True] * 2, steps=3)  # refused by the contract
    before = Watcher(plane, spec).look()

    def move(robot: str, cohort: str) -> None:
        ended = 1.0 if by == "revocation" else None
        token = {"token_id": robot, "robot_id": robot, "cohort": cohort, "sha256": "0" * 64, "actor": "ann",
                 "created_at": 0.0, "expires_at": 2.0**40, "revoked_at": ended}  # fmt: skip
        with plane.catalog.begin() as connection:
            if by == "word":
                connection.execute(
                    sa.update(schema.robots).where(schema.robots.c.robot_id == robot).values(cohort=cohort)
                )
            else:
                connection.execute(sa.insert(schema.robot_tokens).values(token))

    move("c0", "production")
    move("p0", "canary")
    after = Watcher(plane, spec).look()
    assert before is not None and after is not None
    assert before.decision.evidence == after.decision.evidence
    assert after.decision.evidence["episodes"] == 8 and after.decision.evidence["safety"] == {"refused": 2}


def test_a_bound_that_is_spent_stays_spent_when_its_robot_is_moved(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(episodes={"min": 5, "planned": 5, "max": 6})
    start(plane, spec, 2)
    fleet.together([True] * 6, [True] * 6)
    stop_trial(plane, "again")
    for robot, cohort in (("c0", "production"), ("l0", "canary")):
        fleet.robot(robot, cohort)
    with pytest.raises(ConfigError, match="has had 6 canary episodes"):
        start(plane, spec, 2)


@pytest.mark.parametrize("robot", ["c0", "p0"])
def test_withdrawn_episodes_end_the_trial_and_stay_spent(fleet: Fleet, robot: str) -> None:
    """What was harm could be withdrawn, and what is left would show nothing of it."""
    spec = changed(**QUICK)
    start(fleet.plane, spec, 2)
    fleet.together([True] * 6, [True] * 6)
    fleet.plane.snapshots.revoke(robot, 0.0, 2.0**40, reason="a loose cable", actor="steward")
    look = Watcher(fleet.plane, spec).look()
    assert look is not None and look.answer is Answer.STOP and look.acted == "withdrawn"
    assert "6 of its episodes were withdrawn" in look.decision.reasons[0]
    start(fleet.plane, spec, 2)  # a person who has looked may go on
    again = Watcher(fleet.plane, spec).look()
    assert again is not None and again.answer is Answer.CONTINUE and again.decision.evidence["episodes"] == 6
    stop_trial(fleet.plane, "enough")
    with pytest.raises(ConfigError, match="has had 6 canary episodes"):
        start(fleet.plane, changed(episodes={"min": 3, "planned": 5, "max": 6}), 2)


def test_episodes_of_other_hours_are_not_compared(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    fleet.together([False] * 30, [True] * 30)
    ago(plane, schema.episodes, "committed_at", 2 * 3600, schema.episodes.c.robot_id == "p0")
    look = Watcher(plane, spec).look()
    assert look is not None and look.answer is Answer.CONTINUE and look.decision.evidence["pairs"] == 0


def test_a_trial_ends_with_time(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    fleet.together([True] * 4, [True] * 4)
    look = later(monkeypatch, plane, spec, 23)
    assert look.answer is Answer.CONTINUE
    look = later(monkeypatch, plane, spec, 25)
    assert look.answer is Answer.STOP and look.acted == "withdrawn"
    assert "on trial for more than 24 hours without an answer" in look.decision.reasons[0]
    assert fleet.boundary("c0") == 1
    start(plane, spec, 2)
    look = Watcher(plane, spec).look()
    assert look is not None and look.answer is Answer.CONTINUE, "started again, its hours begin anew"
    assert look.decision.evidence["episodes"] == 4


def test_safe_ends_with_time(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    fleet.together([True] * 30, [True] * 30)
    assert later(monkeypatch, plane, spec, 0).acted == "safe"
    assert later(monkeypatch, plane, spec, 23).acted == "safe"
    look = later(monkeypatch, plane, spec, 25)
    assert look.acted == "withdrawn" and "after it was found SAFE" in look.decision.reasons[0]
    assert decisions(plane) == ["promote", "canary", "safe", "withdraw"]


def later(monkeypatch: pytest.MonkeyPatch, plane: Deployment, spec: CanarySpec, hours: float) -> Look:
    """A look so many hours after now, by the catalog's clock."""
    from flows import canary_trial

    with monkeypatch.context() as clock:
        clock.setattr(canary_trial, "now", lambda connection: dialect.now(connection) + hours * 3600)
        look = Watcher(plane, spec).look()
    assert look is not None
    return look


@pytest.mark.parametrize("robot", ["c0", "l0"])
def test_a_canary_robot_that_refuses_the_policy_ends_its_trial(fleet: Fleet, robot: str) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    with plane.catalog.begin() as connection:
        record_refusals(connection, robot, [{"version": 2, "reason": "chunk of NaN"}])
    look = Watcher(plane, spec).look()
    assert look is not None
    if robot == "l0":
        assert look.answer is Answer.CONTINUE  # it stands in the way of a promotion; the trial shows what it does here
        return
    assert look.answer is Answer.STOP and look.acted == "withdrawn"
    assert look.decision.reasons[0] == "robot c0 refuses the policy: chunk of NaN"
    assert fleet.boundary("c0") == 1
    with pytest.raises(ConfigError, match="was refused by robot c0"):
        start(plane, spec, 2)


def test_what_the_shield_counted_is_harm(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    fleet.run("p0", [True], extra={"safety": {"off_limits": 5}})
    fleet.run("c0", [True], extra={"safety": {"late": 2}})
    look = Watcher(plane, spec).look()
    assert look is not None and look.answer is Answer.CONTINUE
    assert look.decision.evidence["safety"] == {"late": 2, "refused": 0}
    fleet.run("c0", [True], extra={"safety": {"off_limits": 1}})
    look = Watcher(plane, spec).look()
    assert look is not None and look.acted == "refused"
    assert look.decision.reasons[0] == "safety: 1 off_limits events, 0 allowed"


def test_a_person_ends_a_trial(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    with pytest.raises(ConfigError, match="no policy is on trial"):
        stop_trial(plane, "not yet")
    start(plane, spec, 2)
    assert fleet.boundary("c0") == 2
    assert stop_trial(plane, "hesitates", actor="ann") == 2
    assert fleet.boundary("c0") == 1 and watch(plane, spec) is None
    assert plane.registry.history()[-1]["evidence"]["reasons"] == ["hesitates"]


def test_another_decision_ends_the_watch(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    start(plane, spec, 2)
    assert watch(plane, spec, poll_s=0.0, on_look=lambda look: plane.registry.promote(2, {}) and None) is None


def test_a_watcher_that_is_killed_goes_on(fleet: Fleet) -> None:
    plane, spec = fleet.plane, changed(**QUICK)
    home = plane.settings.home
    file = home / "canary.yaml"
    file.write_text(json.dumps(spec.model_dump()))  # JSON is YAML
    start(plane, spec, 2)
    fleet.run("c0", [False] * 4)
    arguments = ["--home", str(home), "--gate", str(file), "--poll", "0.02"]
    first = start_process(main, arguments)
    wait_until(lambda: "CONTINUE" in log_of(home))
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert first.exitcode == KILLED and plane.registry.alias("canary") == 2
    fleet.together([False] * 20, [True] * 20)
    second = start_process(main, arguments)
    wait_until(lambda: plane.registry.alias("canary") is None)
    second.terminate()
    second.join(60)
    assert second.exitcode == 0
    assert decisions(plane) == ["promote", "canary", "refuse"] and "HARM" in log_of(home)


def log_of(home: Path) -> str:
    path = home / "logs" / "canary.jsonl"
    return path.read_text() if path.exists() else ""


# --- flow and command -------------------------------------------------------------------------------------------------


def test_the_flow_starts_a_trial_and_goes_on_with_it(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import promote

    made: dict[str, object] = {}
    monkeypatch.setattr(promote, "create_table_artifact", lambda rows, **fields: made.update({fields["key"]: rows}))
    monkeypatch.setattr(promote, "create_markdown_artifact", lambda text, **fields: made.update({fields["key"]: text}))
    plane, home = fleet.plane, fleet.plane.settings.home
    file = home / "canary.yaml"
    file.write_text(json.dumps(changed(**QUICK).model_dump()))
    start(plane, load_canary(file), 2)  # by a run that was killed
    fleet.together([False] * 30, [True] * 30)
    answer = promote.canary.fn(str(home), gate=str(file), poll_s=0.0)
    assert (answer["version"], answer["answer"], answer["acted"]) == (2, "HARM", "refused")
    assert "HARM" in str(made["canary-answer"]) and made["canary"] == answer["rows"]


def test_the_command(fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from flows.canary_command import canary
    from flows.cli import guarded

    monkeypatch.setenv("COLUMNS", "160")
    app = typer.Typer()
    app.command()(canary)
    home = fleet.plane.settings.home
    file = home / "canary.yaml"
    file.write_text(json.dumps(changed(**QUICK).model_dump()))

    def lwd(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = guarded(lambda: app([str(word) for word in (*words, "--home", home)], standalone_mode=False))
        return code, *capsys.readouterr()

    code, _, messages = lwd("--once")
    assert code == 2 and "no policy is on trial" in messages
    start(fleet.plane, load_canary(file), 2)
    fleet.run("c0", [True] * 2)
    code, out, _ = lwd("--once", "--gate", file)
    assert code == 10 and "CONTINUE: policy v2" in out and "S1" in out and "takeovers" in out
    code, out, _ = lwd("--stop", "--reason", "enough", "--actor", "ann")
    assert code == 0 and "v2 is no longer on trial" in out
    assert fleet.plane.registry.history()[-1]["proposer"] == "ann"
