"""The robot's client: records into the spool, and empties it towards the ingest service.

Recording never waits for the network: `start` runs the emptying in a thread of its own. What a killed robot had
closed is sent again at its next start; the service takes a repeated episode for the same one.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from infra.edge import values
from infra.edge.framelog import EpisodeEnd, EpisodeStart, Frame
from infra.edge.server import MAX_BATCH, Status, Upload
from infra.edge.spool import ClosedEpisode, Spool
from infra.episode import SCHEMA_VERSION, Outcome, Source, new_episode_id
from infra.errors import ConflictError, LwdError, StorageFullError, UnavailableError, summary
from infra.telemetry import milestones
from infra.telemetry.tracing import traceparent

_log = logging.getLogger("lwd.edge")
BATCH_EPISODES, BATCH_BYTES = 16, 64 * 2**20  # of one submission; one larger episode goes alone


class IngestPort(Protocol):
    """What the client asks of the server, for its robot; the part of `infra.edge.server.RobotServer` that it needs."""

    def statuses(self, episodes: Sequence[tuple[str, str]]) -> list[Status]:
        """Where the server holds the episodes with these (id, sha256); at most `MAX_BATCH`."""

    def submit_many(self, uploads: Sequence[Upload]) -> list[Status | LwdError]:
        """Hand in several; a status means committed. Repeating it changes nothing."""


@dataclass(frozen=True)
class SyncReport:
    """What one pass over the spool did."""

    sent: int = 0
    confirmed: int = 0
    waiting: int = 0
    failed: int = 0


class EdgeClient:
    """Records episodes of one robot and gets them to the server.

    Args:
        robot_id: this robot's name, as the server knows it; ConfigError if it is no text.
        spool: its spool.
        ingest: the server's port for this robot, embedded or remote.
        poll_s: pause between two passes of the background thread, seconds.
        on_event: called with a word and its fields for each episode sent, confirmed, or failed; from the thread too.
            What it raises is logged and goes no further.
    """

    def __init__(
        self,
        robot_id: str,
        spool: Spool,
        ingest: IngestPort,
        *,
        poll_s: float = 0.2,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        self.robot_id = values.text(robot_id, "robot_id")
        self.spool = spool
        self._ingest = ingest
        self._poll_s = poll_s
        self._tell = on_event or (lambda event, fields: None)
        self._refused_close: str | None = None  # why the open episode could not be closed
        self._death: str | None = None  # of the thread that sends
        self.unexpected = 0  # errors of no known kind, met while sending
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._syncing = threading.Lock()
        self._jitter = random.Random(self.robot_id)

    # Recording

    def begin(
        self, task: str, instruction: str, *, source: Source, policy_version: int | None, episode_id: str | None = None
    ) -> str:
        """Open a new episode and return its id.

        An attempt whose `close` was refused is discarded first, with that reason.

        Raises:
            ConfigError: a field is not of its type, or an episode is open.
            StorageFullError: the spool is full; nothing was lost, call again once it was emptied.
            UnavailableError: the thread that sends has died.
        """
        self.check()
        if self._refused_close is not None:
            self.discard(self._refused_close)
        episode_id = new_episode_id() if episode_id is None else episode_id
        self.spool.begin(
            EpisodeStart(episode_id, self.robot_id, task, instruction, source, policy_version, time.time())
        )
        return episode_id

    def record(self, frame: Frame) -> None:
        """Append one control step of the open episode.

        Raises:
            ConfigError: no episode is open, or a field is not of its type; the episode goes on without this frame.
            StorageFullError: the spool is full; the open episode was discarded, the closed ones are untouched.
            UnavailableError: the thread that sends has died; the frame was recorded.
        """
        try:
            self.spool.append(frame)
        except StorageFullError:
            self.discard("the spool was full")
            raise
        self.check()

    def close(
        self,
        observation: npt.NDArray[np.float32],
        timestamp: float,
        outcome: Outcome,
        substep_scores: tuple[float, ...],
        extra: dict[str, Any] | None = None,
    ) -> ClosedEpisode:
        """Close the open episode: from here on it survives this process.

        Args:
            observation: (D,) float32, the state after the last action.
            timestamp: its time, seconds since the episode's start.
            extra: a note. What JSON cannot hold in it is replaced by a text or left out; the journal, an event and the
                result's `changed` name it.

        Raises:
            ConfigError: no episode is open, it has no frame, or a field is not of its type. The attempt may be closed
                again with other values; `begin` drops it.
            StorageFullError: no room. An attempt that was not yet complete on the disk is discarded.
        """
        began = time.time()
        try:
            closed = self.spool.close(
                EpisodeEnd(observation, timestamp, outcome, substep_scores, {} if extra is None else extra)
            )
        except StorageFullError:
            self.discard("the spool was full")
            raise
        except Exception as error:
            if self.spool.recording:
                problem = error.problem if isinstance(error, LwdError) else summary(error)
                self._refused_close = f"it could not be closed: {problem}"
            raise
        self._refused_close = None
        if closed.changed:
            self._on_event("extra changed", {"episode_id": closed.episode_id, "keys": dict(closed.changed)})
        milestones.closed(closed.episode_id, self.robot_id, began)
        self._wake.set()
        return closed

    def discard(self, reason: str) -> None:
        """Drop the open episode, if any; the journal keeps the reason."""
        self._refused_close = None
        self.spool.discard(reason)

    def check(self) -> None:
        """Whether closed episodes are still being sent.

        Raises:
            UnavailableError: the thread that sends has died, with its reason; `start` begins another.
        """
        if self._death is not None:
            raise UnavailableError(
                f"the sending thread of robot {self.robot_id} has died: {self._death}",
                "start the client again; what was closed waits in its spool",
            )

    # Emptying

    def sync(self) -> SyncReport:
        """One pass: send what the server lacks, delete what a snapshot or the quarantine holds.

        A failure of one episode leaves it in the spool for the next pass and does not stop the others; a server that is
        away ends the pass.
        """
        counts = dict.fromkeys(("sent", "confirmed", "waiting", "failed"), 0)
        with self._syncing:
            pending = self.spool.pending()
            for start in range(0, len(pending), MAX_BATCH):
                group = pending[start : start + MAX_BATCH]
                try:
                    statuses = self._ingest.statuses([(closed.episode_id, closed.sha256) for closed in group])
                    _one_each(statuses, group)
                except Exception as error:
                    left = len(pending) - start
                    counts["failed"] += left
                    self._on_event("trouble", {"episodes": left, "problem": self._problem(error)})
                    break
                lacking = []
                for closed, status in zip(group, statuses, strict=True):
                    if status == "unknown":
                        lacking.append(closed)
                    else:
                        counts[self._settle(closed, status)] += 1
                if not self._send(lacking, counts):
                    break
        return SyncReport(**counts)

    def _settle(self, closed: ClosedEpisode, status: Status) -> str:
        """Delete an episode that the server holds for good; what became of it."""
        if status == "committed":
            return "waiting"
        if status not in ("snapshot", "quarantined"):  # deleting on a word that is not known would lose the episode
            self._report(closed, TypeError(f"the server answers {status!r:.80} for a status"))
            return "failed"
        try:
            self.spool.confirm(closed)
        except Exception as error:
            self._report(closed, error)
            return "failed"
        self._on_event("confirmed", {"episode_id": closed.episode_id, "as": status})
        return "confirmed"

    def _send(self, lacking: Sequence[ClosedEpisode], counts: dict[str, int]) -> bool:
        """Hand episodes in, batch by batch; whether the server is there for more."""
        for batch in _batches(lacking):
            uploads = {}
            for closed in batch:
                try:
                    self.spool.read(closed)  # what rotted on this disk is set aside
                    uploads[closed] = _upload(closed)
                except Exception as error:
                    self._report(closed, error)
                    counts["failed"] += 1
            if not uploads:
                continue
            outcomes: Sequence[Status | Exception]
            began = time.time()
            try:
                outcomes = self._ingest.submit_many(list(uploads.values()))
                _one_each(outcomes, uploads)
            except Exception as error:
                outcomes = [error] * len(uploads)
            for closed, outcome in zip(uploads, outcomes, strict=True):
                if not isinstance(outcome, Exception):
                    counts["sent"] += 1
                    milestones.uploaded(closed.episode_id, closed.size, began)
                    self._on_event("sent", {"episode_id": closed.episode_id, "bytes": closed.size})
                    continue
                counts["failed"] += 1
                if isinstance(outcome, ConflictError):
                    # The server has other bytes under this id; the file stays for a person.
                    try:
                        self.spool.set_aside(closed, outcome.problem)
                    except Exception as error:
                        self._report(closed, error)
                self._report(closed, outcome)
            if all(isinstance(outcome, UnavailableError | StorageFullError) for outcome in outcomes):
                return False
        return True

    def drain(self, timeout_s: float) -> int:
        """Sync until the spool is empty or `timeout_s` has passed; returns how many episodes still wait."""
        end = time.monotonic() + timeout_s
        while self.sync() and (left := len(self.spool.pending())) and time.monotonic() < end:
            time.sleep(self._poll_s)
        return left

    def start(self) -> None:
        """Empty the spool in the background, until `stop`; nothing happens where that is done already."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stop.clear()
        self._death = None
        self._thread = threading.Thread(target=self._live, name=f"sync-{self.robot_id}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the background thread after the pass over the spool that it is at."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _live(self) -> None:
        """The thread's life; what ends it early is kept for `check`."""
        try:
            self._run()
        except BaseException as error:
            self._death = summary(error)
            self._on_event("trouble", {"problem": f"the sending thread has died: {self._death}"})

    def _run(self) -> None:
        pause = self._poll_s
        while not self._stop.is_set():
            self._wake.clear()
            try:
                troubled = self.sync().failed > 0
            except Exception as error:  # the spool itself: say so, the robot goes on recording
                self._on_event("trouble", {"problem": self._problem(error)})
                troubled = True
            # A server in trouble is asked ever less often, and not by the whole fleet at once.
            pause = min(pause * 2, 30.0) if troubled else self._poll_s
            self._wake.wait(pause * (self._jitter.uniform(0.5, 1.0) if troubled else 1.0))
            if troubled:
                self._stop.wait(self._poll_s)

    def _report(self, closed: ClosedEpisode, error: Exception) -> None:
        self._on_event("trouble", {"episode_id": closed.episode_id, "problem": self._problem(error)})

    def _problem(self, error: Exception) -> str:
        """What an error says; one of no known kind is counted, and its traceback logged once in a while."""
        if isinstance(error, LwdError):
            return error.problem
        if not isinstance(error, OSError):
            self.unexpected += 1
            if self.unexpected & (self.unexpected - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                _log.error("unexpected while sending, %d so far", self.unexpected, exc_info=error)
        return summary(error)

    def _on_event(self, event: str, fields: dict[str, Any]) -> None:
        try:
            self._tell(event, fields)
        except Exception:  # a listener must not stop what it listens to
            _log.exception("the listener failed at %s", event)


def _one_each(answers: Sequence[object], asked: Sized) -> None:
    if len(answers) != len(asked):
        raise TypeError(f"the server gives {len(answers)} answers to {len(asked)} questions")


def _upload(closed: ClosedEpisode) -> Upload:
    meta = {
        "produced_at": closed.path.stat().st_mtime,
        "schema_version": SCHEMA_VERSION,
        "trace_id": traceparent(closed.episode_id),
    }
    return Upload(closed.episode_id, closed.sha256, closed.size, closed.path, meta)


def _batches(episodes: Sequence[ClosedEpisode]) -> Iterator[list[ClosedEpisode]]:
    """In order, as many at once as a submission may have."""
    batch: list[ClosedEpisode] = []
    total = 0
    for closed in episodes:
        if batch and (len(batch) == BATCH_EPISODES or total + closed.size > BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(closed)
        total += closed.size
    if batch:
        yield batch
