"""Who may sign policies: ed25519 keys on disk, signatures over canonical JSON.

A deployment's `keys/` holds `signing.pem` (the publisher's alone, mode 0600) and `trusted/<key id>.pub`. A robot is
given the `trusted` folder only; to rotate a key, add the new public key, sign with it, then remove the old one.
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
    """The public keys that a robot believes."""

    def __init__(self, keys: Mapping[str, Ed25519PublicKey]) -> None:
        self._keys = dict(keys)

    def verify(self, document: Mapping[str, Any], signature: str, name: str) -> None:
        """Check the signature of a document, called `name` in errors.

        Raises:
            UntrustedPolicyError: signed by an unknown key, not signed, or changed after it was signed.
        """
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


def create_keys(keys_dir: Path) -> Signer:
    """The deployment's signing key, made on first use; safe when two processes do so at once."""
    path = keys_dir / "signing.pem"
    if not path.exists():
        (keys_dir / "trusted").mkdir(parents=True, exist_ok=True)
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        fresh = keys_dir / f"signing.{os.getpid()}.new"
        write_durably(fresh, pem, mode=0o600)
        try:
            os.link(fresh, path)  # fails when another process was first: its key counts
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    private = _read_private(path)
    public = private.public_key()
    trusted = keys_dir / "trusted" / f"{key_id(public)}.pub"
    if not trusted.exists():
        write_durably(trusted, base64.b64encode(public.public_bytes_raw()) + b"\n")
    return Signer(private)


def load_signer(keys_dir: Path) -> Signer:
    """The signing key.

    Raises:
        ConfigError: there is none, or it is no ed25519 key.
    """
    return Signer(_read_private(keys_dir / "signing.pem"))


def load_trusted(keys_dir: Path) -> TrustStore:
    """The trusted public keys below `keys_dir`.

    Raises:
        ConfigError: there is none, or a file is no ed25519 public key of the name it bears.
    """
    keys = {}
    for path in sorted((keys_dir / "trusted").glob("*.pub")):
        try:
            public = Ed25519PublicKey.from_public_bytes(base64.b64decode(path.read_text(), validate=False))
        except ValueError as error:
            raise ConfigError(f"{path} is not an ed25519 public key", "copy it again from the publisher") from error
        if key_id(public) != path.stem:
            raise ConfigError(f"{path} holds the key {key_id(public)}", "name the file by the key's own id")
        keys[path.stem] = public
    if not keys:
        raise ConfigError(f"no trusted key in {keys_dir / 'trusted'}", "copy keys/trusted from the publisher")
    return TrustStore(keys)


def _read_private(path: Path) -> Ed25519PrivateKey:
    fix = "restore it from its backup, or start a deployment with new keys: robots must then trust the new one"
    try:
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"signing key {path} cannot be read ({error})", fix) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"signing key {path} is not an ed25519 key", fix)
    return private
