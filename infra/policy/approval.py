"""A person's approval of a promotion: a signature over what was looked at, by a key that only that person holds.

    keys/people/<name>.pub     the public keys of those who may approve, enrolled by whoever administers the deployment

A key is one person's: enrolled under two names, or one that the deployment itself signs with, it approves nothing.
An approval names the artifact, the evidence and the champion that it was compared with. It is of no use for other
bytes, for other evidence, or once there is another champion. Private keys of people are never in the home.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from infra.errors import ConfigError, UntrustedPolicyError
from infra.files import write_durably
from infra.policy.keys import (
    NEXT,
    SIGNING,
    Signer,
    canonical_json,
    check_signature,
    key_at,
    key_id,
    read_private,
    read_public,
    trusted_ids,
    write_public,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Approval:
    """What a person agreed to.

    Attributes:
        approver: an enrolled person's name.
        version: the policy's.
        artifact_sha256: digest of its manifest.
        evidence_sha256: digest of the evidence, `evidence_digest`.
        champion: version of the champion that the evidence compares with; None where there was none.
        signature: over all of the above.
    """

    approver: str
    version: int
    artifact_sha256: str
    evidence_sha256: str
    champion: int | None
    signature: str = ""

    def statement(self) -> dict[str, Any]:
        """What is signed."""
        return {name: value for name, value in asdict(self).items() if name != "signature"} | {"kind": "approval"}

    def signed(self, signer: Signer) -> Approval:
        """The same, signed."""
        return replace(self, signature=signer.sign(self.statement()))


def evidence_digest(evidence: Mapping[str, Any]) -> str:
    """The sha256 of evidence as canonical JSON."""
    return hashlib.sha256(canonical_json(evidence)).hexdigest()


def enrol_person(keys_dir: Path, name: str, public_key: Path) -> str:
    """Let a person approve, with the public key in a file; the key's id.

    Raises:
        ConfigError: the name is malformed or has another key already, the file holds no public key, or the key is
            somebody else's or the deployment's own.
    """
    path, public = _path(keys_dir, name), read_public(public_key)
    if owner := _another_owner(keys_dir, name, public):
        raise ConfigError(f"the key in {public_key} is {owner}", f"enrol a key that only {name} holds")
    if path.exists() and key_id(read_public(path)) != key_id(public):
        raise ConfigError(f"{name} is enrolled with another key", f"remove {path} first, if that key is lost")
    write_public(path, public)
    return key_id(public)


def people(keys_dir: Path) -> dict[str, str]:
    """The key ids of those who may approve, by name."""
    return {path.stem: key_id(read_public(path)) for path in sorted((keys_dir / "people").glob("*.pub"))}


def create_person_key(path: Path) -> str:
    """Make a person's private key at `path` and its public half beside it, with the suffix `.pub`; the key's id.

    Raises:
        ConfigError: there is a file already.
    """
    if path.exists():
        raise ConfigError(f"{path} exists", "use it, or name another file")
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, pem, mode=0o600)
    write_public(path.with_suffix(".pub"), private.public_key())
    return key_id(private.public_key())


def load_person_key(path: Path) -> Signer:
    """The signer of a person's private key; raises ConfigError where the file holds none."""
    return Signer(read_private(path))


def verify_approval(keys_dir: Path, approval: Approval) -> None:
    """Check that an enrolled person signed this.

    Raises:
        UntrustedPolicyError: the approver is not enrolled, the key is not theirs alone, or the signature is not theirs
            over this.
    """
    name = f"{approval.approver[:64]!r}'s approval of policy {approval.version}"
    try:
        public = read_public(_path(keys_dir, approval.approver))
    except ConfigError as error:
        raise UntrustedPolicyError(
            f"{name}: nobody of that name may approve", "enrol the person: `lwd keys enrol-person NAME FILE`"
        ) from error
    identity, _, encoded = approval.signature.partition(":")
    if identity != key_id(public):
        raise UntrustedPolicyError(f"{name} is signed by the key {identity[:16]!r}", "sign it with the enrolled key")
    if owner := _another_owner(keys_dir, approval.approver, public):
        raise UntrustedPolicyError(f"{name} is signed by a key that is {owner}", "enrol a key that one person holds")
    check_signature(public, approval.statement(), encoded, name)


def _another_owner(keys_dir: Path, name: str, public: Ed25519PublicKey) -> str:
    """Whose the key is besides `name`'s; empty where it is nobody else's."""
    identity = key_id(public)
    own = [key_at(keys_dir / file) for file in (*SIGNING.values(), *NEXT.values())]
    if identity in trusted_ids(keys_dir) or identity in own:
        return "the deployment's own"
    for path in sorted((keys_dir / "people").glob("*.pub")):
        if path.stem == name:
            continue
        try:
            if key_id(read_public(path)) == identity:
                return f"also {path.stem}'s"
        except ConfigError:  # a file that is no key is nobody's
            continue
    return ""


def _path(keys_dir: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:64]!r} is no person's name", "use letters, digits, '-', '_' and '.'")
    return keys_dir / "people" / f"{name}.pub"
