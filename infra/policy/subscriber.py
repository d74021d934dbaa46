"""The robot's end of the policy channel: stage, verify, swap at the episode boundary, keep the last known good.

What a robot has accepted lies in one small file that is replaced atomically, so that a robot killed anywhere comes
back with the policy it had:

    state.json                    cohort, last announcement, policy wanted, active policy, previous policy
    state-<cohort>.json           the same of a cohort that the robot was in before, so that its return replays nothing
    rejected.json                 policies that failed on this robot (`infra.policy.rejections`)
    bundles/<version>-<digest>/   verified bundles: the active, the previous and a staged one
    bases/<sha256>.safetensors    what those bundles' weights complete
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from infra.errors import CorruptDataError, UntrustedPolicyError
from infra.files import write_durably
from infra.policy.announcement import Announcement, bundle_prefix
from infra.policy.artifact import COHORTS, MANIFEST, SIGNATURE, BaseEntry, Manifest, read_signed_manifest, verify
from infra.policy.bases import BaseCache
from infra.policy.keys import Role, TrustStore, canonical_json
from infra.policy.rejections import Rejection, Rejections

_KEPT = "the last policy that was good stays in use"
_DIGEST = re.compile(r"^[0-9a-f]{64}$")


class PolicySource(Protocol):
    """Where a robot asks for policies. It is not believed: signatures are.

    One that also has `fetch_to` (`infra.policy.bases.StreamingSource`) is asked by it for bases, which may be larger
    than the robot's memory.
    """

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        """The cohort's announcements beyond position `after`, in order."""

    def fetch(self, key: str) -> bytes:
        """The bytes of a policy's object."""


@dataclass(frozen=True)
class PolicyRef:
    """A policy by number and manifest digest."""

    version: int
    digest: str

    @property
    def folder(self) -> str:
        return f"{self.version}-{self.digest[:16]}"


@dataclass(frozen=True)
class ActivePolicy:
    """The policy a robot runs: its version, the folder of its verified bundle, and when it was announced (seconds
    since the epoch, the catalog's clock)."""

    version: int
    bundle: Path
    announced_at: float


@dataclass(frozen=True)
class _State:
    cohort: str
    seq: int = 0
    wanted: PolicyRef | None = None
    active: PolicyRef | None = None
    previous: PolicyRef | None = None
    announced_at: float = 0.0


