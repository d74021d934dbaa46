"""Robots' credentials: one token for each robot, shown once, kept as a digest, expiring and revocable.

A token is `<token id>.<secret>`: 16 hex digits that name its row, and 256 random bits of which the catalog has the
sha256 alone. Robot and cohort are those of the row: a robot cannot say that it is another one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from infra.catalog import Catalog, dialect
from infra.catalog.schema import robot_tokens
from infra.edge.server import RefusedError
from infra.errors import ConfigError
from infra.objects import ROBOT_ID
from infra.policy.artifact import COHORTS

CACHE_S = 2.0  # a revoked or expired token is accepted at most this much longer
TOKEN = re.compile(r"([0-9a-f]{16})\.([A-Za-z0-9_-]{43})")
_DAY_S = 86400.0
_CACHED = 4096
_KNOWN = 65_536
_UNKNOWN = "the robot token is unknown"
_ENROL = "enrol the robot with `lwd robots enrol` and give it the token as LWD_ROBOT_TOKEN"


class EndedError(RefusedError):
    """The token was good once."""


@dataclass(frozen=True)
class Identity:
    """Whose token it is."""

    robot_id: str
    cohort: str


@dataclass(frozen=True)
class TokenRow:
    """A token as it may be shown: everything but the token. Times are seconds since the epoch."""

    token_id: str
    robot_id: str
    cohort: str
    actor: str
    created_at: float
    expires_at: float
    revoked_at: float | None
    state: str  # valid | expired | revoked


class Tokens:
    """The tokens of one deployment. Safe for threads.

    Args:
        catalog: where their digests are.
        cache_s: how long what was found of a token is believed without asking the catalog again, seconds.
    """

    def __init__(self, catalog: Catalog, *, cache_s: float = CACHE_S) -> None:
        self._catalog = catalog
        self._cache_s = cache_s
        # sha256 of a whole token -> whose it is, or how it ended; believed until when
        self._judged: dict[bytes, tuple[Identity | EndedError, float]] = {}
        self._digests: dict[str, str] | None = None  # by token id, of the newest valid tokens that the catalog had
        self._looked_at = float("-inf")
        self._lock = threading.Lock()

    def enrol(self, robot_id: str, cohort: str, *, days: float, actor: str) -> str:
        """Make a token; it is nowhere else, and cannot be shown again. Tokens that the robot has stay valid.

        Args:
            days: how long it is valid.
            actor: who enrols the robot, for the list.

        Raises:
            ConfigError: a name is malformed, the cohort unknown, or `days` not positive.
        """
        if not ROBOT_ID.fullmatch(robot_id):
            raise ConfigError(f"robot id {robot_id!r} is not a plain name", "use letters, digits, '-', '_', '.'")
        if cohort not in COHORTS:
            raise ConfigError(f"unknown cohort {cohort!r}", f"use one of: {', '.join(COHORTS)}")
        if not 0 < days <= 3660:
            raise ConfigError(f"a token valid for {days} days", "give between 0 and 3660 days")
        if not 0 < len(actor) <= 64:
            raise ConfigError(f"actor {actor!r}", "name who enrols the robot, in up to 64 characters")
        token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        with self._catalog.begin() as connection:
            at = dialect.now(connection)
            row = {
                "token_id": token_id,
                "robot_id": robot_id,
                "cohort": cohort,
                "sha256": _digest(secret),
                "actor": actor,
                "created_at": at,
                "expires_at": at + days * _DAY_S,
            }
            connection.execute(sa.insert(robot_tokens).values(row))
        return f"{token_id}.{secret}"

    def revoke(self, robot_id: str, token_id: str | None = None) -> int:
        """Refuse a robot's tokens, or one of them, from now on; how many were valid.

        Services refuse them at most `CACHE_S` seconds later.
        """
        one = sa.true() if token_id is None else robot_tokens.c.token_id == token_id
        with self._catalog.begin() as connection:
            at = dialect.now(connection)
            found = connection.execute(
                sa.update(robot_tokens)
                .where(robot_tokens.c.robot_id == robot_id, robot_tokens.c.revoked_at.is_(None), one)
                .values(revoked_at=at)
                .returning(robot_tokens.c.expires_at)
            ).scalars()
            return sum(expires > at for expires in found)

    def list(self) -> list[TokenRow]:
        """Every token, by robot, the newest first."""
        with self._catalog.read() as connection:
            at = dialect.now(connection)
            query = sa.select(robot_tokens).order_by(robot_tokens.c.robot_id, robot_tokens.c.created_at.desc())
            return [
                TokenRow(
                    row.token_id, row.robot_id, row.cohort, row.actor, row.created_at, row.expires_at, row.revoked_at,
                    "revoked" if row.revoked_at is not None else "expired" if row.expires_at <= at else "valid",
                )
                for row in connection.execute(query)
            ]  # fmt: skip

    def verify(self, token: str | None, may_ask: Callable[[], object] = lambda: None) -> Identity:
        """Whose token it is.

        Args:
            may_ask: called before the catalog is asked for a token of which nothing is known; what it raises ends this.
                A wrong secret for a known id is refused without asking.

        Raises:
            RefusedError: missing, malformed, unknown, expired or revoked (the last two are an `EndedError`, told only
                to who has the secret).
        """
        parts = TOKEN.fullmatch(token or "")
        if token is None or parts is None:
            raise RefusedError(f"the request has {'no' if not token else 'a malformed'} robot token", _ENROL)
        if (identity := self.remembered(token)) is not None:
            return identity
        token_id, secret = parts.groups()
        if self._digests is None:
            self.look_again(0.0)
        if (known := (self._digests or {}).get(token_id)) is None:
            may_ask()
        elif not hmac.compare_digest(_digest(secret), known):
            raise RefusedError(_UNKNOWN, _ENROL)
        found: Identity | EndedError
        try:
            found = self._look_up(token_id, secret)
        except EndedError as error:
            found = error
        with self._lock:
            if len(self._judged) >= _CACHED:
                self._judged.clear()
            self._judged[hashlib.sha256(token.encode()).digest()] = (found, time.monotonic() + self._cache_s)
        if isinstance(found, EndedError):
            raise EndedError(found.problem, found.fix)
        return found

    def remembered(self, token: str | None) -> Identity | None:
        """Whose token it is, if that was asked a moment ago.

        Raises:
            EndedError: it was, and the token had expired or was revoked.
        """
        if token is None:
            return None
        with self._lock:
            found, until = self._judged.get(hashlib.sha256(token.encode("utf-8", "replace")).digest(), (None, 0.0))
        if time.monotonic() >= until:
            return None
        if isinstance(found, EndedError):
            raise EndedError(found.problem, found.fix)
        return found

    def look_again(self, age_s: float) -> None:
        """Know of all valid tokens that the catalog had `age_s` ago, or later. One query, whoever asks how often."""
        with self._lock:
            if time.monotonic() - self._looked_at < age_s:
                return
            self._looked_at = time.monotonic()
        columns = (robot_tokens.c.token_id, robot_tokens.c.sha256)
        query = sa.select(*columns).where(robot_tokens.c.revoked_at.is_(None))
        with self._catalog.read() as connection:
            valid = query.where(robot_tokens.c.expires_at > dialect.now(connection))
            found = connection.execute(valid.order_by(robot_tokens.c.created_at.desc()).limit(_KNOWN))
            self._digests = {row.token_id: row.sha256 for row in found}

    def _look_up(self, token_id: str, secret: str) -> Identity:
        with self._catalog.read() as connection:
            at = dialect.now(connection)
            row = connection.execute(sa.select(robot_tokens).where(robot_tokens.c.token_id == token_id)).first()
        if row is not None and self._digests is not None and len(self._digests) < _KNOWN:
            self._digests[token_id] = row.sha256
        # An unknown id takes as long as a wrong secret.
        same = hmac.compare_digest(_digest(secret), row.sha256 if row is not None else "0" * 64)
        if row is None or not same:
            raise RefusedError(_UNKNOWN, _ENROL)
        if row.revoked_at is not None:
            raise EndedError(f"the token of robot {row.robot_id} was revoked", _ENROL)
        if row.expires_at <= at:
            raise EndedError(f"the token of robot {row.robot_id} has expired", _ENROL)
        return Identity(row.robot_id, row.cohort)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
