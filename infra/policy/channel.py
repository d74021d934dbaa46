"""Publishing policies: objects first, then the row and its announcement in one transaction.

Online, a large policy's bundle holds the action expert alone; its base is stored once, beside the bundles.

A robot reads announcements through a `PolicySource`; `CatalogPolicySource` is the one of the local profile, where
robots share the machine with the catalog.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from infra.catalog import Catalog, schema
from infra.catalog.dialect import now
from infra.crashpoints import crashpoint
from infra.errors import ConfigError, UnavailableError, UntrustedPolicyError
from infra.objects import ObjectStore
from infra.policy.announcement import Announcement, Kind, base_key, bundle_prefix
from infra.policy.artifact import (
    ARCHITECTURE,
    MANIFEST,
    SIGNATURE,
    FileEntry,
    Manifest,
    file_sha256,
    read_signed_manifest,
    seal,
    verify,
)
from infra.policy.bases import BaseCache
from infra.policy.keys import Signer, TrustStore
from infra.policy.permission import Permissions, Validity
from infra.policy.permit import current_epoch, permissions_of, permit

CONTENT = "content_sha256"  # in a policy's details: what tells the same bytes under another version
_TRIES = 20
_PAGE = 10_000  # announcements in one look
_USUAL = 2**31  # a number beyond is one that was signed in error


def announce(
    connection: sa.Connection,
    signer: Signer,
    *,
    cohort: str,
    version: int,
    kind: Kind,
    manifest_sha256: str,
    validity: Validity | None = None,
) -> Announcement:
    """Append a signed announcement, and the permission to act upon it, inside the caller's write transaction."""
    epoch, table = current_epoch(connection), schema.announcements
    newest = sa.select(sa.func.max(table.c.seq))
    last = connection.execute(newest.where(table.c.epoch == epoch)).scalar()
    if last is None:  # the first of an epoch: numbers are unique over all of them
        last = connection.execute(newest.where(table.c.seq < _USUAL)).scalar()
    unsigned = Announcement(
        (last or 0) + 1, cohort, version, kind, manifest_sha256, round(now(connection), 6), epoch=epoch
    )
    signature = signer.sign(unsigned.statement())
    connection.execute(
        sa.insert(schema.announcements).values(
            seq=unsigned.seq,
            cohort=cohort,
            version=version,
            kind=kind,
            manifest_key=f"{bundle_prefix(manifest_sha256)}/{MANIFEST}",
            authorisation={"manifest_sha256": manifest_sha256, "signature": signature},
            created_at=unsigned.created_at,
            epoch=epoch,
        )
    )
    permit(connection, signer, validity or Validity(), cohorts=(cohort,))
    return Announcement(**{**vars(unsigned), "signature": signature})


class PolicyPublisher:
    """The learner's end of the channel.

    Args:
        catalog, objects: where policies are announced and where their files lie.
        signer: the deployment's signing key.
        validity: how long what is announced may be run without a renewal.
    """

    def __init__(
        self, catalog: Catalog, objects: ObjectStore, signer: Signer, validity: Validity | None = None
    ) -> None:
        self._validity = validity or Validity()
        self._catalog = catalog
        self._objects = objects
        self._signer = signer
        self._hashed: dict[tuple[Path, int, int], FileEntry] = {}

    def publish(
        self,
        bundle: Path,
        *,
        snapshot_version: int = 0,
        parent: int | None = None,
        cohort: str | None = "learning",
        proposer: str = "learner",
        details: dict[str, Any] | None = None,
        base: Path | None = None,
        guard: Callable[[sa.Connection], None] | None = None,
    ) -> int:
        """Seal, upload and announce a bundle; returns its version.

        A process that dies before the transaction leaves objects that nothing refers to; after it, the policy is
        announced. There is no state in between.

        Args:
            bundle: folder with `policy.safetensors` and `architecture.json`; its manifest is written there.
            snapshot_version: data snapshot that the learner had read; 0 before any.
            parent: version that it was trained on from.
            cohort: robots that follow it at once; None registers it without an announcement.
            details: JSON values kept with the policy (losses, updates), for people.
            guard: called in the transaction that announces; what it raises leaves the policy unannounced (a lease).
            base: the frozen weights that the bundle's complete, a safetensors file outside it; uploaded once.

        Raises:
            ConfigError: the bundle is incomplete, the base is not there, or the cohort is unknown.
            UnavailableError: other publishers took every version that was tried.
        """
        normaliser = _normaliser_sha256(bundle)
        bound = None if base is None else self._store_base(base)
        for _ in range(_TRIES):
            version = self._next_version()
            manifest = seal(
                bundle,
                self._signer,
                version=version,
                parent=parent,
                snapshot_version=snapshot_version,
                cohort=cohort or "learning",
                normaliser_sha256=normaliser,
                base=bound,
            )
            prefix = bundle_prefix(manifest.digest)
            for name in (*manifest.files, SIGNATURE, MANIFEST):  # the manifest last: it says that the rest is there
                self._objects.put(f"{prefix}/{name}", (bundle / name).read_bytes())
            crashpoint("policy.objects_stored")
            if self._commit(manifest, cohort, proposer, details, guard):
                crashpoint("policy.announced")
                return version
        raise UnavailableError(f"{_TRIES} versions were taken by other publishers", "run one learner per deployment")

    def _store_base(self, base: Path) -> FileEntry:
        """Upload a base unless the store holds it whole; a file that does not change is hashed once."""
        try:
            stat = base.stat()
        except OSError as error:
            raise ConfigError(f"base {base} cannot be read ({error.strerror})", "give the base's file") from error
        known = (base, stat.st_size, stat.st_mtime_ns)
        if known not in self._hashed:
            self._hashed[known] = FileEntry(file_sha256(base), stat.st_size)
        entry = self._hashed[known]
        key = base_key(entry.sha256)
        # The size too: one that a store kept in part is written again.
        if entry.size not in (info.size for info in self._objects.list(key.rpartition("/")[0])):
            self._objects.put(key, base)
            crashpoint("policy.base_stored")
        return entry

    def _next_version(self) -> int:
        with self._catalog.read() as connection:
            return _last_version(connection) + 1

    def _commit(
        self,
        manifest: Manifest,
        cohort: str | None,
        proposer: str,
        details: dict[str, Any] | None,
        guard: Callable[[sa.Connection], None] | None,
    ) -> bool:
        with self._catalog.begin() as connection:
            if guard is not None:
                guard(connection)
            if _last_version(connection) + 1 != manifest.version:
                return False
            connection.execute(
                sa.insert(schema.policies).values(
                    version=manifest.version,
                    parent=manifest.parent,
                    snapshot_version=manifest.snapshot_version,
                    bundle_key=bundle_prefix(manifest.digest),
                    manifest_sha256=manifest.digest,
                    status="candidate",
                    proposer=proposer,
                    details=(details or {}) | {CONTENT: manifest.content},
                    created_at=now(connection),
                )
            )
            crashpoint("policy.row_inserted")
            if cohort is not None:
                announce(
                    connection,
                    self._signer,
                    cohort=cohort,
                    version=manifest.version,
                    kind="publish",
                    manifest_sha256=manifest.digest,
                    validity=self._validity,
                )
        return True


