"""The robot's spool: episodes on its own disk until the server has confirmed the snapshot that holds them.

Layout of one robot's folder (one owner at a time, held by a file lock):

    open/<id>.log             the episode being recorded: length- and CRC-framed records, appended frame by frame
    closed/<id>.<sha256>.tar  a finished episode as the bytes that will be uploaded (infra.episode.encode)
    aside/                    files found damaged or refused as a conflict: never sent again, kept for a person
    journal.jsonl             what was discarded or set aside, and why

A killed robot leaves at most one unfinished log. At the next start a log that ends in a close record is sealed into
its tar; one that does not is discarded with the reason in the journal, because an attempt whose end nobody saw
has no outcome to learn from.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from infra.edge import values
from infra.edge.framelog import (
    EpisodeEnd,
    EpisodeStart,
    Frame,
    begin_record,
    close_record,
    frame_dims,
    frame_record,
    read_log,
)
from infra.episode import EPISODE_ID, Episode, encode
from infra.errors import ConfigError, ConflictError, CorruptDataError, StorageFullError, named
from infra.files import write_durably

_CLOSED = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{64})\.tar")
_TAR_OVERHEAD = 16384  # headers, padding and the end blocks of a one-episode tar


@dataclass(frozen=True)
class ClosedEpisode:
    """A finished episode waiting in the spool.

    Attributes:
        changed: (key, why) of what `extra` could not hold as it was given; known when it is closed only.
    """

    episode_id: str
    sha256: str
    size: int
    path: Path
    changed: tuple[tuple[str, str], ...] = field(default=(), compare=False)


class Spool:
    """A bounded, fsynced spool for one robot.

    Args:
        root: the robot's folder; created when missing.
        max_bytes: bytes the whole folder may take, sealing included.
        fsync_s: frames reach the disk at least this often, seconds; closing an episode always fsyncs.

    Raises:
        ConflictError: another process owns this spool.
    """

    def __init__(self, root: Path, *, max_bytes: int, fsync_s: float = 0.5) -> None:
        self.root = Path(root)
        self.max_bytes = max_bytes
        self.fsync_s = fsync_s
        self._open_dir, self._closed_dir, self._aside_dir = (self.root / n for n in ("open", "closed", "aside"))
        for folder in (self._open_dir, self._closed_dir, self._aside_dir):
            folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ConflictError(
                f"spool {self.root} belongs to another running process",
                "stop that robot, or give this one its own name",
            ) from error
        self._lock: int | None = lock
        self._owner = os.getpid()
        self._sealing = threading.Lock()  # of the recording and the sending thread: one makes or seals logs at a time
        self._fd: int | None = None
        self._start: EpisodeStart | None = None
        self._dims: tuple[int, int] | None = None  # D and A of the open episode, from its first frame
        self._log_bytes = 0
        self._others = 0  # bytes of everything but the open log, when it was opened
        self._synced = 0.0
        self.recovered = self._recover()

    # Recording

    @property
    def recording(self) -> str | None:
        """The id of the open episode."""
        return self._start.episode_id if self._start is not None else None

    def begin(self, start: EpisodeStart) -> None:
        """Open the log of a new episode.

        Raises:
            ConfigError: a field is not of its type, the id is malformed or was used, an episode is open already, or the
                spool is not this process's.
            StorageFullError: no room; episodes that are closed stay and can still be sent.
        """
        self._owned()
        if not isinstance(start.episode_id, str) or not EPISODE_ID.fullmatch(start.episode_id):
            raise ConfigError(
                f"episode id {named(start.episode_id)} is not 32 lower-case hex digits",
                "use infra.episode.new_episode_id()",
            )
        if self._start is not None:
            raise ConfigError(f"episode {self._start.episode_id} is still open", "close or discard it first")
        record = begin_record(start)
        self._others = self.used_bytes()
        self._require(self._others + 2 * len(record) + _TAR_OVERHEAD)
        log = self._log(start.episode_id)
        with self._sealing, self._full_disk():
            try:
                self._fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            except FileExistsError as error:
                raise ConfigError(
                    f"episode {start.episode_id} has a log already", "give each attempt an id of its own"
                ) from error
            self._start, self._log_bytes, self._dims = start, 0, None
            try:
                self._append(record)
                self._fsync()
            except OSError:  # nothing is recorded yet: leave no half a log, and nothing open
                self._release()
                log.unlink(missing_ok=True)
                raise

    def append(self, frame: Frame) -> None:
        """Append one frame. Survives SIGKILL at once, and a power cut once `fsync_s` has passed.

        Raises:
            ConfigError: no episode is open, or a field is not of its type or of another size than in the frames before;
                the episode goes on without this frame.
            StorageFullError: no room; call `discard`, the closed episodes are untouched.
        """
        if self._start is None:
            raise ConfigError("no episode is open", "call begin() before record()")
        self._owned()
        record = frame_record(frame)
        dims = frame_dims(record)
        if self._dims not in (None, dims):
            raise ConfigError(
                f"a frame of (observation, action) sizes {dims} in an episode of {self._dims}",
                "record frames of one size, or discard the attempt",
            )
        # The sealed tar is written beside the log before the log goes: room for both, or stop now.
        self._require(self._others + 2 * (self._log_bytes + len(record)) + _TAR_OVERHEAD)
        with self._full_disk():
            self._append(record)
            self._dims = dims
            if time.monotonic() - self._synced >= self.fsync_s:
                self._fsync()

    def close(self, end: EpisodeEnd) -> ClosedEpisode:
        """Finish the open episode: close record, fsync, seal into its tar.

        What of `extra` JSON cannot hold is replaced or left out, and named in the journal and in `changed`.

        Raises:
            ConfigError: no episode is open, it has no frame, or a field is not of its type: the episode is still open.
            StorageFullError: no room to seal; the log stays and is sealed once there is room.
        """
        if self._start is None:
            raise ConfigError("no episode is open", "call begin() before close()")
        self._owned()
        episode_id = self._start.episode_id
        if self._dims is None:
            raise ConfigError(f"episode {episode_id} has no frame", "record each step before close(), or discard it")
        extra, changed = values.note(end.extra)
        record = close_record(replace(end, extra=extra), self._dims[0])
        before = self._log_bytes
        with self._full_disk():
            self._append(record)
            try:
                self._fsync()
            except OSError:  # not closed: it may be tried again
                self._cut(before)
                raise
        with self._sealing:
            log = self._log(episode_id)
            self._release()
            try:
                closed = self._seal(log, read_log(log))
            except StorageFullError:
                self._unsealed = True
                raise
        if changed:
            self._journal(
                "extra changed", episode_id, "; ".join(f"{key}: {why}" for key, why in changed.items())[:2000]
            )
        return replace(closed, changed=tuple(changed.items()))

    def discard(self, reason: str) -> None:
        """Drop the open episode, if any, and say why in the journal.

        Raises:
            StorageFullError: not even the journal has room; the episode is dropped all the same.
        """
        if self._start is None:
            return
        self._owned()
        episode_id = self._start.episode_id
        self._release()
        self._drop_log(self._log(episode_id), reason)

    # Emptying

    def pending(self) -> list[ClosedEpisode]:
        """The closed episodes, oldest first; ConfigError if the spool is not this process's."""
        self._owned()
        found = []
        for path in self._closed_dir.glob("*.tar"):
            if (named := _CLOSED.fullmatch(path.name)) is None:  # not written by a spool
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:  # confirmed by the sync thread meanwhile
                continue
            found.append((stat.st_mtime_ns, ClosedEpisode(named[1], named[2], stat.st_size, path)))
        return [closed for _, closed in sorted(found, key=lambda pair: (pair[0], pair[1].episode_id))]

    def read(self, closed: ClosedEpisode) -> bytes:
        """The bytes to upload.

        Raises:
            CorruptDataError: they rotted on this disk; the file was set aside and is not sent.
        """
        data = closed.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != closed.sha256:
            self.set_aside(closed, "bytes differ from their digest: the disk or a person changed them")
            raise CorruptDataError(
                f"spooled episode {closed.episode_id} differs from its digest", f"look at it in {self._aside_dir}"
            )
        return data

    def confirm(self, closed: ClosedEpisode) -> None:
        """Delete an episode that the server holds in a snapshot or in quarantine. Only then."""
        closed.path.unlink(missing_ok=True)
        with self._sealing:  # else the log that begin() has just made would be taken for a dead robot's
            if self._unsealed and self._start is None:
                self._recover()

    def set_aside(self, closed: ClosedEpisode, reason: str) -> None:
        """Keep an episode that can never be sent, and say why in the journal."""
        os.replace(closed.path, self._aside_dir / closed.path.name)
        self._journal("set aside", closed.episode_id, reason)

    def used_bytes(self) -> int:
        """Bytes in the spool's folder."""
        total = 0
        for folder in (self._open_dir, self._closed_dir, self._aside_dir):
            for entry in os.scandir(folder):
                try:
                    total += entry.stat().st_size
                except FileNotFoundError:  # confirmed by the sync thread meanwhile
                    continue
        return total

    def release(self) -> None:
        """Give the spool up: an open episode stays as its log; another process may open it."""
        self._release()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # Recovery and plumbing

    def _owned(self) -> None:
        """ConfigError unless the lock is this process's: a forked one would write into its parent's logs."""
        if self._lock is None:
            raise ConfigError(f"spool {self.root} was released", "open it again")
        if os.getpid() != self._owner:
            raise ConfigError(
                f"spool {self.root} belongs to process {self._owner}, not to process {os.getpid()} forked from it",
                "make the client in the process that records, and one of its own for each",
            )

    def _recover(self) -> list[ClosedEpisode]:
        for leftover in self._closed_dir.glob("*.tmp"):
            leftover.unlink()
        sealed = []
        for log in sorted(self._open_dir.glob("*.log")):
            try:
                sealed.append(self._seal(log, read_log(log)))
            except CorruptDataError as error:
                self._drop_log(log, error.problem)
            except StorageFullError:
                break  # it stays as its log: what is closed already can be sent, and makes the room to seal it
        self._unsealed = any(self._open_dir.glob("*.log"))
        return sealed

    def _seal(self, log: Path, episode: Episode) -> ClosedEpisode:
        data = encode(episode)
        sha256 = hashlib.sha256(data).hexdigest()
        target = self._closed_dir / f"{episode.episode_id}.{sha256}.tar"
        with self._full_disk():
            write_durably(target, data)
        log.unlink()
        return ClosedEpisode(episode.episode_id, sha256, len(data), target)

    def _log(self, episode_id: str) -> Path:
        return self._open_dir / f"{episode_id}.log"

    def _append(self, record: bytes) -> None:
        assert self._fd is not None, "no episode is open"
        try:
            if os.write(self._fd, record) != len(record):
                raise OSError(errno.ENOSPC, "short write")
        except OSError:
            self._cut(self._log_bytes)
            raise
        self._log_bytes += len(record)

    def _cut(self, size: int) -> None:
        """Take back what was written beyond `size`, so that the log stays whole and may go on."""
        assert self._fd is not None
        with suppress(OSError):
            os.ftruncate(self._fd, size)
        self._log_bytes = size

    def _fsync(self) -> None:
        assert self._fd is not None
        os.fdatasync(self._fd)
        self._synced = time.monotonic()

    def _release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self._start, self._dims, self._log_bytes = None, None, None, 0

    def _require(self, total: int) -> None:
        if total > self.max_bytes:
            raise StorageFullError(
                f"spool {self.root} needs {total} of at most {self.max_bytes} bytes",
                "let the robot reach the ingest service to empty it, or raise LWD_SPOOL_MAX_MIB",
            )

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageFullError(
                f"no space left under {self.root}", "free disk space and restart the robot"
            ) from error

    def _drop_log(self, log: Path, reason: str) -> None:
        try:
            self._journal("discarded", log.stem, reason)
        except OSError:  # a full disk: the log makes the room for the line about it
            log.unlink(missing_ok=True)
            with self._full_disk():
                self._journal("discarded", log.stem, reason)
        log.unlink(missing_ok=True)

    def _journal(self, event: str, episode_id: str, reason: str) -> None:
        said = values.note({"reason": reason})[0]  # a driver's own words may be anything
        line = {"event": event, "episode_id": episode_id, "reason": said.get("reason", "too long"), "at": time.time()}
        with (self.root / "journal.jsonl").open("a") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
