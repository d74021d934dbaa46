"""Where bytes are kept: a robot's own `incoming/` keys, and content-addressed places that no robot can write.

A key is a relative POSIX path. Nothing here trusts the writer's word: what is referenced was read back first.
`directory` keeps objects as files, `s3` in any S3 server; both keep the same promises, tested by the same tests.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from infra.episode import EPISODE_ID
from infra.errors import ConfigError, UnavailableError

Payload = bytes | Path
ASIDE = ".aside"  # no key has a part of this name: there a store keeps what is not an object yet
ROBOT_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_MAX_KEY_BYTES = 1024


class UnreadableError(UnavailableError):
    """The store serves, and says that it has the object, but at each try its bytes did not come whole.

    They are lost at rest (a server that finds a damaged block breaks its answer off), or cut on the way. Who needs many
    objects counts it against this one; uploading it again mends it in either case.
    """


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its key, bytes, and when it was last written (seconds since the epoch, the store's clock)."""

    key: str
    size: int
    modified: float


class ObjectStore(Protocol):
    """What the data plane asks of a store.

    Every method raises UnavailableError when the store does not answer and StorageFullError when it has no room; those
    that read an object raise UnreadableError, one kind of the former, when it is only that object that does not come.
    """

    def put(self, key: str, data: Payload) -> None:
        """Write an object whole or not at all, durable on return; replaces what was there."""

    def accept(self, incoming: str, sha256: str, size: int) -> str:
        """Verify what the store itself holds at `incoming`, and copy it, inside the store, to its content address
        `episodes/<sha[:2]>/<sha>.tar`; returns that key. What was verified is what is copied, whatever the robot
        writes meanwhile.

        Raises CorruptDataError, leaving nothing behind, if it holds nothing there or other bytes.
        """

    def get(self, key: str) -> bytes:
        """The object's bytes; CorruptDataError if there is none."""

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose key begins with `prefix`, a folder, in order of key."""

    def sweep_unfinished(self, older_than_s: float) -> int:
        """Remove what writes left that were begun longer ago and never ended; returns how many. No object goes."""


class PresigningStore(ObjectStore, Protocol):
    """A store that robots reach by URLs which say what they permit, and until when."""

    def presign_put(self, key: str, size: int, seconds: float) -> str:
        """A URL for PUTs of just so many bytes to `key`."""

    def presign_get(self, key: str, seconds: float) -> str:
        """A URL for GETs of `key`."""


class OpeningStore(ObjectStore, Protocol):
    """A store whose objects are files at hand."""

    def open(self, key: str) -> BinaryIO:
        """The object, to be read and closed; CorruptDataError if there is none."""


def checked_key(key: str) -> str:
    """The key; ConfigError if a store could take it for a place outside itself, or for another key."""
    parts = key.split("/")
    if any(part in ("", ".", "..", ASIDE) for part in parts) or not key.isprintable():
        raise ConfigError(f"object key {key!r} leaves the store", "give a relative path without '..'")
    if len(key.encode()) > _MAX_KEY_BYTES:
        raise ConfigError(f"object key {key[:80]!r}… is too long", f"give one of at most {_MAX_KEY_BYTES} bytes")
    return key


def incoming_key(robot_id: str, episode_id: str) -> str:
    """A fresh key for one upload, in the robot's own area; ConfigError if a name could leave it."""
    return f"{_incoming(robot_id, episode_id)}-{uuid.uuid4().hex[:8]}.tar"


def permitted_key(robot_id: str, episode_id: str, sha256: str) -> str:
    """The one key for these bytes of a robot's episode, however often it uploads them; ConfigError likewise."""
    episode_key(sha256)
    return f"{_incoming(robot_id, episode_id)}-{sha256[:8]}.tar"


def _incoming(robot_id: str, episode_id: str) -> str:
    if not ROBOT_ID.fullmatch(robot_id):
        raise ConfigError(f"robot id {robot_id!r} is not a plain name", "use letters, digits, '-', '_', '.', up to 64")
    if not EPISODE_ID.fullmatch(episode_id):
        raise ConfigError(f"episode id {episode_id!r} is not 32 lower-case hex digits", "make it with new_episode_id()")
    return f"incoming/{robot_id}/{episode_id}"


def episode_key(sha256: str) -> str:
    """The content-addressed key of an episode object."""
    if not _SHA256.fullmatch(sha256):
        raise ConfigError(
            f"{sha256!r} is not a sha256 of 64 lower-case hex digits", "send hashlib.sha256().hexdigest()"
        )
    return f"episodes/{sha256[:2]}/{sha256}.tar"
