"""The robot's end of the policy channel: stage, verify, swap at the episode boundary, keep the last known good.

What a robot has accepted lies in small files that are replaced atomically (`infra.policy.state`), so that a robot that
was killed anywhere comes back with the policy it had. What it may run ends with time (`infra.policy.permission`): of
what was announced last, what it runs, the champion, and what it ran before, the first that is permitted and here is
run; when there is none, no episode is begun.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from infra.errors import LwdError, UnavailableError, UntrustedPolicyError
from infra.policy.announcement import Announcement
from infra.policy.clock import DeploymentClock
from infra.policy.keys import Role, TrustStore
from infra.policy.permission import Permission, Permissions, Validity
from infra.policy.rejections import Rejection, Rejections
from infra.policy.staging import KEPT, Bundles, on_disk
from infra.policy.state import Grant, PolicyRef, State, StateFile

T = TypeVar("T")

MAX_NEWS = 10_000  # announcements that are looked at in one poll
_ASK_S = 60.0  # for permissions, at least this often
_DIGEST = re.compile(r"^[0-9a-f]{64}$")
_log = logging.getLogger("lwd.robot")


class PolicySource(Protocol):
    """Where a robot asks for policies. It is not believed: signatures are.

    One that also has `permissions` is asked for them; one that has `fetch_to` (`infra.policy.bases.StreamingSource`)
    writes what is fetched to files.
    """

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        """The cohort's announcements beyond position `after`, in order."""

    def fetch(self, key: str) -> bytes:
        """The bytes of a policy's object."""


@runtime_checkable
class PermissionSource(Protocol):
    """A source that also knows how long a cohort may run what."""

    def permissions(self, cohort: str) -> Permissions:
        """The cohort's permissions, and the latest reset."""


@dataclass(frozen=True)
class ActivePolicy:
    """The policy a robot runs: its version, the folder of its verified bundle, and when it was announced (seconds
    since the epoch, the catalog's clock; 0 where the robot fell back to it)."""

    version: int
    bundle: Path
    announced_at: float


