"""What a robot has accepted, as it lies on its disk: which announcements, which permissions, which policies.

state.json             the cohort that the robot is in
state-<cohort>.json    one that it was in before, so that its return replays nothing
floor.json             of every cohort, how far it had come: outlives a damaged state
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infra.files import read_capped, write_durably
from infra.policy.artifact import COHORTS
from infra.policy.keys import canonical_json

_MAX_BYTES = 2**20
_MOST = 2**63 - 1  # a number beyond could not be asked for, nor anything after it be heard
_log = logging.getLogger("lwd.robot")


@dataclass(frozen=True)
class PolicyRef:
    """A policy by number and manifest digest."""

    version: int
    digest: str

    @property
    def folder(self) -> str:
        return f"{self.version}-{self.digest[:16]}"


@dataclass(frozen=True)
class Grant:
    """That a policy may be run until a time of the deployment's clock.

    Attributes:
        role: `current` or `champion`, of the permission; `unstated` where an announcement came without one.
        digest: of the policy's manifest.
        until: seconds since the epoch.
    """

    role: str
    digest: str
    until: float


@dataclass(frozen=True)
class State:
    """What one cohort's robot has accepted.

    Attributes:
        epoch, seq: of the last announcement taken. numbers: of the last permission taken, by role.
        wanted: what was announced last. champion: what to fall back to. active, previous: what was run.
        grants: the latest of each role and policy.
        announced_at: of `wanted`, the catalog's clock.
    """

    cohort: str
    seq: int = 0
    wanted: PolicyRef | None = None
    active: PolicyRef | None = None
    previous: PolicyRef | None = None
    announced_at: float = 0.0
    epoch: int = 0
    champion: PolicyRef | None = None
    numbers: tuple[tuple[str, int], ...] = ()
    grants: tuple[Grant, ...] = ()

    @property
    def refs(self) -> tuple[PolicyRef, ...]:
        """Every policy that it names."""
        return tuple(ref for ref in (self.active, self.previous, self.wanted, self.champion) if ref is not None)

    def granted(self, grant: Grant, now: float) -> State:
        """With a grant more; what it replaces and what has ended is left out."""
        kept = [old for old in self.grants if (old.role, old.digest) != (grant.role, grant.digest) and old.until > now]
        return replace(self, grants=(*kept[-8:], grant))


class StateFile:
    """The files below one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / "state.json"

    def load(self, cohort: str) -> State:
        """The state of a cohort; a new one where there is none, or where what is there cannot be read.

        A damaged file is put aside and said: what it had accepted is refused again all the same, by `floor.json`.
        """
        state = self._read(self._path)
        if state is not None and state.cohort != cohort:
            os.replace(self._path, self._root / f"state-{state.cohort}.json")
            state = None
        if state is None:
            state = self._read(self._root / f"state-{cohort}.json")
        if state is None or state.cohort != cohort:
            state = State(cohort)
        floor = self._floors().get(cohort, (0, 0))
        if floor > (state.epoch, state.seq):
            state = replace(state, epoch=floor[0], seq=floor[1])
        return state

    def write(self, state: State) -> None:
        """Keep a state; OSError if the disk does not take it."""
        floors = self._floors()
        if floors.get(state.cohort) != (state.epoch, state.seq):
            floors[state.cohort] = (state.epoch, state.seq)
            write_durably(self._root / "floor.json", canonical_json({name: list(at) for name, at in floors.items()}))
        write_durably(self._path, canonical_json(asdict(state)))

    def _floors(self) -> dict[str, tuple[int, int]]:
        path = self._root / "floor.json"
        try:
            found = json.loads(read_capped(path, _MAX_BYTES))
            return {str(name): (_whole(epoch), _whole(seq)) for name, (epoch, seq) in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            _log.error("%s cannot be read (%s): it is begun anew", path, error)
            _put_aside(path)
            return {}

    def _read(self, path: Path) -> State | None:
        try:
            return _parse(json.loads(read_capped(path, _MAX_BYTES)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            _log.error("%s is not a robot's state (%s): it is put aside and the robot starts as a new one", path, error)
            _put_aside(path)
            return None


def _put_aside(path: Path) -> None:
    try:
        os.replace(path, path.with_suffix(".damaged"))
    except OSError as why:
        _log.error("%s cannot be put aside (%s)", path, why.strerror)


def _parse(document: dict[str, Any]) -> State:
    for name in ("wanted", "active", "previous", "champion"):
        document[name] = _ref(document[name]) if document.get(name) else None
    for name in ("seq", "epoch"):
        document[name] = _whole(document.get(name, 0))
    document["announced_at"] = float(document.get("announced_at", 0.0))
    document["numbers"] = tuple((str(role), _whole(number)) for role, number in document.get("numbers", ()))
    document["grants"] = tuple(
        Grant(str(given["role"]), str(given["digest"]), float(given["until"])) for given in document.get("grants", ())
    )
    state = State(**document)
    if state.cohort not in COHORTS:
        raise ValueError(f"unknown cohort {state.cohort!r}")
    if not all(map(math.isfinite, (state.announced_at, *(grant.until for grant in state.grants)))):
        raise ValueError("a time is not finite")
    return state


def _ref(document: Mapping[str, Any]) -> PolicyRef:
    ref = PolicyRef(_whole(document["version"]), str(document["digest"]))
    if len(ref.digest) != 64 or set(ref.digest) - set("0123456789abcdef"):
        raise ValueError("a policy's digest is no sha256")  # it becomes the name of a folder
    return ref


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value
