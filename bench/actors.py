"""Simulated robots without physics: real spools, real clients, each its own token; many in one process.

    python -m bench.actors --home runs/soak/robots --tokens tokens.json --url U --first 0 --count 4 --episodes 1000

Every closed episode goes into `<home>/actors/<first>.jsonl`, fsynced, and so does every word of the server about
it: what the history checker holds the system to. Killed at any moment, the same command goes on. A file `<home>/enough`
ends the recording; what is in the spools is still sent.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bench.oplog import OperationLog
from bench.robots import robot_arguments, robot_name, run_robots
from bench.speed_fleet import episode
from infra.edge.client import EdgeClient
from infra.edge.framelog import Frame
from infra.edge.remote import RemoteServer
from infra.edge.spool import ClosedEpisode, Spool
from infra.episode import Episode
from infra.errors import StorageFullError
from infra.fleet.tasks import TASKS
from infra.process import run_process
from infra.settings import MIB

KIND = "actors"
STEPS = 24
BACKLOG = 40  # closed episodes that a robot lets wait before it records another
SPOOL_BYTES = 512 * MIB
_WIDEST = 60_000  # values of an observation: 240 KiB, about three camera images


def made(rng: np.random.Generator, robot: str, payload: int = 0, *, breach: bool = False) -> Episode:
    """A short episode that keeps the contract, or with `breach` breaks it.

    Args:
        payload: bytes that the observations have at least, by further values: as if they were images.
    """
    values = payload // 4
    steps = max(STEPS, -(-values // _WIDEST))
    whole = episode(rng, "S1" if steps <= TASKS["S1"].limit else "L1")
    observations, actions = whole.observations[: steps + 1], whole.actions[:steps]
    if (further := values // (steps + 1) - observations.shape[1]) > 0:
        observations = np.hstack([observations, rng.standard_normal((steps + 1, further), np.float32)])
    if breach:
        actions = actions + 2.0
    return replace(
        whole,
        robot_id=robot,
        observations=observations,
        actions=actions,
        rewards=np.eye(1, steps, steps - 1, dtype=np.float32)[0],
        intervention=np.zeros(steps, bool),
        timestamps=whole.timestamps[: steps + 1],
    )


class Actor:
    """One robot: records episodes at a pace, or as fast as its backlog allows, until it has recorded enough."""

    def __init__(self, options: Any, number: int, server: RemoteServer, log: OperationLog) -> None:
        self._robot, self._log, self._options = robot_name(number), log, options
        spool = options.home / "spool" / self._robot
        self._spool = Spool(spool, max_bytes=SPOOL_BYTES, fsync_s=60.0)
        self._client = EdgeClient(self._robot, self._spool, server, poll_s=options.poll, on_event=self._event)
        self._count = options.home / KIND / f"{self._robot}.count"
        self._closed = int(self._count.read_text()) if self._count.exists() else 0
        self._rng = np.random.default_rng([options.seed, number, self._closed])
        self._end = time.monotonic() + options.seconds if options.seconds else float("inf")
        for closed in self._spool.pending():  # those of a killed life whose line was not written
            self._tell(closed)

    def run(self, stop: threading.Event) -> None:
        self._client.start()
        pace = self._options.pace
        due = time.monotonic() + float(self._rng.uniform(0, pace))
        while not stop.is_set() and not self._enough():
            wait = min(max(0.0, due - time.monotonic()), 0.5)
            if len(self._spool.pending()) >= BACKLOG or wait:
                stop.wait(wait or 0.05)
                continue
            due = max(due + float(self._rng.exponential(pace)), time.monotonic() - pace) if pace else 0.0
            try:
                self._record()
            except StorageFullError:
                stop.wait(0.5)
        while not stop.is_set() and self._spool.pending():
            stop.wait(0.1)
        self._client.stop()
        self._spool.release()

    def _enough(self) -> bool:
        over = time.monotonic() > self._end or (self._options.home / "enough").exists()
        return over or self._closed >= self._options.episodes

    def _record(self) -> None:
        breach = bool(self._rng.random() < self._options.breach)
        done = made(self._rng, self._robot, int(self._options.payload * MIB), breach=breach)
        self._client.begin(done.task, done.instruction, source="online", policy_version=1, episode_id=done.episode_id)
        for t in range(done.steps):
            self._client.record(
                Frame(done.observations[t], done.actions[t], float(done.rewards[t]), False, done.timestamps[t])
            )
        began = time.time()
        closed = self._client.close(done.observations[-1], done.timestamps[-1], done.outcome, done.substep_scores)
        self._tell(closed, began=began, breach=breach)
        self._closed += 1
        aside = self._count.with_suffix(".tmp")
        aside.write_text(str(self._closed))
        os.replace(aside, self._count)  # a kill between truncation and writing would begin anew

    def _tell(self, closed: ClosedEpisode, **fields: Any) -> None:
        self._log.write("closed", durable=True, robot=self._robot, id=closed.episode_id, sha256=closed.sha256,
                        bytes=closed.size, **fields)  # fmt: skip

    def _event(self, event: str, fields: dict[str, Any]) -> None:
        if event in ("sent", "confirmed"):
            self._log.write(event, robot=self._robot, id=fields["episode_id"])
        else:
            self._log.write(event, robot=self._robot, **fields)


def _live(
    options: argparse.Namespace, number: int, server: RemoteServer, log: OperationLog, stop: threading.Event
) -> None:
    Actor(options, number, server, log).run(stop)


def _record_all(options: argparse.Namespace, stop: threading.Event) -> None:
    if not run_robots(options, KIND, partial(_live, options), stop) or stop.is_set():
        sys.exit(1)  # to be started again


def main() -> int:
    parser = robot_arguments("bench.actors", "Robots without physics that record and send episodes.")
    parser.add_argument("--episodes", type=int, required=True, help="of each robot, in all its lives")
    parser.add_argument("--seconds", type=float, help="record no longer than this")
    parser.add_argument("--pace", type=float, default=0.0, help="mean seconds between two episodes; 0 is at once")
    parser.add_argument("--poll", type=float, default=0.2, help="pause between two looks of a client, seconds")
    parser.add_argument("--payload", type=float, default=0.0, help="MiB of an episode; some 20 KiB if less")
    parser.add_argument("--breach", type=float, default=0.0, help="share of episodes that break the contract")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return run_process(options, partial(_record_all, options), label=KIND)


if __name__ == "__main__":
    sys.exit(main())