class PolicySubscriber:
    """Follows the announcements to one cohort.

    Args:
        root: the robot's folder for policies.
        cohort: `learning`, `canary` or `production`; a robot that changes cohort starts anew there, and one that comes
            back to a cohort goes on from what it had accepted there.
        source: where to ask.
        trust: the keys that may sign.
        validity: how long an announcement counts to which no permission was said.
        clock: the deployment's time.

    Raises:
        LwdError: the folder cannot be made.
    """

    def __init__(
        self,
        root: Path,
        cohort: str,
        source: PolicySource,
        trust: TrustStore,
        *,
        validity: Validity | None = None,
        clock: DeploymentClock | None = None,
    ) -> None:
        self._root = Path(root)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise on_disk(error, f"the robot's folder {self._root}") from error
        self._cohort = cohort
        self._source = source
        self._trust = trust
        self._bundles = Bundles(self._root, trust)
        self._clock = clock or DeploymentClock(self._root / "clock.json")
        self._unstated_s = (validity or Validity()).seconds(cohort, "current")
        self._granted_s = self._unstated_s  # how long the last permission was for
        self._asked_at: float | None = None  # for permissions, by the monotonic clock
        self._file = StateFile(self._root)
        self._state = self._file.load(cohort)
        self._unkept: OSError | None = None  # why the state is not on the disk
        self._rejections = Rejections(self._root / "rejected.json")
        self._passed: set[PolicyRef] = set()  # in this life: see `pass_over`
        self._begin()

    @property
    def active(self) -> ActivePolicy | None:
        """The policy in use; None before the first."""
        return self._policy(self._state.active)

    @property
    def staged(self) -> ActivePolicy | None:
        """The verified policy that the next boundary will activate."""
        ref = self._target()
        return None if ref == self._state.active else self._policy(ref)

    @property
    def permitted(self) -> bool:
        """Whether the active policy may be run now; False before the first."""
        return self._state.active is not None and self._permitted(self._state.active)

    @property
    def permitted_until(self) -> float | None:
        """When the active policy's permission ends, by the deployment's clock; None if it has none."""
        active = self._state.active
        ends = [grant.until for grant in self._state.grants if active is not None and grant.digest == active.digest]
        return max(ends, default=None)

    @property
    def behind(self) -> bool:
        """Whether a policy that this robot is to have is not here yet."""
        return bool(self._missing())

    def poll(self) -> int | None:
        """Take in new announcements and permissions, stage the policies they lead to; returns the staged version.

        However many announcements were missed, only the last policy is fetched, and the champion, which is kept here to
        fall back to. The active policy does not change here.

        Raises:
            UntrustedPolicyError: an announcement, a permission or the artifact was refused; what could be accepted
                was, and the active policy stays.
            StorageFullError: no room for the policy, or for what was accepted.
            UnavailableError: the source did not answer; ask again later.
            LwdError: this robot's disk takes nothing.
        """
        refused = self._hear()
        if self._missing():
            failed: LwdError | None = None
            for ref in self._missing():
                try:
                    _named(lambda ref=ref: self._bundles.stage(ref, self._source), "a policy's file")  # type: ignore[misc]
                except LwdError as error:
                    failed = failed or error
            if failed is not None:
                raise failed
        if refused is not None:
            raise refused
        if self._unkept is not None:
            raise on_disk(self._unkept, f"what the robot accepted, in {self._root},")
        staged = self.staged
        return staged.version if staged else None

    def activate_at_boundary(self) -> ActivePolicy | None:
        """Swap to the policy that is to run now, if it is another, and return the active one. Call between episodes
        only."""
        ref = self._target()  # judged now: what was staged may have been withdrawn, or have ended, since
        if ref is not None and ref != self._state.active:
            self._save(replace(self._state, active=ref, previous=self._state.active))
            self._bundles.prune(self._state.refs)
        return self.active

    @property
    def rejected(self) -> tuple[Rejection, ...]:
        """The policies that failed on this robot, oldest first."""
        return tuple(self._rejections)

    @property
    def passed_over(self) -> bool:
        """Whether the policy that was announced last cannot be used here."""
        return self._state.wanted in self._passed

    def pass_over(self) -> None:
        """Look on from the staged policy, which cannot be used here, to the next that is permitted; until the next
        start of this robot."""
        if (ref := self._target()) is not None and ref != self._state.active:
            self._passed.add(ref)

    def reject(self, version: int, reason: str) -> ActivePolicy | None:
        """Run a policy never again: it failed on this robot. Returns the one that is active instead, if there is one.

        Args:
            version: of the active or the staged policy; its digest is what is remembered.
            reason: what it did.
        """
        for ref in set(self._state.refs):
            if ref.version == version:
                self._rejections.add(version, ref.digest, reason)
        active = self._state.active
        if active is not None and active.digest in self._rejections:
            self._save(replace(self._state, active=self._target(), previous=None))
        return self.active

    # What may be run

    def _target(self) -> PolicyRef | None:
        """The policy to run now; None where none is permitted and here."""
        state = self._state
        for ref in (state.wanted, state.active, state.champion, state.previous):
            if ref is None or ref in self._passed:
                continue
            if self._permitted(ref) and self._bundles.holds(ref):
                return ref
        return None

    def _permitted(self, ref: PolicyRef) -> bool:
        if ref.digest in self._rejections:
            return False
        now = self._clock.now()
        return any(grant.digest == ref.digest and grant.until > now for grant in self._state.grants)

    def _usable(self, ref: PolicyRef) -> bool:
        return ref.digest not in self._rejections and self._bundles.holds(ref)

    def _missing(self) -> list[PolicyRef]:
        wanted = dict.fromkeys(ref for ref in (self._state.wanted, self._state.champion) if ref is not None)
        return [ref for ref in wanted if self._permitted(ref) and not self._bundles.holds(ref)]

    def _policy(self, ref: PolicyRef | None) -> ActivePolicy | None:
        if ref is None:
            return None
        announced_at = self._state.announced_at if ref == self._state.wanted else 0.0
        return ActivePolicy(ref.version, self._bundles.folder(ref), announced_at)

    # What the source says

    def _hear(self) -> LwdError | None:
        """Take in what the source says; the first refusal."""
        self._clock.keep()
        before, refused = self._state.wanted, self._take_announcements()
        if self._permissions_due(before) and isinstance(self._source, PermissionSource):
            self._asked_at = time.monotonic()
            epoch = self._state.epoch
            refused = self._take_permissions(self._source) or refused
            if self._state.epoch != epoch:
                refused = self._take_announcements()
        if self._unkept is not None:
            self._write()
        return refused

    def _permissions_due(self, before: PolicyRef | None) -> bool:
        wanted = self._state.wanted
        if wanted != before or self._asked_at is None or time.monotonic() - self._asked_at > _ASK_S:
            return True
        ends = [grant.until for grant in self._state.grants if wanted is not None and grant.digest == wanted.digest]
        return wanted is not None and max(ends, default=0.0) - self._clock.now() < self._granted_s * 2 / 3

    def _take_announcements(self) -> UntrustedPolicyError | None:
        said = _named(lambda: self._source.announcements(self._cohort, self._state.seq), "announcements")
        refused: UntrustedPolicyError | None = None
        state = self._state
        for one in _named(lambda: list(islice(said, MAX_NEWS)), "announcements"):
            try:
                state = _named(lambda one=one, state=state: self._accepted(one, state), "an announcement")  # type: ignore[misc]
            except LwdError as error:  # not taken in: a forged number must not hide the announcements that follow
                refused = error if isinstance(error, UntrustedPolicyError) else _untrusted(error)
                continue
            if one.kind != "rollback" and state.wanted is not None and one.version < state.wanted.version:
                refused = UntrustedPolicyError(
                    f"{_name(one)} would go back from version {state.wanted.version} without a signed rollback",
                    "roll back with `lwd rollback`; " + KEPT,
                )
                continue
            wanted = PolicyRef(one.version, one.manifest_sha256)
            if wanted != state.wanted:
                # Where permissions were seen there is one for this too: without it, it counts from when it was said.
                begins = one.created_at if state.numbers else self._clock.now()
                grant = Grant("unstated", wanted.digest, begins + self._unstated_s)
                state = replace(state.granted(grant, self._clock.now()), wanted=wanted, announced_at=one.created_at)
        if state != self._state:
            self._save(state)
        return refused

    def _accepted(self, one: Announcement, state: State) -> State:
        """The state with the announcement's number, if it is to be taken."""
        name = _name(one)
        self._trust.verify(one.statement(), one.signature, name, _needed(one.cohort))
        if one.cohort != state.cohort:
            raise UntrustedPolicyError(f"{name} is not for cohort {state.cohort}", KEPT)
        if one.epoch != state.epoch:
            self._asked_at = None  # the reset that this robot has not heard of comes with the permissions
            raise UntrustedPolicyError(f"{name} is of epoch {one.epoch}, this robot's is {state.epoch}", KEPT)
        if one.seq <= state.seq:
            raise UntrustedPolicyError(f"{name} is a replay: {state.seq} was accepted already", KEPT)
        if not _DIGEST.fullmatch(one.manifest_sha256):
            raise UntrustedPolicyError(f"{name} names no manifest digest", KEPT)
        return replace(state, seq=one.seq)

    def _take_permissions(self, source: PermissionSource) -> UntrustedPolicyError | None:
        try:
            said = _named(lambda: _permissions(source.permissions(self._cohort)), "permissions")
        except UnavailableError as error:  # announcements came: the source is there, and permissions end by themselves
            _log.warning("no permissions: %s", error.problem)
            return None
        refused: UntrustedPolicyError | None = None
        try:
            _named(lambda: self._take_reset(said), "a reset")
        except LwdError as error:
            refused = _untrusted(error)
        for permission in said.permissions:
            try:
                _named(lambda permission=permission: self._take_permission(permission), "a permission")  # type: ignore[misc]
            except LwdError as error:
                refused = _untrusted(error)
        return refused

    def _take_reset(self, said: Permissions) -> None:
        reset = said.reset
        if reset is None or reset.epoch <= self._state.epoch:
            return  # an old one is shown for ever, to those who have not heard it
        self._trust.verify(reset.statement(), reset.signature, f"the reset to epoch {reset.epoch}", "promote")
        _log.warning("announcements are begun anew: epoch %d", reset.epoch)
        self._clock.reset(reset.created_at)
        # What it wanted stays wanted for as long as it was permitted, until the new epoch says another policy.
        self._save(replace(self._state, epoch=reset.epoch, seq=0, numbers=()))

    def _take_permission(self, said: Permission) -> None:
        state = self._state
        numbers = dict(state.numbers)
        name = f"permission {said.number} of policy {said.version} to {said.cohort}"
        if said.number == numbers.get(said.role) and said.epoch == state.epoch:
            return
        self._trust.verify(said.statement(), said.signature, name, _needed(said.cohort))
        if said.cohort != state.cohort:
            raise UntrustedPolicyError(f"{name} is not for cohort {state.cohort}", KEPT)
        if said.epoch != state.epoch:
            raise UntrustedPolicyError(f"{name} is of epoch {said.epoch}, this robot's is {state.epoch}", KEPT)
        if said.number < numbers.get(said.role, 0):
            raise UntrustedPolicyError(f"{name} is a replay: {numbers[said.role]} was accepted already", KEPT)
        if not _DIGEST.fullmatch(said.manifest_sha256):
            raise UntrustedPolicyError(f"{name} names no manifest digest", KEPT)
        self._clock.witness(said.issued_at)
        numbers[said.role] = said.number
        # What an announcement gave without a permission ends with the first permission of the same policy.
        grants = tuple(
            grant for grant in state.grants if (grant.role, grant.digest) != ("unstated", said.manifest_sha256)
        )
        state = replace(state, grants=grants, numbers=tuple(sorted(numbers.items())))
        state = state.granted(Grant(said.role, said.manifest_sha256, said.valid_until), self._clock.now())
        if said.role == "champion":
            state = replace(state, champion=PolicyRef(said.version, said.manifest_sha256))
        else:
            self._granted_s = max(said.valid_until - said.issued_at, 0.0)
            if state.wanted is None:  # a state that was lost: the announcement was taken before, and is a replay now
                state = replace(state, wanted=PolicyRef(said.version, said.manifest_sha256), announced_at=0.0)
        self._save(state)

    # What is kept

    def _begin(self) -> None:
        """At start: verify what is here; an active bundle that no longer verifies gives way to the previous one."""
        state = self._state
        # What is only wanted is looked at when the source was asked whether it still is.
        for ref in dict.fromkeys(ref for ref in (state.active, state.previous, state.champion) if ref is not None):
            try:
                _named(lambda ref=ref: self._bundles.check(ref), "a bundle")  # type: ignore[misc]
            except LwdError as error:
                _log.debug("policy %d is not here: %s", ref.version, error.problem)
        if state.active is not None and not self._usable(state.active):
            held = state.previous is not None and self._usable(state.previous)
            state = replace(state, active=state.previous if held else None, previous=None)
        if not state.grants:  # of a version that knew no permissions
            for ref in dict.fromkeys(state.refs):
                now = self._clock.now()
                state = state.granted(Grant("unstated", ref.digest, now + self._unstated_s), now)
        if state != self._state:
            self._save(state)

    def _save(self, state: State) -> None:
        """Take a state. One that the disk does not take counts all the same, and is written later."""
        self._state = state
        self._write()

    def _write(self) -> None:
        try:
            self._file.write(self._state)
            self._unkept = None
        except OSError as error:
            if self._unkept is None:
                _log.error("what the robot accepted cannot be written: %s", error.strerror)
            self._unkept = error


def _needed(cohort: str) -> Role:
    """What the key of a statement must be allowed: the learner speaks to its own cohort alone."""
    return "publish" if cohort == "learning" else "promote"


def _named(work: Callable[[], T], what: str) -> T:
    """`work()`; whatever is unexpected in what the source said has a name."""
    try:
        return work()
    except LwdError:
        raise
    except Exception as error:
        raise UnavailableError(
            f"the source gave {what} in a form that this robot does not know ({type(error).__name__})",
            "see what answers there; " + KEPT,
        ) from error


def _permissions(said: object) -> Permissions:
    if not isinstance(said, Permissions):
        raise TypeError("no permissions")
    return said


def _untrusted(error: LwdError) -> UntrustedPolicyError:
    return error if isinstance(error, UntrustedPolicyError) else UntrustedPolicyError(error.problem, error.fix)


def _name(one: Announcement) -> str:
    return f"announcement {one.seq} of policy {one.version} to {str(one.cohort)[:32]}"
