"""A policy artifact: a folder of weights and its signed manifest.

The learner exports a bundle (`policy.safetensors`, `architecture.json`; never a pickle). `seal` adds
`manifest.json`, which names every file's sha256 and where the policy comes from, and `manifest.sig`, an ed25519
signature over the manifest's canonical JSON. `verify` believes nothing that these two do not cover.
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
from infra.files import write_durably
from infra.policy.keys import Signer, TrustStore, canonical_json

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
WEIGHTS, ARCHITECTURE = "policy.safetensors", "architecture.json"
COHORTS = ("learning", "canary", "production")

_FILE_NAME = re.compile(r"^[a-z0-9_]+\.(safetensors|json)$")
_MAX_FILE_BYTES = 8 * 2**30


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle."""

    sha256: str
    size: int


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
    """

    version: int
    parent: int | None
    snapshot_version: int
    cohort: str
    architecture_sha256: str
    normaliser_sha256: str | None
    files: dict[str, FileEntry]
    created_at: float

    def document(self) -> dict[str, Any]:
        """As the JSON document that is signed."""
        return {"type": "lwd-policy-manifest", **asdict(self)}

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the identity of the artifact, to which approval is bound."""
        return hashlib.sha256(canonical_json(self.document())).hexdigest()

    @classmethod
    def parse(cls, data: bytes, name: str) -> Manifest:
        """Read a manifest.

        Raises:
            UntrustedPolicyError: it is not one, or names a file that no bundle may hold.
        """
        fix = "publish the policy again; it was not used"
        try:
            document = json.loads(data)
            if document.pop("type") != "lwd-policy-manifest":
                raise ValueError("type is not lwd-policy-manifest")
            files = {key: FileEntry(str(v["sha256"]), int(v["size"])) for key, v in document.pop("files").items()}
            manifest = cls(files=files, **document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UntrustedPolicyError(f"{name} is not a policy manifest ({error})", fix) from error
        for key, entry in files.items():
            if not _FILE_NAME.match(key) or key == MANIFEST or not 0 <= entry.size <= _MAX_FILE_BYTES:
                raise UntrustedPolicyError(f"{name} names the file {key!r} of {entry.size} bytes", fix)
        return manifest


def seal(
    bundle: Path,
    signer: Signer,
    *,
    version: int,
    parent: int | None,
    snapshot_version: int,
    cohort: str,
    normaliser_sha256: str | None = None,
) -> Manifest:
    """Write and sign the manifest of a bundle in place; a manifest that was there is replaced.

    Raises:
        ConfigError: the bundle lacks its weights or architecture, holds a foreign file, or the cohort is unknown.
    """
    if cohort not in COHORTS:
        raise ConfigError(f"unknown cohort {cohort!r}", f"use one of {', '.join(COHORTS)}")
    files = {}
    for path in sorted(bundle.iterdir()):
        if path.name in (MANIFEST, SIGNATURE):
            continue
        if not _FILE_NAME.match(path.name) or not path.is_file():
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
        data, signature = (bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise UntrustedPolicyError(f"{bundle} has no readable signed manifest ({error})", fix) from error
    manifest = Manifest.parse(data, f"{bundle.name}/{MANIFEST}")
    trust.verify(manifest.document(), signature, f"the manifest of policy {manifest.version}")
    return manifest


def verify(bundle: Path, trust: TrustStore) -> Manifest:
    """The manifest of a bundle, once signature, file list and every digest hold.

    Raises:
        UntrustedPolicyError: anything is missing, truncated, changed or one too many; the message names it.
    """
    manifest = read_signed_manifest(bundle, trust)
    fix = "publish the policy again; the last policy that was good stays in use"
    present = {path.name for path in bundle.iterdir()} - {MANIFEST, SIGNATURE}
    if present != manifest.files.keys():
        names = ", ".join(sorted(present ^ manifest.files.keys()))
        raise UntrustedPolicyError(f"policy {manifest.version}: missing or foreign files: {names}", fix)
    for name, entry in manifest.files.items():
        path = bundle / name
        if path.stat().st_size != entry.size:
            size = path.stat().st_size
            raise UntrustedPolicyError(f"policy {manifest.version}: {name} has {size} bytes, not {entry.size}", fix)
        if file_sha256(path) != entry.sha256:
            raise UntrustedPolicyError(f"policy {manifest.version}: {name} differs from its sha256", fix)
    for needed in (WEIGHTS, ARCHITECTURE):
        if needed not in manifest.files:
            raise UntrustedPolicyError(f"policy {manifest.version} lacks {needed}", fix)
    return manifest


def file_sha256(path: Path) -> str:
    """sha256 of a file, streamed."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
