"""What becomes of a committed episode: its object is fetched, verified, decoded and held against the data contract.

A verdict depends on the event and its object alone. Whatever crafted bytes or a broken check provoke ends in a verdict,
so that the next event is still read; only a store that does not answer stops the work, and nothing is decided then.

One decoded episode is in memory, and a few that are fetched ahead of it, however many the events: a verdict keeps what
the catalog is told of an episode, not its arrays. Only a batch check needs them all.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
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
_AT_ONCE = 4  # objects that are fetched ahead
_AHEAD_BYTES = 256 * 2**20  # of theirs together; a larger one is fetched alone
_TOLD = ("episode_id", "task", "source", "outcome", "policy_version", "steps")  # of an episode, to the catalog


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
    """What becomes of one event: accepted, or refused at `stage`; `reasons` hold warnings as well."""

    event: Event
    stage: str = ""
    reasons: list[dict[str, str]] = field(default_factory=list)
    _told: dict[str, Any] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        return not self.stage

    def refuse(self, stage: str, rule: str, message: str) -> Verdict:
        """Refuse it for a reason of this program's own."""
        self.stage = stage
        self.reasons.append({"rule": rule, "severity": "block", "message": message})
        return self

    def judge(self, violations: Iterable[Violation]) -> None:
        """Keep what the contract says, and refuse it where that is more than a warning."""
        self.reasons += [
            {"rule": str(v.rule), "severity": str(v.severity), "message": str(v.message)} for v in violations
        ]
        if any(reason["severity"] != "warn" for reason in self.reasons):
            self.stage = "contract"

    def tell(self, episode: Episode) -> None:
        """Note what the catalog keeps of the episode."""
        self._told = {name: getattr(episode, name) for name in _TOLD}
        self._told["interventions"] = int(episode.intervention.sum())

    def row(self) -> dict[str, Any]:
        """What the catalog keeps of an accepted episode besides its claim: columns of `snapshot_episodes`."""
        assert self.accepted
        return self._told | {"warnings": self.reasons}


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
        fetched = self._fetch_all([event for event in events if event.schema_version == SCHEMA_VERSION])
        verdicts, kept = [], dict[str, Episode]()
        for event in events:
            began = time.time()
            verdict = Verdict(event)
            verdicts.append(verdict)
            if event.schema_version == SCHEMA_VERSION:
                self._judge(verdict, next(fetched), kept)
                milestones.examined(event, began)
            else:
                message = f"schema version {event.schema_version}, this server reads {SCHEMA_VERSION}"
                verdict.refuse("schema", "schema_version", message)
        if self._batch_check is not None and kept:
            accepted = [verdict for verdict in verdicts if verdict.accepted]
            self._judge_together(self._batch_check, accepted, list(kept.values()))
        return verdicts

    def _judge(self, verdict: Verdict, data: bytes | CorruptDataError, kept: dict[str, Episode]) -> None:
        """Judge one object; what is accepted is kept for the batch check."""
        event = verdict.event
        if isinstance(data, CorruptDataError):
            verdict.refuse("store", "object", data.problem)
            return
        try:
            episode = decode(data, name=event.key)
        except CorruptDataError as error:
            verdict.refuse("decode", "format", error.problem)
            return
        except Exception as error:  # whatever crafted bytes provoke: the next event must still be read
            verdict.refuse("decode", "format", f"{type(error).__name__}: {error}")
            return
        for name in ("episode_id", "robot_id", "schema_version"):
            announced, found = getattr(event, name), getattr(episode, name)
            if announced != found:
                verdict.refuse("identity", name, f"announced as {announced!r}, the object says {found!r}")
                return
        verdict.tell(episode)
        try:
            verdict.judge(self._check(episode))
        except Exception as error:  # a check that breaks accepts nothing; Ingest.release() tries again
            log.exception("check failed on %s", event.episode_id)
            verdict.refuse("contract", "check", f"the check itself failed: {type(error).__name__}: {error}")
        if verdict.accepted and self._batch_check is not None:
            kept[event.episode_id] = episode

    def _judge_together(self, check: BatchCheck, verdicts: Sequence[Verdict], accepted: Sequence[Episode]) -> None:
        try:
            found = check(accepted)
        except Exception as error:
            log.exception("batch check failed")
            for verdict in verdicts:
                verdict.refuse("contract", "batch_check", f"the check itself failed: {type(error).__name__}: {error}")
            return
        for verdict in verdicts:
            verdict.judge(found.get(verdict.event.episode_id, ()))

    def _fetch_all(self, events: Sequence[Event]) -> Iterator[bytes | CorruptDataError]:
        """Each event's object, in order, while some of those after it are being fetched."""
        if len(events) < 2:
            yield from map(self._fetch, events)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
        waiting = deque(events)
        ahead = deque[tuple[int, Future[bytes | CorruptDataError]]]()
        try:
            while waiting or ahead:
                while waiting and len(ahead) < _AT_ONCE and _fits(waiting[0], ahead):
                    event = waiting.popleft()
                    ahead.append((event.size, self._pool.submit(self._fetch, event)))
                yield ahead.popleft()[1].result()  # popped: bytes that are decoded need not be kept
        finally:
            for _, future in ahead:
                future.cancel()
            wait(future for _, future in ahead)

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


def _fits(event: Event, ahead: Iterable[tuple[int, object]]) -> bool:
    """Whether it may be fetched beside those that are on their way."""
    others = [size for size, _ in ahead]
    return not others or sum(others) + event.size <= _AHEAD_BYTES
