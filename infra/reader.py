"""The learner's view of the replay data: snapshots in order, whole, verified, however the prefetcher fares.

A living reader pins the version that it holds: garbage collection leaves what that version needs. The pin ends by
itself, 10 minutes after the last sign of life, so that a reader that is started again finds its version still there.

The cache may be emptied, altered or deleted meanwhile: what is missing is fetched again by another prefetcher. One that
cannot be used, since its folder cannot be written, is an error that is raised until it can.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from infra.catalog import dialect, schema
from infra.collect import pin
from infra.episode import Episode, decode
from infra.errors import ConfigError, CorruptDataError, UnavailableError
from infra.plane import open_catalog
from infra.prefetcher import Cache, next_increment, remove
from infra.settings import Settings
from infra.snapshots import Member, Snapshots
from infra.telemetry import metrics, milestones
from infra.telemetry.catalog_metrics import times_of

_log = logging.getLogger("lwd.reader")
_QUICK_S = 5.0
_MAX_QUICK_DEATHS = 8
_PIN_EVERY_S = 60.0
_PROBE_EVERY_S = 1.0


@dataclass(frozen=True)
class Increment:
    """What leads from snapshot `after` to snapshot `version`.

    Attributes:
        digest: of snapshot `version`; ranks that hold the same (version, digest) hold the same data.
        added: new episodes, in order of the version that added them, then of id.
        removed: ids that are no members any more.
    """

    after: int
    version: int
    digest: str
    added: tuple[Episode, ...]
    removed: tuple[str, ...]


class SnapshotReader:
    """Reads snapshots one after another, through a prefetcher process of its own.

    Args:
        settings: of the deployment; the process gets the same home.
        name: of this reader; its cache, its log and its load times bear it.
        after: version to go on from, held already (from a checkpoint); 0 for the beginning.
        follow: start the prefetcher; without it, what is in the cache can be read.

    Raises:
        ConfigError: `after` lies ahead of the catalog, or the catalog has no tables.
    """

    def __init__(self, settings: Settings, *, name: str = "learner", after: int = 0, follow: bool = True) -> None:
        self._settings = settings
        self._name = name
        self._catalog = open_catalog(settings)
        self._snapshots = Snapshots(self._catalog)
        self._cache = Cache(settings.cache_dir / name)
        with self._usable():
            self._cache.create()
        start = self._snapshots.get(after)  # ConfigError when it is ahead of the catalog
        self.version, self.digest = after, start.digest
        self._pin_due = self._probe_due = 0.0
        self._pin()
        self._taken: dict[str, Episode] = {}  # by sha256: of the increment that is still incomplete
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._due = 0.0
        self._quick_deaths = 0
        self.respawns = 0
        self._follow = follow
        if follow:
            self._spawn()

    @property
    def prefetcher_pid(self) -> int | None:
        """Process id of the prefetcher."""
        return self._process.pid if self._process else None

    def lag(self) -> int:
        """How many versions the catalog is ahead."""
        return self._snapshots.latest().version - self.version

    def poll(self) -> Increment | None:
        """The next increment if it is complete, else None; never waits.

        Increments come in order and exactly once. An object that cannot be read ends in quarantine by a later
        snapshot; the increment then reaches to that one and leaves the episode out.

        Raises:
            UnavailableError: the prefetcher dies again and again, and the message names its log; or the cache cannot be
                used. Both may be over at the next call.
        """
        self._keep_alive()
        if time.monotonic() >= self._pin_due:
            self._pin()
        with self._usable():
            fetched = self._cache.marked()  # before the look at the files: what it speaks of must be there
            step = next_increment(self._catalog, self.version)
            if step is None:
                return None
            absent = [self._take(member) for member in step.added if member.sha256 not in self._taken]
            if any(member.sha256 not in self._taken for member in step.added):
                if time.monotonic() >= self._probe_due:
                    self._cache.probe()
                    self._probe_due = time.monotonic() + _PROBE_EVERY_S
                lost = fetched is None or (fetched >= step.version and any(absent))
                if self._process is not None and lost:
                    _log.warning("the cache %s lost what was fetched: it is fetched again", self._cache.root)
                    self._kill()
                self._sweep()
                return None
        added = tuple(self._taken[member.sha256] for member in step.added)
        increment = Increment(self.version, step.version, step.digest, added, step.removed)
        self._show(increment, first=self._record(step.version))
        self.version, self.digest = step.version, step.digest
        self._taken.clear()
        return increment

    def wait(self, timeout_s: float) -> Increment | None:
        """The next increment, waited for at most `timeout_s`; None if none came."""
        end = time.monotonic() + timeout_s
        while (increment := self.poll()) is None and time.monotonic() < end:
            time.sleep(min(self._settings.poll_s, 0.05))
        return increment

    def close(self) -> None:
        """Stop the prefetcher and let the catalog go; the cache stays, and the pin until it expires."""
        self._follow = False
        self._kill()
        self._catalog.close()

    def __enter__(self) -> SnapshotReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, member: Member) -> bool:
        """Decode an object and let it be evicted, or withdraw it; whether the cache lacks it."""
        path = self._cache.new / f"{member.sha256}.tar"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return True
        except IsADirectoryError:
            data = b""
        if hashlib.sha256(data).hexdigest() != member.sha256:
            _log.warning("%s was damaged in the cache and is fetched again", path.name)
            remove(path)
            self._kill()  # the next prefetcher finds it missing
            return True
        try:
            self._taken[member.sha256] = decode(data, name=member.key)
        except Exception as error:  # whatever bytes can provoke is that episode's matter
            said = error.problem if isinstance(error, CorruptDataError) else f"{type(error).__name__}: {error}"[:200]
            reason = f"{self._name} cannot read it: {said}"
            self._snapshots.withdraw([member.episode_id], reason=reason, writer=self._name)
            path.unlink(missing_ok=True)
            return False
        self._cache.keep(path)
        return False

    def _sweep(self) -> None:
        """Let be evicted what is not waited for: withdrawn since, or fetched twice. It would hold its room for ever."""
        present = list(self._cache.new.glob("*.tar"))  # first: what comes after the look at the catalog is not judged
        latest = self._snapshots.latest().version
        added = self._snapshots.increment(self.version, latest).added
        needed = {member.sha256 for member in added} - self._taken.keys()
        for path in present:
            if path.stem not in needed:
                self._cache.keep(path)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """An error of the file system, as one that names the cache."""
        try:
            yield
        except OSError as error:
            raise UnavailableError(
                f"the cache {self._cache.root} of {self._name} cannot be used: {error.strerror or error}",
                "make it a folder that this user can write, with room on its disk; what it held is fetched again",
            ) from error

    def _pin(self) -> None:
        with self._catalog.begin() as connection:
            pin(connection, self._name, self.version)
        self._pin_due = time.monotonic() + _PIN_EVERY_S

    def _show(self, increment: Increment, first: bool) -> None:
        """The increment, as metrics and traces; what this reader had read in an earlier life is no latency."""
        metrics.READER_VERSION.set(increment.version, reader=self._name)
        metrics.READER_EPISODES.inc(len(increment.added))
        if first and milestones.on():
            milestones.loaded(self._name, *times_of(self._catalog, [e.episode_id for e in increment.added]))

    def _record(self, version: int) -> bool:
        """When each version reached this reader, the first time; and that it holds the last. Whether that is new."""
        with self._catalog.begin() as connection:
            pin(connection, self._name, version)
            at, new = dialect.now(connection), False
            for loaded in range(self.version + 1, version + 1):
                row = {"reader": self._name, "version": loaded, "loaded_at": at}
                new = dialect.insert_if_absent(connection, schema.loads, row)
        self._pin_due = time.monotonic() + _PIN_EVERY_S
        return new

    def _keep_alive(self) -> None:
        if not self._follow:
            return
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            code, quick = self._process.returncode, now - self._started < _QUICK_S
            self._process = None
            self._quick_deaths = self._quick_deaths + 1 if quick else 0
            _log.warning("prefetcher ended with %s; starting another", code)
            if self._quick_deaths >= _MAX_QUICK_DEATHS or code == ConfigError.exit_code:
                raise UnavailableError(
                    f"the prefetcher of {self._name} does not stay alive (last exit code {code})",
                    f"read {self._settings.logs_dir / f'prefetcher-{self._name}.jsonl'}",
                )
            self._due = now + min(0.1 * 2.0**self._quick_deaths, 5.0)
        if self._process is None and now >= self._due:
            self.respawns += 1
            metrics.PREFETCHER_RESTARTS.inc()
            self._spawn()

    def _spawn(self) -> None:
        settings = self._settings
        with self._usable():
            self._cache.create()
            self._cache.mark(self.version)
        environment = os.environ | {
            "LWD_CATALOG": settings.catalog_url,
            "LWD_CACHE_MAX_MIB": str(settings.cache_max_mib),
            "LWD_FETCH_RETRIES": str(settings.fetch_retries),
            "LWD_POLL_S": str(settings.poll_s),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "infra.prefetcher", "--home", str(settings.home), "--reader", self._name]
        command += ["--after", str(self.version), "--parent", str(os.getpid())]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        self._started = time.monotonic()

    def _kill(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._follow:
            self._due = time.monotonic()
        self._process = None
