"""What becomes of a committed episode: its object is fetched, verified, decoded and held against the data contract.

A verdict depends on the event and its object alone. Whatever crafted bytes or a broken check provoke ends in a verdict,
so that the next event is still read; only a store that does not answer, or a machine that can start no process, stops
the work, and nothing is decided then. The bytes are read by `infra.examination`, in a process that can be killed.

One object is in memory, and a few that are fetched ahead of it, however many the events: a verdict keeps what the
catalog is told of an episode, not its arrays. Only a batch check needs them all.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from infra.catalog.fits import misfit
from infra.catalog.schema import snapshot_episodes
from infra.episode import SCHEMA_VERSION
from infra.errors import CorruptDataError
from infra.events import Event
from infra.examination import Examination, InProcess
from infra.judge import BatchCheck, Check, Reason, reason, refuses
from infra.objects import ObjectStore, UnreadableError
from infra.process import backoff
from infra.telemetry import milestones

log = logging.getLogger(__name__)
_AT_ONCE = 4  # objects that are fetched ahead
_AHEAD_BYTES = 256 * 2**20  # of theirs together; a larger one is fetched alone


@dataclass
class Verdict:
    """What becomes of one event: accepted, or refused at `stage`; `reasons` hold warnings as well."""

    event: Event
    stage: str = ""
    reasons: list[Reason] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)  # what the catalog keeps of the episode

    @property
    def accepted(self) -> bool:
        return not self.stage

    def refuse(self, stage: str, rule: str, message: str) -> Verdict:
        """Refuse it for a reason of this program's own."""
        self.stage = stage
        if (one := reason(rule, "block", message)) not in self.reasons:
            self.reasons.append(one)
        return self

    def row(self) -> dict[str, Any]:
        """What the catalog keeps of an accepted episode besides its claim: columns of `snapshot_episodes`."""
        assert self.accepted
        return {"episode_id": self.event.episode_id, **self.told, "warnings": self.reasons}


class Examiner:
    """Examines events in their order; objects are fetched several at once.

    Args:
        objects: where they are.
        check: the data contract for one episode; or who judges the bytes, in a process of its own.
        batch_check: for the accepted episodes of one call together: violations by episode id.
        fetch_retries: tries to read an object before it is asked for again from its spool.
        sleep: replaced in tests.
    """

    def __init__(
        self,
        objects: ObjectStore,
        check: Check | Examination,
        *,
        batch_check: BatchCheck | None = None,
        fetch_retries: int = 5,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._objects = objects
        self._examination = InProcess(check, batch_check) if callable(check) else check
        self._fetch_retries = fetch_retries
        self._sleep = sleep
        self._pool: ThreadPoolExecutor | None = None

    def examine(self, events: Sequence[Event]) -> list[Verdict]:
        """One verdict for each event, in order.

        Raises:
            UnavailableError: the store does not answer.
        """
        fetched = self._fetch_all([event for event in events if event.schema_version == SCHEMA_VERSION])
        verdicts, kept = [], dict[str, bytes]()
        for event in events:
            began = time.time()
            verdict = Verdict(event)
            verdicts.append(verdict)
            if event.schema_version == SCHEMA_VERSION:
                self._judge(verdict, next(fetched), kept)
                _note(event, began)
            else:
                message = f"schema version {event.schema_version}, this server reads {SCHEMA_VERSION}"
                verdict.refuse("schema", "schema_version", message)
        if kept:
            found = self._examination.judge_together(kept)
            for verdict in verdicts:
                if verdict.accepted:
                    verdict.reasons += found.get(verdict.event.episode_id, ())
                    verdict.stage = "contract" if refuses(verdict.reasons) else ""
        return verdicts

    def close(self) -> None:
        """End the process that examines; it is started again when it is needed."""
        self._examination.close()

    def _judge(self, verdict: Verdict, data: bytes | CorruptDataError, kept: dict[str, bytes]) -> None:
        """Judge one object; what is accepted is kept for the batch check."""
        if isinstance(data, CorruptDataError):
            verdict.refuse("store", "object", data.problem)
            return
        found = self._examination.judge(verdict.event, data)
        verdict.stage, verdict.reasons, verdict.told = found.stage, list(found.reasons), found.told
        if not verdict.accepted:
            return
        if wrong := misfit(snapshot_episodes, verdict.row()):  # the contract should have said so; the database would
            verdict.refuse("contract", "row", f"the catalog cannot keep it: {wrong}")
        elif self._examination.together:
            kept[verdict.event.episode_id] = data

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


def _note(event: Event, began: float) -> None:
    """Metrics and traces; what they make of odd values must not stop the work."""
    try:
        milestones.examined(event, began)
    except Exception:
        log.exception("metrics of %s", event.episode_id)


def _fits(event: Event, ahead: Iterable[tuple[int, object]]) -> bool:
    """Whether it may be fetched beside those that are on their way."""
    others = [size for size, _ in ahead]
    return not others or sum(others) + event.size <= _AHEAD_BYTES
