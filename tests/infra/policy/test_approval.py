"""An approval is a person's signature over an artifact, its evidence and one champion; useless for anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from policies import Channel

from infra.errors import ConfigError, LwdError, UntrustedPolicyError
from infra.policy.approval import (
    Approval,
    create_person_key,
    enrol_person,
    evidence_digest,
    load_person_key,
    people,
    verify_approval,
)
from infra.policy.keys import Signer, stage_key
from infra.policy.registry import Registry

EVIDENCE = {"verdict": "PASS", "pooled": {"difference": {"mean": 0.125, "low": 0.02}}, "reasons": ["shown better"]}


def person(folder: Path, name: str, keys: Path | None = None) -> Signer:
    """A person with a key, enrolled where `keys` is given."""
    create_person_key(folder / f"{name}.pem")
    if keys is not None:
        enrol_person(keys, name, folder / f"{name}.pub")
    return load_person_key(folder / f"{name}.pem")


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    channel = Channel(tmp_path)
    for _ in range(3):
        channel.publish(None)
    return channel


@pytest.fixture
def registry(channel: Channel) -> Registry:
    """Of a deployment that asks for approval; policy 1 is the champion, policy 2 is proposed."""
    Registry(channel.plane.catalog, channel.signer).promote(1, {})
    registry = Registry(channel.plane.catalog, channel.signer, approval=True, keys_dir=channel.home / "keys")
    registry.propose(2, EVIDENCE, against=1, proposer="gate")
    return registry


def test_an_enrolled_person_s_approval_promotes(channel: Channel, registry: Registry) -> None:
    bob = person(channel.home, "bob", channel.home / "keys")
    proposal = registry.proposal(2)
    assert (proposal.against, proposal.evidence) == (1, EVIDENCE)
    card = registry.promote(2, proposal.evidence, against=1, approval=proposal.approval("bob").signed(bob))
    assert card.approver == "bob" and registry.alias("champion") == 2
    row = registry.history()[-1]
    assert Approval(**row["evidence"]["approval"]).evidence_sha256 == evidence_digest(EVIDENCE)
    verify_approval(channel.home / "keys", Approval(**row["evidence"]["approval"]))  # the audit can be checked later


def test_without_an_approval_nothing_is_promoted(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="needs a person's approval"):
        registry.promote(2, EVIDENCE, against=1)
    assert registry.alias("champion") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"artifact_sha256": "0" * 64},
        {"evidence_sha256": "0" * 64},
        {"champion": None},
        {"champion": 3},
        {"version": 3},
        {"approver": "ann"},
        {"approver": "../bob"},
        {"approver": "gate"},
    ],
)
def test_an_approval_of_anything_else_is_refused(
    channel: Channel, registry: Registry, change: dict[str, object]
) -> None:
    keys = channel.home / "keys"
    bob = person(channel.home, "bob", keys)
    person(channel.home, "ann", keys)
    person(channel.home, "gate", keys)
    approval = replace(registry.proposal(2).approval("bob"), **change)  # type: ignore[arg-type]
    for signed in (approval.signed(bob), replace(registry.proposal(2).approval("bob").signed(bob), **change)):  # type: ignore[arg-type]
        with pytest.raises((UntrustedPolicyError, ConfigError)):
            registry.promote(2, EVIDENCE, against=1, approval=signed)
    assert registry.alias("champion") == 1


def test_only_the_enrolled_key_counts(channel: Channel, registry: Registry) -> None:
    stranger = person(channel.home / "elsewhere", "bob")
    approval = registry.proposal(2).approval("bob")
    with pytest.raises(UntrustedPolicyError, match="nobody of that name"):
        registry.promote(2, EVIDENCE, approval=approval.signed(stranger))
    person(channel.home, "bob", channel.home / "keys")
    for signature in (
        stranger.sign(approval.statement()),
        channel.signer.sign(approval.statement()),
        "",
        ":",
        "x" * 99,
    ):
        with pytest.raises(UntrustedPolicyError):
            registry.promote(2, EVIDENCE, approval=replace(approval, signature=signature))


def test_an_approval_ends_with_the_champion_that_it_was_given_against(channel: Channel, registry: Registry) -> None:
    bob = person(channel.home, "bob", channel.home / "keys")
    stale = registry.proposal(2).approval("bob").signed(bob)
    Registry(channel.plane.catalog, channel.signer).promote(2, {}, against=1)
    Registry(channel.plane.catalog, channel.signer).rollback(actor="ann", reason="r")
    with pytest.raises(ConfigError, match="rolled back"):
        registry.promote(2, EVIDENCE, approval=stale)
    registry.propose(3, EVIDENCE, against=1)
    old = registry.proposal(3).approval("bob").signed(bob)
    channel.publish(None)
    Registry(channel.plane.catalog, channel.signer).promote(3, {}, against=1)
    with pytest.raises(LwdError):
        registry.promote(3, EVIDENCE, approval=old)
    assert registry.alias("champion") == 3


def test_a_proposal_is_recorded_once_and_the_last_one_counts(registry: Registry) -> None:
    registry.propose(2, EVIDENCE, against=1)
    assert [row["decision"] for row in registry.history()].count("propose") == 1
    registry.propose(2, EVIDENCE | {"more": 1}, against=1)
    assert registry.proposal(2).evidence == EVIDENCE | {"more": 1}
    with pytest.raises(ConfigError, match="nobody proposed policy 3"):
        registry.proposal(3)


@pytest.mark.parametrize("how", ["command", "file"])
@pytest.mark.parametrize("whose", ["ann's", "signing.pem", "publishing.pem", "next.pem"])
def test_a_key_approves_for_one_person_and_never_for_the_deployment(
    channel: Channel, registry: Registry, tmp_path: Path, whose: str, how: str
) -> None:
    """Ann's key under a second name, or a key that the deployment holds: both would let one party do both parts."""
    keys = channel.home / "keys"
    if whose == "ann's":
        signer, public = person(channel.home, "ann", keys), keys / "people" / "ann.pub"
    else:
        stage_key(keys)
        signer = load_person_key(keys / whose)
        folder = keys / "trusted" / "publish" if whose == "publishing.pem" else keys / "trusted"
        public = folder / f"{signer.key_id}.pub"
    if how == "command":
        with pytest.raises(ConfigError, match="also ann's|the deployment's own"):
            enrol_person(keys, "bob", public)
    (keys / "people").mkdir(exist_ok=True)
    (keys / "people" / "bob.pub").write_bytes(public.read_bytes())
    approval = registry.proposal(2).approval("bob").signed(signer)
    with pytest.raises(UntrustedPolicyError, match="also ann's|the deployment's own"):
        registry.promote(2, EVIDENCE, against=1, proposer="ann", approval=approval)
    assert registry.alias("champion") == 1


