"""The registry: aliases, approval, refusal, rollback, and the card that each promotion leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from policies import Channel, make_base

from infra.catalog import schema
from infra.errors import ConfigError
from infra.policy.registry import Registry

EVIDENCE = {
    "verdict": "PASS",
    "reasons": ["pooled: shown better"],
    "per_task": {"S1": {"candidate": {"k": 45, "n": 50, "success": {"mean": 0.9, "low": 0.79, "high": 0.96}}}},
}


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    channel = Channel(tmp_path)
    for _ in range(4):
        channel.publish()
    return channel


def kinds(channel: Channel, cohort: str) -> list[tuple[str, int]]:
    return [(said.kind, said.version) for said in channel.source.announcements(cohort, 0)]


def aliases(registry: Registry) -> tuple[int | None, int | None, int | None]:
    return registry.alias("champion"), registry.alias("previous"), registry.alias("canary")


def test_promotion_moves_the_aliases_and_tells_production(channel: Channel) -> None:
    registry = channel.registry
    registry.promote(1, EVIDENCE)
    assert aliases(registry) == (1, None, None)
    registry.register_candidate(3, proposer="learner")
    assert aliases(registry) == (1, None, 3)
    assert kinds(channel, "production") == [("promote", 1)]  # a candidate concerns the canaries only
    registry.promote(3, EVIDENCE)
    assert aliases(registry) == (3, 1, None)
    assert kinds(channel, "production") == [("promote", 1), ("promote", 3)]
    assert [(row["decision"], row["version"], row["from_version"]) for row in registry.history()] == [
        ("promote", 1, None),
        ("canary", 3, 1),
        ("promote", 3, 1),
    ]
    assert [p["status"] for p in registry.policies()] == ["candidate", "champion", "candidate", "retired"]
    assert [p["aliases"] for p in registry.policies()] == [[], ["champion"], [], ["previous"]]


def test_rollback_goes_back_one_promotion_at_a_time(channel: Channel) -> None:
    registry = channel.registry
    for version in (1, 2, 4):
        registry.promote(version, EVIDENCE)
    assert registry.rollback(actor="ann", reason="drops the cube") == 2
    assert aliases(registry) == (2, 1, None)
    assert registry.rollback(actor="ann", reason="still") == 1
    assert aliases(registry) == (1, None, None)
    with pytest.raises(ConfigError, match="no previous champion"):
        registry.rollback(actor="ann", reason="again")
    assert kinds(channel, "production")[-2:] == [("rollback", 2), ("rollback", 1)]
    registry.promote(3, EVIDENCE)
    assert aliases(registry) == (3, 1, None)


def test_row_34_a_refused_canary_goes_back_to_the_champion_alone(channel: Channel) -> None:
    registry = channel.registry
    canary, production = channel.robot("c", "canary"), channel.robot("p", "production")
    registry.promote(1, EVIDENCE)
    registry.register_candidate(2, proposer="learner")
    for robot in (canary, production):
        robot.poll()
        robot.activate_at_boundary()
    assert (canary.active.version, production.active.version) == (2, 1)  # type: ignore[union-attr]
    registry.refuse(2, {"reasons": ["S1 worse"]})
    assert canary.poll() == 1 and production.poll() is None
    assert aliases(registry) == (1, None, None)
    for again in (lambda: registry.promote(2, EVIDENCE), lambda: registry.register_candidate(2, proposer="x")):
        with pytest.raises(ConfigError, match="was refused"):
            again()


def test_canaries_follow_a_promotion_below_the_candidate_on_trial(channel: Channel) -> None:
    canary = channel.robot("c", "canary")
    channel.registry.register_candidate(4, proposer="learner")
    canary.poll()
    canary.activate_at_boundary()
    channel.registry.promote(3, EVIDENCE)
    assert canary.poll() == 3


def test_what_cannot_be_promoted(channel: Channel) -> None:
    registry = channel.registry
    registry.promote(2, EVIDENCE)
    with pytest.raises(ConfigError, match="not newer than the champion"):
        registry.promote(1, EVIDENCE)
    with pytest.raises(ConfigError, match="no policy 9"):
        registry.promote(9, EVIDENCE)
    with pytest.raises(ConfigError, match="is the champion"):
        registry.refuse(2, {})
    assert aliases(registry) == (2, None, None)


@pytest.mark.parametrize("how", ["refused", "rolled back"])
def test_bytes_that_were_refused_are_refused_under_any_version(channel: Channel, how: str) -> None:
    """Published again they would be a new candidate: with start states of its own, a place in the stream, a budget."""
    registry = channel.registry
    registry.promote(1, EVIDENCE)
    first, again = channel.publish(None, seed=9), channel.publish("canary", seed=9)
    if how == "refused":
        registry.refuse(first, {})
    else:
        registry.promote(first, EVIDENCE)
        registry.rollback(actor="ann", reason="r")
    for ask in (
        lambda: registry.require_promotable(again),
        lambda: registry.promote(again, EVIDENCE),
        lambda: registry.propose(again, EVIDENCE, against=1),
        lambda: registry.register_candidate(again, proposer="ann"),
    ):
        with pytest.raises(ConfigError, match=f"has the bytes of policy {first}, which was {how}"):
            ask()
    base = make_base(channel.home / "base.safetensors")
    other = channel.publish(None, seed=9, base=base)  # the same head on a base is another policy
    registry.promote(other, EVIDENCE)


def test_evidence_against_an_earlier_champion_promotes_nothing(channel: Channel) -> None:
    registry = channel.registry
    registry.promote(1, EVIDENCE)
    registry.promote(2, EVIDENCE, against=1)
    with pytest.raises(ConfigError, match="compares policy 3 with policy 1; the champion is 2"):
        registry.promote(3, EVIDENCE, against=1)
    assert registry.alias("champion") == 2


def test_a_promotion_leaves_a_card(channel: Channel) -> None:
    channel.registry.promote(1, EVIDENCE)
    channel.registry.promote(2, EVIDENCE, known_failures=["misses the handle from the left"])
    document = json.loads((channel.home / "cards" / "policy-00002.json").read_text())
    assert (document["version"], document["rollback_target"], document["approver"]) == (2, 1, None)
    assert document["evidence"] == EVIDENCE and document["snapshot_version"] == 0
    text = (channel.home / "cards" / "policy-00002.md").read_text()
    for wanted in ("# Policy 2", "0.9 [0.79, 0.96]", "| S1 |", "rollback target: policy 1", "misses the handle"):
        assert wanted in text
    assert channel.registry.history()[-1]["evidence"] == {"card": document, "at_snapshot": 0}


@pytest.mark.parametrize(
    "statement",
    [sa.update(schema.promotions).values(proposer="someone else"), sa.delete(schema.promotions)],
    ids=["update", "delete"],
)
def test_the_audit_cannot_be_rewritten(channel: Channel, statement: sa.Executable) -> None:
    channel.registry.promote(1, EVIDENCE)
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), channel.plane.catalog.begin() as connection:
        connection.execute(statement)
    assert [row["proposer"] for row in channel.registry.history()] == ["gate"]


def test_one_candidate_is_on_trial_at_a_time(channel: Channel) -> None:
    registry = channel.registry
    registry.promote(1, EVIDENCE)
    registry.register_candidate(3, proposer="ann")
    registry.register_candidate(3, proposer="ann")  # repeated after a kill
    assert kinds(channel, "canary") == [("promote", 1), ("publish", 3)]
    with pytest.raises(ConfigError, match="policy 3 is on trial"):
        registry.register_candidate(4, proposer="ann")


@pytest.mark.parametrize(("decision", "status"), [("refuse", "refused"), ("withdraw", "candidate")])
def test_a_trial_ends_once_and_the_champion_comes_back(channel: Channel, decision: str, status: str) -> None:
    registry = channel.registry
    registry.promote(1, EVIDENCE)
    registry.register_candidate(2, proposer="ann")
    assert registry.end_trial(2, {"reasons": ["why"]}, decision=decision)  # type: ignore[arg-type]
    assert not registry.end_trial(2, {}, decision=decision)  # type: ignore[arg-type]
    assert kinds(channel, "canary")[-1] == ("rollback", 1)
    assert aliases(registry) == (1, None, None)
    row = registry.history()[-1]
    assert (row["decision"], row["evidence"]["reasons"], row["from_version"]) == (decision, ["why"], 1)
    assert next(p["status"] for p in registry.policies() if p["version"] == 2) == status
    with pytest.raises(ConfigError, match="not on trial"):
        registry.promote(2 if status == "candidate" else 3, EVIDENCE, on_trial=True)
    if status == "candidate":
        registry.register_candidate(2, proposer="ann")
        assert channel.robot("c", "canary").poll() == 2


def test_a_trial_that_went_well_is_recorded_once_and_goes_on(channel: Channel) -> None:
    registry = channel.registry
    registry.promote(1, EVIDENCE)
    assert not registry.pass_trial(2, {})
    registry.register_candidate(2, proposer="ann")
    assert registry.pass_trial(2, {"reasons": ["safe"]}) and registry.pass_trial(2, {})
    assert [row["decision"] for row in registry.history()] == ["promote", "canary", "safe"]
    assert aliases(registry) == (1, None, 2)
    registry.promote(2, EVIDENCE, on_trial=True)
    assert aliases(registry) == (2, 1, None)
