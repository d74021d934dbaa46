"""What becomes of a committed episode: its object is fetched, verified, decoded and held against the data contract.

A verdict depends on the event and its object alone. Whatever crafted bytes or a broken check provoke ends in a verdict,
so that the next event is still read; only a store that does not answer stops the work, and nothing is decided then.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from infra.episode import SCHEMA_VERSION, Episode, decode
from infra.errors import CorruptDataError
from infra.events import Event
from infra.objects import ObjectStore, UnreadableError
from infra.process import backoff
from infra.telemetry import milestones

log = logging.getLogger(__name__)
_AT_ONCE = 4


class Violation(Protocol):
    """A broken rule of the data contract; `block` refuses the episode, `warn` is recorded with it."""

    @property
    def rule(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def message(self) -> str: ...


Check = Callable[[Episode], Sequence[Violation]]
BatchCheck = Callable[[Sequence[Episode]], Mapping[str, Sequence[Violation]]]


@dataclass
class Verdict:
    """What becomes of one event: accepted with `episode`, or refused at `stage`; `reasons` hold warnings as well."""

    event: Event
    episode: Episode | None = None
    stage: str = ""
    reasons: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, stage: str, rule: str, message: str) -> Verdict:
        """Refuse it for a reason of this program's own."""
        self.episode, self.stage = None, stage
        self.reasons.append({"rule": rule, "severity": "block", "message": message})
        return self

    def judge(self, violations: Iterable[Violation]) -> None:
        """Keep what the contract says, and refuse it where that is more than a warning."""
        self.reasons += [
            {"rule": str(v.rule), "severity": str(v.severity), "message": str(v.message)} for v in violations
        ]
        if any(reason["severity"] != "warn" for reason in self.reasons):
            self.episode, self.stage = None, "contract"

    def row(self) -> dict[str, Any]:
        """What the catalog keeps of an accepted episode besides its claim: columns of `snapshot_episodes`."""
        assert self.episode is not None
        names = ("episode_id", "task", "source", "outcome", "policy_version", "steps")
        row = {name: getattr(self.episode, name) for name in names}
        return row | {"interventions": int(self.episode.intervention.sum()), "warnings": self.reasons}


class Examiner:
    """Examines events in their order; objects are fetched several at once.

    Args:
        objects: where they are.
        check: the data contract for one episode.
        batch_check: for the accepted episodes of one call together: violations by episode id.
        fetch_retries: tries to read an object before it is asked for again from its spool.
        sleep: replaced in tests.
    """

    def __init__(
        self,
        objects: ObjectStore,
        check: Check,
        *,
        batch_check: BatchCheck | None = None,
        fetch_retries: int = 5,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._objects = objects
        self._check = check
        self._batch_check = batch_check
        self._fetch_retries = fetch_retries
        self._sleep = sleep
        self._pool: ThreadPoolExecutor | None = None

    def examine(self, events: Sequence[Event]) -> list[Verdict]:
        """One verdict for each event, in order.

        Raises:
            UnavailableError: the store does not answer.
        """
        known = [event for event in events if event.schema_version == SCHEMA_VERSION]
        fetched = self._fetch_all(known)
        verdicts = []
        for event in events:
            began = time.time()
            if event.schema_version == SCHEMA_VERSION:
                verdicts.append(self._judge(event, next(fetched)))
                milestones.examined(event, began)
            else:
                message = f"schema version {event.schema_version}, this server reads {SCHEMA_VERSION}"
                verdicts.append(Verdict(event).refuse("schema", "schema_version", message))
        self._judge_together([verdict for verdict in verdicts if verdict.episode is not None])
        return verdicts

    def _judge(self, event: Event, data: bytes | CorruptDataError) -> Verdict:
        verdict = Verdict(event)
        if isinstance(data, CorruptDataError):
            return verdict.refuse("store", "object", data.problem)
        try:
            episode = decode(data, name=event.key)
        except CorruptDataError as error:
            return verdict.refuse("decode", "format", error.problem)
        except Exception as error:  # whatever crafted bytes provoke: the next event must still be read
            return verdict.refuse("decode", "format", f"{type(error).__name__}: {error}")
        for name in ("episode_id", "robot_id", "schema_version"):
            announced, found = getattr(event, name), getattr(episode, name)
            if announced != found:
                return verdict.refuse("identity", name, f"announced as {announced!r}, the object says {found!r}")
        verdict.episode = episode
        try:
            verdict.judge(self._check(episode))
        except Exception as error:  # a check that breaks accepts nothing; Ingest.release() tries again
            log.exception("check failed on %s", event.episode_id)
            verdict.refuse("contract", "check", f"the check itself failed: {type(error).__name__}: {error}")
        return verdict

    def _judge_together(self, verdicts: Sequence[Verdict]) -> None:
        if self._batch_check is None or not verdicts:
            return
        accepted = [verdict.episode for verdict in verdicts if verdict.episode is not None]
        try:
            found = self._batch_check(accepted)
        except Exception as error:
            log.exception("batch check failed")
            for verdict in verdicts:
                verdict.refuse("contract", "batch_check", f"the check itself failed: {type(error).__name__}: {error}")
            return
        for verdict in verdicts:
            verdict.judge(found.get(verdict.event.episode_id, ()))

    def _fetch_all(self, events: Sequence[Event]) -> Iterator[bytes | CorruptDataError]:
        """Each event's object, in order, while those after it are being fetched."""
        if len(events) < 2:
            yield from map(self._fetch, events)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
        futures: list[Future[bytes | CorruptDataError]] = [self._pool.submit(self._fetch, event) for event in events]
        futures.reverse()
        try:
            while futures:
                yield futures.pop().result()  # popped: bytes that are decoded need not be kept
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _fetch(self, event: Event) -> bytes | CorruptDataError:
        """The object's bytes; the error when after all tries they are not there or not those announced."""
        for attempt in range(self._fetch_retries):
            if attempt:
                self._sleep(backoff(attempt - 1))
            try:
                data = self._objects.get(event.key)
            except CorruptDataError as error:
                last = error
                continue
            except UnreadableError as error:  # the store has lost it: that must not keep the others waiting
                last = CorruptDataError(error.problem, error.fix)
                continue
            digest = hashlib.sha256(data).hexdigest()
            if digest == event.sha256:
                return data
            last = CorruptDataError(f"object {event.key} has {len(data)} bytes, sha256 {digest}", "send it again")
        return last
