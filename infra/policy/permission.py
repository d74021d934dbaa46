"""For how long a cohort's robots may run a policy, signed: an announcement says what to run, a permission until when.

An announcement stays true for ever; a permission ends unless it is renewed, so that a robot that hears nothing more
returns by itself to the champion and, without one, begins no episode. They are two statements, so that a robot of an
earlier version, which knows announcements alone, goes on as before.

A reset starts a new *epoch* of announcements and permissions: what was signed in an earlier one is refused from then
on. It frees robots from a number that was signed in error, or that a restored catalog has forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

Role = Literal["current", "champion"]
DAY_S = 86400.0


@dataclass(frozen=True)
class Validity:
    """How long permissions last, seconds.

    Attributes:
        canary, learning: of what these cohorts were told to run.
        champion: of the champion, which every cohort may fall back to and production runs.
    """

    canary: float = 900.0
    learning: float = 3600.0
    champion: float = 7 * DAY_S

    def seconds(self, cohort: str, role: Role) -> float:
        if role == "champion" or cohort not in ("canary", "learning"):
            return self.champion
        return self.canary if cohort == "canary" else self.learning


@dataclass(frozen=True)
class Permission:
    """One signed permission.

    Attributes:
        number: grows with every permission that is signed; a robot takes none of a lower one.
        epoch: the epoch of announcements that it belongs to.
        cohort: whose robots may run it.
        role: `current`, what the cohort was told to run; `champion`, what its robots fall back to.
        version, manifest_sha256: the policy.
        issued_at, valid_until: the catalog's clock, seconds since the epoch.
        signature: ed25519, over everything above.
    """

    number: int
    epoch: int
    cohort: str
    role: Role
    version: int
    manifest_sha256: str
    issued_at: float
    valid_until: float
    signature: str = ""

    def statement(self) -> dict[str, Any]:
        """As the JSON document that is signed."""
        fields = asdict(self)
        del fields["signature"]
        return {"type": "lwd-policy-permission", "format": 1, **fields}

    @classmethod
    def parse(cls, document: object) -> Permission:
        """From what a server said; types and ranges only, the signature is the subscriber's affair.

        Raises:
            ValueError: it is none.
        """
        given = a_mapping(document)
        role = given.get("role")
        if role not in get_args(Role):
            raise ValueError("a permission of an unknown role")
        return cls(
            number=a_whole(given, "number", 2**62),
            epoch=a_whole(given, "epoch", 2**31),
            cohort=a_text(given, "cohort", 32),
            role=cast(Role, role),
            version=a_whole(given, "version", 2**31),
            manifest_sha256=a_text(given, "manifest_sha256", 64),
            issued_at=a_time(given, "issued_at"),
            valid_until=a_time(given, "valid_until"),
            signature=a_text(given, "signature", 200),
        )


@dataclass(frozen=True)
class Reset:
    """The signed beginning of an epoch.

    Attributes:
        epoch: from 1; only a higher one than a robot has is taken.
        created_at: the catalog's clock, seconds since the epoch.
        signature: ed25519, over both.
    """

    epoch: int
    created_at: float
    signature: str = ""

    def statement(self) -> dict[str, Any]:
        """As the JSON document that is signed."""
        return {"type": "lwd-policy-reset", "format": 1, "epoch": self.epoch, "created_at": self.created_at}

    @classmethod
    def parse(cls, document: object) -> Reset:
        """From what a server said; ValueError if it is none."""
        given = a_mapping(document)
        return cls(a_whole(given, "epoch", 2**31), a_time(given, "created_at"), a_text(given, "signature", 200))


@dataclass(frozen=True)
class Permissions:
    """What a server says of a cohort's permissions: at most one of each role; the latest reset, if any."""

    permissions: tuple[Permission, ...] = ()
    reset: Reset | None = field(default=None)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, document: object) -> Permissions:
        """From what a server said; ValueError if it is none."""
        given = a_mapping(document)
        listed, reset = given.get("permissions"), given.get("reset")
        if not isinstance(listed, list) or len(listed) > len(get_args(Role)):
            raise ValueError("no list of a cohort's permissions")
        return cls(tuple(map(Permission.parse, listed)), None if reset is None else Reset.parse(reset))


# --- fields of a document that somebody else wrote --------------------------------------------------------------------


def a_mapping(document: object) -> Mapping[str, object]:
    """The document, if it is a JSON object; ValueError otherwise."""
    if not isinstance(document, dict):
        raise ValueError("no JSON object")
    return document


def a_whole(given: Mapping[str, object], name: str, limit: int) -> int:
    """A whole number of 0 … limit; ValueError otherwise."""
    value = given.get(name)
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{name} is no number of 0 to {limit}")
    return value


def a_text(given: Mapping[str, object], name: str, limit: int) -> str:
    """A text of at most `limit` characters; ValueError otherwise."""
    value = given.get(name)
    if not isinstance(value, str) or len(value) > limit:
        raise ValueError(f"{name} is no text of at most {limit} characters")
    return value


def a_time(given: Mapping[str, object], name: str) -> float:
    """Seconds since the epoch; ValueError otherwise."""
    value = given.get(name)
    if type(value) not in (int, float) or not abs(cast(float, value)) < 2**40 or math.isnan(cast(float, value)):
        raise ValueError(f"{name} is no time")
    return float(cast(float, value))
