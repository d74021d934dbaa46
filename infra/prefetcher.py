"""The process beside a learner that brings new snapshots' objects to its disk: `python -m infra.prefetcher`.

    <cache>/new/<sha256>.tar    fetched and verified, not yet taken by the reader
    <cache>/kept/<sha256>.tar   taken; the oldest are evicted when room is needed

Both together stay within the disk budget; when `new` alone fills it, fetching waits for the reader. A store that
does not answer is asked again for ever, with jittered pauses; an object that is missing or wrong there is tried a
bounded number of times and then withdrawn by a *new* snapshot, so that every reader drops it at the same version.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from infra.catalog import Catalog, schema
from infra.crashpoints import crashpoint
from infra.errors import CorruptDataError, LwdError, StorageFullError, UnavailableError
from infra.files import write_durably
from infra.objects import DirectoryStore, ObjectStore
from infra.process import backoff, die_with_parent, log_to, stop_on_signal
from infra.settings import MIB, load_settings
from infra.snapshots import Difference, Member, Snapshots

_log = logging.getLogger("lwd.prefetcher")


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
        self.new.mkdir(parents=True, exist_ok=True)
        self.kept.mkdir(parents=True, exist_ok=True)

    def used(self) -> int:
        """Bytes in both folders."""
        return sum(size for folder in (self.new, self.kept) for _, size, _ in _files(folder))

    def make_room(self, size: int, budget: int) -> bool:
        """Evict the oldest kept files until `size` more bytes fit; False if they do not.

        An object larger than the whole budget is let into an empty cache: it must pass somehow.
        """
        used = self.used()
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
        self._objects = objects
        self._cache = cache
        self._budget = budget
        self._retries = retries
        self._name = name
        self._pause_s = pause_s
        self._done: set[str] = set()
        self.version = after
        cache.create()
        for leftover in cache.new.glob("*.tmp"):
            leftover.unlink(missing_ok=True)

    def step(self, stop: threading.Event) -> bool:
        """Fetch one increment whole; False when there is nothing to do or no room yet."""
        increment = next_increment(self._catalog, self.version)
        if increment is None:
            return False
        for member in increment.added:
            if stop.is_set():
                return False
            if member.sha256 in self._done:
                continue
            if not self._fetch(member, stop):
                return False
            self._done.add(member.sha256)
            crashpoint("prefetcher.fetched")
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

    def _fetch(self, member: Member, stop: threading.Event) -> bool:
        """Whether the object is in `new` or is no longer needed."""
        target, kept = self._cache.new / f"{member.sha256}.tar", self._cache.kept / f"{member.sha256}.tar"
        if _holds(target, member.sha256):
            return True
        if _holds(kept, member.sha256):
            os.replace(kept, target)
            return True
        if not self._cache.make_room(member.size, self._budget):
            return False
        for attempt in range(self._retries):
            try:
                data = self._objects.get(member.key)
                if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
                    raise CorruptDataError(
                        f"object {member.key} holds {len(data)} bytes that are not those of its digest",
                        "restore it in the store, or collect the episode again",
                    )
            except CorruptDataError as error:
                _log.warning("try %d of %d: %s", attempt + 1, self._retries, error.problem)
                problem = error.problem
                if stop.wait(backoff(attempt, self._pause_s)):
                    return False
            else:
                write_durably(target, data)
                return True
        reason = f"{self._name} gave up after {self._retries} tries: {problem}"
        version = Snapshots(self._catalog).withdraw([member.episode_id], reason=reason, writer=self._name).version
        _log.error("episode %s withdrawn by snapshot %d: %s", member.episode_id, version, problem)
        return False  # look again from the new snapshot


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    found = []
    for entry in os.scandir(folder):
        try:
            stat = entry.stat()
        except FileNotFoundError:  # moved by the reader meanwhile
            continue
        found.append((Path(entry.path), stat.st_size, stat.st_mtime))
    return found


def _holds(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except FileNotFoundError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or until the reader's process ends; exit code of the error otherwise."""
    parser = argparse.ArgumentParser(prog="python -m infra.prefetcher", description="Fetch new snapshots to a cache.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--reader", default="learner", help="name of the reader; its cache lies below <home>/cache")
    parser.add_argument("--after", type=int, default=0, help="snapshot version that the reader holds")
    parser.add_argument("--parent", type=int, help="stop when this process, which started this one, ends")
    options = parser.parse_args(arguments)
    if options.parent:
        die_with_parent(options.parent)
    stop = stop_on_signal()
    try:
        settings = load_settings(home=options.home)
        log_to(settings.logs_dir, f"prefetcher-{options.reader}")
        catalog = Catalog(settings.catalog_url)
        catalog.check()
        Prefetcher(
            catalog,
            DirectoryStore(settings.objects_dir),
            Cache(settings.cache_dir / options.reader),
            budget=settings.cache_max_mib * MIB,
            after=options.after,
            retries=settings.fetch_retries,
            name=options.reader,
        ).run(stop, settings.poll_s)
    except LwdError as error:
        print(f"prefetcher: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
