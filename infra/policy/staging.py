"""A robot's bundles: fetched aside, verified, named; what is fetched is bounded by what was signed.

staging/                      what is being fetched
bundles/<version>-<digest>/   verified bundles
bases/<sha256>.safetensors    what those bundles' weights complete
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Collection
from pathlib import Path

from infra.errors import CorruptDataError, LwdError, StorageFullError, UntrustedPolicyError
from infra.files import write_durably
from infra.policy.announcement import bundle_prefix
from infra.policy.artifact import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    BaseEntry,
    Manifest,
    file_marks,
    read_signed_manifest,
    verify,
)
from infra.policy.bases import BaseCache, ObjectSource, StreamingSource
from infra.policy.keys import TrustStore
from infra.policy.state import PolicyRef

KEPT = "the last policy that was good stays in use"
_SPARE_BYTES = 2**15  # of the disk, which the state's file needs


class Bundles:
    """The bundles below one folder.

    Args:
        root: the robot's folder for policies.
        trust: the keys that may sign.
    """

    def __init__(self, root: Path, trust: TrustStore) -> None:
        self._root = root
        self._trust = trust
        self._bases = BaseCache(root / "bases")
        self._verified: dict[PolicyRef, dict[str, tuple[int, ...]]] = {}  # what the files were when they verified
        with contextlib.suppress(OSError):
            _remove(self._aside)

    def folder(self, ref: PolicyRef) -> Path:
        return self._root / "bundles" / ref.folder

    def holds(self, ref: PolicyRef) -> bool:
        """Whether the bundle verified in this process, and no file of it has changed or gone since."""
        return ref in self._verified and self._verified[ref] == file_marks(self.folder(ref))

    def check(self, ref: PolicyRef) -> None:
        """Verify a bundle that is here.

        Raises:
            UntrustedPolicyError: it is missing, damaged, or not the announced one.
        """
        self._verified.pop(ref, None)
        self._check(self.folder(ref), ref)
        self._verified[ref] = file_marks(self.folder(ref))

    def stage(self, ref: PolicyRef, source: ObjectSource) -> None:
        """Have a bundle here and verified, from the disk or else from the source. Nothing is left of one that failed.

        Raises:
            UntrustedPolicyError: it cannot be fetched whole, or is not what was announced.
            StorageFullError: no room for it.
            UnavailableError: the source did not answer, or too slowly.
            LwdError: the disk does not take it for another reason.
        """
        target = self.folder(ref)
        try:
            if target.is_dir():
                try:
                    self.check(ref)
                    return
                except UntrustedPolicyError:  # damaged on this disk: fetch it again
                    pass
            _remove(target)
            _remove(self._aside)
            self._aside.mkdir(parents=True)
            self._fetch(ref, source)
            self._check(self._aside, ref)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._aside.rename(target)
        except OSError as error:
            raise on_disk(error, f"policy {ref.version} in {self._root}") from error
        finally:
            with contextlib.suppress(OSError):
                _remove(self._aside)
        self._verified[ref] = file_marks(target)

    def prune(self, kept: Collection[PolicyRef]) -> None:
        """Remove every bundle but these, and every base that none of them needs."""
        names, bases = {ref.folder for ref in kept}, set()
        parent = self._root / "bundles"
        for folder in parent.iterdir() if parent.is_dir() else ():
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)
            elif (base := _base_of(folder)) is not None:
                bases.add(base.sha256)
        self._verified = {ref: stamps for ref, stamps in self._verified.items() if ref in kept}
        self._bases.prune(bases)

    @property
    def _aside(self) -> Path:
        return self._root / "staging"

    def _fetch(self, ref: PolicyRef, source: ObjectSource) -> None:
        aside, prefix = self._aside, bundle_prefix(ref.digest)
        try:
            for name, most in ((MANIFEST, MAX_MANIFEST_BYTES), (SIGNATURE, MAX_SIGNATURE_BYTES)):
                _write(source, f"{prefix}/{name}", aside / name, most)
            # Before anything large is fetched on its word.
            manifest = _announced(read_signed_manifest(aside, self._trust), ref, aside)
            self._see_room(manifest)
            for name, entry in manifest.files.items():
                _write(source, f"{prefix}/{name}", aside / name, entry.size)
        except (CorruptDataError, FileNotFoundError) as error:
            raise UntrustedPolicyError(f"policy {ref.version} cannot be fetched whole ({error})", KEPT) from error
        if manifest.base is not None:
            self._bases.ensure(manifest.base, source)
            self._bases.link(manifest.base, aside)

    def _see_room(self, manifest: Manifest) -> None:
        needed = sum(entry.size for entry in manifest.files.values()) + _SPARE_BYTES
        free = shutil.disk_usage(self._root).free
        if needed > free:
            raise StorageFullError(
                f"no room for policy {manifest.version}, {needed} bytes, in {self._root}: {free} are free",
                "free space there; " + KEPT,
            )

    def _check(self, folder: Path, ref: PolicyRef) -> None:
        base = _base_of(folder)
        known = self._bases.known(base) if base is not None else None
        _announced(verify(folder, self._trust, known_base=known), ref, folder)


def on_disk(error: OSError, what: str) -> LwdError:
    """What an error of this robot's disk means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFullError(f"no room for {what}", "free space there; " + KEPT)
    return LwdError(f"{what} cannot be written ({error.strerror or error})", "look at this robot's disk; " + KEPT)


def _remove(path: Path) -> None:
    """Whatever it is, and whether or not it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(source: ObjectSource, key: str, path: Path, most: int) -> None:
    """Fetch an object of at most so many bytes into a file."""
    if isinstance(source, StreamingSource):
        source.fetch_to(key, path, most)
        size = path.stat().st_size
    else:
        data = source.fetch(key)
        size = len(data)
        if size <= most:
            write_durably(path, data)
    if size > most:
        raise CorruptDataError(f"{key} has {size} bytes, at most {most} were signed", "publish the policy again")


def _announced(manifest: Manifest, wanted: PolicyRef, bundle: Path) -> Manifest:
    """The manifest, if it is the announced policy's."""
    if manifest.version != wanted.version or manifest.digest != wanted.digest:
        raise UntrustedPolicyError(
            f"{bundle.name} holds policy {manifest.version} ({manifest.digest[:16]}), not the announced "
            f"{wanted.version} ({wanted.digest[:16]})",
            KEPT,
        )
    return manifest


def _base_of(bundle: Path) -> BaseEntry | None:
    """The base that a bundle's manifest names, unverified."""
    try:
        return Manifest.parse((bundle / MANIFEST).read_bytes(), bundle.name).base
    except (OSError, UntrustedPolicyError):
        return None
