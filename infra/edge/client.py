"""The robot's client: records into the spool, and empties it towards the ingest service.

Recording never waits for the network: `start` runs the emptying in a thread of its own. What a killed robot had
closed is sent again at its next start; the service takes a repeated episode for the same one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from infra.edge.framelog import EpisodeEnd, EpisodeStart, Frame
from infra.edge.spool import ClosedEpisode, Spool
from infra.episode import SCHEMA_VERSION, Outcome, Source, new_episode_id
from infra.errors import ConflictError, LwdError, StorageFullError

Status = Literal["unknown", "committed", "snapshot", "quarantined"]


class IngestPort(Protocol):
    """What a robot may ask of the ingest service."""

    def submit(
        self,
        robot_id: str,
        episode_id: str,
        data: bytes,
        sha256: str,
        size: int,
        meta: Mapping[str, object] | None = None,
    ) -> object:
        """Upload one episode; returning means it is committed. Repeating it changes nothing."""

    def status(self, episode_id: str, sha256: str | None = None) -> Status:
        """Where the server holds the episode with these bytes."""


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
        robot_id: this robot's name, as the server knows it.
        spool: its spool.
        ingest: the service, embedded or remote.
        poll_s: pause between two passes of the background thread, seconds.
        on_event: called with a word and its fields for each episode sent, confirmed, or failed; from the thread too.
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
        self.robot_id = robot_id
        self.spool = spool
        self._ingest = ingest
        self._poll_s = poll_s
        self._on_event = on_event or (lambda event, fields: None)
        self._episode: str | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._syncing = threading.Lock()
        self._jitter = random.Random(robot_id)

    # Recording

    def begin(
        self, task: str, instruction: str, *, source: Source, policy_version: int | None, episode_id: str | None = None
    ) -> str:
        """Open a new episode and return its id.

        Raises:
            StorageFullError: the spool is full; nothing was lost, call again once it was emptied.
        """
        episode_id = episode_id or new_episode_id()
        self.spool.begin(
            EpisodeStart(episode_id, self.robot_id, task, instruction, source, policy_version, time.time())
        )
        self._episode = episode_id
        return episode_id

    def record(self, frame: Frame) -> None:
        """Append one control step of the open episode.

        Raises:
            StorageFullError: the spool is full; the open episode was discarded, the closed ones are untouched.
        """
        try:
            self.spool.append(frame)
        except StorageFullError:
            self.spool.discard("the spool was full")
            self._episode = None
            raise

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
        """
        self._episode = None
        closed = self.spool.close(EpisodeEnd(observation, timestamp, outcome, substep_scores, extra or {}))
        self._wake.set()
        return closed

    def discard(self, reason: str) -> None:
        """Drop the open episode; the journal keeps the reason."""
        self.spool.discard(reason)
        self._episode = None

    # Emptying

    def sync(self) -> SyncReport:
        """One pass: send what the server lacks, delete what a snapshot or the quarantine holds.

        A failure of one episode leaves it in the spool for the next pass and does not stop the others.
        """
        sent = confirmed = waiting = failed = 0
        with self._syncing:
            for closed in self.spool.pending():
                try:
                    status = self._ingest.status(closed.episode_id, closed.sha256)
                    if status == "unknown":
                        data = self.spool.read(closed)
                        meta = {"produced_at": closed.path.stat().st_mtime, "schema_version": SCHEMA_VERSION}
                        self._ingest.submit(self.robot_id, closed.episode_id, data, closed.sha256, closed.size, meta)
                        sent += 1
                        self._on_event("sent", {"episode_id": closed.episode_id, "bytes": closed.size})
                    elif status in ("snapshot", "quarantined"):
                        self.spool.confirm(closed)
                        confirmed += 1
                        self._on_event("confirmed", {"episode_id": closed.episode_id, "as": status})
                    else:
                        waiting += 1
                except ConflictError as error:
                    # The server has other bytes under this id; the file stays for a person.
                    self.spool.set_aside(closed, error.problem)
                    self._report(closed, error)
                    failed += 1
                except (LwdError, OSError) as error:
                    self._report(closed, error)
                    failed += 1
        return SyncReport(sent, confirmed, waiting, failed)

    def drain(self, timeout_s: float) -> int:
        """Sync until the spool is empty or `timeout_s` has passed; returns how many episodes still wait."""
        end = time.monotonic() + timeout_s
        while self.sync() and (left := len(self.spool.pending())) and time.monotonic() < end:
            time.sleep(self._poll_s)
        return left

    def start(self) -> None:
        """Empty the spool in the background, until `stop`."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name=f"sync-{self.robot_id}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the background thread after the episode that it is sending."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        pause = self._poll_s
        while not self._stop.is_set():
            self._wake.clear()
            try:
                troubled = self.sync().failed > 0
            except LwdError as error:  # the spool itself: say so, the robot goes on recording
                self._on_event("trouble", {"problem": error.problem})
                troubled = True
            # A server in trouble is asked ever less often, and not by the whole fleet at once.
            pause = min(pause * 2, 30.0) if troubled else self._poll_s
            self._wake.wait(pause * (self._jitter.uniform(0.5, 1.0) if troubled else 1.0))
            if troubled:
                self._stop.wait(self._poll_s)

    def _report(self, closed: ClosedEpisode, error: Exception) -> None:
        problem = error.problem if isinstance(error, LwdError) else str(error)
        self._on_event("trouble", {"episode_id": closed.episode_id, "problem": problem})
