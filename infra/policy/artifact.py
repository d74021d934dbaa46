"""A policy artifact: a folder of weights and its signed manifest.

The learner exports a bundle (`policy.safetensors`, `architecture.json`; never a pickle). `seal` adds
`manifest.json`, which names every file's sha256 and where the policy comes from, and `manifest.sig`, an ed25519
signature over the manifest's canonical JSON. `verify` believes nothing that these two do not cover.

A large policy travels as its action expert alone: its manifest then names the *base*, the frozen rest, by digest. The
base is stored and fetched once (`infra.policy.bases`) and stands in the folder as `base.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, UntrustedPolicyError
from infra.files import open_regular, read_capped, write_durably
from infra.policy.keys import Signer, TrustStore, canonical_json

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
WEIGHTS, ARCHITECTURE, BASE = "policy.safetensors", "architecture.json", "base.safetensors"
COHORTS = ("learning", "canary", "production")

MAX_MANIFEST_BYTES, MAX_SIGNATURE_BYTES = 2**17, 2**10
_FILE_NAME = re.compile(r"^(?!(?:con|prn|aux|nul|com\d|lpt\d)\.)[a-z0-9_]{1,64}\.(safetensors|json)$")  # no device's
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_MAX_FILES = 64
_MAX_FILE_BYTES = 8 * 2**30  # of one file, and of all that a bundle holds
_MAX_BASE_BYTES = 64 * 2**30
_MAX_INT = 2**31 - 1
_AGAIN = "publish the policy again; the last policy that was good stays in use"


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle."""

    sha256: str
    size: int


@dataclass(frozen=True)
class BaseEntry:
    """The base that a policy is bound to; `name` is always `base.safetensors`."""

    sha256: str
    size: int
    name: str = BASE


