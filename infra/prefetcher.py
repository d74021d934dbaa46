"""The process beside a learner that brings new snapshots' objects to its disk: `python -m infra.prefetcher`.

    <cache>/new/<sha256>.tar    fetched and verified, not yet taken by the reader
    <cache>/kept/<sha256>.tar   taken; the oldest are evicted when room is needed
    <cache>/fetched             the version up to which all was fetched

A cache is a copy: it may be emptied, altered or deleted at any time. The reader notices by `fetched`, which is gone, or
says that all is there where it is not, and starts another prefetcher.

Both together stay within the disk budget; when `new` alone fills it, fetching waits for the reader. Four objects of an
increment are fetched at once. A store that does not answer is asked again for ever, with jittered pauses; an object
that is missing or wrong there is tried a bounded number of times and then withdrawn by a *new* snapshot, so that every
reader drops it at the same version. One whose bytes break off each time is withdrawn only if another one comes whole:
withdrawing is for good, and must not follow from a network that cuts every answer.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

import sqlalchemy as sa

from infra.catalog import Catalog, schema
from infra.crashpoints import crashpoint
from infra.errors import CorruptDataError, StorageFullError, UnavailableError
from infra.files import write_durably
from infra.objects import ObjectStore, UnreadableError
from infra.plane import open_catalog, open_objects
from infra.process import backoff, log_to, process_arguments, run_process
from infra.settings import MIB, load_settings
from infra.snapshots import Difference, Member, Snapshots
from infra.telemetry import metrics

_log = logging.getLogger("lwd.prefetcher")
_AT_ONCE = 4
_WITNESSES = 5
_FREED_AT_ONCE = 20  # this part of the budget
_PROBE_BYTES = 65_536


@dataclass(frozen=True)
class Cache:
    """The folder that reader and prefetcher share."""

    root: Path

    @property
    def new(self) -> Path:
        return self.root / "new"

    @property
    def kept(self) -> Path:
        return self.root / "kept"

    def create(self) -> None:
        """Make the folders, where they are missing; OSError where that cannot be."""
        self.new.mkdir(parents=True, exist_ok=True)
        self.kept.mkdir(parents=True, exist_ok=True)

    def mark(self, version: int) -> None:
        """Say that all of `version` was fetched."""
        aside = self.root / "fetched.tmp"
        aside.write_text(str(version))
        os.replace(aside, self.root / "fetched")

    def marked(self) -> int | None:
        """The version up to which all was fetched; None if the cache was emptied since."""
        try:
            return int((self.root / "fetched").read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def probe(self) -> None:
        """OSError unless files can be written to both folders, which are made where they are missing."""
        self.create()
        for folder in (self.new, self.kept):
            path = folder / "probe.tmp"
            path.write_bytes(bytes(_PROBE_BYTES))
            path.unlink(missing_ok=True)

    def keep(self, path: Path) -> None:
        """Let a file of `new` be evicted from now on."""
        try:
            os.replace(path, self.kept / path.name)
        except FileNotFoundError:  # the cache was emptied meanwhile
            self.create()

    def used(self) -> int:
        """Bytes in both folders."""
        return sum(size for folder in (self.new, self.kept) for _, size, _ in _files(folder))

    def make_room(self, size: int, budget: int, under_way: int = 0) -> bool:
        """Evict the oldest kept files until `size` more bytes fit beside those under way; False if they do not.

        An object larger than the whole budget is let into an empty cache: it must pass somehow.
        """
        used = self.used() + under_way
        for path, freed, _ in sorted(_files(self.kept), key=lambda file: file[2]):
            if used + size <= budget:
                break
            path.unlink(missing_ok=True)
            used -= freed
        return used + size <= budget or used == 0


def next_increment(catalog: Catalog, after: int) -> Difference | None:
    """The smallest step from version `after` to a later one whose new members are all still members today.

    Usually that is one version. Where a member was withdrawn later, perhaps because it cannot be read any more, the
    step reaches to the version that withdrew it and leaves it out. None when `after` is the latest.
    """
    snapshots, table = Snapshots(catalog), schema.snapshot_episodes
    if snapshots.latest().version <= after:
        return None
    target: int | None = after + 1
    while target is not None:
        version = target
        query = sa.select(sa.func.max(table.c.removed)).where(
            table.c.added > after, table.c.added <= version, table.c.removed > version
        )
        with catalog.read() as connection:
            target = connection.execute(query).scalar()
    return snapshots.increment(after, version)


class Prefetcher:
    """Fetches what leads from one snapshot to the next, in order.

    Args:
        catalog, objects: where to look and where to fetch.
        cache: shared with the reader.
        budget: bytes of the cache.
        after: version that the reader holds already.
        retries: tries for an object that the store answers wrongly for.
        name: the reader's, recorded with what is withdrawn.
        pause_s: base of the pause between tries.
    """

    def __init__(
        self,
        catalog: Catalog,
        objects: ObjectStore,
        cache: Cache,
        *,
        budget: int,
        after: int = 0,
        retries: int = 5,
        name: str = "reader",
        pause_s: float = 0.1,
    ) -> None:
        self._catalog = catalog
        self._snapshots = Snapshots(catalog)
        self._objects = objects
        self._cache = cache
        self._budget = budget
        self._retries = retries
        self._name = name
        self._pause_s = pause_s
        self._done: set[str] = set()  # digests of this increment that were fetched; the reader may have taken them
        self._free = 0  # bytes of the cache that nothing is meant for yet; there may be more
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
        self.version = after
        cache.create()
        for leftover in cache.new.glob("*.tmp"):
            leftover.unlink(missing_ok=True)

    def step(self, stop: threading.Event) -> bool:
        """Fetch one increment whole; False when there is nothing to do or no room yet."""
        self._cache.create()
        increment = next_increment(self._catalog, self.version)
        if increment is None:
            return False
        # An object may serve several episodes: one that cannot be read fails them all.
        wanted = {member.sha256: member for member in increment.added if member.sha256 not in self._done}
        failed = self._fetch_all(list(wanted.values()), stop)
        for sha256, problem in failed.items():
            self._withdraw([m.episode_id for m in increment.added if m.sha256 == sha256], problem)
        if failed or not self._done.issuperset(wanted):
            return False  # with what failed, look again from the new snapshot
        self._cache.mark(increment.version)
        self.version = increment.version
        self._done.clear()
        return True

    def run(self, stop: threading.Event, poll_s: float) -> None:
        """Fetch until `stop`; a catalog or a disk in trouble is waited for."""
        troubles = 0
        while not stop.is_set():
            try:
                worked = self.step(stop)
                troubles = 0
            except (UnavailableError, StorageFullError, OSError) as error:
                _log.warning("waiting: %s", error)
                worked, troubles = False, troubles + 1
            if not worked:
                stop.wait(poll_s + (backoff(troubles) if troubles else 0.0))

    def _fetch_all(self, members: Sequence[Member], stop: threading.Event) -> dict[str, str]:
        """Bring objects to `new`, several at once, as far as there is room; by digest, the problem of what cannot be.

        Raises:
            UnavailableError, StorageFullError, OSError: one of them; what was under way beside it was finished.
        """
        waiting, running = deque(members), dict[Future[str | None], Member]()
        failed: dict[str, str] = {}
        trouble: BaseException | None = None
        while True:
            while waiting and len(running) < _AT_ONCE and not (stop.is_set() or failed or trouble):
                if self._cached(waiting[0]):
                    self._fetched(waiting.popleft())
                    continue
                if not self._has_room(waiting[0].size, sum(member.size for member in running.values())):
                    break
                member = waiting.popleft()
                running[self._pool.submit(self._fetch, member, stop)] = member
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                member = running.pop(future)
                if (error := future.exception()) is not None:
                    trouble = trouble or error
                elif (problem := future.result()) is not None:
                    failed[member.sha256] = problem
                elif not stop.is_set() or self._cached(member):
                    self._fetched(member)
        if trouble is not None:
            raise trouble
        return failed

    def _has_room(self, size: int, under_way: int) -> bool:
        """Whether an object fits. What was free stays free, since nobody else adds to the cache: its folders, which may
        hold very many files, are looked at only once that is used up, and then more is freed than one object needs.
        """
        if size > self._free:
            for wanted in (max(size, self._budget // _FREED_AT_ONCE), size):
                if self._cache.make_room(wanted, self._budget, under_way):
                    self._free = wanted
                    break
            else:
                return False
        self._free -= size
        return True

    def _fetched(self, member: Member) -> None:
        self._done.add(member.sha256)
        crashpoint("prefetcher.fetched")

    def _cached(self, member: Member) -> bool:
        """Whether the object is in `new`, where need be brought back from `kept`."""
        target, kept = self._cache.new / f"{member.sha256}.tar", self._cache.kept / f"{member.sha256}.tar"
        if _holds(target, member.sha256):
            return True
        if _holds(kept, member.sha256):
            os.replace(kept, target)
            return True
        remove(target)  # damaged, or no file at all
        return False

    def _fetch(self, member: Member, stop: threading.Event) -> str | None:
        """Bring one object to `new`; after all tries, the problem. Nothing is brought when `stop` is set meanwhile."""
        problem: CorruptDataError | UnreadableError | None = None
        began = time.monotonic()
        for attempt in range(self._retries + 1):
            if attempt == self._retries:
                if not isinstance(problem, UnreadableError):
                    break
                self._see_others_come(member)  # then it has one try more: the network may have come back meanwhile
            try:
                data = self._read(member)
            except (CorruptDataError, UnreadableError) as error:
                _log.warning("try %d: %s", attempt + 1, error.problem)
                problem = error
                metrics.PREFETCH_RETRIES.inc()
                if stop.wait(backoff(attempt, self._pause_s)):
                    return None
            else:
                write_durably(self._cache.new / f"{member.sha256}.tar", data)
                metrics.PREFETCHED.inc()
                metrics.PREFETCHED_BYTES.inc(len(data))
                metrics.PREFETCH_SECONDS.observe(time.monotonic() - began)
                return None
        return problem.problem if problem else None

    def _read(self, member: Member) -> bytes:
        data = self._objects.get(member.key)
        if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
            raise CorruptDataError(
                f"object {member.key} holds {len(data)} bytes that are not those of its digest",
                "restore it in the store, or collect the episode again",
            )
        return data

    def _see_others_come(self, member: Member) -> None:
        """Withdrawing is for good: see that it is this object which does not come, and not every one.

        Raises:
            UnreadableError: others do not come either.
        """
        members = self._snapshots.episodes(self._snapshots.latest().version)
        others = [other for other in members if other.sha256 != member.sha256]
        trouble: UnreadableError | None = None
        for other in random.sample(others, min(_WITNESSES, len(others))):
            try:
                self._objects.get(other.key)
            except UnreadableError as error:
                trouble = error
            except CorruptDataError:
                return
            else:
                return
        if trouble is not None:
            raise trouble

    def _withdraw(self, episode_ids: Sequence[str], problem: str) -> None:
        reason = f"{self._name} gave up after {self._retries} tries: {problem}"
        version = self._snapshots.withdraw(episode_ids, reason=reason, writer=self._name).version
        metrics.WITHDRAWN.inc(len(episode_ids))
        _log.error("episodes %s withdrawn by snapshot %d: %s", ", ".join(episode_ids), version, problem)


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    found = []
    for entry in os.scandir(folder):
        try:
            stat = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # moved by the reader meanwhile
            continue
        if S_ISREG(stat.st_mode):
            found.append((Path(entry.path), stat.st_size, stat.st_mtime))
    return found


def remove(path: Path) -> None:
    """Remove whatever has this name in a cache, if anything has."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _holds(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except (FileNotFoundError, IsADirectoryError):
        return False


def _serve(options: argparse.Namespace, stop: threading.Event) -> None:
    settings = load_settings(home=options.home)
    log_to(settings.logs_dir, f"prefetcher-{options.reader}")
    metrics.serve(settings, f"prefetcher-{options.reader}")
    catalog, cache = open_catalog(settings), Cache(settings.cache_dir / options.reader)
    metrics.CACHE_BYTES.follow(lambda: float(cache.used()))
    metrics.CACHE_LIMIT.set(settings.cache_max_mib * MIB)
    Prefetcher(
        catalog,
        open_objects(settings),
        cache,
        budget=settings.cache_max_mib * MIB,
        after=options.after,
        retries=settings.fetch_retries,
        name=options.reader,
    ).run(stop, settings.poll_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or until the reader's process ends; exit code of the error otherwise."""
    parser = process_arguments("infra.prefetcher", "Fetch new snapshots to a cache.")
    parser.add_argument("--reader", default="learner", help="name of the reader; its cache lies below <home>/cache")
    parser.add_argument("--after", type=int, default=0, help="snapshot version that the reader holds")
    options = parser.parse_args(arguments)
    return run_process(options, lambda stop: _serve(options, stop), label="prefetcher")


if __name__ == "__main__":
    sys.exit(main())