class CatalogPolicySource:
    """Announcements and objects straight from the catalog and the store: a `subscriber.PolicySource`."""

    def __init__(self, catalog: Catalog, objects: ObjectStore) -> None:
        self._catalog = catalog
        self._objects = objects

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        """The cohort's announcements beyond position `after`, in order. Nothing is believed here: robots verify."""
        table = schema.announcements
        with self._catalog.read() as connection:
            mine = (table.c.cohort == cohort) & (table.c.epoch == current_epoch(connection)) & (table.c.seq > after)
            rows = connection.execute(sa.select(table).where(mine).order_by(table.c.seq).limit(_PAGE)).mappings()
            return [_parse(row) for row in rows]

    def permissions(self, cohort: str) -> Permissions:
        """Until when the cohort may run what, and the latest reset."""
        with self._catalog.read() as connection:
            return permissions_of(connection, cohort)

    def fetch(self, key: str) -> bytes:
        """The bytes of a policy's object."""
        return self._objects.get(key)


def fetch_bundle(objects: ObjectStore, catalog: Catalog, trust: TrustStore, version: int, target: Path) -> Path:
    """Copy a published policy's files, its base among them, from the store into the folder `target`, for evaluation.

    What is evaluated is what robots would run: the bytes are verified as robots verify them, and are those of the
    manifest that the catalog has on record. Bases are kept in a folder `bases` beside `target`, for the next one.

    Raises:
        ConfigError: there is no such version.
        UntrustedPolicyError: a file is missing or was changed, the manifest is another policy's, or no trusted key
            signed it.
    """
    table = schema.policies
    with catalog.read() as connection:
        row = connection.execute(
            sa.select(table.c.bundle_key, table.c.manifest_sha256).where(table.c.version == version)
        ).first()
    if row is None:
        raise ConfigError(f"there is no policy {version}", "list them with `lwd policies`")
    bases = BaseCache(target.parent / "bases")
    try:
        if verify(target, trust).digest == row.manifest_sha256:
            return target
    except (OSError, UntrustedPolicyError):  # not there, or changed on this disk
        shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, SIGNATURE):
        (target / name).write_bytes(objects.get(f"{row.bundle_key}/{name}"))
    manifest = read_signed_manifest(target, trust)
    if (manifest.version, manifest.digest) != (version, row.manifest_sha256):
        raise UntrustedPolicyError(
            f"the store holds policy {manifest.version} ({manifest.digest[:16]}) where policy {version} "
            f"({row.manifest_sha256[:16]}) was published",
            "restore the store's objects of that policy, or publish it again",
        )
    for name in manifest.files:
        (target / name).write_bytes(objects.get(f"{row.bundle_key}/{name}"))
    if manifest.base is not None:
        bases.ensure(manifest.base, CatalogPolicySource(catalog, objects))
        bases.link(manifest.base, target)
    verify(target, trust, known_base=None if manifest.base is None else bases.known(manifest.base))
    return target


def _normaliser_sha256(bundle: Path) -> str | None:
    try:
        architecture = json.loads((bundle / ARCHITECTURE).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"policy bundle {bundle} has no readable {ARCHITECTURE}", "export it with lwd_model.bundle.export_bundle"
        ) from error
    digest = architecture.get("normaliser") if isinstance(architecture, dict) else None
    return None if digest is None else str(digest)


def _last_version(connection: sa.Connection) -> int:
    return connection.execute(sa.select(sa.func.max(schema.policies.c.version))).scalar_one() or 0


def _parse(row: Any) -> Announcement:
    authorisation = row["authorisation"] or {}
    return Announcement(
        seq=row["seq"],
        cohort=row["cohort"],
        version=row["version"],
        kind=row["kind"],
        manifest_sha256=str(authorisation.get("manifest_sha256", "")),
        created_at=row["created_at"],
        signature=str(authorisation.get("signature", "")),
        epoch=row["epoch"],
    )
