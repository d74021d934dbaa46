"""Faults of the data itself: sent twice, altered, damaged at rest, lost, or put into the log by somebody else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import psutil
import sqlalchemy as sa
from kafka import KafkaProducer

from bench.actors import made
from bench.fleet import COORDINATORS, Fleet
from infra.catalog.accounting import unaccounted
from infra.catalog.schema import episodes, loads, snapshot_episodes
from infra.edge.remote import RemoteServer
from infra.edge.server import Upload
from infra.episode import encode
from infra.errors import ConflictError, UnavailableError

T = TypeVar("T")
Row = sa.Row[tuple[object, ...]]
_LOOK_S = 8.0  # how long something to hurt is looked for
_POISON = (b"\xff\x00", b"{}", b'{"schema": 99}', json.dumps({"episode_id": "../x"}).encode())


class DataFaults:
    """The kinds; see `bench.faults.Injector`."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._rng = random.Random(seed)
        self._flipped: list[tuple[str, str, bytes]] = []  # id, key, the right bytes

    def mend(self) -> int:
        """Once all is settled: put right the objects that were damaged too late for the reader to notice; how many.

        What the reader gave up on stays damaged: it is in quarantine.
        """
        members = sa.select(snapshot_episodes.c.episode_id).where(snapshot_episodes.c.removed.is_(None))
        late = 0
        for episode_id, key, data in self._flipped:
            with self._fleet.catalog.read() as connection:
                found = connection.execute(members.where(snapshot_episodes.c.episode_id == episode_id)).first()
            if found is not None:
                self._fleet.objects.put(key, data)
                late += 1
        return late

    def _do_duplicates_100(self) -> None:
        row = self._newest()
        data = self._fleet.objects.get(row.key)
        left, end = 100, time.monotonic() + 60.0
        with contextlib.closing(self._robot(row.robot_id)) as server:
            while left:
                try:
                    server.submit(Upload(row.episode_id, row.sha256, row.size, data))
                    left -= 1
                except UnavailableError:  # its own requests and these are over the rate of one robot
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.5)

    def _do_other_bytes_under_a_known_id(self) -> None:
        row = self._newest()
        other = made(np.random.default_rng(self._rng.getrandbits(32)), row.robot_id)
        data = encode(replace(other, episode_id=row.episode_id))
        with contextlib.closing(self._robot(row.robot_id)) as server, contextlib.suppress(ConflictError):
            server.submit(Upload(row.episode_id, hashlib.sha256(data).hexdigest(), len(data), data))

    def _do_poison_in_the_log(self) -> None:
        producer = KafkaProducer(bootstrap_servers=self._fleet.settings.kafka_bootstrap, acks="all")
        try:
            for value in _POISON:
                producer.send(self._fleet.settings.kafka_topic, value).get(20)
        finally:
            producer.close(timeout=1)

    def _do_bit_flip_at_rest(self) -> None:
        """In an object that is in a snapshot, before the learner's end has it: its prefetcher is stopped meanwhile."""
        prefetcher = self._fleet.prefetcher()
        prefetcher.suspend()
        try:
            row = _until(self._unread)
            right = self._fleet.objects.get(row.key)
            data = bytearray(right)
            data[len(data) // 2] ^= 1
            self._flipped.append((row.episode_id, row.key, right))
            self._fleet.objects.put(row.key, bytes(data))
        finally:
            with contextlib.suppress(psutil.Error):
                prefetcher.resume()

    def _do_committed_object_vanishes(self) -> None:
        """One that no coordinator has looked at: they are stopped meanwhile."""
        with self._suspended(COORDINATORS):
            self._fleet.objects.delete(_until(self._unsettled).key)

    def _newest(self) -> Row:
        with self._fleet.catalog.read() as connection:
            newest = sa.select(episodes).order_by(episodes.c.committed_at.desc()).limit(1)
            row = connection.execute(newest).first()
        if row is None:
            raise TimeoutError("nothing was committed yet")
        return row

    def _unsettled(self) -> Row | None:
        """A committed episode that is neither in a snapshot nor in quarantine."""
        query = sa.select(episodes).where(unaccounted(episodes)).order_by(episodes.c.committed_at.desc()).limit(1)
        with self._fleet.catalog.read() as connection:
            return connection.execute(query).first()

    def _unread(self) -> Row | None:
        """A member that the prefetcher has not fetched, nor is fetching: of a later version than it is at."""
        cache = self._fleet.settings.cache_dir / "learner"
        cached = {path.stem for path in cache.glob("*/*.tar")}
        held = sa.select(sa.func.coalesce(sa.func.max(loads.c.version), 0)).where(loads.c.reader == "learner")
        query = (
            sa.select(episodes, snapshot_episodes.c.added)
            .join(snapshot_episodes, snapshot_episodes.c.episode_id == episodes.c.episode_id)
            .where(snapshot_episodes.c.added > held.scalar_subquery(), snapshot_episodes.c.removed.is_(None))
            .order_by(snapshot_episodes.c.added)
        )
        with self._fleet.catalog.read() as connection:
            missing = [row for row in connection.execute(query) if row.sha256 not in cached]
        later = [row for row in missing if row.added > missing[0].added]
        return self._rng.choice(later) if later else None

    @contextlib.contextmanager
    def _suspended(self, names: Sequence[str]) -> Iterator[None]:
        pids = [self._fleet.supervisor.pid(name) for name in names]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _robot(self, robot: str) -> RemoteServer:
        return RemoteServer(self._fleet.url, self._fleet.token(robot), robot_id=robot)


def _until(look: Callable[[], T | None]) -> T:
    """What `look` finds, in time; TimeoutError otherwise."""
    end = time.monotonic() + _LOOK_S
    while time.monotonic() < end:
        if (found := look()) is not None:
            return found
        time.sleep(0.2)
    raise TimeoutError("nothing to hurt came by")
