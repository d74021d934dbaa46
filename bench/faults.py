"""Faults that a soak injects: a seeded schedule of kinds, and what does each to the fleet and undoes it.

A method `_do_<kind>` is a kind. It returns when the fault is over, its effects perhaps not; faults of the data itself
are in `bench.faults_data`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil
from kafka.errors import KafkaError

from bench.faults_data import DataFaults
from bench.fleet import COORDINATORS, Fleet
from infra.errors import LwdError, UnavailableError

ONCE = ("broker_loses_its_log",)  # a heavy one: in the first round only


@dataclass(frozen=True)
class Fault:
    """One injection: when (seconds since the start) and what."""

    at: float
    kind: str


def schedule(seed: int, every_s: float, kinds: Sequence[str]) -> Iterator[Fault]:
    """Endless and seeded: every kind once, in random order, then again; the times lie 0.5 to 1.5 `every_s` apart."""
    rng, at, left = random.Random(seed), 0.0, sorted(kinds)
    while left:
        order = left[:]
        rng.shuffle(order)
        for kind in order:
            at += rng.uniform(0.5, 1.5) * every_s
            yield Fault(at, kind)
        left = [kind for kind in left if kind not in ONCE]


class Injector(DataFaults):
    """Does faults to a fleet, one after another, in a thread of its own.

    Attributes:
        done: what was injected: kind, and seconds since the start from when to when.
        skipped: how often a kind could not be done: the process was just starting, there was nothing to hurt.
    """

    def __init__(self, fleet: Fleet, seed: int, every_s: float, *, only: Sequence[str] = ()) -> None:
        super().__init__(fleet, seed)
        kinds = [name.removeprefix("_do_") for name in sorted(dir(self)) if name.startswith("_do_")]
        self.kinds: dict[str, Callable[[], None]] = {
            kind: getattr(self, f"_do_{kind}") for kind in kinds if not only or kind in only
        }
        self._plan = schedule(seed, every_s, list(self.kinds))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self.done: list[dict[str, object]] = []
        self.skipped: Counter[str] = Counter()
        self.broken: BaseException | None = None  # what ended the thread, if not `stop`

    def start(self) -> None:
        self._began = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """No further faults; waits for the one under way, and has every server serve again."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self.broken is not None:
            raise self.broken
        self._fleet.start_servers()

    def _run(self) -> None:
        try:
            late = 0.0
            for fault in self._plan:
                if self._stop.wait(max(0.0, fault.at + late - self._now())):
                    return
                began = self._now()
                late = max(late, began - fault.at)  # one that took long: the next ones do not follow at once
                if self.inject(fault.kind):
                    self.done.append({"kind": fault.kind, "at": round(began, 1), "until": round(self._now(), 1)})
                else:
                    self.skipped[fault.kind] += 1
        except BaseException as error:
            self.broken = error

    def inject(self, kind: str) -> bool:
        """Whether the fault could be done."""
        try:
            self.kinds[kind]()
        except (psutil.Error, ProcessLookupError, LwdError, KafkaError, TimeoutError):
            return False
        return True

    def _now(self) -> float:
        return time.monotonic() - self._began

    # processes

    def _signal(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self._fleet.supervisor.pid(name), number)

    def _do_kill_actors(self) -> None:
        supervisor = self._fleet.supervisor
        hosts = [name for name in supervisor.restarts if name.startswith("actors-") and not supervisor.finished(name)]
        if not hosts:
            raise TimeoutError("they are done")
        self._signal(self._rng.choice(hosts))

    def _do_kill_service(self) -> None:
        self._signal("service")

    def _do_kill_relay(self) -> None:
        self._signal("relay")

    def _do_kill_coordinator(self) -> None:
        self._signal(self._rng.choice(COORDINATORS))

    def _do_kill_reconciler(self) -> None:
        self._signal("reconciler")

    def _do_kill_reader(self) -> None:
        self._signal("reader")

    def _do_kill_prefetcher(self) -> None:
        self._fleet.prefetcher().kill()

    def _do_stop_coordinator_past_its_lease(self) -> None:
        with self._suspended([self._rng.choice(COORDINATORS)]):
            time.sleep(self._fleet.settings.lease_s * 1.5)

    # servers

    def _restart(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        server = getattr(self._fleet.servers, name)
        server.kill()
        meanwhile()
        time.sleep(self._rng.uniform(0, 3))
        for _ in range(3):
            with contextlib.suppress(UnavailableError):
                server.start()
                return
        server.start()

    def _do_kill_broker(self) -> None:
        self._restart("kafka")

    def _do_kill_store(self) -> None:
        self._restart("garage")

    def _do_kill_database(self) -> None:
        self._restart("postgres")

    def _do_broker_loses_its_log(self) -> None:
        self._restart("kafka", self._fleet.servers.kafka.wipe)

    # links

    @contextlib.contextmanager
    def _link(self, name: str, **faults: object) -> Iterator[None]:
        link = getattr(self._fleet, name)
        link.set(**faults)
        try:
            yield
        finally:
            link.clear()
            link.reset()

    def _reset(self, name: str) -> None:
        for _ in range(5):
            getattr(self._fleet, name).reset()
            time.sleep(0.2)

    def _do_store_connections_reset(self) -> None:
        self._reset("store_link")

    def _do_service_connections_reset(self) -> None:
        self._reset("service_link")

    def _do_store_is_silent(self) -> None:
        with self._link("store_link", blackhole=True):
            time.sleep(4.0)

    def _do_service_is_silent(self) -> None:
        with self._link("service_link", blackhole=True):
            time.sleep(4.0)

    def _do_service_is_refused(self) -> None:
        with self._link("service_link", refuse=True):
            time.sleep(3.0)

    def _do_store_answers_503(self) -> None:
        with self._link("store_link", status=503, status_requests=30):
            time.sleep(2.0)

    def _do_store_is_slow(self) -> None:
        with self._link("store_link", delay_s=0.5):
            time.sleep(4.0)

    def _do_answers_of_the_store_truncated(self) -> None:
        with self._link("store_link", cut_after_bytes=self._rng.randint(50, 8000), cut_gently=True, cut_times=10):
            time.sleep(1.5)

    def _do_answers_of_the_service_lost(self) -> None:
        with self._link("service_link", cut_after_bytes=0, cut_times=10):
            time.sleep(1.5)