def test_a_proposer_does_not_approve_by_another_spelling_of_the_name(channel: Channel, registry: Registry) -> None:
    bob = person(channel.home, "Bob", channel.home / "keys")
    approval = registry.proposal(2).approval("Bob").signed(bob)
    with pytest.raises(ConfigError, match="cannot approve it"):
        registry.promote(2, EVIDENCE, against=1, proposer="bob", approval=approval)


def test_people_keep_their_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    bob = person(tmp_path, "bob", keys)
    assert people(keys) == {"bob": bob.key_id}
    assert (tmp_path / "bob.pem").stat().st_mode & 0o777 == 0o600
    assert enrol_person(keys, "bob", tmp_path / "bob.pub") == bob.key_id
    person(tmp_path / "other", "bob")
    with pytest.raises(ConfigError, match="enrolled with another key"):
        enrol_person(keys, "bob", tmp_path / "other" / "bob.pub")
    with pytest.raises(ConfigError, match="exists"):
        create_person_key(tmp_path / "bob.pem")
    for name in ("", "../bob", "a/b", "x" * 65, "bob\n"):
        with pytest.raises(ConfigError, match="no person's name"):
            enrol_person(keys, name, tmp_path / "bob.pub")
    with pytest.raises(ConfigError, match="not an ed25519 public key"):
        enrol_person(keys, "eve", tmp_path / "bob.pem")