@dataclass(frozen=True)
class Manifest:
    """What a policy is and where it comes from.

    Attributes:
        version: monotone over the deployment, from 1.
        parent: version that it was trained on from; None for the first.
        snapshot_version: data snapshot that the learner had read; 0 before any.
        cohort: robots that it was first published to.
        architecture_sha256: of `architecture.json`.
        normaliser_sha256: of the normaliser's statistics, None where the bundle has none.
        files: every file of the bundle by name.
        created_at: seconds since the epoch; for people, never compared.
        base: what the weights complete; None where they are the whole policy.
    """

    version: int
    parent: int | None
    snapshot_version: int
    cohort: str
    architecture_sha256: str
    normaliser_sha256: str | None
    files: dict[str, FileEntry]
    created_at: float
    base: BaseEntry | None = None

    def document(self) -> dict[str, Any]:
        """As the JSON document that is signed; without a base, the one that was signed before there were bases."""
        fields = asdict(self)
        if self.base is None:
            del fields["base"]
        return {"type": "lwd-policy-manifest", **fields}

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the identity of the artifact, to which approval is bound."""
        return hashlib.sha256(canonical_json(self.document())).hexdigest()

    @property
    def content(self) -> str:
        """sha256 over the digests of all files and of the base: the same for one policy under two versions."""
        files = {name: entry.sha256 for name, entry in self.files.items()}
        return hashlib.sha256(
            canonical_json({"files": files, "base": None if self.base is None else self.base.sha256})
        ).hexdigest()

    @classmethod
    def parse(cls, data: bytes, name: str) -> Manifest:
        """Read a manifest.

        Raises:
            UntrustedPolicyError: it is not one, or names a file or a base that no bundle may hold.
        """
        fix = "publish the policy again; it was not used"
        try:
            if len(data) > MAX_MANIFEST_BYTES:
                raise ValueError(f"more than {MAX_MANIFEST_BYTES} bytes")
            document = json.loads(data)
            if document.pop("type") != "lwd-policy-manifest":
                raise ValueError("type is not lwd-policy-manifest")
            files = {key: FileEntry(str(v["sha256"]), int(v["size"])) for key, v in document.pop("files").items()}
            base = document.pop("base", None)
            if base is not None:
                base = BaseEntry(str(base["sha256"]), int(base["size"]), str(base["name"]))
            manifest = cls(files=files, base=base, **document)
            _check_types(manifest)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UntrustedPolicyError(f"{name} is not a policy manifest ({str(error)[:200]})", fix) from error
        for key, entry in files.items():
            if not _FILE_NAME.fullmatch(key) or key in (MANIFEST, BASE) or not 0 <= entry.size <= _MAX_FILE_BYTES:
                raise UntrustedPolicyError(f"{name} names the file {key[:80]!r} of {entry.size} bytes", fix)
        if len(files) > _MAX_FILES or sum(entry.size for entry in files.values()) > _MAX_FILE_BYTES:
            raise UntrustedPolicyError(
                f"{name} names {len(files)} files of {sum(entry.size for entry in files.values())} bytes, "
                f"at most {_MAX_FILES} of {_MAX_FILE_BYTES} are allowed",
                fix,
            )
        # The digest becomes a file name and an object's key: nothing but hex digits.
        if base is not None and not (
            base.name == BASE and _SHA256.fullmatch(base.sha256) and 0 < base.size <= _MAX_BASE_BYTES
        ):
            raise UntrustedPolicyError(f"{name} names the base {base.name!r} {base.sha256!r}, {base.size} bytes", fix)
        return manifest


def _check_types(manifest: Manifest) -> None:
    """Refuse by ValueError what is of another type or range than the fields are."""
    whole = {"version": manifest.version, "snapshot_version": manifest.snapshot_version, "parent": manifest.parent or 0}
    for name, value in whole.items():
        if type(value) is not int or not 0 <= value <= _MAX_INT:
            raise ValueError(f"{name} is no number of 0 to {_MAX_INT}")
    if type(manifest.created_at) not in (int, float) or not abs(manifest.created_at) < 2**40:
        raise ValueError("created_at is no time")
    digests = [manifest.architecture_sha256, *(entry.sha256 for entry in manifest.files.values())]
    if not isinstance(manifest.cohort, str) or not all(isinstance(d, str) and _SHA256.fullmatch(d) for d in digests):
        raise ValueError("a cohort or a digest is none")


def seal(
    bundle: Path,
    signer: Signer,
    *,
    version: int,
    parent: int | None,
    snapshot_version: int,
    cohort: str,
    normaliser_sha256: str | None = None,
    base: FileEntry | None = None,
) -> Manifest:
    """Write and sign the manifest of a bundle in place; a manifest that was there is replaced.

    Args:
        base: the base that the weights complete. It is not part of the bundle; where it lies in the folder all the
            same, as in one that was fetched, it must be this one.

    Raises:
        ConfigError: the bundle lacks its weights or architecture, holds a foreign file or another base, or the cohort
            is unknown.
    """
    if cohort not in COHORTS:
        raise ConfigError(f"unknown cohort {cohort!r}", f"use one of {', '.join(COHORTS)}")
    files = {}
    for path in sorted(bundle.iterdir()):
        if path.name in (MANIFEST, SIGNATURE):
            continue
        if path.name == BASE:
            if base is None or base != FileEntry(file_sha256(path), path.stat().st_size):
                raise ConfigError(f"{path} is not the base of this policy", "publish it with base=, or remove it there")
            continue
        if not _FILE_NAME.fullmatch(path.name) or not path.is_file():
            raise ConfigError(f"{path} has no place in a policy bundle", "keep only .safetensors and .json files there")
        files[path.name] = FileEntry(file_sha256(path), path.stat().st_size)
    for needed in (WEIGHTS, ARCHITECTURE):
        if needed not in files:
            raise ConfigError(f"policy bundle {bundle} lacks {needed}", "export it with lwd_model.bundle.export_bundle")
    manifest = Manifest(
        version=version,
        parent=parent,
        snapshot_version=snapshot_version,
        cohort=cohort,
        architecture_sha256=files[ARCHITECTURE].sha256,
        normaliser_sha256=normaliser_sha256,
        files=files,
        created_at=round(time.time(), 3),
        base=None if base is None else BaseEntry(base.sha256, base.size),
    )
    document = manifest.document()
    write_durably(bundle / MANIFEST, canonical_json(document))
    write_durably(bundle / SIGNATURE, signer.sign(document).encode())
    return manifest


def read_signed_manifest(bundle: Path, trust: TrustStore) -> Manifest:
    """The manifest of a bundle, once its signature holds; the files are not looked at.

    Raises:
        UntrustedPolicyError: it is missing, damaged, or not signed by a trusted key.
    """
    fix = "publish the policy again; it was not used"
    try:
        data = read_capped(bundle / MANIFEST, MAX_MANIFEST_BYTES)
        signature = read_capped(bundle / SIGNATURE, MAX_SIGNATURE_BYTES).decode("ascii")
    except (OSError, ValueError) as error:
        raise UntrustedPolicyError(f"{bundle} has no readable signed manifest ({error})", fix) from error
    manifest = Manifest.parse(data, f"{bundle.name}/{MANIFEST}")
    trust.verify(manifest.document(), signature, f"the manifest of policy {manifest.version}")
    return manifest


def verify(bundle: Path, trust: TrustStore, *, known_base: Path | None = None) -> Manifest:
    """The manifest of a bundle, once signature, file list and every digest hold, the base's among them.

    Args:
        known_base: a base whose digest the caller has checked; where the bundle's is this very file (a hard link),
            it is not hashed again.

    Raises:
        UntrustedPolicyError: anything is missing, truncated, changed or one too many; the message names it.
    """
    manifest = read_signed_manifest(bundle, trust)
    try:
        return _verified(manifest, bundle, known_base)
    except OSError as error:  # gone since, or no file
        raise UntrustedPolicyError(f"policy {manifest.version} cannot be read ({error})", _AGAIN) from error


def _verified(manifest: Manifest, bundle: Path, known_base: Path | None) -> Manifest:
    fix = _AGAIN
    present = {path.name for path in bundle.iterdir()} - {MANIFEST, SIGNATURE}
    expected: dict[str, FileEntry | BaseEntry] = {**manifest.files}
    if manifest.base is not None:
        expected[BASE] = manifest.base
    if present != expected.keys():
        names = ", ".join(sorted(present ^ expected.keys()))
        raise UntrustedPolicyError(f"policy {manifest.version}: missing or foreign files: {names}", fix)
    for name, entry in expected.items():
        path = bundle / name
        size = path.stat().st_size
        if size != entry.size:
            raise UntrustedPolicyError(f"policy {manifest.version}: {name} has {size} bytes, not {entry.size}", fix)
        if name == BASE and known_base is not None and path.samefile(known_base):
            continue
        if file_sha256(path) != entry.sha256:
            raise UntrustedPolicyError(f"policy {manifest.version}: {name} differs from its sha256", fix)
    for needed in (WEIGHTS, ARCHITECTURE):
        if needed not in manifest.files:
            raise UntrustedPolicyError(f"policy {manifest.version} lacks {needed}", fix)
    return manifest


def file_marks(bundle: Path) -> dict[str, tuple[int, ...]]:
    """What tells whether a file of a bundle was written to or replaced since: by name, its inode, size and times.

    Empty where there is no folder. A base's ctime is left out: it changes with each policy that is linked to it.
    """
    try:
        found = {path.name: path.stat() for path in bundle.iterdir()}
    except OSError:
        return {}
    ctimes = {name: 0 if name == BASE else stat.st_ctime_ns for name, stat in found.items()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns, ctimes[name]) for name, stat in found.items()}


def file_sha256(path: Path) -> str:
    """sha256 of a file, streamed."""
    with open_regular(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
