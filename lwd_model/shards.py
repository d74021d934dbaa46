"""The offline buffer as files: WebDataset shards of episodes and an index with their digests.

Shards are deterministic: the same episodes in the same order give the same bytes, so that the buffer's version in DVC
changes only when its content does.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.episode import Episode, encode, read_samples, write_samples
from infra.errors import ConfigError, CorruptDataError, StorageFullError

INDEX = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One tar: its name in the buffer's folder, sha256, bytes and number of episodes."""

    name: str
    sha256: str
    bytes: int
    episodes: int


@dataclass(frozen=True)
class BufferIndex:
    """What a buffer holds.

    Attributes:
        shards: in order.
        episodes, steps: totals.
        composition: task -> source -> outcome -> episodes (the paper's Fig. 7, Table IV).
    """

    shards: tuple[Shard, ...]
    episodes: int
    steps: int
    composition: dict[str, dict[str, dict[str, int]]]


def write_buffer(episodes: Iterable[Episode], out_dir: Path, shard_bytes: int = 100 * 2**20) -> BufferIndex:
    """Write episodes as shards `00000.tar` … and `index.json`, which is written last.

    Args:
        episodes: streamed; one shard is held in memory.
        out_dir: made if absent; shards of an earlier buffer there are removed.
        shard_bytes: a shard is closed when its episodes reach this size; DVC prefers 50 to 500 MB.

    Raises:
        ConfigError: no episodes. CorruptDataError: an episode id twice. StorageFullError: the disk is full; there is no
            index then, so that nobody takes the shards for a buffer.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / INDEX).unlink(missing_ok=True)
    for old in out_dir.glob("[0-9]*.tar"):
        old.unlink()
    shards: list[Shard] = []
    counts: Counter[tuple[str, str, str]] = Counter()
    seen: set[str] = set()
    pending: list[Episode] = []
    size = steps = 0
    for episode in episodes:
        if episode.episode_id in seen:
            raise CorruptDataError(f"episode {episode.episode_id} comes twice", "remove the duplicate from the sources")
        seen.add(episode.episode_id)
        counts[episode.task, episode.source, episode.outcome] += 1
        steps += episode.steps
        pending.append(episode)
        size += len(encode(episode))
        if size >= shard_bytes:
            shards.append(_write_shard(pending, out_dir, len(shards)))
            pending, size = [], 0
    if pending:
        shards.append(_write_shard(pending, out_dir, len(shards)))
    if not shards:
        raise ConfigError("the buffer has no episodes", "collect demonstrations, rollouts or play first")
    composition: dict[str, dict[str, dict[str, int]]] = {}
    for (task, source, outcome), count in sorted(counts.items()):
        composition.setdefault(task, {}).setdefault(source, {})[outcome] = count
    index = BufferIndex(tuple(shards), len(seen), steps, composition)
    _write(
        out_dir / INDEX,
        json.dumps({"format": FORMAT, **asdict(index)}, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n",
    )
    return index


def read_index(buffer_dir: Path) -> BufferIndex:
    """The buffer's index.

    Raises:
        CorruptDataError: missing, unreadable or of another format.
    """
    fix = "write the buffer again (`dvc repro buffer`), or `dvc pull` it"
    try:
        data = json.loads((buffer_dir / INDEX).read_text())
        if data.pop("format") != FORMAT:
            raise ValueError("another format")
        shards = tuple(Shard(**shard) for shard in data.pop("shards"))
        return BufferIndex(shards=shards, **data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"buffer index {buffer_dir / INDEX} cannot be read ({error})", fix) from error


def read_buffer(buffer_dir: Path) -> Iterator[Episode]:
    """Stream the episodes in order; each shard's digest is checked before its first episode is yielded.

    Raises:
        CorruptDataError: the index or a shard is missing, truncated or changed; the message names the file.
    """
    for shard in read_index(buffer_dir).shards:
        path = buffer_dir / shard.name
        fix = "restore it (`dvc pull`) or write the buffer again; nothing was learned from it"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CorruptDataError(f"shard {path} cannot be read ({error})", fix) from error
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise CorruptDataError(
                f"shard {path} has {len(data)} bytes and is not what the index says ({shard.bytes} bytes, sha256 "
                f"{shard.sha256[:12]}…)",
                fix,
            )
        yield from read_samples(io.BytesIO(data), name=str(path))


def _write_shard(episodes: list[Episode], out_dir: Path, number: int) -> Shard:
    stream = io.BytesIO()
    write_samples(episodes, stream)
    data = stream.getvalue()
    name = f"{number:05d}.tar"
    _write(out_dir / name, data)
    return Shard(name, hashlib.sha256(data).hexdigest(), len(data), len(episodes))


def _write(path: Path, data: bytes) -> None:
    aside = path.with_suffix(path.suffix + ".part")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageFullError(
            f"{path} ({len(data)} bytes) was not written: {os.strerror(error.errno)}",
            "make room and run the same command again; the episodes' own files are untouched",
        ) from error
