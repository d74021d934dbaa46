"""A robot's contact with its server: new policies, signs of life, latencies. None of it is worth waiting for.

While the server is away the robot goes on with what it has; it is asked again ever less often, at random intervals, so
that a fleet does not return all at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from infra.edge.server import Heartbeat, Latency, RobotServer
from infra.edge.spool import Spool
from infra.errors import ConfigError, LwdError, UnavailableError, summary
from infra.policy.subscriber import ActivePolicy, PolicySubscriber
from infra.process import backoff

_HEARTBEAT_S = 1.0  # an idle robot says so at least this often
_AWAY_MAX_S = 10.0  # between two looks at a server that is away
_MAX_REFUSALS, _MAX_REASON = 16, 300
_log = logging.getLogger("lwd.robot")


def say(message: str, level: int = logging.INFO, **fields: Any) -> None:
    """One line of the robot's log."""
    _log.log(level, message, extra={"fields": fields})


class Contact:
    """Asks and tells the server.

    Args:
        server: the port.
        subscriber, spool, tasks: of the robot, for its signs of life.
        poll_s: first pause when the server is away, seconds.

    Attributes:
        refusal: why the robot does not take the policy that it is to run; empty while it does.
        help: why a person should look at this robot; empty while none need.
        safety: what the shield counted in this life of the robot, by kind.
        hold: the robot may run no policy that it has.
    """

    def __init__(
        self, server: RobotServer, subscriber: PolicySubscriber, spool: Spool, tasks: Sequence[str], poll_s: float
    ) -> None:
        self._server = server
        self._subscriber = subscriber
        self._spool = spool
        self._tasks = list(tasks)
        self._poll_s = poll_s
        self.refusal = ""
        self.help = ""
        self.safety: Counter[str] = Counter()
        self._refused: dict[int, str] = {}  # versions that cannot be loaded here, and why; the newest last
        self.hold = False
        self._measured: dict[str, int] = {}  # by name: the last version
        self._behind = 0  # looks in a row that did not bring what the robot is to have
        self._poll_at = 0.0  # by the monotonic clock: not before
        self._known = False  # the server has answered
        self._told: tuple[object, ...] = ()
        self._told_at = 0.0
        self._failures = 0  # in a row
        self._ask_at = 0.0  # by the monotonic clock: not before

    def poll(self, *, waited_for: bool, keep_refusal: bool) -> None:
        """Stage the policy that was announced last, if the server is there.

        Args:
            waited_for: the robot has a policy, so that the way of the next one is worth a measurement.
            keep_refusal: a policy that was staged could not be loaded, and that is still so.

        Raises:
            ConfigError: this robot's token is another one's, said before the server was ever of use and while there is
                no policy to go on with.
        """
        if time.monotonic() < max(self._ask_at, self._poll_at):
            return
        before = self._subscriber.staged
        try:
            self._subscriber.poll()
            if not keep_refusal:
                self.refusal = ""
        except UnavailableError as error:
            self._away(error)
            return
        except ConfigError as error:
            if not self._known and self._subscriber.active is None:
                raise
            self.refuse(error)
        except LwdError as error:  # a policy or a disk that is no good: what the robot has goes on
            self.refuse(error)
        except Exception as error:
            self._away(_unexpected(error))
            return
        self._reached()
        self._wait_while_behind()
        staged = self._subscriber.staged
        if waited_for and staged is not None and staged != before:
            self.measure("publish_to_staged_s", staged)

    def _wait_while_behind(self) -> None:
        """Fetch what cannot be staged ever less often: it costs the disk, the network and this robot's time."""
        self._behind = self._behind + 1 if self._subscriber.behind else 0
        if self._behind > 1:
            self._poll_at = time.monotonic() + backoff(self._behind, self._poll_s, _AWAY_MAX_S)

    def permitted(self) -> bool:
        """Whether an episode may be begun with the active policy; said once when that changes."""
        hold = self._subscriber.active is not None and not self._subscriber.permitted
        if hold != self.hold:
            self.hold = hold
            if hold:
                say("hold: no permission", logging.ERROR, ended=self._subscriber.permitted_until)
            else:
                say("permitted again")
        return not hold

    def refuse(self, error: LwdError, version: int | None = None) -> None:
        """A policy cannot be taken: said once for each reason, not at every boundary.

        Args:
            version: the policy's, where it is this robot that finds it unfit: the registry is told of it.
        """
        if version is not None:
            self._refused.pop(version, None)
            self._refused[version] = error.problem[:_MAX_REASON]
            while len(self._refused) > _MAX_REFUSALS:
                del self._refused[next(iter(self._refused))]
        if error.problem != self.refusal:
            self.refusal = error.problem
            say("policy refused", logging.ERROR, problem=error.problem)

    def heartbeat(self, closed: int, ended: bool = False) -> None:
        """Say how this robot is, if there is news or the last word was a while ago; a lost word is no harm.

        Args:
            closed: its episodes.
            ended: this is its last word.
        """
        active, staged = self._subscriber.active, self._subscriber.staged
        refusals = self._refusals()
        told = (active, staged, closed, self.refusal, self.help, len(refusals), self.hold, ended)
        now = time.monotonic()
        if now < self._ask_at or (told == self._told and now - self._told_at < _HEARTBEAT_S):
            return
        details = {
            "pid": os.getpid(),
            "tasks": self._tasks,
            "refused": self.refusal[:1000] or None,
            "refusals": refusals,
            "help": self.help[:_MAX_REASON] or None,
            "safety": {kind: count for kind, count in sorted(self.safety.items()) if count},
            "spool_bytes": self._spool.used_bytes(),
            "spool_limit": self._spool.max_bytes,
            "spool_episodes": len(self._spool.pending()),
            "ended": ended,
            "hold": self.hold,
            "permitted_until": self._subscriber.permitted_until,
        }
        versions = (active.version if active else None, staged.version if staged else None)
        try:
            self._server.heartbeat(Heartbeat(*versions, closed, details))
        except LwdError as error:  # whatever the server says, this robot goes on
            self._away(error)
            return
        except Exception as error:
            self._away(_unexpected(error))
            return
        self._told, self._told_at = told, now
        self._reached()

    def measure(self, name: Latency, policy: ActivePolicy) -> None:
        """Record how long a policy's announcement took until now, once for each version."""
        if not policy.announced_at or self._measured.get(name) == policy.version:
            return
        self._measured[name] = policy.version
        try:
            self._server.measure(name, policy.version, policy.announced_at)
        except LwdError as error:
            self._away(error)
        except Exception as error:
            self._away(_unexpected(error))

    def _refusals(self) -> list[dict[str, object]]:
        """Policies that this robot found unfit, the newest last: those that failed at work, and those not loaded."""
        found = {one.version: one.reason for one in self._subscriber.rejected} | self._refused
        return [{"version": version, "reason": reason} for version, reason in list(found.items())[-_MAX_REFUSALS:]]

    def _away(self, error: LwdError) -> None:
        if not self._failures:
            say("offline", logging.WARNING, problem=error.problem)
        self._failures += 1
        self._ask_at = time.monotonic() + backoff(self._failures, self._poll_s, _AWAY_MAX_S)

    def _reached(self) -> None:
        self._known = True
        if self._failures:
            say("online again", failures=self._failures)
        self._failures = 0


def _unexpected(error: Exception) -> UnavailableError:
    """A server that answers what nobody expects is as good as none; the traceback is in the log."""
    _log.error("unexpected answer", exc_info=error)
    return UnavailableError(f"the server's answer cannot be used ({summary(error)})", "look at the server")
