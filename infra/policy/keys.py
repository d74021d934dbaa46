"""Who may sign policies: ed25519 keys on disk, signatures over canonical JSON.

A deployment's `keys/` holds `signing.pem` (the publisher's alone, mode 0600) and `trusted/<key id>.pub`. A robot is
given the `trusted` folder only. Keys overlap: `stage_key` makes the next one and trusts it, `rotate_key` signs with it
while the old one stays trusted, `retire_key` ends that once nothing that robots run is signed by it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from infra.errors import ConfigError, UntrustedPolicyError
from infra.files import write_durably

SIGNING, NEXT = "signing.pem", "next.pem"


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
    """The public keys that a robot believes.

    Args:
        keys: by key id.
        folder: where they came from. Keys that are added to it or removed from it count at once, without a restart.
    """

    def __init__(self, keys: Mapping[str, Ed25519PublicKey], folder: Path | None = None) -> None:
        self._keys = dict(keys)
        self._folder = folder

    def verify(self, document: Mapping[str, Any], signature: str, name: str) -> None:
        """Check the signature of a document, called `name` in errors.

        Raises:
            UntrustedPolicyError: signed by an unknown key, not signed, or changed after it was signed.
        """
        self._refresh()
        identity, _, encoded = signature.partition(":")
        public = self._keys.get(identity)
        if public is None:
            raise UntrustedPolicyError(
                f"{name} is signed by the unknown key {identity!r}",
                f"publish it with a trusted key, or add that key to keys/trusted; trusted: {', '.join(self._keys)}",
            )
        try:
            raw = base64.b64decode(encoded, validate=True)
            if base64.b64encode(raw).decode() != encoded:  # spare bits of the last digit: one spelling only
                raise ValueError("not canonical base64")
            public.verify(raw, canonical_json(document))
        except (InvalidSignature, binascii.Error, ValueError, TypeError) as error:
            raise UntrustedPolicyError(
                f"the signature of {name} does not match its content", "publish it again; it was not used"
            ) from error

    def _refresh(self) -> None:
        if self._folder is None or {path.stem for path in self._folder.glob("*.pub")} == self._keys.keys():
            return
        try:
            self._keys = _read_trusted(self._folder)
        except ConfigError as error:  # a robot at work refuses the policy and goes on with the one that it has
            raise UntrustedPolicyError(error.problem, error.fix) from error


def create_keys(keys_dir: Path) -> Signer:
    """The deployment's signing key, made on first use; safe when two processes do so at once."""
    path = keys_dir / SIGNING
    if not path.exists():
        _generate(keys_dir, path)
    return _trusted(keys_dir, path)


def stage_key(keys_dir: Path) -> str:
    """Make the next signing key, or find the one made before, and trust it; its id.

    Nothing is signed with it yet: there is time to bring `trusted/` to the robots.
    """
    load_signer(keys_dir)
    if not (keys_dir / NEXT).exists():
        _generate(keys_dir, keys_dir / NEXT)
    return _trusted(keys_dir, keys_dir / NEXT).key_id


def rotate_key(keys_dir: Path) -> tuple[str, str]:
    """Sign with the staged key from now on, or with a new one where none was staged; ids of the old and the new key.

    The old public key stays trusted; its private half is gone. A process that is running goes on signing with it until
    it is started again.

    Raises:
        ConfigError: there is no signing key to replace.
    """
    old = load_signer(keys_dir).key_id
    new = stage_key(keys_dir)  # trusted before the first signature
    os.replace(keys_dir / NEXT, keys_dir / SIGNING)
    return old, new


def retire_key(keys_dir: Path, identity: str) -> None:
    """Trust a key no more. The caller has seen to it that nothing in use is signed by it.

    Raises:
        ConfigError: it is not trusted, or it is the one that signs, now or next.
    """
    path = keys_dir / "trusted" / f"{identity}.pub"
    known = trusted_ids(keys_dir)
    if identity not in known:
        raise ConfigError(f"the key {identity} is not trusted", f"trusted are: {', '.join(known)}")
    for name in (SIGNING, NEXT):
        if key_at(keys_dir / name) == identity:
            raise ConfigError(f"{identity} is the key in {keys_dir / name}", "rotate first: `lwd keys rotate`")
    path.unlink()


def trusted_ids(keys_dir: Path) -> list[str]:
    """Ids of the trusted keys."""
    return sorted(path.stem for path in (keys_dir / "trusted").glob("*.pub"))


def key_at(path: Path) -> str | None:
    """The id of the private key in a file; None where there is no file."""
    return Signer(_read_private(path)).key_id if path.exists() else None


def signed_by(signature: str) -> str:
    """The id of the key that a signature says it is of."""
    return signature.partition(":")[0]


def load_signer(keys_dir: Path) -> Signer:
    """The signing key.

    Raises:
        ConfigError: there is none, or it is no ed25519 key.
    """
    return Signer(_read_private(keys_dir / SIGNING))


def load_trusted(keys_dir: Path) -> TrustStore:
    """The trusted public keys below `keys_dir`.

    Raises:
        ConfigError: there is none, or a file is no ed25519 public key of the name it bears.
    """
    folder = keys_dir / "trusted"
    return TrustStore(_read_trusted(folder), folder)


def _read_trusted(folder: Path) -> dict[str, Ed25519PublicKey]:
    keys = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            public = Ed25519PublicKey.from_public_bytes(base64.b64decode(path.read_text(), validate=False))
        except ValueError as error:
            raise ConfigError(f"{path} is not an ed25519 public key", "copy it again from the publisher") from error
        if key_id(public) != path.stem:
            raise ConfigError(f"{path} holds the key {key_id(public)}", "name the file by the key's own id")
        keys[path.stem] = public
    if not keys:
        raise ConfigError(f"no trusted key in {folder}", "copy keys/trusted from the publisher")
    return keys


def _generate(keys_dir: Path, path: Path) -> None:
    """Make a private key at `path`, unless another process is first."""
    (keys_dir / "trusted").mkdir(parents=True, exist_ok=True)
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


def _trusted(keys_dir: Path, path: Path) -> Signer:
    """The signer of a private key's file, its public half trusted."""
    private = _read_private(path)
    public = private.public_key()
    trusted = keys_dir / "trusted" / f"{key_id(public)}.pub"
    if not trusted.exists():
        write_durably(trusted, base64.b64encode(public.public_bytes_raw()) + b"\n")
    return Signer(private)


def _read_private(path: Path) -> Ed25519PrivateKey:
    fix = "restore it from its backup, or start a deployment with new keys: robots must then trust the new one"
    try:
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"signing key {path} cannot be read ({error})", fix) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"signing key {path} is not an ed25519 key", fix)
    return private
