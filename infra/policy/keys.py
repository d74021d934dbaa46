"""Who may sign policies: ed25519 keys on disk, signatures over canonical JSON.

A deployment's `keys/` holds two private keys (mode 0600), one for each role, and what robots trust:

    signing.pem                the role `promote`: policies, and what canary and production robots are told
    publishing.pem             the role `publish`, the learner's: policies, and what the learning cohort is told
    trusted/<id>.pub           public keys that may promote
    trusted/publish/<id>.pub   public keys that may publish only

A robot is given the `trusted` folder only. A machine that only learns needs `publishing.pem` and should not have
`signing.pem`. Where there is no `publishing.pem`, the deployment publishes with `signing.pem`.

Keys overlap: `stage_key` makes the next one and trusts it, `rotate_key` signs with it while the old one stays trusted,
`retire_key` ends that once nothing that robots run is signed by it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from infra.errors import ConfigError, UntrustedPolicyError
from infra.files import write_durably

Role = Literal["promote", "publish"]
SIGNING: dict[Role, str] = {"promote": "signing.pem", "publish": "publishing.pem"}
NEXT: dict[Role, str] = {"promote": "next.pem", "publish": "next-publishing.pem"}
_TRUSTED: dict[Role, str] = {"promote": "trusted", "publish": "trusted/publish"}


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """The one byte string that stands for a JSON document: sorted keys, no spaces, ASCII, finite numbers."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def key_id(public: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the sha256 of the raw public key."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