class PolicySubscriber:
    """Follows the announcements to one cohort.

    Args:
        root: the robot's folder for policies.
        cohort: `learning`, `canary` or `production`; a robot that changes cohort starts anew there, and one that comes
            back to a cohort goes on from what it had accepted there.
        source: where to ask.
        trust: the keys that may sign.

    Raises:
        UntrustedPolicyError: the state file is not one that a subscriber wrote.
    """

    def __init__(self, root: Path, cohort: str, source: PolicySource, trust: TrustStore) -> None:
        self._root = Path(root)
        self._bundles = self._root / "bundles"
        self._bundles.mkdir(parents=True, exist_ok=True)
        self._bases = BaseCache(self._root / "bases")
        self._cohort = cohort
        self._source = source
        self._trust = trust
        self._staged: PolicyRef | None = None
        self._rejections = Rejections(self._root / "rejected.json")
        self._state = self._load()
        self._fall_back()

    @property
    def active(self) -> ActivePolicy | None:
        """The policy in use; None before the first."""
        ref = self._state.active
        return ActivePolicy(ref.version, self._bundles / ref.folder, self._state.announced_at) if ref else None

    @property
    def staged(self) -> ActivePolicy | None:
        """The verified policy that the next boundary will activate."""
        ref = self._staged
        return ActivePolicy(ref.version, self._bundles / ref.folder, self._state.announced_at) if ref else None

    def poll(self) -> int | None:
        """Take in new announcements and stage the policy they lead to; returns the staged version, if any.

        However many were missed, only the last policy is fetched. The active policy does not change here.

        Raises:
            UntrustedPolicyError: an announcement or the artifact was refused; what could be accepted was, and the
                active policy stays.
            UnavailableError: the source did not answer; ask again later.
        """
        refused = self._take_in(self._source.announcements(self._cohort, self._state.seq))
        wanted = self._state.wanted
        if wanted is not None and (wanted == self._state.active or wanted.digest in self._rejections):
            self._staged = None
        elif wanted is not None and wanted != self._staged:
            self._staged = None
            self._stage(wanted)
            self._staged = wanted
        if refused is not None:
            raise refused
        return self._staged.version if self._staged else None

    def activate_at_boundary(self) -> ActivePolicy | None:
        """Swap to the staged policy, if any, and return the active one. Call between episodes only."""
        if self._staged is not None:
            self._save(replace(self._state, active=self._staged, previous=self._state.active))
            self._staged = None
            self._prune()
        return self.active

    @property
    def rejected(self) -> tuple[Rejection, ...]:
        """The policies that failed on this robot, oldest first."""
        return tuple(self._rejections)

    def reject(self, version: int, reason: str) -> ActivePolicy | None:
        """Never run that policy again: it failed on this robot. Survives restarts, so that none begins with it.

        Args:
            version: of the active, the staged or the announced policy; another is left as it is.
            reason: what it did; its first 300 characters are kept.

        Returns:
            The policy that is active now: the previous good one if the active one was rejected, None if there is none.
            A newer announcement is tried as ever.
        """
        state = self._state
        for ref in {self._staged, state.active, state.wanted, state.previous} - {None}:
            if ref is not None and ref.version == version:
                self._rejections.add(version, ref.digest, reason)
        if self._staged is not None and self._staged.digest in self._rejections:
            self._staged = None
        self._fall_back()
        return self.active

    def _take_in(self, announcements: Sequence[Announcement]) -> UntrustedPolicyError | None:
        refused: UntrustedPolicyError | None = None
        state = self._state
        for said in announcements:
            name = f"announcement {said.seq} of policy {said.version} to {said.cohort}"
            try:
                self._trust.verify(said.statement(), said.signature, name, _needed(said.cohort))
                if said.cohort != state.cohort:
                    raise UntrustedPolicyError(f"{name} is not for cohort {state.cohort}", _KEPT)
                if said.seq <= state.seq:
                    raise UntrustedPolicyError(f"{name} is a replay: {state.seq} was accepted already", _KEPT)
                if not _DIGEST.fullmatch(said.manifest_sha256):
                    raise UntrustedPolicyError(f"{name} names no manifest digest", _KEPT)
            except UntrustedPolicyError as error:
                refused = error  # not taken in: a forged number must not hide the announcements that follow
                continue
            state = replace(state, seq=said.seq)
            if said.kind != "rollback" and state.wanted is not None and said.version < state.wanted.version:
                refused = UntrustedPolicyError(
                    f"{name} would go back from version {state.wanted.version} without a signed rollback",
                    "roll back with `lwd rollback`; " + _KEPT,
                )
                continue
            wanted = PolicyRef(said.version, said.manifest_sha256)
            if wanted != state.wanted:
                state = replace(state, wanted=wanted, announced_at=said.created_at)
        if state != self._state:
            self._save(state)
        return refused

    def _stage(self, wanted: PolicyRef) -> None:
        target = self._bundles / wanted.folder
        if target.exists():
            try:
                self._check(target, wanted)
                return
            except UntrustedPolicyError:  # damaged on this disk: fetch it again
                shutil.rmtree(target)
        aside = self._root / "staging"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        prefix = bundle_prefix(wanted.digest)
        try:
            for name in (MANIFEST, SIGNATURE):
                write_durably(aside / name, self._source.fetch(f"{prefix}/{name}"))
            # Before anything large is fetched on its word.
            manifest = _announced(read_signed_manifest(aside, self._trust), wanted, aside)
            for name in manifest.files:
                write_durably(aside / name, self._source.fetch(f"{prefix}/{name}"))
        except (CorruptDataError, FileNotFoundError) as error:
            raise UntrustedPolicyError(f"policy {wanted.version} cannot be fetched whole ({error})", _KEPT) from error
        if manifest.base is not None:
            self._bases.ensure(manifest.base, self._source)
            self._bases.link(manifest.base, aside)
        self._check(aside, wanted)
        aside.rename(target)

    def _check(self, bundle: Path, wanted: PolicyRef) -> None:
        base = _base_of(bundle)
        known = self._bases.known(base) if base is not None else None
        _announced(verify(bundle, self._trust, known_base=known), wanted, bundle)

    def _fall_back(self) -> None:
        """An active bundle that no longer verifies, or was rejected, gives way to the previous one, or to none."""
        for ref in (self._state.active, self._state.previous):
            if ref is None or ref.digest in self._rejections:
                continue
            try:
                self._check(self._bundles / ref.folder, ref)
            except UntrustedPolicyError:
                continue
            if ref != self._state.active:
                self._save(replace(self._state, active=ref, previous=None))
            return
        if self._state.active is not None:
            self._save(replace(self._state, active=None, previous=None))

    def _prune(self) -> None:
        kept = {ref.folder for ref in (self._state.active, self._state.previous, self._state.wanted) if ref}
        bases = set()
        for folder in self._bundles.iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)
            elif (base := _base_of(folder)) is not None:
                bases.add(base.sha256)
        self._bases.prune(bases)

    def _load(self) -> _State:
        path = self._root / "state.json"
        if path.exists():
            state = self._read(path)
            if state.cohort == self._cohort:
                return state
            os.replace(path, self._root / f"state-{state.cohort}.json")
        before = self._root / f"state-{self._cohort}.json"
        return self._read(before) if before.exists() else _State(self._cohort)

    def _read(self, path: Path) -> _State:
        try:
            document = json.loads(path.read_bytes())
            for name in ("wanted", "active", "previous"):
                document[name] = PolicyRef(**document[name]) if document[name] else None
            state = _State(**document)
            if state.cohort not in COHORTS:
                raise ValueError(f"unknown cohort {state.cohort!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise UntrustedPolicyError(
                f"{path} is not a subscriber's state ({error})", "move it away; the robot then starts as a new one"
            ) from error
        return state

    def _save(self, state: _State) -> None:
        write_durably(self._root / "state.json", canonical_json(asdict(state)))
        self._state = state


def _needed(cohort: str) -> Role:
    """What the key of an announcement must be allowed: the learner speaks to its own cohort alone."""
    return "publish" if cohort == "learning" else "promote"


def _announced(manifest: Manifest, wanted: PolicyRef, bundle: Path) -> Manifest:
    """The manifest, if it is the announced policy's."""
    if manifest.version != wanted.version or manifest.digest != wanted.digest:
        raise UntrustedPolicyError(
            f"{bundle.name} holds policy {manifest.version} ({manifest.digest[:16]}), not the announced "
            f"{wanted.version} ({wanted.digest[:16]})",
            _KEPT,
        )
    return manifest


def _base_of(bundle: Path) -> BaseEntry | None:
    """The base that a bundle's manifest names, unverified."""
    try:
        return Manifest.parse((bundle / MANIFEST).read_bytes(), bundle.name).base
    except (OSError, UntrustedPolicyError):
        return None