class Signer:
    """Signs documents with the deployment's private key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.key_id = key_id(private.public_key())

    def sign(self, document: Mapping[str, Any]) -> str:
        """The signature of a document as `<key id>:<base64>`."""
        return f"{self.key_id}:{base64.b64encode(self._private.sign(canonical_json(document))).decode()}"


class TrustStore:
    """The public keys that a robot believes, each for a role; what may promote may also publish.

    Args:
        keys: by role and key id.
        keys_dir: where they came from. Keys that are added to it or removed from it count at once, without a restart.
    """

    def __init__(self, keys: Mapping[Role, Mapping[str, Ed25519PublicKey]], keys_dir: Path | None = None) -> None:
        self._keys = {role: dict(found) for role, found in keys.items()}
        self._keys_dir = keys_dir

    def verify(self, document: Mapping[str, Any], signature: str, name: str, role: Role = "publish") -> None:
        """Check the signature of a document, called `name` in errors.

        Args:
            role: what the key that signed it must be allowed to do.

        Raises:
            UntrustedPolicyError: signed by an unknown key, by one without that role, not signed, or changed after it
                was signed.
        """
        self._refresh()
        identity, _, encoded = signature.partition(":")
        allowed = self._keys.get("promote", {}) | (self._keys.get("publish", {}) if role == "publish" else {})
        public = allowed.get(identity)
        if public is None and identity in self._keys.get("publish", {}):
            raise UntrustedPolicyError(
                f"{name} is signed by {identity}, a key that may publish and not promote",
                "promote it with the deployment's own key; the learner's key is for the learning cohort",
            )
        if public is None:
            raise UntrustedPolicyError(
                f"{name} is signed by the unknown key {identity[:64]!r}",
                f"publish it with a trusted key, or add that key to keys/trusted; trusted: {', '.join(allowed)}",
            )
        check_signature(public, document, encoded, name)

    def _refresh(self) -> None:
        if self._keys_dir is None or _listed(self._keys_dir) == {
            role: set(found) for role, found in self._keys.items()
        }:
            return
        try:
            self._keys = _read_trusted(self._keys_dir)
        except ConfigError as error:  # a robot at work refuses the policy and goes on with the one that it has
            raise UntrustedPolicyError(error.problem, error.fix) from error


def check_signature(public: Ed25519PublicKey, document: Mapping[str, Any], encoded: str, name: str) -> None:
    """Check a signature, in base64, of a document that is called `name` in errors.

    Raises:
        UntrustedPolicyError: it is not one, or the document was changed.
    """
    try:
        raw = base64.b64decode(encoded, validate=True)
        if base64.b64encode(raw).decode() != encoded:  # spare bits of the last digit: one spelling only
            raise ValueError("not canonical base64")
        public.verify(raw, canonical_json(document))
    except (InvalidSignature, binascii.Error, ValueError, TypeError) as error:
        raise UntrustedPolicyError(
            f"the signature of {name} does not match its content", "publish it again; it was not used"
        ) from error


def create_keys(keys_dir: Path) -> Signer:
    """The deployment's signing key, made on first use with the learner's; safe when two processes do so at once."""
    if not (keys_dir / SIGNING["promote"]).exists():  # a deployment that had one key goes on with one
        _generate(keys_dir, keys_dir / SIGNING["promote"])
        _generate(keys_dir, keys_dir / SIGNING["publish"])
        _trusted(keys_dir, keys_dir / SIGNING["publish"], "publish")
    return _trusted(keys_dir, keys_dir / SIGNING["promote"], "promote")


def stage_key(keys_dir: Path, role: Role = "promote") -> str:
    """Make the next key of a role, or find the one made before, and trust it; its id.

    Nothing is signed with it yet: there is time to bring `trusted/` to the robots.
    """
    load_signer(keys_dir, role)
    if not (keys_dir / NEXT[role]).exists():
        _generate(keys_dir, keys_dir / NEXT[role])
    return _trusted(keys_dir, keys_dir / NEXT[role], role).key_id


def rotate_key(keys_dir: Path, role: Role = "promote") -> tuple[str, str]:
    """Sign with the staged key of a role from now on, or with a new one where none was staged; ids of old and new key.

    The old public key stays trusted; its private half is gone. A process that is running goes on signing with it until
    it is started again. A deployment that publishes with its one signing key gets a key of the learner's this way.

    Raises:
        ConfigError: there is no key to replace.
    """
    old = load_signer(keys_dir, role).key_id
    new = stage_key(keys_dir, role)  # trusted before the first signature
    os.replace(keys_dir / NEXT[role], keys_dir / SIGNING[role])
    return old, new


def retire_key(keys_dir: Path, identity: str) -> None:
    """Trust a key no more. The caller has seen to it that nothing in use is signed by it.

    Raises:
        ConfigError: it is not trusted, or it is one that signs, now or next.
    """
    known = _listed(keys_dir)
    if not any(identity in found for found in known.values()):
        trusted = ", ".join(sorted(set().union(*known.values())))
        raise ConfigError(f"the key {identity} is not trusted", f"trusted are: {trusted}")
    for name in (*SIGNING.values(), *NEXT.values()):
        if key_at(keys_dir / name) == identity:
            raise ConfigError(f"{identity} is the key in {keys_dir / name}", "rotate first: `lwd keys rotate`")
    for folder in _TRUSTED.values():
        (keys_dir / folder / f"{identity}.pub").unlink(missing_ok=True)


def trusted_ids(keys_dir: Path) -> dict[str, Role]:
    """The role of each trusted key, by id."""
    return {identity: role for role, found in reversed(_listed(keys_dir).items()) for identity in sorted(found)}


def key_at(path: Path) -> str | None:
    """The id of the private key in a file; None where there is no file."""
    return Signer(read_private(path)).key_id if path.exists() else None


def signed_by(signature: str) -> str:
    """The id of the key that a signature says it is of."""
    return signature.partition(":")[0]


def load_signer(keys_dir: Path, role: Role = "promote") -> Signer:
    """The key that signs for a role; for `publish`, the signing key where the learner has none of its own.

    Raises:
        ConfigError: there is none, or it is no ed25519 key.
    """
    own = keys_dir / SIGNING[role]
    return Signer(read_private(own if role == "promote" or own.exists() else keys_dir / SIGNING["promote"]))


def load_trusted(keys_dir: Path) -> TrustStore:
    """The trusted public keys below `keys_dir`.

    Raises:
        ConfigError: there is none, or a file is no ed25519 public key of the name it bears.
    """
    return TrustStore(_read_trusted(keys_dir), keys_dir)


def _listed(keys_dir: Path) -> dict[Role, set[str]]:
    return {role: {path.stem for path in (keys_dir / folder).glob("*.pub")} for role, folder in _TRUSTED.items()}


def _read_trusted(keys_dir: Path) -> dict[Role, dict[str, Ed25519PublicKey]]:
    keys: dict[Role, dict[str, Ed25519PublicKey]] = {}
    for role, identities in _listed(keys_dir).items():
        keys[role] = {}
        for identity in sorted(identities):
            path = keys_dir / _TRUSTED[role] / f"{identity}.pub"
            public = read_public(path)
            if key_id(public) != identity:
                raise ConfigError(f"{path} holds the key {key_id(public)}", "name the file by the key's own id")
            keys[role][identity] = public
    if not any(keys.values()):
        raise ConfigError(f"no trusted key in {keys_dir / 'trusted'}", "copy keys/trusted from the publisher")
    return keys


def read_public(path: Path) -> Ed25519PublicKey:
    """The public key in a file, in base64.

    Raises:
        ConfigError: there is none.
    """
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(path.read_bytes(), validate=False))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not an ed25519 public key", "copy it again from its owner") from error


def write_public(path: Path, public: Ed25519PublicKey) -> None:
    """Write a public key's file, as `read_public` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, base64.b64encode(public.public_bytes_raw()) + b"\n")


def _generate(keys_dir: Path, path: Path) -> None:
    """Make a private key at `path`, unless another process is first."""
    keys_dir.mkdir(parents=True, exist_ok=True)
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    fresh = keys_dir / f"{path.stem}.{os.getpid()}.new"
    write_durably(fresh, pem, mode=0o600)
    try:
        os.link(fresh, path)  # fails when another process was first: its key counts
    except FileExistsError:
        pass
    finally:
        fresh.unlink()


def _trusted(keys_dir: Path, path: Path, role: Role) -> Signer:
    """The signer of a private key's file, its public half trusted for a role."""
    private = read_private(path)
    public = private.public_key()
    trusted = keys_dir / _TRUSTED[role] / f"{key_id(public)}.pub"
    if not trusted.exists():
        write_public(trusted, public)
    return Signer(private)


def read_private(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file.

    Raises:
        ConfigError: there is none, or it is no ed25519 key.
    """
    fix = "restore it from its backup, or start a deployment with new keys: robots must then trust the new one"
    try:
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"signing key {path} cannot be read ({error})", fix) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"signing key {path} is not an ed25519 key", fix)
    return private
